//! What the clients were told, and whether it is true: an auditor that knows nothing of Raft.

use std::collections::BTreeMap;

use statemachine::{SessionId, State};

use super::checks::{Broken, broken_if};

/// Of what was acknowledged before a read, so many of the newest are looked for in it.
const NEWEST: usize = 16;

/// A session that was acknowledged.
#[derive(Clone, Copy, Debug)]
struct Told {
    session: SessionId,
    /// What the replica that answered had applied by then.
    index: u64,
}

#[derive(Default)]
pub struct Ledger {
    told: Vec<Told>,
    by_request: BTreeMap<u64, SessionId>,
    /// The highest index whose state a read was answered from.
    floor: u64,
    pub reads: u64,
    pub unknown: u64,
    pub broken: Option<Broken>,
    pub sometimes: BTreeMap<&'static str, u64>,
}

/// What had been told when an operation began.
#[derive(Clone, Copy, Debug)]
pub struct Before {
    told: usize,
    floor: u64,
}

impl Ledger {
    pub fn hit(&mut self, what: &'static str) {
        *self.sometimes.entry(what).or_default() += 1;
    }

    pub fn acknowledged(&self) -> u64 {
        self.told.len() as u64
    }

    pub fn now(&self) -> Before {
        Before { told: self.told.len(), floor: self.floor }
    }

    /// A request, the same or an earlier one, was answered with this session.
    pub fn answered(&mut self, request: u64, session: SessionId, index: u64) {
        let known = *self.by_request.entry(request).or_insert(session);
        self.judge(broken_if(known != session, "request_once", || {
            format!("request {request} was answered with session {}, and later with {}", known.0, session.0)
        }));
        self.told.push(Told { session, index });
    }

    /// A linearizable read was answered with this state.
    pub fn read(&mut self, before: Before, replica: u64, state: &State) {
        self.reads += 1;
        let index = state.meta.applied.index;
        self.judge(broken_if(index < before.floor, "clients_linearizable", || {
            format!("a read on r{replica} saw entry {index}, one that ended before it began saw {}", before.floor)
        }));
        for told in &self.told[before.told.saturating_sub(NEWEST)..before.told] {
            if state.sessions.get(&told.session).is_none() {
                let why = lost(*told, replica, state);
                self.broken = self.broken.take().or(Some(why));
                return;
            }
        }
        self.floor = self.floor.max(index);
    }

    /// Everything that was acknowledged must be in the state of this replica: it has taken office, or come to the group's end.
    pub fn whole(&self, replica: u64, state: &State) -> Result<(), Broken> {
        let missing = self.told.iter().find(|told| state.sessions.get(&told.session).is_none());
        missing
            .map_or(Ok(()), |told| Err(Broken { invariant: "nothing_lost".to_owned(), ..lost(*told, replica, state) }))
    }

    /// No request has two sessions.
    pub fn once(replica: u64, state: &State) -> Result<(), Broken> {
        let mut owners = BTreeMap::new();
        for (session, opened) in state.sessions.iter() {
            if let Some(other) = owners.insert(opened.owner.clone(), *session) {
                let detail = format!("on r{replica} {} has sessions {} and {}", opened.owner, other.0, session.0);
                return Err(Broken { invariant: "request_once".to_owned(), detail });
            }
        }
        Ok(())
    }

    pub fn judge(&mut self, verdict: Result<(), Broken>) {
        if let Err(broken) = verdict
            && self.broken.is_none()
        {
            self.broken = Some(broken);
        }
    }
}

/// A state that has come so far as the one from which the session was acknowledged has lost it; another one may only be old.
fn lost(told: Told, replica: u64, state: &State) -> Broken {
    let index = state.meta.applied.index;
    let invariant = if index >= told.index { "nothing_lost" } else { "clients_linearizable" };
    let detail = format!(
        "session {} was acknowledged when entry {} was applied; r{replica}, at entry {index}, does not have it",
        told.session.0, told.index
    );
    Broken { invariant: invariant.to_owned(), detail }
}
