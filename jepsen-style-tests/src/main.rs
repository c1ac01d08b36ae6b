//! `faults`: the long runs. Started by the script `run`, which builds what they need.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use jepsen_style_tests::disk::Disk;
use jepsen_style_tests::nemesis::{self, Fault};
use jepsen_style_tests::verdict::Verdict;
use jepsen_style_tests::{cluster, powercut};

/// Fault-injection runs against real `ares` processes
///
/// Exit code 0: everything that must hold held. 1: something did not, or the run shows nothing (a fault never took
/// effect, too little load). 2: usage.
#[derive(Debug, Parser)]
#[command(name = "run", bin_name = "jepsen-style-tests/run", max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    run: Run,
}

#[derive(Debug, clap::Subcommand)]
enum Run {
    /// Cut the power of all replicas under submission load, again and again (root; ext4 on loop devices)
    Powercut {
        #[arg(long, default_value_t = 50)]
        cuts: usize,
        /// Replicas of the group, all cut within 50 ms
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=5))]
        replicas: u8,
        /// The same seed gives the same pauses before the cuts
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// Run with this planted bug (ack_without_fsync), in a binary built with them: the run must be INVALID
        #[arg(long, value_name = "BUG", value_parser = ["ack_without_fsync"])]
        planted: Option<String>,
    },
    /// Kill, freeze and restart replicas and agents while real jobs run, then check what they wrote
    Nemesis {
        #[arg(long, default_value_t = 5)]
        minutes: u64,
        /// The same seed gives the same order of faults and jobs
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// Kinds of faults, comma-separated [default: all]
        #[arg(long, value_enum, value_delimiter = ',')]
        faults: Vec<Fault>,
        /// Where history and ledger are left [default: a directory of this seed in the target directory]
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
    },
    /// The short run of each change: kills, a frozen agent, and three power cuts where they can be made
    Short {
        #[arg(long, default_value_t = 1)]
        seed: u64,
    },
}

fn main() -> ExitCode {
    let run = Cli::parse().run;
    let runs = match run {
        Run::Powercut { cuts, replicas, seed, planted } => {
            if let Err(why) = Disk::available() {
                eprintln!("Power can't be cut on this machine: {why}");
                return ExitCode::FAILURE;
            }
            vec![power_cuts(cuts, replicas.into(), seed, planted)]
        }
        Run::Nemesis { minutes, seed, faults, out } => {
            let faults = if faults.is_empty() { Fault::ALL.to_vec() } else { faults };
            vec![under_faults(Duration::from_secs(60 * minutes), seed, faults, out)]
        }
        Run::Short { seed } => short(seed),
    };
    if runs.iter().all(Verdict::is_valid) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn short(seed: u64) -> Vec<Verdict> {
    let faults =
        vec![Fault::KillLeader, Fault::KillAll, Fault::KillAgent, Fault::KillAgentAndShims, Fault::FreezeAgent];
    let mut runs = vec![under_faults(Duration::from_secs(40), seed, faults, None)];
    match Disk::available() {
        Ok(()) => runs.push(power_cuts(3, 3, seed, None)),
        Err(why) => eprintln!("SKIPPED: no power was cut, that needs root, loop devices and mkfs.ext4: {why}"),
    }
    runs
}

fn power_cuts(cuts: usize, replicas: usize, seed: u64, planted: Option<String>) -> Verdict {
    let bug = planted.as_ref().map(|bug| format!(" --planted {bug}")).unwrap_or_default();
    told(
        &format!("powercut --cuts {cuts} --replicas {replicas} --seed {seed}{bug}"),
        cluster::block_on(powercut::run(&powercut::Plan { cuts, replicas, seed, planted })),
    )
}

fn under_faults(duration: Duration, seed: u64, faults: Vec<Fault>, out: Option<PathBuf>) -> Verdict {
    let target = jepsen_style_tests::process::ares().parent().map(PathBuf::from).unwrap_or_default();
    let out = out.unwrap_or_else(|| target.join("fault-runs").join(format!("nemesis-{seed}")));
    let title = format!("nemesis for {} s, seed {seed}; history and ledger in {}", duration.as_secs(), out.display());
    told(&title, cluster::block_on(nemesis::run(&nemesis::Plan { duration, seed, faults, out })))
}

fn told(title: &str, verdict: Verdict) -> Verdict {
    println!("{title}\n{verdict}");
    verdict
}
