//! Owns the place in a body that is being read, and what is wrong there.
//!
//! Invariant: an error names its place by a path in JSON's terms, and holds at most a part of what a client sent.

use std::cell::RefCell;
use std::fmt::{self, Write};
use std::marker::PhantomData;

use serde::de::{DeserializeSeed, Error, MapAccess, Visitor};
use serde_json::Deserializer;
use serde_json::error::Category;

use super::read::{Ignored, Read, Seed};
use super::{Class, Field};
use crate::error::ApiError;

/// What some editors and Windows programs put before a text.
const BYTE_ORDER_MARK: &[u8] = b"\xEF\xBB\xBF";
/// Of a name that nobody knows.
const MAX_NAME_CHARS: usize = 200;

/// Reads a whole body, in one pass and without a tree of it.
///
/// # Errors
/// 400: it is no JSON, or a field is unknown, refused or has a value that it can't have.
pub(crate) fn parse<'de, T: Read<'de>>(body: &'de [u8]) -> Result<T, ApiError> {
    let body = body.strip_prefix(BYTE_ORDER_MARK).unwrap_or(body);
    let reader = Reader::default();
    let mut deserializer = Deserializer::from_slice(body);
    let read = || {
        let value = reader.seed::<T>().deserialize(&mut deserializer)?;
        deserializer.end()?;
        value.ok_or_else(|| reader.unexpected(T::EXPECTED))
    };
    let result: Result<T, serde_json::Error> = { read }();
    result.map_err(|error| reader.explain(&error))
}

/// Whether a value of a refused field asks for nothing, and what is supported.
type Rule = (fn(&super::Shape) -> bool, &'static str);

/// A step on the way to a value.
#[derive(Debug)]
pub(crate) enum Step {
    /// A field that is declared.
    Field(&'static Field),
    /// A place in a list.
    Index(usize),
    /// A name that the client chose.
    Key(String),
}

/// Where reading has come to.
#[derive(Debug, Default)]
pub(crate) struct Reader {
    path: RefCell<Vec<Step>>,
    /// serde's errors carry text only; the whole one waits here.
    refusal: RefCell<Option<ApiError>>,
}

impl Reader {
    /// Reads a `T`, or nothing where null is.
    pub(crate) fn seed<T>(&self) -> Seed<'_, T> {
        Seed { reader: self, kind: PhantomData }
    }

    /// Goes one step deeper.
    pub(crate) fn enter(&self, step: Step) {
        self.path.borrow_mut().push(step);
    }

    /// Goes back by one step.
    pub(crate) fn leave(&self) {
        self.path.borrow_mut().pop();
    }

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

    /// The rule of the field that is being read, if it is refused.
    pub(super) fn rule(&self) -> Option<Rule> {
        match self.path.borrow().last() {
            Some(Step::Field(Field { class: Class::Refused { unless, supported }, .. })) => {
                Some((*unless, supported))
            }
            _ => None,
        }
    }

    /// An error about the value that is being read: its path, and then `what`.
    pub(crate) fn invalid<E: Error>(&self, what: &str) -> E {
        let path = self.path();
        let message = format!("{path} {what}");
        self.fail(ApiError::invalid_value(path, message))
    }

    /// An error about the field `name` of the object that is being read.
    pub(crate) fn invalid_field<E: Error>(&self, name: &str, what: &str) -> E {
        self.enter(Step::Key(name.to_owned()));
        self.invalid(what)
    }

    /// An error: the value that is being read is not `expected`.
    pub(crate) fn unexpected<E: Error>(&self, expected: &str) -> E {
        self.invalid(&format!("must be {expected}"))
    }

    /// An error: the value that is being read can't be honoured, and what can.
    pub(crate) fn unsupported<E: Error>(&self, what: &str) -> E {
        let path = self.path();
        let message = format!("{path}: {what}");
        self.fail(ApiError::unsupported_parameter(path, message))
    }

    fn fail<E: Error>(&self, error: ApiError) -> E {
        self.refusal.replace(Some(error));
        E::custom("refused")
    }

    fn path(&self) -> String {
        let mut text = String::new();
        for step in self.path.borrow().iter() {
            if !text.is_empty() && !matches!(step, Step::Index(_)) {
                text.push('.');
            }
            match step {
                Step::Field(field) => text.push_str(field.name),
                Step::Key(name) => text.push_str(name),
                Step::Index(index) => {
                    // Writing to a string can't fail.
                    let _ = write!(text, "[{index}]");
                }
            }
        }
        if text.is_empty() { "body".to_owned() } else { text }
    }

    fn explain(&self, error: &serde_json::Error) -> ApiError {
        if let Some(refusal) = self.refusal.take() {
            return refusal;
        }
        let path = self.path();
        if error.classify() == Category::Syntax && error.to_string().starts_with("number out of range") {
            return ApiError::invalid_value(path.clone(), format!("{path} is too large a number"));
        }
        ApiError::invalid_json(error)
    }
}

/// The name of a field.
enum Found {
    /// Its place among those that are declared.
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
