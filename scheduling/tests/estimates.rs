//! How good the estimated start is: the planner itself, as a cluster runs it, over real logs of submissions under virtual
//! time. Each log is one pool of equal machines with one GPU each; a job asks for as many as it had processors, and its time
//! limit is what its user asked for. The logs are in $ARES_TEST_DATA/traces; without them it says so and passes. Minutes in
//! release: `cargo test --release -p scheduling --test estimates -- --ignored --nocapture`.
#![allow(clippy::print_stdout)]

mod site;
mod traces;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use scheduling::Start;
use scheduling::plan::{Cache, Limits, plan};
use scheduling::simulate::policy::Policy;
use scheduling::simulate::trace::{Trace, TraceJob, read};
use scheduling::simulate::{Options, run};
use scheduling::why::why;
use site::{Machine, Site, cpu_only, pairs, shape};
use statemachine::command::SetPolicy;
use statemachine::settings::OrderBy;
use statemachine::spec::Shape;
use statemachine::{JobId, TaskKey, Token};

/// Jobs of a log that are played, from its beginning.
const JOBS: usize = 10_000;
/// Of the jobs that wait one in so many is asked when it will start.
const ASKED: usize = 10;
/// Jobs of a log that are played where all that wait have reservations, which are made anew in each cycle.
const RESERVED_JOBS: usize = 1_000;
/// What the planner adds to a job's limit.
const GRACE_MS: u64 = 10_000;

struct Play {
    site: Site,
    cache: Cache,
    /// When a job really ends, in ms.
    ends: BinaryHeap<Reverse<(u64, Token)>>,
    runs_ms: BTreeMap<JobId, u64>,
    starts_ms: BTreeMap<JobId, u64>,
    limits: Limits,
}

/// What a job was told: the interval, if it has an end.
struct Told {
    job: JobId,
    at_ms: u64,
    soonest_ms: u64,
    latest_ms: Option<u64>,
}

impl Play {
    /// Equal machines with one GPU each.
    fn new(machines: usize) -> Self {
        let one = Machine { gpu_type: "cpu", class: pairs(1, 0, 0), cores_by_numa: vec![1, 1], mem_mib: 1_000 };
        Self::on(vec![one; machines])
    }

    fn on(machines: Vec<Machine>) -> Self {
        let mut site = Site::default();
        for (n, machine) in machines.into_iter().enumerate() {
            site.join(&format!("n{n:03}"), machine);
        }
        Self {
            site,
            cache: Cache::default(),
            ends: BinaryHeap::new(),
            runs_ms: BTreeMap::new(),
            starts_ms: BTreeMap::new(),
            limits: Limits::default(),
        }
    }

    /// Ends what ends before this time, with a cycle after each end.
    fn until(&mut self, time_ms: u64) {
        while let Some(Reverse((end, token))) = self.ends.peek().copied().filter(|Reverse((end, _))| *end <= time_ms) {
            self.ends.pop();
            self.clock(end);
            self.site.finish(token);
            self.cycle();
        }
        self.clock(time_ms);
    }

    fn clock(&mut self, time_ms: u64) {
        let clock_ms = &mut self.site.state.meta.clock_ms;
        *clock_ms = time_ms.max(*clock_ms);
    }

    fn cycle(&mut self) {
        let plan = plan(&self.site.state, &mut self.cache, &self.limits, &self.site.unheard);
        let tokens = self.site.grant(&plan);
        tokens.iter().for_each(|token| self.site.started(*token));
        let now = self.site.state.meta.clock_ms;
        for (token, place) in tokens.into_iter().zip(&plan.places) {
            self.starts_ms.insert(place.task.job, now);
            self.ends.push(Reverse((now + self.runs_ms[&place.task.job], token)));
        }
    }

    fn submit(&mut self, job: &TraceJob) -> JobId {
        let user = format!("user{}", job.tenant);
        let limit_ms = job.requested_s.unwrap_or(0) * 1_000;
        let nodes = u16::try_from(job.request.gpus).expect("it fits the pool");
        let runs_ms = job.duration_s * 1_000;
        let runs_ms = if limit_ms == 0 { runs_ms } else { runs_ms.min(limit_ms) };
        self.submit_shape(&user, shape(nodes, 1, 1), limit_ms, runs_ms)
    }

    fn submit_shape(&mut self, user: &str, shape: Shape, limit_ms: u64, runs_ms: u64) -> JobId {
        let id = self.site.submit_by(user, shape, 0, limit_ms);
        self.runs_ms.insert(id, runs_ms);
        self.cycle();
        id
    }

