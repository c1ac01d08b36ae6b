//! A pool whose jobs state no limits, over virtual time: nobody knows how long a job will run, so GPUs go round, by the law of
//! `statemachine::turns`. Owns who is preempted for whom, and the order of events; where jobs lie is `floor`'s.
//!
//! - Jobs that have had little are young. A young job that finds no room preempts old ones of its tenant, or of one that is over its
//!   share: most jobs are short, and need not wait for the few long ones. Whose attempt loses least is the first choice.
//! - Who has waited for `WAIT_S` in all goes first and is preempted for no turn any more: that bounds what long jobs lose.
//! - In a pool of several tenants each has a share. What one does not use is lent, and reclaimed from who is over its own.
//! - A job runs for `RUN_S` before it is preempted for a turn, for twice that before the second time, and so on; and it runs
//!   `RESTART_S` longer for each time.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::course::{Course, Journey, Spell};
use super::floor::Floor;
use super::policy::Policy;
use super::pools::{Pool, kinds};
use super::trace::{Trace, TraceJob};

/// A job is young until it has had so many GPU seconds.
const YOUNG_GPU_S: u64 = 12_000;

/// Waiting, all of it together, from which a job goes first.
const WAIT_S: u64 = 64 * 3_600;

/// A preemption within this would waste more than it gives.
const RUN_S: u64 = 1_800;

/// How often a job gives back what its tenant borrowed.
const RECLAIMS: u32 = 3;

/// Work lost by a preemption.
const RESTART_S: u64 = 60;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Not yet submitted.
    Ahead,
    Waiting,
    Running,
    Ended,
}

/// A job, by its position in the pool's order of submission.
struct Job<'a> {
    of: &'a TraceJob,
    phase: Phase,
    /// Begin of the phase.
    since_s: u64,
    left_s: u64,
    /// On GPUs, before this phase.
    served_s: u64,
    first_start_s: Option<u64>,
    /// Preemptions for another one's turn, and for who takes back its share.
    given: u32,
    reclaimed: u32,
    /// Starts so far: an event of an earlier one is void.
    starts: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum What {
    Arrives,
    Ends,
    /// It may be preempted from now on.
    Ripens,
}

/// When, what, whose, and of which start.
type Event = Reverse<(u64, What, usize, u32)>;

struct Run<'a> {
    jobs: Vec<Job<'a>>,
    floor: Floor,
    events: BinaryHeap<Event>,
    /// Positions, in no order.
    waiting: Vec<usize>,
    running: Vec<usize>,
    /// By tenant, GPU thousandths.
    shares: Vec<u64>,
    used: Vec<u64>,
    spells: Vec<(usize, u64, u64)>,
}

/// `shares` are GPU thousandths by the trace's tenants.
pub(super) fn run(trace: &Trace, pool: Pool, policy: &Policy, seed: u64, shares: Vec<u64>, course: &mut Course) {
    let floor = Floor::new(pool.machines.clone(), policy.score, kinds(trace, &pool), seed);
    let mut run = Run {
        jobs: pool.jobs.iter().map(|job| Job::new(&trace.jobs[*job])).collect(),
        floor,
        events: BinaryHeap::new(),
        waiting: Vec::new(),
        running: Vec::new(),
        used: vec![0; shares.len()],
        shares,
        spells: Vec::new(),
    };
    run.play();
    for (number, job) in pool.jobs.iter().zip(&run.jobs) {
        let Some(start_s) = job.first_start_s.filter(|_| job.phase == Phase::Ended) else { continue };
        let preemptions = job.given + job.reclaimed;
        course.journeys[*number] = Some(Journey { start_s, end_s: job.since_s, preemptions });
    }
    let spells = run.spells.iter().map(|(at, from_s, until_s)| (pool.jobs[*at], *from_s, *until_s));
    course.spells.extend(spells.map(|(job, from_s, until_s)| Spell { job, from_s, until_s }));
}

