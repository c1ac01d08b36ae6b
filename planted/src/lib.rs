//! Planted bugs: each stands at its real place in the real code as one line, `if planted(Bug::X)`, and is chosen at run
//! time. A check counts only after it caught the bugs that it is there for. Without the feature `on` the question is a
//! constant `false`; no release build can have the feature.

#[cfg(all(feature = "on", not(debug_assertions)))]
compile_error!("planted bugs are for builds with debug assertions: no release build may hold one");

macro_rules! bugs {
    ($($(#[$doc:meta])* $bug:ident $word:literal;)*) => {
        /// A bug that somebody could have made.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum Bug {
            $($(#[$doc])* $bug,)*
        }

        impl Bug {
            /// Every bug, in the order of the list.
            pub const ALL: &[Bug] = &[$(Bug::$bug),*];

            /// Its name on the command line and in reports.
            pub fn name(self) -> &'static str {
                match self {
                    $(Bug::$bug => $word,)*
                }
            }
        }
    };
}

bugs! {
    /// Tokens come from the memory of the process, not from the replicated state.
    TokenFromMemory "token_from_memory";
    /// A report is taken for the node's lease, whatever token it names.
    ResultWithoutToken "result_without_token";
    /// An exit is told apart by job and attempt number only: a preempted attempt's counts for its successor.
    ResultByAttempt "result_by_attempt";
    /// Silence is measured by the wall clock.
    LeaseByWallClock "lease_by_wall_clock";
    /// The leader ends a lease at its TTL, without the drift bound and the kill margin.
    NoMargin "no_margin";
    /// A new leader ends leases at once, without a TTL of grace.
    NoGrace "no_grace";
    /// A heartbeat is acknowledged without a quorum check: a deposed leader extends leases.
    AckWithoutQuorum "ack_without_quorum";
    /// The agent counts a deadline from the receipt of the acknowledgement.
    DeadlineFromAck "deadline_from_ack";
    /// The shim leaves the kill at the deadline to the agent.
    ShimTrustsAgent "shim_trusts_agent";
    /// Deadlines by a clock that stands still while the machine is suspended.
    MonotonicClock "monotonic_clock";
    /// A request id is forgotten while one of its age is still accepted.
    ForgottenTooEarly "forgotten_too_early";
    /// Request ids live in the leader's memory and go with it.
    DedupInLeader "dedup_in_leader";
    /// A known request id answers whatever the body is.
    DedupIgnoresBody "dedup_ignores_body";
    /// A watch from a revision on begins behind what is newest when it is opened.
    WatchSkips "watch_skips";
    /// The token counter is not in a snapshot: a replica that loads one counts from the beginning.
    TokenNotInSnapshot "token_not_in_snapshot";
    /// Reads are answered by any replica without asking the leader's quorum.
    ReadWithoutQuorum "read_without_quorum";
    /// Apply trusts the plan and checks no placement again.
    TrustedPlan "trusted_plan";
    /// A part's GPUs are freed with the end of its first rank.
    FreedOnFirstExit "freed_on_first_exit";
    /// A heartbeat's epoch is not compared.
    EpochIgnored "epoch_ignored";
    /// Apply draws a random number of its own.
    RandomInApply "random_in_apply";
    /// A lock goes to a waiter whose session has ended.
    LockAfterSession "lock_after_session";
    /// A lost node burns a retry.
    LostBurnsRetry "lost_burns_retry";
    /// A heartbeat is acknowledged after the end of its lease was proposed.
    AckAfterEnd "ack_after_end";
    /// The log is not synced before an append is answered.
    AckWithoutFsync "ack_without_fsync";
    /// The log goes on after a sync that failed.
    FsyncErrorIgnored "fsync_error_ignored";
    /// A vote is answered, and never written.
    VoteNotKept "vote_not_kept";
    /// An append that was sent counts as stored by the follower.
    AckBeforeQuorum "ack_before_quorum";
    /// A leader that restarts goes on with its term instead of being elected again.
    LeaderRestored "leader_restored";
    /// Whoever is told a membership counts its learners as voters.
    LearnerCounts "learner_counts";
    /// An attempt starts before the fence file that names it is on disk.
    FenceNotSynced "fence_not_synced";
}

#[cfg(feature = "on")]
mod chosen {
    use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

    use super::Bug;

    static MEMORY: AtomicU64 = AtomicU64::new(0);
    const NONE: u8 = u8::MAX;
    static CHOSEN: AtomicU8 = AtomicU8::new(NONE);

    /// Chooses the one bug of this process; `None` = none.
    pub fn choose(bug: Option<Bug>) {
        CHOSEN.store(bug.map_or(NONE, |bug| bug as u8), Ordering::Relaxed);
    }

    /// A number that no other call of this process gets: what the log does not know.
    pub fn process_memory() -> u64 {
        MEMORY.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Whether this bug was chosen.
    pub fn planted(bug: Bug) -> bool {
        CHOSEN.load(Ordering::Relaxed) == bug as u8
    }
}

#[cfg(feature = "on")]
pub use chosen::{choose, planted, process_memory};

/// What only this process remembers: nothing, in a build without planted bugs.
#[cfg(not(feature = "on"))]
pub const fn process_memory() -> u64 {
    0
}

/// Whether this bug was chosen: never, in a build without them.
#[cfg(not(feature = "on"))]
#[inline(always)]
pub const fn planted(_bug: Bug) -> bool {
    false
}
