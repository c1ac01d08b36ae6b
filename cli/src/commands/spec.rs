//! The options that describe a job: one struct for `submit`, `run` and `dev --`.

use std::collections::HashMap;

use jiff::SignedDuration;
use proto::v1;

use super::gpus::{Count, Gpus};
use super::when;
use crate::exit::Failure;

/// Groups of options in the help.
const MACHINES: &str = "Machines and GPUs";
const TIME: &str = "Time and retries";

/// A count from `least` on; how far up is the cluster's to say.
fn at_least(least: i64) -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(least..)
}

/// What to run, and on what.
#[derive(Clone, Debug, clap::Args)]
pub struct JobArgs {
    /// Name of the job [default: the command's]
    #[arg(long, short = 'J', default_value = "", hide_default_value = true)]
    name: String,
    /// GPUs of a job, on as few machines as hold them in equal parts: 8, 8..32 (as many as there is room for), or by types
    /// such as 'h100:8|a100:8'
    #[arg(long, conflicts_with_all = ["gpus_per_node", "nodes"], value_name = "N", allow_negative_numbers = true)]
    #[arg(help_heading = MACHINES)]
    gpus: Vec<Gpus>,
    /// Machines of a gang
    #[arg(long, short = 'N', default_value_t = 1, value_name = "N", value_parser = at_least(1))]
    #[arg(help_heading = MACHINES, allow_negative_numbers = true)]
    nodes: u32,
    /// GPUs on each machine
    #[arg(long, default_value_t = 0, value_name = "N", value_parser = at_least(0))]
    #[arg(help_heading = MACHINES, allow_negative_numbers = true)]
    gpus_per_node: u32,
    /// Processes on each machine; they share its GPUs evenly
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = at_least(1))]
    #[arg(help_heading = MACHINES, allow_negative_numbers = true)]
    ranks_per_node: u32,
    /// Acceptable GPU types in order of preference, such as h100,a100
    #[arg(long, value_delimiter = ',', value_name = "TYPE", help_heading = MACHINES)]
    gpu_type: Vec<String>,
    /// Let the machines of a gang have GPUs of different types
    #[arg(long, help_heading = MACHINES)]
    mix_types: bool,
    /// Cores of each process [default: the machine's share beside GPUs, else 1]
    #[arg(long, short = 'c', default_value_t = 0, hide_default_value = true, value_name = "N", value_parser = at_least(0))]
    #[arg(help_heading = MACHINES, allow_negative_numbers = true)]
    cores: u32,
    /// Memory of each process, such as 512MiB or 16GiB [default: the machine's share beside GPUs, else 1GiB]
    #[arg(long, default_value = "", hide_default_value = true, value_name = "SIZE", help_heading = MACHINES)]
    mem: String,
    /// Least predicted bandwidth among the GPUs of a machine, such as 100GB/s
    #[arg(long, default_value = "", hide_default_value = true, value_name = "RATE", help_heading = MACHINES)]
    min_bandwidth: String,
    /// Machines of a gang in one block, rack or switch: rack:require (or it waits), rack:prefer (where one has room)
    #[arg(long, default_value = "", hide_default_value = true, value_name = "LEVEL:HOW", help_heading = MACHINES)]
    topology: String,
    /// Machines by their labels: KEY=VALUE, KEY!=VALUE or KEY, joined by &, alternatives by |, such as 'ssd&rack!=r1'
    #[arg(long, default_value = "", hide_default_value = true, value_name = "EXPR", help_heading = MACHINES)]
    constraint: String,
    /// Only these machines: as many of them as it needs, and no other
    #[arg(long, value_delimiter = ',', value_name = "NODE", help_heading = MACHINES)]
    nodelist: Vec<String>,
    /// None of these machines
    #[arg(long, value_delimiter = ',', value_name = "NODE", help_heading = MACHINES)]
    exclude: Vec<String>,
    /// Higher goes first
    #[arg(long, short = 'p', default_value_t = 0, allow_negative_numbers = true, value_name = "N")]
    priority: i32,
    /// A named priority, in place of a number: ares priority list
    #[arg(long, default_value = "", hide_default_value = true, value_name = "NAME", conflicts_with = "priority")]
    priority_class: String,
    /// Who pays: ares tenant list [default: default]
    #[arg(long, default_value = "", hide_default_value = true, value_name = "TENANT")]
    tenant: String,
    /// Run on the machines of this reservation, in its time: ares reservation list
    #[arg(long, default_value = "", hide_default_value = true, value_name = "NAME", help_heading = TIME)]
    reservation: String,
    /// So many tasks, each with its ARES_TASK_INDEX: such as 0-99, 1,4,7-9, 0-15:4, or 0-999%50 for 50 at a time
    #[arg(long, default_value = "", hide_default_value = true, value_name = "INDEXES")]
    array: String,
    /// Wait until `ares release` lets it start
    #[arg(long, short = 'H', help_heading = TIME)]
    hold: bool,
    /// Start no sooner, such as now+1h, 08:30 or 2026-11-25T08:30
    #[arg(long, default_value = "", hide_default_value = true, value_name = "TIME", help_heading = TIME)]
    begin: String,
    /// Cancel it when it can't start by then any more; with --time-limit: start and end
    #[arg(long, default_value = "", hide_default_value = true, value_name = "TIME", help_heading = TIME)]
    deadline: String,
    /// Start after jobs have ended: afterok:ID, afterany:ID, afternotok:ID or aftercorr:ID, several with commas
    #[arg(long, value_delimiter = ',', value_name = "KIND:ID", help_heading = TIME)]
    after: Vec<String>,
    /// Longest run time of one attempt, such as 90s, 30m or 2h [default: none]
    #[arg(long, short = 't', default_value = "", hide_default_value = true, value_name = "TIME", help_heading = TIME)]
    time_limit: String,
    /// How long an attempt outlives its agent's contact to the cluster, at least 10s
    #[arg(long, default_value = "300s", value_name = "TIME", help_heading = TIME)]
    lease_ttl: String,
    /// From SIGTERM to SIGKILL; at most a quarter of the lease [default: 5s]
    #[arg(long, default_value = "", hide_default_value = true, value_name = "TIME", help_heading = TIME)]
    kill_grace: String,
    /// Tells an attempt that goes back to the queue to save its work, such as USR1 [default: TERM]
    #[arg(long, default_value = "", hide_default_value = true, value_name = "SIGNAL", help_heading = TIME)]
    checkpoint_signal: String,
    /// Retries after a non-zero exit [default: 3 for submit, 0 for run and dev]
    #[arg(long, value_name = "N", value_parser = at_least(0), help_heading = TIME, allow_negative_numbers = true)]
    retries: Option<u32>,
    /// Wait before the first retry
    #[arg(long, default_value = "1s", value_name = "TIME", help_heading = TIME)]
    retry_initial: String,
    /// Factor from one wait to the next
    #[arg(long, default_value_t = 2.0, value_name = "X", help_heading = TIME, allow_negative_numbers = true)]
    retry_multiplier: f64,
    /// Longest wait before a retry
    #[arg(long, default_value = "5m", value_name = "TIME", help_heading = TIME)]
    retry_max: String,
    /// Exit codes that are retried [default: every failure]
    #[arg(long, value_delimiter = ',', value_name = "CODE", value_parser = at_least(0), help_heading = TIME)]
    #[arg(allow_negative_numbers = true)]
    retry_on: Vec<u32>,
    /// Environment of the job, NAME=VALUE; NAME alone copies yours
    #[arg(long, short = 'e', value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// Working directory [default: a fresh one on the machine]
    #[arg(long, short = 'D', default_value = "", hide_default_value = true, value_name = "DIR")]
    chdir: String,
    /// Labels, NAME=VALUE
    #[arg(long, short = 'l', value_name = "NAME=VALUE")]
    label: Vec<String>,
    /// Container image; none can be run yet
    #[arg(long, default_value = "", hide = true)]
    image: String,
    /// The command and its arguments
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

