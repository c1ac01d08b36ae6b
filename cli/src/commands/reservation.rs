//! `ares reservation`: machines set aside for a window of time, for a maintenance or for some people's jobs.

use std::process::ExitCode;

use proto::v1;
use serde_json::{Value, json};

use super::show::{counted, read_mode};
use super::spec::{duration_ms, pairs};
use super::when;
use crate::Global;
use crate::connect::{client, runtime};
use crate::exit::{self, Failure, Outcome};
use crate::output::{self, Format, Row, time};

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Set machines aside: nothing that may run into the window starts there but jobs of `submit --reservation`
    #[command(after_help = "\
EXAMPLES:
  ares reservation create spring --maintenance --nodes n01,n02 --start 2026-12-01T08:00 --duration 4h
  ares reservation create demo --count 2 --gpu-type h100 --tenants vision --start now+1h --duration 30m
  ares submit --reservation demo --nodes 2 --gpus-per-node 8 -- python3 train.py")]
    Create(Box<Create>),
    /// Windows that have not ended, by their starts
    List,
    /// One of them
    Show {
        /// The name
        reservation: String,
    },
    /// End it now: its machines are everybody's, and what runs there runs on
    Delete {
        /// The name
        reservation: String,
    },
}

#[derive(Debug, clap::Args)]
struct Create {
    /// The name: 1 to 64 of a-z 0-9 . _ -
    reservation: String,
    /// For nobody: no job starts there
    #[arg(long, conflicts_with_all = ["tenants", "users"])]
    maintenance: bool,
    /// Jobs of these tenants, and those below them, may use it [default: everybody's]
    #[arg(long, value_delimiter = ',', value_name = "TENANT")]
    tenants: Vec<String>,
    /// Jobs of these users may use it, whichever their tenant
    #[arg(long, value_delimiter = ',', value_name = "USER")]
    users: Vec<String>,
    /// These machines
    #[arg(long, value_delimiter = ',', value_name = "NODE", conflicts_with_all = ["all", "count", "gpu_type", "label"])]
    nodes: Vec<String>,
    /// All machines that there are now
    #[arg(long, conflicts_with_all = ["count", "gpu_type", "label"])]
    all: bool,
    /// So many machines, those first on which nothing runs into the window [default: all that match]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    count: Option<u32>,
    /// Machines with GPUs of this type
    #[arg(long, default_value = "", hide_default_value = true, value_name = "TYPE")]
    gpu_type: String,
    /// Machines with these labels, NAME=VALUE
    #[arg(long, short = 'l', value_name = "NAME=VALUE")]
    label: Vec<String>,
    /// When it begins, such as now+1h, 08:30 or 2026-11-25T08:30
    #[arg(long, default_value = "now", value_name = "TIME")]
    start: String,
    /// How long it lasts, such as 90m or 2d
    #[arg(long, value_name = "TIME")]
    duration: String,
    /// What still runs there when it begins goes back to the queue [default: it runs on]
    #[arg(long)]
    requeue: bool,
    /// Shown to everybody who asks
    #[arg(long, default_value = "", hide_default_value = true)]
    reason: String,
}