    fn ask(&mut self, job: JobId) -> Told {
        let answer = why(&self.site.state, &mut self.cache, TaskKey::only(job), &self.site.unheard).expect("it waits");
        let now = self.site.state.meta.clock_ms;
        let time = |start| match start {
            Start::Now => Some(now),
            Start::At(at_ms) => Some(at_ms),
            Start::Unknown => None,
        };
        Told { job, at_ms: now, soonest_ms: time(answer.soonest).unwrap_or(now), latest_ms: time(answer.latest) }
    }
}

fn log(name: &str) -> Option<Trace> {
    let files = ["jobs.csv.gz", "nodes.csv"].map(|kind| unpacked_or_say(&format!("{name}.{kind}")));
    let [Some(jobs), Some(nodes)] = files else { return None };
    Some(read(("jobs", &jobs), ("nodes", &nodes)).expect("a well-formed trace"))
}

fn unpacked_or_say(name: &str) -> Option<String> {
    let text = traces::unpacked(name);
    if text.is_none() {
        eprintln!("SKIPPED: {name} is not in $ARES_TEST_DATA/traces");
    }
    text
}

fn measure(name: &str, order: OrderBy, most_late: usize) {
    let Some(mut trace) = log(name) else { return };
    let pool: u32 = trace.machines.iter().map(|machine| machine.gpus).sum();
    trace.jobs.retain(|job| job.request.gpus <= pool);
    trace.jobs.truncate(JOBS);
    let mut play = Play::new(pool as usize);
    play.site.policy(SetPolicy { order: Some(order), ..SetPolicy::default() });
    let (mut told, mut waited, mut ids) = (Vec::new(), 0usize, Vec::new());
    for job in &trace.jobs {
        play.until(job.submit_s * 1_000);
        let id = play.submit(job);
        ids.push(id);
        if !play.starts_ms.contains_key(&id) {
            waited += 1;
            if waited.is_multiple_of(ASKED) {
                told.push(play.ask(id));
            }
        }
    }
    play.until(u64::MAX / 2);
    let name = format!("{name}, {}", order.name());
    report(&name, waited, &told, &play.starts_ms, most_late);
    let slowdowns = trace.jobs.iter().zip(&ids).map(|(job, id)| slowdown(job, play.starts_ms[id] / 1_000));
    let mean = slowdowns.clone().sum::<u64>() / trace.jobs.len() as u64;
    println!("{name}: bounded slowdown {mean} thousandths, at worst {}", slowdowns.max().unwrap_or(0));
    let policy = if order == OrderBy::Fair { "ratio" } else { "easy" };
    let figures = run(&trace, &Policy::by_name(policy).expect("a policy"), Options::default()).figures(&trace);
    let simulated = figures.bounded_slowdown_mean;
    println!("{name}: simulated {policy} {simulated} thousandths, at worst {}", figures.bounded_slowdown_max);
    assert!(mean.abs_diff(simulated) * 10 <= simulated, "{name}: what a cluster runs is not what is simulated");
}

/// In thousandths.
fn slowdown(job: &TraceJob, start_s: u64) -> u64 {
    let wait_s = start_s.saturating_sub(job.submit_s);
    ((wait_s + job.duration_s) * 1_000 / job.duration_s.max(10)).max(1_000)
}

fn report(name: &str, waited: usize, told: &[Told], starts_ms: &BTreeMap<JobId, u64>, most_late: usize) {
    // Each command takes a millisecond of the test's time.
    const SLACK_MS: u64 = 1_000;
    let start = |told: &Told| starts_ms[&told.job];
    let bounded: Vec<(&Told, u64)> = told.iter().filter_map(|told| Some((told, told.latest_ms?))).collect();
    let late = bounded.iter().filter(|(told, latest)| start(told) > latest + SLACK_MS).count();
    let early = bounded.iter().filter(|(told, _)| start(told) + SLACK_MS < told.soonest_ms).count();
    let mut spare_s: Vec<u64> = bounded.iter().map(|(told, latest)| latest.abs_diff(start(told)) / 1_000).collect();
    let mut waits_s: Vec<u64> = told.iter().map(|told| (start(told) - told.at_ms) / 1_000).collect();
    spare_s.sort_unstable();
    waits_s.sort_unstable();
    let at = |sorted: &[u64], percent: usize| sorted.get(sorted.len() * percent / 100).copied().unwrap_or(0);
    println!(
        "{name}: {waited} jobs waited, {} asked, {} told a latest start; in the interval {:.1} %, later {:.1} %, sooner {:.1} %; \
         between start and latest: median {} s, p95 {} s; waits: median {} s, p95 {} s",
        told.len(),
        bounded.len(),
        share(bounded.len() - late - early, bounded.len()),
        share(late, bounded.len()),
        share(early, bounded.len()),
        at(&spare_s, 50),
        at(&spare_s, 95),
        at(&waits_s, 50),
        at(&waits_s, 95),
    );
    assert!(
        late * 100 <= bounded.len() * most_late,
        "{name}: {late} of {} started later than they were told",
        bounded.len()
    );
    assert!((late + early) * 10 <= bounded.len() * 3, "{name}: {early} of {} started sooner", bounded.len());
}

