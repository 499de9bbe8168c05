//! What clients that read slowly get of a server that goes away.

use std::net::SocketAddr;
use std::time::Duration;

use crate::support::{Options, Server, read_all, run, streaming};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

/// More events than all buffers on the way to a client hold, of about 250 bytes each.
const NUM_TOKENS: usize = 6000;

fn options(drain_timeout: Duration) -> Options {
    Options {
        drain_timeout,
        max_model_len: NUM_TOKENS + 100,
        write_timeout: Duration::from_secs(60),
        ..Options::default()
    }
}

/// A client whose receive buffer is small asks for a long reply; returns once the reply has been generated.
async fn slow_reader(server: &Server) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let address: SocketAddr = server.address;
    let mut connection = socket.connect(address).await.unwrap();
    let body = streaming(&format!("flood {NUM_TOKENS}")).to_string();
    let length = body.len();
    let head = format!("POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n\r\n");
    connection.write_all((head + &body).as_bytes()).await.unwrap();
    server.until("glmserve_streams_total{outcome=\"stop\"}", 1).await;
    assert_eq!(server.state.readers.len(), 1, "it is still being sent");
    connection
}

#[test]
fn a_drain_waits_for_a_client_that_reads_slowly() {
    run(async {
        let server = Server::start(options(Duration::from_secs(60))).await;
        let mut connection = slow_reader(&server).await;
        server.signals.send(()).await.unwrap();
        // Longer than anything else that the server's end waits for.
        let mut text = vec![0; 1000];
        connection.read_exact(&mut text).await.unwrap();
        tokio::time::sleep(Duration::from_secs(7)).await;
        let rest = read_all(connection).await;
        assert!(rest.contains("\"finish_reason\":\"stop\""), "{}", &rest[rest.len().saturating_sub(500)..]);
        assert!(rest.contains("data: [DONE]"), "{}", &rest[rest.len().saturating_sub(500)..]);
        server.ended().await.unwrap();
    });
}

#[test]
fn a_client_that_still_reads_when_the_drain_time_is_over_is_told() {
    run(async {
        let server = Server::start(options(Duration::from_millis(50))).await;
        let connection = slow_reader(&server).await;
        server.signals.send(()).await.unwrap();
        tokio::time::sleep(Duration::from_millis(500)).await;
        let text = read_all(connection).await;
        let end = &text[text.len().saturating_sub(500)..];
        assert!(end.contains("\"code\":\"shutting_down\"") && end.contains("data: [DONE]"), "{end}");
        assert!(!end.contains("finish_reason\":\"stop"), "{end}");
        server.ended().await.unwrap();
    });
}

#[test]
fn a_client_that_takes_nothing_is_not_waited_for_beyond_the_drain_time() {
    run(async {
        let server = Server::start(options(Duration::from_millis(50))).await;
        let _connection = slow_reader(&server).await;
        server.signals.send(()).await.unwrap();
        server.ended().await.unwrap();
    });
}
