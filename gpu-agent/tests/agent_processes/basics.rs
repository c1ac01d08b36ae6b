//! Starting and ending: one rank, several, their environment, faults of a launch, rights.

use std::time::{Duration, Instant};

use proto::v1::report_item::What;
use proto::v1::{self, DesiredLease};

use crate::leader::{Leader, lease, said};
use crate::site::{Site, follow, is_root};
use crate::tests;

tests![
    a_one_rank_job_starts_ends_and_is_reported,
    ranks_of_one_node_find_each_other_by_their_environment,
    output_is_followed_from_the_agents_own_port,
    the_jobs_faults_and_the_nodes_are_told_apart,
    root_jobs_are_refused_unless_allowed,
    a_job_runs_as_the_user_that_the_agent_names,
    two_nodes_wait_at_the_barrier_and_start_together,
    a_gang_that_is_ended_behind_the_barrier_never_starts,
    old_attempts_are_removed_and_never_started_again,
    many_attempts_of_one_set_start_together,
    a_simulated_machine_registers_its_model_and_reports_its_faults,
    ranks_are_pinned_on_a_real_machine,
    a_second_agent_on_the_same_directory_is_refused,
];

async fn a_one_rank_job_starts_ends_and_is_reported() {
    let leader = Leader::start().await;
    let mut site = Site::new("n1");
    site.start(&leader.addr);
    let registered = leader.registered(1).await;
    let machine = registered.machine.unwrap();
    assert_eq!((machine.name.as_str(), machine.machine_id.len()), ("n1", 16));
    assert!(!registered.fence_new);

    let began = Instant::now();
    leader.grant("n1", lease(11), &["sh", "-c", "echo hello; exit 3"]);
    let exits = leader.exits(11).await;
    println!("    granted to exit reported: {} ms", began.elapsed().as_millis());
    assert_eq!(exits.len(), 1);
    assert_eq!((exits[0].exit.as_ref().unwrap().code, exits[0].cause.as_str()), (3, "OWN"));
    assert!(leader.started(11).await >= 29_500);
    assert_eq!(site.log(11, 0), "hello\n");
    // The fence knows it for as long as the leader may ask.
    let again = leader.state().registrations.len();
    assert_eq!(again, 1);
}

async fn ranks_of_one_node_find_each_other_by_their_environment() {
    let leader = Leader::start().await;
    let mut site = Site::new("n1");
    site.start(&leader.addr);
    let gang = DesiredLease {
        ranks: 2,
        world_size: 2,
        gpus_per_rank: 1,
        gpu_uuids: vec!["GPU-a".into(), "GPU-b".into()],
        ..lease(12)
    };
    let script = "echo $RANK/$WORLD_SIZE $CUDA_VISIBLE_DEVICES $MASTER_ADDR:$MASTER_PORT $ARES_FENCING_TOKEN; pwd";
    leader.grant("n1", gang, &["sh", "-c", script]);
    let exits = leader.exits(12).await;
    assert!(exits.iter().all(|exit| exit.exit.as_ref().unwrap().code == 0), "{exits:?}");
    let port = leader.started(12).await;
    let work = site.dir.path().canonicalize().unwrap().join("attempts/12/work");
    let work = work.display();
    assert_eq!(site.log(12, 0), format!("0/2 GPU-a,GPU-b 127.0.0.1:{port} 12\n{work}\n"));
    assert_eq!(site.log(12, 1), format!("1/2 GPU-a,GPU-b 127.0.0.1:{port} 12\n{work}\n"));
}

async fn output_is_followed_from_the_agents_own_port() {
    let leader = Leader::start().await;
    let mut site = Site::new("n1");
    site.start(&leader.addr);
    let address = leader.registered(1).await.machine.unwrap().address;
    leader.grant("n1", lease(13), &["sh", "-c", "echo one; sleep 0.3; echo two >&2; sleep 0.3; printf three"]);
    let began = Instant::now();
    assert_eq!(follow(&address, 13, 0).await, "one\ntwo\nthree");
    assert!(began.elapsed() > Duration::from_millis(500), "it was followed while it ran");
    let gone = v1::agent_logs_client::AgentLogsClient::connect(format!("http://{address}")).await.unwrap();
    let request = v1::ReadLogRequest { token: 99, ..Default::default() };
    let refused = gone.clone().read_log(request).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::NotFound);
    let tail = v1::ReadLogRequest { token: 13, tail_bytes: 5, ..Default::default() };
    let mut stream = gone.clone().read_log(tail).await.unwrap().into_inner();
    assert_eq!(&stream.message().await.unwrap().unwrap().data[..], b"three");
}

