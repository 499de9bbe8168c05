//! Owns the model folders that tests load: a manifest and a tokenizer of single bytes.

#![allow(dead_code, reason = "each test program uses a part")]

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use glm_engine::Manifest;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// The first special id of the folders of [`chatglm3`]; the ids below it are bytes and a few pieces.
pub(crate) const FIRST_SPECIAL: u32 = 300;

const CHATGLM3_SPECIALS: [&str; 9] = [
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "sop",
    "eop",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
];

const GLM4_SPECIALS: [&str; 10] = [
    "<|endoftext|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
];

/// Ids of ChatGLM3's special tokens in [`chatglm3`].
pub(crate) fn ids(tokens: &[&str]) -> Vec<u32> {
    let position = |token: &&str| CHATGLM3_SPECIALS.iter().position(|t| t == token).unwrap();
    tokens.iter().map(|token| FIRST_SPECIAL + position(token) as u32).collect()
}

/// Ids of `<|im_start|>` and `<|im_end|>` in [`chatml`].
pub(crate) fn chatml_ids() -> [u32; 2] {
    [FIRST_SPECIAL, FIRST_SPECIAL + 1]
}

/// A folder that is deleted when dropped.
pub(crate) struct ModelDir(PathBuf);

impl ModelDir {
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    pub(crate) fn manifest(&self) -> Manifest {
        Manifest::load(&self.0).unwrap()
    }
}

impl Drop for ModelDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A folder of each format that chats.
pub(crate) fn all_chats() -> [ModelDir; 5] {
    [chatglm2(), chatglm3(), glm4(), glm_edge(), chatml()]
}

/// A folder in ChatGLM3's format: id = byte + 3.
pub(crate) fn chatglm3() -> ModelDir {
    write(sentencepiece_bytes().as_bytes(), chatglm3_chat(FIRST_SPECIAL), 512)
}

/// As [`chatglm3`] in ChatGLM2's format.
pub(crate) fn chatglm2() -> ModelDir {
    let chat = chat("chatglm2", &CHATGLM3_SPECIALS[..5]);
    write(sentencepiece_bytes().as_bytes(), (chat, "sentencepiece", json!([2])), 512)
}

/// A base model with ChatGLM3's tokens.
pub(crate) fn base() -> ModelDir {
    let chat = chat("none", &CHATGLM3_SPECIALS);
    write(sentencepiece_bytes().as_bytes(), (chat, "sentencepiece", json!([2])), 512)
}

/// A folder in GLM-4's format with GPT-2's byte alphabet.
pub(crate) fn glm4() -> ModelDir {
    write(byte_level().as_bytes(), (chat("glm4", &GLM4_SPECIALS), "byte_level", json!([300, 307])), 512)
}

/// As [`glm4`] in GLM-Edge's format.
pub(crate) fn glm_edge() -> ModelDir {
    write(byte_level().as_bytes(), (chat("glm-edge", &GLM4_SPECIALS), "byte_level", json!([300, 307])), 512)
}

fn chat(format: &str, specials: &[&str]) -> Value {
    let ids: serde_json::Map<String, Value> =
        specials.iter().zip(FIRST_SPECIAL..).map(|(token, id)| (token.to_string(), json!(id))).collect();
    json!({"format": format, "default_system": null, "special_tokens": ids})
}

fn sentencepiece_bytes() -> String {
    let mut vocab = serde_json::Map::from_iter([
        ("<unk>".into(), json!(0)),
        ("<s>".into(), json!(1)),
        ("</s>".into(), json!(2)),
    ]);
    vocab.extend((0..256).map(|b| (format!("<0x{b:02X}>"), json!(b + 3))));
    vocab.insert("▁".into(), json!(259));
    let tokenizer = json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null, "post_processor": null, "decoder": null,
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocab, "merges": []}});
    tokenizer.to_string()
}

