//! `ares get`: the etcd-equivalent keyspace.

use std::process::ExitCode;

use proto::v1;

use super::show::read_mode;
use crate::Global;
use crate::connect::{client, runtime};
use crate::exit::{Failure, NOT_FOUND, Outcome};
use crate::output::{self, Format};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
KEYS:
  /jobs/ID /state/ID /queue/pending/TENANT/PRIORITY/SEQ/ID /leases/TOKEN /fencing/job/ID /fencing/gpu/UUID
  /topology/NODE /locks/NAME /results/ID /retry/ID")]
pub struct Args {
    /// A key, such as /state/1
    key: String,
    /// All keys that begin with KEY
    #[arg(long)]
    prefix: bool,
    /// Without the values
    #[arg(long)]
    keys_only: bool,
    /// At most so many keys
    #[arg(long, default_value_t = 1_000_000, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    limit: u32,
    /// From the asked replica's memory, without a read index
    #[arg(long)]
    stale: bool,
}

/// Keys asked for at once.
const PAGE: u32 = 1_000;

pub fn run(args: Args, global: Global) -> Outcome {
    let client = client(&global)?;
    let kvs = runtime()?.block_on(async {
        let mut kvs: Vec<v1::KeyValue> = Vec::new();
        loop {
            let left = args.limit.saturating_sub(kvs.len() as u32);
            let request = v1::GetRequest {
                key: args.key.clone(),
                prefix: args.prefix,
                keys_only: args.keys_only,
                read: read_mode(args.stale),
                limit: left.min(PAGE),
                after: kvs.last().map(|kv| kv.key.clone()).unwrap_or_default(),
            };
            let reply = client.get(request).await?;
            kvs.extend(reply.kvs);
            if !reply.more || kvs.len() as u32 >= args.limit {
                return Ok::<_, proto::Error>(kvs);
            }
        }
    })?;
    if kvs.is_empty() && !args.prefix {
        return Err(Failure::new(NOT_FOUND, format!("there is no key {:?}", args.key))
            .advise("ares get / --prefix --keys-only lists them all"));
    }
    match global.output {
        Format::Json => output::json(&serde_json::Value::Array(
            kvs.iter().map(|kv| crate::json::key_value(kv, args.keys_only)).collect(),
        )),
        Format::Jsonl => kvs.iter().for_each(|kv| println!("{}", crate::json::key_value(kv, args.keys_only))),
        Format::Name => kvs.iter().for_each(|kv| println!("{}", kv.key)),
        Format::Table if args.keys_only => kvs.iter().for_each(|kv| println!("{}", kv.key)),
        Format::Table => kvs.iter().for_each(|kv| println!("{}\n{}", kv.key, kv.value)),
    }
    Ok(ExitCode::SUCCESS)
}
