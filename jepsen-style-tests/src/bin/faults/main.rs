//! `faults`: the long runs. Started by the script `run`, which builds what they need.

mod hunts;
mod simulations;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use jepsen_style_tests::disk::Disk;
use jepsen_style_tests::faults::{Fault, Need};
use jepsen_style_tests::network::Network;
use jepsen_style_tests::verdict::Verdict;
use jepsen_style_tests::{cluster, corrupt, nemesis, powercut, reads, replays, report, soak};

use hunts::{Planted, planted_bug};
#[cfg(feature = "simulated")]
use simulations::RaftSeed;
use simulations::Sim;

/// A simulation makes and drops small things all the time.
#[global_allocator]
static ALLOCATOR: allocator::Allocator = allocator::Allocator;

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
    /// Damage the files of a replica that is down, again and again: it must refuse them by name or have them from elsewhere
    Corrupt {
        /// Damages that took effect
        #[arg(long, default_value_t = 20, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..))]
        times: usize,
        /// The same seed gives the same order of replicas and bits
        #[arg(long, default_value_t = 1)]
        seed: u64,
    },
    /// Simulate whole clusters in virtual time: real decisions, simulated network, clocks, disks and processes
    ///
    /// Each seed is a cluster of 3 to 5 replicas and 20 agents with 200 jobs under its own faults for 60 s or more, and then
    /// without faults until everything has ended. The last line is the hash of all traces: the same seeds give the same hash.
    ///
    /// With --tier raft each seed is a group of 3 to 7 real replicas with the real openraft, log and snapshots on a simulated
    /// network and simulated disks, under its own faults for 20 s.
    Sim(Sim),
    /// One seed of the Raft tier, for `sim` to start
    #[cfg(feature = "simulated")]
    #[command(hide = true)]
    RaftSeed(RaftSeed),
    /// Switch on planted bugs one by one: the simulation (with --real: runs of real processes) must catch each, by an invariant that it breaks
    Planted(Planted),
    /// Kill, freeze, restart and part replicas, agents and clients while real jobs run, then check what they wrote
    ///
    /// With a fault of the network among them (root), each replica, each agent and the clients are on a machine of their
    /// own: a network namespace on a switch of this program.
    Nemesis {
        #[arg(long, default_value_t = 5)]
        minutes: u64,
        /// The same seed gives the same order of faults and jobs
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// Kinds of faults, comma-separated [default: all]
        #[arg(long, value_enum, value_delimiter = ',')]
        faults: Vec<Fault>,
        /// Faults of processes strike under delays, losses or a tiny bandwidth among the replicas
        #[arg(long)]
        pairs: bool,
        /// Faults that this machine need not be able to make, comma-separated
        #[arg(long, value_enum, value_delimiter = ',')]
        allow_skip: Vec<Fault>,
        /// Run with this planted bug, in a binary built with them: the run must be INVALID
        #[arg(long, value_name = "BUG", value_parser = planted_bug)]
        planted: Option<String>,
        /// Where history and ledger are left [default: a directory of this seed in the target directory]
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
    },
    /// Send each request id many times at once through all replicas while leaders are killed: one job an id
    Replays {
        #[arg(long, default_value_t = 10_000, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..))]
        ids: usize,
        /// How often each id is sent
        #[arg(long, default_value_t = 10, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(2..))]
        times: usize,
        /// The same seed gives the same order of sendings and pauses before the kills
        #[arg(long, default_value_t = 1)]
        seed: u64,
    },
    /// Hours of nemesis, replays and power cuts (root), in rounds that a later call goes on with; stops at one that is wrong
    Soak {
        /// Of all rounds in the directory together
        #[arg(long, default_value_t = 1.0)]
        hours: f64,
        /// Rounds, their histories and the page that sums them up [default: in the target directory]
        #[arg(long, value_name = "DIR")]
        dir: Option<PathBuf>,
        /// Number, and so seed, of the first round
        #[arg(long, default_value_t = 1)]
        seed: u64,
    },
    /// Judge the history and the ledger of an earlier run anew
    Recheck { dir: PathBuf },
    /// Print the history of an earlier run as EDN, as Knossos and Elle read it
    Edn { dir: PathBuf },
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
        Run::Corrupt { times, seed } => vec![corrupted(times, seed)],
        Run::Sim(options) => return simulations::simulate(options),
        #[cfg(feature = "simulated")]
        Run::RaftSeed(options) => return simulations::one_raft_seed(&options),
        Run::Planted(options) if options.real => return hunts::hunt_in_real_runs(&options.only),
        Run::Planted(options) => return hunts::hunt(&options),
        Run::Nemesis { minutes, seed, faults, pairs, allow_skip, planted, out } => {
            let faults = if faults.is_empty() { Fault::all() } else { faults };
            let Some(faults) = possible(faults, &allow_skip, pairs) else { return ExitCode::FAILURE };
            let out = out.unwrap_or_else(|| directory_of(seed));
            let duration = Duration::from_secs(60 * minutes);
            vec![under_faults(nemesis::Plan { duration, seed, faults, pairs, planted, network: None, out })]
        }
        Run::Replays { ids, times, seed } => {
            vec![replayed(replays::Plan { ids, times, seed, planted: None })]
        }
        Run::Soak { hours, dir, seed } => return soaked(hours, dir, seed),
        Run::Recheck { dir } => vec![rechecked(&dir)],
        Run::Edn { dir } => match reads::load(&dir.join("history.jsonl")) {
            Ok(events) => {
                print!("{}", reads::edn(&events));
                Vec::new()
            }
            Err(error) => {
                eprintln!("{error}");
                return ExitCode::FAILURE;
            }
        },
        Run::Short { seed } => short(seed),
    };
    if runs.iter().all(Verdict::is_valid) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn short(seed: u64) -> Vec<Verdict> {
    let mut faults =
        vec![Fault::KillLeader, Fault::KillAll, Fault::KillAgent, Fault::KillAgentAndShims, Fault::FreezeAgent];
    match Need::Network.available() {
        Ok(()) => faults.extend([Fault::OneWay, Fault::ClientsSeeOldLeader]),
        Err(why) => eprintln!("SKIPPED: no link was broken, that needs root, ip and /dev/net/tun: {why}"),
    }
    let (duration, out) = (Duration::from_secs(40), directory_of(seed));
    let plan = nemesis::Plan { duration, seed, faults, pairs: false, planted: None, network: None, out };
    let mut runs = vec![under_faults(plan)];
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

fn corrupted(times: usize, seed: u64) -> Verdict {
    let title = format!("corrupt --times {times} --seed {seed}");
    told(&title, cluster::block_on(corrupt::run(&corrupt::Plan { times, seed, planted: None })))
}

/// The faults without those that can't be made here; `None` if one of these may not be skipped.
fn possible(faults: Vec<Fault>, allow_skip: &[Fault], pairs: bool) -> Option<Vec<Fault>> {
    let wanted = pairs || faults.iter().any(|fault| fault.needs() == Some(Need::Network));
    let network = if wanted { Need::Network.available() } else { Ok(()) };
    if let (true, Err(why)) = (pairs, &network) {
        eprintln!("No pairs on this machine: {why}");
        return None;
    }
    let missing = |fault: &Fault| match fault.needs() {
        Some(Need::Network) => network.clone().err(),
        Some(need) => need.available().err(),
        None => None,
    };
    let (mut here, mut refused) = (Vec::new(), false);
    for fault in faults {
        match missing(&fault) {
            None => here.push(fault),
            Some(why) => {
                refused |= !allow_skip.contains(&fault);
                eprintln!("SKIPPED: {} can't be made on this machine: {why}", fault.name());
            }
        }
    }
    if refused || here.is_empty() {
        eprintln!("Nothing was run; --allow-skip names the faults that may be left out.");
        return None;
    }
    Some(here)
}

fn soaked(hours: f64, dir: Option<PathBuf>, seed: u64) -> ExitCode {
    let Some(duration) = Duration::try_from_secs_f64(hours * 3_600.0).ok().filter(|duration| !duration.is_zero())
    else {
        eprintln!("--hours {hours} is no time above 0");
        return ExitCode::from(2);
    };
    if let Err(why) = Need::Network.available().and_then(|()| Disk::available()) {
        eprintln!("No soak on this machine: {why}");
        return ExitCode::FAILURE;
    }
    let dir = dir.unwrap_or_else(|| fault_runs().join("soak"));
    let round = |kind, seed, out: &Path| match kind {
        soak::Kind::PowerCuts => power_cuts(20, 3, seed, None),
        soak::Kind::Replays => replayed(replays::Plan { ids: 10_000, times: 10, seed, planted: None }),
        soak::Kind::Nemesis | soak::Kind::Pairs => {
            let (duration, pairs, out) = (Duration::from_secs(300), kind == soak::Kind::Pairs, out.to_owned());
            under_faults(nemesis::Plan {
                duration,
                seed,
                faults: Fault::all(),
                pairs,
                planted: None,
                network: None,
                out,
            })
        }
    };
    match soak::run(&soak::Plan { duration, dir: dir.clone(), seed }, round) {
        Ok((page, valid)) => {
            println!("{page}\nIn {}", dir.display());
            if valid { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn replayed(plan: replays::Plan) -> Verdict {
    let title = format!("replays --ids {} --times {} --seed {}", plan.ids, plan.times, plan.seed);
    told(&title, cluster::block_on(replays::run(&plan)))
}

fn directory_of(seed: u64) -> PathBuf {
    fault_runs().join(format!("nemesis-{seed}"))
}

fn fault_runs() -> PathBuf {
    let target = jepsen_style_tests::process::ares().parent().map(PathBuf::from).unwrap_or_default();
    target.join("fault-runs")
}

fn under_faults(mut plan: nemesis::Plan) -> Verdict {
    let bug = plan.planted.as_ref().map(|bug| format!(", planted {bug}")).unwrap_or_default();
    let (seconds, seed) = (plan.duration.as_secs(), plan.seed);
    let title = format!("nemesis for {seconds} s, seed {seed}{bug}; history and ledger in {}", plan.out.display());
    if plan.pairs || plan.faults.iter().any(|fault| fault.needs() == Some(Need::Network)) {
        match Network::make(&nemesis::machines(), seed) {
            Ok(network) => plan.network = Some(network),
            Err(why) => return told(&title, Verdict { empty: vec![why], ..Verdict::default() }),
        }
    }
    let mut verdict = cluster::block_on(nemesis::run(&plan));
    match report::write(&plan.out, &title, &verdict) {
        Ok(path) => verdict.figure("page", path.display()),
        Err(error) => verdict.empty.push(error),
    }
    told(&title, verdict)
}

fn rechecked(dir: &Path) -> Verdict {
    let (title, mut verdict) = (format!("recheck {}", dir.display()), nemesis::recheck(dir));
    match report::write(dir, &title, &verdict) {
        Ok(path) => verdict.figure("page", path.display()),
        Err(error) => verdict.empty.push(error),
    }
    told(&title, verdict)
}

fn told(title: &str, verdict: Verdict) -> Verdict {
    println!("{title}\n{verdict}");
    verdict
}
