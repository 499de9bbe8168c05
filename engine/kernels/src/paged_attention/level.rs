//! Owns the seam between the walk over key tiles and the code that is compiled for an instruction set.
//!
//! Invariant: a value of a type that implements [`Level`] exists only on a CPU that has the instructions.

use super::attend::Job;
use super::element::Element;
use super::lanes::Registers;
use super::plan::Task;
use super::workspace::Scratch;

/// An instruction set.
pub(super) trait Level: Registers {
    /// Computes `task` in code compiled for this instruction set.
    fn attend<E: Element>(self, job: &Job<E>, task: Task, scratch: &mut Scratch);
}
