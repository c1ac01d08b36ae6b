//! `ares verify`: is all well with a running cluster, or with the history of one.

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use evidence::{Counterexample, Counts, Judgement};
use proto::v1::audit_client::AuditClient;
use proto::{Client, v1};
use serde_json::json;
use tokio::task::JoinSet;

use super::cluster::leader_status;
use crate::Global;
use crate::connect::{answer_of, client, runtime};
use crate::exit::{FAILURE, Failure, LOOK_FOR_CLUSTER, Outcome, UNAVAILABLE};
use crate::output::{self, Format, Row};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Without --history the running cluster is judged: every replica keeps its state as it is at one entry of the log, checks all
invariants on it and computes its digest from every record anew; then the digests are compared. It passes when every member
answered, nothing is broken and all digests are the same.")]
pub struct Args {
    /// Judge a file of ares history export, or what ares watch / --prefix -o jsonl printed, instead of a running cluster
    #[arg(long, value_name = "FILE")]
    history: Option<PathBuf>,
}

/// A replica with a million jobs computes for some seconds.
const JUDGED_WITHIN: Duration = Duration::from_secs(120);

pub fn run(args: Args, global: Global) -> Outcome {
    match args.history {
        Some(file) => verify_history(&file, &global),
        None => verify_cluster(&global),
    }
}

/// What a member answered, and where.
type Answer = (v1::Member, Result<v1::VerifyStateReply, proto::Error>);

fn verify_cluster(global: &Global) -> Outcome {
    let client = client(global)?;
    let answers = runtime()?.block_on(ask_all(&client))?;
    output::rows(global.output, &HEADS, answers.iter().map(row).collect());
    let pass = verdict(&answers)?;
    if matches!(global.output, Format::Table) {
        println!("{pass}");
    }
    Ok(ExitCode::SUCCESS)
}

/// The line that says it is well; else what is not, the worst first.
fn verdict(answers: &[Answer]) -> Result<String, Failure> {
    let judged: Vec<_> = answers.iter().filter_map(|(_, answer)| answer.as_ref().ok()).collect();
    let wrong = |what: String| Err(Failure::new(FAILURE, what).advise(KEEP_EVIDENCE));
    if let Some(reply) = judged.iter().find(|reply| !reply.broken.is_empty()) {
        return wrong(format!("replica {} breaks {}: {}", reply.replica_id, reply.broken, reply.detail));
    }
    if let Some(reply) = judged.iter().find(|reply| reply.digest != reply.running_digest) {
        return wrong(format!("replica {}'s running digest is not that of its records", reply.replica_id));
    }
    if let Some(other) =
        judged.iter().find(|reply| (reply.index, &reply.digest) != (judged[0].index, &judged[0].digest))
    {
        return wrong(format!(
            "replicas {} and {} differ at entry {}",
            judged[0].replica_id, other.replica_id, other.index
        ));
    }
    if judged.is_empty() || judged.len() < answers.len() {
        let what = format!(
            "{} of {} replicas did not answer: nothing is said about them",
            answers.len() - judged.len(),
            answers.len()
        );
        return Err(Failure::new(UNAVAILABLE, what).advise(LOOK_FOR_CLUSTER));
    }
    let (replicas, index) = (judged.len(), judged[0].index);
    Ok(format!("PASS: all invariants hold on {replicas} replicas at entry {index}, and their digests are the same"))
}

const KEEP_EVIDENCE: &str =
    "keep the replicas' directories, and report it with ares history export: this must not happen";

/// Marks a point of the log, and asks every member for its judgement of the state there.
async fn ask_all(client: &Client) -> Result<Vec<Answer>, Failure> {
    let request_id = proto::request_id();
    client.mark_state(v1::MarkStateRequest { request_id: request_id.clone() }).await?;
    let members = leader_status(client).await?.members;
    let mut asked = JoinSet::new();
    for member in members {
        let transport = client.transport(&member.api_addr)?;
        let request = v1::VerifyStateRequest { request_id: request_id.clone() };
        asked.spawn(async move {
            let call = async { AuditClient::new(transport).verify_state(request).await };
            let answer = answer_of(&member.api_addr, JUDGED_WITHIN, call).await;
            (member, answer)
        });
    }
    let mut answers = asked.join_all().await;
    answers.sort_by_key(|(member, _)| member.replica_id);
    Ok(answers)
}

const HEADS: [&str; 8] = ["REPLICA", "ADDRESS", "ENTRY", "REVISION", "JOBS", "LEASES", "DIGEST", "NOTE"];

