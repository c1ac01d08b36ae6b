//! Who goes first inside one tenant and one priority: the response ratio, the time waited divided by the time that the job will likely run,
//! by how long the last jobs of its user ran. The cluster's order and the simulator's `default` both rank by this.
//!
//! The ratio of who waits grows without bound, the faster the shorter the job; what has aged goes before any ratio, the oldest first. A guess
//! decides a place in the order and nothing else: reservations rest on limits.
//!
//! Jobs of one user with one limit are kin: they have one guess, so the first of them is the one that has waited longest. A line looks at one
//! of each kin.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

use statemachine::settings::OrderBy;
use statemachine::state::{Kin, QueueKey, Waiter};
use statemachine::{JobId, State, TenantId, UserId};

/// Ratios are compared in parts of so many.
const PARTS: u128 = 1 << 20;

/// A guess below this is counted as this, in ms: the bound of the bounded slowdown.
const SHORTEST_MS: u64 = 10_000;

/// Less goes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rank {
    ratio: Reverse<u64>,
    /// Place in the order of submission.
    seq: u64,
}

impl Rank {
    /// Of a job that has waited so long and will likely run for `guess_ms`; one that has waited for `aged_after_ms` (0 = never) goes before
    /// any ratio.
    pub fn new(waited_ms: u64, guess_ms: u64, aged_after_ms: u64, seq: u64) -> Self {
        let aged = aged_after_ms > 0 && waited_ms >= aged_after_ms;
        let ratio = u128::from(waited_ms) * PARTS / u128::from(guess_ms.max(SHORTEST_MS));
        // The last number is what has aged.
        let ratio = u64::try_from(ratio).unwrap_or(u64::MAX).min(u64::MAX - 1);
        Self { ratio: Reverse(if aged { u64::MAX } else { ratio }), seq }
    }
}

/// How far a tenant's line was looked at: the queue and priority that was reached, and there of each kin the last one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Passed {
    level: Kin,
    last: BTreeMap<Kin, (u64, JobId)>,
}

/// One tenant's waiting jobs, from its highest priority on.
#[derive(Debug)]
pub(crate) struct Line {
    passed: Passed,
    /// The first of each kin of the level, in the order.
    heads: BTreeSet<(Rank, Waiter)>,
}

impl Line {
    /// Behind what was passed, without the ones that `skip` names.
    pub fn new(state: &State, tenant: TenantId, passed: Option<Passed>, skip: &BTreeSet<QueueKey>) -> Self {
        let level = Kin::first_of(tenant);
        let mut line =
            Self { passed: passed.unwrap_or(Passed { level, last: BTreeMap::new() }), heads: BTreeSet::new() };
        line.enter(state, skip);
        line
    }

    pub fn into_passed(self) -> Passed {
        self.passed
    }

    pub fn first(&self) -> Option<QueueKey> {
        self.heads.first().map(|(_, waiter)| waiter.key())
    }

    /// Passes the first one.
    pub fn pass(&mut self, state: &State, skip: &BTreeSet<QueueKey>) {
        let Some((_, waiter)) = self.heads.pop_first() else { return };
        self.passed.last.insert(waiter.kin, (waiter.seq, waiter.job));
        self.follow(state, waiter, skip);
    }

    /// A task out of its turn, which `skip` names: it stands here no more.
    pub fn leave(&mut self, state: &State, key: QueueKey, skip: &BTreeSet<QueueKey>) {
        let Some(head) = self.heads.iter().find(|(_, waiter)| waiter.key() == key).copied() else { return };
        self.heads.remove(&head);
        self.follow(state, head.1, skip);
    }

    /// The next of the same kin, or the next level behind the last of this one.
    fn follow(&mut self, state: &State, waiter: Waiter, skip: &BTreeSet<QueueKey>) {
        let behind = state.index.kins.range((Bound::Excluded(waiter), Bound::Unbounded)).copied();
        let mut kin = behind.take_while(|other| other.kin == waiter.kin);
        if let Some(next) = kin.find(|other| !skip.contains(&other.key())) {
            let guess_ms = state.guess_ms(next.kin.user, next.kin.limit_ms);
            self.heads.insert((rank(state, &next, guess_ms), next));
        }
        if self.heads.is_empty() && self.descend() {
            self.enter(state, skip);
        }
    }

    /// False behind the tenant's last level.
    fn descend(&mut self) -> bool {
        let next = self.passed.level.next_level();
        if let Some(level) = next {
            self.passed = Passed { level, last: BTreeMap::new() };
        }
        next.is_some()
    }

