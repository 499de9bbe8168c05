//! Owns `manifest.json`, the only thing besides the graph through which `export` and Rust meet.
//!
//! Invariant: a manifest that parsed and passed [`Manifest::load`] is consistent in itself, so no
//! later code checks its geometry again.

mod check;

use std::collections::BTreeMap;

use serde::Deserialize;

/// The schema version that this build reads and that `glm-export` of the same release writes.
pub const SCHEMA_VERSION: u64 = 1;

/// What `glm-export` says about a model folder.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Must equal [`SCHEMA_VERSION`].
    pub schema_version: u64,
    /// Program and version that wrote the folder.
    pub generator: String,
    /// Name, origin and licence of the weights.
    pub model: Model,
    /// Sizes of the network.
    pub geometry: Geometry,
    /// The graph and how it is fed.
    pub graph: Graph,
    /// The tokenizer file.
    pub tokenizer: Tokenizer,
    /// How messages become token ids.
    pub chat: Chat,
    /// Ids that end a reply.
    pub stop_token_ids: Vec<u32>,
    /// Sampling defaults of the model's authors; a request's own values win.
    pub generation: Generation,
    /// Every other file of the folder, by name.
    pub files: BTreeMap<String, FileEntry>,
    /// `sha256:` and the hash over `files`; names the model exactly.
    pub digest: String,
}

/// Where the weights come from.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// The name it is served under unless the operator chooses another.
    pub name: String,
    /// Member of the family, for example `chatglm3`.
    pub architecture: String,
    /// Licence of the weights, where known.
    pub license: Option<String>,
    /// A sentence on the origin, where the exporter was told one.
    pub origin: Option<String>,
}

/// Sizes of the network. All are counts of elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Geometry {
    /// Decoder layers.
    pub num_layers: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key/value heads (groups).
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Channels of a head that rotate.
    pub rotary_dim: usize,
    /// Rows of the embedding and the LM head, padding included.
    pub padded_vocab_size: usize,
    /// Ids below this are real; the rows from here to `padded_vocab_size` are never sampled.
    pub vocab_size: usize,
    /// Longest sequence the rotary tables cover.
    pub max_model_len: usize,
}

/// The graph file and its contract.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Graph {
    /// File name of the ONNX model.
    pub file: String,
    /// `int4`, `int8`, `bf16`, `fp16` or `fp32`: the weights.
    pub precision: String,
    /// `cpu` or `cuda`.
    pub provider: Provider,
    /// Type of the activations.
    pub activation_dtype: Dtype,
    /// Type of the KV cache.
    pub kv_cache_dtype: Dtype,
    /// Tokens a KV block holds.
    pub block_size: usize,
    /// What the graph returns for each wanted row.
    pub output: OutputKind,
    /// What multiplies by quantised weights.
    #[serde(default)]
    pub kernel: Kernel,
    /// Names of the graph's inputs and outputs.
    pub names: TensorNames,
}

/// The execution provider a graph was made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Provider {
    /// ONNX Runtime's CPU provider with the engine's own attention operator.
    Cpu,
    /// ONNX Runtime's CUDA provider.
    Cuda,
}

/// Element types that the contract knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// 32-bit float.
    Float32,
    /// 16-bit IEEE float.
    Float16,
    /// 16-bit brain float.
    Bfloat16,
    /// 8-bit float, 4 bits of exponent; KV cache only.
    Float8e4m3fn,
    /// 8-bit whole number; KV cache only.
    Int8,
    /// 4-bit whole number, two a byte; KV cache only.
    Int4,
}

impl Dtype {
    /// Bits an element takes.
    pub fn num_bits(self) -> usize {
        match self {
            Self::Float32 => 32,
            Self::Float16 | Self::Bfloat16 => 16,
            Self::Float8e4m3fn | Self::Int8 => 8,
            Self::Int4 => 4,
        }
    }

    /// Whether values are divided by a scale when they are stored.
    pub fn is_quantised(self) -> bool {
        self.num_bits() <= 8
    }
}

/// What comes out of the graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OutputKind {
    /// Float32 rows of `padded_vocab_size` values.
    Logits,
    /// The rows, and the best of each with the log of the sum of exponentials, so that a GPU need not
    /// copy whole rows.
    Topk,
}

/// What multiplies by quantised weights.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kernel {
    /// The engine's own QuantizedMatMul and PostAttention: on the CPU only.
    Glmserve,
    /// ONNX Runtime's, for all of them or for those that were quantised before the export; so it was before there
    /// was a choice.
    #[default]
    Ort,
}

