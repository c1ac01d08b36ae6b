//! The shim's decisions as a pure step: when a rank starts, which signal it gets, when everything is killed, and what is
//! recorded. No clock, no process: `now` is ms of CLOCK_BOOTTIME.
//!
//! The law that it keeps: at the deadline every process of the rank gets SIGKILL, whatever else has happened. Once a rank
//! was told to end, that is not taken back: a lease extended after the signal finds a rank that is on its way out.

use planted::{Bug, planted};

use super::control::Stop;
use super::record::{Cause, Exit, Outcome};

pub const SIGTERM: u8 = 15;
/// A killed process is looked at again so soon; doubles up to the maximum (a process can hang in the kernel for long).
const DRAIN_FIRST_MS: u64 = 20;
const DRAIN_MAX_MS: u64 = 1_000;

/// What the shim saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// The control page, read again: after a wake or when the timer fired.
    Page { deadline: u64, stop: Option<Stop>, open: bool },
    /// The rank's command runs.
    Started,
    /// The rank's own process ended; its descendants may live.
    RankEnded(Exit),
    /// No process of the rank is left.
    AllGone,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Do {
    Start,
    /// To the rank's process group.
    Signal(u8),
    /// SIGKILL to every process of the rank.
    KillAll,
    /// Write it to disk, then exit.
    Record(Outcome),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Waiting,
    /// Its process is there, its command does not run yet.
    Starting,
    Running,
    /// Signalled; killed at `kill_at` or at the deadline.
    Ending {
        kill_at: u64,
    },
    /// Everything was sent SIGKILL: wait until nothing is left.
    Draining {
        again_at: u64,
        wait: u64,
    },
    Over,
}

/// One rank under watch.
#[derive(Clone, Debug)]
pub struct Watch {
    grace_ms: u64,
    limit_ms: u64,
    limit_at: Option<u64>,
    deadline: u64,
    stop: Option<Stop>,
    stage: Stage,
    cause: Cause,
    exit: Option<Exit>,
}

impl Watch {
    /// `grace_ms`: between SIGTERM and SIGKILL; `limit_ms`: 0 = no limit.
    pub fn new(grace_ms: u64, limit_ms: u64) -> Self {
        Self {
            grace_ms,
            limit_ms,
            limit_at: None,
            deadline: 0,
            stop: None,
            stage: Stage::Waiting,
            cause: Cause::Own,
            exit: None,
        }
    }

    pub fn step(&mut self, seen: Seen, now: u64) -> Vec<Do> {
        match seen {
            Seen::Page { deadline, stop, open } => self.page(deadline, stop, open, now),
            Seen::Started => {
                // One that was killed on its way to its command stays killed.
                if self.stage == Stage::Starting {
                    self.stage = Stage::Running;
                    self.limit_at = (self.limit_ms > 0).then(|| now.saturating_add(self.limit_ms));
                }
                Vec::new()
            }
            Seen::RankEnded(exit) => {
                self.exit = Some(exit);
                match self.stage {
                    Stage::Draining { .. } => Vec::new(),
                    _ => self.kill(now),
                }
            }
            Seen::AllGone => match (self.stage, self.exit) {
                (Stage::Draining { .. }, Some(exit)) => {
                    self.stage = Stage::Over;
                    vec![Do::Record(Outcome::Exited { exit, cause: self.cause })]
                }
                _ => Vec::new(),
            },
        }
    }

    fn page(&mut self, deadline: u64, stop: Option<Stop>, open: bool, now: u64) -> Vec<Do> {
        let deadline = if planted(Bug::ShimTrustsAgent) { deadline.saturating_add(1 << 40) } else { deadline };
        self.deadline = deadline;
        let asked = if stop == self.stop { None } else { stop };
        self.stop = stop;
        match self.stage {
            Stage::Waiting if stop.is_some() || now >= deadline => {
                self.stage = Stage::Over;
                vec![Do::Record(Outcome::NeverStarted)]
            }
            Stage::Waiting if open => {
                self.stage = Stage::Starting;
                vec![Do::Start]
            }
            Stage::Starting if stop.is_some() => {
                self.blame(Cause::Stopped);
                self.kill(now)
            }
            Stage::Starting | Stage::Running | Stage::Ending { .. } if now >= deadline => {
                self.blame(Cause::LeaseEnd);
                self.kill(now)
            }
            Stage::Running => self.end_if_due(now),
            Stage::Ending { kill_at } => {
                let kill_at = asked.map_or(kill_at, |stop| kill_at.min(now.saturating_add(stop.grace_ms)));
                self.stage = Stage::Ending { kill_at };
                if now >= kill_at { self.kill(now) } else { Vec::new() }
            }
            Stage::Draining { again_at, wait } if now >= again_at => {
                let wait = (wait * 2).min(DRAIN_MAX_MS);
                self.stage = Stage::Draining { again_at: now + wait, wait };
                vec![Do::KillAll]
            }
            _ => Vec::new(),
        }
    }

