//! Owns what the engine has learnt about the length of replies: how likely a reply is to end at its next
//! token, by how long it is already.
//!
//! Plain data. Invariant: until a reply has ended before its `max_tokens`, none is expected to; what is
//! expected never exceeds `max_tokens`.

/// Lengths are told apart by powers of the root of two: class `k` starts at `2^(k/2) - 1`.
const NUM_CLASSES: usize = 32;
/// How many ended replies are remembered, about.
pub(crate) const NUM_REMEMBERED_ENDS: f64 = 128.0;
/// A class without ends of its own is taken to be like all others; so many tokens weigh as much as that.
const PRIOR_TOKENS: f64 = 16.0;

/// For each class the chance to end at a token in it.
pub(crate) type Hazards = [f64; NUM_CLASSES];

/// Tokens generated and replies ended in each class of positions.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct ReplyLengths {
    num_tokens: [f64; NUM_CLASSES],
    num_ends: [f64; NUM_CLASSES],
}

impl ReplyLengths {
    /// A reply that had `num_before` tokens has `num_new` more.
    pub(crate) fn observe_tokens(&mut self, num_before: usize, num_new: usize) {
        self.num_tokens[class_of(num_before)] += num_new as f64;
    }

    /// A reply ended with `num_tokens`: `is_early` if nothing but its own end kept it from going on. A reply
    /// whose reader left, or that reached its `max_tokens`, could have gone on.
    pub(crate) fn observe_end(&mut self, num_tokens: usize, is_early: bool) {
        self.num_ends[class_of(num_tokens)] += f64::from(u8::from(is_early));
        let forget = |count: &mut f64| *count *= 1.0 - 1.0 / NUM_REMEMBERED_ENDS;
        self.num_tokens.iter_mut().chain(&mut self.num_ends).for_each(forget);
    }

    /// The chance of each class to end at a token in it; all 0 until a reply has ended early.
    pub(crate) fn hazards(&self) -> Hazards {
        let num_ends: f64 = self.num_ends.iter().sum();
        let num_tokens: f64 = self.num_tokens.iter().sum();
        let mean = (num_ends / num_tokens.max(num_ends).max(1.0)).min(1.0);
        std::array::from_fn(|class| {
            let expected = self.num_ends[class] + PRIOR_TOKENS * mean;
            (expected / (self.num_tokens[class] + PRIOR_TOKENS)).min(1.0)
        })
    }
}

/// How many replies are still going on at each length, and how many tokens that makes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct LengthCurve {
    /// Ends a token, as a rate.
    rates: [f64; NUM_CLASSES],
    /// At the start of each class: the part of replies that reach it, and their mean length up to there.
    reached: [f64; NUM_CLASSES],
    lengths: [f64; NUM_CLASSES],
}

impl LengthCurve {
    /// The curve of these chances.
    pub(crate) fn new(hazards: &Hazards) -> Self {
        // A chance of 1 would be an infinite rate.
        let rates = hazards.map(|hazard| -(1.0 - hazard.clamp(0.0, 0.999)).ln());
        let mut curve = Self { rates, reached: [1.0; NUM_CLASSES], lengths: [0.0; NUM_CLASSES] };
        for class in 1..NUM_CLASSES {
            let (reached, length) = curve.at(start_of(class), class - 1);
            (curve.reached[class], curve.lengths[class]) = (reached, length);
        }
        curve
    }

    /// The part of replies that go on beyond `age` tokens, and the mean length of all, cut there.
    fn at(&self, age: f64, class: usize) -> (f64, f64) {
        let (rate, time) = (self.rates[class], age - start_of(class));
        let left = (-rate * time).exp();
        let passed = if rate > 1e-12 { (1.0 - left) / rate } else { time };
        (self.reached[class] * left, self.lengths[class] + self.reached[class] * passed)
    }

    /// Tokens that a reply is expected to have yet, on average, if it has `age`, and must have `least` and may
    /// have `most` more.
    pub(crate) fn expected(&self, age: usize, least: usize, most: usize) -> f64 {
        let least = least.min(most);
        least as f64 + self.expected_by_itself(age + least, most - least)
    }

    fn expected_by_itself(&self, age: usize, most: usize) -> f64 {
        let (reached, length) = self.at(age as f64, class_of(age));
        let end = age.saturating_add(most);
        let (_, longest) = self.at(end as f64, class_of(end));
        let expected = if reached > 1e-9 { (longest - length) / reached } else { 1.0 };
        expected.clamp(1.0_f64.min(most as f64), most as f64)
    }

