//! Many seeds, each in a process of its own: what they showed is added up, the first failures are told. Each sixteenth seed runs twice and
//! must leave the same trace.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use super::Report;
use super::corpus::Corpus;
use super::drive::SAFETY_MS;
use super::fault::Kind;
use super::sometimes::REQUIRED;
use crate::seeds::{self, Limits, spread};
use crate::shrink;

/// Of so many seeds each thing that must happen sometimes is expected to have happened.
const BIG: u64 = 200;
/// A seed shows something when at least so many faults took effect.
const FAULTS: u64 = 3;
const TWICE_EVERY: u64 = 16;
/// Runs that a failure is shrunk with: some seconds each.
const SHRINK_RUNS: usize = 60;
/// A seed that takes longer in real time has no end.
const LIMIT: Duration = Duration::from_secs(300);

/// Which seeds run, and how.
#[derive(Clone, Debug)]
pub struct Plan {
    pub first: u64,
    pub count: u64,
    /// Wall time after which no further seed begins; `None` = no limit.
    pub wall: Option<Duration>,
    /// Kinds of fault; none = the seed's own choice of all.
    pub only: Vec<String>,
    pub jobs: usize,
    pub trace: bool,
    /// Go on after a failure.
    pub keep_going: bool,
    pub planted: Option<String>,
    /// Where a failure's least schedule is kept; `None` = nowhere.
    pub corpus: Option<PathBuf>,
    /// Say nothing of failures.
    pub quiet: bool,
}

/// What all seeds showed.
#[derive(Debug, Default)]
pub struct Sum {
    pub seeds: u64,
    pub thin: u64,
    pub hash: u64,
    pub simulated_ms: u64,
    pub cpu_ms: u64,
    pub acknowledged: u64,
    pub reads: u64,
    pub unknown: u64,
    pub entries: u64,
    pub offices: u64,
    pub twice: u64,
    pub took: BTreeMap<String, u64>,
    pub each_took: Vec<u64>,
    pub sometimes: BTreeMap<String, u64>,
    pub failures: Vec<Report>,
}

impl Sum {
    fn add(&mut self, report: Report, twice: bool) {
        self.seeds += 1;
        self.twice += u64::from(twice);
        self.hash = seeds::with_seed(self.hash, report.seed, report.hash);
        let faults: u64 = report.took.values().sum();
        self.each_took.push(faults);
        self.thin += u64::from(faults < FAULTS || report.at_ms < SAFETY_MS);
        self.simulated_ms += report.at_ms;
        self.cpu_ms += report.cpu_ms;
        self.acknowledged += report.acknowledged;
        self.reads += report.reads;
        self.unknown += report.unknown;
        self.entries += report.entries;
        self.offices += report.offices;
        for (sums, ones) in [(&mut self.took, &report.took), (&mut self.sometimes, &report.sometimes)] {
            for (what, hits) in ones {
                *sums.entry(what.clone()).or_default() += hits;
            }
        }
        if report.broken.is_some() {
            self.failures.push(report);
        }
    }
}

/// Runs the plan; failures are told as they are found.
pub fn run(plan: &Plan) -> Sum {
    let one = |nth: u64| {
        let seed = plan.first.wrapping_add(nth);
        let twice = nth.is_multiple_of(TWICE_EVERY) && plan.planted.is_none();
        Some((if twice { same_twice(plan, seed) } else { one(plan, seed) }, twice))
    };
    let mut sum = Sum::default();
    let limits = Limits { count: plan.count, wall: plan.wall, jobs: plan.jobs, keep_going: plan.keep_going };
    seeds::run(
        limits,
        one,
        |(report, _): &(Report, bool)| report.broken.is_some(),
        |(report, twice)| {
            if !plan.quiet {
                tell(plan, &report);
            }
            sum.add(report, twice);
        },
    );
    sum
}

fn same_twice(plan: &Plan, seed: u64) -> Report {
    let (mut first, second) = (one(plan, seed), one(plan, seed));
    if first.hash != second.hash && first.broken.is_none() {
        let detail = format!("two processes gave the traces {:016x} and {:016x}", first.hash, second.hash);
        first.broken = Some(super::checks::Broken { invariant: "determinism".to_owned(), detail });
    }
    first
}

/// One seed in a process of its own.
fn one(plan: &Plan, seed: u64) -> Report {
    apart(plan, &Corpus::of(seed, &plan.only))
}

/// A schedule in a process of its own.
pub fn apart(plan: &Plan, schedule: &Corpus) -> Report {
    let seed = schedule.seed;
    let failed = |what: String| Report::of_failure(seed, "harness", what);
    let started = std::env::current_exe().and_then(|this| {
        let mut command = Command::new(this);
        command.args(["raft-seed", "--schedule", &serde_json::to_string(schedule)?]);
        if let Some(bug) = &plan.planted {
            command.args(["--planted", bug]);
        }
        if plan.trace {
            command.arg("--trace");
        }
        if plan.quiet {
            command.stderr(Stdio::null());
        }
        command.stdout(Stdio::piped()).spawn()
    });
    match started {
        Err(error) => failed(error.to_string()),
        Ok(child) => answer(child, seed).unwrap_or_else(failed),
    }
}

