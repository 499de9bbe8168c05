//! Owns the proof that CPU sessions may be made at the same time. It is a process of its own: only the
//! first sessions of a process can stand in each other's way.

mod graph;

use std::sync::Barrier;
use std::thread;

use graph::{Graph, PLAIN, Type};

#[test]
fn the_first_sessions_of_a_process_may_be_made_at_once() {
    const SESSIONS: usize = 16;
    let start = Barrier::new(SESSIONS);
    thread::scope(|scope| {
        for _ in 0..SESSIONS {
            scope.spawn(|| {
                let mut graph = Graph::default();
                graph.input("x", Type::Float32, 2).output("y", 2);
                graph.node((PLAIN, "Neg"), &["x"], &["y"], &[]);
                start.wait();
                graph.session(1).unwrap();
            });
        }
    });
}
