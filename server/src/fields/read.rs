//! Owns the way from JSON's values to types, while they are read.
//!
//! Invariant: nothing is copied that is not kept, and no list grows beyond its bound.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::reader::{Reader, Step};

/// A number as it was written.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Number {
    /// Without a fraction or an exponent.
    Integer(i128),
    /// Any other, or one beyond 64 bits.
    Real(f64),
}

impl Number {
    /// Its value.
    pub(crate) fn as_f64(self) -> f64 {
        match self {
            Self::Integer(integer) => integer as f64,
            Self::Real(real) => real,
        }
    }

    /// Its value if it is whole, however it was written: 16, 16.0 and 1.6e1 are one number.
    pub(crate) fn whole(self) -> Option<i128> {
        match self {
            Self::Integer(integer) => Some(integer),
            // Larger ones become the largest integer, which every range of a field excludes or cuts.
            Self::Real(real) => (real.fract() == 0.0).then_some(real as i128),
        }
    }
}

/// A text, in the body if it has no escapes there.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Text<'de, 'a> {
    /// In the body.
    Borrowed(&'de str),
    /// In a buffer that the next text overwrites.
    Unescaped(&'a str),
}

impl<'de> Text<'de, '_> {
    /// The text.
    pub(crate) fn as_str(&self) -> &str {
        match self {
            Self::Borrowed(text) => text,
            Self::Unescaped(text) => text,
        }
    }

    /// The text, copied only if it is not in the body.
    pub(crate) fn into_cow(self) -> Cow<'de, str> {
        match self {
            Self::Borrowed(text) => Cow::Borrowed(text),
            Self::Unescaped(text) => Cow::Owned(text.to_owned()),
        }
    }
}

/// A type that is read from a JSON value other than null. Each method reads one kind of value; a kind that the type
/// does not take is an error that says what is expected.
pub(crate) trait Read<'de>: Sized {
    /// What may stand here: "a number".
    const EXPECTED: &'static str;

    /// From true or false.
    fn boolean<E: Error>(_: bool, reader: &Reader) -> Result<Self, E> {
        Err(reader.unexpected(Self::EXPECTED))
    }

    /// From a number.
    fn number<E: Error>(_: Number, reader: &Reader) -> Result<Self, E> {
        Err(reader.unexpected(Self::EXPECTED))
    }

    /// From a string.
    fn text<E: Error>(_: Text<'de, '_>, reader: &Reader) -> Result<Self, E> {
        Err(reader.unexpected(Self::EXPECTED))
    }

    /// From a list.
    fn list<A: SeqAccess<'de>>(_: A, reader: &Reader) -> Result<Self, A::Error> {
        Err(reader.unexpected(Self::EXPECTED))
    }

    /// From an object.
    fn object<A: MapAccess<'de>>(_: A, reader: &Reader) -> Result<Self, A::Error> {
        Err(reader.unexpected(Self::EXPECTED))
    }
}

/// Reads a `T`, or nothing where null is.
#[derive(Debug)]
pub(crate) struct Seed<'r, T> {
    reader: &'r Reader,
    kind: PhantomData<T>,
}

impl Reader {
    /// Reads a `T`, or nothing where null is.
    pub(crate) fn seed<T>(&self) -> Seed<'_, T> {
        Seed { reader: self, kind: PhantomData }
    }
}

