//! Owns the table of routes, and the answers to requests that fit none of them.

mod answer;
mod chat_completions;
mod handshake;
mod health;
mod metrics;
mod models;
mod request_headers;
mod streams;

use actix_web::body::MessageBody;
use actix_web::dev::{ServiceRequest, ServiceResponse};
use actix_web::http::ConnectionType;
use actix_web::middleware::{Next, from_fn};
use actix_web::{HttpRequest, HttpResponse, Resource, Route, web};

use crate::auth;
use crate::error::ApiError;
use crate::state::AppState;

/// Adds every route.
pub(crate) fn configure(app: &mut web::ServiceConfig) {
    app.service(resource("/startupz", web::get().to(health::started)))
        .service(resource("/livez", web::get().to(health::live)))
        .service(resource("/readyz", web::get().to(health::ready)))
        .service(resource("/health", web::get().to(health::ready)))
        .service(resource("/metrics", web::get().to(metrics::scrape)))
        .service(
            web::scope("/v1")
                .wrap(from_fn(handshake::greet))
                // The last one is the first to see a request.
                .wrap(from_fn(auth::guard))
                .service(resource("/chat/completions", web::post().to(chat_completions::create)))
                .service(resource("/capabilities", web::get().to(handshake::capabilities)))
                .service(
                    resource("/streams/{id}", web::get().to(streams::get))
                        .route(web::delete().to(streams::delete)),
                )
                .service(resource("/models", web::get().to(models::list)))
                // Names of models may have slashes.
                .service(resource("/models/{name:.+}", web::get().to(models::get))),
        )
        .default_service(web::to(async |request: HttpRequest| -> Result<HttpResponse, ApiError> {
            Err(ApiError::unknown_url(request.path()))
        }));
}

fn resource(path: &str, route: Route) -> Resource {
    web::resource(path).route(route).default_service(web::to(
        async |request: HttpRequest| -> Result<HttpResponse, ApiError> {
            Err(ApiError::method_not_allowed(request.method().as_str(), request.path()))
        },
    ))
}

/// Counts the requests that are answered with an error, and lets connections go while draining.
///
/// # Errors
/// Those of the inner service.
pub(crate) async fn observe<B: MessageBody>(
    request: ServiceRequest,
    next: Next<B>,
) -> Result<ServiceResponse<B>, actix_web::Error> {
    let state = request.app_data::<web::Data<AppState>>().cloned();
    let count = |error: Option<&actix_web::Error>| {
        if let (Some(state), Some(error)) = (&state, error.and_then(|e| e.as_error::<ApiError>())) {
            state.metrics.refused(error.code());
        }
    };
    match next.call(request).await {
        Ok(mut response) => {
            count(response.response().error());
            if state.as_ref().is_some_and(|state| state.is_draining()) {
                let head = response.response_mut().head_mut();
                head.set_connection_type(ConnectionType::Close);
            }
            Ok(response)
        }
        Err(error) => {
            count(Some(&error));
            Err(error)
        }
    }
}
