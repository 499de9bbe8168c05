//! Owns the comparison of a graph with its manifest: names, types and shapes of what enters and leaves it.

use ort::session::Session;
use ort::value::{Outlet, TensorElementType};

use super::outputs::Widths;
use super::provider;
use crate::error::LoadError;
use crate::model::manifest::{Geometry, Graph};

/// Compares the graph's inputs and outputs with what the manifest promises.
pub(super) fn check_contract(
    session: &Session,
    geometry: &Geometry,
    graph: &Graph,
) -> Result<Widths, LoadError> {
    let names = &graph.names;
    let dtype_of = |outlets: &[Outlet], name: &str| {
        let outlet = outlets.iter().find(|outlet| outlet.name() == name);
        outlet
            .and_then(|outlet| Some((outlet.dtype().tensor_type()?, outlet.dtype().tensor_shape()?.to_vec())))
    };
    let wrong =
        |name: &str| LoadError::Config(format!("the graph does not have {name} as the manifest says"));
    for name in names.small_inputs() {
        let found = dtype_of(session.inputs(), name);
        found.filter(|(ty, _)| *ty == TensorElementType::Int32).ok_or_else(|| wrong(name))?;
    }
    let cache = provider::cache_shape(geometry, graph).map(|size| size as i64);
    let cache_type = provider::element_type(graph.kv_cache_dtype);
    for name in (0..geometry.num_layers).flat_map(|layer| names.caches(layer)) {
        let found = dtype_of(session.inputs(), &name);
        let fits = |(ty, shape): &(_, Vec<i64>)| *ty == cache_type && shape.ends_with(&cache);
        found.filter(fits).ok_or_else(|| wrong(&name))?;
    }
    let num_inputs = names.small_inputs().len() + 2 * geometry.num_layers;
    if session.inputs().len() != num_inputs {
        let found = session.inputs().len();
        return Err(LoadError::Config(format!("the graph has {found} inputs, the manifest {num_inputs}")));
    }
    let found = dtype_of(session.outputs(), &names.logits);
    let width = geometry.padded_vocab_size as i64;
    let fits = |(ty, shape): &(_, Vec<i64>)| {
        *ty == TensorElementType::Float32 && shape.len() == 2 && shape[1] == width
    };
    found.filter(fits).ok_or_else(|| wrong(&names.logits))?;
    let types = [TensorElementType::Int32, TensorElementType::Float32, TensorElementType::Float32];
    let mut widths = Vec::new();
    for (name, wanted) in names.topk().into_iter().flatten().zip(types) {
        let found = dtype_of(session.outputs(), name);
        let (_, shape) =
            found.filter(|(ty, shape)| *ty == wanted && shape.len() == 2).ok_or_else(|| wrong(name))?;
        widths.push(usize::try_from(shape[1]).map_err(|_| wrong(name))?);
    }
    Ok(Widths { logits: geometry.padded_vocab_size, topk: check_topk(&widths, geometry.vocab_size)? })
}

/// The number of candidates, from the columns of ids, values and logsumexp; none of a graph without them.
fn check_topk(widths: &[usize], vocab_size: usize) -> Result<Option<usize>, LoadError> {
    match *widths {
        [] => Ok(None),
        [ids, values, 1] if ids == values && (1..=vocab_size).contains(&ids) => Ok(Some(ids)),
        _ => Err(LoadError::Config(format!(
            "the graph returns {widths:?} columns of topk_ids, topk_values and logsumexp: the first two must be \
             equal and from 1 to the model's vocab_size {vocab_size}, the last 1"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn candidates_are_bound_by_the_vocabulary() {
        assert_eq!(check_topk(&[], 100).unwrap(), None);
        assert_eq!(check_topk(&[64, 64, 1], 100).unwrap(), Some(64));
        assert_eq!(check_topk(&[100, 100, 1], 100).unwrap(), Some(100));
        for widths in [&[101, 101, 1][..], &[0, 0, 1], &[64, 63, 1], &[64, 64, 2], &[64]] {
            let error = check_topk(widths, 100).unwrap_err().to_string();
            assert!(error.contains("topk_ids") && error.contains("vocab_size 100"), "{error}");
        }
    }
}
