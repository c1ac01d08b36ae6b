//! `run planted`: what catches each planted bug, in simulations and in runs of real processes.

use std::process::ExitCode;

use jepsen_style_tests::hunt;

use crate::fault_runs;

#[derive(Debug, clap::Args)]
pub struct Planted {
    /// The first seed of each bug
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Seeds within which each must be caught
    #[arg(long, default_value_t = 500)]
    pub seeds: u64,
    /// These bugs alone, comma-separated [default: all that this tier can reach]
    #[arg(long, value_name = "BUGS", value_delimiter = ',', value_parser = planted_bug)]
    pub only: Vec<String>,
    /// So many of them only, counted on from the one with number `--from` in the list
    #[arg(long, value_name = "COUNT")]
    pub some: Option<usize>,
    #[arg(long, default_value_t = 0, requires = "some", value_name = "NUMBER")]
    pub from: usize,
    /// In runs of real processes, each within 10 minutes (root); their names: ack_without_fsync, and those of `--only`
    #[arg(long, conflicts_with_all = ["some", "seeds"])]
    pub real: bool,
    /// What the plain build says of the first seeds: `run` asks it
    #[arg(long, value_name = "HASH", hide = true)]
    pub plain: Option<String>,
}

#[cfg(feature = "planted")]
pub fn plant(name: &str) -> Result<(), String> {
    let bug = planted::Bug::ALL.iter().find(|bug| bug.name() == name);
    let names: Vec<&str> = planted::Bug::ALL.iter().map(|bug| bug.name()).collect();
    planted::choose(Some(*bug.ok_or_else(|| format!("--planted is {name:?}, must be one of {}", names.join(", ")))?));
    Ok(())
}

#[cfg(not(feature = "planted"))]
pub fn plant(name: &str) -> Result<(), String> {
    Err(format!("--planted {name} needs a build with planted bugs: jepsen-style-tests/run makes it"))
}

/// The table bug -> invariant -> seeds.
#[cfg(feature = "planted")]
pub fn hunt(options: &Planted) -> ExitCode {
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

#[cfg(not(feature = "planted"))]
pub fn hunt(_: &Planted) -> ExitCode {
    eprintln!("this build has no planted bugs: jepsen-style-tests/run planted makes one that has");
    ExitCode::from(2)
}

/// The table bug -> invariant -> runs and time, of real processes.
pub fn hunt_in_real_runs(only: &[String]) -> ExitCode {
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

/// A mistyped name would run without any bug.
pub fn planted_bug(name: &str) -> Result<String, String> {
    let known: Vec<&str> = planted::Bug::ALL.iter().map(|bug| bug.name()).collect();
    if known.contains(&name) { Ok(name.to_owned()) } else { Err(format!("it is one of {}", known.join(", "))) }
}
