//! What every request passes on its way to a route, and every answer on its way out.
//!
//! Invariant: what is added to answers is added to all of them: errors, streams and preflights too.

pub(crate) mod auth;
pub(crate) mod cors;
pub(crate) mod loading;
pub(crate) mod observe;
pub(crate) mod paths;
pub(crate) mod request_id;
pub(crate) mod version;
