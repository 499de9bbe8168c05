//! The streaming client shared by the terminal chat, the bench and the tests.
