//! Owns the table from token id to the bytes it stands for.
//!
//! Invariant: special ids and ids without a piece stand for no bytes.

use std::collections::HashMap;

use glm_engine::model::manifest::PieceKind;

/// Pieces of a sentencepiece model that mark something and spell nothing.
const CONTROL_PIECES: [&str; 3] = ["<unk>", "<s>", "</s>"];

/// The bytes of every token.
#[derive(Debug)]
pub struct Vocabulary {
    pieces: Vec<Piece>,
    max_piece_len: usize,
}

/// What one token stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// Nothing that can be printed: a special token or padding.
    Special,
    /// A part of the text.
    Text {
        /// Its bytes; not always whole characters.
        bytes: Box<[u8]>,
        /// Whether it begins with a space that sentencepiece put there as a mark of a word's start.
        word_start: bool,
    },
}

impl Vocabulary {
    /// Builds the table from a tokenizer's pieces; `special_ids` win over what the pieces spell.
    pub fn new(vocab: &HashMap<String, u32>, kind: PieceKind, special_ids: &[u32]) -> Self {
        let byte_of = match kind {
            PieceKind::ByteLevel => byte_level_alphabet(),
            PieceKind::Sentencepiece => HashMap::new(),
        };
        let len = vocab.values().max().map_or(0, |id| *id as usize + 1);
        let mut pieces = vec![Piece::Special; len];
        for (piece, id) in vocab {
            if special_ids.contains(id) {
                continue;
            }
            pieces[*id as usize] = match kind {
                PieceKind::Sentencepiece => sentencepiece_piece(piece),
                PieceKind::ByteLevel => byte_level_piece(piece, &byte_of),
            };
        }
        let max_piece_len = pieces.iter().map(Piece::len).max().unwrap_or(0).max(1);
        Self { pieces, max_piece_len }
    }

    /// What a token stands for.
    pub fn piece(&self, id: u32) -> &Piece {
        self.pieces.get(id as usize).unwrap_or(&Piece::Special)
    }

    /// One more than the largest id of a piece.
    pub fn num_ids(&self) -> usize {
        self.pieces.len()
    }

    /// Most bytes that any one token stands for, at least 1.
    pub fn max_piece_len(&self) -> usize {
        self.max_piece_len
    }
}

impl Piece {
    fn len(&self) -> usize {
        match self {
            Self::Special => 0,
            Self::Text { bytes, .. } => bytes.len(),
        }
    }
}

fn sentencepiece_piece(piece: &str) -> Piece {
    if CONTROL_PIECES.contains(&piece) {
        return Piece::Special;
    }
    let byte = piece
        .strip_prefix("<0x")
        .and_then(|rest| rest.strip_suffix('>'))
        .filter(|hex| hex.len() == 2)
        .and_then(|hex| u8::from_str_radix(hex, 16).ok());
    match byte {
        Some(byte) => Piece::Text { bytes: Box::new([byte]), word_start: false },
        None => Piece::Text {
            bytes: piece.replace('▁', " ").into_bytes().into(),
            word_start: piece.starts_with('▁'),
        },
    }
}

fn byte_level_piece(piece: &str, byte_of: &HashMap<char, u8>) -> Piece {
    let bytes: Option<Vec<u8>> = piece.chars().map(|c| byte_of.get(&c).copied()).collect();
    Piece::Text {
        // A piece outside the alphabet was added by hand and spells itself.
        bytes: bytes.unwrap_or_else(|| piece.as_bytes().to_vec()).into(),
        word_start: false,
    }
}

/// GPT-2's table: printable Latin-1 characters stand for themselves, the other bytes for U+0100 onwards.
fn byte_level_alphabet() -> HashMap<char, u8> {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let others = (0..=u8::MAX).filter(|byte| !printable(*byte));
    let mapped = ('\u{100}'..).zip(others);
    (0..=u8::MAX).filter(|byte| printable(*byte)).map(|byte| (char::from(byte), byte)).chain(mapped).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vocab(pieces: &[&str]) -> HashMap<String, u32> {
        pieces.iter().zip(0..).map(|(p, id)| (p.to_string(), id)).collect()
    }

    fn bytes(piece: &Piece) -> &[u8] {
        match piece {
            Piece::Special => b"",
            Piece::Text { bytes, .. } => bytes,
        }
    }

    #[test]
    fn sentencepiece_spells_spaces_and_bytes() {
        let v = Vocabulary::new(
            &vocab(&["<unk>", "<s>", "▁a▁", "<0x0A>", "<0xZZ>", "你", "<|user|>"]),
            PieceKind::Sentencepiece,
            &[6],
        );
        let all: Vec<&[u8]> = (0..8).map(|id| bytes(v.piece(id))).collect();
        let expected: [&[u8]; 8] = [b"", b"", b" a ", b"\n", b"<0xZZ>", "你".as_bytes(), b"", b""];
        assert_eq!(all, expected);
        assert!(matches!(v.piece(2), Piece::Text { word_start: true, .. }));
        assert_eq!(v.max_piece_len(), 6);
    }

    #[test]
    fn byte_level_spells_all_256_bytes() {
        let alphabet = byte_level_alphabet();
        assert_eq!(alphabet.len(), 256);
        assert_eq!((alphabet[&'Ġ'], alphabet[&'Ċ'], alphabet[&'a']), (b' ', b'\n', b'a'));
        assert_eq!((alphabet[&'ł'], alphabet[&'Ń'], alphabet[&'ÿ']), (0xA0, 0xAD, 0xFF));
        let v = Vocabulary::new(&vocab(&["Ġä½ł", "你"]), PieceKind::ByteLevel, &[]);
        assert_eq!(bytes(v.piece(0)), " 你".as_bytes());
        assert_eq!(bytes(v.piece(1)), "你".as_bytes());
    }
}
