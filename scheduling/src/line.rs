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

use statemachine::record::{Job, Versioned};
use statemachine::settings::OrderBy;
use statemachine::state::{Kin, QueueKey, Waiter};
use statemachine::{JobId, State, TaskKey, TenantId, UserId};

/// Ratios are compared in parts of so many.
const PARTS: u128 = 1 << 20;

/// A guess below this is counted as this, in ms: the bound of the bounded slowdown.
const SHORTEST_MS: u64 = 10_000;

/// Less goes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rank {
    /// It has had its turn, and is owed no more before others.
    late: bool,
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
        Self { late: false, ratio: Reverse(if aged { u64::MAX } else { ratio }), seq }
    }

    /// As one that has aged.
    fn first(self) -> Self {
        Self { ratio: Reverse(u64::MAX), ..self }
    }
}

/// How far a tenant's line was looked at: the queue and priority that was reached, and there of each kin the last one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Passed {
    level: Kin,
    last: BTreeMap<Kin, (u64, JobId)>,
}

/// One tenant's waiting jobs, from its highest priority on.
pub(crate) struct Line<'a> {
    state: &'a State,
    passed: Passed,
    kin: Vec<Kindred<'a>>,
    /// The first of each kin of the level in the order, by its place in `kin`.
    heads: BTreeSet<(Rank, usize)>,
}

/// Jobs of one kin.
struct Kindred<'a> {
    guess_ms: u64,
    head: Waiter,
    job: Option<&'a Job>,
    /// Those behind its head, once somebody asked.
    behind: Option<Box<dyn Iterator<Item = Waiter> + 'a>>,
    rows: Rows<'a>,
    last: Option<(Kin, (u64, JobId))>,
}

/// Jobs by ids that ascend: one that is near is a few steps from the one before it, which costs less than to look it up.
struct Rows<'a> {
    state: &'a State,
    at: JobId,
    behind: Option<Box<dyn Iterator<Item = Row<'a>> + 'a>>,
}

type Row<'a> = (&'a JobId, &'a Versioned<Job>);

/// Ids between two jobs that are near each other.
const NEAR: u64 = 16;

impl<'a> Rows<'a> {
    fn get(&mut self, id: JobId) -> Option<&'a Job> {
        let is_near = id > self.at && id.0 - self.at.0 <= NEAR;
        self.at = id;
        if !is_near {
            self.behind = None;
            return self.state.jobs.get(&id).map(|job| &job.value);
        }
        let state = self.state;
        let behind = self.behind.get_or_insert_with(|| Box::new(state.jobs.range(id..)));
        behind.find(|(other, _)| **other >= id).filter(|(other, _)| **other == id).map(|(_, job)| &job.value)
    }
}

impl<'a> Line<'a> {
    /// Behind what was passed, without the ones that `skip` names.
    pub fn new(state: &'a State, tenant: TenantId, passed: Option<Passed>, skip: &BTreeSet<QueueKey>) -> Self {
        let level = Kin::first_of(tenant);
        let passed = passed.unwrap_or(Passed { level, last: BTreeMap::new() });
        let mut line = Self { state, passed, kin: Vec::new(), heads: BTreeSet::new() };
        line.enter(skip);
        line
    }

    pub fn into_passed(mut self) -> Passed {
        self.passed.last.extend(self.kin.iter().filter_map(|kin| kin.last));
        self.passed
    }

    pub fn first(&self) -> Option<QueueKey> {
        self.heads.first().map(|(_, kin)| self.kin[*kin].head.key())
    }

