//! The queue of one pool of GPUs over virtual time, by the plain policies of the literature. Owns the order of events
//! and what each policy may see: requests always, a duration only when it has passed. Where in the machines a job lies
//! is not looked at here.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use super::trace::TraceJob;
use crate::profile::Profile;

/// A named way to choose which waiting jobs start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Queue {
    /// In order of arrival; stops at the first job that does not fit.
    Fifo,
    /// In order of arrival; skips what does not fit.
    FifoSkip,
    /// In order of arrival; the first `depth` jobs that don't fit get protected reservations, and a later job starts
    /// only where it delays none of them.
    Easy { depth: usize },
}

/// The limit of a job that stated none.
const UNLIMITED_S: u64 = 1 << 40;

/// A job that ends: when, and the number of its start.
type End = Reverse<(u64, u64, usize)>;

struct Run<'a> {
    jobs: &'a [TraceJob],
    queue: Queue,
    profile: Profile,
    waiting: VecDeque<usize>,
    ends: BinaryHeap<End>,
    /// By job, the second it started.
    started: Vec<Option<u64>>,
    starts: u64,
}

/// The wait of each job in seconds; `None` for a job larger than the pool, which never starts. Jobs are in order of
/// submission. A job that would run past its request ends there.
///
/// Events are taken one at a time, within a second arrivals before ends and ends in order of start; a request that is
/// used up frees its GPUs with the first event of its second.
pub fn waits(jobs: &[TraceJob], pool: u64, queue: Queue) -> Vec<Option<u64>> {
    let mut run = Run {
        jobs,
        queue,
        profile: Profile::new(pool),
        waiting: VecDeque::new(),
        ends: BinaryHeap::new(),
        started: vec![None; jobs.len()],
        starts: 0,
    };
    let mut arrivals = (0..jobs.len()).filter(|job| u64::from(jobs[*job].request.gpus) <= pool).peekable();
    loop {
        let arrival = arrivals.peek().copied();
        let end = run.ends.peek().map(|Reverse(end)| *end);
        match (arrival, end) {
            (Some(job), end) if end.is_none_or(|(time, ..)| jobs[job].submit_s <= time) => {
                arrivals.next();
                run.arrive(job);
            }
            (_, Some((time, _, job))) => {
                run.ends.pop();
                run.end(time, job);
            }
            (_, None) => break,
        }
    }
    run.started.iter().zip(jobs).map(|(started, job)| started.map(|start| start - job.submit_s)).collect()
}

impl Run<'_> {
    fn gpus(&self, job: usize) -> u64 {
        u64::from(self.jobs[job].request.gpus)
    }

    fn limit(&self, job: usize) -> u64 {
        self.jobs[job].requested_s.unwrap_or(UNLIMITED_S)
    }

    fn arrive(&mut self, job: usize) {
        let now = self.jobs[job].submit_s;
        self.profile.advance(now);
        self.waiting.push_back(job);
        if self.gpus(job) <= self.profile.free_at(now) {
            self.look(now);
        }
    }

    fn end(&mut self, now: u64, job: usize) {
        self.profile.advance(now);
        if let Some(start) = self.started[job] {
            let gpus = self.gpus(job);
            self.profile.give(now, start + self.limit(job), gpus);
        }
        self.look(now);
    }

    /// Starts what the policy lets start now.
    fn look(&mut self, now: u64) {
        let mut reservations = 0;
        let mut view: Option<Profile> = None;
        let mut at = 0;
        while at < self.waiting.len() {
            let job = self.waiting[at];
            let (gpus, until) = (self.gpus(job), now + self.limit(job));
            let fits_now = gpus <= self.profile.free_at(now);
            if fits_now && view.as_ref().unwrap_or(&self.profile).fits(now, until, gpus) {
                if let Some(view) = &mut view {
                    view.take(now, until, gpus);
                }
                self.start(now, job);
                self.waiting.remove(at);
                continue;
            }
            match self.queue {
                Queue::Fifo => return,
                Queue::FifoSkip => {}
                Queue::Easy { depth } if reservations < depth => {
                    reservations += 1;
                    let view = view.get_or_insert_with(|| self.profile.clone());
                    if let Some(start) = view.earliest(now, until - now, gpus) {
                        view.take(start, start + (until - now), gpus);
                    }
                }
                Queue::Easy { .. } if self.profile.free_at(now) == 0 => return,
                Queue::Easy { .. } => {}
            }
            at += 1;
        }
    }

    fn start(&mut self, now: u64, job: usize) {
        let (gpus, limit) = (self.gpus(job), self.limit(job));
        self.profile.take(now, now + limit, gpus);
        self.started[job] = Some(now);
        self.ends.push(Reverse((now + self.jobs[job].duration_s.min(limit), self.starts, job)));
        self.starts += 1;
    }
}
