//! A whole scheduler replica as a process runs it: the replica, its API, the leader's loops, and their end in order.

use std::fs;
use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinHandle;

use crate::api::{self, Api, Served};
use crate::identity::{Home, IdentityError};
use crate::leader::{self, Board};
use crate::replica::{self, Peer, Replica, StartError};

const DEFAULT_LISTEN: &str = "127.0.0.1:7401";
const DEFAULT_PEER_LISTEN: &str = "127.0.0.1:7400";
/// Calls under way get this long at a stop.
const DRAIN: Duration = Duration::from_secs(1);
/// The cluster's secret for joins, in the replica's directory.
const TOKEN_FILE: &str = "join-token";
/// Where it listened last, in the replica's directory: the other replicas know these addresses.
const ADDRESS_FILE: &str = "addresses.json";
/// What clients and agents need, to be sourced by a shell.
const ENV_FILE: &str = "env";

/// How to run.
#[derive(Clone, Debug)]
pub struct Options {
    pub dir: PathBuf,
    pub mode: Mode,
    /// Needed to join; otherwise the directory has it.
    pub join_token: Option<String>,
    pub listen: Option<String>,
    pub peer_listen: Option<String>,
    /// Host under which others reach this replica.
    pub advertise: Option<String>,
    /// Allows addresses beyond loopback, in the clear.
    pub insecure: bool,
    /// A snapshot after so many entries of log; `None`: the default.
    pub snapshot_entries: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mode {
    Bootstrap,
    /// Any replicas of the group, `host:port`.
    Join(Vec<String>),
    Resume,
}

#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    #[error(transparent)]
    Start(#[from] StartError),
    #[error("{}: {what}", path.display())]
    File { path: PathBuf, what: String },
    #[error("listen address {addr}: {what}")]
    Listen { addr: String, what: String },
    #[error("this replica must stop: {0}")]
    Failed(String),
}

impl ServerError {
    /// What the person who reads it can do; empty where the text says it all.
    pub fn advice(&self) -> &'static str {
        match self {
            ServerError::Start(StartError::Join { .. }) => {
                "look whether the replica behind --join is up, and take the join token from its DIR/env"
            }
            _ => "",
        }
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Addresses {
    api: String,
    peer: String,
}

/// A running replica with its API.
pub struct Running {
    pub replica: Replica,
    pub join_token: String,
    /// Where clients reach it.
    pub api_addr: String,
    served: Served,
    leader: JoinHandle<()>,
}

/// Starts the replica and serves; returns once calls are answered, which may be before there is a leader.
pub async fn start(options: Options) -> Result<Running, ServerError> {
    let last = last_addresses(&options.dir)?;
    let listen = options.listen.clone().or(last.as_ref().map(|last| last.api.clone()));
    let bound = bind(listen.as_deref().unwrap_or(DEFAULT_LISTEN), &options).await;
    let (listener, api_addr) = bound.map_err(|error| unless_in_use(&options.dir, error))?;
    let peer_listen = options.peer_listen.clone().or(last.map(|last| last.peer));
    let peer_listen = peer_listen.unwrap_or_else(|| DEFAULT_PEER_LISTEN.to_owned());
    let token = match (&options.join_token, read_token(&options.dir)?) {
        (_, Some(kept)) => kept,
        (Some(given), None) => given.clone(),
        (None, None) => new_token(),
    };
    let replica = start_replica(&options, &peer_listen, &api_addr, &token).await?;
    keep_files(&options.dir, &replica, &token)?;

    let board = Board::default();
    let leader = tokio::spawn(leader::run(replica.clone(), board.clone()));
    let api = Api::new(replica.clone(), board, &token);
    let served = api::serve(listener, api).map_err(|error| listen_error(&api_addr, error))?;
    Ok(Running { replica, join_token: token, api_addr, served, leader })
}

/// A joining replica asks the given ones in turn.
async fn start_replica(options: &Options, peer_listen: &str, api: &str, token: &str) -> Result<Replica, ServerError> {
    let modes = match &options.mode {
        Mode::Bootstrap => vec![replica::Mode::Bootstrap],
        Mode::Resume => vec![replica::Mode::Resume],
        Mode::Join(servers) => {
            servers.iter().map(|addr| replica::Mode::Join { addr: addr.clone(), token: token.to_owned() }).collect()
        }
    };
    let mut failure = None;
    for mode in modes {
        let mut start = replica::Options::new(options.dir.clone(), peer_listen, api, mode);
        start.insecure = options.insecure;
        start.snapshot_entries = options.snapshot_entries.unwrap_or(start.snapshot_entries);
        start.peer_advertise = options.advertise.as_ref().map(|host| with_host(host, peer_listen));
        match Replica::start(start).await {
            Ok(replica) => return Ok(replica),
            Err(error @ StartError::Join { .. }) => failure = Some(error),
            Err(error) => return Err(error.into()),
        }
    }
    Err(failure.map_or_else(|| ServerError::Failed("no address to join was given".to_owned()), ServerError::Start))
}

impl Running {
    /// One line for whoever started the process.
    pub fn greeting(&self) -> String {
        format!(
            "replica {} of cluster {}: clients and agents at {}, replicas at {}",
            self.replica.id(),
            self.replica.cluster(),
            self.api_addr,
            self.replica.peer().peer_addr
        )
    }

