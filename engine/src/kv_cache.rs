//! Owns which KV block belongs to whom. The memory itself belongs to the runner.

mod block;
mod block_pool;
mod block_table;
mod cached_prefixes;
mod lru_list;
mod prefix_index;

pub(crate) use block::BlockId;
pub(crate) use block_pool::BlockPool;
pub(crate) use block_table::{BlockTable, num_shared_blocks};
pub(crate) use cached_prefixes::CachedPrefixes;
pub(crate) use prefix_index::Prefix;
