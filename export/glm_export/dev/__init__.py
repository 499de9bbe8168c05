"""Checkpoints with random weights, for tests and benches. No part of the wheel."""
