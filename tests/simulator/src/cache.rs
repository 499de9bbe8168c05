//! Owns the prefix cache's promises, restated from requests and replies: what may be found in it.
//!
//! Must not know hashes or blocks.

use std::collections::BTreeMap;

use glm_engine::{PrefixCaching, Request, RequestId, TenantId, TokenEvent};

/// Watches the requests of one engine.
#[derive(Debug)]
pub struct CacheCheck {
    caching: PrefixCaching,
    block_size: usize,
    /// Prompt and reply so far of every request.
    seen: BTreeMap<RequestId, (TenantId, Vec<u32>)>,
    /// Tokens found.
    pub num_cached_tokens: usize,
}

impl CacheCheck {
    /// A check of an engine with this configuration.
    pub fn new(caching: PrefixCaching, block_size: usize) -> Self {
        Self { caching, block_size, seen: BTreeMap::new(), num_cached_tokens: 0 }
    }

    /// A request was queued; probes take no part and are not to be added.
    pub fn add(&mut self, id: RequestId, request: &Request) {
        self.seen.insert(id, (request.tenant, request.prompt_token_ids.clone()));
    }

    /// Prompt and reply so far of a random request: the start of the next turn of a chat.
    pub fn history(&self, index: usize) -> Option<&[u32]> {
        self.seen.values().nth(index % self.seen.len().max(1)).map(|(_, tokens)| tokens.as_slice())
    }

    /// Takes an event of a step.
    ///
    /// # Errors
    /// More was found than anybody can have computed for this request.
    pub fn event(&mut self, id: RequestId, event: &TokenEvent) -> Result<(), String> {
        match (event, self.seen.get_mut(&id)) {
            (TokenEvent::Token { token_id }, Some((_, tokens))) => tokens.push(*token_id),
            (&TokenEvent::Admitted { num_cached_tokens: found }, seen) => {
                let most = if seen.is_some() { self.most_cached(id) } else { 0 };
                if found > most || !found.is_multiple_of(self.block_size) {
                    return Err(format!("{found} tokens of {id:?} are cached, {most} can be"));
                }
                self.num_cached_tokens += found;
            }
            _ => {}
        }
        Ok(())
    }

    fn most_cached(&self, id: RequestId) -> usize {
        let (tenant, prompt) = &self.seen[&id];
        let others = self.seen.iter().filter(|(other, (owner, _))| {
            **other != id
                && match self.caching {
                    PrefixCaching::Off => false,
                    PrefixCaching::Shared => true,
                    PrefixCaching::PerTenant => owner == tenant,
                }
        });
        let common = |tokens: &[u32]| prompt.iter().zip(tokens).take_while(|(a, b)| a == b).count();
        let most = others.map(|(_, (_, tokens))| common(tokens)).max().unwrap_or(0);
        most.min(prompt.len() - 1)
    }
}
