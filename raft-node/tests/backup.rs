//! Copies of a running group, and new groups that go on from them; and the judgement of all replicas at one entry.

mod support;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use proto::v1;
use proto::v1::audit_server::{Audit, AuditServer};
use proto::v1::cluster_server::ClusterServer;
use proto::v1::jobs_server::Jobs;
use proto::v1::peer_client::PeerClient;
use raft_node::api::Api;
use raft_node::backup::{self, BackupError, Restore};
use raft_node::identity::{ClusterId, Home, Identity, Stage};
use raft_node::leader::Board;
use raft_node::replica::{Mode, Options, Peer, Replica};
use statemachine::State;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::Request;

use support::{Group, SOON, free_addr, until};

const JOBS: u64 = 7;

fn api(replica: &Replica) -> Api {
    Api::new(replica.clone(), Board::default(), "secret")
}

async fn submit(api: &Api) -> u64 {
    let body = v1::Body { argv: vec!["true".to_owned()], ..Default::default() };
    let job = Some(v1::JobSpec { body: Some(body), ..Default::default() });
    let submit = v1::SubmitJobRequest { request_id: proto::request_id(), user: "u".into(), job };
    api.submit_job(Request::new(submit)).await.expect("accepted").into_inner().job_id
}

/// A copy as a client takes it, over the wire.
async fn save(replica: &Replica, path: &Path) -> Result<(), BackupError> {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let addr = listener.local_addr().expect("bound");
    let server = tonic::transport::Server::builder().add_service(AuditServer::new(api(replica)));
    let serving = tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    let identity = proto::Identity::new("", "secret").expect("plain text");
    let client = proto::Client::new(vec![addr.to_string()], identity);
    let parts = client.save_snapshot(v1::SaveSnapshotRequest {}).await.expect("the copy begins");
    let received = backup::receive(path, parts).await;
    serving.abort();
    received.map(drop)
}

async fn restore(
    path: PathBuf,
    dir: PathBuf,
    generation: Option<u32>,
) -> Result<(backup::Restored, Peer), BackupError> {
    let peer = Peer { peer_addr: free_addr().await.to_string(), api_addr: free_addr().await.to_string() };
    let theirs = peer.clone();
    let work = move || backup::restore(&Restore { backup: &path, dir: &dir, peer: theirs, generation });
    tokio::task::spawn_blocking(work).await.expect("ran").map(|restored| (restored, peer))
}

