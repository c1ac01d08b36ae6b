//! What changed, at which revision: the source of watches and of a job's story.

use serde::{Deserialize, Serialize};

use crate::id::*;

/// One change of the keyspace. `(rev, sub)` orders the events of one command.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    pub rev: Revision,
    pub sub: u16,
    pub clock_ms: u64,
    pub wall_ms: i64,
    pub what: Change,
}

/// The typed content; the keyspace renders it as keys and values.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Change {
    JobSubmitted { job: JobId },
}
