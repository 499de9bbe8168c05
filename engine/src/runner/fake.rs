//! A runner without a model, for tests.
