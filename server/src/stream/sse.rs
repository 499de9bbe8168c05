//! Owns the event-stream framing of a reply: a reader of the log that writes server-sent events.
//!
//! Invariant: a body ends with `[DONE]` whatever happened to the reply, and says something at least
//! once a period, so that no proxy takes a busy server for a dead one. Must not know what the JSON of
//! an endpoint looks like: a renderer makes that.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use actix_web::HttpResponse;
use actix_web::http::header;
use actix_web_lab::sse;
use futures_util::stream;

use super::event_log::{Event, LogReader};

/// Makes the JSON documents of one event.
pub trait Render {
    /// Appends the documents for `event` to `documents`; each becomes one `data:` event.
    fn render(&mut self, event: Event, documents: &mut VecDeque<String>);
}

struct Writer<R> {
    reader: LogReader,
    render: R,
    ready: VecDeque<String>,
    done: bool,
    comment_period: Duration,
}

/// A streaming answer that reads the log to its end.
pub fn respond(reader: LogReader, render: impl Render + 'static, comment_period: Duration) -> HttpResponse {
    let writer = Writer { reader, render, ready: VecDeque::new(), done: false, comment_period };
    let events = stream::unfold(writer, |mut writer| async {
        let event = writer.next().await?;
        Some((Ok::<_, Infallible>(event), writer))
    });
    HttpResponse::Ok()
        .content_type("text/event-stream")
        .insert_header((header::CACHE_CONTROL, "no-cache"))
        // nginx would otherwise collect the events and deliver them in lumps.
        .insert_header(("x-accel-buffering", "no"))
        .body(sse::Sse::from_stream(events))
}

impl<R: Render> Writer<R> {
    async fn next(&mut self) -> Option<sse::Event> {
        loop {
            if let Some(document) = self.ready.pop_front() {
                return Some(sse::Data::new(document).into());
            }
            if self.done {
                return None;
            }
            match tokio::time::timeout(self.comment_period, self.reader.next()).await {
                Ok(Some(event)) => self.render.render(event, &mut self.ready),
                Ok(None) => {
                    self.ready.push_back("[DONE]".to_owned());
                    self.done = true;
                }
                Err(_) => return Some(sse::Event::Comment("keep-alive".into())),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use actix_web::body;

    use super::*;
    use crate::stream::event_log::{LogLimits, StreamError, event_log};

    struct Debug;

    impl Render for Debug {
        fn render(&mut self, event: Event, documents: &mut VecDeque<String>) {
            documents.push_back(format!("{event:?}"));
        }
    }

    const LIMITS: LogLimits = LogLimits { max_events: 9, max_bytes: 9 };

    #[actix_web::test]
    async fn a_stream_ends_with_done_after_an_error_too() {
        let (mut log, reader) = event_log(LIMITS);
        log.append(Event::Role).unwrap();
        log.close(Event::Error(StreamError::Lost));
        let response = respond(reader, Debug, Duration::from_secs(9));
        let headers = response.headers();
        assert_eq!(headers.get("content-type").unwrap(), "text/event-stream");
        assert_eq!(headers.get("cache-control").unwrap(), "no-cache");
        assert_eq!(headers.get("x-accel-buffering").unwrap(), "no");
        let bytes = body::to_bytes(response.into_body()).await.unwrap();
        assert_eq!(bytes, "data: Role\n\ndata: Error(Lost)\n\ndata: [DONE]\n\n");
    }

    #[actix_web::test]
    async fn silence_is_filled_with_comments() {
        let (log, reader) = event_log(LIMITS);
        actix_web::rt::spawn(async move {
            tokio::time::sleep(Duration::from_millis(70)).await;
            log.close(Event::Error(StreamError::Lost));
        });
        let response = respond(reader, Debug, Duration::from_millis(20));
        let bytes = body::to_bytes(response.into_body()).await.unwrap();
        let text = String::from_utf8(bytes.to_vec()).unwrap();
        assert!(text.starts_with(": keep-alive\n\n: keep-alive\n\n"), "{text}");
        assert!(text.ends_with("data: Error(Lost)\n\ndata: [DONE]\n\n"), "{text}");
    }
}
