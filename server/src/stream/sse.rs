//! Owns the event-stream framing of a reply: a reader of the log that writes server-sent events.
//!
//! Invariants: a body ends with `[DONE]` whatever happened to the reply; every other event has an
//! `id:`; and it says something at least once a period, so that no proxy takes a busy server for a
//! dead one. Must not know what the JSON of an endpoint looks like: a renderer makes that.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use actix_web::HttpResponse;
use actix_web::http::header;
use actix_web_lab::sse;
use futures_util::stream;
use glm_engine::{Progress, Stage};
use serde_json::json;

use super::connection::{self, Connection};
use super::cursor::Cursor;
use super::event::Event;
use super::event_log::LogReader;
use super::reply_stream::ReplyStream;
use crate::metrics::{Delivery, Metrics};

/// Makes the JSON documents of one event.
pub trait Render {
    /// Appends the documents for `event` to `documents`; each becomes one `data:` event. What they are
    /// depends on the event alone, so that each has the same place for every reader.
    fn render(&mut self, event: Event, documents: &mut Vec<String>);
}

/// Who reads a reply, and how.
#[derive(Debug)]
pub struct Session {
    /// The reply.
    pub stream: Arc<ReplyStream>,
    /// The cursor: at the event of `after`, or at the start.
    pub reader: LogReader,
    /// The last document that the client has.
    pub after: Option<Cursor>,
    /// Where the bytes go.
    pub connection: Option<Arc<Connection>>,
    /// Silence after which something is said.
    pub comment_period: Duration,
    /// How long a client may take no bytes.
    pub write_timeout: Duration,
    /// What hears of cut connections.
    pub metrics: Arc<Metrics>,
    /// What times the delivery; only the first reader's is a latency of the server's.
    pub delivery: Option<Delivery>,
}

struct Writer<R> {
    session: Session,
    render: R,
    ready: VecDeque<sse::Event>,
    done: bool,
}

/// A streaming answer that reads the log to its end.
pub fn respond(session: Session, render: impl Render + 'static) -> HttpResponse {
    session.stream.mark_streamed();
    let connection = session.connection.clone();
    let (timeout, metrics) = (session.write_timeout, Arc::clone(&session.metrics));
    let id = session.stream.id.to_string();
    let writer = Writer { session, render, ready: VecDeque::new(), done: false };
    let events = stream::unfold(writer, |mut writer| async {
        let event = writer.next().await?;
        Some((Ok::<_, Infallible>(event), writer))
    });
    let events = connection::watch(Box::pin(events), connection.as_ref(), timeout, move || {
        metrics.slow_reader_cut();
        tracing::info!("a client that took no bytes was cut off");
    });
    HttpResponse::Ok()
        .content_type("text/event-stream")
        .insert_header((header::CACHE_CONTROL, "no-cache"))
        // nginx would otherwise collect the events and deliver them in lumps.
        .insert_header(("x-accel-buffering", "no"))
        .insert_header(("glm-stream-id", id))
        .body(sse::Sse::from_stream(events))
}

impl<R: Render> Writer<R> {
    async fn next(&mut self) -> Option<sse::Event> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(event);
            }
            if self.done {
                return None;
            }
            let session = &mut self.session;
            match tokio::time::timeout(session.comment_period, session.reader.next()).await {
                Ok(Some(logged)) => {
                    if let (Some(delivery), Event::Delta { .. }) = (&mut session.delivery, &logged.event) {
                        delivery.delivered(logged.at);
                    }
                    let mut documents = Vec::new();
                    self.render.render(logged.event, &mut documents);
                    for (document, text) in documents.into_iter().enumerate() {
                        let cursor = Cursor { event: logged.index, document };
                        if session.after < Some(cursor) {
                            self.ready.push_back(sse::Data::new(text).id(cursor.to_string()).into());
                        }
                    }
                }
                Ok(None) => {
                    self.ready.push_back(sse::Data::new("[DONE]").into());
                    self.done = true;
                }
                Err(_) => return Some(heartbeat(session.stream.progress().await)),
            }
        }
    }
}

/// A comment that says how far the reply is.
fn heartbeat(progress: Option<Progress>) -> sse::Event {
    let Some(Progress { stage, estimate }) = progress else {
        return sse::Event::Comment("keep-alive".into());
    };
    let mut news = match stage {
        Stage::Waiting { position } => json!({"stage": "waiting", "position": position}),
        Stage::Prefill { num_computed_tokens, num_tokens } => {
            json!({"stage": "prefill", "computed_tokens": num_computed_tokens, "prompt_tokens": num_tokens})
        }
        Stage::Decode => json!({"stage": "decode"}),
    };
    if let Some(estimate) = estimate {
        news["estimate_ms"] = json!(u64::try_from(estimate.as_millis()).unwrap_or(u64::MAX));
    }
    sse::Event::Comment(format!("keep-alive {news}").into())
}

