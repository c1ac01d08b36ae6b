//! How long jobs ran: of each user the last few run times, by time limit. What orders who waits learns from it (`scheduling::line`); no
//! promise rests on it. Bounded: the limits a user has not used for longest, and the users of whom nothing ended for longest, are forgotten.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::id::UserId;
use crate::record::{Lease, Verdict, VerdictKind};
use crate::state::State;

/// How many ended jobs a guess rests on. The longest of four is rarely below the next one, and forgets in a day.
pub const REMEMBERED: usize = 4;
/// Limits of one user.
pub const LIMITS: usize = 32;
/// Users: some megabytes.
pub const USERS: usize = 10_000;
/// Fewer than these with the same limit say less than the user's last jobs of any limit.
const TELLING: usize = 2;
/// A job without a limit, of whom nothing is known, counts as running for a week.
const UNLIMITED_MS: u64 = 7 * 24 * 3_600_000;

/// What is known of one user's jobs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Runs {
    /// In ms, the newest first, at most `REMEMBERED`.
    pub last_ms: Vec<u64>,
    /// The same by time limit in ms (0 = none), at most `LIMITS`.
    pub by_limit: BTreeMap<u64, OfLimit>,
    /// Ends that were learned from.
    pub learned: u64,
    /// Cluster time of the newest.
    pub clock_ms: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OfLimit {
    pub last_ms: Vec<u64>,
    /// `Runs::learned` as of the newest.
    pub at: u64,
}

impl Runs {
    /// A job with this limit (0 = none) has run for so long and ended.
    pub fn learn(&mut self, limit_ms: u64, ran_ms: u64, clock_ms: u64) {
        self.learned = self.learned.saturating_add(1);
        self.clock_ms = clock_ms;
        note(&mut self.last_ms, ran_ms);
        let of_limit = self.by_limit.entry(limit_ms).or_default();
        of_limit.at = self.learned;
        note(&mut of_limit.last_ms, ran_ms);
        if self.by_limit.len() > LIMITS {
            let oldest = self.by_limit.iter().min_by_key(|(_, of_limit)| of_limit.at).map(|(limit_ms, _)| *limit_ms);
            oldest.and_then(|limit_ms| self.by_limit.remove(&limit_ms));
        }
    }

    /// How long a job with this limit (0 = none) will likely run, in ms, at least 1: the longest of the user's last few with the same
    /// limit, of any limit where too few are known, and never above the limit.
    pub fn guess_ms(&self, limit_ms: u64) -> u64 {
        let alike = self.by_limit.get(&limit_ms).map(|of_limit| &of_limit.last_ms);
        let alike = alike.filter(|last_ms| last_ms.len() >= TELLING).unwrap_or(&self.last_ms);
        let most_ms = if limit_ms == 0 { u64::MAX } else { limit_ms };
        alike.iter().max().map_or(unknown_ms(limit_ms), |ran_ms| *ran_ms).min(most_ms).max(1)
    }

    pub(crate) fn is_bounded(&self) -> bool {
        let few = |last_ms: &Vec<u64>| (1..=REMEMBERED).contains(&last_ms.len());
        let of_limit = |of_limit: &OfLimit| few(&of_limit.last_ms) && of_limit.at <= self.learned;
        few(&self.last_ms) && (1..=LIMITS).contains(&self.by_limit.len()) && self.by_limit.values().all(of_limit)
    }
}

/// What a job of a user of whom nothing is known will likely run, in ms: its limit (0 = none).
pub fn unknown_ms(limit_ms: u64) -> u64 {
    if limit_ms == 0 { UNLIMITED_MS } else { limit_ms }
}

fn note(last_ms: &mut Vec<u64>, ran_ms: u64) {
    last_ms.insert(0, ran_ms);
    last_ms.truncate(REMEMBERED);
}

impl State {
    /// [`Runs::guess_ms`], also of users of whom nothing is known.
    pub fn guess_ms(&self, user: UserId, limit_ms: u64) -> u64 {
        self.runs.get(&user).map_or_else(|| unknown_ms(limit_ms), |runs| runs.guess_ms(limit_ms))
    }

    /// A job ended with this lease: its last attempt tells how long such jobs run, unless the cluster ended it.
    pub(crate) fn learn_run(&mut self, lease: &Lease, verdict: &Verdict) {
        let own = matches!(
            verdict.kind,
            VerdictKind::Succeeded | VerdictKind::Failed | VerdictKind::TimedOut | VerdictKind::Cancelled
        );
        let (Some(started_ms), Some(job)) = (lease.started_ms.filter(|_| own), self.jobs.get(&lease.task.job)) else {
            return;
        };
        let (user, limit_ms) = (job.value.user, job.value.spec.limit_ms);
        let ran_ms = verdict.clock_ms.saturating_sub(started_ms);
        let ran_ms = if limit_ms == 0 { ran_ms } else { ran_ms.min(limit_ms) };
        let clock_ms = self.meta.clock_ms;
        let before_ms = self.runs.update(&user, |runs| {
            let before_ms = runs.clock_ms;
            runs.learn(limit_ms, ran_ms, clock_ms);
            before_ms
        });
        match before_ms {
            Some(before_ms) => {
                self.index.learned.remove(&(before_ms, user));
            }
            None => {
                let mut runs = Runs::default();
                runs.learn(limit_ms, ran_ms, clock_ms);
                self.runs.insert(user, runs);
            }
        }
        self.index.learned.insert((clock_ms, user));
        if self.runs.len() > USERS
            && let Some((_, oldest)) = self.index.learned.remove_min()
        {
            self.runs.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_of_the_last_four_alike() {
        let mut runs = Runs::default();
        runs.learn(3_600, 50, 1);
        // One of this limit says no more than one of any.
        assert_eq!((runs.guess_ms(3_600), runs.guess_ms(600), runs.guess_ms(20)), (50, 50, 20));
        runs.learn(600, 400, 2);
        runs.learn(3_600, 60, 3);
        assert_eq!((runs.guess_ms(3_600), runs.guess_ms(600), runs.guess_ms(0)), (60, 400, 400));
        (4..8).for_each(|at| runs.learn(3_600, 7, at));
        assert_eq!((runs.guess_ms(3_600), runs.guess_ms(600), runs.clock_ms), (7, 7, 7));
        assert_eq!((unknown_ms(5), unknown_ms(0)), (5, UNLIMITED_MS));
    }

    #[test]
    fn the_limit_that_was_not_used_for_longest_is_forgotten() {
        let mut runs = Runs::default();
        for at in 0..LIMITS as u64 {
            runs.learn(at + 1, 1, at);
        }
        runs.learn(1, 1, 99);
        runs.learn(1_000, 1, 100);
        assert!(runs.is_bounded() && runs.by_limit.contains_key(&1) && !runs.by_limit.contains_key(&2));
    }
}
