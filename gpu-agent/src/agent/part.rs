//! One attempt's share on this machine as the agent knows it, and what the leader has still to be told about it. Pure.
//!
//! Reports are derived from the state, not queued: what was not answered is found again by looking.

use std::collections::BTreeSet;

use proto::v1;

use crate::shim::record::{Exit, Outcome};

/// Longest explanation of a failed launch, in characters.
const WHY_CHARS: usize = 500;

/// One rank's process, as its shim and its records tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rank {
    /// The shim is being started.
    Launching,
    /// Ready behind the barrier.
    Waiting,
    Started,
    Ended(Outcome),
    /// Neither shim nor exit record, and its processes seen gone.
    Vanished,
}

impl Rank {
    pub fn is_alive(&self) -> bool {
        matches!(self, Rank::Launching | Rank::Waiting | Rank::Started)
    }

    fn exit(&self) -> Option<(Exit, &'static str)> {
        match self {
            Rank::Ended(Outcome::Exited { exit, cause }) => Some((*exit, cause.word())),
            _ => None,
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Told {
    prepared: bool,
    started: bool,
    failed: bool,
    exits: BTreeSet<u32>,
    over: bool,
}

/// What a report says; the key by which its answer is remembered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Say {
    Prepared { port: u32 },
    Started { port: u32 },
    Exited { ranks: Vec<u32>, released: bool },
    Released,
    LaunchFailed { node_fault: bool, why: String },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    pub job_id: u64,
    pub first_rank: u32,
    pub gpus: Vec<String>,
    pub ttl_ms: u64,
    pub grace_ms: u64,
    /// By local rank.
    pub ranks: Vec<Rank>,
    /// MASTER_PORT chosen here; 0 = none.
    pub port: u32,
    /// The barrier is open (for a part of one node from the start).
    pub open: bool,
    /// A stop was passed on to the shims.
    pub stopping: bool,
    told: Told,
}

impl Part {
    pub fn new(lease: &v1::DesiredLease, rank: Rank) -> Self {
        Self {
            job_id: lease.job_id,
            first_rank: lease.first_rank,
            gpus: lease.gpu_uuids.clone(),
            ttl_ms: lease.ttl_ms,
            grace_ms: lease.kill_grace_ms.min(lease.ttl_ms / 4),
            ranks: vec![rank; lease.ranks as usize],
            port: 0,
            open: false,
            stopping: false,
            told: Told::default(),
        }
    }

    pub fn is_alive(&self) -> bool {
        self.ranks.iter().any(Rank::is_alive)
    }

    /// No process is left, and at least one shim died without a record: only a registration can say so.
    pub fn is_dead(&self) -> bool {
        !self.is_alive() && self.ranks.contains(&Rank::Vanished)
    }

    pub fn has_started(&self) -> bool {
        self.ranks.iter().all(|rank| matches!(rank, Rank::Started) || rank.exit().is_some())
    }

    /// Over, and the leader knows.
    pub fn is_settled(&self) -> bool {
        !self.is_alive() && self.told.over
    }

    pub fn failure(&self) -> Option<(bool, &str)> {
        self.ranks.iter().find_map(|rank| match rank {
            Rank::Ended(Outcome::LaunchFailed { node_fault, why }) => Some((*node_fault, why.as_str())),
            _ => None,
        })
    }

    /// Exits of all ranks that have one, in rank order.
    pub fn exits(&self) -> Vec<v1::RankExit> {
        let all: Vec<u32> = (0..self.ranks.len() as u32).collect();
        self.exits_of(&all)
    }

    fn exits_of(&self, local: &[u32]) -> Vec<v1::RankExit> {
        let exit = |local: &u32| {
            let (exit, cause) = self.ranks.get(*local as usize)?.exit()?;
            let exit = v1::Exit { code: exit.code, signal: u32::from(exit.signal) };
            Some(v1::RankExit { rank: self.first_rank + local, exit: Some(exit), cause: cause.to_owned() })
        };
        local.iter().filter_map(exit).collect()
    }

    /// All that the leader has not answered yet, in the order in which it happened.
    pub fn due(&self) -> Vec<Say> {
        let mut says = Vec::new();
        if self.ranks.contains(&Rank::Launching) {
            // One rank may have ended while another's shim is still being started: that comes after Started.
            return says;
        }
        if let Some((node_fault, why)) = self.failure()
            && !self.told.failed
        {
            says.push(Say::LaunchFailed { node_fault, why: why.to_owned() });
        }
        if !self.told.prepared && !self.open && self.ranks.iter().all(|rank| *rank == Rank::Waiting) {
            says.push(Say::Prepared { port: self.port });
        }
        if !self.told.started && self.has_started() {
            says.push(Say::Started { port: self.port });
        }
        let over = !self.is_alive() && !self.is_dead();
        let untold = |local: &u32| !self.told.exits.contains(local) && self.ranks[*local as usize].exit().is_some();
        let exited: Vec<u32> = (0..self.ranks.len() as u32).filter(untold).collect();
        if !exited.is_empty() {
            says.push(Say::Exited { ranks: exited, released: over });
        } else if over && !self.told.over {
            says.push(Say::Released);
        }
        says
    }

    /// The leader recorded it, or said not to send it again.
    pub fn answered(&mut self, say: &Say) {
        match say {
            Say::Prepared { .. } => self.told.prepared = true,
            Say::Started { .. } => self.told.started = true,
            Say::LaunchFailed { .. } => self.told.failed = true,
            Say::Exited { ranks, released } => {
                self.told.exits.extend(ranks);
                self.told.over |= released;
            }
            Say::Released => self.told.over = true,
        }
    }

    pub fn item(&self, token: u64, say: &Say) -> v1::ReportItem {
        use v1::report_item::What;
        let what = match say {
            Say::Prepared { port } => What::Prepared(v1::Prepared { port: *port }),
            Say::Started { port } => What::Started(v1::Started { port: *port }),
            Say::Exited { ranks, released } => {
                What::Exited(v1::Exited { exits: self.exits_of(ranks), released: *released })
            }
            Say::Released => What::Released(v1::Released {}),
            Say::LaunchFailed { node_fault, why } => {
                What::LaunchFailed(v1::LaunchFailed { node_fault: *node_fault, why: shortened(why) })
            }
        };
        v1::ReportItem { token, what: Some(what) }
    }
}

/// A command's name can be as long as a body.
fn shortened(why: &str) -> String {
    match why.char_indices().nth(WHY_CHARS) {
        Some((at, _)) => format!("{} ...", &why[..at]),
        None => why.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shim::record::Cause;

    fn part(ranks: u32) -> Part {
        let lease = v1::DesiredLease { token: 9, ranks, first_rank: 4, ttl_ms: 40_000, ..Default::default() };
        Part::new(&lease, Rank::Launching)
    }

    fn exited(code: i32) -> Rank {
        Rank::Ended(Outcome::Exited { exit: Exit { code, signal: 0 }, cause: Cause::Own })
    }

    #[test]
    fn a_start_and_an_exit_that_were_never_answered_are_told_in_order() {
        let mut part = part(1);
        part.open = true;
        part.ranks[0] = exited(0);
        let says = part.due();
        assert_eq!(says, vec![Say::Started { port: 0 }, Say::Exited { ranks: vec![0], released: true }]);
        for say in &says {
            part.answered(say);
        }
        assert!(part.due().is_empty() && part.is_settled());
    }

    #[test]
    fn each_exit_is_told_at_once_and_the_last_one_releases() {
        let mut part = part(2);
        part.open = true;
        part.ranks = vec![Rank::Started, exited(3)];
        part.answered(&Say::Started { port: 0 });
        assert_eq!(part.due(), vec![Say::Exited { ranks: vec![1], released: false }]);
        part.answered(&Say::Exited { ranks: vec![1], released: false });
        assert!(part.due().is_empty());
        part.ranks[0] = exited(0);
        assert_eq!(part.due(), vec![Say::Exited { ranks: vec![0], released: true }]);
        assert_eq!(part.exits()[1].rank, 5);
    }

    #[test]
    fn a_failed_launch_is_followed_by_its_release_once_the_other_ranks_are_gone() {
        let mut part = part(2);
        part.open = true;
        let failed = Rank::Ended(Outcome::LaunchFailed { node_fault: false, why: "no such command".into() });
        part.ranks = vec![failed, Rank::Started];
        assert_eq!(part.due(), vec![Say::LaunchFailed { node_fault: false, why: "no such command".into() }]);
        part.answered(&part.due()[0].clone());
        part.ranks[1] = Rank::Ended(Outcome::NeverStarted);
        assert_eq!(part.due(), vec![Say::Released]);
    }

    #[test]
    fn a_vanished_shim_is_never_reported_as_released() {
        let mut part = part(2);
        part.open = true;
        part.ranks = vec![exited(0), Rank::Vanished];
        assert!(part.is_dead());
        assert_eq!(part.due(), vec![Say::Exited { ranks: vec![0], released: false }]);
    }
}