async fn start(dir: &Path, peer: &Peer) -> Replica {
    let mut options = Options::new(dir.to_owned(), &peer.peer_addr, &peer.api_addr, Mode::Resume);
    options.log.reserve_bytes = 1 << 20;
    let replica = Replica::start(options).await.expect("it starts");
    assert!(until(SOON, || replica.is_leader().then_some(())).await.is_some(), "alone, it leads");
    replica
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_becomes_a_new_generation_that_others_join() {
    let place = tempfile::tempdir().expect("a directory");
    let (copy, dir) = (place.path().join("copy"), place.path().join("new"));
    let group = Group::of(3).await;
    let leader = group.leader().await;
    let leading = api(group.replica(leader));
    for _ in 0..JOBS {
        submit(&leading).await;
    }
    // Any replica gives one, of all that was acknowledged.
    save(group.replica((leader + 1) % 3), &copy).await.expect("saved");
    assert!(matches!(save(group.replica(leader), &copy).await, Err(BackupError::Exists(_))));
    assert_eq!(std::fs::metadata(&copy).expect("there").permissions().mode() & 0o777, 0o700, "it holds environments");
    let behind = submit(&leading).await;
    let old: State = group.replica(leader).state();
    drop(leading);
    group.stop_all().await;

    let facts = backup::inspect(&copy).expect("whole");
    assert_eq!((facts.live_jobs, facts.generation), (JOBS as usize, 0));
    let (restored, peer) = restore(copy.clone(), dir.clone(), None).await.expect("restored");
    assert_eq!(restored.held_jobs, JOBS as usize);
    let again = restore(copy.clone(), dir.clone(), None).await;
    assert!(matches!(again, Err(BackupError::InUse { .. })), "a replica's directory is not restored into");
    let replica = start(&dir, &peer).await;
    assert_eq!(replica.cluster(), restored.identity.cluster);
    let new_job = submit(&api(&replica)).await;
    let state = replica.state();
    assert_eq!(state.generation(), restored.generation);
    assert!(
        state.meta.token > old.meta.token && new_job > behind && state.meta.rev > old.meta.rev,
        "nothing is named twice"
    );
    assert!(state.jobs.get(&statemachine::JobId(behind)).is_none(), "it was submitted behind the copy");
    state.check().expect("all invariants hold");

    // It is the same replica after a restart, and others join it by its snapshot.
    drop(state);
    replica.shutdown().await;
    drop(replica);
    let replica = start(&dir, &peer).await;
    let listener = tokio::net::TcpListener::bind(&peer.api_addr).await.expect("its own address");
    let server = tonic::transport::Server::builder().add_service(ClusterServer::new(api(&replica)));
    let serving = tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    let mode = Mode::Join { addr: peer.api_addr.clone(), token: "secret".into() };
    let (peer_addr, api_addr) = (free_addr().await.to_string(), free_addr().await.to_string());
    let mut options = Options::new(place.path().join("joined"), &peer_addr, &api_addr, mode);
    options.log.reserve_bytes = 1 << 20;
    let joined = Replica::start(options).await.expect("it joins");
    let same = || {
        (joined.state().jobs.len() == JOBS as usize + 1 && joined.members().iter().all(|member| member.voter))
            .then_some(())
    };
    assert!(until(SOON, same).await.is_some(), "{:?}", joined.members());
    assert_eq!(joined.state().generation(), restored.generation);
    serving.abort();
    joined.shutdown().await;
    replica.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_damaged_or_not_above_is_refused_and_leaves_no_replica() {
    let place = tempfile::tempdir().expect("a directory");
    let copy = place.path().join("copy");
    let group = Group::of(1).await;
    submit(&api(group.replica(group.leader().await))).await;
    save(group.replica(0), &copy).await.expect("saved");
    group.stop_all().await;

    let low = restore(copy.clone(), place.path().join("low"), Some(0)).await;
    assert!(matches!(&low, Err(BackupError::Refused(_))), "a generation is above the copy's");
    let (_, first) = restore(copy.clone(), place.path().join("first"), Some(9)).await.expect("restored");
    let replica = start(&place.path().join("first"), &first).await;
    // A copy of the new life, restored in its turn, is above it.
    save(&replica, &place.path().join("second copy")).await.expect("saved");
    replica.shutdown().await;
    let equal = restore(place.path().join("second copy"), place.path().join("second"), Some(9)).await;
    assert!(matches!(equal, Err(BackupError::Refused(_))));

    let live = copy.join("live");
    let mut bytes = std::fs::read(&live).expect("a file");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&live, bytes).expect("flipped");
    assert!(matches!(backup::inspect(&copy), Err(BackupError::Storage(_))));
    let target = place.path().join("damaged");
    assert!(matches!(restore(copy, target.clone(), None).await, Err(BackupError::Storage(_))));
    assert!(!target.exists(), "nothing was begun");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_are_judged_at_one_entry() {
    let group = Group::of(3).await;
    let leader = group.leader().await;
    let leading = api(group.replica(leader));
    submit(&leading).await;
    let request_id = proto::request_id();
    let mark = v1::MarkStateRequest { request_id: request_id.clone() };
    leading.mark_state(Request::new(mark)).await.expect("marked");
    // What comes behind the mark is not in the judgement.
    submit(&leading).await;
    let mut judged = Vec::new();
    for (_, replica) in group.running() {
        let verify = v1::VerifyStateRequest { request_id: request_id.clone() };
        judged.push(api(replica).verify_state(Request::new(verify)).await.expect("judged").into_inner());
    }
    for reply in &judged {
        assert_eq!((reply.index, &reply.digest, &reply.broken), (judged[0].index, &judged[0].digest, &String::new()));
        assert_eq!((&reply.running_digest, reply.jobs), (&reply.digest, 1));
    }
    drop(leading);
    group.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_without_a_state_gives_no_snapshot_and_goes_on() {
    let place = tempfile::tempdir().expect("a directory");
    let identity = Identity::new(ClusterId([7; 16]), Stage::Joining);
    Home::lock(place.path()).expect("locked").write(&identity).expect("written");
    let mut options = Options::new(place.path().to_owned(), "127.0.0.1:0", "localhost:1", Mode::Resume);
    options.log.reserve_bytes = 1 << 20;
    let replica = Replica::start(options).await.expect("it waits to be taken in");
    let mut client = PeerClient::connect(format!("http://{}", replica.peer().peer_addr)).await.expect("connected");
    let mut request = Request::new(v1::FetchSnapshotRequest { at_least: 0 });
    let whose = [("ares-cluster", identity.cluster.to_string()), ("ares-replica", identity.replica.to_string())];
    for (key, value) in whose {
        request.metadata_mut().insert(key, value.parse().expect("plain text"));
    }
    let refused = tokio::time::timeout(SOON, client.fetch_snapshot(request)).await.expect("answered");
    assert!(refused.is_err_and(|status| status.code() == tonic::Code::Unavailable));
    assert_eq!(*replica.failed().borrow(), None);
    replica.shutdown().await;
}
