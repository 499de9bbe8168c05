//! Owns how the path of a request is read: doubled slashes count once, and those at its end not at all.
//!
//! Invariant: the path is corrected here, before a route is looked for, and not by a redirect, after
//! which many clients would send no body; a model's name, which may have slashes, stays as it was sent.

use std::borrow::Cow;

use actix_web::body::MessageBody;
use actix_web::dev::{ServiceRequest, ServiceResponse, Url};
use actix_web::http::Uri;
use actix_web::http::uri::PathAndQuery;
use actix_web::middleware::Next;
use actix_web::{HttpMessage, HttpRequest};

/// The models, below which the rest of a path is a name.
const MODELS: &str = "/v1/models";

/// The path as the client wrote it, where that is not how routes are written.
struct Requested(String);

/// The path as the client wrote it.
pub(crate) fn requested(request: &HttpRequest) -> String {
    match request.extensions().get::<Requested>() {
        Some(Requested(path)) => path.clone(),
        None => request.path().to_owned(),
    }
}

/// Corrects the path.
///
/// # Errors
/// Those of the inner service.
pub(crate) async fn correct<B: MessageBody>(
    mut request: ServiceRequest,
    next: Next<B>,
) -> Result<ServiceResponse<B>, actix_web::Error> {
    if let Cow::Owned(path) = corrected(request.path())
        && let Some(uri) = with_path(request.uri(), &path)
    {
        let requested = Requested(request.path().to_owned());
        request.extensions_mut().insert(requested);
        request.match_info_mut().set(Url::new(uri.clone()));
        request.head_mut().uri = uri;
    }
    next.call(request).await
}

fn with_path(uri: &Uri, path: &str) -> Option<Uri> {
    let mut parts = uri.clone().into_parts();
    let path_and_query = match uri.query() {
        Some(query) => format!("{path}?{query}"),
        None => path.to_owned(),
    };
    parts.path_and_query = Some(PathAndQuery::try_from(path_and_query).ok()?);
    Uri::from_parts(parts).ok()
}

fn corrected(path: &str) -> Cow<'_, str> {
    let is_well_written = !path.contains("//") && (path.len() < 2 || !path.ends_with('/'));
    if is_well_written || !path.starts_with('/') {
        return Cow::Borrowed(path);
    }
    let mut corrected = String::with_capacity(path.len());
    let mut rest = path.trim_start_matches('/');
    while !rest.is_empty() {
        let end = match corrected == MODELS {
            true => rest.len(),
            false => rest.find('/').unwrap_or(rest.len()),
        };
        corrected.push('/');
        corrected += &rest[..end];
        rest = rest[end..].trim_start_matches('/');
    }
    match corrected.as_str() {
        "" => Cow::Borrowed("/"),
        same if same == path => Cow::Borrowed(path),
        _ => Cow::Owned(corrected),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slashes_are_corrected_but_in_names_of_models() {
        for (path, expected) in [
            ("/v1/chat/completions/", "/v1/chat/completions"),
            ("/v1//chat/completions", "/v1/chat/completions"),
            ("//v1///models//", "/v1/models"),
            ("/v1/models//", "/v1/models"),
            ("//livez", "/livez"),
            ("/v1/models//a//b", "/v1/models/a//b"),
            ("/v1//models/a/b/", "/v1/models/a/b/"),
            ("/v1/modelsx//a//b/", "/v1/modelsx/a/b"),
            ("/x//v1/models//a//b", "/x/v1/models/a/b"),
        ] {
            assert_eq!(corrected(path), Cow::<str>::Owned(expected.to_owned()), "{path}");
        }
        for path in
            ["/", "/livez", "/v1/models/a/b", "/v1/models/a//b", "/v1/models/a/", "*", "", "/v1%2F/models"]
        {
            assert!(matches!(corrected(path), Cow::Borrowed(same) if same == path), "{path}");
        }
        assert_eq!(corrected("///"), "/");
    }

    #[test]
    fn the_query_stays() {
        let uri = with_path(&"//v1/models/?a=//b/".parse().unwrap(), "/v1/models").unwrap();
        assert_eq!(uri, "/v1/models?a=//b/");
    }
}
