//! Owns what a block is called, and which tokens fill blocks that others may use.

/// Index of a block in the pool.
pub(crate) type BlockId = u32;

/// The full blocks of `tokens` without the last token, whose logits are wanted.
pub(super) fn reusable(tokens: &[u32], block_size: usize) -> std::slice::ChunksExact<'_, u32> {
    tokens[..tokens.len().saturating_sub(1)].chunks_exact(block_size)
}
