//! Real clients across silences: the official Python client, and the reading loops of widespread tools.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::support::{Options, Server, run};

#[test]
fn clients_in_python_read_through_heartbeats() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let python = root.join("../.venv/bin/python");
    if !python.exists() {
        eprintln!("SKIPPED: no .venv with the clients; `make test` sets it up");
        return;
    }
    run(async {
        let millis = Duration::from_millis;
        let options = Options { comment_period: millis(40), status_hold: millis(10), ..Options::default() };
        let server = Server::start(options).await;
        let url = format!("http://{}", server.address);
        let script = root.join("tests/python/clients.py");
        let clients = tokio::task::spawn_blocking(move || {
            Command::new(python).arg(script).arg(url).output().expect("python starts")
        });
        let output = clients.await.unwrap();
        let (words, errors) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{words}{errors}");
        assert_eq!(server.metric("glmserve_streams_total{outcome=\"stop\"}"), 8.0, "each asked once");
    });
}
