//! A server whose engine says what the user's message tells it to, for clients of other people's making.
//!
//! It is the real HTTP server and the real engine at their defaults; only the model is a double, so that
//! a reply can have a silence of any length at a known place. It prints its address and serves until it is
//! killed. The one argument is the time between heartbeats in milliseconds, 10,000 if it is left out.

#[path = "../../server/tests/it/support/mod.rs"]
mod support;

use std::time::Duration;

use self::support::{Options, Server};

fn main() {
    let milliseconds = std::env::args().nth(1).map(|argument| argument.parse());
    let comment_period = milliseconds.map(|number| number.expect("the argument is a number of milliseconds"));
    let defaults = Options::default();
    let options = Options {
        max_model_len: 4096,
        comment_period: comment_period.map_or(defaults.comment_period, Duration::from_millis),
        ..defaults
    };
    support::run(async {
        let server = Server::start(options).await;
        println!("http://{}", server.address);
        std::future::pending::<()>().await;
    });
}