impl<'a> Job<'a> {
    fn new(of: &'a TraceJob) -> Self {
        Self {
            of,
            phase: Phase::Ahead,
            since_s: of.submit_s,
            left_s: of.duration_s,
            served_s: 0,
            first_start_s: None,
            given: 0,
            reclaimed: 0,
            starts: 0,
        }
    }

    fn milli(&self) -> u64 {
        self.of.request.total_milli()
    }

    fn tenant(&self) -> usize {
        self.of.tenant as usize
    }

    fn in_phase(&self, phase: Phase, now: u64) -> u64 {
        if self.phase == phase { now - self.since_s } else { 0 }
    }

    /// Seconds on GPUs after which it is no longer young; a job without GPUs is never old.
    fn youth_s(&self) -> u64 {
        (YOUNG_GPU_S * 1_000).checked_div(self.milli()).unwrap_or(u64::MAX)
    }

    fn is_young(&self, now: u64) -> bool {
        self.served_s + self.in_phase(Phase::Running, now) < self.youth_s()
    }

    /// It has waited for so long that it goes first.
    fn is_owed_first(&self, now: u64) -> bool {
        now - self.of.submit_s - self.served_s - self.in_phase(Phase::Running, now) >= WAIT_S
    }

    /// The least run before its turn is over.
    fn run_s(&self) -> u64 {
        RUN_S * u64::from(self.given + 1)
    }

    /// It makes room for another one's turn.
    fn had_turn(&self, now: u64) -> bool {
        !self.is_young(now) && !self.is_owed_first(now) && self.in_phase(Phase::Running, now) >= self.run_s()
    }

    /// Lost, were it preempted.
    fn loss(&self, now: u64) -> u64 {
        self.in_phase(Phase::Running, now) * self.milli()
    }
}

