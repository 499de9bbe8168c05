//! Owns the value of a field that is refused: it is read far enough to see whether it asks for anything.
//!
//! Invariant: what is kept of it is small, whatever the value.

use serde::de::{Error, IgnoredAny, MapAccess, SeqAccess};

use super::read::{Ignored, Number, Read, Text};
use super::reader::Reader;
use super::shape::Shape;

/// Values that ask for nothing are short.
const MAX_TEXT_BYTES: usize = 32;
const MAX_ENTRIES: usize = 8;

/// The value of a field that is refused, which asks for nothing if it was read.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Refused;

impl Refused {
    fn unless_neutral<E: Error>(shape: Shape, reader: &Reader) -> Result<Self, E> {
        match reader.rule() {
            Some((is_neutral, _)) if is_neutral(&shape) => Ok(Self),
            rule => Err(reader.unsupported(rule.map_or("it is not supported", |(_, supported)| supported))),
        }
    }
}

impl<'de> Read<'de> for Refused {
    const EXPECTED: &'static str = "a value that asks for nothing";

    fn boolean<E: Error>(value: bool, reader: &Reader) -> Result<Self, E> {
        Self::unless_neutral(Shape::Boolean(value), reader)
    }

    fn number<E: Error>(value: Number, reader: &Reader) -> Result<Self, E> {
        Self::unless_neutral(Shape::Number(value.as_f64()), reader)
    }

    fn text<E: Error>(value: Text<'de, '_>, reader: &Reader) -> Result<Self, E> {
        Self::unless_neutral(Shape::text(value, reader)?, reader)
    }

    fn list<A: SeqAccess<'de>>(list: A, reader: &Reader) -> Result<Self, A::Error> {
        Self::unless_neutral(Shape::list(list, reader)?, reader)
    }

    fn object<A: MapAccess<'de>>(map: A, reader: &Reader) -> Result<Self, A::Error> {
        Self::unless_neutral(Shape::object(map, reader)?, reader)
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
