//! Owns a runner without a model: a test double that still needs the paged cache to be right.
//!
//! It stores token ids by slot and derives the next token from the history that it reads back
//! through the block table, so a wrong block, slot or length changes the text.

use ndarray::{Array2, s};

use super::{KvCacheLayout, ModelRunner};
use crate::error::RunError;
use crate::step::{Candidates, Logits, StepOutput, StepPlan};

/// A reply of this makes the row of logits one that is not a number.
pub const NOT_FINITE: u32 = u32::MAX;

/// What follows a history of token ids.
pub type Reply = Box<dyn FnMut(&[u32]) -> Result<u32, RunError> + Send>;

/// The double.
pub struct FakeRunner {
    layout: KvCacheLayout,
    slots: Vec<Option<u32>>,
    logits: Array2<f32>,
    history: Vec<u32>,
    reply: Reply,
    /// How many of a row's best tokens are handed out beside it.
    num_candidates: usize,
    candidate_ids: Array2<i32>,
    candidate_values: Array2<f32>,
    logsumexp: Vec<f32>,
}

impl std::fmt::Debug for FakeRunner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FakeRunner").field("layout", &self.layout).finish_non_exhaustive()
    }
}

impl FakeRunner {
    /// A runner whose next token is a hash of the whole history.
    pub fn hashing(vocab_size: usize, num_blocks: usize, block_size: usize) -> Self {
        let reply = move |history: &[u32]| Ok((hash(history) % vocab_size as u64) as u32);
        Self::scripted(vocab_size, num_blocks, block_size, Box::new(reply))
    }

    /// Like `hashing`, but mostly of the last token only: it falls into loops, and out of them.
    pub fn repeating(vocab_size: usize, num_blocks: usize, block_size: usize) -> Self {
        let reply = move |history: &[u32]| {
            let whole = hash(history);
            let leaves = whole.is_multiple_of(16);
            let next = if leaves { whole } else { hash(&history[history.len().saturating_sub(1)..]) };
            Ok((next % vocab_size as u64) as u32)
        };
        Self::scripted(vocab_size, num_blocks, block_size, Box::new(reply))
    }

    /// A runner whose next token `reply` chooses; an error fails the whole step.
    pub fn scripted(vocab_size: usize, num_blocks: usize, block_size: usize, reply: Reply) -> Self {
        let num_slots = num_blocks * block_size;
        Self {
            layout: KvCacheLayout { num_blocks, block_size, num_bytes: num_slots * size_of::<u32>() },
            slots: vec![None; num_slots],
            logits: Array2::zeros((0, vocab_size)),
            history: Vec::new(),
            reply,
            num_candidates: 0,
            candidate_ids: Array2::zeros((0, 0)),
            candidate_values: Array2::zeros((0, 0)),
            logsumexp: Vec::new(),
        }
    }

    /// The same runner, which hands out the best tokens of each row too, as graphs for a GPU do.
    #[must_use]
    pub fn with_candidates(self, num_candidates: usize) -> Self {
        Self { num_candidates, ..self }
    }

    /// The next token after `history`, as the runner itself would choose it.
    ///
    /// # Errors
    /// Whatever the script answers.
    pub fn reply(&mut self, history: &[u32]) -> Result<u32, RunError> {
        (self.reply)(history)
    }

    fn find_candidates(&mut self, num_rows: usize) {
        let num = self.num_candidates.min(self.logits.ncols());
        self.candidate_ids = Array2::zeros((num_rows, num));
        self.candidate_values = Array2::zeros((num_rows, num));
        self.logsumexp.clear();
        for (row, logits) in self.logits.rows().into_iter().take(num_rows).enumerate() {
            let mut ids: Vec<usize> = (0..logits.len()).collect();
            ids.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
            for (column, &id) in ids.iter().take(num).enumerate() {
                self.candidate_ids[(row, column)] = id as i32;
                self.candidate_values[(row, column)] = logits[id];
            }
            let sum: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
            self.logsumexp.push(sum.ln() as f32);
        }
    }

    /// Reads a sequence's first `num_tokens` tokens back through its row of the block table.
    fn read_back(&mut self, blocks: &[i32], num_tokens: usize) -> Result<(), RunError> {
        let block_size = self.layout.block_size;
        self.history.clear();
        for position in 0..num_tokens {
            let slot = blocks[position / block_size] as usize * block_size + position % block_size;
            let token =
                self.slots[slot].ok_or_else(|| RunError::new(format!("slot {slot} was never written")))?;
            self.history.push(token);
        }
        Ok(())
    }
}

impl ModelRunner for FakeRunner {
    fn kv_cache(&self) -> KvCacheLayout {
        self.layout
    }

    fn run(&mut self, plan: &StepPlan) -> Result<StepOutput<'_>, RunError> {
        for (&slot, &token) in plan.slot_mapping.iter().zip(&plan.token_ids) {
            self.slots[slot as usize] = Some(token as u32);
        }
        let num_rows = plan.logits_indices.len();
        if self.logits.nrows() < num_rows {
            self.logits = Array2::zeros((num_rows, self.logits.ncols()));
        }
        for (index, scheduled) in plan.sequences.iter().enumerate() {
            let rows = scheduled.logits_rows();
            if rows.is_empty() {
                continue;
            }
            let blocks = &plan.block_table[index * plan.max_num_blocks..][..plan.max_num_blocks];
            self.read_back(blocks, scheduled.num_computed_tokens + scheduled.num_scheduled_tokens)?;
            for (row, num_after) in rows.clone().zip((0..rows.len()).rev()) {
                let history = &self.history[..self.history.len() - num_after];
                let next = (self.reply)(history)?;
                // Every token has a weight, so that sampling has something to choose from.
                let seed = hash(history);
                for (id, logit) in self.logits.row_mut(row).iter_mut().enumerate() {
                    *logit = (hash(&[seed as u32, id as u32]) % 1024) as f32 / 512.0;
                }
                match next {
                    NOT_FINITE => self.logits.row_mut(row).fill(f32::NAN),
                    next => self.logits[(row, next as usize)] = 8.0,
                }
            }
        }
        let candidates = (self.num_candidates > 0).then(|| self.find_candidates(num_rows));
        let logits = Logits::Here(self.logits.slice(s![..num_rows, ..]));
        let candidates = candidates.map(|()| Candidates {
            ids: self.candidate_ids.view(),
            values: self.candidate_values.view(),
            logsumexp: &self.logsumexp,
        });
        Ok(StepOutput { candidates, logits })
    }
}

/// FNV-1a over the ids, then mixed.
fn hash(tokens: &[u32]) -> u64 {
    let hash = tokens.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, &token| {
        (hash ^ u64::from(token)).wrapping_mul(0x0100_0000_01b3)
    });
    (hash ^ (hash >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 16
}
