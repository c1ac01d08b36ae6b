//! `ares nodes` and `ares node`: the machines.

use std::process::ExitCode;

use proto::v1;

use super::show::read_mode;
use crate::Global;
use crate::connect::{client, runtime};
use crate::exit::Outcome;
use crate::output::{self, Format, Row};

#[derive(Debug, clap::Args)]
pub struct ListArgs {
    /// From the asked replica's memory, without a read index
    #[arg(long)]
    stale: bool,
}

pub fn list(args: ListArgs, global: Global) -> Outcome {
    let client = client(&global)?;
    let reply = runtime()?.block_on(client.list_nodes(v1::ListNodesRequest { read: read_mode(args.stale) }))?;
    let heads = ["NODE", "STATE", "GPUS FREE", "TYPE", "CORES FREE", "MEM FREE", "KILL", "REASON"];
    output::rows(global.output, &heads, reply.nodes.iter().map(row).collect());
    Ok(ExitCode::SUCCESS)
}

fn row(node: &v1::Node) -> Row {
    let free = node.gpus.iter().filter(|gpu| gpu.token == 0 && gpu.health == "OK").count();
    let mut types: Vec<&str> = Vec::new();
    for gpu in &node.gpus {
        if !types.contains(&gpu.r#type.as_str()) {
            types.push(&gpu.r#type);
        }
    }
    let kind = match (types.is_empty(), node.simulated) {
        (true, _) => "-".to_owned(),
        (false, true) => format!("{} (simulated)", types.join(",")),
        (false, false) => types.join(","),
    };
    let sick = node
        .gpus
        .iter()
        .filter(|gpu| gpu.health != "OK")
        .map(|gpu| format!("GPU {} {}: {}", gpu.slot, gpu.health, gpu.reason));
    let reason = std::iter::once(node.reason.clone()).filter(|reason| !reason.is_empty());
    let reason = reason.chain(sick).chain(node.windows.iter().map(window)).collect::<Vec<_>>();
    Row {
        name: node.name.clone(),
        cells: vec![
            node.name.clone(),
            node.state.clone(),
            format!("{free}/{}", node.gpus.len()),
            kind,
            format!("{}/{}", node.cores_free, node.cores),
            format!("{}/{} MiB", node.mem_free_mib, node.mem_mib),
            node.kill.clone(),
            reason.join("; "),
        ],
        json: crate::json::node(node),
    }
}

/// "maintenance spring until TIME", "reservation demo from TIME to TIME".
fn window(window: &v1::NodeWindow) -> String {
    let what = if window.maintenance { "maintenance" } else { "reservation" };
    let (name, start, end) =
        (&window.reservation, output::time(window.start_unix_ms), output::time(window.end_unix_ms));
    if window.begun { format!("{what} {name} until {end}") } else { format!("{what} {name} from {start} to {end}") }
}

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Give it nothing new; running work goes on, unless a time is named
    #[command(visible_alias = "out")]
    Drain {
        /// Its name: ares nodes lists them
        node: String,
        /// Send what still runs there back to the queue after this time, such as 30m; 0 = at once
        #[arg(long, value_name = "TIME")]
        evict_after: Option<String>,
        /// Shown to everybody who asks why
        #[arg(long, default_value = "taken out by an operator", value_parser = clap::builder::NonEmptyStringValueParser::new())]
        reason: String,
    },
    /// Back into scheduling
    #[command(visible_alias = "ready")]
    Resume {
        /// Its name
        node: String,
    },
    /// Your word that no process of a silent machine is alive: frees its stuck GPUs
    ConfirmDead {
        /// Its name
        node: String,
        /// Only this lease
        #[arg(long)]
        token: Option<u64>,
    },
}

pub fn run(args: Args, global: Global) -> Outcome {
    let client = client(&global)?;
    let request_id = proto::request_id();
    let evict_in_ms = match &args.verb {
        Verb::Drain { evict_after: Some(text), .. } if text == "0" => Some(0),
        Verb::Drain { evict_after: Some(text), .. } => Some(super::spec::duration_ms("--evict-after", text)?),
        _ => None,
    };
    let (node, done) = runtime()?.block_on(async {
        Ok::<_, proto::Error>(match args.verb {
            Verb::Drain { node, reason, .. } => {
                let admin = v1::SetNodeAdminRequest { request_id, node: node.clone(), out_reason: reason, evict_in_ms };
                client.set_node_admin(admin).await?;
                let then = match evict_in_ms {
                    None => "gets nothing new; running work goes on",
                    Some(0) => "gets nothing new; running work goes back to the queue",
                    Some(_) => "gets nothing new; running work goes back to the queue when its time is over",
                };
                (node, then)
            }
            Verb::Resume { node } => {
                let admin = v1::SetNodeAdminRequest { request_id, node: node.clone(), ..Default::default() };
                client.set_node_admin(admin).await?;
                (node, "takes work again")
            }
            Verb::ConfirmDead { node, token } => {
                let token = token.unwrap_or_default();
                client.confirm_dead(v1::ConfirmDeadRequest { request_id, node: node.clone(), token }).await?;
                (node, "has no living process by your word; its GPUs are free")
            }
        })
    })?;
    eprintln!("Node {node} {done}.");
    match global.output {
        Format::Json | Format::Jsonl => output::json(&serde_json::json!({ "node": node })),
        Format::Name => println!("{node}"),
        Format::Table => {}
    }
    Ok(ExitCode::SUCCESS)
}
