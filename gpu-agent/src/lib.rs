//! The worker agent of Ares: what a GPU machine runs.
//!
//! `discovery` says what the machine has. It owns no lease and starts no process.

pub mod discovery;
