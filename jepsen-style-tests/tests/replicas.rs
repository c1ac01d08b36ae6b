//! Replicas under kills: what was acknowledged is there, on every replica.

use std::time::{Duration, Instant};

use jepsen_style_tests::cluster::{Cluster, block_on};
use jepsen_style_tests::load::{Load, all_jobs};
use proto::v1;

/// Every acknowledged job is found by a linearizable read at every replica, and the replicas' states are equal.
async fn nothing_lost(cluster: &Cluster, acknowledged: &[u64]) {
    cluster.settled().await;
    for at in cluster.running_replicas() {
        let found = all_jobs(&cluster.client_at(at)).await;
        let missing: Vec<_> = acknowledged.iter().filter(|id| !found.contains(id)).collect();
        assert!(missing.is_empty(), "replica {at} lost acknowledged jobs {missing:?}");
    }
    replicas_equal(cluster).await;
}

/// Digests published at one index are one.
async fn replicas_equal(cluster: &Cluster) {
    let mut published = std::collections::BTreeMap::new();
    for at in cluster.running_replicas() {
        let status = cluster.status(at).await.expect("it answers");
        if !status.digest.is_empty() {
            let known = published.entry(status.digest_index).or_insert_with(|| status.digest.clone());
            assert_eq!(*known, status.digest, "replica {at} differs at index {}", status.digest_index);
        }
    }
}

#[test]
fn a_random_replica_is_killed_25_times_under_load_and_no_acknowledged_job_is_lost() {
    block_on(async {
        let mut cluster = Cluster::start(3).await;
        let load = Load::start(&cluster.client(), 8);
        let mut choice = 7u64;
        for round in 0..25 {
            let before = load.count();
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
            let deadline = Instant::now() + Duration::from_secs(30);
            while load.count() < before + 20 {
                assert!(Instant::now() < deadline, "no progress after round {round}: {}", cluster.replica_log(victim));
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
        let acknowledged = load.finish().await;
        assert!(acknowledged.len() > 500, "the load made only {} jobs", acknowledged.len());
        nothing_lost(&cluster, &acknowledged).await;
    });
}

#[test]
fn all_replicas_are_killed_at_once_under_load_and_resume_by_themselves() {
    block_on(async {
        let mut cluster = Cluster::start(3).await;
        let load = Load::start(&cluster.client(), 8);
        for _ in 0..3 {
            let before = load.count();
            while load.count() < before + 100 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            (0..3).for_each(|at| cluster.kill_replica(at));
            (0..3).for_each(|at| cluster.restart_replica(at));
            cluster.wait_for_leader().await;
        }
        let acknowledged = load.finish().await;
        nothing_lost(&cluster, &acknowledged).await;
    });
}

#[test]
fn a_stopped_leader_hands_over_and_exits_0() {
    block_on(async {
        let mut cluster = Cluster::start(3).await;
        let (leader, term) = cluster.wait_for_leader().await;
        let load = Load::start(&cluster.client(), 2);
        while load.count() < 20 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(cluster.stop_replica(leader), 0);
        let (next, next_term) = cluster.wait_for_leader().await;
        assert_ne!(next, leader);
        assert!(next_term > term);
        let before = load.count();
        while load.count() < before + 20 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let acknowledged = load.finish().await;
        nothing_lost(&cluster, &acknowledged).await;
    });
}

#[test]
fn one_request_id_is_one_job_from_every_replica_at_once_and_over_a_leader_change() {
    block_on(async {
        let mut cluster = Cluster::start(3).await;
        let request = |name: &str| v1::SubmitJobRequest {
            request_id: vec![7; 16].into(),
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
