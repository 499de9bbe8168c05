//! Owns the steps that were seen, by kind, and the costs that explain them best.
//!
//! Plain data, fixed in size. Invariant: a kind of step is remembered until it is seen again, however many
//! of another kind come between; where two kinds contradict each other, the one seen last counts for more.

use super::StepWork;

/// Costs of a step, of a decoded token, of a token of a prompt and of a pair of tokens, in seconds.
pub(super) type Costs = [f64; NUM_COSTS];

const NUM_COSTS: usize = 4;
const BASE: usize = 0;
const DECODE: usize = 1;
const PREFILL: usize = 2;
const PAIR: usize = 3;

/// Kinds differ by a factor of two in tokens of prompts or in decodes.
const NUM_PREFILL_KINDS: usize = 13;
const NUM_DECODE_KINDS: usize = 9;

/// Weight of a new observation among those of its kind, once there are some.
const LEARNING_RATE: f64 = 0.2;
/// An observation counts at most as this many times what was predicted: a hiccup of the machine
/// moves the costs a little, a lasting change moves them within a few steps.
const MOST_SURPRISE: f64 = 4.0;
/// A prediction below this is no measure of surprise.
const LEAST_PREDICTION_S: f64 = 1e-3;
/// While few steps of a kind were seen: one that takes less than this part of what they took shows that something
/// else had held those up, for nothing makes a step faster than it is.
const HELD_UP: f64 = 1.0 / 3.0;
/// After so many steps of a kind in a row that were such a surprise, none is a hiccup.
const NUM_SURPRISES: u32 = 2;
/// Steps after which a kind that was not seen again weighs half as much.
const HALF_LIFE: f64 = 40.0;
const LEAST_WEIGHT: f64 = 1e-4;
/// Weight of what is supposed beside what was seen, and of what keeps a cost that nothing decides small.
const SUPPOSED_WEIGHT: f64 = 2.0;
const SMALLNESS_WEIGHT: f64 = 0.03;

/// What a step is expected to be off by, as a part of its time.
const NOISE: f64 = 0.05;
/// A decoded token's products are those of a token of a prompt, and it is sampled too: what is supposed until
/// steps of several decodes were seen.
const DECODE_PER_PREFILL: f64 = 1.5;
/// By how many times their noise steps must contradict that.
const CONTRADICTION: f64 = 4.0;
/// Pairs that are supposed to weigh as much as a token, at most.
const PAIRS_PER_TOKEN: f64 = 1024.0;
/// The least cost of a token, as a part of a step's, with which something else is supposed.
const LEAST_TOKEN: f64 = 1e-3;

/// The latest steps of one kind: weighted means.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Kind {
    num_steps: u32,
    seen_at: u32,
    /// The latest steps in a row that took far longer than predicted.
    num_surprises: u32,
    work: [f64; NUM_COSTS],
    seconds: f64,
}

/// The latest steps of each kind.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct StepFit {
    num_steps: u32,
    /// Empty until a step was seen.
    kinds: Vec<Kind>,
}

impl StepFit {
    /// A step took `seconds`; returns what costs explain it and the others, `costs` being those so far.
    pub(super) fn observe(&mut self, work: &StepWork, seconds: f64, costs: &Costs) -> Costs {
        self.num_steps = self.num_steps.saturating_add(1);
        self.kinds.resize(NUM_PREFILL_KINDS * NUM_DECODE_KINDS, Kind::default());
        let index = power_of_two(work.num_prefill_tokens).min(NUM_PREFILL_KINDS - 1) * NUM_DECODE_KINDS
            + power_of_two(work.num_decodes).min(NUM_DECODE_KINDS - 1);
        let kind = &mut self.kinds[index];
        kind.num_steps = kind.num_steps.saturating_add(1);
        let outdated = 1.0 - (-f64::from(self.num_steps - kind.seen_at) / HALF_LIFE).exp2();
        kind.seen_at = self.num_steps;
        let work = terms(work);
        let predicted = dot(costs, &work);
        let most = MOST_SURPRISE * predicted.max(LEAST_PREDICTION_S);
        kind.num_surprises = if seconds > most { kind.num_surprises + 1 } else { 0 };
        let is_believed = kind.num_surprises >= NUM_SURPRISES;
        let mean_rate = (1.0 / f64::from(kind.num_steps)).max(LEARNING_RATE);
        let mut rate = mean_rate.max(outdated);
        let mut seconds = seconds;
        if mean_rate > LEARNING_RATE && seconds < HELD_UP * kind.seconds || is_believed {
            rate = 1.0;
        } else if mean_rate <= LEARNING_RATE {
            seconds = seconds.min(most);
        }
        let towards = |mean: &mut f64, value: f64| *mean += rate * (value - *mean);
        kind.work.iter_mut().zip(work).for_each(|(mean, value)| towards(mean, value));
        towards(&mut kind.seconds, seconds);
        if is_believed {
            let slow = *kind;
            self.forget_faster(&slow);
        }
        self.solve(costs)
    }

    /// Forgets the kinds that take far less than the steps of `slow` imply: with costs that are not negative, a
    /// part of a step's work takes at least that part of its time. Relative errors of short steps weigh so much that
    /// a machine that has become slower would not be believed for long.
    fn forget_faster(&mut self, slow: &Kind) {
        let is_outdated = |kind: &Kind| {
            let parts = kind.work.iter().zip(slow.work).filter(|(_, slow_work)| *slow_work > 0.0);
            let part = parts.map(|(work, slow_work)| work / slow_work).fold(1.0, f64::min);
            kind.num_steps > 0 && kind.seconds * MOST_SURPRISE < part * slow.seconds
        };
        self.kinds.iter_mut().filter(|kind| is_outdated(kind)).for_each(|kind| *kind = Kind::default());
    }

