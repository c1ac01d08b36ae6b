//! A group of replicas in one process, on loopback, with real logs and images in temporary directories; and as much of the cluster's API as
//! a joining replica needs.

#![allow(dead_code)]

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use proto::v1::cluster_server::{Cluster, ClusterServer};
use proto::v1::{
    AddReplicaReply, AddReplicaRequest, ConfirmDeadReply, ConfirmDeadRequest, ListNodesReply, ListNodesRequest,
    ReplicaReply, ReplicaRequest, SetNodeAdminReply, SetNodeAdminRequest, StatusReply, StatusRequest,
};
use raft_node::door::ProposeError;
use raft_node::members::MemberError;
use raft_node::replica::{Mode, Options, Peer, Replica, StartError};
use statemachine::{Cmd, Command, Outcome, RequestId};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::prelude::*;

/// Patience for what takes milliseconds on a quiet machine.
pub const SOON: Duration = Duration::from_secs(30);

/// The cluster's API as far as joining goes.
#[derive(Clone)]
struct JoinApi(Replica);

#[tonic::async_trait]
impl Cluster for JoinApi {
    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusReply>, Status> {
        let reply =
            StatusReply { replica_id: self.0.id(), cluster_id: self.0.cluster().to_string(), ..Default::default() };
        Ok(Response::new(reply))
    }

    async fn add_replica(&self, request: Request<AddReplicaRequest>) -> Result<Response<AddReplicaReply>, Status> {
        let ask = request.into_inner();
        let peer = Peer { peer_addr: ask.peer_addr, api_addr: ask.api_addr };
        match self.0.add_learner(ask.replica_id, peer).await {
            Ok(_) => Ok(Response::new(AddReplicaReply { cluster_id: self.0.cluster().to_string(), members: vec![] })),
            Err(MemberError::NotLeader(hint)) => {
                Err(proto::error::not_leader(hint.as_ref().map(|(_, peer)| peer.api_addr.as_str())))
            }
            Err(err) => Err(Status::unavailable(err.to_string())),
        }
    }

    async fn promote_replica(&self, _: Request<ReplicaRequest>) -> Result<Response<ReplicaReply>, Status> {
        Err(Status::unimplemented("not part of joining"))
    }

    async fn remove_replica(&self, _: Request<ReplicaRequest>) -> Result<Response<ReplicaReply>, Status> {
        Err(Status::unimplemented("not part of joining"))
    }

    async fn transfer_leader(&self, _: Request<ReplicaRequest>) -> Result<Response<ReplicaReply>, Status> {
        Err(Status::unimplemented("not part of joining"))
    }

    async fn list_nodes(&self, _: Request<ListNodesRequest>) -> Result<Response<ListNodesReply>, Status> {
        Err(Status::unimplemented("not part of joining"))
    }

    async fn confirm_dead(&self, _: Request<ConfirmDeadRequest>) -> Result<Response<ConfirmDeadReply>, Status> {
        Err(Status::unimplemented("not part of joining"))
    }

    async fn set_node_admin(&self, _: Request<SetNodeAdminRequest>) -> Result<Response<SetNodeAdminReply>, Status> {
        Err(Status::unimplemented("not part of joining"))
    }
}

/// A place of the group: its directory and addresses stay, the replica in it comes and goes.
pub struct Place {
    pub dir: PathBuf,
    pub peer_addr: SocketAddr,
    /// What others reach it by; another one than `peer_addr` with a wire in between.
    pub advertise: Option<SocketAddr>,
    pub api_addr: SocketAddr,
    pub running: Option<Running>,
}

pub struct Running {
    pub replica: Replica,
    api: JoinHandle<()>,
}

pub struct Group {
    _root: TempDir,
    pub places: Vec<Place>,
    /// Entries between snapshots.
    pub snapshot_entries: u64,
}

