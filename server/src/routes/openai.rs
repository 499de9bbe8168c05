//! Owns the endpoints of OpenAI's API. One looks like the next: what is read (`request`), what it becomes (`convert`),
//! what is written (`types`, `render`).

pub(super) mod chat_completions;
pub(super) mod models;