    /// A running rank is told to end when it was asked to stop, at its limit, or a grace before its lease ends.
    fn end_if_due(&mut self, now: u64) -> Vec<Do> {
        let (cause, signal, kill_at) = if let Some(stop) = self.stop {
            (Cause::Stopped, stop.signal, now.saturating_add(stop.grace_ms))
        } else if self.limit_at.is_some_and(|at| now >= at) {
            (Cause::TimeLimit, SIGTERM, now.saturating_add(self.grace_ms))
        } else if now >= self.deadline.saturating_sub(self.grace_ms) {
            (Cause::LeaseEnd, SIGTERM, self.deadline)
        } else {
            return Vec::new();
        };
        self.blame(cause);
        self.stage = Stage::Ending { kill_at };
        vec![Do::Signal(signal)]
    }

    /// The first cause stands.
    fn blame(&mut self, cause: Cause) {
        if self.cause == Cause::Own {
            self.cause = cause;
        }
    }

    fn kill(&mut self, now: u64) -> Vec<Do> {
        self.stage = Stage::Draining { again_at: now + DRAIN_FIRST_MS, wait: DRAIN_FIRST_MS };
        vec![Do::KillAll]
    }

    /// When the page must be read again at the latest; `None` = the step is over.
    pub fn next_wake(&self) -> Option<u64> {
        match self.stage {
            Stage::Waiting | Stage::Starting => Some(self.deadline),
            Stage::Running => {
                let term_at = self.deadline.saturating_sub(self.grace_ms);
                Some(self.limit_at.map_or(term_at, |limit| limit.min(term_at)))
            }
            Stage::Ending { kill_at } => Some(kill_at.min(self.deadline)),
            Stage::Draining { again_at, .. } => Some(again_at),
            Stage::Over => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const OK: Exit = Exit { code: 0, signal: 0 };
    const KILLED: Exit = Exit { code: 0, signal: 9 };

    fn page(deadline: u64) -> Seen {
        Seen::Page { deadline, stop: None, open: true }
    }

    fn stopped(deadline: u64, grace_ms: u64) -> Seen {
        Seen::Page { deadline, stop: Some(Stop { signal: SIGTERM, grace_ms }), open: true }
    }

    fn running(grace: u64, limit: u64, deadline: u64) -> Watch {
        let mut watch = Watch::new(grace, limit);
        assert_eq!(watch.step(page(deadline), 0), vec![Do::Start]);
        watch.step(Seen::Started, 0);
        watch
    }

    #[test]
    fn a_rank_that_ends_by_itself_is_recorded_once_all_its_processes_are_gone() {
        let mut watch = running(5_000, 0, 100_000);
        assert_eq!(watch.step(Seen::RankEnded(OK), 10), vec![Do::KillAll]);
        assert_eq!(watch.step(Seen::AllGone, 11), vec![Do::Record(Outcome::Exited { exit: OK, cause: Cause::Own })]);
        assert_eq!(watch.next_wake(), None);
    }

    #[test]
    fn term_comes_a_grace_before_the_deadline_and_kill_at_it() {
        let mut watch = running(5_000, 0, 20_000);
        assert_eq!(watch.next_wake(), Some(15_000));
        assert_eq!(watch.step(page(20_000), 14_999), vec![]);
        assert_eq!(watch.step(page(20_000), 15_000), vec![Do::Signal(SIGTERM)]);
        assert_eq!(watch.next_wake(), Some(20_000));
        assert_eq!(watch.step(page(20_000), 20_000), vec![Do::KillAll]);
        watch.step(Seen::RankEnded(KILLED), 20_001);
        let record = Do::Record(Outcome::Exited { exit: KILLED, cause: Cause::LeaseEnd });
        assert_eq!(watch.step(Seen::AllGone, 20_002), vec![record]);
    }

    #[test]
    fn an_extended_deadline_is_found_when_the_timer_fires() {
        let mut watch = running(5_000, 0, 20_000);
        assert_eq!(watch.step(page(30_000), 15_000), vec![]);
        assert_eq!(watch.next_wake(), Some(25_000));
    }

    #[test]
    fn a_rank_that_was_told_to_end_is_killed_even_when_its_lease_is_extended() {
        let mut watch = running(5_000, 0, 20_000);
        watch.step(page(20_000), 15_000);
        assert_eq!(watch.step(page(90_000), 20_000), vec![Do::KillAll]);
    }

    #[test]
    fn a_machine_that_slept_past_the_deadline_kills_at_once() {
        let mut watch = running(5_000, 0, 20_000);
        assert_eq!(watch.step(page(20_000), 400_000), vec![Do::KillAll]);
    }

    #[test]
    fn a_stop_signals_and_kills_after_its_grace() {
        let mut watch = running(5_000, 0, 100_000);
        assert_eq!(watch.step(stopped(100_000, 2_000), 50), vec![Do::Signal(SIGTERM)]);
        assert_eq!(watch.next_wake(), Some(2_050));
        assert_eq!(watch.step(stopped(100_000, 2_000), 2_050), vec![Do::KillAll]);
    }

    #[test]
    fn a_second_stop_can_only_hurry() {
        let mut watch = running(5_000, 0, 100_000);
        watch.step(stopped(100_000, 10_000), 0);
        assert_eq!(watch.step(stopped(100_000, 50_000), 1_000), vec![]);
        assert_eq!(watch.next_wake(), Some(10_000));
        assert_eq!(watch.step(stopped(100_000, 0), 2_000), vec![Do::KillAll]);
    }

    #[test]
    fn the_limit_counts_from_the_start() {
        let mut watch = Watch::new(1_000, 10_000);
        watch.step(page(100_000), 0);
        watch.step(Seen::Started, 500);
        assert_eq!(watch.next_wake(), Some(10_500));
        assert_eq!(watch.step(page(100_000), 10_500), vec![Do::Signal(SIGTERM)]);
        assert_eq!(watch.step(page(100_000), 11_500), vec![Do::KillAll]);
        watch.step(Seen::RankEnded(KILLED), 11_501);
        let record = Do::Record(Outcome::Exited { exit: KILLED, cause: Cause::TimeLimit });
        assert_eq!(watch.step(Seen::AllGone, 11_502), vec![record]);
    }

    #[test]
    fn a_rank_behind_the_barrier_never_starts_after_a_stop_or_its_deadline() {
        let shut = |deadline, stop| Seen::Page { deadline, stop, open: false };
        let mut watch = Watch::new(1_000, 0);
        assert_eq!(watch.step(shut(9_000, None), 0), vec![]);
        assert_eq!(watch.next_wake(), Some(9_000));
        let stop = Some(Stop { signal: SIGTERM, grace_ms: 0 });
        assert_eq!(watch.step(shut(9_000, stop), 5), vec![Do::Record(Outcome::NeverStarted)]);
        let mut late = Watch::new(1_000, 0);
        assert_eq!(late.step(page(9_000), 9_000), vec![Do::Record(Outcome::NeverStarted)]);
    }

    #[test]
    fn a_command_that_can_not_be_loaded_in_time_is_killed_before_it_runs() {
        let mut watch = Watch::new(1_000, 0);
        watch.step(page(9_000), 0);
        assert_eq!(watch.next_wake(), Some(9_000));
        assert_eq!(watch.step(page(9_000), 9_000), vec![Do::KillAll]);
        assert_eq!(watch.step(Seen::Started, 9_001), vec![]);
        watch.step(Seen::RankEnded(KILLED), 9_002);
        let record = Do::Record(Outcome::Exited { exit: KILLED, cause: Cause::LeaseEnd });
        assert_eq!(watch.step(Seen::AllGone, 9_003), vec![record]);
        let mut stopped_early = Watch::new(1_000, 0);
        stopped_early.step(page(9_000), 0);
        assert_eq!(stopped_early.step(stopped(9_000, 500), 10), vec![Do::KillAll]);
    }

    #[test]
    fn what_hangs_in_the_kernel_is_killed_again_and_waited_for() {
        let mut watch = running(1_000, 0, 10_000);
        watch.step(page(10_000), 10_000);
        let again = watch.next_wake().unwrap();
        assert_eq!(watch.step(page(10_000), again), vec![Do::KillAll]);
        assert!(watch.next_wake().is_some());
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
        /// Driven by its own wakes alone, with pages that may extend the lease, no rank is left unkilled at its deadline.
        #[test]
        fn no_rank_outlives_the_deadline_of_its_page(
            grace in 0u64..5_000, limit in 0u64..20_000,
            extensions in proptest::collection::vec((0u64..30_000, 0u64..40_000), 0..20),
        ) {
            let mut watch = running(grace, limit, 10_000);
            let mut deadline = 10_000;
            let mut now = 0;
            let mut killed = false;
            let mut extensions = extensions.into_iter();
            for _ in 0..200 {
                let Some(wake) = watch.next_wake() else { break };
                prop_assert!(killed || wake <= deadline, "sleeps past the deadline it knows");
                now = now.max(wake);
                if let Some((after, by)) = extensions.next()
                    && after < now { deadline = deadline.max(now.saturating_sub(after) + by); }
                killed |= watch.step(page(deadline), now).contains(&Do::KillAll);
                if now >= deadline { prop_assert!(killed); }
                if killed { break }
            }
        }
    }
}
