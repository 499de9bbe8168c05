//! Owns the unpacking of a body.
//!
//! Invariant: what is unpacked goes to a bounded buffer as it comes, so that a small body that unpacks to
//! a large one is refused before it is large.

use std::io::{self, Write};

use flate2::write::MultiGzDecoder;
use zstd::stream::raw::{DParameter, Decoder as RawZstd};
use zstd::stream::zio::Writer as ZstdWriter;

use super::buffer::Buffer;
use super::coding::{Coding, ZSTD_WINDOW_LOG};
use crate::error::ApiError;

/// Unpacks into a buffer.
pub(super) enum Decoder {
    /// Nothing is packed, or nothing has arrived yet.
    Identity(Buffer),
    Gzip(Box<MultiGzDecoder<Buffer>>),
    Zstd(Box<ZstdWriter<Buffer, RawZstd<'static>>>),
}

impl Decoder {
    /// Makes the decoder that the buffer's coding needs: not before the first byte, as it takes memory.
    pub(super) fn begin(self) -> Result<Self, ApiError> {
        let Self::Identity(mut buffer) = self else { return Ok(self) };
        buffer.reserve_decoder()?;
        Ok(match buffer.coding {
            Coding::Identity => Self::Identity(buffer),
            Coding::Gzip => Self::Gzip(Box::new(MultiGzDecoder::new(buffer))),
            Coding::Zstd => {
                let zstd = bounded_zstd().map_err(|error| ApiError::internal(error.to_string()))?;
                Self::Zstd(Box::new(ZstdWriter::new(buffer, zstd)))
            }
        })
    }

    pub(super) fn buffer(&self) -> &Buffer {
        match self {
            Self::Identity(buffer) => buffer,
            Self::Gzip(decoder) => decoder.get_ref(),
            Self::Zstd(decoder) => decoder.writer(),
        }
    }

    pub(super) fn buffer_mut(&mut self) -> &mut Buffer {
        match self {
            Self::Identity(buffer) => buffer,
            Self::Gzip(decoder) => decoder.get_mut(),
            Self::Zstd(decoder) => decoder.writer_mut(),
        }
    }

    /// Unpacks more.
    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<(), ApiError> {
        let coding = self.buffer().coding;
        match self {
            Self::Identity(buffer) => return buffer.extend(bytes),
            Self::Gzip(decoder) => decoder.write_all(bytes),
            Self::Zstd(decoder) => decoder.write_all(bytes),
        }
        .map_err(|error| wrong(coding, error))
    }

    /// The whole body.
    pub(super) fn finish(self) -> Result<Buffer, ApiError> {
        match self {
            Self::Identity(buffer) => Ok(buffer),
            Self::Gzip(decoder) => decoder.finish().map_err(|error| wrong(Coding::Gzip, error)),
            Self::Zstd(mut decoder) => {
                decoder.finish().map_err(|error| wrong(Coding::Zstd, error))?;
                Ok(decoder.into_inner().0)
            }
        }
    }
}

fn bounded_zstd() -> io::Result<RawZstd<'static>> {
    let mut zstd = RawZstd::new()?;
    zstd.set_parameter(DParameter::WindowLogMax(ZSTD_WINDOW_LOG))?;
    Ok(zstd)
}

/// The buffer's own error, or that of the packed bytes.
fn wrong(coding: Coding, error: io::Error) -> ApiError {
    error.downcast().unwrap_or_else(|error| ApiError::invalid_encoding(coding.name(), &error))
}