    /// The least squares of relative errors over all kinds, none of the costs negative.
    fn solve(&self, costs: &Costs) -> Costs {
        let mut equations = Equations::default();
        let (mut shortest, mut shortest_prefill, mut shortest_decode) =
            (f64::INFINITY, f64::INFINITY, f64::INFINITY);
        for kind in self.kinds.iter().filter(|kind| kind.num_steps > 0) {
            let age = f64::from(self.num_steps - kind.seen_at);
            let weight = (-age / HALF_LIFE).exp2().max(LEAST_WEIGHT);
            let seconds = kind.seconds.max(1e-9);
            shortest = shortest.min(seconds);
            if kind.work[PREFILL] > 0.0 {
                shortest_prefill = shortest_prefill.min(seconds);
            }
            if kind.work[DECODE] > 0.0 {
                shortest_decode = shortest_decode.min(seconds / kind.work[DECODE]);
            }
            equations.add(kind.work, kind.seconds, weight / (NOISE * seconds).powi(2));
        }
        // What nothing seen decides is as supposed.
        let token_s = costs[PREFILL].max(LEAST_TOKEN * shortest);
        let weight = |deviation_s: f64| SMALLNESS_WEIGHT / deviation_s.powi(2);
        equations.add(unit(&[(PAIR, 1.0)]), 0.0, weight(token_s / PAIRS_PER_TOKEN));
        let prefill_s = if shortest_prefill.is_finite() { shortest_prefill } else { shortest };
        equations.add(unit(&[(PREFILL, 1.0)]), 0.0, weight(prefill_s));
        equations.add(unit(&[(BASE, 1.0)]), 0.0, weight(100.0 * shortest));
        let mut deviation_s = token_s;
        if shortest_decode.is_finite() {
            // Steps that contradict what is supposed by more than their noise are believed.
            let seen = equations.solve();
            let contradiction_s = (seen[DECODE] - DECODE_PER_PREFILL * seen[PREFILL]).abs();
            deviation_s += (contradiction_s - CONTRADICTION * NOISE * shortest_decode).max(0.0);
        }
        let supposed = unit(&[(DECODE, 1.0), (PREFILL, -DECODE_PER_PREFILL)]);
        equations.add(supposed, 0.0, SUPPOSED_WEIGHT / deviation_s.powi(2));
        equations.solve()
    }
}

/// Weighted equations of the costs.
#[derive(Debug, Default)]
struct Equations {
    matrix: [[f64; NUM_COSTS]; NUM_COSTS],
    vector: Costs,
}

impl Equations {
    fn add(&mut self, row: [f64; NUM_COSTS], value: f64, weight: f64) {
        for i in 0..NUM_COSTS {
            (0..NUM_COSTS).for_each(|j| self.matrix[i][j] += weight * row[i] * row[j]);
            self.vector[i] += weight * row[i] * value;
        }
    }

    /// The least squares, none of the costs negative.
    fn solve(&self) -> Costs {
        let mut is_free = [true; NUM_COSTS];
        loop {
            let costs = solve(&self.matrix, &self.vector, &is_free);
            let relative = |&i: &usize| costs[i] * self.matrix[i][i].sqrt();
            let least = (0..NUM_COSTS).min_by(|i, j| relative(i).total_cmp(&relative(j)));
            match least {
                Some(index) if costs[index] < 0.0 => is_free[index] = false,
                _ => return costs,
            }
        }
    }
}

/// 0 for 0, else one more than the whole part of the logarithm.
fn power_of_two(count: usize) -> usize {
    count.checked_ilog2().map_or(0, |log| log as usize + 1)
}

/// What the costs are multiplied by.
fn terms(work: &StepWork) -> [f64; NUM_COSTS] {
    [1.0, work.num_decodes as f64, work.num_prefill_tokens as f64, work.num_pairs as f64]
}

fn dot(a: &Costs, b: &Costs) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn unit(entries: &[(usize, f64)]) -> [f64; NUM_COSTS] {
    let mut row = [0.0; NUM_COSTS];
    entries.iter().for_each(|&(index, value)| row[index] = value);
    row
}

/// Solves the equations of the costs that are free, by Gauss; the others are 0.
fn solve(matrix: &[[f64; NUM_COSTS]; NUM_COSTS], vector: &Costs, is_free: &[bool; NUM_COSTS]) -> Costs {
    // Scaled to a diagonal of 1: the terms differ by orders of magnitude.
    let scale: Costs = std::array::from_fn(|i| matrix[i][i].max(f64::MIN_POSITIVE).sqrt().recip());
    let mut a = *matrix;
    let mut b = *vector;
    for i in 0..NUM_COSTS {
        for j in 0..NUM_COSTS {
            let is_used = is_free[i] && is_free[j];
            a[i][j] = if is_used { a[i][j] * scale[i] * scale[j] } else { f64::from(u8::from(i == j)) };
        }
        b[i] = if is_free[i] { b[i] * scale[i] } else { 0.0 };
    }
    for i in 0..NUM_COSTS {
        // Symmetric and positive: no pivoting is needed.
        let pivot = a[i][i].max(1e-15);
        for k in i + 1..NUM_COSTS {
            let factor = a[k][i] / pivot;
            (i..NUM_COSTS).for_each(|j| a[k][j] -= factor * a[i][j]);
            b[k] -= factor * b[i];
        }
    }
    let mut costs = [0.0; NUM_COSTS];
    for i in (0..NUM_COSTS).rev() {
        let known: f64 = (i + 1..NUM_COSTS).map(|j| a[i][j] * costs[j]).sum();
        costs[i] = (b[i] - known) / a[i][i].max(1e-15);
    }
    std::array::from_fn(|i| costs[i] * scale[i])
}