/// The report is the last line; what comes before it is the trace.
fn answer(mut child: Child, seed: u64) -> Result<Report, String> {
    let mut output = child.stdout.take().ok_or("a process without output")?;
    let (send, receive) = mpsc::channel();
    std::thread::spawn(move || {
        let mut text = String::new();
        let read = std::io::Read::read_to_string(&mut output, &mut text);
        let _ = send.send(read.map(|_| text));
    });
    let read = receive.recv_timeout(LIMIT);
    if read.is_err() {
        let _ = child.kill();
    }
    let ended = child.wait().map_err(|error| error.to_string())?;
    let Ok(text) = read else {
        return Ok(Report::of_failure(seed, "ends", format!("the run did not end within {} s", LIMIT.as_secs())));
    };
    let text = text.map_err(|error| error.to_string())?;
    let (trace, last) = text.trim_end().rsplit_once('\n').unwrap_or(("", text.trim_end()));
    if !trace.is_empty() {
        println!("{trace}");
    }
    serde_json::from_str(last).map_err(|error| format!("the process of the seed ended with {ended}: {error}"))
}

fn tell(plan: &Plan, report: &Report) {
    let Some(broken) = &report.broken else { return };
    let seed = report.seed;
    let only = if plan.only.is_empty() { String::new() } else { format!(" --only {}", plan.only.join(",")) };
    println!("seed {seed}: {} is broken after {} ms: {}", broken.invariant, report.at_ms, broken.detail);
    println!("  faults that took effect: {:?}", report.took);
    println!("  the last events (seconds, what, which):");
    for line in report.tail.lines() {
        println!("  {line}");
    }
    println!("  again: jepsen-style-tests/run sim --tier raft --seed {seed}{only} --trace");
    let Some(dir) = &plan.corpus else { return };
    let found = Corpus { invariant: broken.invariant.clone(), ..Corpus::of(seed, &plan.only) };
    let quiet = Plan { quiet: true, trace: false, ..plan.clone() };
    let small = found.shrink(SHRINK_RUNS, |schedule| apart(&quiet, schedule).broken.map(|broken| broken.invariant));
    match shrink::keep(&small, &small.invariant, dir) {
        Ok(path) => {
            println!("  shrunk from {} faults to {}: {}", found.faults.len(), small.faults.len(), path.display())
        }
        Err(error) => println!("  not kept in {}: {error}", dir.display()),
    }
}

/// The verdict of a run, for people; the last line is the hash. Whether everything held.
pub fn conclude(plan: &Plan, sum: &Sum) -> (String, bool) {
    let mut text = String::new();
    let rate = sum.simulated_ms as f64 / sum.cpu_ms.max(1) as f64;
    let _ = writeln!(
        text,
        "{} seeds from {}, {:.2} simulated hours, {:.1} s of CPU time: {rate:.1} simulated s a CPU second",
        sum.seeds,
        plan.first,
        sum.simulated_ms as f64 / 3_600_000.0,
        sum.cpu_ms as f64 / 1e3
    );
    let _ = writeln!(
        text,
        "{} entries committed, {} offices of leaders, {} requests acknowledged, {} reads, {} outcomes unknown at first",
        sum.entries, sum.offices, sum.acknowledged, sum.reads, sum.unknown
    );
    let _ = writeln!(text, "{} seeds ran twice and left the same trace, but for those named above", sum.twice);
    let faults = sum.each_took.iter().copied();
    let _ = writeln!(text, "{} faults took effect; a seed had {}", faults.clone().sum::<u64>(), spread(faults));
    for kind in Kind::ALL {
        let _ = writeln!(text, "  {:<18} {}", kind.name(), sum.took.get(kind.name()).copied().unwrap_or(0));
    }
    if sum.thin > 0 {
        let _ = writeln!(
            text,
            "{} seeds had fewer than {FAULTS} faults that took effect, or ended before {} s",
            sum.thin,
            SAFETY_MS / 1_000
        );
    }
    let required = (sum.seeds >= BIG && plan.only.is_empty()).then_some(REQUIRED);
    let failed: Vec<u64> = sum.failures.iter().map(|report| report.seed).collect();
    let valid = seeds::conclude(&mut text, &sum.sometimes, required, &failed, (sum.seeds, sum.hash));
    (text, valid)
}

/// Looks for a planted bug: runs seeds with it until a check fails by a name that the bug breaks.
#[cfg(feature = "planted")]
pub fn hunt(bug: planted::Bug, first: u64, seeds: u64) -> crate::sim::bugs::Caught {
    let plan = Plan {
        first,
        count: 1,
        wall: None,
        only: Vec::new(),
        jobs: 1,
        trace: false,
        keep_going: false,
        planted: Some(bug.name().to_owned()),
        corpus: None,
        quiet: true,
    };
    crate::sim::bugs::hunt_by(bug, first, seeds, |seed| one(&plan, seed).broken.map(|broken| broken.invariant))
}
