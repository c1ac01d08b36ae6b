//! The queue of one pool of machines over virtual time, for policies that never take back what they gave. Owns the order
//! of events and what each policy may see: requests always, a duration only when it has passed.
//!
//! Time is looked at in free GPU thousandths of the pool; whether its machines have room for a gang is asked when it
//! would start.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use statemachine::runs::{Runs, unknown_ms};
use statemachine::settings::Planning;

use super::course::{Course, Journey, Spell};
use super::floor::Floor;
use super::policy::{Policy, Queue};
use super::pools::{Pool, kinds};
use super::trace::{Trace, TraceJob};
use super::waiting::Waiting;
use crate::line::Rank;
use crate::profile::{Profile, Stairs};
use crate::world::Request;

/// The limit of a job that stated none.
const UNLIMITED_S: u64 = 1 << 40;

/// When a job ends or its limit is used up, the number of its start, and its position.
type Due = Reverse<(u64, u64, usize)>;

/// Jobs are named by their position in the pool's order of submission.
struct Run<'a> {
    jobs: Vec<&'a TraceJob>,
    queue: Queue,
    floor: Floor,
    profile: Profile,
    waiting: Waiting,
    ends: BinaryHeap<Due>,
    limits: BinaryHeap<Due>,
    started: Vec<Option<u64>>,
    starts: u64,
    learned: Learned,
}

/// What only `Queue::ResponseRatio` keeps.
#[derive(Default)]
struct Learned {
    /// By user, what a cluster keeps in its state.
    runs: BTreeMap<u32, Runs>,
    /// Who waits, and how long each will likely run, in ms.
    waiting: Vec<(usize, u64)>,
}

/// Runs the jobs of one pool to their ends. A job that would run past its limit ends there.
///
/// Events are taken one at a time, within a second arrivals before ends and ends in order of start; a limit that is used
/// up frees its GPUs with the first event of its second.
pub(super) fn run(trace: &Trace, pool: Pool, policy: &Policy, seed: u64, course: &mut Course) {
    let kinds = kinds(trace, &pool);
    let floor = Floor::new(pool.machines, policy.score, kinds, seed);
    let jobs: Vec<&TraceJob> = pool.jobs.iter().map(|job| &trace.jobs[*job]).collect();
    let mut run = Run {
        queue: policy.queue,
        profile: Profile::new(floor.milli()),
        waiting: Waiting::new(jobs.iter().map(|job| (job.request, limit_s(job)))),
        ends: BinaryHeap::new(),
        limits: BinaryHeap::new(),
        started: vec![None; jobs.len()],
        starts: 0,
        learned: Learned::default(),
        floor,
        jobs,
    };
    run.play();
    for ((job, of), started) in pool.jobs.iter().zip(&run.jobs).zip(&run.started) {
        let Some(start_s) = *started else { continue };
        let end_s = start_s + of.duration_s.min(limit_s(of));
        course.journeys[*job] = Some(Journey { start_s, end_s, preemptions: 0 });
        course.spells.push(Spell { job: *job, from_s: start_s, until_s: end_s });
    }
}

fn limit_s(job: &TraceJob) -> u64 {
    job.requested_s.unwrap_or(UNLIMITED_S)
}

/// As a cluster keeps it, in ms: 0 = none.
fn stated_ms(job: &TraceJob) -> u64 {
    job.requested_s.map_or(0, |limit_s| limit_s.saturating_mul(1_000))
}

impl Learned {
    fn guess_ms(&self, job: &TraceJob) -> u64 {
        let limit_ms = stated_ms(job);
        self.runs.get(&job.tenant).map_or_else(|| unknown_ms(limit_ms), |runs| runs.guess_ms(limit_ms))
    }
}

