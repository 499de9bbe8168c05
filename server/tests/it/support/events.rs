//! Owns a strict reader of a streamed answer, which checks the contract as it reads.

#![allow(dead_code, reason = "each test program uses a part")]

use serde_json::Value;
use sha2::{Digest, Sha256};

/// One event.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct SseEvent {
    /// Empty in a stream that nobody can resume.
    pub(crate) id: String,
    pub(crate) document: Value,
}

/// A streamed answer, read event by event.
pub(crate) struct Events {
    response: reqwest::Response,
    buffer: String,
    pub(crate) comments: Vec<String>,
    pub(crate) done: bool,
    /// Whether the events have ids, once there was one.
    has_ids: Option<bool>,
}

impl Events {
    pub(crate) fn of(response: reqwest::Response) -> Self {
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "text/event-stream; charset=utf-8");
        Self { response, buffer: String::new(), comments: Vec::new(), done: false, has_ids: None }
    }

    pub(crate) fn stream_id(&self) -> String {
        self.response.headers()["glm-stream-id"].to_str().unwrap().to_owned()
    }

    /// The next event; `None` after `[DONE]`.
    pub(crate) async fn next(&mut self) -> Option<SseEvent> {
        loop {
            if let Some((frame, rest)) = self.buffer.split_once("\n\n") {
                let frame = frame.to_owned();
                self.buffer = rest.to_owned();
                if let Some(event) = self.read(&frame) {
                    return Some(event);
                }
                continue;
            }
            match self.response.chunk().await {
                Ok(Some(bytes)) => self.buffer += std::str::from_utf8(&bytes).unwrap(),
                end => {
                    assert!(self.done && self.buffer.is_empty(), "cut off: {end:?} {:?}", self.buffer);
                    return None;
                }
            }
        }
    }

    /// What a frame holds: comments before an event with an id, an empty or a single comment without ids.
    fn read(&mut self, frame: &str) -> Option<SseEvent> {
        assert!(!self.done, "after [DONE]: {frame}");
        let (mut id, mut num_comments) = (None, 0);
        for line in frame.split('\n') {
            if let Some(comment) = line.strip_prefix(':') {
                self.comments.extend(comment.strip_prefix(' ').map(str::to_owned));
                num_comments += 1;
            } else if let Some(given) = line.strip_prefix("id: ") {
                assert!(id.replace(given.to_owned()).is_none(), "{frame}");
            } else if line == "data: [DONE]" {
                self.done = true;
            } else {
                let has_ids = *self.has_ids.get_or_insert(id.is_some());
                assert_eq!(id.is_some(), has_ids, "{frame}");
                assert!(has_ids || num_comments == 0, "a comment and an event in one frame: {frame}");
                let document = serde_json::from_str(line.strip_prefix("data: ").unwrap()).unwrap();
                return Some(SseEvent { id: id.unwrap_or_default(), document });
            }
        }
        assert!(self.has_ids != Some(true) || self.done, "an event of nothing: {frame}");
        None
    }

    pub(crate) async fn rest(mut self) -> Vec<SseEvent> {
        let mut events = Vec::new();
        while let Some(event) = self.next().await {
            events.push(event);
        }
        events
    }
}

/// The text of whole stream, after its contract was checked: one role, one finish that ends it and
/// whose hash fits, ids in order if there are any.
pub(crate) fn complete_text(events: &[SseEvent]) -> String {
    let mut tags = Vec::new();
    let ids: Vec<(usize, usize)> = events
        .iter()
        .filter(|event| !event.id.is_empty())
        .map(|event| {
            let (tag, place) = event.id.split_once('.').unwrap();
            let (event, document) = place.split_once('.').unwrap();
            tags.push(tag);
            (event.parse().unwrap(), document.parse().unwrap())
        })
        .collect();
    tags.dedup();
    assert!(tags.len() <= 1 && tags.iter().all(|tag| tag.len() == 8), "one stream: {tags:?}");
    for (i, id) in ids.iter().enumerate() {
        let follows = i == 0 && *id == (0, 0) || i > 0 && *id == (ids[i - 1].0 + 1, 0);
        let is_usage = i > 0 && *id == (ids[i - 1].0, 1) && i + 1 == ids.len();
        assert!(follows || is_usage, "{ids:?}");
    }
    let (mut text, mut finish) = (String::new(), None);
    for (i, SseEvent { document, .. }) in events.iter().enumerate() {
        assert!(document.get("error").is_none(), "{document}");
        assert_eq!(document["id"], events[0].document["id"]);
        assert_eq!(document["created"], events[0].document["created"]);
        let Some(choice) = document["choices"].get(0) else {
            assert!(finish.is_some() && !document["usage"].is_null(), "{document}");
            continue;
        };
        assert!(finish.is_none(), "after the finish: {document}");
        assert_eq!(choice["delta"]["role"] == "assistant", i == 0, "{document}");
        assert_eq!(choice.get("logprobs"), Some(&Value::Null), "{document}");
        text += choice["delta"]["content"].as_str().unwrap_or_default();
        if !choice["finish_reason"].is_null() {
            finish = Some(document["glm"].clone());
        }
    }
    let finish = finish.expect("a finish");
    let hash: String = Sha256::digest(&text).iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(finish["text_sha256"], hash);
    assert!(finish["completion_tokens"].is_u64());
    text
}
