//! Owns admission control: whether a request is valid, what it will find, and whether it gets a permit.
//!
//! Invariant: nothing is refused by an estimate that nothing was learnt for; what is refused is told when it
//! would be accepted, and of a crowd each is told another time.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::limits::EngineLimits;
use super::published::waiting_table::Waiting;
use super::published::{Permit, Published};
use crate::cost_model::{CostModel, Forecast, LengthCurve, NUM_REMEMBERED_ENDS, QueueForecast, RequestWork};
use crate::error::SubmitError;
use crate::queue::{INPUT_COST, OUTPUT_COST};
use crate::request::{PRIORITIES, Request, TenantId};

/// Least time after which a refused request is asked to come again.
const MIN_RETRY_AFTER: Duration = Duration::from_millis(100);
/// When a refused request is asked to come again, until it is learnt how long requests take.
const DEFAULT_RETRY_AFTER: Duration = Duration::from_secs(1);
/// The longest time that a refused request is asked to wait while no reply has ended yet: the estimate is only
/// a bound then.
const MAX_UNLEARNT_RETRY_AFTER: Duration = Duration::from_secs(5);
/// A crowd of refused requests is asked to come within so much time after the first of them could.
const MAX_SPREAD: Duration = Duration::from_secs(60);
/// How much every refusal by an idle engine takes off the next estimate, per cent.
const PERCENT_PER_IDLE_REFUSAL: f64 = 10.0;
/// What is added to the predicted time in the queue, as a part of it: those who were accepted must really be
/// admitted in time.
const MARGIN: f64 = 0.05;
/// How many standard deviations of the sum of random lengths are added besides. Under lasting overload nearly all who
/// are accepted are close to their limit: with one, 0.1 to 0.6 % of them wait in vain.
const NUM_DEVIATIONS: f64 = 2.0;

/// What a request finds that is submitted now.
#[derive(Debug)]
pub(super) struct Outlook {
    /// As others will see it.
    pub(super) waiting: Waiting,
    /// Requests ahead of it.
    pub(super) num_ahead: usize,
    /// `None` until a prompt was computed.
    pub(super) forecast: Option<Forecast>,
    /// Whether a reply has ended yet. If not, the forecast is a bound: each takes its `max_tokens`.
    pub(super) has_lengths: bool,
    /// By how much the forecast of its admission may be off, as a part of it.
    margin: f64,
    /// Time that it takes from others.
    share: Duration,
    pub(super) now: Duration,
}

impl Outlook {
    /// Predicted time to the first token; `None` too while it depends on lengths of replies that are unknown.
    pub(super) fn first_token(&self) -> Option<Duration> {
        let forecast = self.forecast.filter(|forecast| self.has_lengths || !forecast.needs_end)?;
        Some(forecast.first_token)
    }
}

impl Published {
    /// A request as it will wait, of whose prompt so many tokens are cached.
    pub(super) fn waiting(&self, request: &Request, num_cached_tokens: usize) -> Waiting {
        let deadline = request.deadline.unwrap_or(Duration::MAX).min(self.default_deadline);
        Waiting {
            tenant: request.tenant,
            priority: if self.honours_priority { request.priority } else { 0 },
            deadline: self.clock.now().saturating_add(deadline),
            num_cached_tokens,
            num_prefill_tokens: request.prompt_token_ids.len() - num_cached_tokens,
            min_tokens: request.sampling.fewest_tokens(),
            max_tokens: request.sampling.max_tokens,
            num_output_tokens: 0,
        }
    }

    /// What a request finds that is submitted now.
    pub(super) fn outlook(&self, waiting: Waiting) -> Outlook {
        let now = self.clock.now();
        let (costs, lengths) = (self.costs.model(), self.costs.lengths());
        let ahead = self.table.ahead(&waiting, |waiting| charge(&waiting_work(waiting, &lengths)));
        let mut queue = self.queue_forecast(&costs);
        let own = waiting_work(&waiting, &lengths);
        let forecast = queue.as_mut().map(|queue| {
            for waiting in &ahead {
                queue.admit(&waiting_work(waiting, &lengths));
            }
            queue.admit(&own)
        });
        Outlook {
            waiting,
            num_ahead: ahead.len(),
            forecast,
            has_lengths: self.costs.has_lengths(),
            margin: MARGIN + spread(&waiting, &own, ahead.len() + self.running.len(), self.costs.num_ends()),
            share: queue.map_or(Duration::ZERO, |queue| queue.share(&own)),
            now,
        }
    }

