//! How bodies may be packed and written, and what is refused before it takes memory.

use std::io::Write;

use crate::support::{Options, Server, request, run};
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::Value;

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 3).unwrap()
}

fn utf16(text: &str) -> Vec<u8> {
    text.encode_utf16().flat_map(u16::to_le_bytes).collect()
}

/// Status, error code and `Accept-Encoding` of the answer to `body`.
async fn post(server: &Server, encodings: &[&str], body: Vec<u8>) -> (u16, String, String) {
    let http = reqwest::Client::new();
    let url = format!("http://{}/v1/chat/completions", server.address);
    let request = http.post(url).body(body).header("content-type", "application/json");
    let request = encodings.iter().fold(request, |request, name| request.header("content-encoding", *name));
    let response = request.send().await.unwrap();
    let status = response.status().as_u16();
    let accepted = response.headers().get("accept-encoding").map_or("", |value| value.to_str().unwrap());
    let accepted = accepted.to_owned();
    let body: Value = response.json().await.unwrap();
    if status == 200 {
        assert_eq!(body["choices"][0]["message"]["content"], "hi");
    }
    (status, body["error"]["code"].as_str().unwrap_or_default().to_owned(), accepted)
}

#[test]
fn packed_and_marked_bodies_are_read() {
    run(async {
        let server = Server::start(Options::default()).await;
        let plain = request("say hi").to_string().into_bytes();
        let marked = [b"\xEF\xBB\xBF", plain.as_slice()].concat();
        let (first, second) = plain.split_at(20);
        let long = [plain.as_slice(), &b" ".repeat(500_000)].concat();
        for (encodings, body) in [
            (&[][..], marked.clone()),
            (&["identity"], plain.clone()),
            (&["Identity"], plain.clone()),
            (&[""], plain.clone()),
            (&["identity, GZIP"], gzip(&plain)),
            (&["x-gzip", "identity"], gzip(&plain)),
            (&["gzip"], gzip(&marked)),
            (&["gzip"], [gzip(first), gzip(second)].concat()),
            (&["gzip"], gzip(&long)),
            (&["zstd"], zstd(&plain)),
            (&["zstd"], [zstd(first), zstd(second)].concat()),
            (&["zstd"], zstd(&long)),
        ] {
            let answer = post(&server, encodings, body).await;
            assert_eq!(answer, (200, String::new(), String::new()), "{encodings:?}");
        }
    });
}

#[test]
fn what_cannot_be_unpacked_is_named_and_what_can_be_said() {
    run(async {
        let server = Server::start(Options::default()).await;
        let plain = request("say hi").to_string();
        let (packed, frame) = (gzip(plain.as_bytes()), zstd(plain.as_bytes()));
        for encodings in
            [&["br"][..], &["deflate"], &["gzip, gzip"], &["gzip", "zstd"], &["gzip;q=1"], &["gzip zstd"]]
        {
            let answer = post(&server, encodings, packed.clone()).await;
            assert_eq!(answer, (415, "unsupported_encoding".into(), "gzip, zstd".into()), "{encodings:?}");
        }
        // A window of 2 GiB is announced by 6 bytes.
        let huge_window = b"\x28\xB5\x2F\xFD\x00\xA8\x01\x00\x00".to_vec();
        let mut wrong_sum = packed.clone();
        let sum = wrong_sum.len() - 8;
        wrong_sum[sum] ^= 1;
        for (encoding, body, code) in [
            ("gzip", plain.clone().into_bytes(), "invalid_body"),
            ("gzip", packed[..packed.len() - 9].to_vec(), "invalid_body"),
            ("gzip", wrong_sum, "invalid_body"),
            ("gzip", [packed.as_slice(), b"more"].concat(), "invalid_body"),
            ("gzip", Vec::new(), "invalid_json"),
            ("zstd", plain.clone().into_bytes(), "invalid_body"),
            ("zstd", frame[..frame.len() - 1].to_vec(), "invalid_body"),
            ("zstd", [frame.as_slice(), b"more"].concat(), "invalid_body"),
            ("zstd", huge_window, "invalid_body"),
            ("identity", utf16(&plain), "invalid_json"),
            ("identity", [b"\xFF\xFE".to_vec(), utf16(&plain)].concat(), "invalid_json"),
            ("identity", [b"\x00{".to_vec(), b"\x00}".to_vec()].concat(), "invalid_json"),
        ] {
            let start = body[..body.len().min(12)].to_vec();
            let answer = post(&server, &[encoding], body).await;
            assert_eq!(answer, (400, code.into(), String::new()), "{encoding} {start:?}");
        }
    });
}

#[test]
fn a_small_body_that_unpacks_to_a_large_one_is_refused_on_the_way() {
    const LARGE_BYTES: usize = 1 << 26;
    run(async {
        let server = Server::start(Options::default()).await;
        let large = vec![b' '; LARGE_BYTES];
        for (encoding, body) in [("gzip", gzip(&large)), ("zstd", zstd(&large))] {
            assert!(body.len() < LARGE_BYTES / 500, "{encoding}: {}", body.len());
            // More of them than fit, if one that was refused kept anything.
            for _ in 0..8 {
                let answer = post(&server, &[encoding], body.clone()).await;
                assert_eq!(answer, (413, "body_too_large".into(), String::new()));
            }
        }
        let nearly = [request("say hi").to_string().into_bytes(), vec![b' '; 1_000_000]].concat();
        assert_eq!(post(&server, &["gzip"], gzip(&nearly)).await.0, 200);
    });
}