async fn the_jobs_faults_and_the_nodes_are_told_apart() {
    let leader = Leader::start().await;
    let mut site = Site::new("n1");
    site.start(&leader.addr);
    leader.registered(1).await;
    let argv = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    let body = |job_id, words: &[&str]| v1::JobBody { job_id, argv: argv(words), ..Default::default() };
    let cases = [
        (body(21, &["no-such-command-anywhere"]), "not found"),
        (body(22, &["/etc/passwd"]), "can't be executed"),
        (v1::JobBody { cwd: "/no/such/dir".into(), ..body(23, &["true"]) }, "/no/such/dir"),
        (v1::JobBody { env: [("A=B".to_owned(), "c".to_owned())].into(), ..body(24, &["true"]) }, "A=B"),
        (body(25, &[]), "empty"),
    ];
    for (body, text) in cases {
        let token = body.job_id;
        leader.set_body(body);
        leader.grant("n1", lease(token), &[]);
        let failed = leader.failure(token).await;
        assert!(!failed.node_fault && failed.why.contains(text), "{token}: {failed:?}");
        leader
            .until("Released", |state| said(state, token).find(|what| matches!(what, What::Released(_))).cloned())
            .await;
    }
    // A directory of attempts in which nothing can be made is the node's fault.
    std::fs::rename(site.dir.path().join("attempts"), site.dir.path().join("gone")).unwrap();
    leader.grant("n1", lease(26), &["true"]);
    let failed = leader.failure(26).await;
    assert!(failed.node_fault, "{failed:?}");
}

async fn root_jobs_are_refused_unless_allowed() {
    if !is_root() {
        eprintln!("SKIPPED: root_jobs_are_refused_unless_allowed: needs root");
        return;
    }
    let leader = Leader::start().await;
    let mut site = Site::with("n1", &[]);
    site.start(&leader.addr);
    leader.grant("n1", lease(31), &["true"]);
    let failed = leader.failure(31).await;
    assert!(failed.node_fault && failed.why.contains("--allow-root-jobs"), "{failed:?}");
}

async fn a_job_runs_as_the_user_that_the_agent_names() {
    if !is_root() {
        eprintln!("SKIPPED: a_job_runs_as_the_user_that_the_agent_names: needs root");
        return;
    }
    let leader = Leader::start().await;
    let mut site = Site::with("n1", &["as=nobody"]);
    site.start(&leader.addr);
    leader.grant("n1", lease(32), &["sh", "-c", "id -un; touch here && ls; echo err >> /dev/stderr"]);
    let exits = leader.exits(32).await;
    assert_eq!(site.log(32, 0), "nobody\nhere\nerr\n");
    assert_eq!(exits[0].exit.as_ref().unwrap().code, 0);
}

fn half(token: u64, node_rank: u32) -> DesiredLease {
    DesiredLease { ranks: 1, world_size: 2, nodes: 2, node_rank, first_rank: node_rank, go: false, ..lease(token) }
}

async fn prepared(leader: &Leader, token: u64) -> Vec<u32> {
    leader
        .until("two Prepared", |state| {
            let ports: Vec<u32> = said(state, token)
                .filter_map(|what| match what {
                    What::Prepared(prepared) => Some(prepared.port),
                    _ => None,
                })
                .collect();
            (ports.len() == 2).then_some(ports)
        })
        .await
}

async fn two_nodes_wait_at_the_barrier_and_start_together() {
    let leader = Leader::start().await;
    let (mut a, mut b) = (Site::new("a"), Site::new("b"));
    a.start(&leader.addr);
    b.start(&leader.addr);
    let script = ["sh", "-c", "echo $RANK of $WORLD_SIZE at $MASTER_ADDR:$MASTER_PORT $JAX_COORDINATOR_ADDRESS"];
    leader.grant("a", half(41, 0), &script);
    leader.grant("b", half(41, 1), &script);
    let ports = prepared(&leader, 41).await;
    let port = *ports.iter().find(|port| **port != 0).unwrap();
    assert!(ports.contains(&0), "rank 0's agent alone reserves a port: {ports:?}");
    assert!(std::net::TcpListener::bind(("0.0.0.0", port as u16)).is_err(), "the port is reserved");
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(a.log(41, 0) + &b.log(41, 1), "", "nothing runs behind the barrier");
    for node in ["a", "b"] {
        leader.change(node, |leases| {
            leases[0].go = true;
            leases[0].master_addr = "127.0.0.1".into();
            leases[0].master_port = port;
        });
    }
    let both = |state: &crate::leader::State| {
        let exits = said(state, 41).filter(|what| matches!(what, What::Exited(exited) if exited.released)).count();
        (exits == 2).then_some(())
    };
    leader.until("both exits", both).await;
    assert_eq!(a.log(41, 0), format!("0 of 2 at 127.0.0.1:{port} 127.0.0.1:{port}\n"));
    assert_eq!(b.log(41, 1), format!("1 of 2 at 127.0.0.1:{port} 127.0.0.1:{port}\n"));
}

