//! The Philly log through the planner and apply themselves, as a cluster runs them, under virtual time: jobs without limits take turns, and
//! lose 60 s of work with each preemption. `ARES_TEST_DATA=DIR cargo run --release -p scheduling --example philly [SEED..]`.
//!
//! Each virtual cluster by itself, for each seed with submissions moved by 0 to 5 s (0: as they are), and all in one pool, where each is guaranteed
//! as many GPUs as it had. A gang beyond one machine is cut in equal parts over the fewest.
#![allow(clippy::disallowed_types, clippy::disallowed_methods, clippy::print_stdout)]

#[path = "../tests/site/mod.rs"]
mod site;
#[path = "../tests/traces/mod.rs"]
mod traces;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::time::Instant;

use scheduling::plan::{Cache, Limits, plan};
use scheduling::simulate::course::{Course, Journey, Spell};
use scheduling::simulate::dice::Dice;
use scheduling::simulate::shares;
use scheduling::simulate::trace::{Trace, TraceJob, read};
use site::{Site, hgx, shape};
use statemachine::command::{Preempt, SetPriority, SetTenant};
use statemachine::{Command, JobId, Outcome, Token};

/// October and November 2017.
const WINDOW: std::ops::Range<u64> = 2_592_000..7_862_400;
const GPUS: u32 = 8;
/// Work lost by a preemption.
const RESTART_S: u64 = 60;

struct Job {
    /// Number in the trace.
    of: usize,
    left_s: u64,
    since_s: u64,
    first_start_s: u64,
    preemptions: u32,
}

struct Play<'a> {
    trace: &'a Trace,
    site: Site,
    cache: Cache,
    jobs: BTreeMap<JobId, Job>,
    ends: BinaryHeap<Reverse<(u64, Token)>>,
    now_s: u64,
    course: Course,
}

impl<'a> Play<'a> {
    /// A cluster of these tenants' machines; with several each has its own guaranteed.
    fn new(trace: &'a Trace, tenants: &[u32]) -> Self {
        let mut site = Site { tick_ms: 0, ..Site::default() };
        let set = SetPriority { name: "low".into(), create: true, preemptible: true, ..SetPriority::default() };
        assert!(matches!(site.command(Command::SetPriority(set)), Outcome::Done(_)));
        for tenant in tenants {
            let name = &trace.tenants[*tenant as usize];
            let own = trace.machines.iter().filter(|machine| &trace.types[usize::from(machine.gpu_type)] == name);
            let machines = own.count() as u32;
            for nth in 0..machines {
                site.join(&format!("{name}-{nth}"), hgx("h100"));
            }
            let guaranteed = (tenants.len() > 1).then(|| [("h100".to_owned(), machines * GPUS)].into());
            site.tenant(SetTenant { name: name.clone(), guaranteed, weight: Some(machines), ..SetTenant::default() });
        }
        let course = Course { journeys: vec![None; trace.jobs.len()], spells: Vec::new() };
        let (cache, jobs, ends) = (Cache::default(), BTreeMap::new(), BinaryHeap::new());
        Self { trace, site, cache, jobs, ends, now_s: 0, course }
    }

    fn run(mut self, numbers: &[usize]) -> Course {
        let mut coming = numbers.iter().copied().peekable();
        // When somebody may have had his turn.
        let mut turn_ms = None;
        loop {
            let end = self.ends.peek().map(|Reverse((at_s, _))| *at_s);
            let ask = coming.peek().map(|number| self.trace.jobs[*number].submit_s);
            let turn = turn_ms.map(|ms: u64| ms.div_ceil(1_000));
            let Some(next_s) = end.into_iter().chain(ask).chain(turn).min() else { break };
            self.now_s = self.now_s.max(next_s);
            self.site.state.meta.clock_ms = self.now_s * 1_000;
            while let Some(Reverse((_, token))) = self.ends.peek().copied().filter(|Reverse((at_s, _))| *at_s <= next_s)
            {
                self.ends.pop();
                self.end(token);
            }
            while let Some(number) = coming.next_if(|number| self.trace.jobs[*number].submit_s <= next_s) {
                self.submit(number);
            }
            turn_ms = self.cycles();
        }
        self.site.state.check().expect("all invariants hold");
        self.course
    }

    fn submit(&mut self, number: usize) {
        let TraceJob { request, tenant, duration_s, .. } = self.trace.jobs[number];
        let nodes = request.gpus.div_ceil(GPUS);
        let shape = shape(nodes as u16, 1, request.gpus.div_ceil(nodes) as u16);
        let id = self.site.submit_of("low", &self.trace.tenants[tenant as usize], shape);
        let job = Job { of: number, left_s: duration_s, since_s: 0, first_start_s: u64::MAX, preemptions: 0 };
        self.jobs.insert(id, job);
    }

