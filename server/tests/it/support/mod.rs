//! Owns the server that end-to-end tests talk to: the real engine and HTTP, over a runner that plays
//! what the user's message says.
//!
//! `say TEXT` replies TEXT; `slow N` replies N letters, 2 ms each; `pause MS` and `stall MS` hang so
//! long before the first token and in mid-reply; `hush MS TEXT` replies TEXT and hangs that long at both
//! places; `late MS` fails after so long; `flood N` replies N
//! letters at once; `fail` fails on the third step, `refuse` on the first;
//! `bytes HEX` replies these bytes. `break` fails, and so does every step after it; `lose` loses the device,
//! `panic` the engine's thread.

#![allow(dead_code, reason = "each test program uses a part")]

pub(crate) mod events;
pub(crate) mod model_dir;
pub(crate) mod wire;

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use actix_web::web;
use glm_engine::runner::fake::FakeRunner;
use glm_engine::{EngineConfig, EngineThread, RunError};
use glmserve::ServedModel;
use glmserve::api_keys::ApiKeys;
use glmserve::http::ConnectionLimits;
use glmserve::lifecycle::{Lifecycle, Loaded};
use glmserve::metrics::Metrics;
use glmserve::state::{AppState, HttpOptions};
use glmserve::stream::event_log::LogLimits;
use glmserve::stream::memory_store::StoreLimits;
use glmserve::stream::time_limits::TimeLimits;
use glmserve::{LoadFailure, ServeError};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use self::model_dir::{FIRST_SPECIAL, ModelDir};

/// What tests may choose.
pub(crate) struct Options {
    pub(crate) folder: fn() -> ModelDir,
    pub(crate) max_num_seqs: usize,
    pub(crate) max_num_waiting: usize,
    pub(crate) connection_limits: ConnectionLimits,
    pub(crate) max_body_bytes: usize,
    pub(crate) drain_timeout: Duration,
    pub(crate) fault_exit_timeout: Option<Duration>,
    pub(crate) max_reply_bytes: usize,
    pub(crate) keys: Option<ApiKeys>,
    pub(crate) allowed_origins: &'static str,
    pub(crate) max_model_len: usize,
    pub(crate) stall_min: Duration,
    pub(crate) comment_period: Duration,
    pub(crate) status_hold: Duration,
    pub(crate) write_timeout: Duration,
    pub(crate) time_limits: TimeLimits,
    pub(crate) resume_grace: Duration,
    pub(crate) store_limits: StoreLimits,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            max_num_seqs: 8,
            max_num_waiting: 64,
            folder: model_dir::chatglm3,
            connection_limits: ConnectionLimits { max_total: 4096, max_per_peer: 3072 },
            max_body_bytes: 1 << 20,
            drain_timeout: Duration::from_secs(10),
            fault_exit_timeout: None,
            max_reply_bytes: 1 << 20,
            keys: None,
            allowed_origins: "localhost",
            max_model_len: 256,
            stall_min: Duration::from_secs(30),
            comment_period: Duration::from_secs(10),
            status_hold: Duration::from_secs(1),
            write_timeout: Duration::from_secs(10),
            time_limits: TimeLimits::default(),
            resume_grace: Duration::from_secs(10),
            store_limits: StoreLimits {
                retention: Duration::from_secs(10),
                max_bytes: 1 << 20,
                max_detached: 16,
            },
        }
    }
}

/// A server in this process.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    pub(crate) signals: mpsc::Sender<()>,
    pub(crate) state: web::Data<AppState>,
    task: JoinHandle<Result<(), ServeError>>,
    http: reqwest::Client,
    dir: ModelDir,
}

/// A server in this process whose model is not ready.
pub(crate) struct Starting {
    pub(crate) address: SocketAddr,
    pub(crate) signals: mpsc::Sender<()>,
    lifecycle: web::Data<Lifecycle>,
    pub(crate) task: JoinHandle<Result<(), ServeError>>,
    dir: ModelDir,
}

