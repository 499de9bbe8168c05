//! Owns the event-stream framing of a reply: a reader of the log that writes server-sent events.
//!
//! Invariants: a body ends with `[DONE]` whatever happened to the reply; if the reply can be resumed,
//! every other event has an `id:`; each event is one part of the body; and, unless the client does not
//! want that, something is said at least once a period, so that no proxy takes a busy server for a dead
//! one. Must not know what the JSON of an endpoint looks like: a renderer makes that.
//!
//! Heartbeats are comments, whose bytes depend on what widespread clients accept:
//!
//! - With `id:` lines a heartbeat is one line with no blank line after it. The decoders of openai's Python
//!   client and of httpx-sse keep the last id, take a blank line for the end of an event without data, and
//!   fail on it.
//! - Without, a blank line follows, and the write of the next event begins with an empty comment. Load
//!   generators such as vLLM's strip the white space of each network read, the blank line too; the second
//!   one keeps the event apart from the heartbeat.

mod documents;
mod news;

use std::sync::Arc;
use std::time::Duration;

use actix_web::web::{Bytes, BytesMut};
use actix_web::{HttpResponse, HttpResponseBuilder};
use actix_web_lab::body::new_infallible_body_stream;
use actix_web_lab::header::{CacheControl, CacheDirective};
use futures_util::stream;
use glm_engine::SequenceError;

pub use self::documents::{Documents, Render};
use self::news::news;
use super::connection::{self, Connection};
use super::cursor::Cursor;
use super::event::Event;
use super::event_log::LogReader;
use super::names::StreamId;
use super::readers::ReaderPermit;
use super::reply_stream::ReplyStream;
use crate::json;
use crate::metrics::{Delivery, Metrics};

/// Without the charset, clients that follow the old rules for `text/*` decode ISO-8859-1.
const MEDIA_TYPE: &str = "text/event-stream; charset=utf-8";

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
    /// Silence after which something is said; `None` for a client that can read no comments.
    pub comment_period: Option<Duration>,
    /// How long a client may take no bytes.
    pub write_timeout: Duration,
    /// What hears of cut connections.
    pub metrics: Arc<Metrics>,
    /// What times the delivery; only the first reader's is a latency of the server's.
    pub delivery: Option<Delivery>,
    /// Lets a drain wait for this answer, and cut it short.
    pub permit: ReaderPermit,
}

struct Writer<R> {
    session: Session,
    render: R,
    /// Whether a client could resume after an event.
    has_ids: bool,
    /// Grows to what the events need and is used again once the connection has taken them.
    frames: BytesMut,
    /// A heartbeat was the last thing that was written.
    after_heartbeat: bool,
    done: bool,
}

/// A streaming answer that reads the log to its end.
pub fn respond(session: Session, render: impl Render + 'static) -> HttpResponse {
    session.stream.mark_streamed();
    let connection = session.connection.clone();
    let (timeout, metrics) = (session.write_timeout, Arc::clone(&session.metrics));
    let mut response = head(&session.stream.id);
    let has_ids = session.stream.is_resumable();
    let frames = BytesMut::new();
    let writer = Writer { session, render, has_ids, frames, after_heartbeat: false, done: false };
    let parts = stream::unfold(writer, |mut writer| async {
        let part = writer.next().await?;
        Some((part, writer))
    });
    let parts = connection::watch(Box::pin(parts), connection.as_ref(), timeout, move || {
        metrics.slow_reader_cut();
        tracing::info!("a client that took no bytes was cut off");
    });
    response.body(new_infallible_body_stream(parts))
}

/// The head of a streaming answer.
pub fn head(id: &StreamId) -> HttpResponseBuilder {
    let mut response = HttpResponse::Ok();
    response
        .content_type(MEDIA_TYPE)
        .insert_header(CacheControl(vec![CacheDirective::NoCache]))
        // nginx would otherwise collect the events and deliver them in lumps.
        .insert_header(("x-accel-buffering", "no"))
        .insert_header(("glm-stream-id", id.to_string()));
    response
}

impl<R: Render> Writer<R> {
    /// The next part of the body: what there is to say of one event of the log, or a heartbeat.
    async fn next(&mut self) -> Option<Bytes> {
        while !self.done {
            if self.session.permit.is_over() && self.session.reader.is_behind() {
                return Some(self.cut_short());
            }
            let next = self.session.reader.next();
            let logged = match self.session.comment_period {
                None => next.await,
                Some(period) => match tokio::time::timeout(period, next).await {
                    Ok(logged) => logged,
                    Err(_) => return Some(self.heartbeat().await),
                },
            };
            let start = self.frames.len();
            if self.after_heartbeat && !self.has_ids {
                self.frames.extend_from_slice(b":\n\n");
            }
            let begun = self.frames.len();
            let mut documents = Documents {
                frames: &mut self.frames,
                cursor: Cursor { event: 0, document: 0 },
                after: None,
                stream: None,
            };
            match logged {
                Ok(Some(logged)) => {
                    if let (Some(delivery), Event::Delta { .. }) = (&mut self.session.delivery, &logged.event)
                    {
                        delivery.delivered(logged.at);
                    }
                    documents.cursor.event = logged.index;
                    documents.after = self.session.after;
                    documents.stream = self.has_ids.then_some(self.session.stream.tag);
                    self.render.render(logged.event, &mut documents);
                }
                // It has no position in the log from which a client could resume.
                Err(error) => self.render.render(Event::Error(error), &mut documents),
                Ok(None) => {
                    self.frames.extend_from_slice(b"data: [DONE]\n\n");
                    self.done = true;
                }
            }
            if self.frames.len() > begun {
                self.after_heartbeat = false;
                return Some(self.frames.split().freeze());
            }
            // The client has all of this event.
            self.frames.truncate(start);
        }
        None
    }

