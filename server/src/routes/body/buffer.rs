//! Owns a body while it arrives.
//!
//! Invariant: it never has more bytes than its limit, nor than memory was taken for.

use std::io::{self, Write};

use tokio::time::Instant;

use super::coding::Coding;
use crate::body_memory::{BodyRefused, BodyShare, FREE_BYTES};
use crate::error::ApiError;

/// A body that is arriving.
#[derive(Debug)]
pub(super) struct Buffer {
    pub(super) bytes: Vec<u8>,
    pub(super) share: BodyShare,
    pub(super) coding: Coding,
    /// Most bytes that it may have.
    pub(super) limit: usize,
    /// Most bytes that it can have by its headers.
    pub(super) expected: usize,
}

impl Buffer {
    /// Takes the memory for the decoder, before there is one.
    pub(super) fn reserve_decoder(&mut self) -> Result<(), ApiError> {
        self.share.grow(self.coding.decoder_bytes(0), Instant::now()).map_err(refused)
    }

    pub(super) fn extend(&mut self, bytes: &[u8]) -> Result<(), ApiError> {
        let len = self.bytes.len() + bytes.len();
        if len > self.limit {
            return Err(ApiError::body_too_large(self.limit));
        }
        if len > self.bytes.capacity() {
            // Little above what is there; a body that stays free is not made larger than that.
            let capacity = match len {
                ..=FREE_BYTES => len.next_power_of_two(),
                _ => len + len / 4,
            };
            let capacity = capacity.min(self.expected).max(len);
            self.share.grow(capacity + self.coding.decoder_bytes(len), Instant::now()).map_err(refused)?;
            self.bytes.reserve_exact(capacity - self.bytes.len());
        }
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }

    /// The body, which has arrived whole, with its share of memory.
    pub(super) fn complete(self) -> Result<(Vec<u8>, BodyShare), ApiError> {
        self.share.complete().map_err(refused)?;
        Ok((self.bytes, self.share))
    }
}

/// For decoders, which hand an error through as it is.
impl Write for Buffer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.extend(bytes).map_err(io::Error::other)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The answer to a body that gets no memory.
pub(super) fn refused(refused: BodyRefused) -> ApiError {
    match refused {
        BodyRefused::NoRoom => ApiError::too_many_bodies(),
        BodyRefused::Cut => ApiError::body_too_slow(),
    }
}
