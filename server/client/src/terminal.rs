//! Owns the chat in a terminal: lines of a person go out, replies stream in, and the history grows by both.
//!
//! Invariant: a reply enters the history only if it came whole; one that was stopped or that broke leaves with
//! the question that led to it. Replies go to standard output, everything else to standard error.

use std::io::{self, BufRead, IsTerminal, Write};

use tokio::sync::mpsc;

use crate::chat::{ChatRequest, Message, StreamEvent};
use crate::client::Client;
use crate::config::ClientConfig;
use crate::error::ClientError;
use crate::resume::ResumingStream;
use crate::retry::RetryPolicy;
use crate::seal::Verified;

/// Erases a line of a terminal and returns to its start.
const ERASE_LINE: &str = "\r\x1b[2K";

/// Chats with a server in the terminal.
#[derive(Clone, Debug, clap::Args)]
pub struct ChatArgs {
    /// The server's address, without /v1
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8000")]
    pub base_url: String,
    /// The model to ask for [default: the first that the server lists]
    #[arg(long)]
    pub model: Option<String>,
    /// Sent as a bearer token
    #[arg(long, value_name = "KEY", env = "GLMSERVE_API_KEY", hide_env_values = true)]
    pub api_key: Option<String>,
    /// Refuse to talk to another model than the one with this digest
    #[arg(long, value_name = "DIGEST")]
    pub model_digest: Option<String>,
    /// Say only this, and end with the reply
    #[arg(long, value_name = "TEXT")]
    pub message: Option<String>,
    /// A system message that stands before the chat
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Sampling temperature; 0 is greedy [default: the model's]
    #[arg(long)]
    pub temperature: Option<f32>,
    /// Most tokens of a reply [default: as many as fit]
    #[arg(long, value_name = "N")]
    pub max_tokens: Option<u32>,
}

/// Why a chat ended before its time.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChatError {
    /// The server cannot be reached, refused, or broke off for good.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The server lists no model.
    #[error("the server lists no model")]
    NoModel,
    /// The one reply that was asked for did not come whole.
    #[error("the reply is not whole: {0}")]
    Broken(String),
    /// The terminal failed.
    #[error("terminal: {0}")]
    Terminal(#[from] io::Error),
}

/// How a reply ended.
enum Reply {
    Whole(String),
    Stopped,
    Failed(String),
}

/// Chats until the input ends, `/quit`, or Ctrl-C where nothing is to be stopped.
pub async fn run(args: ChatArgs) -> Result<(), ChatError> {
    let mut config = ClientConfig::new(&args.base_url);
    config.api_key.clone_from(&args.api_key);
    config.model_digest.clone_from(&args.model_digest);
    let client = Client::new(config)?;
    let model = match args.model {
        Some(model) => model,
        None => client.models().await?.into_iter().next().ok_or(ChatError::NoModel)?,
    };
    let system: Vec<Message> = args.system.map(|text| Message::new("system", text)).into_iter().collect();
    let mut request = ChatRequest {
        model,
        messages: system.clone(),
        max_tokens: args.max_tokens,
        temperature: args.temperature,
        ..ChatRequest::default()
    };
    if let Some(text) = args.message {
        request.messages.push(Message::new("user", text));
        return match reply(&client, &request).await? {
            Reply::Whole(_) => Ok(()),
            Reply::Stopped => Err(ChatError::Broken("stopped".into())),
            Reply::Failed(error) => Err(ChatError::Broken(error)),
        };
    }
    let interactive = io::stdin().is_terminal();
    if interactive {
        eprintln!("{} at {}; /reset forgets the chat, /quit ends it", request.model, args.base_url);
    }
    let mut lines = lines()?;
    loop {
        if interactive {
            eprint!("> ");
        }
        let line = tokio::select! {
            line = lines.recv() => line,
            _ = tokio::signal::ctrl_c() => None,
        };
        let Some(line) = line.transpose()? else { return Ok(()) };
        match line.trim() {
            "" => {}
            "/quit" => return Ok(()),
            "/reset" => request.messages.clone_from(&system),
            text => {
                request.messages.push(Message::new("user", text));
                match reply(&client, &request).await? {
                    Reply::Whole(text) => request.messages.push(Message::new("assistant", text)),
                    Reply::Stopped => {
                        request.messages.pop();
                    }
                    Reply::Failed(error) => {
                        eprintln!("glmserve: {error}");
                        request.messages.pop();
                    }
                }
            }
        }
    }
}

/// Streams one reply to standard output; Ctrl-C stops it, at the server too.
async fn reply(client: &Client, request: &ChatRequest) -> io::Result<Reply> {
    let mut stream = client.resuming(request, RetryPolicy::default());
    let opened = tokio::select! {
        opened = stream.open() => Some(opened),
        _ = tokio::signal::ctrl_c() => None,
    };
    match opened {
        Some(Ok(())) => {}
        Some(Err(error)) => return Ok(Reply::Failed(error.to_string())),
        None => return Ok(stop(stream).await),
    }
    let printed = tokio::select! {
        printed = print(&mut stream) => Some(printed?),
        _ = tokio::signal::ctrl_c() => None,
    };
    writeln!(io::stdout())?;
    let Some(reply) = printed else { return Ok(stop(stream).await) };
    if stream.verified() == Some(Verified::No) && io::stderr().is_terminal() {
        eprintln!("(this server gives no hash: the reply was not verified)");
    }
    Ok(reply)
}

/// Tells the server to stop; one more Ctrl-C does not wait for that.
async fn stop(stream: ResumingStream) -> Reply {
    tokio::select! {
        stopped = stream.abort() => if let Err(error) = stopped {
            eprintln!("glmserve: the server was not told to stop: {error}");
        },
        _ = tokio::signal::ctrl_c() => {}
    }
    Reply::Stopped
}

async fn print(stream: &mut ResumingStream) -> io::Result<Reply> {
    let show_comments = io::stderr().is_terminal();
    let mut text = String::new();
    let mut comment_shown = false;
    while let Some(event) = stream.next().await {
        let event = match event {
            Ok(event) => event,
            Err(error) => return Ok(Reply::Failed(error.to_string())),
        };
        // A comment amid the text would tear it.
        if let StreamEvent::Comment(comment) = &event {
            if show_comments && text.is_empty() {
                eprint!("{ERASE_LINE}({})", printable(comment));
                comment_shown = true;
            }
            continue;
        }
        if std::mem::take(&mut comment_shown) {
            eprint!("{ERASE_LINE}");
        }
        match event {
            StreamEvent::Delta(delta) => {
                let mut out = io::stdout().lock();
                out.write_all(printable(&delta).as_bytes())?;
                out.flush()?;
                text += &delta;
            }
            StreamEvent::Error(error) => return Ok(Reply::Failed(error.to_string())),
            _ => {}
        }
    }
    Ok(Reply::Whole(text))
}

/// Without what could command the terminal: a model may write any character.
fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')).collect()
}

/// The lines of standard input. They are read by a thread of their own, as reading cannot be interrupted.
fn lines() -> io::Result<mpsc::Receiver<io::Result<String>>> {
    let (sender, receiver) = mpsc::channel(1);
    std::thread::Builder::new().name("stdin".into()).spawn(move || {
        for line in io::stdin().lock().lines() {
            if sender.blocking_send(line).is_err() {
                return;
            }
        }
    })?;
    Ok(receiver)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reply_cannot_command_the_terminal() {
        assert_eq!(printable("a\x1b[2J你\r\u{9b}b\t\n\u{7f}"), "a[2J你b\t\n");
    }
}
