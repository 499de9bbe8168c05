//! Owns the list of blocks that hold one running sequence's keys and values.
//!
//! Invariant: a table is not `Clone`; its references go back through [`BlockTable::release`]. Blocks
//! that others may read are full and computed, and are never written again: sharing needs no copy.

use super::block::{BlockId, reusable};
use super::block_pool::BlockPool;
use super::prefix_index::Prefix;

/// Blocks of one sequence, in the order of its tokens.
#[derive(Debug)]
#[must_use = "a dropped table leaks its blocks: release it"]
pub struct BlockTable {
    blocks: Vec<BlockId>,
    /// The first ones, which the pool knows the content of.
    num_published: usize,
    /// The tokens in those; `None` if the sequence takes no part in the prefix cache.
    prefix: Option<Prefix>,
}

impl BlockTable {
    /// An empty table that can grow to `capacity` blocks without allocating memory. `prefix` is the
    /// empty one of whoever may share its blocks, or `None` if it shares none.
    pub fn new(capacity: usize, prefix: Option<Prefix>) -> Self {
        Self { blocks: Vec::with_capacity(capacity), num_published: 0, prefix }
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

    /// Starts the empty table of a sequence of `tokens` with the blocks that hold its first tokens
    /// already. Returns how many tokens; the last one is never among them, as its logits are wanted.
    pub fn adopt(&mut self, tokens: &[u32], pool: &mut BlockPool) -> usize {
        let Some(mut prefix) = self.prefix else { return 0 };
        for chunk in reusable(tokens, pool.block_size()) {
            let Some((block, through)) = pool.find(prefix, chunk) else { break };
            pool.retain(block);
            self.blocks.push(block);
            prefix = through;
        }
        self.prefix = Some(prefix);
        self.num_published = self.blocks.len();
        self.num_published * pool.block_size()
    }

    /// Makes the blocks that are full of computed tokens, the first `num_computed_tokens` of `tokens`,
    /// known to the pool. Where it knows the same content elsewhere, the table takes that block.
    pub fn publish(&mut self, tokens: &[u32], num_computed_tokens: usize, pool: &mut BlockPool) {
        let computed = &tokens[..num_computed_tokens.min(tokens.len())];
        let new = computed.chunks_exact(pool.block_size()).skip(self.num_published);
        for (chunk, block) in new.zip(&mut self.blocks[self.num_published..]) {
            let Some(prefix) = self.prefix else { return };
            let (known, through) = pool.publish(*block, prefix, chunk);
            *block = known;
            self.prefix = Some(through);
            self.num_published += 1;
        }
    }

    /// Publishes nothing from now on: the pool has forgotten the prefix.
    pub fn stop_publishing(&mut self) {
        self.prefix = None;
    }

    /// Gives all references back, the last block first, so that a prefix is reused last.
    pub fn release(self, pool: &mut BlockPool) {
        for block in self.blocks.into_iter().rev() {
            pool.release(block);
        }
    }
}

/// Of the blocks that a sequence of `tokens` would adopt, those that are referenced already.
pub(crate) fn num_shared_blocks(tokens: &[u32], prefix: Option<Prefix>, pool: &BlockPool) -> usize {
    let Some(mut prefix) = prefix else { return 0 };
    let found = reusable(tokens, pool.block_size()).map_while(|chunk| {
        let (block, through) = pool.find(prefix, chunk)?;
        prefix = through;
        Some(block)
    });
    found.filter(|&block| pool.is_referenced(block)).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    const EMPTY: Option<Prefix> = Some(Prefix::Empty { salt: 0 });

    #[test]
    fn growing_takes_all_or_nothing() {
        let mut pool = BlockPool::new(3, 16);
        let mut table = BlockTable::new(3, None);
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

    #[test]
    fn full_computed_blocks_are_adopted_but_for_the_last_token() {
        let mut pool = BlockPool::new(8, 2);
        let tokens = [1, 2, 3, 4, 5];
        let mut first = BlockTable::new(8, EMPTY);
        assert_eq!(first.adopt(&tokens, &mut pool), 0);
        assert!(first.grow(5, &mut pool));
        first.publish(&tokens, 3, &mut pool);
        let adopted = |tokens: &[u32], prefix, pool: &mut BlockPool| {
            let num_shared = num_shared_blocks(tokens, prefix, pool);
            let mut table = BlockTable::new(8, prefix);
            let num_tokens = table.adopt(tokens, pool);
            table.release(pool);
            (num_tokens, num_shared)
        };
        assert_eq!(adopted(&tokens, EMPTY, &mut pool), (2, 1), "one is full and computed");
        first.publish(&tokens, 5, &mut pool);
        assert_eq!(adopted(&tokens, EMPTY, &mut pool), (4, 2));
        assert_eq!(adopted(&tokens[..4], EMPTY, &mut pool), (2, 1), "its last token is computed");
        assert_eq!(adopted(&[1, 2, 3, 9, 5], EMPTY, &mut pool), (2, 1));
        assert_eq!(adopted(&[9, 2, 3, 4, 5], EMPTY, &mut pool), (0, 0));
        assert_eq!(adopted(&tokens, Some(Prefix::Empty { salt: 1 }), &mut pool), (0, 0));
        assert_eq!(adopted(&tokens, None, &mut pool), (0, 0));
        first.release(&mut pool);
        assert_eq!(adopted(&tokens, EMPTY, &mut pool), (4, 0), "nobody references them");
        assert_eq!(pool.check(std::iter::empty()), Ok(()));
    }

    #[test]
    fn a_table_that_is_told_to_stop_publishes_nothing() {
        let mut pool = BlockPool::new(4, 1);
        let mut table = BlockTable::new(4, EMPTY);
        assert!(table.grow(2, &mut pool));
        table.publish(&[1, 2], 1, &mut pool);
        pool.forget_contents();
        table.stop_publishing();
        table.publish(&[1, 2], 2, &mut pool);
        table.release(&mut pool);
        assert_eq!(BlockTable::new(4, EMPTY).adopt(&[1, 2, 3], &mut pool), 0);
    }
}
