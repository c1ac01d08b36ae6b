//! OpenSession and EndSession: a client's life, which its locks follow. Keep-alives are the leader's business.
//!
//! Refuse INVALID_SPEC, LIMIT; SESSION_UNKNOWN. The end of a session hands its locks to the next waiters.

use super::{Ctx, DONE, lock};
use crate::command::{Code, Rejection, Reply};
use crate::id::SessionId;
use crate::record::{Session, StoredReply};
use crate::state::State;

const TTL_MIN_MS: u64 = 1_000;

pub(super) fn open(state: &mut State, owner: &str, ttl_ms: u64) -> Result<Reply, Rejection> {
    let settings = &state.meta.settings;
    let (least, most) = (TTL_MIN_MS, settings.lease_ttl_max_ms);
    if !(least..=most).contains(&ttl_ms) {
        return Err(Rejection::new(Code::InvalidSpec, format!("ttl_ms is {ttl_ms}, must be {least} to {most}")));
    }
    if owner.len() > settings.name_bytes as usize {
        let detail = format!("owner has {} bytes, the limit is {}", owner.len(), settings.name_bytes);
        return Err(Rejection::new(Code::InvalidSpec, detail));
    }
    if state.sessions.len() >= settings.sessions as usize {
        let detail = format!("{} sessions are open, the limit is {}", state.sessions.len(), settings.sessions);
        return Err(Rejection::new(Code::Limit, detail));
    }
    let id = SessionId(state.meta.next_session);
    state.meta.next_session = id.0.saturating_add(1);
    let opened_clock_ms = state.meta.clock_ms;
    state.sessions.insert(id, Session { owner: owner.into(), ttl_ms, opened_clock_ms, locks: Vec::new() });
    Ok(Reply::Stored(StoredReply::Session(id)))
}

pub(super) fn end(state: &mut State, ctx: &mut Ctx<'_>, id: SessionId) -> Result<Reply, Rejection> {
    let Some(session) = state.sessions.remove(&id) else {
        return Err(unknown(id));
    };
    for name in &session.locks {
        lock::leave(state, ctx, id, name);
    }
    DONE
}

pub(super) fn unknown(id: SessionId) -> Rejection {
    Rejection::new(Code::SessionUnknown, format!("there is no session {id}: it was ended, or its ttl passed"))
}
