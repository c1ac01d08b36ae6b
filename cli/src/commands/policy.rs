//! `ares policy`: in which order what waits is looked at, and what is protected.

use std::process::ExitCode;

use proto::v1;
use serde_json::json;

use super::show::read_mode;
use super::spec::duration_ms;
use crate::Global;
use crate::connect::{client, runtime};
use crate::exit::{Failure, Outcome};
use crate::output::{self, Format, age};

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// The policy that is in force
    Show,
    /// Change what is named; it holds from the planner's next cycle on
    Set(Set),
}

#[derive(Debug, clap::Args)]
struct Set {
    /// fair: tenants by guarantee and share, inside one by priority and submission; fifo: priority and submission alone
    #[arg(long, value_name = "fair|fifo")]
    order: Option<String>,
    /// Of the first jobs that find no room, so many of each pool of GPUs get a start that no job behind them delays
    #[arg(long, value_name = "N")]
    reservations: Option<u32>,
    /// A job that was submitted so long ago goes before younger ones of its tenant (fifo: of all), such as 7d, or never
    #[arg(long, value_name = "TIME")]
    aged_after: Option<String>,
}

pub fn run(args: Args, global: Global) -> Outcome {
    match args.verb {
        Verb::Show => show(&global),
        Verb::Set(set) => {
            runtime()?.block_on(client(&global)?.set_policy(request(set)?))?;
            eprintln!("The policy is changed.");
            show(&global)
        }
    }
}

fn request(set: Set) -> Result<v1::SetPolicyRequest, Failure> {
    if set.order.is_none() && set.reservations.is_none() && set.aged_after.is_none() {
        return Err(Failure::usage("nothing to change").advise("name --order, --reservations or --aged-after"));
    }
    let aged_after_ms = match set.aged_after.as_deref() {
        None => None,
        Some("never") => Some(0),
        Some(text) => Some(duration_ms("--aged-after", text)?),
    };
    let request_id = proto::request_id();
    Ok(v1::SetPolicyRequest { request_id, order: set.order, reservations: set.reservations, aged_after_ms })
}

fn show(global: &Global) -> Outcome {
    let request = v1::GetPolicyRequest { read: read_mode(false) };
    let policy = runtime()?.block_on(client(global)?.get_policy(request))?;
    match global.output {
        Format::Json | Format::Jsonl => output::json(&json!({
            "order": policy.order,
            "reservations": policy.reservations,
            "aged_after_ms": policy.aged_after_ms,
        })),
        Format::Name => println!("{}", policy.order),
        Format::Table => {
            let aged = match policy.aged_after_ms {
                0 => "never".to_owned(),
                ms => age(i64::try_from(ms).unwrap_or(i64::MAX)),
            };
            println!("Order         {}", policy.order);
            println!("Reservations  {} of each pool of GPUs", policy.reservations);
            println!("Aged after    {aged}");
        }
    }
    Ok(ExitCode::SUCCESS)
}
