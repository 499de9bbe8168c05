//! Owns how a call is cut into tasks: row tiles, and for long contexts pieces of their key tiles.
//!
//! Invariant: cutting never changes bits. A row's key tiles are computed alike and folded in the same
//! order wherever the cuts are, so the plan may look at the batch and the number of threads.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::batch::Batch;
use super::kv_cache::TILE;

/// Pieces of work that a thread should find, so that a slow thread does not hold up the others.
const TASKS_PER_THREAD: usize = 2;

/// Rows that are computed side by side at least; a tile's last rows are padded to them.
pub(super) const ROWS: usize = 4;

/// Rows of the largest tile, each key of which is read once for all of them: in vectors as many as a core's first
/// cache has room for, with their scores; AMX's tiles wait less for more.
const MAX_ROWS: usize = 32;
const MAX_ROWS_IN_TILES: usize = 64;

/// Neighbouring rows that share a key/value head. Row `r` of a sequence and key/value head is token
/// `r / group`, head `r % group` of the group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RowTile {
    /// Index of the sequence in the batch.
    pub(super) sequence: usize,
    pub(super) kv_head: usize,
    /// Its rows.
    pub(super) rows: Range<usize>,
    /// Keys that its last row sees.
    pub(super) num_keys: usize,
    /// Where its partial results start, if it is split.
    pub(super) partials: Option<usize>,
}

impl RowTile {
    /// Rows computed: `rows` and padding.
    pub(super) fn width(&self) -> usize {
        self.rows.len().next_multiple_of(ROWS)
    }

    fn work(&self) -> usize {
        self.width() * self.num_keys
    }

    /// Key tiles that its last row sees.
    pub(super) fn num_key_tiles(&self) -> usize {
        self.num_keys.div_ceil(TILE)
    }
}

/// Some key tiles of a row tile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Task {
    /// Index of the row tile.
    pub(super) tile: usize,
    /// First key tile, and the one after the last.
    pub(super) key_tiles: (usize, usize),
}

/// The tasks of a call, longest first.
#[derive(Default)]
pub(super) struct Plan {
    pub(super) tiles: Vec<RowTile>,
    pub(super) tasks: Vec<Task>,
    /// Unfinished tasks of each row tile; who finishes the last one folds the partial results.
    remaining: Vec<AtomicUsize>,
    num_partial_floats: usize,
    work: usize,
}

/// Floats of one key tile's partial result: highest score and sum of each row, then outputs.
pub(super) fn partial_floats(width: usize, head_dim: usize) -> usize {
    (width * (head_dim + 2)).next_multiple_of(16)
}

impl Plan {
    /// Cuts `batch` up for `num_threads`, which compute in vectors or `in_tiles`.
    pub(super) fn rebuild(&mut self, batch: &Batch, num_threads: usize, in_tiles: bool) {
        let max_rows = if in_tiles { MAX_ROWS_IN_TILES } else { MAX_ROWS };
        self.tiles.clear();
        self.tasks.clear();
        self.num_partial_floats = 0;
        let group = batch.geometry.group();
        for (i, sequence) in batch.sequences().enumerate() {
            let num_rows = sequence.tokens.len() * group;
            for kv_head in 0..batch.geometry.kv_num_heads {
                for first in (0..num_rows).step_by(max_rows) {
                    let rows = first..num_rows.min(first + max_rows);
                    self.tiles.push(RowTile {
                        sequence: i,
                        kv_head,
                        num_keys: sequence.past + (rows.end - 1) / group + 1,
                        rows,
                        partials: None,
                    });
                }
            }
        }
        self.work = self.tiles.iter().map(RowTile::work).sum();
        self.split(batch.geometry.head_dim, num_threads);
        let Self { tiles, tasks, .. } = self;
        tasks.sort_unstable_by_key(|task| {
            let tile = &tiles[task.tile];
            let keys = (task.key_tiles.1 - task.key_tiles.0) * TILE;
            (std::cmp::Reverse(tile.width() * keys.min(tile.num_keys)), task.tile, task.key_tiles)
        });
    }

    fn split(&mut self, head_dim: usize, num_threads: usize) {
        let share = match num_threads {
            0 | 1 => usize::MAX,
            _ => (self.work / (num_threads * TASKS_PER_THREAD)).max(1),
        };
        while self.remaining.len() < self.tiles.len() {
            self.remaining.push(AtomicUsize::new(0));
        }
        for (i, tile) in self.tiles.iter_mut().enumerate() {
            let num_key_tiles = tile.num_key_tiles();
            let pieces = tile.work().div_ceil(share).clamp(1, num_key_tiles);
            for piece in 0..pieces {
                self.tasks.push(Task {
                    tile: i,
                    key_tiles: (piece * num_key_tiles / pieces, (piece + 1) * num_key_tiles / pieces),
                });
            }
            *self.remaining[i].get_mut() = pieces;
            if pieces > 1 {
                tile.partials = Some(self.num_partial_floats);
                self.num_partial_floats += num_key_tiles * partial_floats(tile.width(), head_dim);
            }
        }
    }

    /// Products of a row with a key, over all tasks.
    pub(super) fn work(&self) -> usize {
        self.work
    }

    /// Floats that the partial results of split tiles take.
    pub(super) fn num_partial_floats(&self) -> usize {
        self.num_partial_floats
    }

    /// Notes that a task of row tile `tile` is done; true for the last one, which then sees what all
    /// the others wrote.
    pub(super) fn finish_task(&self, tile: usize) -> bool {
        self.remaining[tile].fetch_sub(1, Ordering::AcqRel) == 1
    }
}