impl Starting {
    /// A server whose model is loaded once `gate` is done.
    pub(crate) fn begin(options: Options, gate: impl Future<Output = ()> + 'static) -> Self {
        let dir = (options.folder)();
        let mut manifest = dir.manifest();
        manifest.geometry.max_model_len = options.max_model_len;
        let model = ServedModel::load(dir.path(), manifest, &["alias/of".to_owned()]).unwrap();
        let metrics = Arc::new(Metrics::new(&model.manifest).unwrap());
        let geometry = model.manifest.geometry;
        let num_blocks = 2048;
        let mut is_broken = false;
        let reply = move |history: &[u32]| {
            let reply = play(history);
            is_broken |= reply == Err(RunError::new(BROKEN));
            if is_broken { Err(RunError::new(BROKEN)) } else { reply }
        };
        let runner = FakeRunner::scripted(geometry.vocab_size, num_blocks, 16, Box::new(reply));
        let config = EngineConfig {
            max_num_seqs: options.max_num_seqs,
            max_num_waiting: options.max_num_waiting,
            max_model_len: geometry.max_model_len,
            stall_min: options.stall_min,
            tenant_weights: options.keys.as_ref().map_or_else(|| vec![1], ApiKeys::weights),
            ..EngineConfig::default()
        };
        let (engine, _) = EngineThread::spawn(runner, config, geometry.vocab_size, metrics.clone()).unwrap();
        let http = HttpOptions {
            allowed_origins: options.allowed_origins.parse().unwrap(),
            max_body_bytes: options.max_body_bytes,
            connection_limits: options.connection_limits,
            body_memory_bytes: 4 * options.max_body_bytes,
            comment_period: options.comment_period,
            status_hold: options.status_hold,
            write_timeout: options.write_timeout,
            time_limits: options.time_limits,
            resume_grace: options.resume_grace,
            store_limits: options.store_limits,
            drain_timeout: options.drain_timeout,
            fault_exit_timeout: options.fault_exit_timeout,
            log_limits: LogLimits {
                max_events: geometry.max_model_len + 2,
                max_bytes: options.max_reply_bytes,
            },
        };
        let lifecycle = web::Data::new(Lifecycle::new(http, metrics, options.keys));
        let loading = async {
            gate.await;
            Ok::<_, LoadFailure>(Loaded { model, engine })
        };
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (signals, receiver) = mpsc::channel(2);
        let task = tokio::task::spawn_local(glmserve::serve(listener, lifecycle.clone(), loading, receiver));
        Self { address, signals, lifecycle, task, dir }
    }

    /// Waits until requests are let in.
    pub(crate) async fn ready(self) -> Server {
        let Self { address, signals, lifecycle, task, dir } = self;
        let state = loop {
            if let Some(state) = lifecycle.state() {
                break state.clone();
            }
            assert!(!task.is_finished(), "the server ended");
            tokio::time::sleep(Duration::from_millis(5)).await;
        };
        Server { address, signals, state, task, http: reqwest::Client::new(), dir }
    }
}

impl Server {
    /// A server that is ready.
    pub(crate) async fn start(options: Options) -> Self {
        Starting::begin(options, std::future::ready(())).ready().await
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub(crate) async fn get(&self, path: &str) -> (u16, String) {
        match self.http.get(self.url(path)).send().await {
            Ok(response) => (response.status().as_u16(), response.text().await.unwrap()),
            Err(error) => (0, error.to_string()),
        }
    }

    pub(crate) async fn send(&self, body: impl Into<reqwest::Body>) -> reqwest::Response {
        let request = self.http.post(self.url("/v1/chat/completions")).body(body);
        request.header("content-type", "application/json").send().await.unwrap()
    }

    /// Status and JSON of an answer in one piece.
    pub(crate) async fn post(&self, body: Value) -> (u16, Value) {
        let response = self.send(body.to_string()).await;
        (response.status().as_u16(), response.json().await.unwrap())
    }

    /// All lines of a streamed answer but the ids.
    pub(crate) async fn stream(&self, mut body: Value) -> Vec<String> {
        body["stream"] = json!(true);
        let response = self.send(body.to_string()).await;
        assert_eq!(response.status(), 200);
        let text = response.text().await.unwrap();
        let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with("id: "));
        lines.map(str::to_owned).collect()
    }

    /// A request with headers.
    pub(crate) async fn call(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &Value,
    ) -> reqwest::Response {
        let request = self.http.request(method.parse().unwrap(), self.url(path));
        let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
        let request = if body.is_null() { request } else { request.json(body) };
        request.send().await.unwrap()
    }

    /// A chat completion with headers.
    pub(crate) async fn chat(&self, headers: &[(&str, &str)], body: &Value) -> reqwest::Response {
        self.call("POST", "/v1/chat/completions", headers, body).await
    }

    /// A stream by its name.
    pub(crate) async fn get_stream(&self, id: &str, headers: &[(&str, &str)]) -> reqwest::Response {
        self.call("GET", &format!("/v1/streams/{id}"), headers, &Value::Null).await
    }

    /// One line of the metrics.
    pub(crate) fn metric(&self, name: &str) -> f64 {
        let text = self.state.metrics.encode().unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok());
        line.unwrap_or_else(|| panic!("no {name} in {text}"))
    }

    /// A streaming request on a bare socket, answered by nobody yet.
    pub(crate) async fn open(&self, body: &Value) -> TcpStream {
        let body = body.to_string();
        let mut socket = TcpStream::connect(self.address).await.unwrap();
        let length = body.len();
        let head =
            format!("POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n\r\n");
        socket.write_all((head + &body).as_bytes()).await.unwrap();
        socket
    }

    /// Waits until a metric has a value.
    pub(crate) async fn until(&self, metric: &str, value: u64) {
        let line = format!("{metric} {value}");
        for _ in 0..12_000 {
            if self.state.metrics.encode().unwrap().lines().any(|l| l == line) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let text = self.state.metrics.encode().unwrap();
        let found: Vec<&str> = text.lines().filter(|l| l.starts_with(metric)).collect();
        panic!("{metric} is not {value} after a minute: {found:?}");
    }

    /// Waits for the server's end.
    pub(crate) async fn ended(self) -> Result<(), ServeError> {
        tokio::time::timeout(Duration::from_secs(20), self.task).await.expect("the server ends").unwrap()
    }
}