fn row((member, answer): &Answer) -> Row {
    let name = member.replica_id.to_string();
    match answer {
        Ok(reply) => {
            let note = if reply.broken.is_empty() { "" } else { &reply.broken };
            let cells = [
                &name,
                &member.api_addr,
                &reply.index.to_string(),
                &reply.revision.to_string(),
                &reply.jobs.to_string(),
                &reply.leases.to_string(),
                &reply.digest,
                note,
            ];
            let json = json!({
                "replica_id": name, "address": member.api_addr, "index": reply.index, "revision": reply.revision,
                "digest": reply.digest, "running_digest": reply.running_digest, "jobs": reply.jobs,
                "leases": reply.leases, "nodes": reply.nodes, "history_jobs": reply.history_jobs,
                "broken": (!reply.broken.is_empty()).then(|| json!({ "invariant": reply.broken, "detail": reply.detail })),
            });
            Row { cells: cells.map(str::to_owned).to_vec(), json, name }
        }
        Err(error) => Row {
            cells: [&name, &member.api_addr, "", "", "", "", "", &error.to_string()].map(str::to_owned).to_vec(),
            json: json!({ "replica_id": name, "address": member.api_addr, "error": error.to_string() }),
            name,
        },
    }
}

/// The judgement of a file by a model that shares no code with the cluster (crate `evidence`).
fn verify_history(file: &Path, global: &Global) -> Outcome {
    let path = file.display();
    let file = File::open(file).map_err(|error| Failure::new(FAILURE, format!("{path}: {error}")))?;
    let judged = evidence::judge(BufReader::new(file));
    match judged.map_err(|error| Failure::new(FAILURE, format!("{path}: {error}")))? {
        Judgement::Holds(counts) => {
            print_pass(&counts, global.output);
            Ok(ExitCode::SUCCESS)
        }
        Judgement::Broken(counterexample) => {
            print_fail(&counterexample, global.output);
            Ok(ExitCode::from(FAILURE))
        }
    }
}

fn print_pass(counts: &Counts, format: Format) {
    match format {
        Format::Json | Format::Jsonl => output::json(&json!({ "verdict": "PASS", "seen": counts })),
        Format::Name => println!("PASS"),
        Format::Table => {
            println!(
                "PASS: revisions {} to {}, {} events, {} jobs, {} grants, {} results, {} GPUs",
                counts.first_revision,
                counts.last_revision,
                counts.events,
                counts.jobs,
                counts.grants,
                counts.results,
                counts.gpus
            );
            if !counts.from_the_beginning {
                println!("The history does not begin with the cluster: what came before is not judged.");
            }
            if counts.handed_on > 0 {
                println!("{} GPUs went on while the rest of their gang was open: not judged.", counts.handed_on);
            }
        }
    }
}

fn print_fail(counterexample: &Counterexample, format: Format) {
    match format {
        Format::Json | Format::Jsonl => output::json(&json!({ "verdict": "FAIL", "counterexample": counterexample })),
        Format::Name => println!("FAIL"),
        Format::Table => println!("FAIL: {counterexample}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(replica_id: u64, digest: &str) -> Answer {
        let member = v1::Member { replica_id, ..Default::default() };
        let (digest, running_digest) = (digest.to_owned(), digest.to_owned());
        (member, Ok(v1::VerifyStateReply { replica_id, index: 9, digest, running_digest, ..Default::default() }))
    }

    fn change(answer: &mut Answer, change: impl FnOnce(&mut v1::VerifyStateReply)) {
        change(answer.1.as_mut().expect("it answered"));
    }

    #[test]
    fn only_equal_whole_answers_of_all_pass() {
        let good = || vec![answer(1, "aa"), answer(2, "aa"), answer(3, "aa")];
        assert!(verdict(&good()).expect("well").starts_with("PASS: all invariants hold on 3 replicas at entry 9"));
        let failed = |answers: &[Answer], code: u8, text: &str| {
            let failure = verdict(answers).expect_err(text);
            assert!(failure.code == code && failure.message.contains(text), "{}", failure.message);
        };
        let mut broken = good();
        change(&mut broken[1], |reply| reply.broken = "result_once".to_owned());
        failed(&broken, FAILURE, "replica 2 breaks result_once");
        let mut stale = good();
        change(&mut stale[2], |reply| reply.running_digest = "bb".to_owned());
        failed(&stale, FAILURE, "replica 3's running digest");
        failed(&[answer(1, "aa"), answer(2, "ab")], FAILURE, "replicas 1 and 2 differ");
        let mut silent = good();
        silent[0].1 = Err(proto::Error::Unreachable("no answer".to_owned()));
        failed(&silent, UNAVAILABLE, "1 of 3 replicas");
        // A difference among those that answered is the worse news.
        silent[1] = answer(2, "ff");
        failed(&silent, FAILURE, "differ");
    }
}
