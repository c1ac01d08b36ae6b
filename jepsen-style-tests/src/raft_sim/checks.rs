//! What must hold of a group of replicas, looked at after each tick that changed something. Owns what it has seen; leaves the replicas,
//! and when they are gone, to the driver.

use std::collections::BTreeMap;

use raft_node::log::{EntryId, Vote};
use raft_node::replica::Replica;
use raft_node::simulated::Written;
use serde::{Deserialize, Serialize};

/// A promise that did not hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Broken {
    /// The invariant's name.
    pub invariant: String,
    pub detail: String,
}

/// [`Broken`] if the condition holds.
pub fn broken_if(broken: bool, invariant: &str, detail: impl FnOnce() -> String) -> Result<(), Broken> {
    if broken { Err(Broken { invariant: invariant.to_owned(), detail: detail() }) } else { Ok(()) }
}

/// What is known of the group from all ticks so far.
#[derive(Default)]
pub struct Checks {
    /// Who led in which term; a term may have several leaders, one after the other, but none twice at once.
    leaders: BTreeMap<u64, Vec<u64>>,
    /// What any log held under an id.
    written: BTreeMap<(u64, u64, u64), Written>,
    /// What was applied at each index by the first replica that came there.
    committed: BTreeMap<u64, Written>,
    highest: u64,
    /// The digest at each index, by the first replica that was looked at there.
    digests: BTreeMap<u64, u128>,
    seen: BTreeMap<u64, Seen>,
    /// The vote that each replica had on disk at last, also while it is down.
    votes: BTreeMap<u64, Vote>,
    /// What happened, by name.
    pub sometimes: BTreeMap<&'static str, u64>,
}

/// How far a running replica was looked at.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Seen {
    applied: u64,
    last: Option<EntryId>,
    purged: Option<u64>,
}

/// What a look saw that was new: part of the trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    pub applied: u64,
    pub last: EntryId,
}

impl Checks {
    /// A replica went down: it is looked at from what it has kept.
    pub fn down(&mut self, replica: u64) {
        self.seen.remove(&replica);
    }

    pub fn hit(&mut self, what: &'static str) {
        *self.sometimes.entry(what).or_default() += 1;
    }

    /// The highest index that any replica applied.
    pub fn committed(&self) -> u64 {
        self.highest
    }

    /// All that can be said of one running replica; `None` if nothing changed since the last look.
    pub fn look(&mut self, id: u64, replica: &Replica) -> Result<Option<Step>, Broken> {
        self.leader(id, replica);
        self.vote_is_kept(id, replica)?;
        let before = self.seen.get(&id).copied().unwrap_or_default();
        let log = replica.log_state();
        let now = Seen {
            applied: replica.applied().borrow().index,
            last: log.last,
            purged: log.purged.map(|purged| purged.index),
        };
        if now == before {
            return Ok(None);
        }
        self.logs_match(id, replica, before, now)?;
        if now.applied != before.applied {
            self.highest = self.highest.max(now.applied);
            self.committed_stays(id, replica, before, now)?;
            self.replicas_equal(id, replica)?;
        }
        self.seen.insert(id, now);
        Ok(Some(Step { applied: now.applied, last: now.last.unwrap_or_default() }))
    }

    fn leader(&mut self, id: u64, replica: &Replica) {
        let Some(term) = replica.leads() else { return };
        let leaders = self.leaders.entry(term).or_default();
        if !leaders.contains(&id) {
            leaders.push(id);
        }
    }

    /// The vote on disk never goes back, whatever happened to the replica.
    fn vote_is_kept(&mut self, id: u64, replica: &Replica) -> Result<(), Broken> {
        let Some(vote) = replica.vote() else {
            let known = self.votes.get(&id);
            return broken_if(known.is_some(), "vote_kept", || format!("r{id} has no vote, it had {known:?}"));
        };
        let rank = |vote: &Vote| (vote.term, vote.node, vote.committed);
        let known = self.votes.insert(id, vote);
        broken_if(known.as_ref().map(rank) > Some(rank(&vote)), "vote_kept", || {
            format!("r{id} has vote {vote:?}, it had {known:?}")
        })
    }

    /// One id is one entry, in every log, committed or not.
    fn logs_match(&mut self, id: u64, replica: &Replica, before: Seen, now: Seen) -> Result<(), Broken> {
        let Some(last) = now.last else { return Ok(()) };
        let grown = before.last.is_none_or(|before| before.index <= last.index && self.holds(replica, before));
        if !grown {
            self.hit("a log was truncated");
        }
        let from = if grown { before.last.map_or(0, |last| last.index + 1) } else { now.applied + 1 };
        for index in from..=last.index {
            let Some(written) = replica.written(index) else { continue };
            let EntryId { index, term, node } = written.id;
            let first = self.written.entry((index, term, node)).or_insert_with(|| written.clone());
            let differs = *first != written;
            broken_if(differs, "log_matching", || format!("{first:?} is another entry on r{id}: {written:?}"))?;
        }
        Ok(())
    }

    fn holds(&self, replica: &Replica, entry: EntryId) -> bool {
        let purged = replica.log_state().purged.is_some_and(|purged| purged.index >= entry.index);
        purged || replica.written(entry.index).is_some_and(|written| written.id == entry)
    }

    /// What was applied anywhere is the same entry in every log, for ever.
    fn committed_stays(&mut self, id: u64, replica: &Replica, before: Seen, now: Seen) -> Result<(), Broken> {
        for index in before.applied + 1..=now.applied {
            // What came with a snapshot, or was purged, is judged by the digest.
            let Some(written) = replica.written(index) else { continue };
            let first = self.committed.entry(index).or_insert_with(|| written.clone());
            let differs = *first != written;
            broken_if(differs, "committed_stays", || format!("entry {index}: {first:?}, on r{id} {written:?}"))?;
        }
        Ok(())
    }

    fn replicas_equal(&mut self, id: u64, replica: &Replica) -> Result<(), Broken> {
        let mut state = replica.state();
        let (index, digest) = (state.meta.applied.index, state.digest());
        let first = *self.digests.entry(index).or_insert(digest);
        broken_if(first != digest, "replicas_equal", || format!("digest at {index} is {first:x}, on r{id} {digest:x}"))
    }
}
