//! Preemption with real processes: how soon an urgent job runs on a full cluster, and what becomes of those who made room.

mod cluster;

use std::path::Path;
use std::time::{Duration, Instant};

use cluster::Cluster;

/// Urgent jobs of the measured test, one after the other.
const URGENT: usize = 20;

fn site() -> Cluster {
    let cluster = Cluster::with_machines();
    cluster.ares(&["priority", "create", "low", "--value", "0", "--preemptible"]).ok();
    cluster.ares(&["priority", "create", "urgent", "--value", "100", "--preempts"]).ok();
    cluster
}

fn read(file: &Path) -> String {
    std::fs::read_to_string(file).unwrap_or_default()
}

/// Until the file has so many lines.
fn until_lines(cluster: &Cluster, file: &Path, count: usize) {
    cluster.until(&format!("{} has {count} lines", file.display()), |_| read(file).lines().count() >= count);
}

#[test]
fn an_urgent_job_runs_at_once_on_a_full_cluster_and_its_victims_end_once() {
    let cluster = site();
    cluster.ares(&["policy", "set", "--preemptions", "1000"]).ok();
    let (starts, stop) = (cluster.path("starts"), cluster.path("stop"));
    // Each notes its start, waits for the word to end, and ends at the signal at once: what is measured has no grace in it.
    let script = format!(
        "trap 'exit 0' TERM; echo \"$ARES_JOB_ID $ARES_ATTEMPT\" >> '{}'; while [ ! -e '{}' ]; do sleep 0.05; done",
        starts.display(),
        stop.display()
    );
    let low: Vec<String> = (0..4)
        .map(|_| cluster.submit(&["--priority-class", "low", "--gpus", "2", "--retries", "0"], &script))
        .collect();
    until_lines(&cluster, &starts, 4);
    let mut took: Vec<Duration> = Vec::new();
    for nth in 0..URGENT {
        let file = cluster.path(&format!("urgent{nth}"));
        let began = Instant::now();
        let urgent =
            cluster.submit(&["--priority-class", "urgent", "--gpus", "2"], &format!("echo up > '{}'", file.display()));
        let deadline = began + Duration::from_secs(20);
        while read(&file).is_empty() {
            assert!(Instant::now() < deadline, "urgent job {nth} does not run: {}", cluster.json(&["show", &urgent]));
            std::thread::sleep(Duration::from_millis(2));
        }
        took.push(began.elapsed());
        cluster.ares(&["wait", &urgent]).ok();
        // The victim is back before the next one comes.
        until_lines(&cluster, &starts, 4 + nth + 1);
    }
    took.sort_unstable();
    println!(
        "from submission to running, {URGENT} urgent jobs on a full cluster: median {} ms, p95 {} ms, worst {} ms",
        took[URGENT / 2].as_millis(),
        took[URGENT * 19 / 20].as_millis(),
        took[URGENT - 1].as_millis()
    );
    assert!(took[URGENT / 2] < Duration::from_secs(1), "{took:?}");

    std::fs::write(&stop, "").expect("a file");
    let mut made_room = 0;
    for job in &low {
        cluster.ares(&["wait", job]).ok();
        let shown = cluster.json(&["show", job]);
        assert_eq!((&shown["state"], &shown["retries_used"]), (&"SUCCEEDED".into(), &0.into()), "{shown}");
        assert_eq!(shown["result"]["attempt"], shown["attempt"], "{shown}");
        made_room += shown["made_room"].as_u64().expect("a number");
    }
    assert_eq!(made_room, URGENT as u64);
}

