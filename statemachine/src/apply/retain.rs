//! Retain: drops a whole bucket of history. It is gone for every reader at once; the places that named its jobs are
//! cleared by a chore.
//!
//! Refuses NOT_FOUND, NOT_DUE (the bucket may still get rows).

use super::{DONE, clock};
use crate::command::{Code, Rejection, Reply};
use crate::state::State;

pub(super) fn apply(state: &mut State, bucket: u32) -> Result<Reply, Rejection> {
    if !state.buckets.contains(&bucket) {
        return Err(Rejection::new(Code::NotFound, format!("there is no bucket {bucket} of history")));
    }
    let now = clock::archive_bucket(state.meta.clock_ms);
    if bucket >= now {
        return Err(Rejection::new(Code::NotDue, format!("bucket is {bucket}, only those below {now} are closed")));
    }
    state.buckets.remove(&bucket);
    state.meta.retiring.insert(bucket, 0);
    let gone: Vec<_> = state.archived.iter().filter(|(_, row)| row.bucket == bucket).map(|(id, _)| *id).collect();
    for id in gone {
        state.archived.remove(&id);
    }
    DONE
}

/// Takes the jobs of dropped buckets out of `ended`, at most `steps` chunks.
pub(super) fn clear_dropped(state: &mut State, steps: u32) {
    for _ in 0..steps {
        let Some((bucket, from)) = state.meta.retiring.first_key_value().map(|(bucket, from)| (*bucket, *from)) else {
            return;
        };
        let Some(chunk) = state.ended.range(from..).next().map(|(chunk, _)| *chunk) else {
            state.meta.retiring.remove(&bucket);
            continue;
        };
        let named = state.ended.get(&chunk).is_some_and(|ended| ended.jobs.values().any(|job| job.1 == bucket));
        if named {
            let empty = state.ended.update(&chunk, |ended| {
                ended.jobs.retain(|_, job| job.1 != bucket);
                ended.jobs.is_empty()
            });
            if empty == Some(true) {
                state.ended.remove(&chunk);
            }
        }
        state.meta.retiring.insert(bucket, chunk.saturating_add(1));
    }
}
