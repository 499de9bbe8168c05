//! Owns rotary position embedding.
//!
//! Invariant: a channel is rotated by two products and one sum, never fused, at every level; so keys
//! have the same bits in the cache whichever instruction set wrote them.

/// Tables of cosines and sines, `[positions, half]`, and how channels pair up.
#[derive(Clone, Copy)]
pub(super) struct Rotary<'a> {
    pub(super) cos: &'a [f32],
    pub(super) sin: &'a [f32],
    /// Half the rotary width.
    pub(super) half: usize,
    /// Whether a pair is channels 2i and 2i+1; else i and i+half.
    pub(super) interleaved: bool,
}

impl Rotary<'_> {
    /// Positions that the tables cover.
    pub(super) fn num_positions(&self) -> usize {
        self.cos.len() / self.half
    }

    /// Rotates the first `2 * half` channels of `head` by `position`; the others stay.
    #[inline]
    pub(super) fn rotate(&self, head: &mut [f32], position: usize) {
        let row = position * self.half..(position + 1) * self.half;
        let (cos, sin) = (&self.cos[row.clone()], &self.sin[row]);
        let turning = &mut head[..2 * self.half];
        if self.interleaved {
            for ((pair, cos), sin) in turning.chunks_exact_mut(2).zip(cos).zip(sin) {
                (pair[0], pair[1]) = turn(pair[0], pair[1], *cos, *sin);
            }
        } else {
            let (left, right) = turning.split_at_mut(self.half);
            for (((a, b), cos), sin) in left.iter_mut().zip(right).zip(cos).zip(sin) {
                (*a, *b) = turn(*a, *b, *cos, *sin);
            }
        }
    }
}

#[inline(always)]
fn turn(a: f32, b: f32, cos: f32, sin: f32) -> (f32, f32) {
    (a * cos - b * sin, b * cos + a * sin)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_layouts_turn_their_pairs_and_leave_the_rest() {
        // Position 1 turns the first pair by 90 degrees and the second by 180.
        let (cos, sin) = ([9.0, 9.0, 0.0, -1.0], [9.0, 9.0, 1.0, 0.0]);
        let mut rotary = Rotary { cos: &cos, sin: &sin, half: 2, interleaved: true };
        assert_eq!(rotary.num_positions(), 2);
        let mut head = [1.0, 2.0, 3.0, 4.0, 5.0];
        rotary.rotate(&mut head, 1);
        assert_eq!(head, [-2.0, 1.0, -3.0, -4.0, 5.0]);

        rotary.interleaved = false;
        let mut head = [1.0, 2.0, 3.0, 4.0, 5.0];
        rotary.rotate(&mut head, 1);
        assert_eq!(head, [-3.0, -2.0, 1.0, -4.0, 5.0]);
    }
}
