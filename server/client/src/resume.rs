//! Owns a streamed answer that outlives its connections: a break is mended, and the whole is checked.
//!
//! Invariant: `Done` is given only for an answer that came whole, and, if the server seals its answers, whose
//! hash and token count are right; nothing is given twice. A server that cannot resume is never asked again
//! once its answer began, as that would start the answer over.

use crate::chat::{ChatRequest, StreamEvent};
use crate::client::Client;
use crate::clock;
use crate::error::ClientError;
use crate::random;
use crate::retry::{Backoff, RetryPolicy};
use crate::seal::{SealCheck, Verified};
use crate::stream::ChatStream;

/// A streamed answer over as many connections as it takes.
///
/// Dropping it closes the connection only: the server goes on for a while, for a client that comes back.
/// [`abort`](Self::abort) ends the work too.
#[derive(Debug)]
pub struct ResumingStream {
    client: Client,
    request: ChatRequest,
    idempotency_key: String,
    backoff: Backoff,
    /// `None` between two connections.
    stream: Option<ChatStream>,
    /// From a server that can resume; its answers are sealed too.
    stream_id: Option<String>,
    last_event_id: Option<String>,
    check: SealCheck,
    verified: Option<Verified>,
    /// The request may have reached the server, and no answer to it has come: only the key names what may run.
    is_unanswered: bool,
    ended: bool,
    num_resumes: u32,
}

impl Client {
    /// Starts a streamed chat that survives broken connections; a refusal that may pass is tried again. To be
    /// able to stop it before it is open, use [`resuming`](Self::resuming).
    pub async fn chat_resuming(
        &self,
        request: &ChatRequest,
        policy: RetryPolicy,
    ) -> Result<ResumingStream, ClientError> {
        let mut stream = self.resuming(request, policy);
        stream.open().await?;
        Ok(stream)
    }

    /// A streamed chat that is not [open](ResumingStream::open) yet.
    pub fn resuming(&self, request: &ChatRequest, policy: RetryPolicy) -> ResumingStream {
        ResumingStream {
            client: self.clone(),
            request: request.clone(),
            idempotency_key: random::key(),
            backoff: Backoff::new(policy),
            stream: None,
            stream_id: None,
            last_event_id: None,
            check: SealCheck::default(),
            verified: None,
            is_unanswered: false,
            ended: false,
            num_resumes: 0,
        }
    }
}

impl ResumingStream {
    /// Sends the request, and waits for its answer to begin; a refusal that may pass is tried again. If this
    /// is given up, the request goes on at the server until [`abort`](Self::abort) or its grace time ends it.
    pub async fn open(&mut self) -> Result<(), ClientError> {
        while let Err(error) = self.connect().await {
            self.wait(error).await?;
        }
        Ok(())
    }

    /// The next event; `None` after `Done`, after an error that the server told, and after an error.
    pub async fn next(&mut self) -> Option<Result<StreamEvent, ClientError>> {
        if self.ended {
            return None;
        }
        let result = self.advance().await;
        self.ended = matches!(result, Err(_) | Ok(StreamEvent::Done | StreamEvent::Error(_)));
        Some(result)
    }

    /// Whether the answer was checked against its hash; `None` unless it came whole.
    pub fn verified(&self) -> Option<Verified> {
        self.verified
    }

    /// How often the answer went on over a new connection.
    pub fn num_resumes(&self) -> u32 {
        self.num_resumes
    }

    /// Tells the server to stop; an answer that has ended already, or a server that only knows closed
    /// connections, is no error.
    pub async fn abort(mut self) -> Result<(), ClientError> {
        self.stream = None;
        match &self.stream_id {
            Some(stream_id) if !self.ended => self.client.abort_stream(stream_id).await,
            // A server keeps a request with a key although its connection closed: somebody may come back.
            None if self.is_unanswered => self.client.abort_key(&self.idempotency_key).await,
            _ => Ok(()),
        }
    }

    async fn advance(&mut self) -> Result<StreamEvent, ClientError> {
        loop {
            let result = match &mut self.stream {
                Some(stream) => match stream.next().await {
                    Some(Ok(event)) => {
                        self.last_event_id =
                            stream.last_event_id().or(self.last_event_id.as_deref()).map(str::to_owned);
                        return self.accept(event);
                    }
                    Some(Err(error)) => Err(error),
                    None => Err(ClientError::Truncated { broken: None }),
                },
                None => self.connect().await,
            };
            if let Err(error) = result {
                self.wait(error).await?;
            }
        }
    }

    fn accept(&mut self, event: StreamEvent) -> Result<StreamEvent, ClientError> {
        // Heartbeats of a connection that brings nothing else must not keep a client trying for ever.
        if !matches!(event, StreamEvent::Comment(_)) {
            self.backoff.progress();
        }
        self.check.take(&event);
        if event == StreamEvent::Done {
            let verified = self.check.verify()?;
            if self.stream_id.is_some() && verified == Verified::No {
                return Err(ClientError::Unsealed);
            }
            self.verified = Some(verified);
        }
        Ok(event)
    }

    /// Opens the stream, or goes on with it. The same key with no id starts it from its beginning, and a
    /// second time only if it failed.
    async fn connect(&mut self) -> Result<(), ClientError> {
        let stream = match (&self.stream_id, &self.last_event_id) {
            (Some(stream_id), Some(last)) => self.client.resume_stream(stream_id, last).await?,
            _ => {
                // Before it is sent: whoever drops this future does not hear how far it came.
                self.is_unanswered = true;
                let answer = self.client.chat_with_key(&self.request, &self.idempotency_key).await;
                self.is_unanswered = matches!(answer, Err(ClientError::Transport(_) | ClientError::Idle(_)));
                answer?
            }
        };
        let stream_id = stream.header("GLM-Stream-Id").map(str::to_owned);
        if self.last_event_id.is_some() && stream_id != self.stream_id {
            return Err(ClientError::WrongStream(stream_id));
        }
        self.num_resumes += u32::from(self.stream_id.is_some());
        self.stream_id = stream_id;
        self.stream = Some(stream);
        Ok(())
    }

    async fn wait(&mut self, error: ClientError) -> Result<(), ClientError> {
        if self.stream.take().is_some() && self.stream_id.is_none() {
            return Err(error);
        }
        let wait = self.backoff.wait_after(error, clock::now(), random::fraction())?;
        tokio::time::sleep(wait).await;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