/// Names of graph inputs and outputs. Shapes: T packed tokens, B sequences, M blocks a table row,
/// R wanted rows, N blocks of the pool.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorNames {
    /// int32 `[T]`.
    pub token_ids: String,
    /// int32 `[B + 1]`.
    pub cumulative_sequence_length: String,
    /// int32 `[B]`.
    pub past_seqlens: String,
    /// int32 `[B, M]`.
    pub block_table: String,
    /// int32 `[T]`; -1 writes nothing.
    pub slot_mapping: String,
    /// int32 `[3]`, in CPU memory: bound of new tokens a sequence, upper and lower bound of KV length.
    pub attention_metadata: String,
    /// int32 `[R]`: indices into the T packed tokens.
    pub logits_indices: String,
    /// `[N, block_size, num_kv_heads, head_dim]`, one a layer; `{layer}` stands for its number.
    pub key_cache: String,
    /// As `key_cache`.
    pub value_cache: String,
    /// float32 `[R, padded_vocab_size]`.
    pub logits: String,
    /// int32 `[R, K]`, with output `topk`: the best ids below `vocab_size`.
    pub topk_ids: Option<String>,
    /// float32 `[R, K]`, with output `topk`: their logits, the largest first.
    pub topk_values: Option<String>,
    /// float32 `[R, 1]`, with output `topk`: over the ids below `vocab_size`.
    pub logsumexp: Option<String>,
}

impl TensorNames {
    /// The int32 inputs that change from step to step.
    pub fn small_inputs(&self) -> [&str; 7] {
        [
            &self.token_ids,
            &self.cumulative_sequence_length,
            &self.past_seqlens,
            &self.block_table,
            &self.slot_mapping,
            &self.attention_metadata,
            &self.logits_indices,
        ]
    }

    /// The outputs besides the logits: ids, values and logsumexp, with output `topk`.
    pub fn topk(&self) -> Option<[&str; 3]> {
        Some([self.topk_ids.as_deref()?, self.topk_values.as_deref()?, self.logsumexp.as_deref()?])
    }

    /// Names of a layer's key and value cache.
    pub fn caches(&self, layer: usize) -> [String; 2] {
        [&self.key_cache, &self.value_cache].map(|pattern| pattern.replace("{layer}", &layer.to_string()))
    }
}

/// The tokenizer file.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tokenizer {
    /// File name; special tokens are not registered in it.
    pub file: String,
    /// How its pieces spell bytes.
    pub pieces: PieceKind,
}

/// How a tokenizer's pieces spell bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PieceKind {
    /// sentencepiece: `▁` is a space, `<0xNN>` a byte, one leading space of a segment is dropped.
    Sentencepiece,
    /// GPT-2's table of 256 printable characters for bytes.
    ByteLevel,
}

/// How messages become token ids.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Chat {
    /// Name of the format, for example `chatglm3` or `chatml`.
    pub format: String,
    /// Ids of the format's special tokens by their text. Only the format inserts them, never the tokenizer.
    pub special_tokens: BTreeMap<String, u32>,
    /// Put first when a conversation has no system message.
    pub default_system: Option<String>,
}

/// Sampling defaults.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Generation {
    /// 0 is greedy.
    pub temperature: Option<f32>,
    /// Mass of the nucleus.
    pub top_p: Option<f32>,
    /// Number of candidates; 0 is all.
    pub top_k: Option<u32>,
    /// Divides the logits of tokens seen before.
    pub repetition_penalty: Option<f32>,
}

/// Size and hash of a file in the folder.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Size in bytes.
    pub bytes: u64,
    /// Hexadecimal SHA-256.
    pub sha256: String,
}

impl Geometry {
    /// Bytes of keys and values that one token takes over all layers. Those of a block of tokens don't overflow:
    /// a manifest in which they do is refused.
    pub fn kv_bytes_per_token(&self, dtype: Dtype) -> usize {
        2 * self.num_layers * self.num_kv_heads * self.head_dim * dtype.num_bits() / 8
    }

    /// Bits of keys and values that so many tokens take; `None` if that is more than memory can have.
    fn checked_kv_bits(&self, dtype: Dtype, num_tokens: usize) -> Option<usize> {
        let sizes = [self.num_layers, self.num_kv_heads, self.head_dim, dtype.num_bits(), num_tokens];
        sizes.into_iter().try_fold(2usize, usize::checked_mul)
    }
}
