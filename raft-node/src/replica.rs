//! One replica of the group: starts it, stops it, and is the handle that the APIs and the leader's loops work with. No type of openraft leaves
//! this handle. Changes of the membership are `members`'.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use proto::v1;
use proto::v1::peer_server::PeerServer;
use statemachine::storage::Image;
use statemachine::{Cmd, Outcome, State};
use tokio::runtime::{Handle, Runtime};
use tokio::sync::{oneshot, watch};

use crate::door::{self, Door, Obstacles, ProposeError};
use crate::identity::{ClusterId, Home, Identity, IdentityError, Stage};
use crate::log::storage::LogStore;
use crate::log::{self, Log};
use crate::office::{self, Office};
use crate::raft::Raft;
use crate::raft::image::Writer;
use crate::raft::machine::{Machine, Shared};
use crate::raft::mark::Mark;
use crate::raft::mend::{MendError, Mender};
use crate::raft::network::{MAX_MESSAGE, Network, Pool};
use crate::raft::service::PeerService;
use crate::raft::upkeep::Changes;
use crate::raft::{settings, upkeep};
use crate::read::{ReadError, Reads};
use crate::recovery;
use crate::runtime::{RuntimeGuard, end};
use crate::sockets::{self, TcpListener};

pub use crate::raft::machine::{Applied, Digest};
pub use crate::raft::types::Peer;

/// How long a stopping leader lets what is under way end.
const DRAIN: Duration = Duration::from_secs(1);
/// How long a stopping leader waits for its successor.
const HAND_OVER: Duration = Duration::from_secs(2);
/// How long a joining replica looks for the group.
const FIND_GROUP: Duration = Duration::from_secs(5);
/// Between tries of a joining replica to reach the group.
const JOIN_RETRY: Duration = Duration::from_millis(500);

/// How to start.
#[derive(Clone, Debug)]
pub struct Options {
    /// The replica's own directory.
    pub dir: PathBuf,
    /// Raft's own address, `host:port`; port 0 takes a free one.
    pub peer_listen: String,
    /// What others reach it by, where that differs from `peer_listen`.
    pub peer_advertise: Option<String>,
    /// Where this replica serves clients, as others reach it.
    pub api_addr: String,
    pub mode: Mode,
    /// Allows an address that is not loopback's.
    pub insecure: bool,
    /// A snapshot after so many entries.
    pub snapshot_entries: u64,
    pub log: log::Options,
}

impl Options {
    /// The defaults, for a replica in `dir`.
    pub fn new(dir: PathBuf, peer_listen: &str, api_addr: &str, mode: Mode) -> Self {
        Self {
            dir,
            peer_listen: peer_listen.to_owned(),
            peer_advertise: None,
            api_addr: api_addr.to_owned(),
            mode,
            insecure: false,
            snapshot_entries: settings::SNAPSHOT_ENTRIES,
            log: log::Options::default(),
        }
    }
}

/// Where the replica comes from.
#[derive(Clone, PartialEq, Eq)]
pub enum Mode {
    /// Founds a group of one in an empty directory. Refused in any other.
    Bootstrap,
    /// Asks the group behind `addr` (any replica's API) to take it in; the directory is empty, or this replica's own.
    Join { addr: String, token: String },
    /// Goes on from its directory.
    Resume,
}

impl fmt::Debug for Mode {
    /// Without the token: options end up in logs.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Mode::Bootstrap => f.write_str("Bootstrap"),
            Mode::Join { addr, .. } => f.debug_struct("Join").field("addr", addr).finish_non_exhaustive(),
            Mode::Resume => f.write_str("Resume"),
        }
    }
}

/// Why a replica did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error(transparent)]
    Log(#[from] log::LogError),
    #[error(transparent)]
    Storage(#[from] statemachine::storage::StorageError),
    #[error("peer address {addr}: {what}")]
    Listen { addr: String, what: String },
    #[error(
        "the log of replica {replica} in {} holds no entry, though the replica was a member: what it acknowledged is lost, and it could vote \
         for one that lacks it too. Keep the directory for inspection, remove the replica from the group, and let it join again with an \
         empty directory, as a new member",
        dir.display()
    )]
    LogLost { dir: PathBuf, replica: u64 },
    #[error(
        "neither the image nor a snapshot in {} is usable, and the log no longer begins at its first entry: it begins behind entry \
         {purged}. No other replica of the group is known that could give its state. If there is one, start with --join and its address; \
         else restore the directory from a backup. Nothing was changed",
        dir.display()
    )]
    StateLost { dir: PathBuf, purged: u64 },
    #[error("could not join through {addr}: {source}")]
    Join { addr: String, source: proto::Error },
    #[error("could not join through {addr}: {what}")]
    JoinAnswer { addr: String, what: String },
    #[error("{doing}: {what}")]
    Internal { doing: &'static str, what: String },
}