/// Everything that comes until the other side closes.
pub(crate) async fn read_all(mut socket: TcpStream) -> String {
    let mut bytes = Vec::new();
    // A reset ends the reading as well; what came before counts.
    let _ = socket.read_to_end(&mut bytes).await;
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A greedy request for what `command` plays.
pub(crate) fn request(command: &str) -> Value {
    json!({"model": "test-model", "temperature": 0, "messages": [{"role": "user", "content": command}]})
}

/// The same, streamed.
pub(crate) fn streaming(command: &str) -> Value {
    let mut body = request(command);
    body["stream"] = json!(true);
    body
}

/// Keys named `a` and `b`.
pub(crate) fn two_keys() -> ApiKeys {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let path = std::env::temp_dir().join(format!("glmserve-two-keys-{}-{number}", std::process::id()));
    std::fs::write(&path, "a\nb\n").unwrap();
    let keys = ApiKeys::load(&path).unwrap();
    std::fs::remove_file(path).unwrap();
    keys
}

/// Runs a test where `spawn_local` works, as the HTTP server's future is not `Send`.
pub(crate) fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, test);
}

const USER: u32 = FIRST_SPECIAL + 6;
const ASSISTANT: u32 = FIRST_SPECIAL + 7;
const END: u32 = 2;
const SPACE: u32 = 259;
/// What a runner says that was told to break.
const BROKEN: &str = "broken as scripted";

fn byte(byte: u8) -> u32 {
    u32::from(byte) + 3
}

/// The next token after `history`: what the last user message asks for.
fn play(history: &[u32]) -> Result<u32, RunError> {
    // A base model's warm-up has no turns, and a long one is cut anywhere.
    let Some(user) = history.iter().rposition(|id| *id == USER) else { return Ok(END) };
    // The first one after it: draft tokens, which may repeat the prompt, can have another.
    let Some(length) = history[user..].iter().position(|id| *id == ASSISTANT) else { return Ok(END) };
    let assistant = user + length;
    // After the role and the empty line: a space that stands for the start, then the text.
    let content: Vec<u8> = history[user + 4..assistant]
        .iter()
        .map(|id| if *id == SPACE { b' ' } else { (*id - 3) as u8 })
        .collect();
    let content = String::from_utf8(content).unwrap();
    let (command, argument) = content.split_once(' ').unwrap_or((&content, ""));
    let generated = history.len() - assistant - 1;
    let mut reply = vec![SPACE, byte(b'\n'), SPACE];
    match command {
        "say" => reply.extend(argument.bytes().map(byte)),
        "bytes" => reply.extend(argument.split(' ').map(|hex| byte(u8::from_str_radix(hex, 16).unwrap()))),
        "slow" => {
            std::thread::sleep(Duration::from_millis(2));
            reply.extend((0..argument.parse().unwrap()).map(|i: u32| byte(b'a' + (i % 26) as u8)));
        }
        "pause" | "stall" => {
            if generated == if command == "pause" { 0 } else { 5 } {
                std::thread::sleep(Duration::from_millis(argument.parse().unwrap()));
            }
            reply.extend(b"paused".map(byte));
        }
        "hush" => {
            let (silence, text) = argument.split_once(' ').unwrap_or((argument, ""));
            reply.extend(text.bytes().map(byte));
            if generated == 0 || generated == reply.len() / 2 {
                std::thread::sleep(Duration::from_millis(silence.parse().unwrap()));
            }
        }
        "late" => {
            std::thread::sleep(Duration::from_millis(argument.parse().unwrap()));
            return Err(RunError::new("as scripted"));
        }
        "flood" => {
            reply.extend((0..argument.parse().unwrap()).map(|i: u32| byte(b'a' + (i % 26) as u8)));
        }
        "break" => return Err(RunError::new(BROKEN)),
        "lose" => return Err(RunError::permanent("the device is gone, as scripted")),
        "panic" => panic!("as scripted"),
        "refuse" => return Err(RunError::new("as scripted")),
        "fail" if generated == 5 => return Err(RunError::new("as scripted")),
        "fail" => reply.extend([byte(b'x'); 9]),
        "nothing" => reply.clear(),
        _ => {}
    }
    Ok(reply.get(generated).copied().unwrap_or(END))
}
