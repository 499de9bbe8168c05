//! Owns the free list and the reference counts of all blocks.
//!
//! Invariant: a block is free exactly when its reference count is 0.

/// Index of a block in the pool.
pub type BlockId = u32;

/// All blocks of the KV cache.
#[derive(Debug)]
pub struct BlockPool {
    /// The last one is handed out next: the most recently used memory is the warmest.
    free: Vec<BlockId>,
    ref_counts: Vec<u32>,
    block_size: usize,
}

impl BlockPool {
    /// A pool of `num_blocks` free blocks of `block_size` tokens.
    pub fn new(num_blocks: usize, block_size: usize) -> Self {
        let free = (0..num_blocks as BlockId).rev().collect();
        Self { free, ref_counts: vec![0; num_blocks], block_size }
    }

    /// Tokens a block holds.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// Blocks in the pool.
    pub fn num_blocks(&self) -> usize {
        self.ref_counts.len()
    }

    /// Blocks that nobody references.
    pub fn num_free(&self) -> usize {
        self.free.len()
    }

    /// Blocks that `num_tokens` tokens take.
    pub fn blocks_for(&self, num_tokens: usize) -> usize {
        num_tokens.div_ceil(self.block_size)
    }

    /// Takes a free block, with one reference.
    pub fn allocate(&mut self) -> Option<BlockId> {
        let block = self.free.pop()?;
        self.ref_counts[block as usize] = 1;
        Some(block)
    }

    /// Drops one reference; the last one frees the block.
    pub fn release(&mut self, block: BlockId) {
        let count = &mut self.ref_counts[block as usize];
        *count -= 1;
        if *count == 0 {
            self.free.push(block);
        }
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
        let num_referenced = seen.iter().filter(|&&count| count > 0).count();
        if num_referenced + self.num_free() != self.num_blocks() {
            return Err(format!(
                "{num_referenced} referenced and {} free blocks of {}",
                self.num_free(),
                self.num_blocks()
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