    /// After how many tokens more the part `left` of such replies still goes on.
    pub(crate) fn quantile(&self, age: usize, least: usize, most: usize, left: f64) -> f64 {
        let least = least.min(most);
        least as f64 + self.quantile_by_itself(age + least, most - least, left)
    }

    fn quantile_by_itself(&self, age: usize, most: usize, left: f64) -> f64 {
        let target = self.at(age as f64, class_of(age)).0 * left;
        let class = (class_of(age)..NUM_CLASSES - 1).find(|&class| self.reached[class + 1] < target);
        let class = class.unwrap_or(NUM_CLASSES - 1);
        let rate = self.rates[class];
        if rate <= 1e-12 || target <= 0.0 {
            return most as f64;
        }
        let end = start_of(class) + (self.reached[class] / target).ln() / rate;
        (end - age as f64).clamp(0.0, most as f64)
    }
}

fn class_of(length: usize) -> usize {
    let class = 2 * (length + 1).ilog2() as usize;
    let is_second_half = length as f64 >= start_of(class + 1);
    (class + usize::from(is_second_half)).min(NUM_CLASSES - 1)
}

fn start_of(class: usize) -> f64 {
    let octave = (1u64 << (class / 2)) as f64;
    if class.is_multiple_of(2) { octave - 1.0 } else { octave * std::f64::consts::SQRT_2 - 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn learn(lengths: impl IntoIterator<Item = (usize, bool)>) -> LengthCurve {
        let mut learnt = ReplyLengths::default();
        for (length, is_early) in lengths {
            (0..length).for_each(|age| learnt.observe_tokens(age, 1));
            learnt.observe_end(length, is_early);
        }
        LengthCurve::new(&learnt.hazards())
    }

    fn is_near(found: f64, expected: f64, part: f64) -> bool {
        (found / expected - 1.0).abs() < part
    }

    #[test]
    fn until_a_reply_ends_by_itself_each_is_as_long_as_it_may_be() {
        for curve in [learn([]), learn([(16, false); 50])] {
            for (age, most) in [(0, 1), (0, 16), (5, 8000), (4000, 70_000)] {
                assert!(is_near(curve.expected(age, 0, most), most as f64, 1e-6));
                assert!(is_near(curve.quantile(age, 0, most, 0.5), most as f64, 1e-6));
            }
        }
        assert_eq!(learn([]).expected(3, 0, 0), 0.0);
    }

    #[test]
    fn one_short_reply_among_many_that_go_on_says_little() {
        let mut learnt = ReplyLengths::default();
        (0..64).for_each(|_| (0..50).for_each(|age| learnt.observe_tokens(age, 1)));
        learnt.observe_end(3, true);
        let curve = LengthCurve::new(&learnt.hazards());
        assert!(curve.expected(0, 0, 100) > 80.0, "{}", curve.expected(0, 0, 100));
    }

    #[test]
    fn replies_of_one_length_and_of_any_length_are_told_apart() {
        let alike = learn([(200, true); 200]);
        assert!(is_near(alike.expected(0, 0, 8000), 200.0, 0.2), "{}", alike.expected(0, 0, 8000));
        assert!(is_near(alike.expected(150, 0, 8000), 50.0, 0.6), "{}", alike.expected(150, 0, 8000));
        assert!(is_near(alike.expected(0, 0, 16), 16.0, 0.02));
        // Exponentially distributed with a mean of 100: no age changes what is to come.
        let any = learn((0..2000).map(|i| {
            let part = (f64::from(i) * 0.618_034).fract();
            ((-100.0 * (1.0 - part).ln()) as usize, true)
        }));
        for age in [0, 50, 150] {
            assert!(is_near(any.expected(age, 0, 8000), 100.0, 0.35), "{}", any.expected(age, 0, 8000));
            let median = any.quantile(age, 0, 8000, 0.5);
            assert!(is_near(median, 69.0, 0.4), "{median}");
        }
        // What is sure comes before what is likely.
        assert!(alike.expected(0, 1000, 8000) >= 1000.0);
        assert_eq!(any.expected(20, 300, 300), 300.0);
        assert_eq!(any.quantile(20, 300, 300, 0.5), 300.0);
        assert!(is_near(any.expected(0, 100, 8000), 200.0, 0.2), "{}", any.expected(0, 100, 8000));
        assert!(is_near(any.expected(0, 0, 50), 39.0, 0.2), "{}", any.expected(0, 0, 50));
    }
}
