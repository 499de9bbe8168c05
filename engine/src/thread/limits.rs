//! Owns what bounds every request.

/// What bounds every request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineLimits {
    /// Longest sequence, prompt and output: the smallest of model, configuration and KV cache.
    pub max_model_len: usize,
    /// Ids below this are real tokens.
    pub vocab_size: usize,
    /// Requests that may run and wait together, a probe apart.
    pub max_num_requests: usize,
    /// Of those, requests of one tenant.
    pub max_num_requests_per_tenant: usize,
    /// Tenants there are.
    pub num_tenants: usize,
    /// Bytes of the KV cache.
    pub kv_cache_bytes: usize,
}
