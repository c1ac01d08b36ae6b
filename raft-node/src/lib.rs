//! A scheduler replica: openraft, the log, the APIs, and the loops that only the leader runs.

pub mod log;
pub mod raft;