async fn a_gang_that_is_ended_behind_the_barrier_never_starts() {
    let leader = Leader::start().await;
    let mut a = Site::new("a");
    a.start(&leader.addr);
    leader.grant("a", half(42, 0), &["sh", "-c", "echo ran"]);
    leader.until("Prepared", |state| said(state, 42).next().cloned()).await;
    leader.change("a", |leases| leases[0].stop = "LAUNCH".into());
    leader.until("Released", |state| said(state, 42).find(|what| matches!(what, What::Released(_))).cloned()).await;
    leader.change("a", |leases| {
        leases[0].stop.clear();
        leases[0].go = true;
    });
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(a.log(42, 0), "");
}

async fn old_attempts_are_removed_and_never_started_again() {
    let leader = Leader::start().await;
    let mut site = Site::with("n1", &["root", "keep2"]);
    site.start(&leader.addr);
    for token in 51..=55 {
        leader.grant("n1", lease(token), &["true"]);
        leader.exits(token).await;
    }
    crate::site::until("old attempts are removed", || !site.rank_dir(51, 0).exists()).await;
    assert!(site.rank_dir(55, 0).exists());
    // Another agent on the same directory, whose memory of ends is gone with the records.
    site.kill_agent();
    leader.state().reports.clear();
    site.start(&leader.addr);
    let failed = leader.failure(51).await;
    assert!(failed.node_fault && failed.why.contains("not above"), "{failed:?}");
}

async fn many_attempts_of_one_set_start_together() {
    const MANY: u64 = 40;
    let leader = Leader::start().await;
    let mut site = Site::new("n1");
    site.start(&leader.addr);
    leader.registered(1).await;
    let began = Instant::now();
    for token in 61..61 + MANY {
        leader.grant("n1", lease(token), &["true"]);
    }
    for token in 61..61 + MANY {
        assert_eq!(leader.exits(token).await[0].exit.as_ref().unwrap().code, 0);
    }
    let took = began.elapsed();
    println!("    {MANY} attempts in {} ms", took.as_millis());
}

async fn a_simulated_machine_registers_its_model_and_reports_its_faults() {
    let leader = Leader::start().await;
    let mut site = Site::with("n1", &["root", "gpus=sim:hgx-h100"]);
    site.start(&leader.addr);
    let machine = leader.registered(1).await.machine.unwrap();
    assert!(machine.simulated);
    assert_eq!((machine.gpus.len(), machine.gpus[0].r#type.as_str()), (8, "h100"));
    assert!(machine.links.unwrap().nvswitch);
    leader.until("a heartbeat", |state| (state.heartbeats > 0).then_some(())).await;
    say(&site, r#"{"do":"xid","gpu":2,"code":48}"#);
    let fact = leader.until("a fact", |state| state.health.first().cloned()).await;
    assert_eq!((fact.slot, fact.xid, fact.health.as_str(), fact.end_lease), (2, 48, "QUARANTINED", true));
    assert_eq!(fact.gpu_uuid, machine.gpus[2].uuid);
    // The machine is the same one over restarts of its agent.
    site.kill_agent();
    site.start(&leader.addr);
    let again = leader.registered(2).await.machine.unwrap();
    assert_eq!(again.gpus[2].uuid, machine.gpus[2].uuid);
}

fn say(site: &Site, line: &str) {
    use std::io::{BufRead, BufReader, Write};
    let socket = site.dir.path().join(gpu_agent::discovery::control::SOCKET);
    let mut stream = std::os::unix::net::UnixStream::connect(socket).unwrap();
    writeln!(stream, "{line}").unwrap();
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).unwrap();
    assert_eq!(answer, "ok\n");
}

async fn ranks_are_pinned_on_a_real_machine() {
    let leader = Leader::start().await;
    let mut site = Site::new("n1");
    site.start(&leader.addr);
    let machine = leader.registered(1).await.machine.unwrap();
    if machine.cores_by_numa.iter().sum::<u32>() < 2 {
        eprintln!("SKIPPED: ranks_are_pinned_on_a_real_machine: needs two CPUs");
        return;
    }
    let mut one = vec![0; machine.cores_by_numa.len()];
    one[machine.cores_by_numa.iter().position(|cores| *cores > 0).unwrap()] = 1;
    leader.grant("n1", DesiredLease { cores_by_numa: one, ..lease(71) }, &["sh", "-c", "nproc"]);
    leader.exits(71).await;
    assert_eq!(site.log(71, 0), "1\n");
}

async fn a_second_agent_on_the_same_directory_is_refused() {
    let leader = Leader::start().await;
    let mut site = Site::new("n1");
    site.start(&leader.addr);
    leader.registered(1).await;
    let second = std::process::Command::new("/proc/self/exe")
        .args([crate::site::AGENT, &leader.addr, "n2"])
        .arg(site.dir.path())
        .output()
        .unwrap();
    assert_eq!(second.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&second.stderr).contains("InUse"), "{second:?}");
}