pub fn run(args: Args, global: Global) -> Outcome {
    match args.verb {
        Verb::Create(asked) => create(*asked, &global),
        Verb::List => list(&global),
        Verb::Show { reservation } => show(&reservation, &global),
        Verb::Delete { reservation } => {
            let request = v1::DeleteReservationRequest { request_id: proto::request_id(), name: reservation.clone() };
            runtime()?.block_on(client(&global)?.delete_reservation(request))?;
            eprintln!("Reservation {reservation} is deleted; its machines are everybody's.");
            match global.output {
                Format::Json | Format::Jsonl => output::json(&json!({ "name": reservation })),
                Format::Name => println!("{reservation}"),
                Format::Table => {}
            }
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn create(asked: Create, global: &Global) -> Outcome {
    let chosen = asked.count.is_some() || !asked.gpu_type.is_empty() || !asked.label.is_empty();
    if asked.nodes.is_empty() && !asked.all && !chosen {
        return Err(
            Failure::usage("no machines are named").advise("write --nodes, --count, --gpu-type, --label or --all")
        );
    }
    // "now" is the cluster's.
    let start_unix_ms = if asked.start == "now" { 0 } else { when::unix_ms("--start", &asked.start)? };
    let request = v1::CreateReservationRequest {
        request_id: proto::request_id(),
        name: asked.reservation,
        maintenance: asked.maintenance,
        tenants: asked.tenants,
        users: asked.users,
        nodes: asked.nodes,
        gpu_type: asked.gpu_type,
        labels: pairs("--label", &asked.label, |name| {
            Err(Failure::usage(format!("--label {name:?} has no value; write NAME=VALUE")))
        })?,
        count: asked.count.unwrap_or(0),
        start_unix_ms,
        duration_ms: duration_ms("--duration", &asked.duration)?,
        requeue: asked.requeue,
        reason: asked.reason,
    };
    let name = request.name.clone();
    let reply = runtime()?.block_on(client(global)?.create_reservation(request))?;
    let made = reply.reservation.unwrap_or_default();
    eprintln!(
        "Reservation {name} sets aside {} from {} to {}.",
        nodes_of(&made),
        time(made.start_unix_ms),
        time(made.end_unix_ms)
    );
    if made.strangers > 0 {
        let then = if made.requeue { "what is left when it begins goes back to the queue" } else { "they run on" };
        eprintln!("{} of others there now; {then}.", counted(made.strangers, "attempt"));
    }
    match global.output {
        Format::Json | Format::Jsonl => output::json(&shown(&made)),
        Format::Name => println!("{name}"),
        Format::Table => {}
    }
    Ok(ExitCode::SUCCESS)
}

fn all(global: &Global) -> Result<Vec<v1::Reservation>, Failure> {
    let request = v1::ListReservationsRequest { read: read_mode(false) };
    Ok(runtime()?.block_on(client(global)?.list_reservations(request))?.reservations)
}

fn list(global: &Global) -> Outcome {
    let windows = all(global)?;
    let rows = windows.iter().map(|window| Row {
        name: window.name.clone(),
        cells: vec![
            window.name.clone(),
            state_of(window).to_owned(),
            time(window.start_unix_ms),
            time(window.end_unix_ms),
            who_may(window),
            nodes_of(window),
            window.strangers.to_string(),
            window.reason.clone(),
        ],
        json: shown(window),
    });
    let heads = ["RESERVATION", "STATE", "START", "END", "WHO MAY", "NODES", "STRANGERS", "REASON"];
    output::rows(global.output, &heads, rows.collect());
    Ok(ExitCode::SUCCESS)
}

fn show(name: &str, global: &Global) -> Outcome {
    let found = all(global)?.into_iter().find(|window| window.name == name);
    let window = found.ok_or_else(|| {
        Failure::new(exit::NOT_FOUND, format!("there is no reservation {name:?}"))
            .advise("ares reservation list has those that have not ended")
    })?;
    match global.output {
        Format::Json | Format::Jsonl => output::json(&shown(&window)),
        Format::Name => println!("{name}"),
        Format::Table => {
            let lines = [
                ("Reservation", window.name.clone()),
                ("State", state_of(&window).to_owned()),
                ("Start", time(window.start_unix_ms)),
                ("End", time(window.end_unix_ms)),
                ("Who may", who_may(&window)),
                ("Nodes", window.nodes.join(",")),
                (
                    "At start",
                    if window.requeue { "what runs goes back to the queue" } else { "what runs runs on" }.to_owned(),
                ),
                ("Strangers", window.strangers.to_string()),
                ("Reason", window.reason.clone()),
            ];
            lines.iter().filter(|(_, text)| !text.is_empty()).for_each(|(what, text)| println!("{what:<12} {text}"));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn state_of(window: &v1::Reservation) -> &'static str {
    if window.begun { "ACTIVE" } else { "AHEAD" }
}

fn who_may(window: &v1::Reservation) -> String {
    if window.maintenance {
        return "nobody (maintenance)".to_owned();
    }
    let users = window.users.iter().map(|user| format!("user {user}"));
    let who: Vec<String> = window.tenants.iter().cloned().chain(users).collect();
    if who.is_empty() { "everybody".to_owned() } else { who.join(",") }
}

/// The names of a few machines, or how many.
fn nodes_of(window: &v1::Reservation) -> String {
    if window.nodes.len() > 4 { format!("{} machines", window.nodes.len()) } else { window.nodes.join(",") }
}

fn shown(window: &v1::Reservation) -> Value {
    json!({
        "name": window.name,
        "state": state_of(window),
        "maintenance": window.maintenance,
        "tenants": window.tenants,
        "users": window.users,
        "nodes": window.nodes,
        "start": time(window.start_unix_ms),
        "end": time(window.end_unix_ms),
        "requeue": window.requeue,
        "strangers": window.strangers,
        "reason": if window.reason.is_empty() { Value::Null } else { json!(window.reason) },
    })
}
