"""Whether an export computes what its checkpoint does."""
