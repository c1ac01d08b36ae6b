//! `ares policy`: in which order what waits is looked at, and what is protected from whom.

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
    /// An attempt makes room for no other job before it has run so long, such as 10m, or 0
    #[arg(long, value_name = "TIME")]
    min_run: Option<String>,
    /// How often a job may have to make room for another one; 0 = nobody makes room
    #[arg(long, value_name = "N")]
    preemptions: Option<u32>,
    /// How long what was taken for a job is kept for it, beyond the grace of those who ended
    #[arg(long, value_name = "TIME")]
    claim: Option<String>,
    /// GPU time after which a preemptible job without a time limit has had its turn, such as 200m (of one GPU), or 0: no turns
    #[arg(long, value_name = "TIME")]
    turn_gpu_time: Option<String>,
    /// An attempt gives its place to another one's turn no sooner than after so long, and so long again for each time before
    #[arg(long, value_name = "TIME")]
    turn_run: Option<String>,
    /// Who takes turns and has waited so long, all of it together, goes first and gives its place to none: such as 64h, or never
    #[arg(long, value_name = "TIME")]
    turn_wait: Option<String>,
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
    let named = [set.order.is_some(), set.reservations.is_some(), set.preemptions.is_some()];
    let times = [&set.aged_after, &set.min_run, &set.claim, &set.turn_gpu_time, &set.turn_run, &set.turn_wait];
    if !named.contains(&true) && times.iter().all(|time| time.is_none()) {
        return Err(Failure::usage("nothing to change").advise(
            "name --order, --reservations, --aged-after, --min-run, --preemptions, --claim, --turn-gpu-time, --turn-run or --turn-wait",
        ));
    }
    let or_none = |name, text: Option<&str>, none: &str| match text {
        None => Ok(None),
        Some(text) if text == none => Ok(Some(0)),
        Some(text) => duration_ms(name, text).map(Some),
    };
    let timed = |name, text: Option<&str>| text.map(|text| duration_ms(name, text)).transpose();
    let request_id = proto::request_id();
    Ok(v1::SetPolicyRequest {
        request_id,
        order: set.order,
        reservations: set.reservations,
        aged_after_ms: or_none("--aged-after", set.aged_after.as_deref(), "never")?,
        min_run_ms: or_none("--min-run", set.min_run.as_deref(), "0")?,
        preemptions: set.preemptions,
        claim_ms: timed("--claim", set.claim.as_deref())?,
        turn_gpu_ms: or_none("--turn-gpu-time", set.turn_gpu_time.as_deref(), "0")?,
        turn_run_ms: timed("--turn-run", set.turn_run.as_deref())?,
        turn_wait_ms: or_none("--turn-wait", set.turn_wait.as_deref(), "never")?,
    })
}

fn show(global: &Global) -> Outcome {
    let request = v1::GetPolicyRequest { read: read_mode(false) };
    let policy = runtime()?.block_on(client(global)?.get_policy(request))?;
    match global.output {
        Format::Json | Format::Jsonl => output::json(&json!({
            "order": policy.order,
            "reservations": policy.reservations,
            "aged_after_ms": policy.aged_after_ms,
            "min_run_ms": policy.min_run_ms,
            "preemptions": policy.preemptions,
            "claim_ms": policy.claim_ms,
            "turn_gpu_ms": policy.turn_gpu_ms,
            "turn_run_ms": policy.turn_run_ms,
            "turn_wait_ms": policy.turn_wait_ms,
        })),
        Format::Name => println!("{}", policy.order),
        Format::Table => {
            let time = |ms: u64| age(i64::try_from(ms).unwrap_or(i64::MAX));
            let or_never = |ms: u64| if ms == 0 { "never".to_owned() } else { time(ms) };
            println!("Order         {}", policy.order);
            println!("Reservations  {} of each pool of GPUs", policy.reservations);
            println!("Aged after    {}", or_never(policy.aged_after_ms));
            println!(
                "Makes room    {} times a job, after {} of an attempt",
                policy.preemptions,
                time(policy.min_run_ms)
            );
            println!("Room is kept  {} beyond the grace", time(policy.claim_ms));
            match policy.turn_gpu_ms {
                0 => println!("Turns         none"),
                ms => println!(
                    "Turns         {} of GPU time, {} of an attempt; first after {} of waiting",
                    time(ms),
                    time(policy.turn_run_ms),
                    or_never(policy.turn_wait_ms)
                ),
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}