    /// Serves until SIGTERM or Ctrl-C, then stops in order; a second signal stops at once. An error when the replica
    /// can't go on.
    pub async fn until_signal(self) -> Result<(), ServerError> {
        let mut terminate = signal(SignalKind::terminate()).map_err(|error| signal_error(&error))?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(|error| signal_error(&error))?;
        let mut failed = self.replica.failed();
        let failure = tokio::select! {
            _ = terminate.recv() => None,
            _ = interrupt.recv() => None,
            reason = failed.wait_for(Option::is_some) => reason.ok().and_then(|reason| reason.clone()),
        };
        tracing::info!("stopping: leadership is handed over, calls are drained");
        tokio::select! {
            () = self.stop() => {}
            _ = terminate.recv() => tracing::warn!("stopping at once"),
            _ = interrupt.recv() => tracing::warn!("stopping at once"),
        }
        failure.map_or(Ok(()), |reason| Err(ServerError::Failed(reason)))
    }

    /// Hands leadership over, lets calls end, writes the image.
    pub async fn stop(self) {
        if let Err(error) = self.replica.transfer(None).await {
            tracing::debug!(%error, "no leadership was handed over");
        }
        self.served.stop(DRAIN).await;
        self.replica.shutdown().await;
        self.leader.abort();
    }
}

async fn bind(addr: &str, options: &Options) -> Result<(TcpListener, String), ServerError> {
    let refused = |what: String| ServerError::Listen { addr: addr.to_owned(), what };
    let mut found = tokio::net::lookup_host(addr).await.map_err(|error| refused(error.to_string()))?;
    let socket: SocketAddr = found.next().ok_or_else(|| refused("it names no address".to_owned()))?;
    if !socket.ip().is_loopback() {
        if !options.insecure {
            let what = "it is beyond loopback, and nothing on it is encrypted: pass --insecure to allow it";
            return Err(refused(what.to_owned()));
        }
        tracing::warn!(%socket, "clients and agents talk in the clear on an address beyond loopback");
    }
    let listener = TcpListener::bind(socket).await.map_err(|error| match error.kind() {
        std::io::ErrorKind::AddrInUse => refused("another process has the port; port 0 takes a free one".to_owned()),
        _ => refused(error.to_string()),
    })?;
    let bound = listener.local_addr().map_err(|error| refused(error.to_string()))?.to_string();
    let advertised = options.advertise.as_ref().map_or_else(|| bound.clone(), |host| with_host(host, &bound));
    Ok((listener, advertised))
}

/// A replica that already runs in the directory also has its port: the directory is what to tell of.
fn unless_in_use(dir: &Path, error: ServerError) -> ServerError {
    match dir.is_dir().then(|| Home::lock(dir)) {
        Some(Err(in_use @ IdentityError::InUse(_))) => StartError::from(in_use).into(),
        _ => error,
    }
}

fn with_host(host: &str, addr: &str) -> String {
    let port = addr.rsplit_once(':').map(|(_, port)| port).unwrap_or_default();
    format!("{host}:{port}")
}

fn listen_error(addr: &str, error: std::io::Error) -> ServerError {
    ServerError::Listen { addr: addr.to_owned(), what: error.to_string() }
}

fn signal_error(error: &std::io::Error) -> ServerError {
    ServerError::Failed(format!("signals can't be received: {error}"))
}

// ------------------------------------------------------------------------------------------- files of the directory

fn last_addresses(dir: &Path) -> Result<Option<Addresses>, ServerError> {
    let path = dir.join(ADDRESS_FILE);
    match fs::read(&path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|error| file_error(&path, &error)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(file_error(&path, &error)),
    }
}

fn read_token(dir: &Path) -> Result<Option<String>, ServerError> {
    let path = dir.join(TOKEN_FILE);
    match fs::read_to_string(&path) {
        Ok(text) => Ok(Some(text.trim().to_owned())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(file_error(&path, &error)),
    }
}

/// 128 random bits in hex.
fn new_token() -> String {
    format!("{:032x}", rand::random::<u128>())
}

fn keep_files(dir: &Path, replica: &Replica, token: &str) -> Result<(), ServerError> {
    let peer = replica.peer();
    write_private(&dir.join(TOKEN_FILE), token.as_bytes())?;
    note_addresses(dir, peer)?;
    let env = format!(
        "export ARES_SERVER={}\nexport ARES_CLUSTER={}\nexport ARES_JOIN_TOKEN={token}\n",
        peer.api_addr,
        replica.cluster()
    );
    write_private(&dir.join(ENV_FILE), env.as_bytes())
}

/// Where the replica listens when nothing else is said at its start.
pub(crate) fn note_addresses(dir: &Path, peer: &Peer) -> Result<(), ServerError> {
    let addresses = Addresses { api: peer.api_addr.clone(), peer: peer.peer_addr.clone() };
    let addresses = serde_json::to_vec(&addresses).map_err(|error| file_error(dir, &error))?;
    write_private(&dir.join(ADDRESS_FILE), &addresses)
}

/// Whole or not at all, for the owner's eyes only.
fn write_private(path: &Path, bytes: &[u8]) -> Result<(), ServerError> {
    let aside = path.with_extension("new");
    let write = || {
        let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&aside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&aside, path)
    };
    write().map_err(|error: std::io::Error| file_error(path, &error))
}

fn file_error(path: &Path, error: &dyn std::fmt::Display) -> ServerError {
    ServerError::File { path: path.to_owned(), what: error.to_string() }
}
