//! Owns the state of all blocks: how often each is referenced and what it holds for others to use.
//!
//! Invariant: a block is referenced, or cached (nobody references it, but its content is known and
//! it may be taken up again), or free. Cached blocks are taken when no free one is left, those that
//! nobody used for the longest time first.

use std::sync::Arc;

use super::block::BlockId;
use super::cached_prefixes::CachedPrefixes;
use super::lru_list::LruList;
use super::prefix_index::{Prefix, PrefixIndex};

/// All blocks of the KV cache.
#[derive(Debug)]
pub struct BlockPool {
    /// The last one is handed out next: the most recently used memory is the warmest.
    free: Vec<BlockId>,
    cached: LruList,
    ref_counts: Vec<u32>,
    index: PrefixIndex,
    block_size: usize,
}

impl BlockPool {
    /// A pool of `num_blocks` free blocks of `block_size` tokens.
    pub fn new(num_blocks: usize, block_size: usize) -> Self {
        Self {
            free: (0..num_blocks as BlockId).rev().collect(),
            cached: LruList::new(num_blocks),
            ref_counts: vec![0; num_blocks],
            index: PrefixIndex::new(num_blocks, block_size),
            block_size,
        }
    }

    /// What other threads may know of the contents.
    pub fn cached_prefixes(&self) -> &Arc<CachedPrefixes> {
        self.index.cached_prefixes()
    }

    /// Tokens a block holds.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// Blocks in the pool.
    pub fn num_blocks(&self) -> usize {
        self.ref_counts.len()
    }

    /// Number of blocks without a reference, cached or not.
    pub fn num_free(&self) -> usize {
        self.free.len() + self.cached.len()
    }

    /// Of those, blocks that hold nothing of use to anybody.
    pub fn num_unused(&self) -> usize {
        self.free.len()
    }

    /// Blocks that `num_tokens` tokens take.
    pub fn blocks_for(&self, num_tokens: usize) -> usize {
        num_tokens.div_ceil(self.block_size)
    }

    /// Takes a block that has no reference, and gives it one. What it held is forgotten.
    pub fn allocate(&mut self) -> Option<BlockId> {
        let block = match self.free.pop() {
            Some(block) => block,
            None => {
                let oldest = self.cached.pop_oldest()?;
                self.index.remove(oldest);
                oldest
            }
        };
        self.ref_counts[block as usize] = 1;
        Some(block)
    }

    /// Adds a reference to a block that [`Self::find`] named.
    pub fn retain(&mut self, block: BlockId) {
        let count = &mut self.ref_counts[block as usize];
        *count += 1;
        if *count == 1 {
            self.cached.remove(block);
        }
    }

    /// Drops one reference; after the last one the block is cached if its content is known, else free.
    pub fn release(&mut self, block: BlockId) {
        let count = &mut self.ref_counts[block as usize];
        *count -= 1;
        if *count > 0 {
            return;
        }
        if self.index.contains(block) {
            self.cached.push(block);
        } else {
            self.free.push(block);
        }
    }

    /// Whether anybody references a block.
    pub fn is_referenced(&self, block: BlockId) -> bool {
        self.ref_counts[block as usize] > 0
    }

    /// Whether a block has one reference and unknown content, so that no other sequence reads it or will.
    pub fn is_exclusive(&self, block: BlockId) -> bool {
        self.ref_counts[block as usize] == 1 && !self.index.contains(block)
    }

    /// The block that holds `tokens`, a block full of them, after `prefix`; and the prefix it ends.
    pub fn find(&self, prefix: Prefix, tokens: &[u32]) -> Option<(BlockId, Prefix)> {
        let block = self.index.find(prefix, tokens)?;
        Some((block, self.index.prefix_through(block)?))
    }

    /// Makes a referenced block, which holds `tokens` after `prefix`, known. If another one with the
    /// same content is known, the reference moves there. Returns the block that is known and the
    /// prefix it ends.
    pub fn publish(&mut self, block: BlockId, prefix: Prefix, tokens: &[u32]) -> (BlockId, Prefix) {
        match self.find(prefix, tokens) {
            Some((known, prefix)) => {
                if known != block {
                    self.retain(known);
                    self.release(block);
                }
                (known, prefix)
            }
            None => (block, self.index.insert(block, prefix, tokens)),
        }
    }

    /// Forgets all contents. Referenced blocks stay with who references them.
    pub fn forget_contents(&mut self) {
        (0..self.num_blocks() as BlockId).for_each(|block| self.index.remove(block));
        self.free.extend(std::iter::from_fn(|| self.cached.pop_oldest()));
    }

