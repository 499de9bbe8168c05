//! Owns the reading of a request's body: in time, within its limit, unpacked, and with the memory it takes.
//!
//! Invariant: a body holds memory only for what has arrived, until it is dropped after its conversion; what
//! it announces holds nothing.

mod buffer;
mod coding;
mod decoder;

use std::time::Duration;

use actix_web::http::header;
use actix_web::{HttpRequest, web};
use futures_util::StreamExt;
use tokio::time::Instant;

use self::buffer::Buffer;
use self::coding::Coding;
use self::decoder::Decoder;
use crate::body_memory::BodyShare;
use crate::error::ApiError;
use crate::principal::Client;
use crate::state::AppState;

/// A body that trickles in slower than this keeps a connection for nothing.
const BODY_TIMEOUT: Duration = Duration::from_secs(60);
/// Packed bytes that are unpacked at once, so that one chunk can't keep the HTTP worker for long.
const SLICE_BYTES: usize = 512;
/// Unpacked bytes after which others have their turn.
const TURN_BYTES: usize = 256 * 1024;

/// A body that has arrived whole, and the memory that it takes.
#[derive(Debug)]
pub(super) struct Body {
    bytes: Vec<u8>,
    /// A mark of no meaning that some editors put in front.
    num_mark_bytes: usize,
    _share: BodyShare,
}

impl Body {
    /// Reads the body of `request`.
    pub(super) async fn read(
        request: &HttpRequest,
        mut payload: web::Payload,
        client: Client,
        state: &AppState,
    ) -> Result<Self, ApiError> {
        let coding = Coding::of(request.headers())?;
        let limit = state.options.max_body_bytes;
        let length = request.headers().get(header::CONTENT_LENGTH);
        let length = length.and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
        if length.is_some_and(|length| length > limit) {
            return Err(ApiError::body_too_large(limit));
        }
        let expected = length.filter(|_| coding == Coding::Identity).unwrap_or(limit);
        let buffer = Buffer {
            bytes: Vec::new(),
            share: state.body_memory.open(client, Instant::now()),
            coding,
            limit,
            expected,
        };
        let mut decoder = Decoder::Identity(buffer);
        let mut has_begun = false;
        let deadline = Instant::now() + BODY_TIMEOUT;
        let mut num_in_turn = 0;
        loop {
            let share = &decoder.buffer().share;
            let chunk = tokio::select! {
                chunk = payload.next() => chunk,
                () = share.cut() => return Err(ApiError::body_too_slow()),
                () = tokio::time::sleep_until(deadline) => {
                    return Err(ApiError::body_timeout(BODY_TIMEOUT.as_secs()));
                }
            };
            let Some(chunk) = chunk else { break };
            let chunk = chunk.map_err(|error| ApiError::invalid_body(&error))?;
            if !has_begun {
                has_begun = true;
                decoder = decoder.begin()?;
            }
            decoder.buffer_mut().share.arrived(chunk.len(), Instant::now());
            let slice_bytes = if coding == Coding::Identity { chunk.len().max(1) } else { SLICE_BYTES };
            for slice in chunk.chunks(slice_bytes) {
                let before = decoder.buffer().bytes.len();
                decoder.write(slice)?;
                num_in_turn += decoder.buffer().bytes.len() - before;
                if num_in_turn >= TURN_BYTES {
                    num_in_turn = 0;
                    tokio::task::yield_now().await;
                }
            }
        }
        Self::of(decoder.finish()?)
    }

    /// Bytes that it takes.
    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }
}

impl Body {
    fn of(buffer: Buffer) -> Result<Self, ApiError> {
        let (bytes, share) = buffer.complete()?;
        let num_mark_bytes = match bytes.as_slice() {
            [0xEF, 0xBB, 0xBF, ..] => 3,
            // A mark of UTF-16, or JSON's first character, which is ASCII, in two or four bytes.
            [0xFF, 0xFE, ..] | [0xFE, 0xFF, ..] | [0, _, ..] | [_, 0, ..] => return Err(ApiError::not_utf8()),
            _ => 0,
        };
        Ok(Self { bytes, num_mark_bytes, _share: share })
    }
}

impl std::ops::Deref for Body {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[self.num_mark_bytes..]
    }
}
