//! Owns what is known of the blocks that can be used again: the tokens in them and those before.
//!
//! Invariant: a match is exact. A hash finds the candidates; prefix and tokens are compared, so that
//! no content is ever taken for another, whoever chose it. The blocks of a prompt form a chain: a
//! prefix is named by the serial number of the block that ends it, which no other block gets, so
//! what stood behind a block that is gone is not found behind the next one in its place.

use std::sync::Arc;

use super::block::BlockId;
use super::cached_prefixes::CachedPrefixes;

/// All tokens before a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Prefix {
    /// None.
    Empty {
        /// Keeps apart who must not share.
        salt: u64,
    },
    /// Those up to the end of a block in the index.
    Block {
        /// The block's serial number.
        serial: u64,
        /// The tokens' name, which others may have by chance.
        name: u64,
    },
}

impl Prefix {
    fn name(self) -> u64 {
        match self {
            Self::Empty { salt } => salt,
            Self::Block { name, .. } => name,
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    prefix: Prefix,
    serial: u64,
    name: u64,
    /// The next block of the same bucket.
    next: BlockId,
}

/// The end of a bucket: beyond every block.
const NONE: BlockId = BlockId::MAX;

/// A hash table of blocks with their tokens. It has its final size from the start.
#[derive(Debug)]
pub(super) struct PrefixIndex {
    block_size: usize,
    /// One a block, if it is in the index.
    entries: Vec<Option<Entry>>,
    /// `[num_blocks, block_size]`, valid where there is an entry.
    tokens: Vec<u32>,
    /// First block of each bucket; a power of two of them.
    buckets: Vec<BlockId>,
    /// Names what is in the index, and tells others.
    cached_prefixes: Arc<CachedPrefixes>,
    next_serial: u64,
}

impl PrefixIndex {
    /// An empty index for `num_blocks` blocks of `block_size` tokens.
    pub(super) fn new(num_blocks: usize, block_size: usize) -> Self {
        Self {
            block_size,
            entries: vec![None; num_blocks],
            tokens: vec![0; num_blocks * block_size],
            buckets: vec![NONE; num_blocks.next_power_of_two()],
            cached_prefixes: Arc::new(CachedPrefixes::new(num_blocks, block_size)),
            next_serial: 0,
        }
    }

    /// What other threads may know of the index.
    pub(super) fn cached_prefixes(&self) -> &Arc<CachedPrefixes> {
        &self.cached_prefixes
    }

    fn bucket(&self, name: u64) -> usize {
        name as usize & (self.buckets.len() - 1)
    }

    fn tokens(&self, block: BlockId) -> &[u32] {
        &self.tokens[block as usize * self.block_size..][..self.block_size]
    }

    fn entry(&self, block: BlockId) -> Option<&Entry> {
        self.entries.get(block as usize)?.as_ref()
    }

    /// Whether a block is in the index.
    pub(super) fn contains(&self, block: BlockId) -> bool {
        self.entry(block).is_some()
    }

    /// The prefix that ends with a block.
    pub(super) fn prefix_through(&self, block: BlockId) -> Option<Prefix> {
        self.entry(block).map(|entry| Prefix::Block { serial: entry.serial, name: entry.name })
    }

    /// The block that holds `tokens`, a block full of them, after `prefix`.
    pub(super) fn find(&self, prefix: Prefix, tokens: &[u32]) -> Option<BlockId> {
        let mut block = self.buckets[self.bucket(self.cached_prefixes.name(prefix.name(), tokens))];
        while let Some(entry) = self.entry(block) {
            if entry.prefix == prefix && self.tokens(block) == tokens {
                return Some(block);
            }
            block = entry.next;
        }
        None
    }

    /// Adds a block that is not in the index; its content is not there either. Returns the prefix
    /// that it ends.
    pub(super) fn insert(&mut self, block: BlockId, prefix: Prefix, tokens: &[u32]) -> Prefix {
        let name = self.cached_prefixes.name(prefix.name(), tokens);
        let bucket = self.bucket(name);
        let serial = self.next_serial;
        self.next_serial += 1;
        let next = std::mem::replace(&mut self.buckets[bucket], block);
        self.entries[block as usize] = Some(Entry { prefix, serial, name, next });
        self.cached_prefixes.add(name);
        self.tokens[block as usize * self.block_size..][..self.block_size].copy_from_slice(tokens);
        Prefix::Block { serial, name }
    }

    /// Forgets a block. What follows it is never found again.
    pub(super) fn remove(&mut self, block: BlockId) {
        let Some(entry) = self.entries[block as usize].take() else { return };
        self.cached_prefixes.remove(entry.name);
        let bucket = self.bucket(entry.name);
        let mut previous = self.buckets[bucket];
        if previous == block {
            self.buckets[bucket] = entry.next;
            return;
        }
        while let Some(link) = self.entries.get_mut(previous as usize).and_then(Option::as_mut) {
            if link.next == block {
                link.next = entry.next;
                return;
            }
            previous = link.next;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EMPTY: Prefix = Prefix::Empty { salt: 0 };

    #[test]
    fn a_block_is_found_by_all_that_is_before_it() {
        let mut index = PrefixIndex::new(8, 2);
        let first = index.insert(5, EMPTY, &[1, 2]);
        let second = index.insert(3, first, &[1, 2]);
        assert_eq!(index.find(EMPTY, &[1, 2]), Some(5));
        assert_eq!(index.find(first, &[1, 2]), Some(3));
        assert_eq!(index.find(second, &[1, 2]), None);
        assert_eq!(index.find(first, &[1, 3]), None);
        assert_eq!(index.find(Prefix::Empty { salt: 7 }, &[1, 2]), None);
        let known = |index: &PrefixIndex| index.cached_prefixes().num_cached_tokens(0, &[1, 2, 1, 2, 3]);
        assert_eq!(known(&index), 4);
        index.remove(3);
        // None, if that one hid the first.
        assert!([0, 2].contains(&known(&index)));
    }

    #[test]
    fn what_followed_a_forgotten_block_is_not_found_behind_the_next_one() {
        let mut index = PrefixIndex::new(8, 2);
        let first = index.insert(5, EMPTY, &[1, 2]);
        index.insert(3, first, &[8, 8]);
        index.remove(5);
        assert_eq!(index.find(EMPTY, &[1, 2]), None);
        let again = index.insert(5, EMPTY, &[3, 4]);
        assert_eq!(index.find(again, &[8, 8]), None);
    }

    /// One bucket, the smallest table: each position of the chain is removed once.
    #[test]
    fn blocks_of_one_bucket_are_told_apart() {
        for gone in 0..4 {
            let mut index = PrefixIndex::new(4, 1);
            index.buckets = vec![NONE; 1];
            for block in 0..4 {
                index.insert(block, EMPTY, &[block]);
            }
            index.remove(gone);
            for block in 0..4 {
                assert_eq!(index.find(EMPTY, &[block]), (block != gone).then_some(block));
            }
        }
    }
}