    /// Compares the pool's own counts with the references that `tables` hold.
    ///
    /// # Errors
    /// Says which block is wrong and how.
    pub fn check<'a>(&self, tables: impl Iterator<Item = &'a [BlockId]>) -> Result<(), String> {
        let mut seen = vec![0u32; self.num_blocks()];
        for table in tables {
            for &block in table {
                seen[block as usize] += 1;
            }
        }
        for (block, (&expected, &found)) in self.ref_counts.iter().zip(&seen).enumerate() {
            if expected != found {
                return Err(format!("block {block} counts {expected} references, tables hold {found}"));
            }
        }
        let mut num_lists: Vec<u32> = seen.iter().map(|&count| count.min(1)).collect();
        for (block, is_known) in
            self.free.iter().map(|&block| (block, false)).chain(self.cached.iter().map(|block| (block, true)))
        {
            num_lists[block as usize] += 1;
            if self.index.contains(block) != is_known {
                return Err(format!("block {block} is known: {}, against its list", !is_known));
            }
        }
        match num_lists.iter().position(|&count| count != 1) {
            Some(block) => Err(format!("block {block} is in {} states", num_lists[block])),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EMPTY: Prefix = Prefix::Empty { salt: 0 };

    #[test]
    fn a_block_is_free_again_after_its_last_reference() {
        let mut pool = BlockPool::new(2, 16);
        let first = pool.allocate().unwrap();
        let second = pool.allocate().unwrap();
        assert_eq!(pool.allocate(), None);
        assert_eq!(pool.check([&[first, second][..]].into_iter()), Ok(()));
        assert!(pool.check([&[first][..]].into_iter()).is_err());
        pool.release(first);
        assert_eq!(pool.num_free(), 1);
        assert_eq!(pool.allocate(), Some(first));
    }

    #[test]
    fn blocks_for_rounds_up() {
        let pool = BlockPool::new(1, 16);
        assert_eq!([0, 1, 16, 17].map(|n| pool.blocks_for(n)), [0, 1, 1, 2]);
    }

    #[test]
    fn a_released_block_is_cached_and_the_oldest_is_taken_when_no_free_one_is_left() {
        let mut pool = BlockPool::new(3, 1);
        let blocks: Vec<_> = (0..3).map(|_| pool.allocate().unwrap()).collect();
        pool.publish(blocks[0], EMPTY, &[1]);
        pool.publish(blocks[1], EMPTY, &[2]);
        blocks.iter().for_each(|&block| pool.release(block));
        assert_eq!((pool.num_free(), pool.check(std::iter::empty())), (3, Ok(())));
        // Used again, it is the youngest.
        pool.retain(blocks[0]);
        pool.release(blocks[0]);
        assert_eq!(pool.allocate(), Some(blocks[2]), "the one that nobody knows");
        assert_eq!(pool.allocate(), Some(blocks[1]), "the oldest");
        assert_eq!(pool.find(EMPTY, &[2]), None);
        assert_eq!(pool.find(EMPTY, &[1]).map(|(block, _)| block), Some(blocks[0]));
        assert_eq!(pool.check([&[blocks[1], blocks[2]][..]].into_iter()), Ok(()));
    }

    #[test]
    fn one_content_is_one_block() {
        let mut pool = BlockPool::new(2, 1);
        let [first, second] = [pool.allocate().unwrap(), pool.allocate().unwrap()];
        let (known, prefix) = pool.publish(first, EMPTY, &[1]);
        assert_eq!((known, pool.publish(second, EMPTY, &[1])), (first, (first, prefix)));
        assert_eq!(pool.check([&[first][..], &[first]].into_iter()), Ok(()));
        assert_eq!(pool.num_free(), 1);
    }

    #[test]
    fn forgotten_contents_are_not_found_and_their_blocks_are_free() {
        let mut pool = BlockPool::new(2, 1);
        let blocks = [pool.allocate().unwrap(), pool.allocate().unwrap()];
        pool.publish(blocks[0], EMPTY, &[1]);
        pool.publish(blocks[1], EMPTY, &[2]);
        pool.release(blocks[0]);
        pool.forget_contents();
        assert!(pool.find(EMPTY, &[1]).is_none() && pool.find(EMPTY, &[2]).is_none());
        assert_eq!(pool.check([&blocks[1..]].into_iter()), Ok(()));
        pool.release(blocks[1]);
        assert_eq!((pool.num_free(), pool.check(std::iter::empty())), (2, Ok(())));
    }
}
