//! Checkpoint: an attempt says where a next one can go on from. Its token is the right to say so: only the attempt that
//! has it knows it, and it is worth nothing once the attempt's lease is closed. It counts also while the attempt drains:
//! that is when most are made.
//!
//! Refuses TOKEN_STALE; INVALID_SPEC (the path). Changes no key.

use super::DONE;
use crate::command::{Code, Rejection, Reply};
use crate::id::Token;
use crate::record::Checkpoint;
use crate::state::State;

/// Longest path: what the machines' kernels take is 4 KiB, and each task in memory may hold one.
const CHECKPOINT_BYTES: usize = 1_024;

pub(super) fn apply(state: &mut State, token: Token, path: &str, step: u64) -> Result<Reply, Rejection> {
    let stale = || Rejection::new(Code::TokenStale, format!("token {token} names no live lease: the attempt is over"));
    let lease = &state.leases.get(&token).ok_or_else(stale)?.value;
    if path.is_empty() || path.len() > CHECKPOINT_BYTES {
        let detail = format!("path has {} bytes, must have 1 to {CHECKPOINT_BYTES}", path.len());
        return Err(Rejection::new(Code::InvalidSpec, detail));
    }
    if path.chars().any(char::is_control) {
        return Err(Rejection::new(Code::InvalidSpec, "path has a control character"));
    }
    let checkpoint = Checkpoint { path: path.to_owned(), attempt: lease.attempt, clock_ms: state.meta.clock_ms, step };
    let task = lease.task;
    state.tasks.update(&task, |task| task.value.checkpoint = Some(checkpoint.into()));
    DONE
}
