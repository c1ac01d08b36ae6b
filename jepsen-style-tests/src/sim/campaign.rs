//! Many seeds on a few threads: what each showed is added up, the first failure is told, shrunk and kept.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::Report;
use super::fault::KINDS;
use super::setup::Setup;
use super::shrink::{Corpus, shrink};
use super::sometimes::REQUIRED;
use crate::seeds::{self, Limits, spread};

/// Of so many seeds each thing that must happen sometimes is expected to have happened.
const BIG: u64 = 300;
/// A seed shows something when at least so many faults, of so many kinds, took effect.
const FAULTS: u64 = 10;
const FAULT_KINDS: usize = 5;
/// Runs that a failure may take to be shrunk.
const SHRINK_RUNS: usize = 300;

/// Which seeds run, and how.
#[derive(Clone, Debug)]
pub struct Plan {
    pub first: u64,
    pub count: u64,
    /// Simulated time after which no further seed begins; `None` = no limit.
    pub simulated_ms: Option<u64>,
    /// Wall time after which no further seed begins; `None` = no limit.
    pub wall: Option<Duration>,
    /// Kinds of fault; none = the seed's own choice of all.
    pub only: Vec<String>,
    pub jobs: usize,
    pub trace: bool,
    /// Go on after a failure.
    pub keep_going: bool,
    /// Where shrunk failures are kept; `None` = failures are not shrunk.
    pub corpus: Option<PathBuf>,
    /// Say nothing of failures.
    pub quiet: bool,
}

impl Plan {
    /// One seed under its own faults.
    pub fn one(seed: u64) -> Self {
        Self {
            first: seed,
            count: 1,
            simulated_ms: None,
            wall: None,
            only: Vec::new(),
            jobs: 1,
            trace: false,
            keep_going: false,
            corpus: None,
            quiet: false,
        }
    }
}

/// What all seeds showed.
#[derive(Debug, Default)]
pub struct Sum {
    pub seeds: u64,
    /// Seeds with too few faults, or kinds of them, that took effect.
    pub thin: u64,
    pub hash: u64,
    /// Simulated ms and CPU time, by the number of replicas.
    pub spent: BTreeMap<usize, (u64, Duration)>,
    pub events: u64,
    pub started: u64,
    pub entries: u64,
    pub offices: u64,
    pub took: BTreeMap<&'static str, u64>,
    /// Of each seed: faults that took effect, and of how many kinds.
    pub each_took: Vec<(u64, usize)>,
    pub sometimes: BTreeMap<String, u64>,
    pub failures: Vec<Report>,
}

impl Sum {
    fn add(&mut self, report: Report, cpu: Duration) {
        self.seeds += 1;
        self.hash = seeds::with_seed(self.hash, report.setup.seed, report.hash);
        let (faults, kinds) = (report.took.values().sum(), report.took.len());
        self.each_took.push((faults, kinds));
        self.thin += u64::from(faults < FAULTS || kinds < FAULT_KINDS);
        let spent = self.spent.entry(report.setup.replicas).or_default();
        *spent = (spent.0 + report.simulated_ms, spent.1 + cpu);
        self.events += report.events;
        self.started += report.started;
        self.entries += report.entries;
        self.offices += report.offices;
        for (kind, hits) in &report.took {
            *self.took.entry(kind).or_default() += hits;
        }
        for (what, hits) in &report.sometimes.0 {
            *self.sometimes.entry(what.clone()).or_default() += hits;
        }
        if report.failure.is_some() {
            self.failures.push(report);
        }
    }
}

/// Runs the plan; failures are told as they are found.
pub fn run(plan: &Plan) -> Sum {
    let simulated = AtomicU64::new(0);
    let one = |nth: u64| {
        if plan.simulated_ms.is_some_and(|limit| simulated.load(Ordering::Relaxed) >= limit) {
            return None;
        }
        let setup = Setup::of(plan.first.wrapping_add(nth), None);
        let before = thread_cpu();
        let report = super::run(&setup, &super::faults_of(&setup, &plan.only), plan.trace);
        simulated.fetch_add(report.simulated_ms, Ordering::Relaxed);
        Some((report, thread_cpu().saturating_sub(before)))
    };
    let mut sum = Sum::default();
    let limits = Limits { count: plan.count, wall: plan.wall, jobs: plan.jobs, keep_going: plan.keep_going };
    let failed = |(report, _): &(Report, Duration)| report.failure.is_some();
    seeds::run(limits, one, failed, |(report, cpu)| {
        if !plan.quiet {
            tell(plan, &report);
        }
        sum.add(report, cpu);
    });
    sum
}