    fn queue_forecast<'a>(&'a self, costs: &'a CostModel) -> Option<QueueForecast<'a>> {
        QueueForecast::new(costs, &self.bounds, self.running.capacity(), self.running.running())
    }

    /// Refuses a request that would not be admitted or not begin to be answered in time.
    pub(super) fn check_time(&self, request: &Request, outlook: &Outlook) -> Result<(), SubmitError> {
        self.check_queue_time(request, outlook)?;
        self.check_deadline(request, outlook)
    }

    fn check_queue_time(&self, request: &Request, outlook: &Outlook) -> Result<(), SubmitError> {
        let (Some(limit), Some(forecast)) = (request.max_queue_time, outlook.forecast) else { return Ok(()) };
        let estimate = forecast.admission.mul_f64(1.0 + outlook.margin);
        if estimate <= limit {
            return Ok(());
        }
        let mut wait = estimate.saturating_sub(limit);
        if !outlook.has_lengths {
            wait = wait.min(MAX_UNLEARNT_RETRY_AFTER);
        }
        let retry_after = self.retry_after(outlook.now, wait, outlook.share);
        Err(SubmitError::QueueTimeUnmeetable { estimate, limit, retry_after })
    }

    /// Refuses a request whose deadline can't be met. What is refused teaches nothing, so if nothing
    /// runs, each refusal makes the next one less likely: an estimate that is wrong by far is found
    /// out after a while.
    fn check_deadline(&self, request: &Request, outlook: &Outlook) -> Result<(), SubmitError> {
        let (Some(deadline), Some(estimate)) = (request.deadline, outlook.first_token()) else {
            return Ok(());
        };
        let is_idle = self.num_requests.load(Ordering::Acquire) == 0;
        let num_refusals = if is_idle { self.num_idle_refusals.load(Ordering::Relaxed) } else { 0 };
        let doubt = (1.0 - PERCENT_PER_IDLE_REFUSAL / 100.0).powf(f64::from(num_refusals));
        if estimate.as_secs_f64() * doubt <= deadline.as_secs_f64() {
            return Ok(());
        }
        if is_idle {
            self.num_idle_refusals.fetch_add(1, Ordering::Relaxed);
        }
        let wait = estimate.saturating_sub(deadline);
        let retry_after = self.retry_after(outlook.now, wait, outlook.share);
        Err(SubmitError::DeadlineUnmeetable { estimate, retry_after })
    }

    /// Takes a permit for a request that is to wait.
    pub(super) fn take(&self, waiting: &Waiting) -> Result<Permit, SubmitError> {
        let tenant = waiting.tenant;
        let take = |count: &AtomicUsize, max: usize| {
            let more = |count: usize| (count < max).then_some(count + 1);
            count.fetch_update(Ordering::AcqRel, Ordering::Acquire, more)
        };
        let own = &self.num_requests_of[tenant.0 as usize];
        take(own, self.limits.max_num_requests_per_tenant).map_err(|count| self.queue_full(count))?;
        take(&self.num_requests, self.limits.max_num_requests).map_err(|count| {
            own.fetch_sub(1, Ordering::AcqRel);
            self.queue_full(count)
        })?;
        Ok(Permit::Tenant(tenant, self.table.enter(waiting)))
    }

    /// All permits are taken. A refused request is told when one will be given back and, once the lengths of replies are
    /// known, each of a crowd is told the end of another reply.
    pub(super) fn queue_full(&self, num_requests: usize) -> SubmitError {
        let costs = self.costs.model();
        let mut queue = self.queue_forecast(&costs);
        let first_end = queue.as_ref().and_then(QueueForecast::first_end).unwrap_or(DEFAULT_RETRY_AFTER);
        let (wait, share) = if self.costs.has_lengths() {
            (first_end, queue.as_mut().map_or(Duration::ZERO, |queue| self.mean_share(queue)))
        } else {
            (first_end.min(DEFAULT_RETRY_AFTER), Duration::ZERO)
        };
        let retry_after = self.retry_after(self.clock.now(), wait, share);
        SubmitError::QueueFull { num_requests, retry_after }
    }

