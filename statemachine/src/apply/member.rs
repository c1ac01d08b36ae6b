//! Member: a replica says which feature level its binary knows. Refuses LEVEL_TOO_OLD (below the log's), LIMIT.

use super::DONE;
use crate::command::{Code, Rejection, Reply};
use crate::state::State;

/// Replicas that ever said their level; a group has a handful.
const MEMBERS: usize = 1_024;

pub(super) fn apply(state: &mut State, replica: u64, level: u16) -> Result<Reply, Rejection> {
    if level < state.meta.level {
        let detail = format!("level is {level}, the cluster is at {}: install a newer binary", state.meta.level);
        return Err(Rejection::new(Code::LevelTooOld, detail));
    }
    if !state.meta.members.contains_key(&replica) && state.meta.members.len() >= MEMBERS {
        return Err(Rejection::new(Code::Limit, format!("{MEMBERS} replicas are known, which is the limit")));
    }
    state.meta.members.insert(replica, level);
    DONE
}
