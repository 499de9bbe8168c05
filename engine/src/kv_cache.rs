//! Owns which KV block belongs to whom. The memory itself belongs to the runner.

pub mod block_pool;
pub mod block_table;
pub mod cached_prefixes;
pub mod lru_list;
pub mod prefix_index;

pub use block_pool::{BlockId, BlockPool};
pub use block_table::{BlockTable, num_shared_blocks};
pub use cached_prefixes::CachedPrefixes;
pub use prefix_index::Prefix;