/// A port that was free a moment ago, on an address that few others use: on 127.0.0.1, where connections come from, one of them may have
/// the port when a replica comes back to it.
pub async fn free_addr() -> SocketAddr {
    static NEXT: AtomicU8 = AtomicU8::new(2);
    let [_, _, high, low] = std::process::id().to_be_bytes();
    let own = Ipv4Addr::new(127, high, low, NEXT.fetch_add(1, Ordering::Relaxed).max(2));
    let listener = TcpListener::bind((own, 0)).await.expect("a free port");
    listener.local_addr().expect("bound")
}

impl Group {
    /// A founder and `others` that joined it, all of them voters.
    pub async fn of(size: usize) -> Self {
        Self::with(size, 50_000).await
    }

    pub async fn with(size: usize, snapshot_entries: u64) -> Self {
        init_tracing();
        let root = tempfile::tempdir().expect("a directory");
        let mut group = Self { _root: root, places: Vec::new(), snapshot_entries };
        for n in 0..size {
            group.add_place().await;
            let mode = if n == 0 { Mode::Bootstrap } else { group.join_mode(0) };
            group.start(n, mode).await.expect("starts");
        }
        group.wait_voters(size).await;
        group
    }

    pub async fn add_place(&mut self) -> usize {
        let n = self.places.len();
        let dir = self._root.path().join(format!("replica {n}"));
        let (peer_addr, api_addr) = (free_addr().await, free_addr().await);
        self.places.push(Place { dir, peer_addr, advertise: None, api_addr, running: None });
        n
    }

    pub fn join_mode(&self, through: usize) -> Mode {
        Mode::Join { addr: self.places[through].api_addr.to_string(), token: "secret".to_owned() }
    }

    pub fn options(&self, n: usize, mode: Mode) -> Options {
        let place = &self.places[n];
        let mut options =
            Options::new(place.dir.clone(), &place.peer_addr.to_string(), &place.api_addr.to_string(), mode);
        options.peer_advertise = place.advertise.map(|addr| addr.to_string());
        options.snapshot_entries = self.snapshot_entries;
        options.log.reserve_bytes = 1 << 20;
        options
    }

    pub async fn start(&mut self, n: usize, mode: Mode) -> Result<(), StartError> {
        let replica = Replica::start(self.options(n, mode)).await?;
        let listener = TcpListener::bind(self.places[n].api_addr).await.expect("the API's port is free");
        let service = ClusterServer::new(JoinApi(replica.clone()));
        let api = tokio::spawn(async move {
            let server = tonic::transport::Server::builder();
            let _ = server.serve_with_incoming(service, TcpListenerStream::new(listener)).await;
        });
        self.places[n].running = Some(Running { replica, api });
        Ok(())
    }

    pub fn replica(&self, n: usize) -> &Replica {
        &self.places[n].running.as_ref().expect("it runs").replica
    }

