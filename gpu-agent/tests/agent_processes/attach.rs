//! Agents that die and come back: what runs goes on, nothing runs twice, and what is dead is said to be dead.

use std::time::Duration;

use proto::v1::{DesiredLease, report_item::What};

use crate::leader::{Leader, lease, said};
use crate::site::{Site, is_alive, read_log, signal, until, with_argument, word};
use crate::tests;

tests![
    an_agent_killed_and_restarted_attaches_again_and_nothing_runs_twice,
    an_end_while_the_agent_was_away_is_finished_at_the_next_registration,
    an_end_that_was_acknowledged_is_told_again_at_registrations,
    agent_and_shims_killed_is_dead_at_the_next_registration,
    agent_and_shims_killed_without_namespaces_is_dead_once_seen_so,
    agent_and_shims_killed_under_a_control_group_is_dead_once_seen_so,
    an_attempt_left_alone_is_looked_at_again_without_a_restart,
    what_an_agent_sweeps_is_its_own,
    a_shim_dead_before_the_first_look_is_told_once_its_rank_is_dead_too,
    a_shim_that_is_killed_is_told_by_a_registration_and_its_gang_ends,
    what_left_the_process_group_dies_with_its_shim,
    a_damaged_fence_file_is_told,
    a_superseded_agent_leaves_its_shims_alone,
    an_agent_that_is_stopped_leaves_its_jobs_running,
    a_job_outlives_a_leader_that_goes_away,
];

/// Appends one line per life to a file beside the logs.
fn counting(site: &Site, rest: &str) -> Vec<String> {
    let file = site.dir.path().join("lives");
    vec!["sh".into(), "-c".into(), format!("echo life >> '{}'; echo up; {rest}", file.display())]
}

fn lives(site: &Site) -> usize {
    std::fs::read_to_string(site.dir.path().join("lives")).unwrap_or_default().lines().count()
}

async fn run(site: &mut Site, leader: &Leader, lease: DesiredLease, rest: &str) {
    site.start(&leader.addr);
    let argv = counting(site, rest);
    let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
    let token = lease.token;
    leader.grant(&site.name.clone(), lease, &argv);
    leader.started(token).await;
    site.until_log(token, 0, |log| log.contains("up")).await;
}

async fn an_agent_killed_and_restarted_attaches_again_and_nothing_runs_twice() {
    let leader = Leader::start().await;
    let mut site = Site::new("n1");
    let go = site.dir.path().join("go");
    let rest = format!("while [ ! -e '{}' ]; do sleep 0.02; done; exit 5", go.display());
    run(&mut site, &leader, lease(101), &rest).await;
    let shim = site.shim(101, 0);
    for round in 2..=4 {
        site.kill_agent();
        assert!(shim.is_alive());
        site.start(&leader.addr);
        let registered = leader.registered(round).await;
        // Its log port is another one now: what it registers is where the job's output is from here on.
        let address = &registered.machine.as_ref().unwrap().address;
        assert_eq!(read_log(address, 101, 0, false).await, "up\n");
        assert_eq!(registered.running.len(), 1);
        assert_eq!((registered.running[0].token, registered.running[0].started), (101, true));
        assert_eq!(registered.max_token, 101);
        assert!(registered.dead.is_empty() && registered.finished.is_empty() && !registered.fence_new);
    }
    std::fs::write(go, "").unwrap();
    let exits = leader.exits(101).await;
    assert_eq!(exits[0].exit.as_ref().unwrap().code, 5);
    assert_eq!(lives(&site), 1);
}

async fn an_end_while_the_agent_was_away_is_finished_at_the_next_registration() {
    let leader = Leader::start().await;
    let mut site = Site::new("n1");
    run(&mut site, &leader, lease(102), "sleep 0.5; exit 7").await;
    site.kill_agent();
    until("the exit record", || site.rank_dir(102, 0).join("exit").exists()).await;
    site.start(&leader.addr);
    let registered = leader.registered(2).await;
    assert_eq!(registered.finished.len(), 1);
    assert_eq!(registered.finished[0].exits[0].exit.as_ref().unwrap().code, 7);
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(lives(&site), 1, "the lease is still in the desired set, and is not taken up again");
}