impl Run<'_> {
    fn play(&mut self) {
        let mut holds: BTreeMap<Request, bool> = BTreeMap::new();
        let mut could = |run: &Self, at: usize| {
            let request = &run.jobs[at].request;
            *holds.entry(*request).or_insert_with(|| run.floor.could_ever_hold(request))
        };
        let arrivals: Vec<usize> = (0..self.jobs.len()).filter(|at| could(self, *at)).collect();
        let mut arrivals = arrivals.into_iter().peekable();
        loop {
            let arrival = arrivals.peek().map(|at| (self.jobs[*at].submit_s, *at));
            let end = self.ends.peek().map(|Reverse(end)| *end);
            let now = match (arrival, end) {
                (Some((submit_s, at)), end) if end.is_none_or(|(time, ..)| submit_s <= time) => {
                    arrivals.next();
                    self.arrive(submit_s, at)
                }
                (_, Some((time, _, at))) => {
                    self.ends.pop();
                    self.end(time, at)
                }
                (_, None) => return,
            };
            let Some(now) = now else { continue };
            if self.queue != Queue::ResponseRatio {
                self.look(now);
                continue;
            }
            // Once a second is enough: the order is of all who wait, whoever came first within it.
            let next = arrivals.peek().map(|at| self.jobs[*at].submit_s).into_iter();
            let next = next.chain(self.ends.peek().map(|Reverse((time, ..))| *time)).min();
            if next != Some(now) {
                self.look_by_ratio(now);
            }
        }
    }

    fn milli(&self, at: usize) -> u64 {
        self.jobs[at].request.total_milli()
    }

    fn limit_s(&self, at: usize) -> u64 {
        limit_s(self.jobs[at])
    }

    /// Goes on to `now`: used-up limits give back their GPUs.
    fn advance(&mut self, now: u64) {
        self.profile.advance(now);
        while let Some(Reverse((_, _, at))) = self.limits.peek().filter(|Reverse((time, ..))| *time <= now).copied() {
            self.limits.pop();
            self.floor.give(at);
        }
    }

    /// The time, if the queue is to be looked at.
    fn arrive(&mut self, now: u64, at: usize) -> Option<u64> {
        self.advance(now);
        self.waiting.insert(at);
        if self.queue == Queue::ResponseRatio {
            let guess_ms = self.learned.guess_ms(self.jobs[at]);
            self.learned.waiting.push((at, guess_ms));
            return Some(now);
        }
        (self.milli(at) <= self.profile.free_at(now)).then_some(now)
    }

    fn end(&mut self, now: u64, at: usize) -> Option<u64> {
        self.advance(now);
        self.floor.give(at);
        if let Some(start) = self.started[at] {
            self.profile.give(now, start + self.limit_s(at), self.milli(at));
        }
        if self.queue == Queue::ResponseRatio {
            self.learn(now, at);
        }
        Some(now)
    }

    /// An end tells of its user's jobs that wait.
    fn learn(&mut self, now: u64, at: usize) {
        let (of, limit_s) = (self.jobs[at], self.limit_s(at));
        let runs = self.learned.runs.entry(of.tenant).or_default();
        runs.learn(stated_ms(of), of.duration_s.min(limit_s) * 1_000, now * 1_000);
        for (at, guess_ms) in self.learned.waiting.iter_mut().filter(|(at, _)| self.jobs[*at].tenant == of.tenant) {
            *guess_ms = runs.guess_ms(stated_ms(self.jobs[*at]));
        }
    }

    /// The first that waits at `from` or behind for which enough is free, as far as is known.
    fn next_small(&self, from: usize, free: u64) -> Option<usize> {
        self.waiting.next(from, |request| self.is_small(request, free).then_some(u64::MAX))
    }

    fn is_small(&self, request: &Request, free: u64) -> bool {
        request.total_milli() <= free && !self.floor.refuses(request)
    }

    /// Starts what may start, in the order of arrival.
    fn look(&mut self, now: u64) {
        let mut reserved = Reserved::none(now);
        let mut from = 0;
        loop {
            let free = self.profile.free_at(now);
            let next = match self.queue {
                Queue::Easy { depth } if reserved.count >= depth => {
                    let longest = |request: &Request| reserved.longest_s(request.total_milli());
                    self.waiting.next(from, |request| longest(request).filter(|_| self.is_small(request, free)))
                }
                Queue::FifoSkip => self.next_small(from, free),
                _ => self.waiting.next(from, |_| Some(u64::MAX)),
            };
            let Some(at) = next else { return };
            from = at + 1;
            if self.try_start(now, at, &mut reserved) {
                continue;
            }
            match self.queue {
                Queue::Fifo => return,
                Queue::Easy { depth } if reserved.count < depth => {
                    // Without anybody small enough to start, reservations protect against nobody.
                    if self.next_small(from, free).is_none() {
                        return;
                    }
                    reserved.add(&self.profile, self.milli(at), self.limit_s(at));
                }
                _ => {}
            }
        }
    }

    /// Starts what may start, in the order of the response ratio, behind a reservation for the first that may not.
    fn look_by_ratio(&mut self, now: u64) {
        let free = self.profile.free_at(now);
        if self.next_small(0, free).is_none() {
            return;
        }
        let aged_after_ms = Planning::default().aged_after_ms;
        let rank = |(at, guess_ms): &(usize, u64)| {
            let waited_ms = (now - self.jobs[*at].submit_s) * 1_000;
            Reverse((Rank::new(waited_ms, *guess_ms, aged_after_ms, *at as u64), *at))
        };
        let mut order: BinaryHeap<Reverse<(Rank, usize)>> = self.learned.waiting.iter().map(rank).collect();
        let mut reserved = Reserved::none(now);
        while let Some(Reverse((_, at))) = order.pop() {
            if !self.try_start(now, at, &mut reserved) {
                reserved.add(&self.profile, self.milli(at), self.limit_s(at));
                break;
            }
        }
        // Most of those behind it are too large or too long: only the others need an order.
        let free = self.profile.free_at(now);
        let may = |at: usize| {
            let longest_s = reserved.longest_s(self.milli(at));
            self.is_small(&self.jobs[at].request, free)
                && longest_s.is_some_and(|longest_s| self.limit_s(at) <= longest_s)
        };
        let mut rest: Vec<(Rank, usize)> = order.into_iter().map(|Reverse(of)| of).filter(|(_, at)| may(*at)).collect();
        rest.sort_unstable();
        for (_, at) in rest {
            self.try_start(now, at, &mut reserved);
        }
        let started = &self.started;
        self.learned.waiting.retain(|(at, _)| started[*at].is_none());
    }

    /// Starts the job if it delays no reservation and the machines have room for it.
    fn try_start(&mut self, now: u64, at: usize, reserved: &mut Reserved) -> bool {
        let (milli, limit_s) = (self.milli(at), self.limit_s(at));
        if milli > self.profile.free_at(now) || reserved.longest_s(milli).is_none_or(|longest_s| limit_s > longest_s) {
            return false;
        }
        if !self.floor.take(at, &self.jobs[at].request) {
            return false;
        }
        self.profile.take(now, now + limit_s, milli);
        reserved.started(milli, limit_s);
        self.waiting.remove(at);
        self.started[at] = Some(now);
        self.ends.push(Reverse((now + self.jobs[at].duration_s.min(limit_s), self.starts, at)));
        self.limits.push(Reverse((now + limit_s, self.starts, at)));
        self.starts += 1;
        true
    }
}

