//! Owns `x-request-id`: the name that a client, its proxies and this server's log have for one request.
//!
//! Invariant: every answer has one, and every line that is logged for a request is in a span with it:
//! those of its body too, which is written after its handler has returned.

use std::pin::Pin;
use std::task::{Context, Poll};

use actix_web::body::{BodySize, BoxBody, MessageBody};
use actix_web::dev::{ServiceRequest, ServiceResponse};
use actix_web::error::InternalError;
use actix_web::http::StatusCode;
use actix_web::http::header::{HeaderMap, HeaderName, HeaderValue};
use actix_web::middleware::Next;
use actix_web::web::Bytes;
use tracing::{Instrument, Span};

use crate::error::ApiError;
use crate::random::random_u64;

/// The header's name.
pub(crate) const NAME: HeaderName = HeaderName::from_static("x-request-id");
/// Longer than the ids of common proxies and tracing systems, and short enough for each line of a log.
const MAX_BYTES: usize = 128;

/// Names the request, its answer and what is logged for it.
///
/// # Errors
/// Those of the inner service.
pub(crate) async fn assign<B: MessageBody + 'static>(
    request: ServiceRequest,
    next: Next<B>,
) -> Result<ServiceResponse<BoxBody>, actix_web::Error> {
    let id = given(request.headers()).unwrap_or_else(random);
    // As high as any line in it, or a filter that keeps warnings would drop their request's id.
    let id_text = id.to_str().unwrap_or_default();
    // The principal is known once the guard of `/v1` has seen the key.
    let span = tracing::error_span!("request", id = id_text, principal = tracing::field::Empty);
    match next.call(request).instrument(span.clone()).await {
        Ok(mut response) => {
            span.in_scope(|| log(&response));
            response.headers_mut().insert(NAME, id);
            Ok(response.map_body(|_, body| Spanned::of(body, span)))
        }
        Err(error) => {
            let mut response = error.error_response();
            response.headers_mut().insert(NAME, id);
            Err(InternalError::from_response(error, response).into())
        }
    }
}

/// The client's own id, if it is one that can stand in a header and in a log.
fn given(headers: &HeaderMap) -> Option<HeaderValue> {
    let mut values = headers.get_all(NAME);
    let id = values.next().filter(|_| values.next().is_none())?;
    let is_sane = (1..=MAX_BYTES).contains(&id.len()) && id.as_bytes().iter().all(u8::is_ascii_graphic);
    is_sane.then(|| id.clone())
}

/// A name for a request that has none.
pub(crate) fn random() -> HeaderValue {
    let id = format!("req_{:016x}{:016x}", random_u64(), random_u64());
    HeaderValue::try_from(id).unwrap_or_else(|_| HeaderValue::from_static("req_0"))
}

/// Failures of the server are for its operator, refusals for the client: 503 is one, as while the model is loading.
fn log<B>(response: &ServiceResponse<B>) {
    let error = response.response().error().and_then(|error| error.as_error::<ApiError>());
    let (method, path, status) = (response.request().method(), response.request().path(), response.status());
    match error {
        Some(error) if status.is_server_error() && status != StatusCode::SERVICE_UNAVAILABLE => {
            tracing::info!(%method, path, status = status.as_u16(), code = error.code(), "refused: {error}");
        }
        Some(error) => {
            tracing::debug!(%method, path, status = status.as_u16(), code = error.code(), "refused: {error}");
        }
        None => tracing::debug!(%method, path, status = status.as_u16(), "answered"),
    }
}

/// A body that is written within the request's span.
struct Spanned {
    body: BoxBody,
    span: Span,
}

impl Spanned {
    /// What is there in one piece logs nothing.
    fn of(body: impl MessageBody + 'static, span: Span) -> BoxBody {
        match body.size() {
            BodySize::Stream => BoxBody::new(Self { body: body.boxed(), span }),
            BodySize::None | BodySize::Sized(_) => body.boxed(),
        }
    }
}

impl MessageBody for Spanned {
    type Error = <BoxBody as MessageBody>::Error;

    fn size(&self) -> BodySize {
        self.body.size()
    }

    fn poll_next(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Bytes, Self::Error>>> {
        let this = self.get_mut();
        let _entered = this.span.enter();
        Pin::new(&mut this.body).poll_next(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sane_id_is_taken_and_any_other_is_not() {
        let given = |values: &[&[u8]]| {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(NAME, HeaderValue::from_bytes(value).unwrap());
            }
            given(&headers).map(|id| id.to_str().unwrap().to_owned())
        };
        let longest = [b'x'; MAX_BYTES];
        for id in [&b"a"[..], b"7f3c-\"{}%", &longest] {
            assert_eq!(given(&[id]).unwrap().as_bytes(), id);
        }
        for id in [&b""[..], b"a b", b"a\tb", "é".as_bytes(), &[b'x'; MAX_BYTES + 1]] {
            assert_eq!(given(&[id]), None, "{id:?}");
        }
        assert_eq!((given(&[]), given(&[b"a", b"b"])), (None, None));
    }

    #[test]
    fn ids_that_are_made_differ() {
        let [a, b] = [random(), random()];
        assert_ne!(a, b);
        assert!(a.len() == 36 && a.as_bytes().starts_with(b"req_"), "{a:?}");
    }
}