/// A folder with the tokenizer file at `path` and ChatGLM3's real ids.
pub(crate) fn chatglm3_with(path: &Path) -> ModelDir {
    write(&std::fs::read(path).unwrap(), chatglm3_chat(64789), 65024)
}

/// As [`chatglm3_with`] in ChatGLM2's format.
pub(crate) fn chatglm2_with(path: &Path) -> ModelDir {
    let chat = json!({"format": "chatglm2", "default_system": null,
        "special_tokens": {"[gMASK]": 64790, "sop": 64792}});
    write(&std::fs::read(path).unwrap(), (chat, "sentencepiece", json!([2])), 65024)
}

/// A folder in ChatML with GPT-2's byte alphabet.
pub(crate) fn chatml() -> ModelDir {
    let [start, end] = chatml_ids();
    let chat = json!({"format": "chatml", "default_system": "Be kind.",
        "special_tokens": {"<|im_start|>": start, "<|im_end|>": end}});
    write(byte_level().as_bytes(), (chat, "byte_level", json!([end])), 512)
}

fn byte_level() -> String {
    let mut alphabet: Vec<char> =
        tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    let vocab: serde_json::Map<String, Value> =
        alphabet.into_iter().enumerate().map(|(id, c)| (c.to_string(), json!(id))).collect();
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let tokenizer = json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": null, "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": []}});
    tokenizer.to_string()
}

fn chatglm3_chat(first: u32) -> (Value, &'static str, Value) {
    let special: serde_json::Map<String, Value> =
        CHATGLM3_SPECIALS.iter().zip(first..).map(|(token, id)| (token.to_string(), json!(id))).collect();
    let chat = json!({"format": "chatglm3", "default_system": null, "special_tokens": special});
    (chat, "sentencepiece", json!([2, first + 6, first + 8]))
}

fn write(tokenizer: &[u8], (chat, pieces, stops): (Value, &str, Value), vocab_size: usize) -> ModelDir {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let dir = std::env::temp_dir().join(format!("glmserve-test-{}-{number}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("tokenizer.json"), tokenizer).unwrap();
    std::fs::write(dir.join("model.onnx"), "").unwrap();
    let contents: [(&str, &[u8]); 2] = [("model.onnx", b""), ("tokenizer.json", tokenizer)];
    let hashes = contents.map(|(name, content)| (name, content.len(), sha256(content)));
    let listing: String = hashes.iter().map(|(name, _, hash)| format!("{name} {hash}\n")).collect();
    let files: serde_json::Map<String, Value> = hashes
        .iter()
        .map(|(name, len, hash)| (name.to_string(), json!({"bytes": len, "sha256": hash})))
        .collect();
    let manifest = json!({
        "schema_version": 1, "generator": "test",
        "model": {"name": "test-model", "architecture": "chatglm3", "license": null, "origin": null},
        "geometry": {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "num_kv_heads": 1, "head_dim": 4,
            "rotary_dim": 2, "padded_vocab_size": vocab_size, "vocab_size": vocab_size, "max_model_len": 256},
        "graph": {"file": "model.onnx", "precision": "fp32", "provider": "cpu", "activation_dtype": "float32",
            "kv_cache_dtype": "float32", "block_size": 16, "output": "logits", "names": {
                "token_ids": "a", "cumulative_sequence_length": "b", "past_seqlens": "c", "block_table": "d",
                "slot_mapping": "e", "attention_metadata": "f", "logits_indices": "g",
                "key_cache": "k{layer}", "value_cache": "v{layer}", "logits": "l"}},
        "tokenizer": {"file": "tokenizer.json", "pieces": pieces},
        "chat": chat, "stop_token_ids": stops,
        "generation": {"temperature": 0.8, "top_p": 0.8},
        "files": files, "digest": format!("sha256:{}", sha256(listing.as_bytes()))});
    std::fs::write(dir.join("manifest.json"), manifest.to_string()).unwrap();
    ModelDir(dir)
}

fn sha256(content: &[u8]) -> String {
    Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect()
}
