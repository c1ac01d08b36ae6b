//! Planted bugs in real processes: for each that a simulation does not hold, or that must be caught twice, the runs that must show it, and
//! the invariants by whose names. Another name does not count, and neither does a run that shows nothing.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::cluster::block_on;
use crate::faults::{Fault, Need};
use crate::nemesis;
use crate::network::Network;
use crate::verdict::Verdict;
use crate::{corrupt, powercut, replays};

/// Within which each must be caught.
pub const WITHIN: Duration = Duration::from_secs(600);

/// Which run, again and again with other seeds.
#[derive(Clone, Copy, Debug)]
pub enum How {
    /// Each of these faults once, a run.
    Nemesis(&'static [Fault]),
    Corrupt,
    Powercut,
    Replays,
}

/// A bug by its name, how it must show, and by which invariants.
#[derive(Clone, Copy, Debug)]
pub struct Hunt {
    pub bug: &'static str,
    how: How,
    breaks: &'static [&'static str],
}

pub const ALL: [Hunt; 8] = [
    Hunt { bug: "ack_without_fsync", how: How::Powercut, breaks: &["nothing_lost"] },
    Hunt { bug: "token_not_in_snapshot", how: How::Corrupt, breaks: &["token_grows", "replicas_equal"] },
    Hunt { bug: "watch_skips", how: How::Nemesis(&[Fault::KillReplica]), breaks: &["watch"] },
    Hunt {
        bug: "read_without_quorum",
        how: How::Nemesis(&[Fault::ClientsSeeOldLeader]),
        breaks: &["clients_linearizable"],
    },
    Hunt { bug: "shim_trusts_agent", how: How::Nemesis(&[Fault::FreezeAgent]), breaks: &["one_attempt_alive"] },
    Hunt { bug: "random_in_apply", how: How::Nemesis(&[Fault::KillAgentAndShims]), breaks: &["replicas_equal"] },
    Hunt { bug: "fence_not_synced", how: How::Nemesis(&[Fault::AgentPowerCut]), breaks: &["fence_kept"] },
    Hunt { bug: "dedup_in_leader", how: How::Replays, breaks: &["request_once"] },
];

/// How one bug fared.
#[derive(Clone, Debug)]
pub struct Caught {
    /// The invariant; `None`: not caught in time.
    pub by: Option<String>,
    pub runs: u64,
    pub took: Duration,
    /// What other runs said before.
    pub others: Vec<String>,
}

impl Hunt {
    /// Runs until a violation begins with a name that the bug breaks. Leaves files in `out`.
    pub fn run(&self, out: &Path) -> Caught {
        let began = Instant::now();
        let mut caught = Caught { by: None, runs: 0, took: Duration::ZERO, others: Vec::new() };
        while caught.by.is_none() && began.elapsed() < WITHIN {
            caught.runs += 1;
            let verdict = self.once(caught.runs, out);
            for said in verdict.violations.iter().chain(&verdict.empty).chain(&verdict.idle) {
                match self.breaks.iter().find(|name| names(said, name)) {
                    Some(name) if caught.by.is_none() => caught.by = Some((*name).to_owned()),
                    _ => caught.others.push(said.clone()),
                }
            }
        }
        caught.took = began.elapsed();
        caught
    }

    fn once(&self, seed: u64, out: &Path) -> Verdict {
        let planted = Some(self.bug.to_owned());
        match self.how {
            How::Corrupt => block_on(corrupt::run(&corrupt::Plan { times: 18, seed, planted })),
            How::Powercut => block_on(powercut::run(&powercut::Plan { cuts: 5, replicas: 1, seed, planted })),
            How::Replays => block_on(replays::run(&replays::Plan { ids: 2_000, times: 10, seed, planted })),
            How::Nemesis(faults) => {
                let network = faults.iter().any(|fault| fault.needs() == Some(Need::Network));
                let network = if network { Network::make(&nemesis::machines(), seed).map(Some) } else { Ok(None) };
                let network: Option<Arc<Network>> = match network {
                    Ok(network) => network,
                    Err(why) => return Verdict { empty: vec![why], ..Verdict::default() },
                };
                let (faults, out) = (faults.to_vec(), out.join(self.bug));
                let (duration, pairs) = (Duration::from_secs(20), false);
                block_on(nemesis::run(&nemesis::Plan { duration, seed, faults, pairs, planted, network, out }))
            }
        }
    }
}

/// A check tells its name first, perhaps behind when it was made.
fn names(said: &str, invariant: &str) -> bool {
    said.split([':', ' ']).any(|word| word == invariant)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_bug_is_known_to_the_product() {
        for hunt in ALL {
            let known = planted::Bug::ALL.iter().any(|bug| bug.name() == hunt.bug);
            assert!(known || hunt.bug == "ack_without_fsync", "{}", hunt.bug);
        }
    }

    #[test]
    fn a_name_is_a_word_of_its_own() {
        assert!(names("after cut 1: nothing_lost: replica 2 lacks", "nothing_lost"));
        assert!(names("watch: watcher-0 missed", "watch"));
        assert!(!names("the watcher was lost", "watch"));
    }
}