impl JobArgs {
    /// The simulated machine that `--gpus sim:NAME` asks for.
    pub fn machine(&self) -> Option<String> {
        self.gpus.iter().find_map(|gpus| match gpus {
            Gpus::Machine(machine) => Some(machine.clone()),
            Gpus::Count(_) | Gpus::Types(..) => None,
        })
    }

    /// How many, and of which types where it says so.
    fn gpus(&self) -> Option<(Count, &[String])> {
        self.gpus.iter().rev().find_map(|gpus| match gpus {
            Gpus::Count(count) => Some((*count, [].as_slice())),
            Gpus::Types(types, count) => Some((*count, types.as_slice())),
            Gpus::Machine(_) => None,
        })
    }

    /// A command was given.
    pub fn has_command(&self) -> bool {
        !self.command.is_empty()
    }

    /// The spec for a cluster, whose machines are what they are.
    pub fn cluster_spec(&self, retries: u32) -> Result<v1::JobSpec, Failure> {
        if let Some(machine) = self.machine() {
            return Err(Failure::usage(format!("--gpus {machine:?} is no number of GPUs"))
                .advise("a machine is simulated by `ares agent --gpus` and `ares dev --gpus`"));
        }
        self.spec(retries)
    }

    /// The spec as it travels; `retries` where the options name none.
    pub fn spec(&self, retries: u32) -> Result<v1::JobSpec, Failure> {
        let given = self.gpus();
        // On how many machines, the cluster says that has them.
        let nodes = if given.is_some_and(|(gpus, _)| gpus.least > 0) { 0 } else { self.nodes };
        let (count, types) = given.unwrap_or((Count::exactly(self.gpus_per_node), &[]));
        let (gpus_per_node, most) = (count.least, count.most);
        if !types.is_empty() && !self.gpu_type.is_empty() {
            return Err(Failure::usage("--gpus and --gpu-type both name GPU types").advise("leave --gpu-type out"));
        }
        let ranks_per_node = self.ranks_per_node;
        if self.command.is_empty() {
            return Err(
                Failure::usage("no command is given").advise("write it behind --, such as: -- python3 train.py")
            );
        }
        if !gpus_per_node.is_multiple_of(ranks_per_node) {
            return Err(Failure::usage(format!(
                "{gpus_per_node} GPUs on a machine can't be shared evenly by {ranks_per_node} processes \
                 (--ranks-per-node)"
            ))
            .advise("make one a multiple of the other"));
        }
        if !(1.0..=1_000.0).contains(&self.retry_multiplier) {
            return Err(Failure::usage(format!("--retry-multiplier {} is not from 1 to 1000", self.retry_multiplier)));
        }
        Ok(v1::JobSpec {
            name: self.name.clone(),
            priority: self.priority,
            shape: Some(v1::Shape {
                nodes,
                ranks_per_node,
                gpus_per_rank: gpus_per_node / ranks_per_node,
                most_gpus_per_rank: if most > gpus_per_node { most / ranks_per_node } else { 0 },
                gpu_types: if types.is_empty() { self.gpu_type.clone() } else { types.to_vec() },
                mix_types: self.mix_types,
                cores_per_rank: self.cores,
                mem_mib_per_rank: if self.mem.is_empty() { 0 } else { size_mib("--mem", &self.mem)? },
                topology: self.topology.clone(),
                constraint: self.constraint.clone(),
                nodelist: self.nodelist.clone(),
                exclude: self.exclude.clone(),
                min_bandwidth_mbps: if self.min_bandwidth.is_empty() { 0 } else { rate_mbps(&self.min_bandwidth)? },
            }),
            limit_ms: optional_ms("--time-limit", &self.time_limit)?,
            lease_ttl_ms: duration_ms("--lease-ttl", &self.lease_ttl)?,
            checkpoint_signal: signal(&self.checkpoint_signal)?,
            kill_grace_ms: optional_ms("--kill-grace", &self.kill_grace)?,
            retry: Some(v1::Retry {
                max: self.retries.unwrap_or(retries),
                initial_ms: duration_ms("--retry-initial", &self.retry_initial)?,
                mult_milli: (self.retry_multiplier * 1_000.0).round() as u32,
                max_ms: duration_ms("--retry-max", &self.retry_max)?,
                on_exit: self.retry_on.clone(),
            }),
            labels: pairs("--label", &self.label, |name| {
                Err(Failure::usage(format!("--label {name:?} has no value; write NAME=VALUE")))
            })?,
            tenant: self.tenant.clone(),
            priority_class: self.priority_class.clone(),
            queue: String::new(),
            body: Some(v1::Body { argv: self.command.clone(), env: self.environment()?, cwd: self.chdir.clone() }),
            image: self.image.clone(),
            hold: self.hold,
            begin_unix_ms: when::unix_ms("--begin", &self.begin)?,
            deadline_unix_ms: when::unix_ms("--deadline", &self.deadline)?,
            after: when::after(&self.after)?,
            reservation: self.reservation.clone(),
            array: if self.array.is_empty() { None } else { Some(super::array::parse(&self.array)?) },
        })
    }