    /// What a request takes from all others, on average over those that run and wait: as often one of them ends. The
    /// engine may not have begun with a crowd that has just come, so those that wait are admitted to `queue` first.
    fn mean_share(&self, queue: &mut QueueForecast<'_>) -> Duration {
        let lengths = self.costs.lengths();
        let last = Waiting {
            tenant: TenantId(0),
            priority: *PRIORITIES.end(),
            deadline: Duration::MAX,
            num_cached_tokens: 0,
            num_prefill_tokens: 0,
            min_tokens: 0,
            max_tokens: 0,
            num_output_tokens: 0,
        };
        let waiting = self.table.ahead(&last, |waiting| charge(&waiting_work(waiting, &lengths)));
        let waiting = waiting.iter().map(|waiting| waiting_work(waiting, &lengths));
        let (mut num_requests, mut num_output_tokens) = (0, 0.0);
        for work in waiting {
            queue.admit(&work);
            (num_requests, num_output_tokens) =
                (num_requests + 1, num_output_tokens + work.num_output_tokens);
        }
        for work in self.running.running() {
            (num_requests, num_output_tokens) =
                (num_requests + 1, num_output_tokens + work.num_output_tokens);
        }
        num_output_tokens /= f64::from(num_requests.max(1));
        queue.share(&RequestWork { num_output_tokens, ..RequestWork::default() })
    }

    /// When a request of this share is asked to come again that would be accepted in `wait`: behind those
    /// that were told before, or they would all come at once and be refused again.
    fn retry_after(&self, now: Duration, wait: Duration, share: Duration) -> Duration {
        let nanos = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let first = nanos(now.saturating_add(wait.max(MIN_RETRY_AFTER)));
        let last = first.saturating_add(nanos(MAX_SPREAD));
        let place = |next: u64| if (first..last).contains(&next) { next } else { first };
        let taken = |next: u64| Some(place(next).saturating_add(nanos(share)));
        let next = self.next_return_at.fetch_update(Ordering::Relaxed, Ordering::Relaxed, taken);
        let at = place(next.unwrap_or_else(|next| next));
        Duration::from_nanos(at).saturating_sub(now)
    }
}

/// By how much the sum of so many lengths may differ from what is expected, as a part of it: not at all where each
/// takes its `max_tokens`. Besides, their mean is known only as well as from the replies that have ended.
fn spread(waiting: &Waiting, work: &RequestWork, num_requests: usize, num_ends: u32) -> f64 {
    let is_bound = work.num_output_tokens > 0.95 * waiting.max_tokens as f64;
    let num_ends = f64::from(num_ends).min(NUM_REMEMBERED_ENDS);
    let variance = (num_requests as f64 + 1.0).recip() + (num_ends + 1.0).recip();
    if is_bound { 0.0 } else { NUM_DEVIATIONS * variance.sqrt() }
}

/// What others must wait for, of a request that waits.
pub(super) fn waiting_work(waiting: &Waiting, lengths: &LengthCurve) -> RequestWork {
    let Waiting { num_cached_tokens, num_prefill_tokens, num_output_tokens, .. } = *waiting;
    let least = waiting.min_tokens.saturating_sub(num_output_tokens);
    let most = waiting.max_tokens.saturating_sub(num_output_tokens);
    RequestWork {
        num_cached_tokens,
        num_held_tokens: 0,
        num_prefill_tokens,
        num_output_tokens: lengths.expected(num_output_tokens, least, most),
    }
}

/// What a tenant is charged for a request, about.
fn charge(work: &RequestWork) -> f64 {
    INPUT_COST as f64 * work.num_prefill_tokens as f64 + OUTPUT_COST as f64 * work.num_output_tokens
}

/// Refuses a request that the limits exclude, whatever else is there.
pub(super) fn check_request(request: &Request, limits: &EngineLimits) -> Result<(), SubmitError> {
    let invalid = |message: String| SubmitError::InvalidParameter { field: "prompt", message };
    request.sampling.validate(limits.vocab_size)?;
    if !PRIORITIES.contains(&request.priority) {
        let message = format!("must be from {} to {}", PRIORITIES.start(), PRIORITIES.end());
        return Err(SubmitError::InvalidParameter { field: "priority", message });
    }
    if request.tenant.0 as usize >= limits.num_tenants {
        let message = format!("must be below {}", limits.num_tenants);
        return Err(SubmitError::InvalidParameter { field: "tenant", message });
    }
    let prompt = &request.prompt_token_ids;
    if prompt.is_empty() {
        return Err(invalid("has no tokens".into()));
    }
    // Before the tokens are looked at: the limit bounds that, too.
    let num_tokens = prompt.len().saturating_add(request.sampling.max_tokens);
    if num_tokens > limits.max_model_len {
        return Err(SubmitError::TooLong { num_tokens, limit: limits.max_model_len });
    }
    if let Some(id) = prompt.iter().find(|&&id| id as usize >= limits.vocab_size) {
        return Err(invalid(format!("token id {id} is not below {}", limits.vocab_size)));
    }
    Ok(())
}
