//! Running jobs under the death of what supervises them.

use std::path::{Path, PathBuf};
use std::time::Duration;

use jepsen_style_tests::cluster::{Cluster, SOON, block_on};
use proto::v1;
use rustix::process::Signal;

/// Appends a line at the start of an attempt, then beats each 100 ms.
fn recording(file: &Path, seconds: u32) -> String {
    format!(
        "f='{0}'; echo \"start $ARES_ATTEMPT $ARES_FENCING_TOKEN\" >> \"$f\"; \
         for i in $(seq {1}); do sleep 0.1; echo \"beat $ARES_ATTEMPT\" >> \"$f\"; done; \
         echo \"end $ARES_ATTEMPT\" >> \"$f\"",
        file.display(),
        seconds * 10
    )
}

fn lines(file: &Path, first: &str) -> Vec<String> {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    text.lines().filter(|line| line.starts_with(first)).map(str::to_owned).collect()
}

fn example(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples").join(name).canonicalize().expect("the example is there")
}

#[test]
fn the_leader_is_killed_during_the_digits_gang_which_ends_once_in_attempt_1() {
    block_on(async {
        let mut cluster = Cluster::start(3).await;
        for (name, gpus) in [("n1", "sim:hgx-h100"), ("n2", "sim:hgx-h100"), ("n3", "sim:rtx4090x8")] {
            cluster.agent(name, gpus).await;
        }
        let digits = example("digits");
        let result = cluster.path().join("result.json");
        let script = format!("exec python3 '{}/train.py' --epochs 30 --min-seconds 8", digits.display());
        let id = cluster
            .submit(&script, |job| {
                job.shape = Some(v1::Shape { nodes: 2, ranks_per_node: 2, gpus_per_rank: 1, ..Default::default() });
                let env = &mut job.body.as_mut().expect("it has one").env;
                env.insert("ARES_RESULT_FILE".into(), result.display().to_string());
            })
            .await;
        let running = cluster.job_running(id).await;
        assert_eq!(running.parts.len(), 2);
        assert!(running.parts.iter().all(|part| part.gpu_slots.len() == 2), "{:?}", running.parts);
        assert_eq!(running.placement_why.len(), 2, "each part says why");

        let (leader, term) = cluster.wait_for_leader().await;
        cluster.kill_replica(leader);
        cluster.find_leader(term, SOON).await.expect("another leads");
        let job = cluster.job_ended(id, Duration::from_secs(90)).await;
        let committed = job.result.expect("it has ended");
        assert_eq!((committed.outcome.as_str(), committed.attempt), ("SUCCEEDED", 1));
        assert_eq!(committed.token, running.token);
        let report: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(&result).expect("rank 0 wrote it")).expect("JSON");
        assert!(report["accuracy"].as_f64().is_some_and(|accuracy| accuracy >= 0.95), "{report}");
        assert_eq!(report["token"].as_u64(), Some(committed.token));
    });
}

#[test]
fn a_killed_agent_comes_back_and_takes_its_job_up_again() {
    block_on(async {
        let mut cluster = Cluster::start(1).await;
        cluster.agent("n1", "").await;
        let file = cluster.path().join("record");
        let id = cluster.submit(&recording(&file, 5), |_| {}).await;
        let before = cluster.job_running(id).await;
        cluster.kill_agent("n1");
        tokio::time::sleep(Duration::from_secs(1)).await;
        cluster.start_agent("n1", "");
        let job = cluster.job_ended(id, Duration::from_secs(60)).await;
        let result = job.result.expect("it has ended");
        assert_eq!((result.outcome.as_str(), result.attempt, result.token), ("SUCCEEDED", 1, before.token));
        assert_eq!(lines(&file, "start").len(), 1, "nothing ran twice");
        assert_eq!(lines(&file, "end").len(), 1);
    });
}

#[test]
fn agent_and_shims_are_killed_and_the_next_attempt_has_a_higher_token() {
    block_on(async {
        let mut cluster = Cluster::start(1).await;
        cluster.agent("n1", "").await;
        let file = cluster.path().join("record");
        let id = cluster.submit(&recording(&file, 3), |_| {}).await;
        let before = cluster.job_running(id).await;
        assert_eq!(cluster.kill_agent_and_shims("n1"), 1, "the shim outlived its agent");
        tokio::time::sleep(Duration::from_millis(300)).await;
        let beats = lines(&file, "beat").len();
        tokio::time::sleep(Duration::from_millis(500)).await;
        assert_eq!(lines(&file, "beat").len(), beats, "the job died with its shim");

        cluster.start_agent("n1", "");
        let job = cluster.job_ended(id, Duration::from_secs(60)).await;
        let result = job.result.expect("it has ended");
        assert_eq!(result.outcome, "SUCCEEDED");
        assert!(result.attempt == 2 && result.token > before.token, "{result:?}");
        assert_eq!(job.retries_used, 0, "a lost attempt burns no retry");
        assert_eq!(job.attempts[0].verdict, "LOST", "{:?}", job.attempts);
    });
}

