//! Owns the table of routes, and the answers to requests that fit none of them.

mod answer;
mod body;
mod capabilities;
mod health;
mod metrics;
mod openai;
mod request_headers;
mod streams;

use std::future::ready;

use actix_web::guard::{Any, Get, Head};
use actix_web::http::{Method, header};
use actix_web::middleware::from_fn;
use actix_web::{HttpRequest, HttpResponse, Resource, Route, web};

pub use self::openai::chat_completions::request_fingerprint;
use self::openai::{chat_completions, models};
use crate::error::ApiError;
use crate::middleware::{auth, paths, version};

/// Adds every route.
pub(crate) fn configure(app: &mut web::ServiceConfig) {
    app.service(resource("/startupz", READ).route(get().to(health::started)))
        .service(resource("/livez", READ).route(get().to(health::live)))
        .service(resource("/readyz", READ).route(get().to(health::ready)))
        .service(resource("/health", READ).route(get().to(health::ready)))
        .service(resource("/metrics", READ).route(get().to(metrics::scrape)))
        .service(
            web::scope("/v1")
                .wrap(from_fn(version::greet))
                // The last one is the first to see a request.
                .wrap(from_fn(auth::guard))
                .service(
                    resource("/chat/completions", "POST, OPTIONS")
                        .route(web::post().to(chat_completions::create)),
                )
                .service(resource("/capabilities", READ).route(get().to(capabilities::get)))
                .service(
                    resource("/streams", "DELETE, OPTIONS").route(web::delete().to(streams::delete_by_key)),
                )
                .service(
                    resource("/streams/{id}", "GET, HEAD, DELETE, OPTIONS")
                        .route(web::get().to(streams::get))
                        // Not what GET does: it would be one more reader, of a reply that it throws away.
                        .route(web::head().to(streams::head))
                        .route(web::delete().to(streams::delete)),
                )
                .service(resource("/models", READ).route(get().to(models::list)))
                // Names of models may have slashes.
                .service(resource("/models/{name:.+}", READ).route(get().to(models::get))),
        )
        .default_service(web::to(async |request: HttpRequest| -> Result<HttpResponse, ApiError> {
            Err(ApiError::unknown_url(&paths::requested(&request)))
        }));
}

/// The methods of `get`.
const READ: &str = "GET, HEAD, OPTIONS";

fn get() -> Route {
    web::route().guard(Any(Get()).or(Head()))
}

fn resource(path: &str, allowed: &'static str) -> Resource {
    let refuse = move |request: HttpRequest| {
        if request.method() == Method::OPTIONS {
            return ready(Ok(HttpResponse::NoContent().insert_header((header::ALLOW, allowed)).finish()));
        }
        let path = paths::requested(&request);
        ready(Err(ApiError::method_not_allowed(request.method().as_str(), &path, allowed)))
    };
    web::resource(path).default_service(web::to(refuse))
}
