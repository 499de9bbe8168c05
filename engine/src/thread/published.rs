//! Owns all state that the engine thread and other threads share.
//!
//! Invariant: atomics only, so it can be read while the engine hangs in a step. A reader may mix two moments: what is
//! read serves estimates and counts, and nothing that is computed.

pub(super) mod fault;
pub(super) mod load;
pub(super) mod progress;
pub(super) mod waiting_table;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use super::clock::Clock;
use super::limits::EngineLimits;
use crate::config::{EngineConfig, PrefixCaching};
use crate::cost_model::StepBounds;
use crate::kv_cache::CachedPrefixes;
use crate::request::{Request, TenantId};
use fault::PublishedFault;
use load::{PublishedCosts, PublishedRunning};
use waiting_table::{EntryIndex, WaitingTable};

/// State that HTTP workers read while the engine writes it.
#[derive(Debug)]
pub(super) struct Published {
    pub(super) clock: Clock,
    pub(super) limits: EngineLimits,
    pub(super) bounds: StepBounds,
    pub(super) default_deadline: Duration,
    pub(super) honours_priority: bool,
    prefix_caching: PrefixCaching,
    cached_prefixes: Arc<CachedPrefixes>,
    pub(super) accepting: AtomicBool,
    pub(super) alive: AtomicBool,
    pub(super) num_requests: AtomicUsize,
    pub(super) num_requests_of: Box<[AtomicUsize]>,
    pub(super) has_probe: AtomicBool,
    pub(super) num_steps: AtomicU64,
    /// Whether there is work; `progress_at` is valid then.
    pub(super) is_busy: AtomicBool,
    /// Engine time in nanoseconds.
    pub(super) progress_at: AtomicU64,
    pub(super) stall_limit_ns: AtomicU64,
    pub(super) fault: PublishedFault,
    /// Requests refused for their deadline while nothing was there, since the last step.
    pub(super) num_idle_refusals: AtomicU32,
    pub(super) running: PublishedRunning,
    pub(super) table: WaitingTable,
    /// Engine time in nanoseconds at which the next refused request may come again.
    pub(super) next_return_at: AtomicU64,
    pub(super) costs: PublishedCosts,
}

impl Published {
    pub(super) fn new(
        clock: Clock,
        limits: EngineLimits,
        bounds: StepBounds,
        config: &EngineConfig,
        num_blocks: usize,
        cached_prefixes: Arc<CachedPrefixes>,
    ) -> Self {
        Self {
            clock,
            limits,
            bounds,
            default_deadline: config.default_deadline,
            honours_priority: config.honours_priority,
            prefix_caching: config.prefix_caching,
            cached_prefixes,
            accepting: AtomicBool::new(true),
            alive: AtomicBool::new(true),
            num_requests: AtomicUsize::new(0),
            num_requests_of: (0..limits.num_tenants).map(|_| AtomicUsize::new(0)).collect(),
            has_probe: AtomicBool::new(false),
            num_steps: AtomicU64::new(0),
            is_busy: AtomicBool::new(false),
            progress_at: AtomicU64::new(0),
            stall_limit_ns: AtomicU64::new(0),
            fault: PublishedFault::default(),
            num_idle_refusals: AtomicU32::new(0),
            running: PublishedRunning::new(config.max_num_seqs, num_blocks),
            // The probe is not in it.
            table: WaitingTable::new(limits.max_num_requests, &config.tenant_weights),
            next_return_at: AtomicU64::new(0),
            costs: PublishedCosts::default(),
        }
    }

    /// Gives a permit back.
    pub(super) fn release(&self, permit: Permit) {
        match permit {
            Permit::Probe => self.has_probe.store(false, Ordering::Release),
            Permit::Tenant(tenant, entry) => {
                // Whoever takes the permit next finds an entry free.
                entry.into_iter().for_each(|entry| self.table.strike(entry));
                self.num_requests_of[tenant.0 as usize].fetch_sub(1, Ordering::AcqRel);
                self.num_requests.fetch_sub(1, Ordering::AcqRel);
            }
        }
    }

    /// About how many tokens of a request's prompt need not be computed.
    pub(super) fn num_cached_tokens(&self, request: &Request) -> usize {
        let salt = self.prefix_caching.salt(request.tenant);
        salt.map_or(0, |salt| self.cached_prefixes.num_cached_tokens(salt, &request.prompt_token_ids))
    }
}

/// The right to have one request in the engine. The limits on requests count permits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Permit {
    /// The only one for probes.
    Probe,
    /// One of this tenant's, and an entry in the table of those that wait.
    Tenant(TenantId, Option<EntryIndex>),
}

impl Permit {
    /// Its entry.
    pub(super) fn entry(self) -> Option<EntryIndex> {
        match self {
            Self::Probe => None,
            Self::Tenant(_, entry) => entry,
        }
    }
}
