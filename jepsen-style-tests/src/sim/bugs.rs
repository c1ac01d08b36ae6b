//! The planted bugs that this tier can catch: each is switched on in turn, and seeds run until a check names one of the invariants
//! that the bug breaks. Another name does not count.

use std::collections::BTreeMap;

use planted::Bug;

use super::campaign::{self, Plan};
use super::setup::Setup;

/// Seeds whose traces must be those of the plain build when no bug is chosen.
pub const SAME: u64 = 5;

/// The invariants by which a bug must be caught: those that it breaks for whoever looks from the outside.
pub fn breaks(bug: Bug) -> &'static [&'static str] {
    match bug {
        Bug::TokenFromMemory => &["token_grows", "replicas_equal"],
        Bug::ResultWithoutToken | Bug::ResultByAttempt => &["result_once"],
        Bug::LeaseByWallClock
        | Bug::NoMargin
        | Bug::NoGrace
        | Bug::AckWithoutQuorum
        | Bug::DeadlineFromAck
        | Bug::ShimTrustsAgent
        | Bug::MonotonicClock
        | Bug::AckAfterEnd => &["one_attempt_alive"],
        Bug::WatchSkips => &["watch"],
        Bug::TokenNotInSnapshot => &["token_grows", "replicas_equal"],
        Bug::ForgottenTooEarly | Bug::DedupInLeader | Bug::DedupIgnoresBody => &["request_once"],
        Bug::ReadWithoutQuorum => &["clients_linearizable"],
        Bug::TrustedPlan => &["gpu_in_one_lease"],
        Bug::FreedOnFirstExit => &["gang_whole", "gpu_in_one_lease"],
        Bug::EpochIgnored => &["epoch_grows"],
        Bug::RandomInApply => &["replicas_equal", "replay_equal"],
        Bug::LockAfterSession => &["lock_held"],
        Bug::LostBurnsRetry => &["retries_bounded"],
        // Of the Raft tier: a replica that refuses its own log has lost what it acknowledged, too.
        Bug::AckWithoutFsync | Bug::FsyncErrorIgnored | Bug::AckBeforeQuorum => &["nothing_lost", "committed_stays"],
        Bug::VoteNotKept => &["vote_kept"],
        Bug::LeaderRestored | Bug::LearnerCounts => &["nothing_lost", "log_matching", "committed_stays"],
        Bug::FenceNotSynced => &["fence_kept"],
    }
}

/// Why nothing in this tier has shown the bug so far; `None` = it is looked for.
pub fn out_of_reach(bug: Bug) -> Option<&'static str> {
    match bug {
        Bug::WatchSkips | Bug::TokenNotInSnapshot | Bug::FenceNotSynced => {
            Some("watches, stored snapshots and agents' disks are of real runs alone")
        }
        bug if in_raft(bug) => Some("log, votes and elections are the Raft tier's"),
        _ => None,
    }
}

/// Whether the bug stands in what only the Raft tier runs.
pub fn in_raft(bug: Bug) -> bool {
    matches!(
        bug,
        Bug::AckWithoutFsync
            | Bug::FsyncErrorIgnored
            | Bug::VoteNotKept
            | Bug::AckBeforeQuorum
            | Bug::LeaderRestored
            | Bug::LearnerCounts
    )
}

/// How one bug fared.
#[derive(Clone, Debug)]
pub struct Caught {
    /// The invariant, of those that the bug breaks, and how many seeds it took; `None` = not caught.
    pub by: Option<(String, u64)>,
    /// Other checks that failed before: invariant and seeds.
    pub others: BTreeMap<String, u64>,
}

/// Runs seeds from `first` with this bug until a check fails by a name that the bug breaks.
pub fn hunt(bug: Bug, first: u64, seeds: u64) -> Caught {
    planted::choose(Some(bug));
    let caught = hunt_by(bug, first, seeds, |seed| {
        let setup = Setup::of(seed, None);
        let faults = super::faults_of(&setup, &[]);
        super::run_for(&setup, &faults, breaks(bug)).failure.map(|failure| failure.invariant)
    });
    planted::choose(None);
    caught
}

/// The same in any tier: `broken` runs one seed with the bug and says which check failed.
pub fn hunt_by(bug: Bug, first: u64, seeds: u64, broken: impl Fn(u64) -> Option<String>) -> Caught {
    let mut caught = Caught { by: None, others: BTreeMap::new() };
    for nth in 1..=seeds {
        let Some(invariant) = broken(first.wrapping_add(nth - 1)) else { continue };
        if breaks(bug).contains(&invariant.as_str()) {
            caught.by = Some((invariant, nth));
            break;
        }
        *caught.others.entry(invariant).or_default() += 1;
    }
    caught
}

/// The hash of seeds that run with the feature and without a bug.
pub fn plain_hash() -> u64 {
    planted::choose(None);
    campaign::run(&Plan { count: SAME, quiet: true, ..Plan::one(1) }).hash
}
