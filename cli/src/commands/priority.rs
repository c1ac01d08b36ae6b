//! `ares priority`: names for how urgent work is, and who may use them.

use std::process::ExitCode;

use proto::v1;
use serde_json::json;

use super::show::read_mode;
use crate::Global;
use crate::connect::{client, runtime};
use crate::exit::Outcome;
use crate::output::{self, Format, Row};

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Name a priority
    Create(Set),
    /// Say anew what a name means, as a whole
    Set(Set),
    /// The named priorities, highest first
    List,
    /// Forget a name; jobs keep their priority
    Remove {
        /// The name
        priority: String,
    },
}

#[derive(Debug, clap::Args)]
struct Set {
    /// The name: 1 to 64 of a-z 0-9 . _ -
    priority: String,
    /// Higher goes first; jobs without a priority have 0
    #[arg(long, allow_negative_numbers = true, value_name = "N")]
    value: i32,
    /// Only these tenants, and those below them, may use it [default: everybody]
    #[arg(long, value_delimiter = ',', value_name = "TENANT")]
    tenants: Vec<String>,
    /// Its jobs may take the place of preemptible ones of a lower priority
    #[arg(long)]
    preempts: bool,
    /// Its jobs may lose their place to a higher priority that preempts
    #[arg(long)]
    preemptible: bool,
}

pub fn run(args: Args, global: Global) -> Outcome {
    match args.verb {
        Verb::Create(set) => change(set, true, &global),
        Verb::Set(set) => change(set, false, &global),
        Verb::List => list(&global),
        Verb::Remove { priority } => {
            let request = v1::RemovePriorityRequest { request_id: proto::request_id(), name: priority.clone() };
            runtime()?.block_on(client(&global)?.remove_priority(request))?;
            done(&global, &priority, "is forgotten")
        }
    }
}

fn change(set: Set, create: bool, global: &Global) -> Outcome {
    let name = set.priority.clone();
    let priority = v1::Priority {
        name: set.priority,
        value: set.value,
        tenants: set.tenants,
        preempts: set.preempts,
        preemptible: set.preemptible,
    };
    let request = v1::SetPriorityRequest { request_id: proto::request_id(), create, priority: Some(priority) };
    runtime()?.block_on(client(global)?.set_priority(request))?;
    done(global, &name, if create { "exists" } else { "is changed" })
}

fn done(global: &Global, name: &str, what: &str) -> Outcome {
    eprintln!("Priority {name} {what}.");
    match global.output {
        Format::Json | Format::Jsonl => output::json(&json!({ "priority": name })),
        Format::Name => println!("{name}"),
        Format::Table => {}
    }
    Ok(ExitCode::SUCCESS)
}

fn list(global: &Global) -> Outcome {
    let request = v1::ListPrioritiesRequest { read: read_mode(false) };
    let reply = runtime()?.block_on(client(global)?.list_priorities(request))?;
    let yes = |set: bool| if set { "yes" } else { "no" }.to_owned();
    let rows = reply.priorities.iter().map(|priority| Row {
        name: priority.name.clone(),
        cells: vec![
            priority.name.clone(),
            priority.value.to_string(),
            yes(priority.preempts),
            yes(priority.preemptible),
            if priority.tenants.is_empty() { "everybody".to_owned() } else { priority.tenants.join(",") },
        ],
        json: json!({
            "name": priority.name,
            "value": priority.value,
            "tenants": priority.tenants,
            "preempts": priority.preempts,
            "preemptible": priority.preemptible,
        }),
    });
    output::rows(global.output, &["PRIORITY", "VALUE", "PREEMPTS", "PREEMPTIBLE", "WHO MAY"], rows.collect());
    Ok(ExitCode::SUCCESS)
}