async fn an_end_that_was_acknowledged_is_told_again_at_registrations() {
    let leader = Leader::start().await;
    let mut site = Site::new("n1");
    run(&mut site, &leader, lease(103), "exit 0").await;
    leader.exits(103).await;
    site.kill_agent();
    site.start(&leader.addr);
    let registered = leader.registered(2).await;
    assert_eq!(registered.finished.iter().map(|part| part.token).collect::<Vec<_>>(), vec![103]);
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(lives(&site), 1);
}

async fn agent_and_shims_killed_is_dead_at_the_next_registration() {
    killed_together(Site::new("n1"), 104).await;
}

async fn agent_and_shims_killed_without_namespaces_is_dead_once_seen_so() {
    killed_together(Site::with("n1", &["root", "weak"]), 105).await;
}

async fn agent_and_shims_killed_under_a_control_group_is_dead_once_seen_so() {
    if gpu_agent::shim::contain::own_cgroup().is_none() {
        eprintln!("SKIPPED: agent_and_shims_killed_under_a_control_group: no control group (v2) may be made here");
        return;
    }
    killed_together(Site::with("n1", &["root", "cgroup"]), 112).await;
}

async fn an_attempt_left_alone_is_looked_at_again_without_a_restart() {
    let leader = Leader::start().await;
    let mut site = Site::new("n1");
    run(&mut site, &leader, lease(113), "exit 0").await;
    leader.exits(113).await;
    site.kill_agent();
    // An attempt whose records can't be read, and of which nobody else knows.
    let part = site.dir.path().join("attempts/113/part");
    let known = std::fs::read(&part).unwrap();
    let of_714 = site.dir.path().join("attempts/714");
    std::fs::create_dir(&of_714).unwrap();
    std::fs::write(of_714.join("part"), "no part").unwrap();
    site.start(&leader.addr);
    let registered = leader.registered(2).await;
    assert!(!registered.dead.contains(&714) && registered.running.is_empty());
    // The disk came back, say.
    std::fs::write(of_714.join("part"), known).unwrap();
    assert_eq!(leader.registered(3).await.dead, vec![714]);
}

async fn killed_together(mut site: Site, token: u64) {
    let leader = Leader::start().await;
    let word = word(token);
    run(&mut site, &leader, lease(token), &format!("setsid sleep {word} & sleep {word}")).await;
    until("both sleep", || with_argument(&word).len() == 2).await;
    let shim = site.shim(token, 0);
    site.kill_agent();
    signal(shim.number, "KILL");
    until("the shim is gone", || !is_alive(shim.number)).await;
    site.start(&leader.addr);
    let registered = leader.registered(2).await;
    assert_eq!(registered.dead, vec![token]);
    assert!(registered.running.is_empty() && registered.finished.is_empty());
    assert_eq!(with_argument(&word), Vec::<i32>::new(), "dead is said only of what is dead");
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(lives(&site), 1);
}

async fn what_an_agent_sweeps_is_its_own() {
    // Two agents of one machine have parts of one attempt: the same token.
    let leader = Leader::start().await;
    let (mut a, mut b) = (Site::with("a", &["root", "weak"]), Site::with("b", &["root", "weak"]));
    let (first, second) = (word(1131), word(1132));
    run(&mut a, &leader, lease(113), &format!("setsid sleep {first} & sleep {first}")).await;
    b.start(&leader.addr);
    leader.grant("b", DesiredLease { job_id: 114, ..lease(113) }, &["sleep", &second]);
    until("the other one sleeps", || with_argument(&second).len() == 1).await;
    let shim = a.shim(113, 0);
    a.kill_agent();
    signal(shim.number, "KILL");
    a.start(&leader.addr);
    let registered = leader.registered(3).await;
    assert_eq!(registered.dead, vec![113]);
    assert_eq!(with_argument(&first), Vec::<i32>::new());
    assert_eq!(with_argument(&second).len(), 1, "another agent's process was killed");
}

async fn a_shim_dead_before_the_first_look_is_told_once_its_rank_is_dead_too() {
    let leader = Leader::start().await;
    let word = word(120);
    let mut site = Site::with("n1", &["root", "weak", &format!("dying={word}")]);
    site.start(&leader.addr);
    leader.registered(1).await;
    leader.grant("n1", lease(120), &["true"]);
    let failed = leader.failure(120).await;
    assert_eq!(with_argument(&word), Vec::<i32>::new(), "the rank outlived the report that frees its GPUs");
    assert!(failed.node_fault && failed.why.contains("the shim ended"), "{failed:?}");
    assert!(site.dir.path().join("attempts/120/0/began").exists(), "there was a rank");
}

