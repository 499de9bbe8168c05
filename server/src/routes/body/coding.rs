//! Owns the content codings of requests, and the memory that unpacking takes.

use actix_web::http::header::{CONTENT_ENCODING, HeaderMap};

use crate::error::ApiError;

/// What a zstd body may look back to: what RFC 9659 wants of HTTP's.
pub(super) const ZSTD_WINDOW_LOG: u32 = 23;
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

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Identity => "identity",
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
        }
    }
}
