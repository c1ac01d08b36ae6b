//! Stories over links that are slow: each machine on a network of the test's own (root).

use jepsen_style_tests::cluster::{Cluster, Setup, USER, block_on, shell_job};
use jepsen_style_tests::network::{Link, Network};
use proto::v1;
use rand::distr::{Alphanumeric, SampleString};

/// Jobs that only wait, and the size of each one's command.
const JOBS: usize = 120;
const COMMAND: usize = 20_000;
const SLOW: Link = Link { loss: 0.0, delay: std::time::Duration::ZERO, rate: Some(64 << 10) };

#[test]
fn a_replica_joins_over_64_kib_a_second() {
    if let Err(why) = Network::available() {
        eprintln!("SKIPPED: no slow link, that needs root, ip and /dev/net/tun: {why}");
        return;
    }
    let replicas = ["r0", "r1", "r2"];
    // Before any thread is made that must be on it.
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
        let began = std::time::Instant::now();
        cluster.rejoin_replica(new).await.expect("it joins and votes");
        println!("joined after {:.1} s", began.elapsed().as_secs_f64());
        network.heal();
        cluster.try_settle().await.expect("all have all");
    });
}