#[cfg(test)]
mod tests {
    use actix_web::body;

    use super::*;
    use crate::fixtures;
    use crate::stream::event::StreamError;
    use crate::stream::event_log::{LogLimits, LogWriter, event_log};
    use crate::stream::reply_stream::{Form, ReplyHead, Wishes};
    use crate::stream::store::{Owner, StreamId};

    struct Debug;

    impl Render for Debug {
        fn render(&mut self, event: Event, documents: &mut Vec<String>) {
            documents.push(format!("{event:?}"));
            if event == Event::Role {
                documents.push("second".to_owned());
            }
        }
    }

    fn session(after: Option<Cursor>) -> (LogWriter, Wishes, Session) {
        let (writer, log) = event_log(LogLimits { max_events: 9, max_bytes: 9 });
        let head = ReplyHead {
            id: String::new(),
            created: 0,
            model: String::new(),
            fingerprint: String::new(),
            num_prompt_tokens: 1,
        };
        let reader = log.reader(after.map_or(0, |cursor| cursor.event));
        let (stream, wishes) =
            ReplyStream::new(StreamId::given("name"), Owner::ANYBODY, None, head, Form::Plain, log);
        let session = Session {
            stream: Arc::new(stream),
            reader,
            after,
            connection: None,
            comment_period: Duration::from_millis(20),
            write_timeout: Duration::from_secs(9),
            metrics: Arc::new(Metrics::new(&fixtures::chatglm3().manifest()).unwrap()),
            delivery: None,
        };
        (writer, wishes, session)
    }

    async fn text(response: HttpResponse) -> String {
        String::from_utf8(body::to_bytes(response.into_body()).await.unwrap().to_vec()).unwrap()
    }

    #[actix_web::test]
    async fn a_stream_ends_with_done_after_an_error_too() {
        let (mut log, _wishes, session) = session(None);
        log.append(Event::Role).unwrap();
        log.close(Event::Error(StreamError::Lost));
        let response = respond(session, Debug);
        let headers = response.headers();
        assert_eq!(headers.get("content-type").unwrap(), "text/event-stream");
        assert_eq!(headers.get("cache-control").unwrap(), "no-cache");
        assert_eq!(headers.get("x-accel-buffering").unwrap(), "no");
        assert_eq!(headers.get("glm-stream-id").unwrap(), "name");
        assert_eq!(
            text(response).await,
            "id: 0.0\ndata: Role\n\nid: 0.1\ndata: second\n\nid: 1.0\ndata: Error(Lost)\n\ndata: [DONE]\n\n"
        );
    }

    #[actix_web::test]
    async fn a_cursor_skips_what_the_client_has() {
        for (document, expected) in [
            (0, "id: 0.1\ndata: second\n\nid: 1.0\ndata: Error(Lost)\n\ndata: [DONE]\n\n"),
            (1, "id: 1.0\ndata: Error(Lost)\n\ndata: [DONE]\n\n"),
        ] {
            let (mut log, _wishes, session) = session(Some(Cursor { event: 0, document }));
            log.append(Event::Role).unwrap();
            log.close(Event::Error(StreamError::Lost));
            assert_eq!(text(respond(session, Debug)).await, expected);
        }
    }

    #[actix_web::test]
    async fn silence_is_filled_with_news() {
        let (log, mut wishes, session) = session(None);
        actix_web::rt::spawn(async move {
            let question = wishes.questions.recv().await.unwrap();
            let stage = Stage::Waiting { position: 3 };
            question.send(Progress { stage, estimate: Some(Duration::from_millis(1500)) }).unwrap();
            drop(wishes);
            tokio::time::sleep(Duration::from_millis(30)).await;
            log.close(Event::Error(StreamError::Lost));
        });
        let text = text(respond(session, Debug)).await;
        let first = ": keep-alive {\"stage\":\"waiting\",\"position\":3,\"estimate_ms\":1500}\n\n";
        assert!(text.starts_with(&format!("{first}: keep-alive\n\n")), "{text}");
        assert!(text.ends_with("data: Error(Lost)\n\ndata: [DONE]\n\n"), "{text}");
    }
}
