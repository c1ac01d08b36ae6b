//! `ares why`: why a job waits, when it starts, and what would start it sooner.

use std::process::ExitCode;

use proto::v1;
use serde_json::{Value, json};

use super::show::{self, placement, read_mode};
use super::wait::known;
use crate::Global;
use crate::connect::{client, runtime};
use crate::exit::Outcome;
use crate::output::{self, Format};

/// Below its help; its arguments are those of `ares show`.
pub const AFTER_HELP: &str = "\
Any replica answers, with the planner's own code. The interval of the start goes from \"all that runs ends now\" to \"it uses
its whole time limit\"; each change was planned with. docs/CLI.md lists the codes.";

pub fn run(args: show::Args, global: Global) -> Outcome {
    let client = client(&global)?;
    let why = runtime()?.block_on(async {
        let job_id = args.job.resolve(&client).await?;
        let request = v1::WhyJobRequest { job_id, read: read_mode(args.stale) };
        client.why_job(request).await.map_err(|error| known(error, job_id))
    })?;
    match global.output {
        Format::Json | Format::Jsonl => output::json(&json(&why)),
        Format::Name => println!("{}", if why.code.is_empty() { &why.state } else { &why.code }),
        Format::Table => lines(&why).iter().for_each(|line| println!("{line}")),
    }
    Ok(ExitCode::SUCCESS)
}

/// The answer for people; its first line says all in short.
pub fn lines(why: &v1::Why) -> Vec<String> {
    let who = if why.job_id == 0 { "It".to_owned() } else { format!("Job {}", why.job_id) };
    if why.code.is_empty() {
        return vec![format!("{who} does not wait: it is {}.", why.state)];
    }
    if !why.parts.is_empty() {
        let mut lines = vec![format!("{who} would start now.")];
        lines.extend(why.parts.iter().map(|part| row("Placement", &placement(part))));
        return lines;
    }
    let mut lines = vec![format!("{who} waits: {}.", why.code), row("Reason", &why.reason), row("Do", &why.advice)];
    lines.extend(why.holders.iter().map(|holder| row("Held by", &held_by(holder, why.now_unix_ms))));
    lines.push(row("Start", &start(why)));
    lines.extend(why.assumes.iter().map(|assumed| row("  assumes", assumed)));
    lines.extend(why.changes.iter().map(|change| row("Sooner", &sooner(change, why.now_unix_ms))));
    lines
}

fn row(name: &str, value: &str) -> String {
    format!("{name:<10} {value}")
}

fn held_by(holder: &v1::Holder, now: i64) -> String {
    let mut parts = Vec::new();
    if holder.gpus > 0 {
        parts.push(format!("{} {}", holder.gpus, if holder.gpus == 1 { "GPU" } else { "GPUs" }));
    }
    if holder.gpus == 0 && holder.cores > 0 {
        parts.push(format!("{} cores, {} MiB", holder.cores, holder.mem_mib));
    }
    if !holder.node.is_empty() {
        parts.push(format!("on {}", holder.node));
    }
    let end = match (holder.waits, holder.ends_unix_ms) {
        (true, _) => "goes first".to_owned(),
        (false, 0) => "no time limit".to_owned(),
        (false, end) => format!("ends by {}", at(end, now)),
    };
    let what = if parts.is_empty() { String::new() } else { format!(": {}", parts.join(" ")) };
    format!("job {} ({}, {}){what}; {end}", holder.job_id, holder.name, holder.user)
}

/// `between now and in 10m (2026-...)`.
fn start(why: &v1::Why) -> String {
    match (why.soonest_unix_ms, why.latest_unix_ms) {
        (0, 0) => "can't be told".to_owned(),
        (soonest, 0) => format!("{} at the soonest; the latest can't be told", at(soonest, why.now_unix_ms)),
        (soonest, latest) if soonest == 0 || soonest >= latest => format!("by {}", at(latest, why.now_unix_ms)),
        (soonest, latest) => format!("between {} and {}", at(soonest, why.now_unix_ms), at(latest, why.now_unix_ms)),
    }
}

fn sooner(change: &v1::Change, now: i64) -> String {
    match (change.now, change.latest_unix_ms) {
        (true, _) => format!("{}: starts now", change.ask),
        (false, latest) => format!("{}: starts by {}", change.ask, at(latest, now)),
    }
}

/// A time to come, for people.
fn at(unix_ms: i64, now: i64) -> String {
    // What ends a moment from now is not told to the second.
    if unix_ms - now < 1_000 {
        return "now".to_owned();
    }
    let second = unix_ms.div_euclid(1_000) * 1_000;
    format!("{} (in {})", output::time(second), output::age(unix_ms - now))
}

/// A contract, as all of `-o json`.
pub fn json(why: &v1::Why) -> Value {
    let time = |unix_ms: i64| if unix_ms == 0 { Value::Null } else { Value::String(output::time(unix_ms)) };
    let text = |text: &str| if text.is_empty() { Value::Null } else { Value::String(text.to_owned()) };
    json!({
        "job": (why.job_id != 0).then_some(why.job_id),
        "state": why.state,
        "code": text(&why.code),
        "reason": text(&why.reason),
        "advice": text(&why.advice),
        "holders": why.holders.iter().map(|holder| json!({
            "job": holder.job_id,
            "name": holder.name,
            "user": holder.user,
            "node": text(&holder.node),
            "gpus": holder.gpus,
            "cores": holder.cores,
            "mem_mib": holder.mem_mib,
            "ends": time(holder.ends_unix_ms),
            "waits": holder.waits,
        })).collect::<Vec<_>>(),
        "soonest": time(why.soonest_unix_ms),
        "latest": time(why.latest_unix_ms),
        "assumes": why.assumes,
        "changes": why.changes.iter().map(|change| json!({
            "ask": change.ask,
            "now": change.now,
            "latest": time(change.latest_unix_ms),
        })).collect::<Vec<_>>(),
        "placement": why.parts.iter().map(crate::json::part).collect::<Vec<_>>(),
        "now": time(why.now_unix_ms),
        "revision": why.revision,
    })
}
