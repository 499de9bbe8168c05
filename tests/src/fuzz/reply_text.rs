//! Owns the fuzzing of the way from token ids to text: detokenizer, reply prefix and stop strings.
//!
//! Claims: what is sent is the decoded text up to the first stop string, whatever tokens it came in; and
//! nothing that was sent is part of a stop string.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock};

use glm_engine::model::manifest::PieceKind;
use glmserve::text::detokenizer::Detokenizer;
use glmserve::text::reply::ReplyText;
use glmserve::text::stop::StopMatcher;
use glmserve::text::vocabulary::Vocabulary;

const MAX_STOPS: usize = 4;
const FIRST_BYTE: u32 = 3;

/// A sentencepiece vocabulary of single bytes and a few pieces.
static VOCABULARY: LazyLock<Arc<Vocabulary>> = LazyLock::new(|| {
    let mut pieces: HashMap<String, u32> =
        [("<unk>", 0), ("<s>", 1), ("</s>", 2)].map(|(piece, id)| (piece.to_owned(), id)).into();
    pieces.extend((0..256).map(|byte| (format!("<0x{byte:02X}>"), byte + FIRST_BYTE)));
    pieces
        .extend(["▁", "▁你", "好", "ab", "▁stop", "🌍"].iter().zip(259..).map(|(p, id)| (p.to_string(), id)));
    Arc::new(Vocabulary::new(&pieces, PieceKind::Sentencepiece, &[]))
});

/// Lines of stop strings, an empty line, and the bytes of the reply: those above 0xf7 are pieces.
pub(super) fn run(input: &[u8]) {
    let end = input.windows(2).position(|pair| pair == b"\n\n");
    let (stops, reply) = end.map_or((&[][..], input), |end| (&input[..end], &input[end + 2..]));
    let stops: Vec<String> = stops
        .split(|byte| *byte == b'\n')
        .filter_map(|stop| String::from_utf8(stop.to_vec()).ok())
        .filter(|stop| !stop.is_empty())
        .take(MAX_STOPS)
        .collect();
    let ids: Vec<u32> = reply.iter().map(|byte| id(*byte)).collect();
    let (whole, _) = text(&ids, Vec::new());
    let (sent, stopped) = text(&ids, stops.clone());
    let first = stops.iter().filter_map(|stop| whole.find(stop).map(|at| (at + stop.len(), at))).min();
    match first {
        Some((_, at)) => assert_eq!((sent.as_str(), stopped), (&whole[..at], true), "stops {stops:?}"),
        None => assert_eq!((sent, stopped), (whole, false), "stops {stops:?}"),
    }
}

fn id(byte: u8) -> u32 {
    match byte {
        0xf8.. => 259 + u32::from(byte - 0xf8),
        _ => u32::from(byte) + FIRST_BYTE,
    }
}

fn text(ids: &[u32], stops: Vec<String>) -> (String, bool) {
    let mut reply =
        ReplyText::new(Detokenizer::new(Arc::clone(&VOCABULARY)), "\n ", StopMatcher::new(stops), 0);
    let mut text = String::new();
    for &id in ids {
        let step = reply.push(id);
        text += &step.text;
        if step.stopped {
            return (text, true);
        }
    }
    let step = reply.finish();
    (text + &step.text, step.stopped)
}
