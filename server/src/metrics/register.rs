//! Owns the way of a metric into a registry.

use prometheus::Registry;
use prometheus::core::Collector;

pub(super) fn add<C: Collector + Clone + 'static>(
    registry: &Registry,
    collector: C,
) -> prometheus::Result<C> {
    registry.register(Box::new(collector.clone()))?;
    Ok(collector)
}