async fn a_shim_that_is_killed_is_told_by_a_registration_and_its_gang_ends() {
    let leader = Leader::start().await;
    let mut site = Site::new("n1");
    let gang = DesiredLease { ranks: 2, world_size: 2, ..lease(106) };
    run(&mut site, &leader, gang, &format!("sleep {}", word(106))).await;
    let (first, second) = (site.shim(106, 0), site.shim(106, 1));
    signal(first.number, "KILL");
    let registered = leader.registered(2).await;
    assert_eq!(registered.dead, vec![106]);
    assert!(!second.is_alive());
    assert_eq!(with_argument(&word(106)), Vec::<i32>::new());
    let released = |what: &What| matches!(what, What::Released(_)) || matches!(what, What::Exited(e) if e.released);
    assert!(!said(&leader.state(), 106).any(released), "only the registration may say so");
}

async fn what_left_the_process_group_dies_with_its_shim() {
    let leader = Leader::start().await;
    let mut site = Site::new("n1");
    site.start(&leader.addr);
    if leader.registered(1).await.machine.unwrap().kill != "pidns" {
        eprintln!("SKIPPED: what_left_the_process_group_dies_with_its_shim: PID namespaces are not permitted here");
        return;
    }
    site.kill_agent();
    // A daemon: in a session of its own, without the environment that would tell of its attempt.
    run(&mut site, &leader, lease(107), &format!("setsid env -i sleep {0} & sleep {0}", word(107))).await;
    until("both sleep", || with_argument(&word(107)).len() == 2).await;
    // Stopped: it can't do the killing, only the kernel can.
    signal(site.agent_pid(), "STOP");
    signal(site.shim(107, 0).number, "KILL");
    until("the kernel kills them", || with_argument(&word(107)).is_empty()).await;
    signal(site.agent_pid(), "CONT");
}

async fn a_damaged_fence_file_is_told() {
    let leader = Leader::start().await;
    let mut site = Site::new("n1");
    run(&mut site, &leader, lease(108), &format!("sleep {}", word(108))).await;
    site.kill_agent();
    let path = site.dir.path().join("fence");
    let mut bytes = std::fs::read(&path).unwrap();
    let last = bytes.len() - 2;
    bytes[last] ^= 0x20;
    std::fs::write(&path, bytes).unwrap();
    site.start(&leader.addr);
    let registered = leader.registered(2).await;
    assert!(registered.fence_new);
    assert_eq!(registered.running.len(), 1, "what its directories show is told all the same");
    assert_eq!(registered.max_token, 108);
    assert_eq!(lives(&site), 1);
}

async fn a_superseded_agent_leaves_its_shims_alone() {
    let leader = Leader::start().await;
    let mut site = Site::new("n1");
    run(&mut site, &leader, lease(109), &format!("sleep {}", word(109))).await;
    leader.state().supersede = true;
    assert_eq!(site.left(), Some(0));
    assert!(site.shim(109, 0).is_alive());
    assert_eq!(with_argument(&word(109)).len(), 1);
}

async fn an_agent_that_is_stopped_leaves_its_jobs_running() {
    let leader = Leader::start().await;
    let mut site = Site::new("n1");
    run(&mut site, &leader, lease(111), &format!("sleep {}", word(111))).await;
    signal(site.agent_pid(), "TERM");
    assert_eq!(site.left(), Some(0));
    assert_eq!(with_argument(&word(111)).len(), 1);
    site.start(&leader.addr);
    assert_eq!(leader.registered(2).await.running.len(), 1);
}

async fn a_job_outlives_a_leader_that_goes_away() {
    let leader = Leader::start().await;
    let mut site = Site::new("n1");
    let short = DesiredLease { ttl_ms: 4_000, kill_grace_ms: 500, ..lease(110) };
    run(&mut site, &leader, short, &format!("sleep {}", word(110))).await;
    leader.state().muted = true;
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    leader.state().muted = false;
    tokio::time::sleep(Duration::from_millis(4_000)).await;
    assert_eq!(with_argument(&word(110)).len(), 1);
    assert_eq!(leader.state().registrations.len(), 1, "no registration was needed");
}