/// The reservations of one look, and what may start beside them.
struct Reserved {
    now: u64,
    count: usize,
    /// What is free under them; none before the first.
    view: Option<(Profile, Stairs)>,
}

impl Reserved {
    fn none(now: u64) -> Self {
        Self { now, count: 0, view: None }
    }

    /// The longest limit with which a job of that size delays none of them, started now.
    fn longest_s(&self, milli: u64) -> Option<u64> {
        let Some((_, stairs)) = &self.view else { return Some(u64::MAX) };
        stairs.until(milli).map(|until| until.saturating_sub(self.now))
    }

    /// Reserves the earliest time for a job that can't start now.
    fn add(&mut self, profile: &Profile, milli: u64, limit_s: u64) {
        self.count += 1;
        let mut view = self.view.take().map_or_else(|| profile.clone(), |(view, _)| view);
        // Where the count would do, the machines' room does not: not before the next moment.
        if let Some(start) = view.earliest(self.now + 1, limit_s, milli) {
            view.take(start, start + limit_s, milli);
        }
        self.show(view);
    }

    fn started(&mut self, milli: u64, limit_s: u64) {
        if let Some((mut view, _)) = self.view.take() {
            view.take(self.now, self.now + limit_s, milli);
            self.show(view);
        }
    }

    fn show(&mut self, view: Profile) {
        let stairs = view.stairs(self.now);
        self.view = Some((view, stairs));
    }
}