impl<'de, T: Read<'de>> DeserializeSeed<'de> for Seed<'_, T> {
    type Value = Option<T>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Option<T>, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de, T: Read<'de>> Visitor<'de> for Seed<'_, T> {
    type Value = Option<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(T::EXPECTED)
    }

    fn visit_unit<E: Error>(self) -> Result<Option<T>, E> {
        Ok(None)
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Option<T>, E> {
        T::boolean(value, self.reader).map(Some)
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Option<T>, E> {
        T::number(Number::Integer(value.into()), self.reader).map(Some)
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Option<T>, E> {
        T::number(Number::Integer(value.into()), self.reader).map(Some)
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Option<T>, E> {
        T::number(Number::Real(value), self.reader).map(Some)
    }

    fn visit_borrowed_str<E: Error>(self, value: &'de str) -> Result<Option<T>, E> {
        T::text(Text::Borrowed(value), self.reader).map(Some)
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Option<T>, E> {
        T::text(Text::Unescaped(value), self.reader).map(Some)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Option<T>, A::Error> {
        T::list(list, self.reader).map(Some)
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Option<T>, A::Error> {
        T::object(map, self.reader).map(Some)
    }
}

/// Hands at most `max` entries of a list to `take`, one after the other.
///
/// # Errors
/// There are more, or one is null or wrong.
pub(crate) fn read_list<'de, T: Read<'de>, A: SeqAccess<'de>>(
    mut list: A,
    max: usize,
    reader: &Reader,
    mut take: impl FnMut(T),
) -> Result<(), A::Error> {
    for index in 0..max {
        reader.enter(Step::Index(index));
        match list.next_element_seed(reader.seed::<T>())? {
            Some(Some(entry)) => take(entry),
            Some(None) => return Err(reader.unexpected(T::EXPECTED)),
            None => {
                reader.leave();
                return Ok(());
            }
        }
        reader.leave();
    }
    match list.next_element::<IgnoredAny>()? {
        Some(_) => Err(reader.invalid(&format!("must have at most {max} entries"))),
        None => Ok(()),
    }
}

impl<'de, T: Read<'de>> Read<'de> for Option<T> {
    const EXPECTED: &'static str = T::EXPECTED;

    fn boolean<E: Error>(value: bool, reader: &Reader) -> Result<Self, E> {
        T::boolean(value, reader).map(Some)
    }

    fn number<E: Error>(value: Number, reader: &Reader) -> Result<Self, E> {
        T::number(value, reader).map(Some)
    }

    fn text<E: Error>(value: Text<'de, '_>, reader: &Reader) -> Result<Self, E> {
        T::text(value, reader).map(Some)
    }

    fn list<A: SeqAccess<'de>>(list: A, reader: &Reader) -> Result<Self, A::Error> {
        T::list(list, reader).map(Some)
    }

    fn object<A: MapAccess<'de>>(map: A, reader: &Reader) -> Result<Self, A::Error> {
        T::object(map, reader).map(Some)
    }
}

impl Read<'_> for bool {
    const EXPECTED: &'static str = "true or false";

    fn boolean<E: Error>(value: bool, _: &Reader) -> Result<Self, E> {
        Ok(value)
    }
}

impl Read<'_> for f32 {
    const EXPECTED: &'static str = "a number";

    fn number<E: Error>(value: Number, _: &Reader) -> Result<Self, E> {
        Ok(value.as_f64() as f32)
    }
}

impl<'de> Read<'de> for Cow<'de, str> {
    const EXPECTED: &'static str = "a string";

    fn text<E: Error>(value: Text<'de, '_>, _: &Reader) -> Result<Self, E> {
        Ok(value.into_cow())
    }
}

/// Whole numbers in the range of a type.
macro_rules! integers {
    ($($type:ty: $expected:literal),*) => {$(
        impl Read<'_> for $type {
            const EXPECTED: &'static str = concat!("an integer ", $expected);

            fn number<E: Error>(value: Number, reader: &Reader) -> Result<Self, E> {
                let integer = value.whole().and_then(|value| value.try_into().ok());
                integer.ok_or_else(|| reader.unexpected(Self::EXPECTED))
            }
        }
    )*};
}
integers! {
    u32: "from 0 to 4294967295",
    i32: "from -2147483648 to 2147483647",
    i64: "from -9223372036854775808 to 9223372036854775807"
}

/// The value of a field without effect: anything, of which nothing is kept.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ignored;

impl<'de> Read<'de> for Ignored {
    const EXPECTED: &'static str = "any value";

    fn boolean<E: Error>(_: bool, _: &Reader) -> Result<Self, E> {
        Ok(Self)
    }

    fn number<E: Error>(_: Number, _: &Reader) -> Result<Self, E> {
        Ok(Self)
    }

    fn text<E: Error>(_: Text<'de, '_>, _: &Reader) -> Result<Self, E> {
        Ok(Self)
    }

    fn list<A: SeqAccess<'de>>(mut list: A, _: &Reader) -> Result<Self, A::Error> {
        while list.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Self)
    }

    fn object<A: MapAccess<'de>>(mut map: A, _: &Reader) -> Result<Self, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Self)
    }
}
