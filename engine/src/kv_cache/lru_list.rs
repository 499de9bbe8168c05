//! Owns an order of blocks by age: which was put in first.
//!
//! Invariant: every operation takes constant time and no memory.

use super::block::BlockId;

/// Neighbours of a block in the ring.
#[derive(Debug, Clone, Copy)]
struct Link {
    older: BlockId,
    newer: BlockId,
}

/// Blocks in the order in which they were put in.
#[derive(Debug)]
pub(super) struct LruList {
    /// One a block, and at the end the ring's anchor: newer than it is the oldest block.
    links: Vec<Link>,
    len: usize,
}

impl LruList {
    /// An empty list that has room for the blocks below `num_blocks`.
    pub(super) fn new(num_blocks: usize) -> Self {
        let anchor = num_blocks as BlockId;
        Self { links: vec![Link { older: anchor, newer: anchor }; num_blocks + 1], len: 0 }
    }

    fn anchor(&self) -> BlockId {
        (self.links.len() - 1) as BlockId
    }

    /// Blocks in the list.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// The blocks, the oldest first.
    pub(super) fn iter(&self) -> impl Iterator<Item = BlockId> {
        let mut block = self.anchor();
        std::iter::from_fn(move || {
            block = self.links[block as usize].newer;
            (block != self.anchor()).then_some(block)
        })
    }

    /// Puts a block in that is not there: it is the youngest.
    pub(super) fn push(&mut self, block: BlockId) {
        let anchor = self.anchor();
        let older = self.links[anchor as usize].older;
        self.links[block as usize] = Link { older, newer: anchor };
        self.links[older as usize].newer = block;
        self.links[anchor as usize].older = block;
        self.len += 1;
    }

    /// Takes a block out that is there.
    pub(super) fn remove(&mut self, block: BlockId) {
        let Link { older, newer } = self.links[block as usize];
        self.links[older as usize].newer = newer;
        self.links[newer as usize].older = older;
        self.len -= 1;
    }

    /// Takes the oldest block out.
    pub(super) fn pop_oldest(&mut self) -> Option<BlockId> {
        let oldest = self.iter().next()?;
        self.remove(oldest);
        Some(oldest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_goes_first_and_any_can_be_taken_out() {
        let mut list = LruList::new(4);
        assert_eq!(list.pop_oldest(), None);
        [2, 0, 3].into_iter().for_each(|block| list.push(block));
        list.remove(0);
        list.push(1);
        list.push(0);
        assert_eq!(list.iter().collect::<Vec<_>>(), [2, 3, 1, 0]);
        assert_eq!((list.pop_oldest(), list.len()), (Some(2), 3));
        list.remove(0);
        assert_eq!((list.pop_oldest(), list.pop_oldest(), list.pop_oldest()), (Some(3), Some(1), None));
        assert_eq!(list.len(), 0);
    }
}
