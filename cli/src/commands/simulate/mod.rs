//! `ares simulate`: job traces under named policies, in virtual time. Owns files, clocks and options; what happens is
//! `scheduling::simulate`'s, how it looks is `report`'s and `page`'s.

mod page;
mod plots;
mod report;

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use scheduling::simulate::course::{Course, Figures};
use scheduling::simulate::dice::Dice;
use scheduling::simulate::policy::Policy;
use scheduling::simulate::saturation::{Saturation, saturate};
use scheduling::simulate::trace::{Trace, read, read_untimed};
use scheduling::simulate::{Options, run as simulate, shares};

use crate::Global;
use crate::exit::{Failure, NOT_FOUND, Outcome};
use crate::output::Asked;

#[derive(Debug, clap::Args)]
#[command(after_help = after_help())]
pub struct Args {
    /// Jobs: id, submit_s, duration_s, gpus and, where known, gpu_milli, cpus, mem_mib, tenant, requested_s, gpu_type
    #[arg(long, value_name = "FILE")]
    jobs: PathBuf,
    /// Machines: name, gpus and, where known, gpu_type, cpus, mem_mib
    #[arg(long, value_name = "FILE")]
    nodes: PathBuf,
    /// A policy; several are printed side by side [default: default]
    #[arg(long = "policy", value_name = "NAME", value_parser = policy)]
    policies: Vec<Policy>,
    /// For all that is drawn
    #[arg(long, default_value_t = 0, value_name = "N")]
    seed: u64,
    /// Write each job's wait as id,wait_s; with several policies wait_s:POLICY
    #[arg(long, value_name = "FILE", conflicts_with = "saturate")]
    waits: Option<PathBuf>,
    /// Fill the cluster with jobs drawn from the list until their demand is so many times its GPUs; nothing ends
    #[arg(long, value_name = "TIMES", value_parser = times)]
    saturate: Option<u64>,
    /// With --saturate: the machines in the order of the list, not in one drawn by the seed
    #[arg(long, requires = "saturate")]
    listed_order: bool,
    /// All machines serve all jobs, also where tenants are named as types of machines
    #[arg(long, conflicts_with = "saturate")]
    pooled: bool,
    /// Only jobs submitted from the first second on and before the second one
    #[arg(long, value_name = "FROM..UNTIL", value_parser = window, conflicts_with = "saturate")]
    window: Option<(u64, u64)>,
    /// Move each submission by 0 to so many seconds, drawn by the seed
    #[arg(long, default_value_t = 0, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(..=86_400))]
    #[arg(conflicts_with = "saturate")]
    jitter: u64,
}

fn after_help() -> String {
    let policies = Policy::ALL.iter().map(|policy| format!("  {:<15} {}", policy.name, policy.about));
    format!(
        "Policies:\n{}\n\nFiles are comma-separated with a head line, plain or gzip; an empty field is unknown. A tenant \
         whose name is a type of machines has these for itself. docs/SCHEDULING.md explains the figures.",
        policies.collect::<Vec<_>>().join("\n")
    )
}

fn policy(name: &str) -> Result<Policy, String> {
    let names = || Policy::ALL.map(|policy| policy.name).join(", ");
    Policy::by_name(name).ok_or_else(|| format!("no policy has this name; there are {}", names()))
}

/// Percent from a multiple such as 1.3.
fn times(text: &str) -> Result<u64, String> {
    let wanted = "it is not a number from 0.01 to 10 with at most two decimals, such as 1.3";
    let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
    let digits = |text: &str| (1..=2).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
    let number = |text: &str| digits(text).then(|| text.parse::<u64>().ok()).flatten();
    let hundredths = number(fraction).map(|value| if fraction.len() == 1 { value * 10 } else { value });
    let percent = number(whole).zip(hundredths).map(|(whole, hundredths)| whole * 100 + hundredths);
    percent.filter(|percent| (1..=1_000).contains(percent)).ok_or_else(|| wanted.to_owned())
}

fn window(text: &str) -> Result<(u64, u64), String> {
    let bounds = text.split_once("..").and_then(|(from, until)| from.parse().ok().zip(until.parse().ok()));
    bounds.filter(|(from, until)| from < until).ok_or_else(|| "it is not two seconds such as 0..86400".to_owned())
}

/// What one policy made of the trace.
struct Tried {
    policy: Policy,
    made: Made,
    /// Seconds of this machine that the run took: planning is all it does.
    planner_s: f64,
}

enum Made {
    OverTime {
        course: Course,
        figures: Figures,
        /// Hundredths of a percent; of tenants in one pool.
        shortfall: Option<u64>,
    },
    Filled(Saturation),
}

/// All of one invocation.
struct Experiment {
    trace: Trace,
    seed: u64,
    results: Vec<Tried>,
}

