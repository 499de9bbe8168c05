//! Owns small graphs and sessions over them, for the operators' tests and benches.
//!
//! Invariant: a session is an ordinary CPU session with nothing added but the engine's operators.

#![allow(dead_code, reason = "each test and bench has its own use for it")]

pub(crate) mod attention;

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use ort::environment::Environment;
use ort::session::Session;

/// The domain of plain operators.
pub(crate) const PLAIN: &str = "";

/// An attribute's value.
#[derive(Clone, Copy)]
pub(crate) enum Value {
    /// `INT`.
    Int(i64),
    /// `FLOAT`.
    Float(f32),
    /// `STRING`.
    Text(&'static str),
}

/// Element types, by ONNX's numbers.
#[derive(Clone, Copy)]
pub(crate) enum Type {
    /// Floats of 32 bits.
    Float32 = 1,
    /// Bytes.
    Uint8 = 2,
    /// Whole numbers of 32 bits.
    Int32 = 6,
    /// Whole numbers of 64 bits.
    Int64 = 7,
    /// Brain floats of 16 bits.
    Bfloat16 = 16,
}

/// ONNX Runtime's library: `GLMSERVE_ORT_LIB`, or that of the repository's virtual environment.
fn library() -> PathBuf {
    if let Some(path) = std::env::var_os("GLMSERVE_ORT_LIB") {
        return path.into();
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.venv/lib");
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

/// A graph in the making.
#[derive(Default)]
pub(crate) struct Graph(Message);

impl Graph {
    /// Adds an input whose sizes are free.
    pub(crate) fn input(&mut self, name: &str, item: Type, rank: usize) -> &mut Self {
        self.0.message(11, &value_info(name, item, rank));
        self
    }

    /// Adds an output of floats whose sizes are free.
    pub(crate) fn output(&mut self, name: &str, rank: usize) -> &mut Self {
        self.0.message(12, &value_info(name, Type::Float32, rank));
        self
    }

    /// Adds an initialiser.
    pub(crate) fn tensor(&mut self, name: &str, item: Type, shape: &[usize], bytes: &[u8]) -> &mut Self {
        let mut tensor = Message::default();
        for size in shape {
            tensor.int(1, *size as i64);
        }
        tensor.int(2, item as i64).text(8, name).bytes(9, bytes);
        self.0.message(5, &tensor);
        self
    }

    /// Adds a node; an input without a name is absent.
    pub(crate) fn node(
        &mut self,
        (domain, kind): (&str, &str),
        inputs: &[&str],
        outputs: &[&str],
        attributes: &[(&str, Value)],
    ) -> &mut Self {
        let mut node = Message::default();
        for name in inputs {
            node.text(1, name);
        }
        for name in outputs {
            node.text(2, name);
        }
        node.text(3, outputs[0]).text(4, kind);
        for (name, value) in attributes {
            node.message(5, &attribute(name, *value));
        }
        node.text(7, domain);
        self.0.message(1, &node);
        self
    }

    /// A session over the graph.
    ///
    /// # Errors
    /// What ONNX Runtime or a kernel says against it.
    pub(crate) fn session(&mut self, num_threads: usize) -> ort::Result<Session> {
        let mut model = Message::default();
        self.0.text(2, "graph");
        model.int(1, 10).message(7, &self.0);
        for (domain, version) in [(PLAIN, 21), (glm_kernels::DOMAIN, 1), (glm_kernels::OWN_DOMAIN, 1)] {
            model.message(8, Message::default().text(1, domain).int(2, version));
        }
        let builder = Session::builder(environment())?.with_intra_threads(num_threads)?;
        glm_kernels::session(builder, num_threads, false, |mut builder| builder.commit_from_memory(&model.0))
    }
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
fn value_info(name: &str, item: Type, rank: usize) -> Message {
    let mut shape = Message::default();
    for _ in 0..rank {
        shape.message(1, &Message::default());
    }
    let mut tensor = Message::default();
    tensor.int(1, item as i64).message(2, &shape);
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