pub(crate) fn internal(doing: &'static str) -> impl FnOnce(String) -> StartError {
    move |what| StartError::Internal { doing, what }
}

/// A running replica. Clones are handles to the same one; it ends at once when the last is dropped.
#[derive(Clone)]
pub struct Replica {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    identity: Identity,
    peer: Peer,
    pub(crate) raft: Raft,
    shared: Arc<Shared>,
    log: Arc<Log>,
    door: Door,
    reads: Reads,
    pub(crate) changes: Changes,
    mender: Mender,
    office: watch::Receiver<Option<Office>>,
    disk_full: watch::Receiver<bool>,
    /// What ends with the replica; `None` once it has ended.
    parts: Mutex<Option<Parts>>,
}

struct Parts {
    /// Dropped before the runtime: its last cut needs no task.
    image_writer: Writer,
    stop_server: oneshot::Sender<()>,
    runtime: Runtime,
    home: Arc<Home>,
}

impl Replica {
    /// Recovers what the directory holds, starts to serve the other replicas, and takes part. Does not wait for a leader: see
    /// [`Replica::recovered`].
    pub async fn start(options: Options) -> Result<Self, StartError> {
        let (listener, peer) = listen(&options).await?;
        let (home, identity) = whose(&options).await?;
        let guard = RuntimeGuard::start().map_err(|err| internal("start Raft's runtime")(err.to_string()))?;
        let callers = Handle::current();
        let assembled =
            guard.handle().spawn(assemble(options.clone(), Arc::new(home), identity, peer, listener, callers));
        let assembled = assembled.await.map_err(|err| internal("start the replica")(err.to_string()))??;
        let replica = assembled.into_replica(guard.keep());
        if let Mode::Join { addr, token } = &options.mode {
            match replica.inner.identity.stage {
                Stage::Member => replica.announce_by_and_by(addr.clone(), token.clone()),
                Stage::Founding | Stage::Joining => {
                    join(&replica.introduction(), replica.cluster(), addr, token).await?
                }
            }
        }
        Ok(replica)
    }

    pub fn id(&self) -> u64 {
        self.inner.identity.replica
    }

    pub fn cluster(&self) -> ClusterId {
        self.inner.identity.cluster
    }

    /// Where this replica is reached.
    pub fn peer(&self) -> &Peer {
        &self.inner.peer
    }

    /// Proposes a command; see [`Door::propose`].
    pub async fn propose(&self, cmd: Cmd) -> Result<(Outcome, u64), ProposeError> {
        self.inner.door.propose(cmd).await
    }

    /// See [`Door::propose_in`].
    pub async fn propose_in(&self, cmd: Cmd, term: u64) -> Result<(Outcome, u64), ProposeError> {
        self.inner.door.propose_in(cmd, term).await
    }

    pub fn door(&self) -> &Door {
        &self.inner.door
    }

    /// See [`Reads::read_index`].
    pub async fn read_index(&self) -> Result<u64, ReadError> {
        self.inner.reads.read_index().await
    }

    pub fn reads(&self) -> &Reads {
        &self.inner.reads
    }

    /// A clone of the newest applied state: O(1). Stale unless a [`Replica::read_index`] came before.
    pub fn state(&self) -> State {
        self.inner.shared.state()
    }

    /// Reads the newest applied state where it lies, for microseconds: apply waits meanwhile. Nothing that applies, or asks this replica
    /// for its state, may be called in it.
    pub fn look<T>(&self, at: impl FnOnce(&State) -> T) -> T {
        self.inner.shared.look(at)
    }

    /// The image, for the history of jobs that left memory; `None` for the moment in which a snapshot replaces it. Do not keep it.
    pub fn image(&self) -> Option<Arc<Image>> {
        self.inner.shared.image()
    }

