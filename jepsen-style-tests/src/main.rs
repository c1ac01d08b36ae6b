//! `faults`: the long runs. Started by the script `run`, which builds what they need.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use jepsen_style_tests::disk::Disk;
use jepsen_style_tests::faults::{Fault, Need};
use jepsen_style_tests::network::Network;
use jepsen_style_tests::sim::{campaign, fault};
use jepsen_style_tests::verdict::Verdict;
use jepsen_style_tests::{cluster, corrupt, hunt, nemesis, powercut, reads, replays, report, soak};

/// A simulation makes and drops small things all the time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

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
    /// Hours of nemesis, replays and power cuts (root), in rounds that a later call goes on with; stops at one that is not valid
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

#[derive(Debug, clap::Args)]
struct Sim {
    /// The first seed
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// What is simulated: `core`, everything but Raft; `raft`, the replicas with openraft, log and snapshots
    #[arg(long, value_enum, default_value_t = Tier::Core)]
    tier: Tier,
    /// How many seeds, counted up from the first [default: 1, or as many as the other limits let]
    #[arg(long, value_name = "COUNT")]
    seeds: Option<u64>,
    /// Begin no further seed after so much simulated time
    #[arg(long, value_name = "MINUTES")]
    minutes_simulated: Option<u64>,
    /// Begin no further seed after so much real time
    #[arg(long, value_name = "SECONDS")]
    wall_seconds: Option<u64>,
    /// These kinds of fault alone, comma-separated; another word is answered with all of them
    #[arg(long, value_name = "FAULTS", value_delimiter = ',')]
    only: Vec<String>,
    /// Print each event
    #[arg(long)]
    trace: bool,
    /// Threads, or processes
    #[arg(long, default_value_t = 1)]
    jobs: usize,
    /// Go on after a failure
    #[arg(long)]
    keep_going: bool,
    /// Shrink what fails to its least faults and keep it there
    #[arg(long, value_name = "DIR")]
    corpus: Option<PathBuf>,
    /// Run with this planted bug, in a build that has them
    #[arg(long, value_name = "BUG")]
    planted: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Tier {
    Core,
    Raft,
}

#[cfg(feature = "simulated")]
#[derive(Debug, clap::Args)]
struct RaftSeed {
    #[arg(long)]
    seed: u64,
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    #[arg(long)]
    trace: bool,
    #[arg(long)]
    planted: Option<String>,
}

#[derive(Debug, clap::Args)]
struct Planted {
    /// The first seed of each bug
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Seeds within which each must be caught
    #[arg(long, default_value_t = 500)]
    seeds: u64,
    /// These bugs alone, comma-separated [default: all that this tier can reach]
    #[arg(long, value_name = "BUGS", value_delimiter = ',', value_parser = planted_bug)]
    only: Vec<String>,
    /// So many of them only, counted on from the one with number `--from` in the list
    #[arg(long, value_name = "COUNT")]
    some: Option<usize>,
    #[arg(long, default_value_t = 0, requires = "some", value_name = "NUMBER")]
    from: usize,
    /// In runs of real processes, each within 10 minutes (root); their names: ack_without_fsync, and those of `--only`
    #[arg(long, conflicts_with_all = ["some", "seeds"])]
    real: bool,
    /// What the plain build says of the first seeds: `run` asks it
    #[arg(long, value_name = "HASH", hide = true)]
    plain: Option<String>,
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
        Run::Sim(options) => return simulate(options),
        #[cfg(feature = "simulated")]
        Run::RaftSeed(options) => return one_raft_seed(&options),
        Run::Planted(options) if options.real => return hunt_in_real_runs(&options.only),
        Run::Planted(options) => return hunt(&options),
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

fn simulate(options: Sim) -> ExitCode {
    let checked = known_kinds(&options).and_then(|()| options.planted.as_deref().map_or(Ok(()), plant));
    if let Err(why) = checked {
        eprintln!("{why}");
        return ExitCode::from(2);
    }
    if options.tier == Tier::Raft {
        return simulate_raft(options);
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

#[cfg(feature = "simulated")]
fn simulate_raft(options: Sim) -> ExitCode {
    use jepsen_style_tests::raft_sim::campaign;
    if options.minutes_simulated.is_some() || options.corpus.is_some() {
        eprintln!("--minutes-simulated and --corpus are for the core tier");
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
        quiet: false,
    };
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
fn one_raft_seed(options: &RaftSeed) -> ExitCode {
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
    let report = jepsen_style_tests::raft_sim::run(options.seed, disks.path(), &options.only, options.trace);
    println!("{}", serde_json::to_string(&report).expect("plain fields always encode"));
    ExitCode::SUCCESS
}

#[cfg(feature = "planted")]
fn plant(name: &str) -> Result<(), String> {
    let bug = planted::Bug::ALL.iter().find(|bug| bug.name() == name);
    let names: Vec<&str> = planted::Bug::ALL.iter().map(|bug| bug.name()).collect();
    planted::choose(Some(*bug.ok_or_else(|| format!("--planted is {name:?}, must be one of {}", names.join(", ")))?));
    Ok(())
}

#[cfg(not(feature = "planted"))]
fn plant(name: &str) -> Result<(), String> {
    Err(format!("--planted {name} needs a build with planted bugs: jepsen-style-tests/run makes it"))
}

/// The table bug -> invariant -> seeds.
#[cfg(feature = "planted")]
fn hunt(options: &Planted) -> ExitCode {
    use jepsen_style_tests::sim::bugs;
    // A planted bug ends many runs by a panic of the state machine's own checks: they are counted, not told.
    std::panic::set_hook(Box::new(|_| {}));
    let mut good = true;
    if let Some(plain) = &options.plain {
        let own = format!("{:016x}", bugs::plain_hash());
        good &= own == *plain;
        let word = if own == *plain { "the same" } else { "NOT THE SAME" };
        println!("without a bug, seeds 1 to {}: {own}, in the plain build {plain}: {word}", bugs::SAME);
    }
    println!("{:<22} {:<22} {:>5}  checks that failed before", "bug", "caught by", "seeds");
    let wanted = |bug: &&planted::Bug| match options.only.is_empty() {
        true => bugs::out_of_reach(**bug).is_none() || cfg!(feature = "simulated") && bugs::in_raft(**bug),
        false => options.only.iter().any(|name| name == bug.name()),
    };
    let bugs: Vec<_> = planted::Bug::ALL.iter().filter(wanted).collect();
    let some = options.some.unwrap_or(bugs.len()).min(bugs.len());
    for bug in bugs.iter().cycle().skip(options.from % bugs.len()).take(some) {
        #[cfg(feature = "simulated")]
        let caught = match bugs::in_raft(**bug) {
            true => jepsen_style_tests::raft_sim::campaign::hunt(**bug, options.seed, options.seeds),
            false => bugs::hunt(**bug, options.seed, options.seeds),
        };
        #[cfg(not(feature = "simulated"))]
        let caught = bugs::hunt(**bug, options.seed, options.seeds);
        good &= caught.by.is_some();
        let (by, seeds) = caught.by.unwrap_or_else(|| ("NOT CAUGHT".to_owned(), options.seeds));
        let others: Vec<String> = caught.others.iter().map(|(name, times)| format!("{name} {times}")).collect();
        println!("{:<22} {by:<22} {seeds:>5}  {}", bug.name(), others.join(", "));
    }
    for bug in planted::Bug::ALL.iter().filter(|bug| options.only.is_empty() && !wanted(bug)) {
        if let Some(why) = bugs::out_of_reach(*bug) {
            println!("{:<22} not looked for: {why}", bug.name());
        }
    }
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The table bug -> invariant -> runs and time, of real processes.
fn hunt_in_real_runs(only: &[String]) -> ExitCode {
    let wanted: Vec<_> =
        hunt::ALL.iter().filter(|one| only.is_empty() || only.iter().any(|name| name == one.bug)).collect();
    let unknown = only.iter().find(|name| hunt::ALL.iter().all(|one| one.bug != name.as_str()));
    if let Some(name) = unknown {
        let known: Vec<&str> = hunt::ALL.iter().map(|one| one.bug).collect();
        eprintln!("--only {name}: no real run is known that must show it; there is one for {}", known.join(", "));
        return ExitCode::from(2);
    }
    let out = fault_runs().join("planted");
    println!("{:<22} {:<22} {:>5} {:>7}  said otherwise", "bug", "caught by", "runs", "seconds");
    let mut good = true;
    for one in wanted {
        let caught = one.run(&out);
        good &= caught.by.is_some();
        let by = caught.by.as_deref().unwrap_or("NOT CAUGHT");
        println!(
            "{:<22} {by:<22} {:>5} {:>7}  {}",
            one.bug,
            caught.runs,
            caught.took.as_secs(),
            first_words(&caught.others)
        );
    }
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn first_words(said: &[String]) -> String {
    let short =
        said.iter().take(2).map(|text| text.lines().next().unwrap_or_default().chars().take(90).collect::<String>());
    short.collect::<Vec<_>>().join("; ")
}

#[cfg(not(feature = "planted"))]
fn hunt(_: &Planted) -> ExitCode {
    eprintln!("this build has no planted bugs: jepsen-style-tests/run planted makes one that has");
    ExitCode::from(2)
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

/// A mistyped name would run without any bug.
fn planted_bug(name: &str) -> Result<String, String> {
    let known: Vec<&str> = planted::Bug::ALL.iter().map(|bug| bug.name()).collect();
    if known.contains(&name) { Ok(name.to_owned()) } else { Err(format!("it is one of {}", known.join(", "))) }
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
