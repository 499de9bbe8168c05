//! Owns the measuring of one request.
//!
//! Invariant: a sample is `Ok` only if the stream said `[DONE]`, told no error and brought content: a broken
//! stream never counts as a fast one.

use std::time::{Duration, Instant};

use glmserve_client::{
    ChatRequest, ChatStream, Client, ClientError, ResumingStream, RetryPolicy, StreamEvent, Usage, clock,
};

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Ok,
    /// Refused, broken before the stream began, or an error told in it.
    Failed,
    /// It ended without `[DONE]`.
    Truncated,
    /// It ended in good order and brought no content.
    Empty,
}

/// One request, measured from the moment before it is sent.
#[derive(Debug)]
pub(super) struct Sample {
    pub(super) outcome: Outcome,
    pub(super) started: Instant,
    /// Tokens that were asked for.
    pub(super) max_tokens: u32,
    /// What went wrong, in words.
    pub(super) error: Option<String>,
    /// To the first content.
    pub(super) ttft: Option<Duration>,
    /// Between each content event and the one before it.
    pub(super) itl: Vec<Duration>,
    /// To the last content.
    pub(super) last_content: Duration,
    /// To the end of the stream.
    pub(super) latency: Duration,
    pub(super) usage: Option<Usage>,
    /// How often it went on over a new connection.
    pub(super) num_resumes: u32,
}

/// The stream that is measured.
enum Source {
    Plain(Box<ChatStream>),
    Resuming(Box<ResumingStream>),
}

impl Source {
    async fn next(&mut self) -> Option<Result<StreamEvent, ClientError>> {
        match self {
            Self::Plain(stream) => stream.next().await,
            Self::Resuming(stream) => stream.next().await,
        }
    }
}

impl Sample {
    /// Sends `request` and reads its stream to the end.
    pub(super) async fn take(client: &Client, request: &ChatRequest, resume: bool) -> Self {
        let started = clock::now();
        let mut sample = Self {
            outcome: Outcome::Ok,
            started,
            max_tokens: request.max_tokens.unwrap_or(0),
            error: None,
            ttft: None,
            itl: Vec::new(),
            last_content: Duration::ZERO,
            latency: Duration::ZERO,
            usage: None,
            num_resumes: 0,
        };
        if let Err(error) = sample.read(client, request, resume, started).await {
            sample.outcome = match &error {
                ClientError::Truncated { .. } => Outcome::Truncated,
                ClientError::GaveUp { last, .. } if matches!(**last, ClientError::Truncated { .. }) => {
                    Outcome::Truncated
                }
                _ => Outcome::Failed,
            };
            sample.error = Some(error.to_string());
        } else if sample.outcome == Outcome::Ok && sample.ttft.is_none() {
            sample.outcome = Outcome::Empty;
        }
        sample
    }

    async fn read(
        &mut self,
        client: &Client,
        request: &ChatRequest,
        resume: bool,
        started: Instant,
    ) -> Result<(), ClientError> {
        let mut stream = match resume {
            true => {
                let stream = client.chat_resuming(request, RetryPolicy::default()).await?;
                Source::Resuming(Box::new(stream))
            }
            false => Source::Plain(Box::new(client.chat(request).await?)),
        };
        while let Some(event) = stream.next().await {
            match event? {
                StreamEvent::Delta(_) | StreamEvent::ToolCalls(_) => {
                    let at = clock::now() - started;
                    match self.ttft {
                        None => self.ttft = Some(at),
                        Some(_) => self.itl.push(at - self.last_content),
                    }
                    self.last_content = at;
                }
                StreamEvent::Usage(usage) => self.usage = Some(usage),
                StreamEvent::Error(error) => {
                    self.outcome = Outcome::Failed;
                    self.error = Some(error.to_string());
                }
                StreamEvent::Done => self.latency = clock::now() - started,
                _ => {}
            }
            if let Source::Resuming(stream) = &stream {
                self.num_resumes = stream.num_resumes();
            }
        }
        Ok(())
    }

    /// When its stream ended.
    pub(super) fn ended(&self) -> Instant {
        self.started + self.latency.max(self.last_content)
    }

    /// Tokens (prompt, generated) that came after `begin`: the prompt's with the first content, the others
    /// evenly over the content events, since a server may put several into one.
    pub(super) fn tokens_since(&self, begin: Instant) -> (f64, f64) {
        let (Some(usage), Some(ttft)) = (self.usage, self.ttft) else { return (0.0, 0.0) };
        let mut at = self.started + ttft;
        let prompt = if at >= begin { usage.prompt_tokens as f64 } else { 0.0 };
        let mut num_since = u32::from(at >= begin);
        for gap in &self.itl {
            at += *gap;
            num_since += u32::from(at >= begin);
        }
        let share = f64::from(num_since) / (self.itl.len() + 1) as f64;
        (prompt, usage.completion_tokens as f64 * share)
    }

    /// The mean time of each token after the first: (last content - TTFT) / (tokens - 1).
    pub(super) fn tpot(&self) -> Option<Duration> {
        let num_later_tokens = u32::try_from(self.usage?.completion_tokens.checked_sub(1)?).ok()?;
        (self.last_content - self.ttft?).checked_div(num_later_tokens)
    }
}

/// The requests of a run.
#[derive(Debug, Default)]
pub(super) struct Samples {
    /// Those that warm up.
    pub(super) first: Vec<Sample>,
    /// Those that count.
    pub(super) rest: Vec<Sample>,
}

impl Samples {
    /// How many there are.
    pub(super) fn num_all(&self) -> u64 {
        (self.first.len() + self.rest.len()) as u64
    }
}