    /// Makes an hour of history whole that [`Replica::image`] could not read; see [`Mender::mend`].
    pub async fn mend_history(&self, bucket: u32) -> Result<(), MendError> {
        self.inner.mender.mend(bucket).await
    }

    /// Fires after each batch that was applied.
    pub fn applied(&self) -> watch::Receiver<Applied> {
        self.inner.shared.applied()
    }

    /// The newest digest published: at each multiple of 4,096 entries.
    pub fn digest(&self) -> watch::Receiver<Option<Digest>> {
        self.inner.shared.digest()
    }

    /// Some reason once this replica must stop: an entry that it can't apply, a disk that fails, a log that is gone.
    pub fn failed(&self) -> watch::Receiver<Option<String>> {
        self.inner.shared.failed()
    }

    /// This replica's office while it leads; fires when one begins and when it ends.
    pub fn leadership(&self) -> watch::Receiver<Option<Office>> {
        self.inner.office.clone()
    }

    /// Whether it leads and its state holds all that earlier leaders acknowledged.
    pub fn is_leader(&self) -> bool {
        self.inner.office.borrow().is_some()
    }

    /// The leader that it knows of, if that is another one.
    pub fn leader_hint(&self) -> Option<(u64, Peer)> {
        door::leader_hint(&self.inner.raft)
    }

    /// Waits until this replica has applied all that the group had committed when it came back.
    pub async fn recovered(&self, within: Duration) -> Result<(), ReadError> {
        match self.inner.raft.wait_for_recovery(Some(within)).await {
            Ok(_) => Ok(()),
            Err(openraft::metrics::WaitError::ShuttingDown) => Err(ReadError::Stopped),
            Err(openraft::metrics::WaitError::Timeout(..)) => Err(ReadError::NoLeader),
        }
    }

    pub(crate) fn disk_full(&self) -> bool {
        *self.inner.disk_full.borrow()
    }

    pub(crate) fn shared(&self) -> &Shared {
        &self.inner.shared
    }

    #[cfg(feature = "simulated")]
    pub(crate) fn log(&self) -> &Log {
        &self.inner.log
    }

    pub(crate) fn raft(&self) -> &Raft {
        &self.inner.raft
    }

    /// Hands leadership over, lets what is under way end, writes the image, and stops. Other handles see a stopped replica.
    pub async fn shutdown(&self) {
        let Some(parts) = self.take_parts() else { return };
        self.inner.door.close(DRAIN).await;
        if let Err(err) = tokio::time::timeout(HAND_OVER, self.transfer(None)).await.unwrap_or(Ok(())) {
            tracing::debug!(%err, "no leadership was handed over");
        }
        let Parts { image_writer, stop_server, runtime, home } = parts;
        // The log stops waiting for a full disk: nothing of it was acknowledged.
        self.inner.log.give_up_waiting();
        let raft = self.inner.raft.clone();
        let stopped = runtime.spawn(async move { raft.shutdown().await.is_ok() });
        if !stopped.await.unwrap_or(false) {
            tracing::warn!("Raft's core did not end in order");
        }
        let _ = stop_server.send(());
        end(move || {
            image_writer.finish();
            runtime.shutdown_timeout(HAND_OVER);
            drop(home);
        })
        .await;
    }

    /// Stops at once, as if the process were killed: nothing is handed over, nothing is written any more. For tests of what survives.
    pub async fn abort(&self) {
        let Some(Parts { image_writer, stop_server, runtime, home }) = self.take_parts() else { return };
        end(move || {
            drop(image_writer);
            drop(stop_server);
            runtime.shutdown_timeout(HAND_OVER);
            drop(home);
        })
        .await;
    }