#[test]
fn an_agent_stopped_past_its_lease_loses_its_job_and_its_late_report_is_refused() {
    block_on(async {
        let mut cluster = Cluster::start(1).await;
        cluster.agent("n1", "").await;
        let file = cluster.path().join("record");
        // Longer than lease, drift, margin: attempt 1 can't end by itself.
        let id = cluster.submit(&recording(&file, 40), |_| {}).await;
        let before = cluster.job_running(id).await;
        cluster.signal_agent("n1", Signal::STOP);
        cluster.agent("n2", "").await;
        let second = cluster
            .job_until(id, "running again", Duration::from_secs(60), |job| job.attempt == 2 && job.state == "RUNNING")
            .await;
        assert!(second.token > before.token);
        // The shim killed attempt 1 although its agent was stopped: it does not beat while attempt 2 runs.
        let beats = lines(&file, "beat 1").len();
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(lines(&file, "beat 1").len(), beats, "attempt 1 still runs");
        cluster.signal_agent("n1", Signal::CONT);
        tokio::time::sleep(Duration::from_secs(3)).await;
        let job = cluster.job(id).await;
        assert_eq!(
            (job.state.as_str(), job.attempt, job.token),
            ("RUNNING", 2, second.token),
            "the late report changed it"
        );
        cluster.cancel(id).await;
        let job = cluster.job_ended(id, SOON).await;
        assert_eq!(job.result.expect("it has ended").outcome, "CANCELLED");
    });
}

#[test]
fn each_task_of_an_array_runs_once_while_the_leader_is_killed_and_a_cancel_ends_all() {
    block_on(async {
        let mut cluster = Cluster::start(3).await;
        cluster.agent("n1", "sim:hgx-h100").await;
        let file = cluster.path().join("tasks");
        let script = format!(
            "echo \"$ARES_ARRAY_JOB_ID $ARES_TASK_INDEX $ARES_ATTEMPT\" >> '{}'; sleep 0.7; [ $ARES_TASK_INDEX != 9 ]",
            file.display()
        );
        let array = |ranges: &[(u32, u32)], throttle: u32| {
            let ranges = ranges.iter().map(|(first, last)| v1::IndexRange { first: *first, last: *last }).collect();
            Some(v1::Array { ranges, throttle })
        };
        let id = cluster.submit(&script, |job| job.array = array(&[(0, 9), (20, 21)], 3)).await;
        cluster.job_running(id + 4).await;
        let (leader, term) = cluster.wait_for_leader().await;
        cluster.kill_replica(leader);
        cluster.find_leader(term, SOON).await.expect("another leads");
        let job = cluster.job_ended(id, Duration::from_secs(60)).await;
        assert_eq!(job.state, "FAILED", "task 9 did");
        let progress = job.array.expect("an array");
        assert_eq!((progress.succeeded, progress.failed, progress.left, progress.open), (11, 1, 0, 0));
        let mut ran = lines(&file, &id.to_string());
        ran.sort();
        let mut all: Vec<String> = (0..10).chain(20..22).map(|index| format!("{id} {index} 1")).collect();
        all.sort();
        assert_eq!(ran, all, "each once, in attempt 1");
        let of = |index: u32| cluster.ares(&["show", &format!("{id}_{index}"), "-o", "json"]);
        let (code, out, _) = of(20);
        assert_eq!((code, out.contains(&format!("\"id\":{},", id + 11))), (0, true), "{out}");
        let (code, _, err) = of(10);
        assert_eq!((code, err.contains(&format!("array {id} has no task 10"))), (3, true), "{err}");

        let long = cluster.submit("sleep 600", |job| job.array = array(&[(0, 999_999)], 0)).await;
        cluster.job_running(long + 8).await;
        let (_, queue, _) = cluster.ares(&["queue"]);
        assert!(queue.contains(&format!("{long}_0")) && queue.contains(&format!("{long}_[")), "{queue}");
        cluster.cancel(long).await;
        let job = cluster.job_ended(long, Duration::from_secs(30)).await;
        assert_eq!((job.state.as_str(), job.array.expect("an array").cancelled), ("CANCELLED", 1_000_000));
        let (code, _, err) = cluster.ares(&["wait", &format!("{long}_500000")]);
        assert_ne!(code, 0, "{err}");
    });
}

#[test]
fn a_cancelled_job_is_dead_with_all_its_children() {
    block_on(async {
        let mut cluster = Cluster::start(1).await;
        cluster.agent("n1", "").await;
        let file = cluster.path().join("pid");
        let script =
            format!("sh -c 'trap \"\" TERM; echo $$ > \"{}\"; while :; do sleep 1; done' & wait", file.display());
        let id = cluster.submit(&script, |job| job.kill_grace_ms = 500).await;
        cluster.job_running(id).await;
        cluster.until("the child wrote its pid", async |_| file.is_file()).await;
        cluster.cancel(id).await;
        let job = cluster.job_ended(id, SOON).await;
        assert_eq!(job.result.expect("it has ended").outcome, "CANCELLED");
        assert!(cluster.shims("n1").is_empty(), "its shim is gone");
    });
}

#[test]
fn a_dead_agents_node_is_silent_whichever_replica_is_asked() {
    block_on(async {
        let mut cluster = Cluster::start(3).await;
        cluster.agent("n1", "").await;
        cluster.kill_agent("n1");
        for at in 0..3 {
            cluster
                .until("the node is shown silent", async |cluster| {
                    let reply = cluster.client_at(at).list_nodes(v1::ListNodesRequest::default()).await;
                    reply.is_ok_and(|reply| reply.nodes.iter().all(|node| node.state == "SILENT"))
                })
                .await;
        }
    });
}
