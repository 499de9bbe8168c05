//! Owns the proof that the server knows its machine once it is warmed up: what it expects of a first token is what
//! comes, and nobody is refused for a deadline before it knows.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use glm_engine::{EngineConfig, EngineHandle, EngineThread, NoObserver, Request};
use glm_simulator::machine::{Speed, TimedMachine, VOCAB_SIZE};
use glm_simulator::overload::{WARM_UP, request, wait_idle};

/// By which factor an estimate may be off.
const TOLERANCE: f64 = 1.5;
const H100: Speed = Speed { step: 6e-3, prefill: 2.5e-5, decode: 3e-5, pair: 3e-10 };
const SLOW: Speed = Speed { step: 0.15, prefill: 0.04, decode: 0.06, pair: 1e-6 };
const MACHINES: [(&str, Speed, f64); 3] =
    [("like an H100", H100, 1.0), ("with a cold first step", H100, 50.0), ("a slow CPU", SLOW, 1.0)];

struct Server {
    handle: EngineHandle,
    thread: EngineThread,
    now: Arc<std::sync::atomic::AtomicU64>,
}

impl Server {
    fn start(speed: Speed, first_step: f64) -> Self {
        let (machine, clock) = TimedMachine::new(8_192, 16, speed, first_step);
        let now = machine.now();
        let config = EngineConfig { max_model_len: 8_192, ..EngineConfig::default() };
        let spawned = EngineThread::spawn_by(clock, machine, config, VOCAB_SIZE, Arc::new(NoObserver));
        let (handle, thread) = spawned.unwrap();
        Self { handle, thread, now }
    }

    /// As the server does it before it is ready.
    fn warm_up(&self) {
        for (num_prompt_tokens, max_tokens) in WARM_UP {
            let _events = self.handle.submit_probe(request(num_prompt_tokens, max_tokens, 0)).unwrap();
            wait_idle(&self.handle);
        }
    }

    /// Seconds that a request takes.
    fn seconds(&self, request: Request) -> f64 {
        let begin = self.now.load(Ordering::SeqCst);
        let _events = self.handle.submit(request).unwrap();
        wait_idle(&self.handle);
        (self.now.load(Ordering::SeqCst) - begin) as f64 / 1e9
    }

    fn stop(self) {
        drop(self.handle);
        self.thread.join();
    }
}

#[test]
fn after_the_warm_up_an_estimate_is_near_the_truth() {
    for (name, speed, first_step) in MACHINES {
        for num_tokens in [16, 100, 500, 2_000, 6_000] {
            let server = Server::start(speed, first_step);
            server.warm_up();
            let estimate = server.handle.estimate(num_tokens).expect("it was warmed up").as_secs_f64();
            let truth = server.seconds(request(num_tokens, 1, num_tokens));
            println!("{name}, {num_tokens} tokens: {estimate:.3} s expected, {truth:.3} s taken");
            let factor = (estimate / truth).max(truth / estimate);
            assert!(factor <= TOLERANCE, "{name}, {num_tokens} tokens: off by {factor:.2}");
            server.stop();
        }
    }
}

#[test]
fn nobody_is_refused_for_a_deadline_that_can_be_met() {
    for (name, speed, first_step) in MACHINES {
        let server = Server::start(speed, first_step);
        assert_eq!(server.handle.estimate(500), None, "{name}: nothing is known yet");
        let hopeless = Request { deadline: Some(Duration::from_nanos(1)), ..request(500, 1, 1) };
        drop(server.handle.submit(hopeless).expect("it is not known that it is hopeless"));
        wait_idle(&server.handle);
        server.stop();
        let truth = {
            let server = Server::start(speed, first_step);
            server.warm_up();
            let truth = server.seconds(request(500, 1, 1));
            server.stop();
            truth
        };
        let server = Server::start(speed, first_step);
        server.warm_up();
        let deadline = Some(Duration::from_secs_f64(truth * TOLERANCE));
        server.seconds(Request { deadline, ..request(500, 1, 1) });
        server.stop();
    }
}
