//! Owns a graph of one PagedAttention node.

use ort::session::Session;

use super::{Graph, Type, Value};

/// Inputs of the node: place in the schema, name, element type (none is that of the cache), dimensions.
pub(crate) const INPUTS: [(usize, &str, Option<Type>, usize); 10] = [
    (0, "query", Some(Type::Float32), 2),
    (3, "key_cache", None, 4),
    (4, "value_cache", None, 4),
    (5, "cumulative_sequence_length", Some(Type::Int32), 1),
    (6, "past_seqlens", Some(Type::Int32), 1),
    (7, "block_table", Some(Type::Int32), 2),
    (8, "cos_cache", Some(Type::Float32), 2),
    (9, "sin_cache", Some(Type::Float32), 2),
    (10, "slot_mapping", Some(Type::Int32), 1),
    (16, "attention_metadata", Some(Type::Int32), 1),
];

/// A session over `output = PagedAttention(inputs)`, with the inputs of [`INPUTS`] that `has` keeps and
/// caches of `cache_type`.
///
/// # Errors
/// What ONNX Runtime or the kernel says against it.
pub(crate) fn session(
    num_threads: usize,
    cache_type: Type,
    attributes: &[(&str, Value)],
    has: impl Fn(&str) -> bool,
) -> ort::Result<Session> {
    let inputs: Vec<_> = INPUTS.into_iter().filter(|(_, name, ..)| has(name)).collect();
    let last = inputs.last().map_or(0, |(place, ..)| place + 1);
    let mut names = vec![""; last];
    let mut graph = Graph::default();
    for (place, name, item, rank) in inputs {
        names[place] = name;
        graph.input(name, item.unwrap_or(cache_type), rank);
    }
    graph.output("output", 2);
    graph.node((glm_kernels::DOMAIN, "PagedAttention"), &names, &["output"], attributes);
    graph.session(num_threads)
}
