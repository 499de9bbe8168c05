//! Owns the way from a whole body to a type.

use serde::de::DeserializeSeed;
use serde_json::Deserializer;

use super::read::Read;
use super::reader::Reader;
use crate::error::ApiError;

/// What some editors and Windows programs put before a text.
const BYTE_ORDER_MARK: &[u8] = b"\xEF\xBB\xBF";

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
