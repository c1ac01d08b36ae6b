//! `ares submit`: prints the id on stdout, everything else on stderr; with `--dry-run` what would become of the job.

use std::io::IsTerminal;
use std::process::ExitCode;

use proto::v1;
use serde_json::json;

use super::show::read_mode;
use super::spec::{JobArgs, refused};
use super::why;
use crate::Global;
use crate::connect::{client, runtime, user};
use crate::exit::{Failure, Outcome};
use crate::output::{self, Format};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
EXAMPLES:
  ares submit --gpus 2 -- python3 train.py
  ares submit --nodes 2 --gpus-per-node 2 --ranks-per-node 2 -- python3 train.py
  ares submit --gpus 8 --dry-run -- python3 train.py            (when would it start?)
  ares submit --request-id nightly-2026-11-25 -- ./nightly.sh   (again: the same job)")]
pub struct Args {
    /// Name this submission: the same id again answers with the same job. A UUID, or any text of 1 to 200 bytes
    #[arg(long, value_name = "ID")]
    request_id: Option<String>,
    /// Submit nothing: say when and where it would start, or why it would wait
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    job: JobArgs,
}

/// Retries of a submitted job that names none; `run` and `dev --` have none.
const RETRIES: u32 = 3;

pub fn run(args: Args, global: Global) -> Outcome {
    let request_id = request_id(args.request_id.as_deref())?;
    let spec = args.job.cluster_spec(RETRIES)?;
    let client = client(&global)?;
    let request = v1::SubmitJobRequest { request_id: request_id.clone().into(), job: Some(spec), user: user() };
    let runtime = runtime()?;
    if args.dry_run {
        let why = runtime.block_on(client.preview_job(request)).map_err(refused)?;
        return Ok(preview(&why, global.output));
    }
    let reply = runtime.block_on(client.submit_job(request)).map_err(|error| {
        let failure = refused(error);
        if failure.code == crate::exit::TIMED_OUT {
            failure.advise(format!("repeat it with --request-id {}: it takes effect once", uuid_text(&request_id)))
        } else {
            failure
        }
    })?;
    // For a person who looks, and for a program that asks for all; the id alone costs no second call.
    let wanted = match global.output {
        Format::Json | Format::Jsonl => true,
        Format::Table => std::io::stderr().is_terminal(),
        Format::Name => false,
    };
    let request = v1::WhyJobRequest { job_id: reply.job_id, read: read_mode(false) };
    // The job is submitted, whether or not this is answered.
    let why = if wanted { runtime.block_on(client.why_job(request)).ok() } else { None };
    match global.output {
        Format::Json | Format::Jsonl => output::json(&json!({
            "id": reply.job_id,
            "replayed": reply.replayed,
            "revision": reply.revision,
            "request_id": uuid_text(&request_id),
            "why": why.as_ref().map(why::json),
        })),
        _ => {
            if reply.replayed {
                eprintln!("This request id was submitted before: the same job.");
            }
            println!("{}", reply.job_id);
            why.iter().filter(|why| !why.code.is_empty()).flat_map(why::lines).for_each(|line| eprintln!("{line}"));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn preview(why: &v1::Why, format: Format) -> ExitCode {
    match format {
        Format::Json | Format::Jsonl => output::json(&why::json(why)),
        Format::Name => println!("{}", why.code),
        Format::Table => why::lines(why).iter().for_each(|line| println!("{line}")),
    }
    ExitCode::SUCCESS
}

/// A UUID is taken as it is; other text becomes the UUID (version 8) that its digest names.
fn request_id(given: Option<&str>) -> Result<Vec<u8>, Failure> {
    let Some(text) = given else { return Ok(proto::request_id().to_vec()) };
    if text.is_empty() || text.len() > 200 {
        return Err(Failure::usage(format!("--request-id has {} bytes; 1 to 200", text.len())));
    }
    let id = match uuid::Uuid::parse_str(text) {
        Ok(id) => id,
        Err(_) => uuid::Uuid::new_v8(named(text)),
    };
    Ok(id.as_bytes().to_vec())
}

/// 16 bytes of the text's SHA-256: two different texts never collide in practice.
fn named(text: &str) -> [u8; 16] {
    use sha2::{Digest, Sha256};
    let digest = Sha256::digest(text.as_bytes());
    let mut id = [0; 16];
    id.copy_from_slice(&digest[..16]);
    id
}

fn uuid_text(id: &[u8]) -> String {
    uuid::Uuid::from_slice(id).map(|id| id.to_string()).unwrap_or_default()
}
