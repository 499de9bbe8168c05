//! Owns where the inputs of a padded step lie in one piece of memory, which one copy brings to the device.

use std::ops::Range;

use super::super::buffer::align;
use crate::step::StepPlan;

/// Where the inputs of a padded step lie among one another, in elements.
#[derive(Debug)]
pub(in crate::runner::ort) struct InputLayout {
    pub(in crate::runner::ort) rows: usize,
    pub(in crate::runner::ort) table_width: usize,
    pub(in crate::runner::ort) token_ids: Range<usize>,
    pub(in crate::runner::ort) cumulative_sequence_length: Range<usize>,
    pub(in crate::runner::ort) past_seqlens: Range<usize>,
    pub(in crate::runner::ort) slot_mapping: Range<usize>,
    pub(in crate::runner::ort) logits_indices: Range<usize>,
    pub(in crate::runner::ort) block_table: Range<usize>,
    /// Of all.
    pub(in crate::runner::ort) len: usize,
}

impl InputLayout {
    pub(in crate::runner::ort) fn new(rows: usize, table_width: usize) -> Self {
        let mut len = 0;
        let mut take = |size: usize| {
            let range = len..len + size;
            len += align(size * size_of::<i32>()) / size_of::<i32>();
            range
        };
        Self {
            rows,
            table_width,
            token_ids: take(rows),
            cumulative_sequence_length: take(rows + 1),
            past_seqlens: take(rows),
            slot_mapping: take(rows),
            logits_indices: take(rows),
            block_table: take(rows * table_width),
            len,
        }
    }

    /// Writes a decode step and pads it: rows that write nothing, read one slot of block 0 and are read by nobody.
    pub(in crate::runner::ort) fn fill(&self, packed: &mut [i32], plan: &StepPlan) {
        let mut fill = |range: &Range<usize>, values: &[i32], padding: i32| {
            let (used, rest) = packed[range.clone()].split_at_mut(values.len());
            used.copy_from_slice(values);
            rest.fill(padding);
        };
        fill(&self.token_ids, &plan.token_ids, 0);
        fill(&self.past_seqlens, &plan.past_seqlens, 0);
        fill(&self.slot_mapping, &plan.slot_mapping, -1);
        fill(&self.logits_indices, &plan.logits_indices, 0);
        packed[self.cumulative_sequence_length.clone()].iter_mut().zip(0..).for_each(|(sum, row)| *sum = row);
        let table = &mut packed[self.block_table.clone()];
        let width = plan.max_num_blocks.min(self.table_width);
        table.fill(0);
        let rows = table
            .chunks_exact_mut(self.table_width)
            .zip(plan.block_table.chunks_exact(plan.max_num_blocks.max(1)));
        rows.for_each(|(row, blocks)| row[..width].copy_from_slice(&blocks[..width]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::RequestId;

    #[test]
    fn a_padded_step_reads_and_writes_what_the_step_would() {
        let mut plan = StepPlan::default();
        plan.clear(6);
        plan.push(RequestId(1), [11], 33, &[7, 3, 4], 16, 1);
        plan.push(RequestId(2), [12], 0, &[9], 16, 0);
        plan.push(RequestId(3), [13], 15, &[5], 16, 1);
        let layout = InputLayout::new(4, 3);
        // What an earlier step left.
        let mut packed = vec![77; layout.len];
        layout.fill(&mut packed, &plan);
        assert_eq!(packed[layout.token_ids.clone()], [11, 12, 13, 0]);
        assert_eq!(packed[layout.cumulative_sequence_length.clone()], [0, 1, 2, 3, 4]);
        assert_eq!(packed[layout.past_seqlens.clone()], [33, 0, 15, 0]);
        assert_eq!(packed[layout.slot_mapping.clone()], [4 * 16 + 1, 9 * 16, 5 * 16 + 15, -1]);
        assert_eq!(packed[layout.logits_indices.clone()], [0, 2, 0, 0]);
        assert_eq!(packed[layout.block_table.clone()], [7, 3, 4, 9, 0, 0, 5, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn inputs_do_not_overlap_and_are_aligned() {
        for (rows, table_width) in [(1, 1), (2, 64), (64, 5), (256, 1024)] {
            let layout = InputLayout::new(rows, table_width);
            let ranges = [
                &layout.token_ids,
                &layout.cumulative_sequence_length,
                &layout.past_seqlens,
                &layout.slot_mapping,
                &layout.logits_indices,
                &layout.block_table,
            ];
            for pair in ranges.windows(2) {
                assert!(pair[0].end <= pair[1].start, "{layout:?}");
            }
            assert!(ranges.iter().all(|range| range.start % 64 == 0), "{layout:?}");
            assert!(layout.block_table.end <= layout.len, "{layout:?}");
        }
    }
}
