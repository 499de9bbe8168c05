//! Owns a graph of one PagedAttention node and a session over it, for the operator's test and bench.
//!
//! Invariant: the session is an ordinary CPU session with nothing added but the engine's operators.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use glm_engine::operators;
use ort::environment::Environment;
use ort::session::Session;

/// ONNX's numbers of element types.
pub(crate) const FLOAT32: u64 = 1;
const INT32: u64 = 6;
/// The same.
pub(crate) const BFLOAT16: u64 = 16;
const OF_THE_CACHE: u64 = 0;

/// Inputs of the node: place in the schema, name, element type, number of dimensions.
pub(crate) const INPUTS: [(usize, &str, u64, usize); 10] = [
    (0, "query", FLOAT32, 2),
    (3, "key_cache", OF_THE_CACHE, 4),
    (4, "value_cache", OF_THE_CACHE, 4),
    (5, "cumulative_sequence_length", INT32, 1),
    (6, "past_seqlens", INT32, 1),
    (7, "block_table", INT32, 2),
    (8, "cos_cache", FLOAT32, 2),
    (9, "sin_cache", FLOAT32, 2),
    (10, "slot_mapping", INT32, 1),
    (16, "attention_metadata", INT32, 1),
];

/// An attribute's value.
#[allow(dead_code, reason = "the bench has no use for some")]
#[derive(Clone, Copy)]
pub(crate) enum Value {
    /// `INT`.
    Int(i64),
    /// `FLOAT`.
    Float(f32),
    /// `STRING`.
    Text(&'static str),
}

/// ONNX Runtime's library: `GLMSERVE_ORT_LIB`, or that of the repository's virtual environment.
fn library() -> PathBuf {
    if let Some(path) = std::env::var_os("GLMSERVE_ORT_LIB") {
        return path.into();
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(".venv/lib");
    let pythons = std::fs::read_dir(&root).into_iter().flatten().flatten();
    pythons
        .filter_map(|python| {
            let capi = python.path().join("site-packages/onnxruntime/capi");
            std::fs::read_dir(capi).ok()
        })
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .find(|path| {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            name.starts_with("libonnxruntime.so.")
        })
        .unwrap_or_else(|| {
            panic!(
                "no ONNX Runtime library: set GLMSERVE_ORT_LIB to libonnxruntime.so.*, or make .venv \
                 (looked in {})",
                root.display()
            )
        })
}

/// The process's ONNX Runtime.
pub(crate) fn environment() -> &'static Environment {
    static ENVIRONMENT: OnceLock<Environment> = OnceLock::new();
    ENVIRONMENT.get_or_init(|| {
        let library = library();
        let builder = ort::init_from(&library).unwrap_or_else(|e| panic!("{}: {e}", library.display()));
        builder.build().unwrap_or_else(|e| panic!("{}: {e}", library.display()))
    })
}

/// A session over `output = PagedAttention(inputs)`, with the inputs of [`INPUTS`] that `has` keeps and
/// caches of `cache_type`.
///
/// # Errors
/// What ONNX Runtime or the kernel says against it.
pub(crate) fn session(
    num_threads: usize,
    cache_type: u64,
    attributes: &[(&str, Value)],
    has: impl Fn(&str) -> bool,
) -> ort::Result<Session> {
    let inputs: Vec<_> = INPUTS.into_iter().filter(|(_, name, ..)| has(name)).collect();
    let last = inputs.last().map_or(0, |(place, ..)| place + 1);
    let mut names = vec![""; last];
    let mut graph = Message::default();
    for (place, name, element_type, rank) in inputs {
        names[place] = name;
        let element_type = if element_type == OF_THE_CACHE { cache_type } else { element_type };
        graph.message(11, &value_info(name, element_type, rank));
    }
    graph.message(12, &value_info("output", FLOAT32, 2));
    let mut node = Message::default();
    for name in names {
        node.text(1, name);
    }
    node.text(2, "output").text(3, "attention").text(4, "PagedAttention");
    for (name, value) in attributes {
        node.message(5, &attribute(name, *value));
    }
    node.text(7, operators::DOMAIN);
    graph.message(1, &node).text(2, "graph");
    let mut model = Message::default();
    model.int(1, 10).message(7, &graph);
    for (domain, version) in [("", 21), (operators::DOMAIN, 1)] {
        model.message(8, Message::default().text(1, domain).int(2, version));
    }
    Session::builder(environment())?
        .with_intra_threads(num_threads)?
        .with_operators(operators::domain(num_threads)?)?
        .commit_from_memory(&model.0)
}

/// A protobuf message in the making. ONNX Runtime's model editor won't do: it checks the node against
/// the built-in schema, which has no 32-bit floats, before it knows of the session's operators.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }
    fn int(&mut self, field: u64, value: i64) -> &mut Self {
        self.varint(field << 3);
        self.varint(value as u64);
        self
    }
    fn float(&mut self, field: u64, value: f32) -> &mut Self {
        self.varint(field << 3 | 5);
        self.0.extend(value.to_le_bytes());
        self
    }
    fn bytes(&mut self, field: u64, bytes: &[u8]) -> &mut Self {
        self.varint(field << 3 | 2);
        self.varint(bytes.len() as u64);
        self.0.extend(bytes);
        self
    }
    fn text(&mut self, field: u64, text: &str) -> &mut Self {
        self.bytes(field, text.as_bytes())
    }
    fn message(&mut self, field: u64, message: &Self) -> &mut Self {
        self.bytes(field, &message.0)
    }
}

/// A ValueInfoProto of a tensor whose sizes are free.
fn value_info(name: &str, element_type: u64, rank: usize) -> Message {
    let mut shape = Message::default();
    for _ in 0..rank {
        shape.message(1, &Message::default());
    }
    let mut tensor = Message::default();
    tensor.int(1, element_type as i64).message(2, &shape);
    let mut info = Message::default();
    info.text(1, name).message(2, Message::default().message(1, &tensor));
    info
}

/// An AttributeProto.
fn attribute(name: &str, value: Value) -> Message {
    let mut attribute = Message::default();
    attribute.text(1, name);
    match value {
        Value::Float(value) => attribute.float(2, value).int(20, 1),
        Value::Int(value) => attribute.int(3, value).int(20, 2),
        Value::Text(value) => attribute.text(4, value).int(20, 3),
    };
    attribute
}