pub fn run(args: Args, global: Global) -> Outcome {
    let mut trace = load(&args)?;
    if let Some((from, until)) = args.window {
        trace.jobs.retain(|job| (from..until).contains(&job.submit_s));
    }
    if args.jitter > 0 {
        let mut dice = Dice::new(args.seed);
        trace.jobs.iter_mut().for_each(|job| job.submit_s += dice.below(args.jitter as usize + 1) as u64);
    }
    if trace.jobs.is_empty() {
        return Err(Failure::usage(format!("{} has no job to run", args.jobs.display()))
            .advise("write a job a line, or a wider --window"));
    }
    let policies = if args.policies.is_empty() { vec![Policy::ALL[0]] } else { args.policies.clone() };
    let results = policies.iter().map(|policy| one(&trace, policy, &args)).collect();
    let experiment = Experiment { trace, seed: args.seed, results };
    if let Some(path) = &args.waits {
        write_waits(path, &experiment)?;
    }
    match global.asked {
        Asked::Html => crate::output::raw(page::page(&experiment).as_bytes()),
        Asked::Json => crate::output::json(&report::document(&experiment)),
        Asked::Jsonl => report::documents(&experiment).iter().for_each(|document| println!("{document}")),
        Asked::Name => experiment.results.iter().for_each(|result| println!("{}", result.policy.name)),
        Asked::Table => report::table(&experiment),
    }
    Ok(ExitCode::SUCCESS)
}

fn one(trace: &Trace, policy: &Policy, args: &Args) -> Tried {
    let began = Instant::now();
    let made = match args.saturate {
        Some(percent) => Made::Filled(saturate(trace, policy.score, percent, args.seed, !args.listed_order)),
        None => {
            let course = simulate(trace, policy, Options { seed: args.seed, pooled: args.pooled });
            let shortfall = args.pooled.then(|| course.shortfall(trace, &shares(trace, true)));
            Made::OverTime { figures: course.figures(trace), shortfall, course }
        }
    };
    Tried { policy: *policy, made, planner_s: began.elapsed().as_secs_f64() }
}

fn load(args: &Args) -> Result<Trace, Failure> {
    let (jobs, nodes) = (text_of(&args.jobs)?, text_of(&args.nodes)?);
    let (jobs_name, nodes_name) = (args.jobs.display().to_string(), args.nodes.display().to_string());
    let read = if args.saturate.is_some() { read_untimed } else { read };
    read((&jobs_name, &jobs), (&nodes_name, &nodes)).map_err(|error| Failure::usage(error.to_string()))
}

/// A file's text; gzip is told by its first bytes.
fn text_of(path: &Path) -> Result<String, Failure> {
    let unread = |error: std::io::Error| {
        let code = if error.kind() == std::io::ErrorKind::NotFound { NOT_FOUND } else { crate::exit::FAILURE };
        Failure::new(code, format!("{} can't be read: {error}", path.display()))
    };
    let bytes = std::fs::read(path).map_err(unread)?;
    let bytes = if bytes.starts_with(&[0x1f, 0x8b]) {
        let mut unpacked = Vec::new();
        flate2::read::MultiGzDecoder::new(bytes.as_slice()).read_to_end(&mut unpacked).map_err(unread)?;
        unpacked
    } else {
        bytes
    };
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        let line = error.as_bytes()[..at].iter().filter(|byte| **byte == b'\n').count() + 1;
        Failure::usage(format!(
            "{}, line {line}: byte {at} is not UTF-8; the file must be text or gzip",
            path.display()
        ))
    })
}

/// An empty field where a job never starts.
fn write_waits(path: &Path, experiment: &Experiment) -> Result<(), Failure> {
    let Experiment { trace, results, .. } = experiment;
    let courses: Vec<&Course> = results.iter().filter_map(Tried::course).collect();
    let mut text = String::from("id");
    match results.as_slice() {
        [_] => text.push_str(",wait_s"),
        several => several.iter().for_each(|result| text.push_str(&format!(",wait_s:{}", result.policy.name))),
    }
    for (at, job) in trace.jobs.iter().enumerate() {
        text.push('\n');
        text.push_str(&job.id);
        for course in &courses {
            text.push(',');
            text.push_str(&course.wait_s(trace, at).map(|wait| wait.to_string()).unwrap_or_default());
        }
    }
    text.push('\n');
    std::fs::write(path, text)
        .map_err(|error| Failure::new(crate::exit::FAILURE, format!("{} can't be written: {error}", path.display())))
}

impl Tried {
    fn course(&self) -> Option<&Course> {
        match &self.made {
            Made::OverTime { course, .. } => Some(course),
            Made::Filled(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn multiples_and_windows() {
        assert_eq!((times("1.3"), times("2"), times("0.95"), times("10")), (Ok(130), Ok(200), Ok(95), Ok(1_000)));
        for wrong in ["", "-1", "1.333", "x", "0", "11", "1."] {
            assert!(times(wrong).is_err(), "{wrong}");
        }
        assert_eq!(window("5..9"), Ok((5, 9)));
        assert!(window("9..5").is_err() && window("5").is_err());
    }
}