    /// The first level from here on that has something left.
    fn enter(&mut self, state: &State, skip: &BTreeSet<QueueKey>) {
        loop {
            let Passed { level, last } = &mut self.passed;
            let from = Waiter::first_of(*level);
            let Some(first) = state.index.kins.range(from..).next().filter(|first| first.kin.tenant == level.tenant)
            else {
                return;
            };
            if first.kin.level() != *level {
                *level = first.kin.level();
                last.clear();
            }
            self.heads = heads(state, *level, last, skip);
            if !self.heads.is_empty() || !self.descend() {
                return;
            }
        }
    }
}

/// The first of each kin behind the last one that was passed. Where kin are many a step leads from one to the next.
fn heads(
    state: &State,
    level: Kin,
    last: &BTreeMap<Kin, (u64, JobId)>,
    skip: &BTreeSet<QueueKey>,
) -> BTreeSet<(Rank, Waiter)> {
    let mut heads = BTreeSet::new();
    let mut guess: Option<(UserId, u64, u64)> = None;
    let mut rest = state.index.kins.range(Waiter::first_of(level)..);
    let mut next = rest.next().copied();
    while let Some(waiter) = next.filter(|waiter| waiter.kin.level() == level) {
        let from = match last.get(&waiter.kin) {
            Some((seq, job)) => Bound::Excluded(Waiter { kin: waiter.kin, seq: *seq, job: *job }),
            None => Bound::Included(waiter),
        };
        let stands = |other: &Waiter| !skip.contains(&other.key());
        let first = if from == Bound::Included(waiter) && stands(&waiter) {
            Some(waiter)
        } else {
            let behind = state.index.kins.range((from, Bound::Unbounded)).copied();
            behind.take_while(|other| other.kin == waiter.kin).find(stands)
        };
        let (user, limit_ms) = (waiter.kin.user, waiter.kin.limit_ms);
        if let Some(first) = first {
            let known = guess.filter(|(of, limit, _)| (*of, *limit) == (user, limit_ms)).map(|(.., guess_ms)| guess_ms);
            let guess_ms = known.unwrap_or_else(|| state.guess_ms(user, limit_ms));
            guess = Some((user, limit_ms, guess_ms));
            heads.insert((rank(state, &first, guess_ms), first));
        }
        next = rest.next().copied();
        if next.is_some_and(|other| other.kin == waiter.kin) {
            rest = state.index.kins.range((Bound::Excluded(Waiter::last_of(waiter.kin)), Bound::Unbounded));
            next = rest.next().copied();
        }
    }
    heads
}

fn rank(state: &State, waiter: &Waiter, guess_ms: u64) -> Rank {
    let planning = &state.meta.settings.planning;
    match planning.order {
        OrderBy::Fair => Rank::new(waited_ms(state, waiter), guess_ms, planning.aged_after_ms, waiter.seq),
        OrderBy::Fifo => Rank { ratio: Reverse(0), seq: waiter.seq },
    }
}

/// Since its submission, or since the begin that it asked for.
fn waited_ms(state: &State, waiter: &Waiter) -> u64 {
    let submitted_ms = state.jobs.get(&waiter.job).map_or(state.meta.clock_ms, |job| job.value.submitted_clock_ms);
    let since_ms = state.meta.clock_ms.saturating_sub(submitted_ms);
    match waiter.kin.begin_wall_ms {
        0 => since_ms,
        begin_ms => since_ms.min(u64::try_from(state.meta.wall_ms.saturating_sub(begin_ms)).unwrap_or(0)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ratio_grows_faster_for_the_shorter_and_age_goes_before_it() {
        let rank = |waited_s: u64, guess_s: u64, seq| Rank::new(waited_s * 1_000, guess_s * 1_000, 604_800_000, seq);
        assert!(rank(60, 60, 2) < rank(3_000, 3_600, 1), "one run of waiting goes before less than one");
        assert!(rank(60, 60, 1) < rank(60, 60, 2), "of equals the first comes first");
        assert!(rank(60, 1, 2) > rank(60, 5, 1), "below ten seconds a job is no shorter");
        assert!(rank(604_800, 604_800, 9) < rank(604_799, 10, 1), "a week");
        assert!(rank(604_800, 604_800, 8) < rank(999_999, 10, 9), "of the aged the first comes first");
        assert!(
            Rank::new(604_800_000, 604_800_000, 0, 1) > Rank::new(604_799_000, 10_000, 0, 2),
            "never, if it is off"
        );
        assert!(Rank::new(u64::MAX, 0, 0, 1) > Rank::new(1, u64::MAX, 1, 2), "no number is as high as age");
    }
}