    /// Passes the first one: its job.
    pub fn pass(&mut self, skip: &BTreeSet<QueueKey>) -> Option<&'a Job> {
        let (_, kin) = self.heads.pop_first()?;
        let Kindred { head, job, .. } = self.kin[kin];
        self.kin[kin].last = Some((head.kin, (head.seq, head.job)));
        self.follow(kin, skip);
        job
    }

    /// A task out of its turn, which `skip` names: it stands here no more.
    pub fn leave(&mut self, key: QueueKey, skip: &BTreeSet<QueueKey>) {
        let Some(head) = self.heads.iter().find(|(_, kin)| self.kin[*kin].head.key() == key).copied() else { return };
        self.heads.remove(&head);
        self.follow(head.1, skip);
    }

    /// The next of the same kin, or the next level behind the last of this one.
    fn follow(&mut self, kin: usize, skip: &BTreeSet<QueueKey>) {
        let state = self.state;
        let of_kin = &mut self.kin[kin];
        let head = of_kin.head;
        let behind = of_kin.behind.get_or_insert_with(|| Box::new(all_behind(state, head)));
        if let Some(next) = behind.find(|other| skip.is_empty() || !skip.contains(&other.key())) {
            (of_kin.head, of_kin.job) = (next, of_kin.rows.get(next.job));
            self.heads.insert((rank(state, &next, of_kin.job, of_kin.guess_ms), kin));
        }
        if self.heads.is_empty() && self.descend() {
            self.enter(skip);
        }
    }

    /// False behind the tenant's last level.
    fn descend(&mut self) -> bool {
        let next = self.passed.level.next_level();
        if let Some(level) = next {
            self.passed = Passed { level, last: BTreeMap::new() };
            self.kin.clear();
        }
        next.is_some()
    }

    /// The first level from here on that has something left.
    fn enter(&mut self, skip: &BTreeSet<QueueKey>) {
        loop {
            let Passed { level, last } = &mut self.passed;
            let from = Waiter::first_of(*level);
            let first = self.state.index.kins.range(from..).next();
            let Some(first) = first.filter(|first| first.kin.tenant == level.tenant) else { return };
            if first.kin.level() != *level {
                *level = first.kin.level();
                last.clear();
            }
            self.find_heads(skip);
            if !self.heads.is_empty() || !self.descend() {
                return;
            }
        }
    }

    /// The first of each kin behind the last one that was passed. Where kin are many a step leads from one to the next.
    fn find_heads(&mut self, skip: &BTreeSet<QueueKey>) {
        let (state, level) = (self.state, self.passed.level);
        let mut guess: Option<(UserId, u64, u64)> = None;
        let mut rest = state.index.kins.range(Waiter::first_of(level)..);
        let mut next = rest.next().copied();
        while let Some(waiter) = next.filter(|waiter| waiter.kin.level() == level) {
            let stands = |other: &Waiter| !skip.contains(&other.key());
            let first = match self.passed.last.get(&waiter.kin) {
                None if stands(&waiter) => Some(waiter),
                None => all_behind(state, waiter).find(stands),
                Some((seq, job)) => all_behind(state, Waiter { kin: waiter.kin, seq: *seq, job: *job }).find(stands),
            };
            if let Some(first) = first {
                let (user, limit_ms) = (waiter.kin.user, waiter.kin.limit_ms);
                let known = guess.filter(|(of, limit, _)| (*of, *limit) == (user, limit_ms));
                let guess_ms = known.map_or_else(|| state.guess_ms(user, limit_ms), |(.., guess_ms)| guess_ms);
                guess = Some((user, limit_ms, guess_ms));
                let mut rows = Rows { state, at: JobId(0), behind: None };
                let job = rows.get(first.job);
                self.heads.insert((rank(state, &first, job, guess_ms), self.kin.len()));
                self.kin.push(Kindred { guess_ms, head: first, job, behind: None, rows, last: None });
            }
            next = rest.next().copied();
            if next.is_some_and(|other| other.kin == waiter.kin) {
                rest = state.index.kins.range((Bound::Excluded(Waiter::last_of(waiter.kin)), Bound::Unbounded));
                next = rest.next().copied();
            }
        }
    }
}

/// Those of the same kin behind this one.
fn all_behind(state: &State, waiter: Waiter) -> impl Iterator<Item = Waiter> + '_ {
    let last = Waiter::last_of(waiter.kin);
    state.index.kins.range((Bound::Excluded(waiter), Bound::Included(last))).copied()
}

fn rank(state: &State, waiter: &Waiter, job: Option<&Job>, guess_ms: u64) -> Rank {
    let planning = &state.meta.settings.planning;
    let Some(job) = job.filter(|_| planning.order == OrderBy::Fair) else {
        return Rank { late: false, ratio: Reverse(0), seq: waiter.seq };
    };
    let rank = Rank::new(state.in_line_ms(job), guess_ms, planning.aged_after_ms, waiter.seq);
    if !state.takes_turns(job) {
        return rank;
    }
    let had = state.tasks.get(&TaskKey::only(waiter.job)).map(|task| task.value.had).unwrap_or_default();
    match state.is_owed_first(job, had.run_ms) {
        true => rank.first(),
        false => Rank { late: had.turn && rank.ratio.0 < u64::MAX, ..rank },
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
