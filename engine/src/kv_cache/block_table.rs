//! Owns the list of blocks that hold one running sequence's keys and values.
//!
//! Invariant: a table is not `Clone`; its references go back through [`BlockTable::release`].

use super::block_pool::{BlockId, BlockPool};

/// Blocks of one sequence, in the order of its tokens.
#[derive(Debug)]
#[must_use = "a dropped table leaks its blocks: release it"]
pub struct BlockTable {
    blocks: Vec<BlockId>,
}

impl BlockTable {
    /// An empty table that can grow to `capacity` blocks without allocating memory.
    pub fn with_capacity(capacity: usize) -> Self {
        Self { blocks: Vec::with_capacity(capacity) }
    }

    /// The blocks.
    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }

    /// Makes room for `num_tokens` tokens in all. Takes nothing unless there are enough free blocks.
    pub fn grow(&mut self, num_tokens: usize, pool: &mut BlockPool) -> bool {
        let missing = pool.blocks_for(num_tokens).saturating_sub(self.blocks.len());
        if missing > pool.num_free() {
            return false;
        }
        self.blocks.extend((0..missing).map_while(|_| pool.allocate()));
        true
    }

    /// Gives back what `num_tokens` tokens don't need.
    pub fn shrink(&mut self, num_tokens: usize, pool: &mut BlockPool) {
        let num_blocks = pool.blocks_for(num_tokens).min(self.blocks.len());
        self.blocks.drain(num_blocks..).rev().for_each(|block| pool.release(block));
    }

    /// Gives all references back, the last block first, so that a prefix is reused last.
    pub fn release(self, pool: &mut BlockPool) {
        for block in self.blocks.into_iter().rev() {
            pool.release(block);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growing_takes_all_or_nothing() {
        let mut pool = BlockPool::new(3, 16);
        let mut table = BlockTable::with_capacity(3);
        assert!(table.grow(17, &mut pool));
        assert_eq!(table.blocks().len(), 2);
        assert!(!table.grow(65, &mut pool));
        assert_eq!((table.blocks().len(), pool.num_free()), (2, 1));
        assert!(table.grow(32, &mut pool));
        assert_eq!(table.blocks().len(), 2);
        table.shrink(17, &mut pool);
        assert_eq!((table.blocks().len(), pool.num_free()), (2, 1));
        table.shrink(16, &mut pool);
        assert_eq!((table.blocks().len(), pool.num_free()), (1, 2));
        table.release(&mut pool);
        assert_eq!(pool.num_free(), 3);
    }
}