    fn environment(&self) -> Result<HashMap<String, String>, Failure> {
        pairs("--env", &self.env, |name| {
            std::env::var(name).map_err(|_| {
                Failure::usage(format!("--env {name}: your environment has no such variable; write {name}=VALUE"))
            })
        })
    }
}

/// The options behind the fields that a cluster may refuse.
const FLAGS: [(&str, &str); 27] = [
    ("array", "--array"),
    ("checkpoint_signal", "--checkpoint-signal"),
    ("shape.nodes", "--nodes"),
    ("shape.ranks_per_node", "--ranks-per-node"),
    ("shape.gpus_per_rank", "--gpus"),
    ("shape.most_gpus_per_rank", "--gpus"),
    ("shape.gpu_types", "--gpu-type"),
    ("shape.cores_per_rank", "--cores"),
    ("mem_mib_per_rank", "--mem"),
    ("min_bandwidth_mbps", "--min-bandwidth"),
    ("shape.topology", "--topology"),
    ("shape.constraint", "--constraint"),
    ("shape.nodelist", "--nodelist"),
    ("shape.exclude", "--exclude"),
    ("limit_ms", "--time-limit"),
    ("lease_ttl_ms", "--lease-ttl"),
    ("kill_grace_ms", "--kill-grace"),
    ("retry.max", "--retries"),
    ("retry.on_exit", "--retry-on"),
    ("retry.initial_ms", "--retry-initial"),
    ("retry.mult_milli", "--retry-multiplier"),
    ("labels", "--label"),
    ("body.env", "--env"),
    ("image", "--image"),
    ("begin_wall_ms", "--begin"),
    ("deadline_wall_ms", "--deadline"),
    ("after", "--after"),
];

