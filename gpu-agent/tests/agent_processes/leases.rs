//! Deadlines, limits and stops, with the clock of the machine.

use std::time::{Duration, Instant};

use proto::v1::DesiredLease;

use crate::leader::{Leader, lease};
use crate::site::{Site, signal, until, with_argument, word};
use crate::tests;

tests![
    the_deadline_kills_the_job_although_the_agent_is_stopped,
    the_deadline_kills_the_job_although_the_agent_is_dead,
    a_job_that_heeds_sigterm_ends_a_grace_before_its_deadline,
    a_stop_is_a_signal_and_after_the_grace_a_kill,
    an_attempt_that_the_set_lacks_is_killed,
    the_time_limit_ends_a_rank,
    a_gpu_passes_to_the_next_attempt_only_when_the_last_is_gone,
    a_machine_that_wakes_past_the_deadline_kills_before_anything_else,
    daemons_of_a_rank_die_with_it,
    daemons_of_a_rank_die_with_it_without_namespaces,
];

const TTL: u64 = 3_000;

fn short(token: u64) -> DesiredLease {
    DesiredLease { ttl_ms: TTL, kill_grace_ms: 700, ..lease(token) }
}

/// Ignores SIGTERM: only SIGKILL ends it.
async fn deaf(site: &mut Site, leader: &Leader, lease: DesiredLease) -> String {
    let word = word(lease.token);
    let script = format!("trap '' TERM; echo up; while true; do sleep {word}; done");
    site.start(&leader.addr);
    let token = lease.token;
    leader.grant(&site.name.clone(), lease, &["sh", "-c", &script]);
    site.until_log(token, 0, |log| log.contains("up")).await;
    until("it sleeps", || !with_argument(&word).is_empty()).await;
    word
}

/// From the agent's last sign of life to the last process' end.
async fn dies_in_time(site: &Site, token: u64, word: &str, silent: Instant) {
    until("the job is dead", || with_argument(word).is_empty()).await;
    let after = silent.elapsed();
    println!("    dead {} ms after the silence began (ttl {TTL} ms)", after.as_millis());
    // Deadline = send time of the last acknowledged heartbeat + ttl; heartbeats go out every 200 ms here.
    assert!(after >= Duration::from_millis(TTL - 1_000), "killed too early: {after:?}");
    assert!(after <= Duration::from_millis(TTL + 300), "outlived its lease: {after:?}");
    until("the exit record", || site.rank_dir(token, 0).join("exit").exists()).await;
    let record = std::fs::read_to_string(site.rank_dir(token, 0).join("exit")).unwrap();
    assert!(record.contains("LeaseEnd"), "{record}");
}

async fn the_deadline_kills_the_job_although_the_agent_is_stopped() {
    let leader = Leader::start().await;
    let mut site = Site::new("n1");
    let word = deaf(&mut site, &leader, short(201)).await;
    tokio::time::sleep(Duration::from_millis(2 * TTL)).await;
    assert!(!with_argument(&word).is_empty(), "heartbeats keep it alive past its ttl");
    signal(site.agent_pid(), "STOP");
    dies_in_time(&site, 201, &word, Instant::now()).await;
    signal(site.agent_pid(), "CONT");
    let exits = leader.exits(201).await;
    assert_eq!((exits[0].exit.as_ref().unwrap().signal, exits[0].cause.as_str()), (9, "LEASE_END"));
}

async fn the_deadline_kills_the_job_although_the_agent_is_dead() {
    let leader = Leader::start().await;
    let mut site = Site::new("n1");
    let word = deaf(&mut site, &leader, short(202)).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    site.kill_agent();
    dies_in_time(&site, 202, &word, Instant::now()).await;
}

async fn a_job_that_heeds_sigterm_ends_a_grace_before_its_deadline() {
    let leader = Leader::start().await;
    let mut site = Site::new("n1");
    site.start(&leader.addr);
    let script = "trap 'echo saved; exit 4' TERM; echo up; while true; do sleep 0.05; done";
    leader.grant("n1", short(203), &["sh", "-c", script]);
    site.until_log(203, 0, |log| log.contains("up")).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    leader.state().muted = true;
    let silent = Instant::now();
    let exits = leader.exits(203).await;
    assert_eq!((exits[0].exit.as_ref().unwrap().code, exits[0].cause.as_str()), (4, "LEASE_END"));
    assert!(silent.elapsed() < Duration::from_millis(TTL));
    assert!(site.log(203, 0).ends_with("saved\n"), "{}", site.log(203, 0));
}

async fn a_stop_is_a_signal_and_after_the_grace_a_kill() {
    let leader = Leader::start().await;
    let mut site = Site::new("n1");
    let word = deaf(&mut site, &leader, DesiredLease { kill_grace_ms: 600, ..lease(204) }).await;
    let began = Instant::now();
    leader.change("n1", |leases| leases[0].stop = "CANCELLED".into());
    let exits = leader.exits(204).await;
    let after = began.elapsed();
    assert_eq!((exits[0].exit.as_ref().unwrap().signal, exits[0].cause.as_str()), (9, "STOPPED"));
    assert!(after >= Duration::from_millis(600) && after < Duration::from_millis(1_500), "{after:?}");
    assert!(with_argument(&word).is_empty());
}