    pub fn running(&self) -> impl Iterator<Item = (usize, &Replica)> {
        let running = |(n, place): (usize, &'_ Place)| -> Option<usize> { place.running.as_ref().map(|_| n) };
        let numbers: Vec<usize> = self.places.iter().enumerate().filter_map(running).collect();
        numbers.into_iter().map(|n| (n, self.replica(n)))
    }

    /// SIGTERM.
    pub async fn stop(&mut self, n: usize) {
        let Running { replica, api } = self.places[n].running.take().expect("it runs");
        replica.shutdown().await;
        api.abort();
        let _ = api.await;
    }

    /// SIGKILL.
    pub async fn kill(&mut self, n: usize) {
        let Running { replica, api } = self.places[n].running.take().expect("it runs");
        replica.abort().await;
        api.abort();
        let _ = api.await;
    }

    pub async fn resume(&mut self, n: usize) {
        self.start(n, Mode::Resume).await.expect("it starts again");
    }

    /// The place of the replica that is in office, once there is one.
    pub async fn leader(&self) -> usize {
        let found = until(SOON, || self.running().find(|(_, replica)| replica.is_leader()).map(|(n, _)| n)).await;
        found.expect("a leader within time")
    }

    pub async fn wait_voters(&self, count: usize) {
        let all = until(SOON, || {
            let agree = self.running().all(|(_, replica)| {
                let members = replica.members();
                members.len() == count && members.iter().all(|member| member.voter)
            });
            agree.then_some(())
        });
        all.await.unwrap_or_else(|| {
            let members: Vec<_> = self.running().map(|(n, replica)| (n, replica.members())).collect();
            panic!("{count} voters within time: {members:#?}")
        });
    }

    /// Proposes through whoever leads until it is answered; the same request id each time.
    pub async fn open_session(&self, request: u64) -> Outcome {
        let began = Instant::now();
        loop {
            let leader = self.leader().await;
            match self.replica(leader).propose(session(request)).await {
                Ok((outcome, _)) => return outcome,
                Err(err) if began.elapsed() < SOON => {
                    assert!(!matches!(err, ProposeError::TooLarge { .. }), "{err}");
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                Err(err) => panic!("request {request}: {err}"),
            }
        }
    }

    /// Waits until all running replicas have applied the same entry, and compares their digests.
    pub async fn assert_equal(&self) {
        let same = until(SOON, || {
            let mut states: Vec<_> = self.running().map(|(n, replica)| (n, replica.state())).collect();
            let first = states.first()?.1.meta.applied;
            if states.iter().any(|(_, state)| state.meta.applied != first) {
                return None;
            }
            Some(states.iter_mut().map(|(n, state)| (*n, state.digest_from_scratch())).collect::<Vec<_>>())
        });
        let Some(digests) = same.await else {
            let at: Vec<_> = self.running().map(|(n, replica)| (n, replica.metrics())).collect();
            panic!("all at one index within time: {at:#?}");
        };
        assert!(digests.iter().all(|(_, digest)| *digest == digests[0].1), "digests differ: {digests:x?}");
    }

    pub async fn stop_all(mut self) {
        for n in 0..self.places.len() {
            if self.places[n].running.is_some() {
                self.stop(n).await;
            }
        }
    }
}

pub fn request_id(request: u64) -> RequestId {
    let mut id = [0u8; 16];
    id[8..].copy_from_slice(&request.to_be_bytes());
    RequestId(id)
}

/// A command with an effect that shows: one session a request.
pub fn session(request: u64) -> Cmd {
    Cmd {
        request: Some(request_id(request)),
        actor: "tests".to_owned(),
        body: Command::OpenSession { owner: format!("owner of {request}"), ttl_ms: 60_000 },
    }
}

pub async fn until<T>(limit: Duration, mut look: impl FnMut() -> Option<T>) -> Option<T> {
    let began = Instant::now();
    loop {
        if let Some(found) = look() {
            return Some(found);
        }
        if began.elapsed() > limit {
            return None;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A wire that a test can cut: what arrives at `addr` goes on to `to`.
pub struct Wire {
    pub addr: SocketAddr,
    cut: tokio::sync::watch::Sender<bool>,
    _task: JoinHandle<()>,
}

impl Wire {
    pub async fn to(to: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let addr = listener.local_addr().expect("bound");
        let (cut, is_cut) = tokio::sync::watch::channel(false);
        let task = tokio::spawn(async move {
            while let Ok((mut near, _)) = listener.accept().await {
                let mut is_cut = is_cut.clone();
                tokio::spawn(async move {
                    if *is_cut.borrow() {
                        return;
                    }
                    let Ok(mut far) = tokio::net::TcpStream::connect(to).await else { return };
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
                        _ = is_cut.wait_for(|cut| *cut) => {}
                    }
                });
            }
        });
        Self { addr, cut, _task: task }
    }

    pub fn cut(&self, cut: bool) {
        self.cut.send_replace(cut);
    }
}

fn init_tracing() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        if let Ok(wanted) = std::env::var("ARES_TEST_LOG") {
            let filter: Targets = wanted.parse().expect("ARES_TEST_LOG is a tracing filter");
            let _ = tracing_subscriber::registry().with(tracing_subscriber::fmt::layer()).with(filter).try_init();
        }
    });
}