/// A refused submission, with the options to correct beside the fields that it names.
pub fn refused(error: proto::Error) -> Failure {
    let failure = Failure::from(error);
    if failure.code != crate::exit::USAGE {
        return failure;
    }
    let message = &failure.message;
    let named = |field: &str| message.split([' ', ':', ';', ',', '(', ')']).any(|word| word == field);
    let flags: Vec<&str> = FLAGS.iter().filter(|(field, _)| named(field)).map(|(_, flag)| *flag).collect();
    match flags.as_slice() {
        [] => failure,
        flags if failure.reason == proto::reason::NOT_IMPLEMENTED_YET.name => {
            failure.advise(format!("leave {} out", flags.join(", ")))
        }
        flags => failure.advise(format!("correct {}", flags.join(", "))),
    }
}

pub fn pairs(
    option: &str,
    given: &[String],
    bare: impl Fn(&str) -> Result<String, Failure>,
) -> Result<HashMap<String, String>, Failure> {
    let mut map = HashMap::new();
    for item in given {
        let (name, value) = match item.split_once('=') {
            Some((name, value)) => (name, value.to_owned()),
            None => (item.as_str(), bare(item)?),
        };
        if name.is_empty() {
            return Err(Failure::usage(format!("{option} {item:?} has no name; write NAME=VALUE")));
        }
        map.insert(name.to_owned(), value);
    }
    Ok(map)
}

