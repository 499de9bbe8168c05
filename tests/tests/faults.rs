//! Thousands of streams through a proxy that cuts, resets, stalls and delays at random bytes.
//!
//! Claims: no stream is reported whole whose hash was not right; every stream ends whole in bounded time, with
//! exactly the text that the engine was told to say. `GLMSERVE_FAULTS_SEED` repeats a run and
//! `GLMSERVE_FAULTS_STREAMS` makes it longer.

#[path = "../../server/tests/it/support/mod.rs"]
mod support;

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use glm_simulator::rng::Rng;
use glmserve::stream::memory_store::StoreLimits;
use glmserve_client::{
    ChatRequest, Client, ClientConfig, ClientError, Message, RetryPolicy, StreamEvent, Verified,
};
use glmserve_tests::fault_proxy::FaultProxy;
use tokio::task::JoinSet;

use self::support::{Options, Server};

const NUM_STREAMS: u64 = 2_000;
const CONCURRENCY: usize = 24;
/// How long all of them may take.
const TIME_LIMIT: Duration = Duration::from_secs(120);
/// A stall is noticed after this long; the fake engine answers much sooner.
const IDLE_TIMEOUT: Duration = Duration::from_millis(400);

/// What the engine is told to say: up to 96 bytes, some of them parts of a character. It begins and ends with a
/// letter, as a chat format may take white space away.
fn text(rng: &mut Rng) -> String {
    const ALPHABET: [char; 8] = ['a', 'z', ' ', '\n', '你', '好', 'é', '🙂'];
    let length = if rng.one_in(8) { rng.range(0..=3) } else { rng.range(4..=24) };
    let inner: String = (0..length).map(|_| ALPHABET[rng.range(0..=7)]).collect();
    format!("b{inner}e")
}

/// One stream to its end: its text, and how often it was resumed.
async fn read(client: &Client, text: &str) -> Result<(String, u32), ClientError> {
    let request = ChatRequest {
        model: "test-model".into(),
        messages: vec![Message::new("user", format!("say {text}"))],
        temperature: Some(0.0),
        ..ChatRequest::default()
    };
    let policy = RetryPolicy {
        max_tries: 40,
        base_backoff: Duration::from_millis(5),
        max_backoff: Duration::from_millis(100),
        ..RetryPolicy::default()
    };
    let mut stream = client.chat_resuming(&request, policy).await?;
    let mut received = String::new();
    while let Some(event) = stream.next().await {
        match event? {
            StreamEvent::Delta(delta) => received += &delta,
            StreamEvent::Error(error) => panic!("{text:?}: the server told an error: {error}"),
            _ => {}
        }
    }
    assert_eq!(stream.verified(), Some(Verified::Yes), "{text:?} was reported whole without its hash");
    Ok((received, stream.num_resumes()))
}

fn variable(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |value| value.parse().expect("a number"))
}

#[test]
fn no_stream_loses_or_doubles_a_token() {
    let seed = variable("GLMSERVE_FAULTS_SEED", 20_261_122);
    let num_streams = variable("GLMSERVE_FAULTS_STREAMS", NUM_STREAMS);
    support::run(async move {
        // Room for all of them: a stream whose client is slow to come back must not be forgotten meanwhile.
        let store_limits =
            StoreLimits { retention: TIME_LIMIT, max_bytes: 64 << 20, max_detached: CONCURRENCY };
        let options = Options { max_num_seqs: 16, store_limits, ..Options::default() };
        let server = Server::start(options).await;
        let proxy = FaultProxy::start(server.address, seed).await.expect("a port");
        let mut config = ClientConfig::new(format!("http://{}", proxy.address));
        config.idle_timeout = IDLE_TIMEOUT;
        let client = Client::new(config).expect("a client");
        let mut rng = Rng::new(seed);
        let texts: VecDeque<String> = (0..num_streams).map(|_| text(&mut rng)).collect();
        let texts = Arc::new(Mutex::new(texts));
        let mut readers = JoinSet::new();
        for _ in 0..CONCURRENCY {
            let (client, texts) = (client.clone(), Arc::clone(&texts));
            readers.spawn(async move {
                let (mut num_whole, mut num_resumes) = (0, 0);
                loop {
                    let next = texts.lock().expect("no panic").pop_front();
                    let Some(text) = next else { return (num_whole, num_resumes) };
                    match read(&client, &text).await {
                        Ok((received, resumes)) => {
                            assert_eq!(received, text, "seed {seed}");
                            num_whole += 1;
                            num_resumes += u64::from(resumes);
                        }
                        Err(error) => panic!("seed {seed}: {text:?}: {error}"),
                    }
                }
            });
        }
        let ended = tokio::time::timeout(TIME_LIMIT, readers.join_all()).await.expect("bounded time");
        let (num_whole, num_resumes) =
            ended.iter().fold((0, 0), |sum, reader| (sum.0 + reader.0, sum.1 + reader.1));
        let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        let counts = &proxy.counts;
        println!(
            "seed {seed}: {num_whole} streams whole and verified, {num_resumes} resumes; {} connections, \
             {} closed, {} reset, {} stalled",
            count(&counts.connections),
            count(&counts.fins),
            count(&counts.resets),
            count(&counts.stalls),
        );
        assert_eq!(num_whole, num_streams);
        assert!(num_resumes > num_streams / 4, "the proxy broke too little to prove anything");
    });
}
