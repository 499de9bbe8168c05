//! Owns the state that HTTP workers and the engine thread share.
//!
//! Invariant: atomics only, so it can be read while the engine hangs in a step.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use super::Clock;
use super::fault::PublishedFault;
use super::handle::EngineLimits;
use super::load::{PublishedCosts, PublishedLoad};
use crate::config::{EngineConfig, PrefixCaching};
use crate::cost_model::{Load, StepBounds};
use crate::error::SubmitError;
use crate::kv_cache::CachedPrefixes;
use crate::request::{Request, TenantId};

/// Least time after which a refused request is asked to come again.
const MIN_RETRY_AFTER: Duration = Duration::from_millis(100);
/// When a refused request is asked to come again, until it is learnt how long requests take.
const DEFAULT_RETRY_AFTER: Duration = Duration::from_secs(1);
/// How much every refusal by an idle engine takes off the next estimate, per cent.
const PERCENT_PER_IDLE_REFUSAL: f64 = 10.0;

/// State that HTTP workers read while the engine writes it.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) clock: Clock,
    pub(super) limits: EngineLimits,
    pub(super) bounds: StepBounds,
    default_deadline: Duration,
    prefix_caching: PrefixCaching,
    cached_prefixes: Arc<CachedPrefixes>,
    pub(super) accepting: AtomicBool,
    pub(super) alive: AtomicBool,
    pub(super) num_requests: AtomicUsize,
    num_requests_of: Box<[AtomicUsize]>,
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
    pub(super) load: PublishedLoad,
    pub(super) costs: PublishedCosts,
}

impl Shared {
    pub(super) fn new(
        clock: Clock,
        limits: EngineLimits,
        bounds: StepBounds,
        config: &EngineConfig,
        cached_prefixes: Arc<CachedPrefixes>,
    ) -> Self {
        Self {
            clock,
            limits,
            bounds,
            default_deadline: config.default_deadline,
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
            load: PublishedLoad::new(limits.num_tenants),
            costs: PublishedCosts::default(),
        }
    }

    /// Takes a place for a request of `tenant`.
    pub(super) fn take(&self, tenant: TenantId) -> Result<Place, SubmitError> {
        let take = |count: &AtomicUsize, max: usize| {
            let more = |count: usize| (count < max).then_some(count + 1);
            count.fetch_update(Ordering::AcqRel, Ordering::Acquire, more)
        };
        let own = &self.num_requests_of[tenant.0 as usize];
        take(own, self.limits.max_num_requests_per_tenant).map_err(|count| self.queue_full(count, tenant))?;
        take(&self.num_requests, self.limits.max_num_requests).map_err(|count| {
            own.fetch_sub(1, Ordering::AcqRel);
            self.queue_full(count, tenant)
        })?;
        Ok(Place::Tenant(tenant))
    }

    /// Gives a request's place back.
    pub(super) fn release(&self, place: Place) {
        match place {
            Place::Probe => self.has_probe.store(false, Ordering::Release),
            Place::Tenant(tenant) => {
                self.num_requests_of[tenant.0 as usize].fetch_sub(1, Ordering::AcqRel);
                self.num_requests.fetch_sub(1, Ordering::AcqRel);
            }
        }
    }

    /// What a request of `tenant` finds that is submitted now.
    pub(super) fn load(&self, deadline: Option<Duration>, tenant: TenantId) -> Load {
        self.load.load(deadline.unwrap_or(Duration::MAX).min(self.default_deadline), tenant)
    }

    /// About how many tokens of a request's prompt need not be computed.
    pub(super) fn num_cached_tokens(&self, request: &Request) -> usize {
        let salt = self.prefix_caching.salt(request.tenant);
        salt.map_or(0, |salt| self.cached_prefixes.num_cached_tokens(salt, &request.prompt_token_ids))
    }

    /// Predicted time to the first token of a request submitted now.
    pub(super) fn estimate(
        &self,
        num_cached_tokens: usize,
        num_tokens: usize,
        deadline: Option<Duration>,
        tenant: TenantId,
    ) -> Option<Duration> {
        let load = self.load(deadline, tenant);
        self.costs.model().time_to_first_token(&load, num_cached_tokens, num_tokens, &self.bounds)
    }

    /// Refuses a request whose deadline can't be met. What is refused teaches nothing, so if nothing
    /// runs, each refusal makes the next one less likely: an estimate that is wrong by far is found
    /// out after a while.
    pub(super) fn check_deadline(
        &self,
        request: &Request,
        num_cached_tokens: usize,
    ) -> Result<(), SubmitError> {
        let Some(deadline) = request.deadline else { return Ok(()) };
        let num_tokens = request.prompt_token_ids.len() - num_cached_tokens;
        let estimate = self.estimate(num_cached_tokens, num_tokens, Some(deadline), request.tenant);
        let Some(estimate) = estimate else { return Ok(()) };
        let is_idle = self.num_requests.load(Ordering::Acquire) == 0;
        let num_refusals = if is_idle { self.num_idle_refusals.load(Ordering::Relaxed) } else { 0 };
        let doubt = (1.0 - PERCENT_PER_IDLE_REFUSAL / 100.0).powf(f64::from(num_refusals));
        if estimate.as_secs_f64() * doubt <= deadline.as_secs_f64() {
            return Ok(());
        }
        if is_idle {
            self.num_idle_refusals.fetch_add(1, Ordering::Relaxed);
        }
        let retry_after = estimate.saturating_sub(deadline).max(MIN_RETRY_AFTER);
        Err(SubmitError::DeadlineUnmeetable { estimate, retry_after })
    }

    pub(super) fn queue_full(&self, num_requests: usize, tenant: TenantId) -> SubmitError {
        let num_slots = self.load(None, tenant).num_slots;
        let retry_after = self.costs.model().time_between_ends(num_slots);
        let retry_after = retry_after.map_or(DEFAULT_RETRY_AFTER, |time| time.max(MIN_RETRY_AFTER));
        SubmitError::QueueFull { num_requests, retry_after }
    }
}

/// What a request occupies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// The only one for probes.
    Probe,
    /// One of this tenant's.
    Tenant(TenantId),
}
