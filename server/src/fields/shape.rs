//! Owns the outline of a JSON value: enough to see whether it asks for anything.
//!
//! Invariant: it is small, whatever the value. What does not fit is [`Shape::Large`], which never asks for nothing.

use serde::de::{Error, IgnoredAny, MapAccess, SeqAccess};

use super::read::{Ignored, Number, Read, Text};
use super::reader::Reader;

/// Values that ask for nothing are short.
const MAX_TEXT_BYTES: usize = 32;
const MAX_ENTRIES: usize = 8;

/// The outline of a value.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Shape {
    /// True or false.
    Boolean(bool),
    /// A number.
    Number(f64),
    /// A short string.
    Text(String),
    /// A short list, of values that are no lists or objects with entries.
    List(Vec<Shape>),
    /// An object of a few fields with such values; null is absent.
    Object(Vec<(String, Shape)>),
    /// Anything else.
    Large,
}

impl Shape {
    /// `false`.
    pub(crate) fn is_false(&self) -> bool {
        *self == Self::Boolean(false)
    }

    /// `true`.
    pub(crate) fn is_true(&self) -> bool {
        *self == Self::Boolean(true)
    }

    /// 0.
    pub(crate) fn is_zero(&self) -> bool {
        *self == Self::Number(0.0)
    }

    /// 1.
    pub(crate) fn is_one(&self) -> bool {
        *self == Self::Number(1.0)
    }

    /// An empty string, list or object.
    pub(crate) fn is_empty(&self) -> bool {
        match self {
            Self::Text(text) => text.is_empty(),
            Self::List(entries) => entries.is_empty(),
            Self::Object(fields) => fields.is_empty(),
            _ => false,
        }
    }

    /// `false` or empty.
    pub(crate) fn is_off(&self) -> bool {
        self.is_false() || self.is_empty()
    }

    /// One of these strings.
    pub(crate) fn is_one_of(&self, texts: &[&str]) -> bool {
        matches!(self, Self::Text(text) if texts.contains(&text.as_str()))
    }

    /// An empty list, or one of nothing but this string.
    pub(crate) fn is_list_of(&self, text: &str) -> bool {
        matches!(self, Self::List(entries) if entries.iter().all(|entry| entry.is_one_of(&[text])))
    }

    /// An object whose `type` is this.
    pub(crate) fn has_type(&self, kind: &str) -> bool {
        // A name may come twice, and its last value counts for some readers.
        let mut kinds = self.fields().iter().filter(|(name, _)| name == "type").peekable();
        kinds.peek().is_some() && kinds.all(|(_, value)| value.is_one_of(&[kind]))
    }

    /// An object in which only these fields have values, all of them `false`.
    pub(crate) fn has_off(&self, names: &[&str]) -> bool {
        let is_off = |(name, value): &(String, Self)| names.contains(&name.as_str()) && value.is_false();
        matches!(self, Self::Object(fields) if fields.iter().all(is_off))
    }

    fn fields(&self) -> &[(String, Self)] {
        match self {
            Self::Object(fields) => fields,
            _ => &[],
        }
    }
}

impl<'de> Read<'de> for Shape {
    const EXPECTED: &'static str = "any value";

    fn boolean<E: Error>(value: bool, _: &Reader) -> Result<Self, E> {
        Ok(Self::Boolean(value))
    }

    fn number<E: Error>(value: Number, _: &Reader) -> Result<Self, E> {
        Ok(Self::Number(value.as_f64()))
    }

    fn text<E: Error>(value: Text<'de, '_>, _: &Reader) -> Result<Self, E> {
        Ok(short(value.as_str()).map_or(Self::Large, Self::Text))
    }

    fn list<A: SeqAccess<'de>>(mut list: A, reader: &Reader) -> Result<Self, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = list.next_element_seed(reader.seed::<Flat>())? {
            match entry {
                Some(Flat(entry)) if entries.len() < MAX_ENTRIES => entries.push(entry),
                _ => {
                    Ignored::list(list, reader)?;
                    return Ok(Self::Large);
                }
            }
        }
        Ok(Self::List(entries))
    }

    fn object<A: MapAccess<'de>>(mut map: A, reader: &Reader) -> Result<Self, A::Error> {
        let mut fields = Vec::new();
        while let Some(name) = map.next_key_seed(reader.seed::<Self>())? {
            let value = map.next_value_seed(reader.seed::<Flat>())?;
            match (name, value) {
                (Some(Self::Text(name)), Some(Flat(value))) if fields.len() < MAX_ENTRIES => {
                    fields.push((name, value));
                }
                (Some(Self::Text(_)), None) => {}
                _ => {
                    Ignored::object(map, reader)?;
                    return Ok(Self::Large);
                }
            }
        }
        Ok(Self::Object(fields))
    }
}

fn short(text: &str) -> Option<String> {
    (text.len() <= MAX_TEXT_BYTES).then(|| text.to_owned())
}

/// A value inside another one: lists and objects with entries are [`Shape::Large`].
struct Flat(Shape);

impl<'de> Read<'de> for Flat {
    const EXPECTED: &'static str = "any value";

    fn boolean<E: Error>(value: bool, reader: &Reader) -> Result<Self, E> {
        Shape::boolean(value, reader).map(Self)
    }

    fn number<E: Error>(value: Number, reader: &Reader) -> Result<Self, E> {
        Shape::number(value, reader).map(Self)
    }

    fn text<E: Error>(value: Text<'de, '_>, reader: &Reader) -> Result<Self, E> {
        Shape::text(value, reader).map(Self)
    }

    fn list<A: SeqAccess<'de>>(mut list: A, reader: &Reader) -> Result<Self, A::Error> {
        Ok(Self(match list.next_element::<IgnoredAny>()? {
            None => Shape::List(Vec::new()),
            Some(_) => {
                Ignored::list(list, reader)?;
                Shape::Large
            }
        }))
    }

    fn object<A: MapAccess<'de>>(mut map: A, reader: &Reader) -> Result<Self, A::Error> {
        Ok(Self(match map.next_entry::<IgnoredAny, IgnoredAny>()? {
            None => Shape::Object(Vec::new()),
            Some(_) => {
                Ignored::object(map, reader)?;
                Shape::Large
            }
        }))
    }
}