/// A duration such as `90s`, `30m`, `2h30m`, `7d`, or a plain number of seconds.
pub fn duration_ms(option: &str, text: &str) -> Result<u64, Failure> {
    let duration = match text.parse::<u64>() {
        Ok(seconds) => SignedDuration::from_secs(i64::try_from(seconds).unwrap_or(i64::MAX)),
        Err(_) => text.parse().ok().or_else(|| with_days(text)).ok_or_else(|| {
            Failure::usage(format!("{option} {text:?} is no duration")).advise("write such as 90s, 30m or 2h30m")
        })?,
    };
    u64::try_from(duration.as_millis())
        .ok()
        .filter(|ms| *ms > 0)
        .ok_or_else(|| Failure::usage(format!("{option} {text:?} is not above zero")))
}

/// `7d`, `1d12h`: days of 24 hours, which the parser leaves to calendars.
fn with_days(text: &str) -> Option<SignedDuration> {
    let (days, rest) = text.split_once('d')?;
    let rest = if rest.is_empty() { SignedDuration::ZERO } else { rest.parse().ok()? };
    SignedDuration::try_from_hours(days.trim().parse::<i64>().ok()?.checked_mul(24)?)?.checked_add(rest)
}

fn optional_ms(option: &str, text: &str) -> Result<u64, Failure> {
    if text.is_empty() { Ok(0) } else { duration_ms(option, text) }
}

/// `USR1`, `SIGUSR1` or `10`; 0 where none is named.
fn signal(text: &str) -> Result<u32, Failure> {
    if text.is_empty() {
        return Ok(0);
    }
    let name = text.to_ascii_uppercase();
    let full = if name.starts_with("SIG") { name } else { format!("SIG{name}") };
    let number = text.parse().ok().or_else(|| full.parse::<nix::sys::signal::Signal>().ok().map(|it| it as u32));
    number.filter(|number| *number > 0).ok_or_else(|| {
        Failure::usage(format!("--checkpoint-signal {text:?} is no signal")).advise("write such as USR1 or TERM")
    })
}

/// `512`, `512MiB`, `16G`, `16GiB`: MiB unless it says otherwise; powers of two, as memory is.
pub fn size_mib(option: &str, text: &str) -> Result<u64, Failure> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = text[digits.len()..].to_ascii_lowercase();
    let shift = match unit.as_str() {
        "" | "m" | "mb" | "mib" => Some(0),
        "g" | "gb" | "gib" => Some(10),
        "t" | "tb" | "tib" => Some(20),
        _ => None,
    };
    let value = digits.trim().parse::<u64>().ok().zip(shift).and_then(|(number, shift)| number.checked_mul(1 << shift));
    value.filter(|mib| *mib > 0).ok_or_else(|| {
        Failure::usage(format!("{option} {text:?} is no memory size")).advise("write such as 512MiB or 16GiB")
    })
}

fn rate_mbps(text: &str) -> Result<u32, Failure> {
    let lower = text.to_ascii_lowercase();
    let (digits, factor) = match lower.strip_suffix("gb/s") {
        Some(digits) => (digits, 1_000.0),
        None => (lower.strip_suffix("mb/s").unwrap_or(&lower), 1.0),
    };
    match digits.trim().parse::<f64>() {
        Ok(number) if number > 0.0 && number * factor <= f64::from(u32::MAX) => Ok((number * factor).round() as u32),
        _ => Err(Failure::usage(format!("--min-bandwidth {text:?} is no rate")).advise("write such as 100GB/s")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_people_write_them() {
        for (text, ms) in [
            ("90s", 90_000),
            ("30m", 1_800_000),
            ("2h30m", 9_000_000),
            ("7d", 604_800_000),
            ("1d12h", 129_600_000),
            ("15", 15_000),
            ("500ms", 500),
        ] {
            assert_eq!(duration_ms("--x", text).map_err(|failure| failure.message), Ok(ms), "{text}");
        }
        for text in ["", "soon", "-5s", "0", "-1d", "d", "1dd"] {
            assert!(duration_ms("--x", text).is_err(), "{text}");
        }
    }

    #[test]
    fn memory_is_read_in_powers_of_two() {
        assert_eq!(size_mib("--mem", "16GiB").map_err(|failure| failure.message), Ok(16_384));
        assert_eq!(size_mib("--mem", "512").map_err(|failure| failure.message), Ok(512));
        assert!(size_mib("--mem", "lots").is_err());
        assert!(size_mib("--mem", "99999999999999999T").is_err());
    }
}
