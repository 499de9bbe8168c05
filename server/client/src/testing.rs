//! Owns a tiny HTTP server for this crate's tests: it answers each request with canned bytes.
//!
//! Invariant: it sends the bytes as they are given, broken ones included, and then closes the connection.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// A canned answer: a head, then parts with pauses between them.
#[derive(Clone)]
pub struct Reply {
    parts: Vec<(Duration, Vec<u8>)>,
}

impl Reply {
    fn head(status: &str, headers: &str) -> Self {
        let head = format!("HTTP/1.1 {status}\r\nConnection: close\r\n{headers}\r\n\r\n");
        Self { parts: vec![(Duration::ZERO, head.into_bytes())] }
    }

    /// Nothing at all for so long.
    pub fn silence_ms(pause_ms: u64) -> Self {
        Self { parts: Vec::new() }.pause_ms(pause_ms)
    }

    /// An event stream that ends when the connection closes.
    pub fn sse() -> Self {
        Self::head("200 OK", "Content-Type: text/event-stream")
    }

    /// The same, from a server that can resume it by the name `stream_id`.
    pub fn sse_of(stream_id: &str) -> Self {
        Self::head("200 OK", &format!("Content-Type: text/event-stream\r\nGLM-Stream-Id: {stream_id}"))
    }

    /// An event stream in chunks, which the parts spell out.
    pub fn chunked_sse() -> Self {
        Self::head("200 OK", "Content-Type: text/event-stream\r\nTransfer-Encoding: chunked")
    }

    /// A JSON answer; `status` may carry header lines after it.
    pub fn status(status: &str) -> Self {
        Self::head(status, "Content-Type: application/json")
    }

    /// Goes on with these bytes.
    pub fn part(mut self, bytes: &[u8]) -> Self {
        self.parts.push((Duration::ZERO, bytes.to_vec()));
        self
    }

    /// Goes on after so long.
    pub fn pause_ms(mut self, pause_ms: u64) -> Self {
        self.parts.push((Duration::from_millis(pause_ms), Vec::new()));
        self
    }
}

/// A server on a free port of the loopback address; it ends with the test's runtime.
pub struct CannedServer {
    /// Its address.
    pub base_url: String,
}

impl CannedServer {
    /// Answers each request with what `reply` makes of its head and body.
    pub async fn start(reply: impl Fn(&str, &str) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let base_url = format!("http://{}", listener.local_addr().expect("it is bound"));
        let reply = Arc::new(reply);
        tokio::spawn(async move {
            while let Ok((connection, _)) = listener.accept().await {
                let reply = Arc::clone(&reply);
                tokio::spawn(async move { answer(connection, &*reply).await });
            }
        });
        Self { base_url }
    }
}

/// A connection that the client leaves is no fault here, so errors of writing are let go.
async fn answer(mut connection: TcpStream, reply: &(impl Fn(&str, &str) -> Reply + Send + Sync)) {
    let mut bytes = Vec::new();
    let (head, body) = loop {
        if connection.read_buf(&mut bytes).await.unwrap_or(0) == 0 {
            return;
        }
        let text = String::from_utf8_lossy(&bytes);
        let Some((head, body)) = text.split_once("\r\n\r\n") else {
            continue;
        };
        let length =
            head.to_lowercase().lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok());
        if body.len() >= length.unwrap_or(0) {
            break (format!("{head}\r\n"), body.to_owned());
        }
    };
    let reply = reply(&head, &body);
    for (pause, part) in reply.parts {
        tokio::time::sleep(pause).await;
        if connection.write_all(&part).await.is_err() {
            return;
        }
    }
}
