//! Replicas under kills: what was acknowledged is there, on every replica.

use std::time::{Duration, Instant};

use jepsen_style_tests::checks::{self, Digests};
use jepsen_style_tests::cluster::{Cluster, SOON, block_on};
use jepsen_style_tests::load::{Ack, Load};
use proto::v1;

/// Between two progress looks of a load, on a busy machine.
const PROGRESS: Duration = Duration::from_secs(60);

async fn nothing_lost_and_equal(cluster: &Cluster, acks: &[Ack]) {
    checks::nothing_lost(cluster, acks).await.expect("nothing is lost");
    checks::replicas_equal(cluster, &mut Digests::default()).await.expect("the replicas are equal");
}

#[test]
fn a_random_replica_is_killed_25_times_under_load_and_no_acknowledged_job_is_lost() {
    block_on(async {
        let mut cluster = Cluster::start(3).await;
        let load = Load::start(&cluster.client(), 8);
        let mut choice = 7u64;
        for round in 0..25 {
            // A small fixed generator: the same victims in each run, the timing is what differs.
            choice = choice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let victim = match round % 3 {
                // Every third time surely the leader.
                0 => cluster.wait_for_leader().await.0,
                _ => (choice >> 33) as usize % 3,
            };
            cluster.kill_replica(victim);
            tokio::time::sleep(Duration::from_millis(choice >> 55)).await;
            cluster.restart_replica(victim);
            let went_on = load.more(20, PROGRESS).await;
            went_on.unwrap_or_else(|error| panic!("after round {round}: {error}\n{}", cluster.replica_log(victim)));
        }
        let acks = load.finish().await;
        assert!(acks.len() > 500, "the load made only {} jobs", acks.len());
        nothing_lost_and_equal(&cluster, &acks).await;
    });
}

#[test]
fn all_replicas_are_killed_at_once_under_load_and_resume_by_themselves() {
    block_on(async {
        let mut cluster = Cluster::start(3).await;
        let load = Load::start(&cluster.client(), 8);
        for _ in 0..3 {
            load.more(100, PROGRESS).await.expect("it goes on");
            let (_, term) = cluster.wait_for_leader().await;
            (0..3).for_each(|at| cluster.kill_replica(at));
            (0..3).for_each(|at| cluster.restart_replica(at));
            cluster.find_leader(term, SOON).await.expect("they resume");
        }
        let acks = load.finish().await;
        nothing_lost_and_equal(&cluster, &acks).await;
        checks::request_once(&cluster.client(), &acks).await.expect("the request ids are known");
    });
}

#[test]
fn a_stopped_leader_hands_over_without_a_long_gap_and_exits_0() {
    block_on(async {
        let mut cluster = Cluster::start(3).await;
        let (leader, term) = cluster.wait_for_leader().await;
        let load = Load::start(&cluster.client(), 4);
        load.more(50, PROGRESS).await.expect("it begins");
        let stopped = Instant::now();
        assert_eq!(cluster.stop_replica(leader).expect("it ends"), 0);
        let (next, _) = cluster.find_leader(term, SOON).await.expect("another leads");
        assert_ne!(next, leader);
        load.more(50, PROGRESS).await.expect("it goes on");
        let acks = load.finish().await;
        let gap = longest_gap(&acks, stopped);
        println!("longest pause between acknowledgements after SIGTERM: {gap:?}");
        // 0.3 s on an idle machine. A client that waited for a try of its own to time out would need 5 s.
        assert!(gap < Duration::from_secs(4), "no acknowledgement for {gap:?}");
        nothing_lost_and_equal(&cluster, &acks).await;
    });
}

/// The longest time without an acknowledgement, from `since` on.
fn longest_gap(acks: &[Ack], since: Instant) -> Duration {
    let mut times: Vec<Instant> = acks.iter().map(|ack| ack.at).filter(|at| *at > since).collect();
    times.push(since);
    times.sort_unstable();
    times.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or_default()
}

#[test]
fn one_request_id_is_one_job_from_every_replica_at_once_and_over_a_leader_change() {
    block_on(async {
        let mut cluster = Cluster::start(3).await;
        // An id of one's own choice, as long as it is a UUIDv7 of about now.
        let id = proto::request_id();
        let request = |name: &str| v1::SubmitJobRequest {
            request_id: id.clone(),
            job: Some(v1::JobSpec {
                name: name.into(),
                body: Some(v1::Body { argv: vec!["true".into()], ..Default::default() }),
                ..Default::default()
            }),
            user: String::new(),
        };
        let mut calls = tokio::task::JoinSet::new();
        for at in [0, 1, 2, 0, 1, 2, 0, 1, 2] {
            let (client, request) = (cluster.client_at(at), request("once"));
            calls.spawn(async move { client.submit_job(request).await.expect("accepted") });
        }
        let replies = calls.join_all().await;
        assert!(replies.iter().all(|reply| reply.job_id == replies[0].job_id), "{replies:?}");
        assert_eq!(replies.iter().filter(|reply| !reply.replayed).count(), 1);

        let (leader, _) = cluster.wait_for_leader().await;
        cluster.kill_replica(leader);
        let again = cluster.client().submit_job(request("once")).await.expect("accepted");
        assert!(again.replayed && again.job_id == replies[0].job_id);
        let other = cluster.client().submit_job(request("another")).await.expect_err("another body");
        assert_eq!(other.reason(), "REQUEST_MISMATCH");
    });
}
