//! Owns the names in an object: which of its declared fields comes next.
//!
//! Invariant: a name that is not declared is refused, unless its value is null.

use std::fmt;

use serde::de::{DeserializeSeed, Error, MapAccess, Visitor};

use super::field::Field;
use super::read::Ignored;
use super::reader::{Reader, Step};
use crate::error::ApiError;

/// The error about a name that is not declared.
const MAX_NAME_CHARS: usize = 200;

impl Reader {
    /// The next declared field of an object, which is then entered.
    ///
    /// # Errors
    /// A field comes twice, or is not declared and has a value.
    pub(crate) fn next_field<'de, A: MapAccess<'de>>(
        &self,
        map: &mut A,
        fields: &'static [Field],
        seen: &mut [bool],
    ) -> Result<Option<&'static Field>, A::Error> {
        while let Some(name) = map.next_key_seed(Name(fields))? {
            match name {
                Found::Known(index) => {
                    self.enter(Step::Field(&fields[index]));
                    if std::mem::replace(&mut seen[index], true) {
                        return Err(self.invalid("is given twice"));
                    }
                    return Ok(Some(&fields[index]));
                }
                Found::Unknown(name) => {
                    self.enter(Step::Key(name));
                    if map.next_value_seed(self.seed::<Ignored>())?.is_some() {
                        return Err(self.fail(ApiError::unknown_parameter(self.path())));
                    }
                    self.leave();
                }
            }
        }
        Ok(None)
    }
}

/// The name of a field.
enum Found {
    /// Its index among those that are declared.
    Known(usize),
    Unknown(String),
}

struct Name(&'static [Field]);

impl<'de> DeserializeSeed<'de> for Name {
    type Value = Found;

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<Found, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for Name {
    type Value = Found;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the name of a field")
    }

    fn visit_str<E: Error>(self, name: &str) -> Result<Found, E> {
        Ok(match self.0.iter().position(|field| field.name == name) {
            Some(index) => Found::Known(index),
            None => Found::Unknown(name.chars().take(MAX_NAME_CHARS).collect()),
        })
    }
}