    /// The error that ends an answer for which there is no more time. It is no event of the reply and has no id: a
    /// client may come back for what it has not got.
    fn cut_short(&mut self) -> Bytes {
        self.session.reader.stop();
        if self.after_heartbeat && !self.has_ids {
            self.frames.extend_from_slice(b":\n\n");
        }
        self.after_heartbeat = false;
        let cursor = Cursor { event: 0, document: 0 };
        let mut documents = Documents { frames: &mut self.frames, cursor, after: None, stream: None };
        self.render.render(Event::Error(SequenceError::ShuttingDown.into()), &mut documents);
        self.frames.split().freeze()
    }

    /// A comment that says how far the reply is.
    async fn heartbeat(&mut self) -> Bytes {
        let progress = self.session.stream.progress().await;
        self.after_heartbeat = true;
        self.frames.extend_from_slice(b": keep-alive");
        if let Some(news) = progress.map(news) {
            self.frames.extend_from_slice(b" ");
            json::append(&mut self.frames, &news);
        }
        self.frames.extend_from_slice(if self.has_ids { b"\n" } else { b"\n\n" });
        self.frames.split().freeze()
    }
}

#[cfg(test)]
mod tests {
    use actix_web::body;
    use futures_util::{FutureExt, StreamExt};
    use glm_engine::{Progress, Stage};

    use super::*;
    use crate::fixtures;
    use crate::principal::Client;
    use crate::principal::Owner;
    use crate::stream::event::{StreamError, Usage};
    use crate::stream::event_log::{LogLimits, LogWriter, event_log};
    use crate::stream::names::{RequestKey, StreamId};
    use crate::stream::readers::Readers;
    use crate::stream::reply_stream::{Form, ReplyHead, Wishes};

    struct Debug;

    impl Render for Debug {
        fn render(&mut self, event: Event, documents: &mut Documents<'_>) {
            documents.push(&match &event {
                Event::Role => "Role",
                Event::Delta { text, .. } => text,
                Event::Finish { .. } => "Finish",
                Event::Error(_) => "Error",
            });
            if event == Event::Role {
                documents.push(&"second");
            }
        }
    }

    const MS: Duration = Duration::from_millis(1);

    fn session(key: Option<&str>, after: Option<Cursor>) -> (LogWriter, Wishes, Session) {
        let (writer, log) = event_log(LogLimits { max_events: 9, max_bytes: 9 });
        let head = ReplyHead {
            id: String::new(),
            created: 0,
            model: String::new(),
            fingerprint: String::new(),
            num_prompt_tokens: 1,
            max_tokens: 9,
        };
        let reader = log.reader(after.map_or(0, |cursor| cursor.event));
        let key = key.map(|key| RequestKey { key: key.to_owned(), fingerprint: [0; 32] });
        let (stream, wishes) = ReplyStream::new(
            StreamId::given("name"),
            Owner::ANYBODY,
            Client::Peer(None),
            key,
            head,
            Form::Plain,
            log,
        );
        let session = Session {
            stream: Arc::new(stream),
            reader,
            after,
            connection: None,
            comment_period: Some(20 * MS),
            write_timeout: Duration::from_secs(9),
            metrics: Arc::new(Metrics::new(&fixtures::chatglm3().manifest()).unwrap()),
            delivery: None,
            permit: Readers::default().permit(),
        };
        (writer, wishes, session)
    }

    fn delta(text: &str) -> Event {
        Event::Delta { text: text.to_owned(), usage: Usage::default() }
    }

    async fn text(response: HttpResponse) -> String {
        String::from_utf8(body::to_bytes(response.into_body()).await.unwrap().to_vec()).unwrap()
    }

    /// The parts of a body that is not at its end, each on its own.
    fn parts(session: Session) -> impl StreamExt<Item = String> + Unpin {
        let body = Box::pin(respond(session, Debug).into_body());
        let part = |mut body: std::pin::Pin<Box<body::BoxBody>>| async {
            let part = std::future::poll_fn(|context| body::MessageBody::poll_next(body.as_mut(), context));
            let part = part.await?.unwrap();
            Some((String::from_utf8(part.to_vec()).unwrap(), body))
        };
        Box::pin(stream::unfold(body, part))
    }