async fn an_attempt_that_the_set_lacks_is_killed() {
    let leader = Leader::start().await;
    let mut site = Site::new("n1");
    site.start(&leader.addr);
    leader.grant("n1", lease(205), &["sleep", &word(205)]);
    leader.started(205).await;
    leader.change("n1", Vec::clear);
    let exits = leader.exits(205).await;
    assert_eq!((exits[0].exit.as_ref().unwrap().signal, exits[0].cause.as_str()), (15, "STOPPED"));
}

async fn the_time_limit_ends_a_rank() {
    let leader = Leader::start().await;
    let mut site = Site::new("n1");
    site.start(&leader.addr);
    let limited = DesiredLease { limit_ms: 500, ..lease(206) };
    let began = Instant::now();
    leader.grant("n1", limited, &["sleep", &word(206)]);
    let exits = leader.exits(206).await;
    assert_eq!((exits[0].exit.as_ref().unwrap().signal, exits[0].cause.as_str()), (15, "TIME_LIMIT"));
    assert!(began.elapsed() >= Duration::from_millis(500));
}

async fn a_gpu_passes_to_the_next_attempt_only_when_the_last_is_gone() {
    let leader = Leader::start().await;
    let mut site = Site::new("n1");
    let on_gpu = |lease: DesiredLease| DesiredLease { gpu_uuids: vec!["GPU-a".into()], gpus_per_rank: 1, ..lease };
    let first = on_gpu(DesiredLease { kill_grace_ms: 500, ..lease(207) });
    let word = deaf(&mut site, &leader, first).await;
    leader.change("n1", Vec::clear);
    let script = format!("pgrep -f {word} > /dev/null; echo up");
    leader.grant("n1", on_gpu(lease(208)), &["sh", "-c", &script]);
    site.until_log(208, 0, |log| log.contains("up")).await;
    assert!(with_argument(&word).is_empty(), "the second started beside the first");
}

/// Agent, shim and job stand still, and the clock has leapt when they go on, as after a machine's suspension. The agent
/// may be the first to wake: what the leader acknowledges then must not save the job.
async fn a_machine_that_wakes_past_the_deadline_kills_before_anything_else() {
    let leader = Leader::start().await;
    let clock = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(clock.path(), "0").unwrap();
    let mut site = Site::with("n1", &["root", &format!("leap={}", clock.path().display())]);
    let word = deaf(&mut site, &leader, DesiredLease { ttl_ms: 30_000, ..short(209) }).await;
    let shim = site.shim(209, 0);
    let mut asleep = with_argument(&word);
    asleep.extend([shim.number, site.agent_pid()]);
    asleep.iter().for_each(|pid| signal(*pid, "STOP"));
    std::fs::write(clock.path(), "31000").unwrap();
    signal(site.agent_pid(), "CONT");
    // A heartbeat goes out every 200 ms, and is acknowledged.
    tokio::time::sleep(Duration::from_millis(700)).await;
    let woke = Instant::now();
    asleep.iter().for_each(|pid| signal(*pid, "CONT"));
    until("the job is dead", || with_argument(&word).is_empty()).await;
    assert!(woke.elapsed() < Duration::from_secs(2), "{:?}", woke.elapsed());
    let exits = leader.exits(209).await;
    assert_eq!((exits[0].exit.as_ref().unwrap().signal, exits[0].cause.as_str()), (9, "LEASE_END"));
}

async fn daemons_of_a_rank_die_with_it() {
    daemons_die(Site::new("n1"), 210).await;
}

async fn daemons_of_a_rank_die_with_it_without_namespaces() {
    daemons_die(Site::with("n1", &["root", "weak"]), 212).await;
}

/// Forked twice, in sessions of their own, deaf, and one with an empty environment: gone when the rank's own process
/// ends, and gone at the deadline.
async fn daemons_die(mut site: Site, token: u64) {
    let leader = Leader::start().await;
    site.start(&leader.addr);
    let daemons = |word: &str| {
        format!(
            "(setsid sh -c 'trap \"\" TERM HUP; sleep {word} & exec sleep {word}' &) ; \
             (env -i setsid /bin/sh -c '/bin/sleep {word} & exit 0' &)"
        )
    };
    let (ends, lives) = (word(token), word(token + 1));
    let script = format!("{}; sleep 1; exit 0", daemons(&ends));
    leader.grant("n1", lease(token), &["sh", "-c", &script]);
    until("its daemons run", || with_argument(&ends).len() >= 3).await;
    leader.exits(token).await;
    assert_eq!(with_argument(&ends), Vec::<i32>::new(), "an end is told when nothing is left");

    let script = format!("trap '' TERM; {}; while true; do sleep {lives}; done", daemons(&lives));
    leader.grant("n1", short(token + 1), &["sh", "-c", &script]);
    until("its daemons run", || with_argument(&lives).len() >= 4).await;
    leader.state().muted = true;
    until("the deadline killed them", || with_argument(&lives).is_empty()).await;
}
