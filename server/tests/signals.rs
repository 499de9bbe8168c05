//! Which signals of the process end the server. A test program of its own, as signals are the process's.

use std::process::Command;
use std::time::Duration;

fn send(signal: &str) {
    let pid = std::process::id().to_string();
    assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
}

#[test]
fn sigterm_and_sigint_end_the_server_and_sighup_does_not() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut signals = glmserve::shutdown::signals().unwrap();
        // Twice: after the first one nobody may be listening any more.
        for _ in 0..2 {
            send("-HUP");
            let heard = tokio::time::timeout(Duration::from_millis(200), signals.recv()).await;
            assert!(heard.is_err(), "SIGHUP has no effect");
        }
        for signal in ["-TERM", "-INT"] {
            send(signal);
            let heard = tokio::time::timeout(Duration::from_secs(60), signals.recv()).await;
            assert_eq!(heard.expect("it is heard"), Some(()), "{signal}");
        }
    });
}
