//! End-to-end tests of the server, as one program: each program would link the whole server again.
//!
//! Invariant: a test relies on nothing of the process, which it shares with all others. One that does (signals, say) is
//! a program of its own beside this folder.

mod bodies;
mod chat_completions;
mod clients;
mod connections;
mod drain;
mod edges;
mod engine_failure;
mod environment;
mod lifecycle;
mod lock_up;
mod origins;
mod paths;
mod requests;
mod resume;
mod shares;
mod streams;
mod support;
mod time_limits;
mod wire;