fn thread_cpu() -> Duration {
    let used = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(used.tv_sec as u64, used.tv_nsec as u32)
}

fn tell(plan: &Plan, report: &Report) {
    let Some(failure) = &report.failure else { return };
    let seed = report.setup.seed;
    let only = if plan.only.is_empty() { String::new() } else { format!(" --only {}", plan.only.join(",")) };
    println!("seed {seed}: {} is broken after {} ms: {}", failure.invariant, failure.at_ms, failure.detail);
    println!("  options: {:?}", report.setup);
    println!("  faults that took effect: {:?}", report.took);
    println!("  the last events (seconds, what, which):");
    for line in report.tail.lines() {
        println!("  {line}");
    }
    println!("  again: jepsen-style-tests/run sim --seed {seed}{only} --trace");
    let Some(dir) = &plan.corpus else { return };
    let found = Corpus {
        seed,
        seconds: report.setup.safety_ms / 1_000,
        jobs: report.setup.jobs,
        agents: report.setup.agents,
        invariant: failure.invariant.clone(),
        faults: super::faults_of(&report.setup, &plan.only),
    };
    let small = shrink(&found, SHRINK_RUNS);
    match small.write(dir) {
        Ok(path) => println!("  shrunk to {} faults: {}", small.faults.len(), path.display()),
        Err(error) => println!("  not kept in {}: {error}", dir.display()),
    }
}

/// The verdict of a run, for people; the last line is the hash. Whether everything held.
pub fn conclude(plan: &Plan, sum: &Sum) -> (String, bool) {
    let mut text = String::new();
    let simulated_ms: u64 = sum.spent.values().map(|(simulated_ms, _)| simulated_ms).sum();
    let cpu: Duration = sum.spent.values().map(|(_, cpu)| *cpu).sum();
    let rate = |simulated_ms: u64, cpu: Duration| simulated_ms as f64 / 1e3 / cpu.as_secs_f64().max(1e-9);
    let _ = write!(
        text,
        "{} seeds from {}, {:.2} simulated hours, {:.1} s of CPU time: {:.0} simulated s a CPU second",
        sum.seeds,
        plan.first,
        simulated_ms as f64 / 3_600_000.0,
        cpu.as_secs_f64(),
        rate(simulated_ms, cpu)
    );
    for (replicas, (simulated_ms, cpu)) in &sum.spent {
        let _ = write!(text, ", {:.0} with {replicas} replicas", rate(*simulated_ms, *cpu));
    }
    text.push('\n');
    let _ = writeln!(
        text,
        "{} events, {} entries applied, {} ranks begun, {} offices of leaders",
        sum.events, sum.entries, sum.started, sum.offices
    );
    let faults = sum.each_took.iter().map(|(faults, _)| *faults);
    let kinds = sum.each_took.iter().map(|(_, kinds)| *kinds as u64);
    let _ = writeln!(text, "{} faults took effect; a seed had {}", faults.clone().sum::<u64>(), spread(faults));
    let _ = writeln!(text, "of {} kinds, a seed had {}:", sum.took.len(), spread(kinds));
    for kind in KINDS {
        let _ = writeln!(text, "  {kind:<16} {}", sum.took.get(kind).copied().unwrap_or(0));
    }
    if sum.thin > 0 {
        let _ =
            writeln!(text, "{} seeds had fewer than {FAULTS} faults or {FAULT_KINDS} kinds that took effect", sum.thin);
    }
    let required = (sum.seeds >= BIG && plan.only.is_empty()).then_some(REQUIRED);
    let failed: Vec<u64> = sum.failures.iter().map(|report| report.setup.seed).collect();
    let valid = seeds::conclude(&mut text, &sum.sometimes, required, &failed, (sum.seeds, sum.hash));
    (text, valid)
}