impl Run<'_> {
    fn play(&mut self) {
        for (at, job) in self.jobs.iter().enumerate() {
            if self.floor.could_ever_hold(&job.of.request) {
                self.events.push(Reverse((job.of.submit_s, What::Arrives, at, 0)));
            }
        }
        let mut happened = false;
        while let Some(Reverse((now, what, at, start))) = self.events.pop() {
            happened |= self.happens(now, what, at, start);
            // Once a second, when all that happens in it has happened. What is void must not even cause a look: when a
            // preempted job would have ended is nobody's to know.
            let more = self.events.peek().is_some_and(|Reverse((time, ..))| *time == now);
            if !more && std::mem::take(&mut happened) && !self.waiting.is_empty() {
                self.look(now);
            }
        }
    }

    /// False for what an earlier start left behind.
    fn happens(&mut self, now: u64, what: What, at: usize, start: u32) -> bool {
        let holds = self.jobs[at].starts == start && self.jobs[at].phase != Phase::Ended;
        match what {
            What::Arrives => {
                self.jobs[at].phase = Phase::Waiting;
                self.waiting.push(at);
            }
            What::Ends if holds => self.end(now, at),
            What::Ends | What::Ripens => {}
        }
        holds
    }

    /// Starts who may start: first those within their tenant's share, then the others.
    fn look(&mut self, now: u64) {
        let jobs = &self.jobs;
        let order = |at: &usize| {
            let job = &jobs[*at];
            (!job.is_owed_first(now), !job.is_young(now), job.of.submit_s, *at)
        };
        self.waiting.sort_by_cached_key(order);
        for owed in [true, false] {
            // Who is larger than one that found no victims finds none either.
            let mut hopeless = [u64::MAX; 2];
            for at in self.waiting.clone() {
                if self.jobs[at].phase != Phase::Waiting || (owed && !self.is_owed(at)) {
                    continue;
                }
                if self.floor.take(at, &self.jobs[at].of.request) {
                    self.start(now, at);
                    continue;
                }
                let young = self.jobs[at].is_young(now);
                let hopeless = &mut hopeless[usize::from(young)];
                if (young || owed) && self.jobs[at].milli() < *hopeless && !self.preempt_for(now, at, owed) {
                    *hopeless = self.jobs[at].milli();
                }
            }
        }
        let jobs = &self.jobs;
        self.waiting.retain(|at| jobs[*at].phase == Phase::Waiting);
    }

    /// With this job its tenant stays within its share.
    fn is_owed(&self, at: usize) -> bool {
        let job = &self.jobs[at];
        self.used[job.tenant()] + job.milli() <= self.shares[job.tenant()]
    }

    /// The tenant has more than its share.
    fn borrows(&self, tenant: usize) -> bool {
        self.used[tenant] > self.shares[tenant]
    }

    /// Starts the job in place of others, if that is allowed and enough; else nothing changes.
    fn preempt_for(&mut self, now: u64, at: usize, owed: bool) -> bool {
        let mut lifted = Vec::new();
        let mut placed = false;
        for victim in self.victims(now, at, owed) {
            let tenant = self.jobs[victim].tenant();
            if tenant != self.jobs[at].tenant() && !self.borrows(tenant) {
                continue;
            }
            self.used[tenant] -= self.jobs[victim].milli();
            lifted.push((victim, self.floor.lift(victim)));
            if self.floor.take(at, &self.jobs[at].of.request) {
                placed = true;
                break;
            }
        }
        // Whoever still has its place keeps it; those lifted last were the first choice to stay.
        for (victim, held) in lifted.into_iter().rev() {
            if self.floor.set_down(victim, held) {
                self.used[self.jobs[victim].tenant()] += self.jobs[victim].milli();
            } else {
                self.preempted(now, victim, self.jobs[at].is_young(now) && self.jobs[victim].had_turn(now));
            }
        }
        if placed {
            self.start(now, at);
        }
        placed
    }

    /// Who may be preempted for the job, the first choice first.
    fn victims(&self, now: u64, at: usize, owed: bool) -> Vec<usize> {
        let young = self.jobs[at].is_young(now);
        let may = |victim: &&usize| {
            let job = &self.jobs[**victim];
            let (same, borrows) = (job.tenant() == self.jobs[at].tenant(), self.borrows(job.tenant()));
            let for_turn = young && job.had_turn(now) && (same || borrows);
            for_turn || (owed && !same && borrows && job.reclaimed < RECLAIMS)
        };
        let mut victims: Vec<usize> = self.running.iter().filter(may).copied().collect();
        victims.sort_by_key(|victim| (self.jobs[*victim].loss(now), *victim));
        victims
    }

    /// The floor has it already.
    fn start(&mut self, now: u64, at: usize) {
        self.running.push(at);
        let job = &mut self.jobs[at];
        (job.phase, job.since_s) = (Phase::Running, now);
        job.starts += 1;
        job.first_start_s.get_or_insert(now);
        self.used[job.of.tenant as usize] += job.of.request.total_milli();
        self.events.push(Reverse((now + job.left_s, What::Ends, at, job.starts)));
        let ripens = now + job.run_s().max(job.youth_s().saturating_sub(job.served_s));
        if ripens < now + job.left_s {
            self.events.push(Reverse((ripens, What::Ripens, at, job.starts)));
        }
    }

    /// It has lost its place already.
    fn preempted(&mut self, now: u64, at: usize, for_turn: bool) {
        let job = &mut self.jobs[at];
        job.left_s = job.left_s - (now - job.since_s) + RESTART_S;
        *if for_turn { &mut job.given } else { &mut job.reclaimed } += 1;
        // A void start: its end won't come.
        job.starts += 1;
        self.leave(now, at, Phase::Waiting);
        self.waiting.push(at);
    }

    fn end(&mut self, now: u64, at: usize) {
        self.floor.give(at);
        self.used[self.jobs[at].tenant()] -= self.jobs[at].milli();
        self.leave(now, at, Phase::Ended);
    }

    fn leave(&mut self, now: u64, at: usize, phase: Phase) {
        let job = &mut self.jobs[at];
        self.spells.push((at, job.since_s, now));
        job.served_s += now - job.since_s;
        (job.phase, job.since_s) = (phase, now);
        self.running.retain(|running| *running != at);
    }
}
