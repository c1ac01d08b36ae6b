//! The planted bugs that this tier can catch: each is switched on in turn, and seeds run until a check names one of the invariants
//! that the bug breaks. Another name does not count.

use planted::Bug;

use super::campaign::{self, Plan};

/// Within so many seeds a bug must be caught.
pub const SEEDS: u64 = 500;
/// Seeds whose traces must be those of the plain build when no bug is chosen.
pub const SAME: u64 = 5;

/// The invariants by which a bug may be caught.
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
        | Bug::AckAfterEnd => &["one_attempt_alive", "gpu_in_one_lease"],
        Bug::ForgottenTooEarly | Bug::DedupInLeader | Bug::DedupIgnoresBody => &["request_once"],
        Bug::ReadWithoutQuorum => &["clients_linearizable", "nothing_lost"],
        Bug::TrustedPlan => &["gpu_in_one_lease"],
        Bug::FreedOnFirstExit => &["gang_whole", "gpu_in_one_lease", "one_attempt_alive"],
        Bug::EpochIgnored => &["epoch_grows"],
        Bug::RandomInApply => &["replicas_equal", "replay_equal"],
        Bug::LockAfterSession => &["lock_held"],
        Bug::LostBurnsRetry => &["retries_bounded"],
    }
}

/// How one bug fared.
#[derive(Clone, Debug)]
pub struct Caught {
    pub bug: Bug,
    /// The broken invariant, and how many seeds it took; `None` = not caught.
    pub by: Option<(String, u64)>,
}

impl Caught {
    pub fn as_named(&self) -> bool {
        self.by.as_ref().is_some_and(|(invariant, _)| breaks(self.bug).contains(&invariant.as_str()))
    }
}

/// Runs seeds from `first` with this bug until one fails.
pub fn hunt(bug: Bug, first: u64, seeds: u64, jobs: usize) -> Caught {
    planted::choose(Some(bug));
    // One seed after the other: the count is of the first that fails.
    let plan = Plan { first, count: seeds, jobs, ..plan() };
    let sum = campaign::run(&plan);
    planted::choose(None);
    let first_failed = sum.failures.into_iter().min_by_key(|report| report.setup.seed);
    let by = first_failed
        .and_then(|report| Some((report.failure?.invariant, report.setup.seed.wrapping_sub(first).wrapping_add(1))));
    Caught { bug, by }
}

/// The hash of seeds that run with the feature and without a bug.
pub fn plain_hash() -> u64 {
    planted::choose(None);
    campaign::run(&Plan { count: SAME, ..plan() }).hash
}

fn plan() -> Plan {
    Plan {
        first: 1,
        count: 1,
        simulated_ms: None,
        wall: None,
        only: Vec::new(),
        jobs: 1,
        trace: false,
        keep_going: false,
        corpus: None,
        quiet: true,
    }
}
