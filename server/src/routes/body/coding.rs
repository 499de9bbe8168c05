//! Owns the content codings of requests, and the unpacking of them.
//!
//! Invariant: what is unpacked goes to a bounded buffer as it comes, so that a small body that unpacks to
//! a large one is refused before it is large.

use std::io::{self, Write};

use actix_web::http::header::{CONTENT_ENCODING, HeaderMap};
use flate2::write::MultiGzDecoder;
use zstd::stream::raw::{DParameter, Decoder as RawZstd};
use zstd::stream::zio::Writer as ZstdWriter;

use super::Buffer;
use crate::error::ApiError;

/// What a zstd body may look back to: what RFC 9659 wants of HTTP's.
const ZSTD_WINDOW_LOG: u32 = 23;
/// Beside its window: tables, and a block on both sides.
const ZSTD_BYTES: usize = 512 * 1024;
/// Window, tables and buffer.
const GZIP_BYTES: usize = 96 * 1024;

/// How a body is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Coding {
    Identity,
    Gzip,
    Zstd,
}

impl Coding {
    /// The one that `Content-Encoding` names.
    pub(super) fn of(headers: &HeaderMap) -> Result<Self, ApiError> {
        let mut found = None;
        let lines: Vec<_> =
            headers.get_all(CONTENT_ENCODING).map(|line| String::from_utf8_lossy(line.as_bytes())).collect();
        for name in lines.iter().flat_map(|line| line.split(',')).map(str::trim) {
            let coding = match name.to_ascii_lowercase().as_str() {
                "" | "identity" => continue,
                "gzip" | "x-gzip" => Self::Gzip,
                "zstd" => Self::Zstd,
                _ => return Err(ApiError::unsupported_encoding(&lines.join(", "))),
            };
            if found.replace(coding).is_some() {
                return Err(ApiError::unsupported_encoding(&lines.join(", ")));
            }
        }
        Ok(found.unwrap_or(Self::Identity))
    }

    /// Memory that the decoder takes beside a body of so many bytes: its window has no more than came out.
    pub(super) fn decoder_bytes(self, num_bytes: usize) -> usize {
        match self {
            Self::Identity => 0,
            Self::Gzip => GZIP_BYTES,
            Self::Zstd => ZSTD_BYTES + num_bytes.min(1 << ZSTD_WINDOW_LOG),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Identity => "identity",
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
        }
    }
}

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
