//! Owns a graph of one PagedAttention node.

use glm_engine::operators;
use ort::session::Session;

use super::{Graph, Type, Value};

/// Inputs of the node: place in the schema, name, whether it is float, sizes (-1 is any).
pub(crate) const INPUTS: [(usize, &str, bool, usize); 10] = [
    (0, "query", true, 2),
    (3, "key_cache", true, 4),
    (4, "value_cache", true, 4),
    (5, "cumulative_sequence_length", false, 1),
    (6, "past_seqlens", false, 1),
    (7, "block_table", false, 2),
    (8, "cos_cache", true, 2),
    (9, "sin_cache", true, 2),
    (10, "slot_mapping", false, 1),
    (16, "attention_metadata", false, 1),
];

/// A session over `output = PagedAttention(inputs)`, with the inputs of [`INPUTS`] that `has` keeps.
///
/// # Errors
/// What ONNX Runtime or the kernel says against it.
pub(crate) fn session(
    num_threads: usize,
    attributes: &[(&str, Value)],
    has: impl Fn(&str) -> bool,
) -> ort::Result<Session> {
    let inputs: Vec<_> = INPUTS.into_iter().filter(|(_, name, ..)| has(name)).collect();
    let last = inputs.last().map_or(0, |(place, ..)| place + 1);
    let mut names = vec![""; last];
    let mut graph = Graph::default();
    for (place, name, float, rank) in inputs {
        names[place] = name;
        graph.input(name, if float { Type::Float32 } else { Type::Int32 }, rank);
    }
    graph.output("output", 2);
    graph.node((operators::DOMAIN, "PagedAttention"), &names, &["output"], attributes);
    graph.session(num_threads)
}