    #[actix_web::test]
    async fn a_stream_ends_with_done_after_an_error_too() {
        for (key, expected) in [
            (None, "data: \"Role\"\n\ndata: \"second\"\n\ndata: \"Error\"\n\ndata: [DONE]\n\n"),
            (
                Some("k"),
                "id: 82a3537f.0.0\ndata: \"Role\"\n\nid: 82a3537f.0.1\ndata: \"second\"\n\nid: 82a3537f.1.0\ndata: \"Error\"\n\n\
                 data: [DONE]\n\n",
            ),
        ] {
            let (mut log, _wishes, session) = session(key, None);
            log.append(Event::Role).unwrap();
            log.close(Event::Error(StreamError::Lost));
            let response = respond(session, Debug);
            let headers = response.headers();
            assert_eq!(headers.get("content-type").unwrap(), "text/event-stream; charset=utf-8");
            assert_eq!(headers.get("cache-control").unwrap(), "no-cache");
            assert_eq!(headers.get("x-accel-buffering").unwrap(), "no");
            assert_eq!(headers.get("glm-stream-id").unwrap(), "name");
            assert_eq!(text(response).await, expected);
        }
    }

    #[actix_web::test]
    async fn a_cursor_skips_what_the_client_has() {
        for (document, expected) in [
            (
                0,
                "id: 82a3537f.0.1\ndata: \"second\"\n\nid: 82a3537f.1.0\ndata: \"Error\"\n\ndata: [DONE]\n\n",
            ),
            (1, "id: 82a3537f.1.0\ndata: \"Error\"\n\ndata: [DONE]\n\n"),
        ] {
            let (mut log, _wishes, session) = session(Some("k"), Some(Cursor { event: 0, document }));
            log.append(Event::Role).unwrap();
            log.close(Event::Error(StreamError::Lost));
            assert_eq!(text(respond(session, Debug)).await, expected);
        }
    }

    #[actix_web::test]
    async fn the_role_waits_for_the_first_text_and_each_event_is_one_part() {
        let (mut log, _wishes, mut session) = session(None, None);
        session.comment_period = None;
        let mut parts = parts(session);
        log.append(Event::Role).unwrap();
        assert_eq!(parts.next().now_or_never(), None);
        log.append(delta("x")).unwrap();
        assert_eq!(parts.next().now_or_never().flatten().unwrap(), "data: \"Role\"\n\ndata: \"second\"\n\n");
        assert_eq!(parts.next().now_or_never().flatten().unwrap(), "data: \"x\"\n\n");
        assert_eq!(parts.next().now_or_never(), None);
    }

    #[actix_web::test]
    async fn silence_is_filled_with_news() {
        let (log, mut wishes, session) = session(None, None);
        actix_web::rt::spawn(async move {
            let question = wishes.questions.recv().await.unwrap();
            let stage = Stage::Waiting { position: 3 };
            question.send(Progress { stage, estimate: Some(1500 * MS) }).unwrap();
            drop(wishes);
            tokio::time::sleep(30 * MS).await;
            log.close(Event::Error(StreamError::Lost));
        });
        let text = text(respond(session, Debug)).await;
        let first = ": keep-alive {\"stage\":\"waiting\",\"position\":3,\"estimate_ms\":1500}\n\n";
        assert!(text.starts_with(&format!("{first}: keep-alive\n\n")), "{text}");
        assert!(text.ends_with(": keep-alive\n\n:\n\ndata: \"Error\"\n\ndata: [DONE]\n\n"), "{text}");
    }

    #[actix_web::test]
    async fn the_bytes_of_heartbeats_and_of_the_event_after_them() {
        for (key, beat, before, id) in
            [(None, ": keep-alive\n\n", ":\n\n", ""), (Some("k"), ": keep-alive\n", "", "id: 82a3537f.1.0\n")]
        {
            let (mut log, wishes, session) = session(key, None);
            // Nobody says how far the reply is.
            drop(wishes);
            let mut parts = parts(session);
            log.append(Event::Role).unwrap();
            assert_eq!(parts.next().await.unwrap(), beat);
            assert_eq!(parts.next().await.unwrap(), beat);
            log.append(delta("x")).unwrap();
            let role = parts.next().await.unwrap();
            let first = if key.is_some() { "id: 82a3537f.0.0\ndata: " } else { ":\n\ndata: " };
            assert!(role.starts_with(first), "{role:?}");
            assert_eq!(
                parts.next().await.unwrap(),
                format!("{id}data: \"x\"\n\n"),
                "no second blank comment"
            );
            assert_eq!(parts.next().await.unwrap(), beat, "silence in mid-reply");
            log.close(Event::Error(StreamError::Lost));
            let id = id.replace(".1.", ".2.");
            assert_eq!(parts.next().await.unwrap(), format!("{before}{id}data: \"Error\"\n\n"));
            assert_eq!(parts.next().await.unwrap(), "data: [DONE]\n\n");
            assert_eq!(parts.next().await, None);
        }
    }
}