    fn take_parts(&self) -> Option<Parts> {
        self.inner.parts.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn introduction(&self) -> v1::AddReplicaRequest {
        v1::AddReplicaRequest {
            replica_id: self.id(),
            peer_addr: self.peer().peer_addr.clone(),
            api_addr: self.peer().api_addr.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }

    /// A member takes part without asking; only its addresses may be new to the group, and the group may need this very replica to have
    /// a leader that could note them.
    fn announce_by_and_by(&self, addr: String, token: String) {
        let (introduction, cluster) = (self.introduction(), self.cluster());
        let announce = async move {
            while let Err(err) = join(&introduction, cluster, &addr, &token).await {
                tracing::debug!(%err, "the group does not answer yet");
                tokio::time::sleep(JOIN_RETRY).await;
            }
        };
        if let Some(parts) = &*self.inner.parts.lock().unwrap_or_else(PoisonError::into_inner) {
            drop(parts.runtime.spawn(announce));
        }
    }
}

/// Asks the group to take this replica in: it is a learner then, and becomes a voter by itself. Again for a member: its addresses are noted.
async fn join(
    introduction: &v1::AddReplicaRequest,
    cluster: ClusterId,
    addr: &str,
    token: &str,
) -> Result<(), StartError> {
    let client = group(addr, &cluster.to_string(), token)?;
    let reply = client.add_replica(introduction.clone()).await;
    let reply = reply.map_err(|source| StartError::Join { addr: addr.to_owned(), source })?;
    if reply.cluster_id != cluster.to_string() {
        let what = format!("it is cluster {}, this directory's is {cluster}", reply.cluster_id);
        return Err(StartError::JoinAnswer { addr: addr.to_owned(), what });
    }
    Ok(())
}

impl Drop for Inner {
    fn drop(&mut self) {
        let parts = self.parts.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(Parts { image_writer, stop_server, runtime, home }) = parts {
            drop(stop_server);
            runtime.shutdown_background();
            // Joining the image's thread may wait for a disk; whoever drops the last handle must not.
            std::thread::spawn(move || {
                drop(image_writer);
                drop(home);
            });
        }
    }
}

// -------------------------------------------------------------------------------------------------------------- start

/// Binds Raft's own port; what others reach it by.
async fn listen(options: &Options) -> Result<(TcpListener, Peer), StartError> {
    let refused = |what: String| StartError::Listen { addr: options.peer_listen.clone(), what };
    let mut addrs = tokio::net::lookup_host(&options.peer_listen).await.map_err(|err| refused(err.to_string()))?;
    let addr: SocketAddr = addrs.next().ok_or_else(|| refused("it names no address".to_owned()))?;
    if !addr.ip().is_loopback() {
        if !options.insecure {
            return Err(refused(
                "it is not loopback's, and nothing on it is encrypted: pass --insecure to allow it".to_owned(),
            ));
        }
        tracing::warn!(%addr, "replicas talk in the clear on an address that is not loopback's");
    }
    let listener = TcpListener::bind(addr).await.map_err(|err| refused(err.to_string()))?;
    let bound = listener.local_addr().map_err(|err| refused(err.to_string()))?;
    let peer_addr = options.peer_advertise.clone().unwrap_or_else(|| bound.to_string());
    Ok((listener, Peer { peer_addr, api_addr: options.api_addr.clone() }))
}

/// Locks the directory and finds out who this replica is, or makes it someone new.
async fn whose(options: &Options) -> Result<(Home, Identity), StartError> {
    let home = Home::lock(&options.dir)?;
    let found = home.identity()?;
    let path = || options.dir.clone();
    let identity = match (&options.mode, found) {
        (Mode::Resume, Some(identity)) => identity,
        (Mode::Resume, None) => return Err(IdentityError::Nobodys(path()).into()),
        (Mode::Bootstrap, Some(Identity { cluster, replica, .. })) => {
            return Err(IdentityError::Founded { path: path(), cluster, replica }.into());
        }
        (Mode::Bootstrap, None) => {
            let identity = Identity::new(ClusterId(rand::random()), Stage::Founding);
            home.write(&identity)?;
            identity
        }
        (Mode::Join { addr, token }, Some(identity)) => {
            match cluster_behind(addr, token).await {
                Ok(wanted) if wanted != identity.cluster => {
                    return Err(IdentityError::Foreign { path: path(), found: identity.cluster, wanted }.into());
                }
                Ok(_) => {}
                // All replicas may be starting at once: a member goes on from its directory.
                Err(err) if identity.stage == Stage::Member => {
                    tracing::warn!(%err, "this member starts without the group's answer")
                }
                Err(err) => return Err(err),
            }
            identity
        }
        (Mode::Join { addr, token }, None) => {
            let identity = Identity::new(cluster_behind(addr, token).await?, Stage::Joining);
            home.write(&identity)?;
            identity
        }
    };
    Ok((home, identity))
}

pub(crate) fn group(addr: &str, cluster: &str, token: &str) -> Result<proto::Client, StartError> {
    let failed = |source| StartError::Join { addr: addr.to_owned(), source };
    let identity = proto::Identity::new(cluster, token).map_err(failed)?;
    Ok(proto::Client::new(vec![addr.to_owned()], identity))
}

/// The id of the group that a joining replica was pointed at.
async fn cluster_behind(addr: &str, token: &str) -> Result<ClusterId, StartError> {
    let client = group(addr, "", token)?.with_patience(proto::Patience { call: FIND_GROUP, attempt: FIND_GROUP });
    let status = client.status(v1::StatusRequest {}).await;
    let status = status.map_err(|source| StartError::Join { addr: addr.to_owned(), source })?;
    status.cluster_id.parse().map_err(|what| StartError::JoinAnswer { addr: addr.to_owned(), what })
}

/// What runs on Raft's runtime, before the runtime joins it.
struct Assembled {
    home: Arc<Home>,
    identity: Identity,
    peer: Peer,
    raft: Raft,
    shared: Arc<Shared>,
    log: Arc<Log>,
    door: Door,
    reads: Reads,
    changes: Changes,
    mender: Mender,
    office: watch::Receiver<Option<Office>>,
    disk_full: watch::Receiver<bool>,
    image_writer: Writer,
    stop_server: oneshot::Sender<()>,
}

/// What must live as long as the replica and is no handle to it.
pub(crate) struct Rest {
    pub(crate) image_writer: Writer,
    pub(crate) stop_server: oneshot::Sender<()>,
    pub(crate) home: Arc<Home>,
}

impl Assembled {
    fn into_replica(self, runtime: Runtime) -> Replica {
        self.split(|Rest { image_writer, stop_server, home }| Some(Parts { image_writer, stop_server, runtime, home }))
    }

    fn split(self, parts: impl FnOnce(Rest) -> Option<Parts>) -> Replica {
        let Assembled {
            home,
            identity,
            peer,
            raft,
            shared,
            log,
            door,
            reads,
            changes,
            mender,
            office,
            disk_full,
            image_writer,
            stop_server,
        } = self;
        let parts = Mutex::new(parts(Rest { image_writer, stop_server, home }));
        Replica {
            inner: Arc::new(Inner {
                identity,
                peer,
                raft,
                shared,
                log,
                door,
                reads,
                changes,
                mender,
                office,
                disk_full,
                parts,
            }),
        }
    }
}

/// A replica in the runtime of the caller, who keeps the rest of it: dropping both ends it as a power cut does.
#[cfg(feature = "simulated")]
pub(crate) async fn start_here(options: Options) -> Result<(Replica, Rest), StartError> {
    let (listener, peer) = listen(&options).await?;
    let (home, identity) = whose(&options).await?;
    let assembled = assemble(options, Arc::new(home), identity, peer, listener, Handle::current()).await?;
    let mut kept = None;
    let replica = assembled.split(|rest| {
        kept = Some(rest);
        None
    });
    Ok((replica, kept.expect("handed over by the line before")))
}

/// Builds the replica from its directory, in the order of recovery, and starts its tasks. Runs on Raft's runtime; `callers` is that of
/// those who propose.
async fn assemble(
    options: Options,
    home: Arc<Home>,
    identity: Identity,
    peer: Peer,
    listener: TcpListener,
    callers: Handle,
) -> Result<Assembled, StartError> {
    let cluster = identity.cluster.to_string();
    let pool = Pool::new(identity.replica, &cluster);
    let (log, shared) = recovery::recover(&options, &home, identity, &pool).await?;
    let raft = start_raft(&options, identity, &pool, &log, &shared).await?;
    let office = start_office(&raft, &shared);
    let reads = Reads::new(shared.applied());
    let disk_full = start_disk_watch(&log, &shared);
    let obstacles = Obstacles { image_behind: shared.image_behind(), disk_full: disk_full.clone() };
    let (door, packer) = Door::new(raft.clone(), office.clone(), obstacles);

    // Where those who propose are woken: an entry's answer crosses from Raft's runtime to theirs once, not once per command.
    drop(callers.spawn(packer.run()));
    tokio::spawn(reads.clone().serve(raft.clone(), pool.clone()));
    let mender = Mender::new(identity.replica, shared.clone(), pool, raft.clone());
    shared.mender.set(&mender);
    start_upkeep(&raft, &shared, &disk_full);
    tokio::spawn(upkeep::note_members(raft.clone(), home.clone()));
    tokio::spawn(upkeep::note_membership(raft.clone(), home.clone(), identity, log.durable_index()));
    let changes = Changes::new(raft.clone());
    tokio::spawn(changes.clone().look_after_members());
    let image_writer = Writer::start(shared.clone(), log.durable_index())
        .map_err(|err| internal("start the image's thread")(err.to_string()))?;
    let service = PeerService {
        raft: raft.clone(),
        reads: reads.clone(),
        replica: identity.replica.to_string(),
        cluster,
        shared: shared.clone(),
    };
    let stop_server = start_server(service, listener);
    if identity.stage == Stage::Founding {
        found(&raft, identity, &peer).await?;
    }
    Ok(Assembled {
        home,
        identity,
        peer,
        raft,
        shared,
        log,
        door,
        reads,
        changes,
        mender,
        office,
        disk_full,
        image_writer,
        stop_server,
    })
}

async fn start_raft(
    options: &Options,
    identity: Identity,
    pool: &Pool,
    log: &Arc<Log>,
    shared: &Arc<Shared>,
) -> Result<Raft, StartError> {
    let config = settings::config(&identity.cluster.to_string(), options.snapshot_entries)
        .map_err(|err| internal("configure Raft")(err.to_string()))?;
    let network = Network::new(pool.clone(), log.reader());
    let store = LogStore::new(log.clone());
    let machine = Machine::new(shared.clone());
    let raft = Raft::new(identity.replica, Arc::new(config), network, store, machine)
        .await
        .map_err(|err| internal("start Raft")(err.to_string()))?;
    settings::assert_safe(raft.config());
    Ok(raft)
}

fn start_office(raft: &Raft, shared: &Arc<Shared>) -> watch::Receiver<Option<Office>> {
    let (sender, office) = watch::channel(None);
    tokio::spawn(office::announce(raft.clone(), shared.clone(), sender));
    office
}

fn start_disk_watch(log: &Arc<Log>, shared: &Arc<Shared>) -> watch::Receiver<bool> {
    let (sender, full) = watch::channel(false);
    tokio::spawn(upkeep::watch_disk(log.disk_full(), shared.short_of_room(), sender));
    full
}

fn start_upkeep(raft: &Raft, shared: &Arc<Shared>, disk_full: &watch::Receiver<bool>) {
    tokio::spawn(Mark::let_go(shared.clone()));
    tokio::spawn(upkeep::keep_log_short(raft.clone(), shared.clone()));
    tokio::spawn(upkeep::leave_office_when_full(raft.clone(), disk_full.clone()));
    tokio::spawn(upkeep::report_death(raft.clone(), shared.clone()));
    tokio::spawn(upkeep::stop_when_failed(raft.clone(), shared.clone()));
}

fn start_server(service: PeerService, listener: TcpListener) -> oneshot::Sender<()> {
    let (stop, stopped) = oneshot::channel::<()>();
    let service =
        PeerServer::new(service).max_decoding_message_size(MAX_MESSAGE).max_encoding_message_size(MAX_MESSAGE);
    let server = tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(5)))
        .http2_keepalive_timeout(Some(sockets::KEEP_ALIVE_WITHIN))
        .initial_stream_window_size(8 << 20)
        .initial_connection_window_size(16 << 20);
    tokio::spawn(async move {
        let serve = server.serve_with_incoming(service, sockets::incoming(listener));
        tokio::select! {
            served = serve => if let Err(err) = served { tracing::error!(%err, "the peer server ended") },
            _ = stopped => {}
        }
    });
    stop
}

/// Writes the group's first entry. A start that was cut off before it does so again.
async fn found(raft: &Raft, identity: Identity, peer: &Peer) -> Result<(), StartError> {
    let failed = |err: String| internal("found the group")(err);
    if raft.is_initialized().await.map_err(|err| failed(err.to_string()))? {
        return Ok(());
    }
    let members = BTreeMap::from([(identity.replica, peer.clone())]);
    raft.initialize(members).await.map_err(|err| failed(err.to_string()))
}
