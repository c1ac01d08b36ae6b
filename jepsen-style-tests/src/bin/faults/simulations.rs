//! `run sim`: seeds of either tier, and what was kept of earlier failures.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use jepsen_style_tests::shrink;
use jepsen_style_tests::sim::shrink::Corpus;
use jepsen_style_tests::sim::{campaign, fault};
use serde::de::DeserializeOwned;

use crate::hunts::plant;

#[derive(Debug, clap::Args)]
pub struct Sim {
    /// The first seed
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// What is simulated: `core`, everything but Raft; `raft`, the replicas with openraft, log and snapshots
    #[arg(long, value_enum, default_value_t = Tier::Core)]
    pub tier: Tier,
    /// How many seeds, counted up from the first [default: 1, or as many as the other limits let]
    #[arg(long, value_name = "COUNT")]
    pub seeds: Option<u64>,
    /// Begin no further seed after so much simulated time
    #[arg(long, value_name = "MINUTES")]
    pub minutes_simulated: Option<u64>,
    /// Begin no further seed after so much real time
    #[arg(long, value_name = "SECONDS")]
    pub wall_seconds: Option<u64>,
    /// These kinds of fault alone, comma-separated; another word is answered with all of them
    #[arg(long, value_name = "FAULTS", value_delimiter = ',')]
    pub only: Vec<String>,
    /// Print each event
    #[arg(long)]
    pub trace: bool,
    /// Threads, or processes
    #[arg(long, default_value_t = 1)]
    pub jobs: usize,
    /// Go on after a failure
    #[arg(long)]
    pub keep_going: bool,
    /// Shrink what fails to its least faults and keep it there
    #[arg(long, value_name = "DIR")]
    pub corpus: Option<PathBuf>,
    /// Run what was kept in this directory, and no seed
    #[arg(long, value_name = "DIR", conflicts_with_all = ["seed", "seeds", "minutes_simulated", "wall_seconds", "only", "corpus"])]
    pub replay: Option<PathBuf>,
    /// Run with this planted bug, in a build that has them
    #[arg(long, value_name = "BUG")]
    pub planted: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Tier {
    Core,
    Raft,
}

#[cfg(feature = "simulated")]
#[derive(Debug, clap::Args)]
pub struct RaftSeed {
    /// Seed and faults, as JSON.
    #[arg(long)]
    pub schedule: String,
    #[arg(long)]
    pub trace: bool,
    #[arg(long)]
    pub planted: Option<String>,
}

pub fn simulate(options: Sim) -> ExitCode {
    let checked = known_kinds(&options).and_then(|()| options.planted.as_deref().map_or(Ok(()), plant));
    if let Err(why) = checked {
        eprintln!("{why}");
        return ExitCode::from(2);
    }
    if options.tier == Tier::Raft {
        return simulate_raft(options);
    }
    if let Some(dir) = &options.replay {
        let failure = |corpus: &Corpus| corpus.run(options.trace).failure;
        return replay(dir, |corpus| failure(corpus).map(|failure| (failure.invariant, failure.detail)));
    }
    let limited = options.minutes_simulated.is_some() || options.wall_seconds.is_some();
    let plan = campaign::Plan {
        count: options.seeds.unwrap_or(if limited { u64::MAX } else { 1 }),
        simulated_ms: options.minutes_simulated.map(|minutes| minutes.saturating_mul(60_000)),
        wall: options.wall_seconds.map(Duration::from_secs),
        only: options.only,
        jobs: options.jobs,
        trace: options.trace,
        keep_going: options.keep_going,
        corpus: options.corpus,
        ..campaign::Plan::one(options.seed)
    };
    let sum = campaign::run(&plan);
    let (text, valid) = campaign::conclude(&plan, &sum);
    println!("{text}");
    if valid { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Whether the tier has such faults.
fn known_kinds(options: &Sim) -> Result<(), String> {
    let kinds: Vec<&str> = match options.tier {
        Tier::Core => fault::KINDS.to_vec(),
        #[cfg(feature = "simulated")]
        Tier::Raft => jepsen_style_tests::raft_sim::fault::Kind::ALL.iter().map(|kind| kind.name()).collect(),
        #[cfg(not(feature = "simulated"))]
        Tier::Raft => return Ok(()),
    };
    match options.only.iter().find(|only| !kinds.contains(&only.as_str())) {
        Some(unknown) => Err(format!("--only {unknown:?} is none of {}", kinds.join(", "))),
        None => Ok(()),
    }
}

/// Runs what was kept in a directory; `run` tells which invariant is broken, and how.
fn replay<C: DeserializeOwned>(dir: &Path, run: impl Fn(&C) -> Option<(String, String)>) -> ExitCode {
    let kept = match shrink::kept(dir) {
        Ok(kept) if !kept.is_empty() => kept,
        found => {
            let why = found.err().map_or_else(|| "nothing was kept there".to_owned(), |error| error.to_string());
            eprintln!("--replay {}: {why}", dir.display());
            return ExitCode::FAILURE;
        }
    };
    let mut code = ExitCode::SUCCESS;
    for (path, schedule) in &kept {
        match run(schedule) {
            None => println!("{}: holds", path.display()),
            Some((invariant, detail)) => {
                println!("{}: {invariant} is broken: {detail}", path.display());
                code = ExitCode::FAILURE;
            }
        }
    }
    code
}

#[cfg(feature = "simulated")]
fn simulate_raft(options: Sim) -> ExitCode {
    use jepsen_style_tests::raft_sim::{self, campaign};
    if options.minutes_simulated.is_some() {
        eprintln!("--minutes-simulated is for the core tier");
        return ExitCode::from(2);
    }
    let plan = campaign::Plan {
        first: options.seed,
        count: options.seeds.unwrap_or(if options.wall_seconds.is_some() { u64::MAX } else { 1 }),
        wall: options.wall_seconds.map(Duration::from_secs),
        only: options.only,
        jobs: options.jobs,
        trace: options.trace,
        keep_going: options.keep_going,
        planted: options.planted,
        corpus: options.corpus,
        quiet: false,
    };
    if let Some(dir) = &options.replay {
        let broken = |schedule: &raft_sim::corpus::Corpus| campaign::apart(&plan, schedule).broken;
        return replay(dir, |schedule| broken(schedule).map(|broken| (broken.invariant, broken.detail)));
    }
    let (text, valid) = campaign::conclude(&plan, &campaign::run(&plan));
    println!("{text}");
    if valid { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

#[cfg(not(feature = "simulated"))]
fn simulate_raft(_: Sim) -> ExitCode {
    eprintln!("this build has no Raft tier: jepsen-style-tests/run sim makes one that has");
    ExitCode::from(2)
}

/// The disks are in memory where the machine has a place for that.
#[cfg(feature = "simulated")]
pub fn one_raft_seed(options: &RaftSeed) -> ExitCode {
    if let Err(why) = options.planted.as_deref().map_or(Ok(()), plant) {
        eprintln!("{why}");
        return ExitCode::from(2);
    }
    let memory = Path::new("/dev/shm");
    let disks = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
    let disks = match disks {
        Ok(disks) => disks,
        Err(error) => {
            eprintln!("no directory for the simulated disks: {error}");
            return ExitCode::FAILURE;
        }
    };
    let schedule = match serde_json::from_str(&options.schedule) {
        Ok(schedule) => schedule,
        Err(error) => {
            eprintln!("--schedule: {error}");
            return ExitCode::from(2);
        }
    };
    let report = jepsen_style_tests::raft_sim::run(schedule, disks.path(), options.trace);
    println!("{}", serde_json::to_string(&report).expect("plain fields always encode"));
    ExitCode::SUCCESS
}
