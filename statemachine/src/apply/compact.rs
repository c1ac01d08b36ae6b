//! Compact: moves the floor below which no watch may begin, at once. Refuses FUTURE_REVISION.

use super::DONE;
use crate::command::{Code, Rejection, Reply};
use crate::id::Revision;
use crate::state::State;

pub(super) fn apply(state: &mut State, rev: Revision) -> Result<Reply, Rejection> {
    if rev > state.meta.rev {
        let detail = format!("rev is {rev}, the newest revision is {}", state.meta.rev);
        return Err(Rejection::new(Code::FutureRevision, detail));
    }
    if rev > state.meta.compacted_rev {
        state.meta.compacted_rev = rev;
        state.drop_events_to(rev);
    }
    DONE
}
