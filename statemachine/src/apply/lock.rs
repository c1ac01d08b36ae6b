//! Acquire and Unlock: named locks with fencing tokens. Waiters are served in their order, each with a token of the
//! same counter as the leases'; giving a lock back, or no longer waiting for it, is the same command.
//!
//! Refuse SESSION_UNKNOWN, INVALID_SPEC (name), LIMIT; LOCK_NOT_HELD. Emit the lock.

use planted::{Bug, planted};

use super::{Ctx, DONE, session};
use crate::command::{Code, Rejection, Reply};
use crate::event::Change;
use crate::id::*;
use crate::record::*;
use crate::state::State;

/// Locks that one session may hold or wait for: bounds the work of its end.
const LOCKS_PER_SESSION: usize = 1_024;

pub(super) fn acquire(state: &mut State, ctx: &mut Ctx<'_>, id: SessionId, name: &str) -> Result<Reply, Rejection> {
    let owner = state.sessions.get(&id).ok_or_else(|| session::unknown(id))?;
    check_name(state, name)?;
    if let Some(lock) = state.locks.get(&name.to_owned()).map(|lock| &lock.value) {
        if let Some(holder) = lock.holder.filter(|holder| holder.session == id) {
            return granted(Some(holder.token));
        }
        if lock.waiters.contains(&id) {
            return granted(None);
        }
        let (waiters, limit) = (lock.waiters.len(), state.meta.settings.lock_waiters);
        if waiters >= limit as usize {
            return Err(Rejection::new(
                Code::Limit,
                format!("{waiters} sessions wait for the lock, the limit is {limit}"),
            ));
        }
    } else if state.locks.len() >= state.meta.settings.locks as usize {
        let (held, limit) = (state.locks.len(), state.meta.settings.locks);
        return Err(Rejection::new(Code::Limit, format!("{held} locks are held, the limit is {limit}")));
    }
    if owner.locks.len() >= LOCKS_PER_SESSION {
        let detail = format!("session {id} holds {} locks, the limit is {LOCKS_PER_SESSION}", owner.locks.len());
        return Err(Rejection::new(Code::Limit, detail));
    }
    if state.meta.token.next().is_none() {
        return Err(Rejection::new(Code::Limit, "fencing tokens are used up"));
    }

    state.sessions.update(&id, |session| session.locks.push(name.to_owned()));
    if !state.locks.contains(&name.to_owned()) {
        let lock = Lock { holder: None, waiters: Default::default() };
        // Showing it below makes it version 1 of this revision.
        let new = Versioned { create_rev: ctx.rev, mod_rev: Revision(0), version: 0, value: lock };
        state.locks.insert(name.to_owned(), new);
    }
    state.locks.update(&name.to_owned(), |lock| lock.value.waiters.push_back(id));
    let token = grant_next(state, ctx, name).filter(|holder| holder.session == id).map(|holder| holder.token);
    granted(token)
}

pub(super) fn unlock(state: &mut State, ctx: &mut Ctx<'_>, id: SessionId, name: &str) -> Result<Reply, Rejection> {
    let session = state.sessions.get(&id).ok_or_else(|| session::unknown(id))?;
    if !session.locks.iter().any(|held| held == name) {
        let detail = format!("session {id} neither holds nor waits for lock {:?}", crate::lease::clip(name));
        return Err(Rejection::new(Code::LockNotHeld, detail));
    }
    state.sessions.update(&id, |session| session.locks.retain(|held| held != name));
    leave(state, ctx, id, name);
    DONE
}

/// Takes the session out of the lock, as its holder or as a waiter.
pub(super) fn leave(state: &mut State, ctx: &mut Ctx<'_>, id: SessionId, name: &str) {
    state.locks.update(&name.to_owned(), |lock| {
        lock.value.holder = lock.value.holder.filter(|holder| holder.session != id);
        lock.value.waiters.retain(|waiter| *waiter != id || planted(Bug::LockAfterSession));
    });
    grant_next(state, ctx, name);
}

/// Gives a free lock to the first waiter whose session lives; a lock that nobody wants is no more. The holder.
fn grant_next(state: &mut State, ctx: &mut Ctx<'_>, name: &str) -> Option<Holder> {
    let key = name.to_owned();
    while state.locks.get(&key)?.value.holder.is_none() {
        let next = state.locks.update(&key, |lock| lock.value.waiters.pop_front()).flatten();
        let Some(session) = next else {
            state.locks.remove(&key);
            ctx.tell(Change::LockFree { name: key });
            return None;
        };
        if !state.sessions.contains(&session) && !planted(Bug::LockAfterSession) {
            continue;
        }
        let Some(token) = state.mint() else { continue };
        state.locks.update(&key, |lock| lock.value.holder = Some(Holder { session, token }));
    }
    state.locks.update(&key, |lock| lock.bump(ctx.rev));
    let lock = &state.locks.get(&key)?.value;
    let waiters = u32::try_from(lock.waiters.len()).unwrap_or(u32::MAX);
    ctx.tell(Change::LockShown { name: key, holder: lock.holder, waiters });
    lock.holder
}

fn check_name(state: &State, name: &str) -> Result<(), Rejection> {
    let limit = state.meta.settings.lock_name_bytes;
    if name.is_empty() || name.len() > limit as usize || name.chars().any(char::is_control) {
        let detail = format!("name has {} bytes, must have 1 to {limit}, without control characters", name.len());
        return Err(Rejection::new(Code::InvalidSpec, detail));
    }
    Ok(())
}

fn granted(token: Option<Token>) -> Result<Reply, Rejection> {
    Ok(Reply::Stored(StoredReply::Lock(token)))
}
