//! Owns a bare connection to the server, for tests that count bytes.

#![allow(dead_code, reason = "each test program uses a part")]

use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::Server;

const SILENCE: Duration = Duration::from_secs(20);

/// A bare connection, which reads one answer after another.
pub(crate) struct Wire {
    pub(crate) socket: TcpStream,
    pub(crate) buffer: Vec<u8>,
}

/// An answer: its head in lower case, and its body in the parts that were sent.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) parts: Vec<String>,
}

impl Answer {
    pub(crate) fn text(&self) -> String {
        self.parts.concat()
    }

    pub(crate) fn code(&self) -> Value {
        let body: Value = serde_json::from_str(&self.text()).unwrap_or_else(|_| panic!("{self:?}"));
        assert!(self.head.contains("content-type: application/json\r\n"), "{self:?}");
        assert!(body["error"]["message"].is_string() && body["error"]["type"].is_string(), "{body}");
        body["error"]["code"].clone()
    }

    pub(crate) fn says_close(&self) -> bool {
        self.head.contains("\r\nconnection: close\r\n")
    }
}

impl Wire {
    pub(crate) async fn to(server: &Server) -> Self {
        Self { socket: TcpStream::connect(server.address).await.unwrap(), buffer: Vec::new() }
    }

    pub(crate) async fn send(&mut self, text: &str) -> &mut Self {
        self.socket.write_all(text.as_bytes()).await.unwrap();
        self
    }

    pub(crate) async fn more(&mut self) -> bool {
        let read = tokio::time::timeout(SILENCE, self.socket.read_buf(&mut self.buffer));
        // A reset is an end as well.
        read.await.expect("it is silent").unwrap_or(0) > 0
    }

    /// Everything up to the next `end`, which is taken too; `None` at the end of the connection.
    pub(crate) async fn until(&mut self, end: &str) -> Option<String> {
        loop {
            if let Some(at) = self.buffer.windows(end.len()).position(|window| window == end.as_bytes()) {
                let rest = self.buffer.split_off(at + end.len());
                let taken = std::mem::replace(&mut self.buffer, rest);
                return Some(String::from_utf8(taken).unwrap());
            }
            if !self.more().await {
                return None;
            }
        }
    }

    pub(crate) async fn exactly(&mut self, number: usize) -> String {
        while self.buffer.len() < number {
            assert!(self.more().await, "cut off");
        }
        let rest = self.buffer.split_off(number);
        String::from_utf8(std::mem::replace(&mut self.buffer, rest)).unwrap()
    }

    /// The next answer; `None` at the end of the connection.
    pub(crate) async fn answer(&mut self) -> Option<Answer> {
        let head = self.until("\r\n\r\n").await?.to_lowercase();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let mut parts = Vec::new();
        if head.contains("\r\ntransfer-encoding: chunked\r\n") {
            loop {
                let length = self.until("\r\n").await.expect("a chunk");
                let length = usize::from_str_radix(length.trim_end(), 16).unwrap();
                let part = self.exactly(length + 2).await;
                if length == 0 {
                    break;
                }
                parts.push(part.strip_suffix("\r\n").unwrap().to_owned());
            }
        } else if let Some((_, rest)) = head.split_once("\r\ncontent-length: ") {
            let length = rest.split("\r\n").next().unwrap().parse().unwrap();
            parts.push(self.exactly(length).await);
        }
        Some(Answer { status, head, parts })
    }

    /// Whether the server closes the connection without a further byte.
    pub(crate) async fn is_closed(&mut self) -> bool {
        !self.more().await && self.buffer.is_empty()
    }
}

pub(crate) fn get(path: &str, headers: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nhost: x\r\n{headers}\r\n")
}

pub(crate) fn post(headers: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n{headers}content-length: {length}\r\n\r\n{body}"
    )
}

pub(crate) fn chunked(headers: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n{headers}transfer-encoding: chunked\r\n\r\n\
         {length:x}\r\n{body}\r\n0\r\n\r\n"
    )
}

pub(crate) async fn ask(server: &Server, text: &str) -> Answer {
    Wire::to(server).await.send(text).await.answer().await.expect("an answer")
}