#[test]
fn a_victim_saves_its_work_goes_on_from_there_and_tells_what_happened() {
    let cluster = site();
    let (log, ares) = (cluster.path("log"), env!("CARGO_BIN_EXE_ares"));
    let script = format!(
        "trap \"'{ares}' checkpoint done /ckpt/$ARES_ATTEMPT --step 7; exit 0\" USR1; \
         echo \"$ARES_ATTEMPT from ${{ARES_RESTORE_FROM:-nothing}}\" >> '{}'; \
         [ \"$ARES_ATTEMPT\" = 2 ] || while :; do sleep 0.05; done",
        log.display()
    );
    let options = ["--priority-class", "low", "--gpus", "8", "--checkpoint-signal", "USR1", "--kill-grace", "30s"];
    let low = cluster.submit(&options, &script);
    until_lines(&cluster, &log, 1);
    let urgent = cluster.submit(&["--priority-class", "urgent", "--gpus", "8"], "exec sleep 2");
    cluster.until_state(&urgent, "RUNNING");
    let why = cluster.ares(&["why", &low]).ok();
    assert!(why.out.contains(&urgent), "who has what it waits for: {why:?}");
    cluster.ares(&["wait", &urgent]).ok();
    cluster.ares(&["wait", &low]).ok();
    assert_eq!(read(&log), "1 from nothing\n2 from /ckpt/1\n");

    let shown = cluster.json(&["show", &low]);
    assert_eq!((&shown["made_room"], &shown["checkpoint"]["path"]), (&1.into(), &"/ckpt/1".into()), "{shown}");
    let first = &shown["attempts"][0];
    assert_eq!((&first["verdict"], first["preemptor"].to_string()), (&"PREEMPTED".into(), urgent.clone()), "{shown}");
    let text = first["text"].as_str().unwrap_or_default();
    assert!(
        text.starts_with(&format!("made room for job {urgent}, of priority 100 over 0; 0 GPU-s lost since")),
        "{text}"
    );
    cluster.ares(&["show", &low]).ok().shows(&["Made room  1 time", "Checkpoint /ckpt/1 by attempt 1, step 7", text]);
    // The token of an attempt that is over records nothing.
    let token = first["token"].as_str().expect("a token").to_owned();
    cluster
        .ares(&["checkpoint", "done", "/late", "--token", &token])
        .refused(5, &["TOKEN_STALE", "the attempt is over"]);
}

#[test]
fn a_tenant_takes_its_guarantee_back_and_nobody_else_is_ended() {
    let cluster = site();
    cluster.ares(&["tenant", "create", "lab", "--guarantee", "v100:4"]).ok();
    let borrowers: Vec<String> =
        (0..2).map(|_| cluster.submit(&["--gpus", "4", "--retries", "0"], "exec sleep 600")).collect();
    borrowers.iter().for_each(|job| cluster.until_state(job, "RUNNING"));
    // No class lets it: without a guarantee it waits.
    let plain = cluster.submit(&["--gpus", "4"], "true");
    let own = cluster.submit(&["--tenant", "lab", "--gpus", "4"], "exec sleep 600");
    cluster.until_state(&own, "RUNNING");
    assert_eq!(cluster.json(&["show", &plain])["state"], "PENDING");
    let states: Vec<String> =
        borrowers.iter().map(|job| cluster.json(&["show", job])["state"].as_str().unwrap_or("").to_owned()).collect();
    let waits = states.iter().position(|state| state == "PENDING").expect("one of them made room");
    assert_eq!(states.iter().filter(|state| *state == "RUNNING").count(), 1, "{states:?}");
    let shown = cluster.json(&["show", &borrowers[waits]]);
    let text = shown["attempts"][0]["text"].as_str().unwrap_or_default().to_owned();
    assert!(text.contains("tenant \"lab\" takes what is guaranteed to it"), "{text}");
    cluster
        .ares(&["policy", "set", "--preemptions", "0", "--min-run", "10m", "--claim", "30s"])
        .ok()
        .shows(&["Makes room    0 times a job, after 10m00s of an attempt", "Room is kept  30s beyond the grace"]);
    cluster.ares(&["policy", "set", "--claim", "2h"]).refused(2, &["claim_ms is 7200000, must be 1000 to 3600000"]);
    cluster.ares(&["submit", "--checkpoint-signal", "KILL", "--", "true"]).refused(2, &["checkpoint_signal is 9"]);
    cluster.ares(&["submit", "--checkpoint-signal", "LOUD", "--", "true"]).refused(2, &["\"LOUD\" is no signal"]);
}
