//! Who belongs to a group, and who must not.

use std::time::{Duration, Instant};

use jepsen_style_tests::checks::{self, Digests};
use jepsen_style_tests::cluster::{Cluster, SOON, Setup, USER, block_on, shell_job};
use jepsen_style_tests::load::Load;
use jepsen_style_tests::network::{Link, Network};
use jepsen_style_tests::process;
use proto::v1;
use rand::distr::{Alphanumeric, SampleString};

fn server(dir: &std::path::Path, flags: &[&str]) -> (i32, String) {
    let dir = dir.to_str().expect("a plain path");
    let listen = ["--listen", "127.0.0.1:0", "--peer-listen", "127.0.0.1:0"];
    let output = process::run(&[&["server", "--dir", dir], &listen[..], flags].concat(), SOON);
    (output.status.code().unwrap_or(-1), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn a_replica_behind_a_purged_log_catches_up_by_snapshot() {
    block_on(async {
        let flags = ["--snapshot-entries", "60"].map(str::to_owned).to_vec();
        let mut cluster = Cluster::with(Setup { flags, ..Setup::of(3) }).await.expect("it starts");
        let (leader, _) = cluster.wait_for_leader().await;
        let behind = (leader + 1) % 3;
        let had = cluster.status(behind).await.expect("it answers").last_log_index;
        cluster.kill_replica(behind);
        let load = Load::start(&cluster.client(), 2);
        // The log is purged below the snapshot and the image: what the dead replica needs is gone.
        cluster
            .until("the log that it lacks is purged", async |cluster| {
                cluster.status(leader).await.is_ok_and(|status| status.purged_index > had)
            })
            .await;
        cluster.restart_replica(behind);
        load.more(50, SOON).await.expect("it goes on");
        let acks = load.finish().await;
        cluster
            .until("it has a snapshot, and all that came after it", async |cluster| {
                let (Ok(back), Ok(leads)) = (cluster.status(behind).await, cluster.status(leader).await) else {
                    return false;
                };
                back.snapshot_index > had && back.applied_index == leads.applied_index
            })
            .await;
        checks::nothing_lost(&cluster, &acks).await.expect("nothing is lost");
        checks::replicas_equal(&cluster, &mut Digests::default()).await.expect("the replicas are equal");
    });
}

#[test]
fn a_removal_that_would_lose_the_quorum_is_refused_and_another_is_made() {
    block_on(async {
        let mut cluster = Cluster::start(3).await;
        let (leader, _) = cluster.wait_for_leader().await;
        let ids = ids(&cluster).await;
        let (dead, alive) = ((leader + 1) % 3, (leader + 2) % 3);
        cluster.kill_replica(dead);
        // The leader notices within a second; until then it counts as alive, and a removal is safe all the same.
        tokio::time::sleep(Duration::from_secs(2)).await;
        let (code, _, error) = cluster.ares(&["cluster", "remove", &ids[alive].to_string()]);
        assert_eq!(code, 5, "{error}");
        assert!(error.contains("no quorum") && error.contains("MEMBERSHIP_REFUSED"), "{error}");
        let status = cluster.status(leader).await.expect("it answers");
        assert_eq!(status.members.iter().filter(|member| member.voter).count(), 3, "nothing changed");

        let (code, _, error) = cluster.ares(&["cluster", "remove", &ids[dead].to_string()]);
        assert_eq!(code, 0, "{error}");
        cluster
            .until("the dead one is out", async |cluster| {
                cluster.status(leader).await.is_ok_and(|status| status.members.len() == 2)
            })
            .await;
        let load = Load::start(&cluster.client(), 2);
        load.more(10, SOON).await.expect("two go on");
        checks::nothing_lost(&cluster, &load.finish().await).await.expect("nothing is lost");

        let (code, _, error) = cluster.ares(&["cluster", "remove", "12345"]);
        assert!(code != 0 && error.contains("12345"), "{error}");
    });
}

async fn ids(cluster: &Cluster) -> Vec<u64> {
    let mut ids = Vec::new();
    for at in cluster.running_replicas() {
        ids.push(cluster.status(at).await.expect("it answers").replica_id);
    }
    ids
}

#[test]
fn the_last_replica_is_not_removed() {
    block_on(async {
        let cluster = Cluster::start(1).await;
        let id = ids(&cluster).await[0].to_string();
        let (code, _, error) = cluster.ares(&["cluster", "remove", &id]);
        assert_eq!(code, 5, "{error}");
        assert!(error.contains("only voter"), "{error}");
    });
}

#[test]
fn a_group_is_founded_once_and_another_groups_directory_is_refused() {
    block_on(async {
        let mut cluster = Cluster::start(1).await;
        let other = Cluster::start(1).await;
        let dir = cluster.replica_dir(0);
        let load = Load::start(&cluster.client(), 1);
        load.more(5, SOON).await.expect("it runs");
        let acks = load.finish().await;

        let (code, error) = server(&dir, &["--bootstrap"]);
        assert!(code != 0 && error.contains("in use"), "while it runs: {error}");
        assert_eq!(cluster.stop_replica(0).expect("it ends"), 0);
        let (code, error) = server(&dir, &["--bootstrap"]);
        assert!(code == 5 && error.contains("a group is founded once"), "{error}");

        // It would answer for one group with the other's data.
        let token = std::fs::read_to_string(other.replica_dir(0).join("join-token")).expect("it has one");
        let (code, error) = server(&dir, &["--join", &other.addresses[0], "--join-token", token.trim()]);
        assert!(code == 5 && error.contains("belongs to cluster"), "{error}");

        cluster.restart_replica(0);
        cluster.wait_for_leader().await;
        checks::nothing_lost(&cluster, &acks).await.expect("the refusals changed nothing");
    });
}

#[test]
fn a_directory_without_its_identity_or_without_its_log_is_refused() {
    block_on(async {
        let mut cluster = Cluster::start(1).await;
        assert_eq!(cluster.stop_replica(0).expect("it ends"), 0);
        let dir = cluster.replica_dir(0);
        let identity = std::fs::read(dir.join("IDENTITY")).expect("it has one");
        std::fs::remove_file(dir.join("IDENTITY")).expect("removed");
        let (code, error) = cluster.restart_and_end(0).expect("it ends");
        assert!(code == 5 && error.contains("IDENTITY"), "{error}");
        std::fs::write(dir.join("IDENTITY"), identity).expect("written back");

        std::fs::rename(dir.join("log"), dir.join("log-aside")).expect("moved");
        let (code, error) = cluster.restart_and_end(0).expect("it ends");
        assert!(
            code == 1 && error.contains("holds no entry") && error.contains("join again"),
            "never silently empty: {error}"
        );
        let _ = std::fs::remove_dir_all(dir.join("log"));
        std::fs::rename(dir.join("log-aside"), dir.join("log")).expect("moved back");
        cluster.restart_replica(0);
        cluster.wait_for_leader().await;
    });
}

/// Jobs that only wait, and the size of each one's command.
const JOBS: usize = 120;
const COMMAND: usize = 20_000;
const SLOW: Link = Link { loss: 0.0, delay: Duration::ZERO, rate: Some(64 << 10) };

#[test]
fn a_replica_joins_over_64_kib_a_second() {
    if let Err(why) = Network::available() {
        eprintln!("SKIPPED: no slow link, that needs root, ip and /dev/net/tun: {why}");
        return;
    }
    let replicas = ["r0", "r1", "r2"];
    // Before this test makes threads that must be on it.
    let network = Network::make(&replicas, 1).expect("a network");
    block_on(async {
        let setup = Setup { network: Some(network.clone()), ..Setup::of(replicas.len()) };
        let mut cluster = Cluster::with(setup).await.expect("a cluster");
        for _ in 0..JOBS {
            // What can't be made smaller on its way.
            let noise = Alphanumeric.sample_string(&mut rand::rng(), COMMAND);
            let job = v1::JobSpec { hold: true, ..shell_job(&noise) };
            let request = v1::SubmitJobRequest { request_id: proto::request_id(), job: Some(job), user: USER.into() };
            cluster.client().submit_job(request).await.expect("it is accepted");
        }
        let (leader, _) = cluster.wait_for_leader().await;
        let new = (leader + 1) % replicas.len();
        cluster.kill_replica(new);
        cluster.remove_replica(new).await.expect("it is removed");
        network.set(&replicas, &replicas, &SLOW);
        let began = Instant::now();
        cluster.rejoin_replica(new).await.expect("it joins and votes");
        println!("joined after {:.1} s", began.elapsed().as_secs_f64());
        network.heal();
        cluster.try_settle().await.expect("all have all");
    });
}