fn share(part: usize, all: usize) -> f64 {
    100.0 * part as f64 / all.max(1) as f64
}

#[test]
#[ignore = "minutes without optimisation: .ci/run has it in a release build"]
fn kth_sp2() {
    measure("kth-sp2", OrderBy::Fair, 10);
    measure("kth-sp2", OrderBy::Fifo, 5);
}

#[test]
#[ignore = "minutes without optimisation: .ci/run has it in a release build"]
fn sdsc_sp2() {
    measure("sdsc-sp2", OrderBy::Fair, 10);
    measure("sdsc-sp2", OrderBy::Fifo, 5);
}

/// Where everybody who waits has a reservation, says exactly how long he runs, and nothing fails: how many started later than they
/// were told first, of how many.
fn measure_kept(name: &str, mut play: Play, shape_of: impl Fn(u16) -> Shape) -> Option<(usize, usize)> {
    let mut trace = log(name)?;
    let pool: u32 = trace.machines.iter().map(|machine| machine.gpus).sum();
    trace.jobs.retain(|job| job.request.gpus <= pool);
    trace.jobs.truncate(RESERVED_JOBS);
    play.site.policy(SetPolicy { order: Some(OrderBy::Fifo), ..SetPolicy::default() });
    play.site.tick_ms = 0;
    play.site.state.meta.settings.planning.reservations = u32::MAX;
    play.limits = Limits { steps: u64::MAX, ..Limits::default() };
    let mut told = Vec::new();
    for job in &trace.jobs {
        play.until(job.submit_s * 1_000);
        let limit_ms = job.duration_s.max(1) * 1_000;
        let shape = shape_of(u16::try_from(job.request.gpus).expect("it fits the pool"));
        let id = play.submit_shape("all", shape, limit_ms, limit_ms + GRACE_MS);
        if !play.starts_ms.contains_key(&id) {
            told.push(play.ask(id));
        }
    }
    play.until(u64::MAX / 2);
    let late_ms = |told: &Told| play.starts_ms[&told.job].saturating_sub(told.latest_ms.unwrap_or(0));
    let late: Vec<u64> = told.iter().map(late_ms).filter(|late| *late > 0).collect();
    let soon =
        told.iter().filter(|told| told.latest_ms.is_some_and(|latest| play.starts_ms[&told.job] < latest)).count();
    println!(
        "{name}: {} waited and were told a start, {} started later, by at most {} ms, {soon} sooner",
        told.len(),
        late.len(),
        late.iter().max().unwrap_or(&0)
    );
    assert!(told.len() > 100 && told.iter().all(|told| told.latest_ms.is_some()), "{name}: all are told a start");
    Some((late.len(), told.len()))
}

/// On processors that are all one nobody starts later: whoever is submitted later is planned behind him, and what was planned comes true.
#[test]
#[ignore = "minutes without optimisation: .ci/run has it in a release build"]
fn a_start_that_was_told_is_kept() {
    for (name, processors) in [("kth-sp2", 100), ("sdsc-sp2", 128)] {
        let one = Machine { cores_by_numa: vec![processors], ..cpu_only() };
        let shape_of = |cores_per_rank| Shape { cores_per_rank, mem_mib_per_rank: 1, ..shape(1, 1, 0) };
        let kept = measure_kept(name, Play::on(vec![one]), shape_of);
        assert!(kept.is_none_or(|(late, _)| late == 0), "{name}: {kept:?}");
    }
}

/// A reservation is of single machines, and the next cycle may choose others: then somebody behind may start sooner or later.
#[test]
#[ignore = "minutes without optimisation: .ci/run has it in a release build"]
fn a_start_on_machines_is_nearly_always_kept() {
    for (name, machines) in [("kth-sp2", 100), ("sdsc-sp2", 128)] {
        let kept = measure_kept(name, Play::new(machines), |nodes| shape(nodes, 1, 1));
        assert!(kept.is_none_or(|(late, all)| late * 20 <= all), "{name}: {kept:?}");
    }
}
