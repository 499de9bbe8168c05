//! Owns a request's life inside the engine.
//!
//! Invariant: ownership is state. A [`WaitingSequence`] has no blocks, a [`RunningSequence`] owns a
//! block table, and the transitions consume the one to make the other. There are no phases:
//! `num_computed_tokens` catches up with the number of tokens, then one more is sampled.

use std::collections::HashMap;
use std::time::Duration;

use crate::draft::Drafter;
use crate::kv_cache::{BlockPool, BlockTable};
use crate::request::{Request, RequestId, TenantId};
use crate::sampling_params::SamplingParams;

/// Tokens and options of one request.
#[derive(Debug)]
pub struct Sequence {
    /// Its name; older requests have smaller ones.
    pub id: RequestId,
    /// Prompt and output.
    tokens: Vec<u32>,
    num_prompt_tokens: usize,
    /// Every token seen, with its occurrences in the output; empty unless a penalty needs it.
    output_counts: HashMap<u32, u32>,
    /// How to sample.
    pub sampling: SamplingParams,
    /// Whose it is.
    pub tenant: TenantId,
    /// A lower one is admitted first.
    pub priority: i32,
    /// Engine time of arrival.
    pub arrival: Duration,
    /// Engine time by which its first token is wanted.
    pub deadline: Duration,
    /// Whether it is a known-answer request, which goes before all others.
    pub is_probe: bool,
    /// Whether it has no reader at the moment.
    pub is_detached: bool,
    /// Engine time until which it lets attached sequences go before it while it waits detached.
    pub yields_until: Duration,
    /// Whether it waits and lets them go before it; the queue says so.
    pub is_yielding: bool,
    /// Tokens it had when it last got blocks.
    num_tokens_at_admission: usize,
    /// Its number among all admitted sequences, from its first admission on. Preemption keeps it.
    pub admission: Option<u64>,
    /// Prompt tokens computed at least once: recomputation does not count again.
    pub num_reported_prompt_tokens: usize,
    /// Tokens that its tenant was charged for, cached ones of the prompt included.
    pub num_charged_tokens: usize,
    /// What it may say next.
    pub drafter: Drafter,
}

impl Sequence {
    /// Takes over a request that was submitted at `arrival`.
    pub fn new(id: RequestId, request: Request, arrival: Duration) -> Self {
        let Request { prompt_token_ids: mut tokens, sampling, deadline, tenant, priority, .. } = request;
        let num_prompt_tokens = tokens.len();
        tokens.reserve_exact(sampling.max_tokens);
        let mut output_counts = HashMap::new();
        if sampling.has_penalties() {
            output_counts.extend(tokens.iter().map(|&id| (id, 0)));
        }
        Self {
            id,
            tokens,
            num_prompt_tokens,
            output_counts,
            sampling,
            tenant,
            priority,
            arrival,
            deadline: arrival.saturating_add(deadline.unwrap_or(Duration::MAX)),
            is_probe: false,
            is_detached: false,
            yields_until: Duration::MAX,
            is_yielding: false,
            num_tokens_at_admission: num_prompt_tokens,
            admission: None,
            num_reported_prompt_tokens: 0,
            num_charged_tokens: 0,
            drafter: Drafter::default(),
        }
    }

    /// Prompt and output so far.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Tokens of the prompt.
    pub fn num_prompt_tokens(&self) -> usize {
        self.num_prompt_tokens
    }

    /// The output so far.
    pub fn output(&self) -> &[u32] {
        &self.tokens[self.num_prompt_tokens..]
    }

    /// Lets the drafter read what is new. Allocates the first time.
    pub fn read_for_drafts(&mut self) {
        self.drafter.read(&self.tokens, self.num_prompt_tokens + self.sampling.max_tokens);
    }

    /// How many draft tokens to check, at most `most`, at this price of one.
    pub fn num_drafts(&mut self, price: f64, most: usize) -> usize {
        // The last token that it may generate has no row after it.
        let left = self.sampling.max_tokens.saturating_sub(self.output().len());
        self.read_for_drafts();
        self.drafter.num_tokens(price, most.min(left.saturating_sub(1)))
    }

    /// Whether the next token is chosen from logits as they are: no penalty, bias or ban applies.
    pub fn takes_plain_logits(&self) -> bool {
        let params = &self.sampling;
        params.logit_bias.is_empty() && !params.has_penalties() && self.output().len() >= params.min_tokens
    }

    /// Appends a sampled token.
    pub fn push(&mut self, token_id: u32) {
        self.tokens.push(token_id);
        if self.sampling.has_penalties() {
            *self.output_counts.entry(token_id).or_insert(0) += 1;
        }
    }

    /// Every token of prompt and output, with its occurrences in the output; empty without penalties.
    pub fn output_counts(&self) -> impl Iterator<Item = (u32, u32)> {
        self.output_counts.iter().map(|(&id, &count)| (id, count))
    }
}

/// A sequence in the queue.
#[derive(Debug)]
pub struct WaitingSequence(pub Sequence);

impl WaitingSequence {
    /// Starts it, with an empty table. `next_admission` is its number among all admitted sequences if
    /// it has none.
    pub fn admit(mut self, block_table: BlockTable, next_admission: u64) -> RunningSequence {
        self.0.admission.get_or_insert(next_admission);
        self.0.num_tokens_at_admission = self.0.tokens.len();
        RunningSequence {
            sequence: self.0,
            num_computed_tokens: 0,
            num_planned_tokens: 0,
            num_draft_tokens: 0,
            block_table,
        }
    }
}

/// A sequence that owns blocks.
#[derive(Debug)]
pub struct RunningSequence {
    /// The tokens.
    pub sequence: Sequence,
    /// Tokens whose keys and values are in the cache.
    pub num_computed_tokens: usize,
    /// Known tokens in the step that is planned.
    pub num_planned_tokens: usize,
    /// Draft tokens after them.
    pub num_draft_tokens: usize,
    /// Where they are.
    pub block_table: BlockTable,
}

impl RunningSequence {
    /// Order of the running list, from whom nobody preempts to who goes first: the probe, attached
    /// sequences in order of first admission, detached ones in the same order.
    pub fn precedence(&self) -> (bool, bool, u64) {
        let sequence = &self.sequence;
        (!sequence.is_probe, sequence.is_detached, sequence.admission.unwrap_or(u64::MAX))
    }

    /// Tokens that are known and not computed; at least 1 between two steps.
    pub fn num_pending_tokens(&self) -> usize {
        self.sequence.tokens.len() - self.num_computed_tokens
    }

    /// Gives the blocks up; everything will be computed again. If it gained a token from them, it may yield
    /// to others once more, until `yields_until`.
    pub fn preempt(mut self, pool: &mut BlockPool, yields_until: Duration) -> WaitingSequence {
        self.block_table.release(pool);
        if self.sequence.tokens.len() > self.sequence.num_tokens_at_admission {
            self.sequence.yields_until = yields_until;
        }
        WaitingSequence(self.sequence)
    }
}
