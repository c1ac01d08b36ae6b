//! What clients see through a leader change: watches without a gap, locks with fencing tokens.

use std::collections::BTreeSet;
use std::process::{Command, Stdio};
use std::time::Duration;

use jepsen_style_tests::cluster::{Cluster, SOON, block_on};
use jepsen_style_tests::load::Load;
use jepsen_style_tests::process::ares;
use proto::v1;

#[test]
fn a_watch_goes_on_over_killed_leaders_without_a_gap_or_a_repeat() {
    block_on(async {
        let mut cluster = Cluster::start(3).await;
        let out = cluster.path().join("watched");
        let file = std::fs::File::create(&out).expect("created");
        let servers = cluster.addresses.join(",");
        let mut watch = Command::new(ares())
            .args(["watch", "/jobs/", "--prefix", "--keys-only", "--from", "1", "-o", "jsonl", "-s", &servers])
            .stdout(file)
            .stdin(Stdio::null())
            .spawn()
            .expect("it starts");
        let load = Load::start(&cluster.client(), 4);
        for _ in 0..3 {
            load.more(60, SOON).await.expect("it goes on");
            let (leader, term) = cluster.wait_for_leader().await;
            cluster.kill_replica(leader);
            cluster.find_leader(term, SOON).await.expect("another leads");
            cluster.restart_replica(leader);
        }
        load.more(60, SOON).await.expect("it goes on");
        let acks = load.finish().await;
        let last = acks.iter().map(|ack| ack.job_id).max().expect("some");
        let seen = || {
            let text = std::fs::read_to_string(&out).expect("read");
            let event = |line: &str| -> Option<(u64, u64)> {
                let event: serde_json::Value = serde_json::from_str(line).ok()?;
                Some((event["key"].as_str()?.strip_prefix("/jobs/")?.parse().ok()?, event["mod_revision"].as_u64()?))
            };
            text.lines().filter_map(event).collect::<Vec<_>>()
        };
        let arrived =
            cluster.try_until("the last job is seen", SOON, async |_| seen().iter().any(|(job, _)| *job == last));
        let arrived = arrived.await;
        watch.kill().expect("killed");
        watch.wait().expect("ended");
        arrived.expect("the watch is alive");

        let seen = seen();
        let jobs: BTreeSet<u64> = seen.iter().map(|(job, _)| *job).collect();
        assert_eq!(jobs.len(), seen.len(), "a job's key was told twice");
        assert!(seen.windows(2).all(|pair| pair[0].1 < pair[1].1), "revisions grow");
        let missing: Vec<u64> = acks.iter().map(|ack| ack.job_id).filter(|job| !jobs.contains(job)).collect();
        assert!(missing.is_empty(), "the watch missed {missing:?}");
    });
}

#[test]
fn a_lock_goes_to_the_next_waiter_when_its_session_ends_and_the_old_token_is_no_longer_good() {
    block_on(async {
        let mut cluster = Cluster::start(3).await;
        let client = cluster.client();
        let open = |ttl_ms| v1::OpenSessionRequest { request_id: proto::request_id(), owner: "test".into(), ttl_ms };
        let acquire =
            |session_id| v1::AcquireRequest { request_id: proto::request_id(), session_id, name: "train".into() };
        let validate = |token| v1::ValidateRequest { name: "train".into(), token };
        let first = client.open_session(open(3_000)).await.expect("opened").session_id;
        let second = client.open_session(open(60_000)).await.expect("opened").session_id;
        let held = client.acquire(acquire(first)).await.expect("answered");
        assert!(held.granted);
        let waiting = client.acquire(acquire(second)).await.expect("answered");
        assert!(!waiting.granted, "it is held");
        assert!(client.validate(validate(held.token)).await.expect("answered").held);

        // A leader change is no end of a session that is kept alive.
        let (leader, term) = cluster.wait_for_leader().await;
        cluster.kill_replica(leader);
        cluster.find_leader(term, SOON).await.expect("another leads");
        client.keep_alive(v1::KeepAliveRequest { session_id: first }).await.expect("it lives on");
        assert!(client.validate(validate(held.token)).await.expect("answered").held);

        // The first holder falls silent. Validate answers the same on every replica, at a read index.
        cluster
            .until("the next waiter holds it", async |cluster| {
                let client = cluster.client();
                let _ = client.keep_alive(v1::KeepAliveRequest { session_id: second }).await;
                client.validate(validate(held.token)).await.is_ok_and(|reply| reply.holder_token > held.token)
            })
            .await;
        for at in cluster.running_replicas() {
            let reply = cluster.client_at(at).validate(validate(held.token)).await.expect("answered");
            assert!(!reply.held && reply.holder_token > held.token, "replica {at}: {reply:?}");
        }
        let refused = client.keep_alive(v1::KeepAliveRequest { session_id: first }).await.expect_err("it has ended");
        assert_eq!(refused.reason(), "SESSION_UNKNOWN");
        let end = v1::EndSessionRequest { request_id: proto::request_id(), session_id: second };
        client.end_session(end).await.expect("ended");
        let free = client.validate(validate(held.token)).await.expect("answered");
        assert!(!free.held && free.holder_token == 0, "nobody waits any more: {free:?}");
    });
}

#[test]
fn lock_run_holds_a_lock_while_its_command_runs_and_a_waiter_gets_a_higher_token() {
    block_on(async {
        let cluster = Cluster::start(1).await;
        let servers = cluster.addresses.join(",");
        let out = cluster.path().join("order");
        let script = |name: &str| {
            format!("echo begin {name} $ARES_LOCK_TOKEN >> '{0}'; sleep 1; echo end {name} >> '{0}'", out.display())
        };
        let run = |name: &str| {
            let args = ["lock", "run", "one", "-s", &servers, "--", "sh", "-c", &script(name)].map(str::to_owned);
            Command::new(ares()).args(args).stdin(Stdio::null()).spawn().expect("it starts")
        };
        let mut first = run("a");
        cluster.until("the first holds it", async |_| out.is_file()).await;
        let mut second = run("b");
        for child in [&mut first, &mut second] {
            assert!(child.wait().expect("ended").success());
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
        let text = std::fs::read_to_string(&out).expect("read");
        let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split(' ').collect()).collect();
        let order: Vec<String> = lines.iter().map(|words| words[..2].join(" ")).collect();
        assert_eq!(order, ["begin a", "end a", "begin b", "end b"]);
        let token = |at: usize| lines[at][2].parse::<u64>().expect("a token");
        assert!(token(2) > token(0), "{text}");
    });
}