    /// Until nobody makes room; cluster time from which somebody may.
    fn cycles(&mut self) -> Option<u64> {
        loop {
            let plan = plan(&self.site.state, &mut self.cache, &Limits::default(), &self.site.unheard);
            let tokens = self.site.grant(&plan);
            for (token, place) in tokens.into_iter().zip(&plan.places) {
                self.site.started(token);
                let job = self.jobs.get_mut(&place.task.job).expect("a job of the trace");
                job.since_s = self.now_s;
                job.first_start_s = job.first_start_s.min(self.now_s);
                self.ends.push(Reverse((self.now_s + job.left_s, token)));
            }
            plan.preempts.iter().for_each(|made| self.preempt(made));
            if plan.preempts.is_empty() && !plan.unfinished {
                return plan.preempts_from;
            }
        }
    }

    /// The victims end at once.
    fn preempt(&mut self, made: &Preempt) {
        let victims: Vec<(Token, JobId)> = made
            .victims
            .iter()
            .map(|token| (*token, self.site.state.leases.get(token).unwrap().value.task.job))
            .collect();
        let outcome = self.site.command(Command::Preempt(made.clone()));
        assert!(matches!(outcome, Outcome::Done(_)), "{outcome:?}");
        for (token, id) in victims {
            self.site.drain(token);
            let job = self.jobs.get_mut(&id).expect("a job of the trace");
            let (job_of, from_s) = (job.of, job.since_s);
            job.left_s = job.left_s - (self.now_s - from_s) + RESTART_S;
            job.preemptions += 1;
            self.course.spells.push(Spell { job: job_of, from_s, until_s: self.now_s });
        }
    }

    fn end(&mut self, token: Token) {
        // Of an attempt that was preempted nothing is left.
        let Some(id) = self.site.state.leases.get(&token).map(|lease| lease.value.task.job) else { return };
        self.site.finish(token);
        let job = self.jobs.remove(&id).expect("a job of the trace");
        let (start_s, end_s, preemptions) = (job.first_start_s, self.now_s, job.preemptions);
        self.course.journeys[job.of] = Some(Journey { start_s, end_s, preemptions });
        self.course.spells.push(Spell { job: job.of, from_s: job.since_s, until_s: end_s });
    }
}

/// The course of each group of tenants, as one.
fn play(trace: &Trace, groups: &[Vec<u32>]) -> Course {
    let mut all = Course { journeys: vec![None; trace.jobs.len()], spells: Vec::new() };
    for tenants in groups {
        let mut numbers: Vec<usize> =
            (0..trace.jobs.len()).filter(|number| tenants.contains(&trace.jobs[*number].tenant)).collect();
        numbers.sort_by_key(|number| trace.jobs[*number].submit_s);
        let course = Play::new(trace, tenants).run(&numbers);
        numbers.iter().for_each(|number| all.journeys[*number] = course.journeys[*number]);
        all.spells.extend(course.spells);
    }
    all
}

fn main() {
    let seeds: Vec<u64> = std::env::args().skip(1).map(|seed| seed.parse().expect("a number")).collect();
    let text = |name: &str| traces::unpacked(name).expect("ARES_TEST_DATA names the traces");
    let (jobs, nodes) = (text("philly.jobs.csv.gz"), text("philly.nodes.csv"));
    let mut trace = read(("philly.jobs", &jobs), ("philly.nodes", &nodes)).expect("a well-formed trace");
    trace.jobs.retain(|job| WINDOW.contains(&job.submit_s));
    let tenants: Vec<u32> =
        (0..trace.tenants.len() as u32).filter(|tenant| trace.jobs.iter().any(|job| job.tenant == *tenant)).collect();
    let apart: Vec<Vec<u32>> = tenants.iter().map(|tenant| vec![*tenant]).collect();
    let moved = |seed: u64| {
        let (mut trace, mut dice) = (trace.clone(), Dice::new(seed));
        if seed > 0 {
            trace.jobs.iter_mut().for_each(|job| job.submit_s += dice.below(6) as u64);
        }
        trace
    };
    let seeds = if seeds.is_empty() { vec![0] } else { seeds };
    let runs = seeds.into_iter().map(|seed| (format!("apart, seed {seed}"), moved(seed), &apart));
    for (name, trace, groups) in runs.chain([("one pool".to_owned(), moved(0), &vec![tenants])]) {
        let began = Instant::now();
        let course = play(&trace, groups);
        let figures = course.figures(&trace);
        let most = course.journeys.iter().flatten().map(|journey| journey.preemptions).max();
        println!(
            "{name}: {} jobs, mean JCT {} s, p99 {} s, shortfall {:.2} %, {} preemptions, at most {} of one job; {:.0} s",
            figures.jobs,
            figures.jct_mean / 1_000,
            figures.jct_p99 / 1_000,
            course.shortfall(&trace, &shares(&trace, groups.len() == 1)) as f64 / 100.0,
            figures.preemptions,
            most.unwrap_or(0),
            began.elapsed().as_secs_f64()
        );
    }
}
