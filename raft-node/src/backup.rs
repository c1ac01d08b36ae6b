//! Copies of a cluster: taken while it runs, and the way from such a copy to a new group of one replica, which others join. The new life
//! is a new generation: it mints no token, job id or revision of the old one (`statemachine`'s `apply::restore` has the whole rule).

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::Stream;
use proto::v1;
use serde::Serialize;
use statemachine::record::LogPosition;
use statemachine::storage::{self, NewLife, Snapshot, StorageError};
use statemachine::{Rejection, RequestId, State};
use tonic::{Status, Streaming};

use crate::door::wall_ms;
use crate::identity::{ClusterId, Home, Identity, IdentityError, LOG_DIR, Stage};
use crate::log::{Done, EntryId, Log, LogError, Options, Vote};
use crate::raft::mark::Marked;
use crate::raft::service;
use crate::raft::wire;
use crate::replica::{Peer, Replica};
use crate::server;

/// 2026-01-01, in Unix ms: generations count minutes from here.
const EPOCH_MS: i64 = 1_767_225_600_000;

impl Replica {
    /// This replica's state at a mark; see [`Mark::of`](crate::raft::mark::Mark::of).
    pub(crate) async fn marked(&self, request: RequestId, within: Duration) -> Option<Arc<Marked>> {
        self.shared().mark.of(request, within).await
    }

    /// A snapshot that holds entry `at_least`, as it crosses the wire.
    pub(crate) async fn snapshot_parts(
        &self,
        at_least: u64,
    ) -> Result<impl Stream<Item = v1::SnapshotPart> + Send + 'static, Status> {
        Ok(service::file_parts(service::snapshot_of(self.raft(), self.shared(), at_least).await?))
    }
}

#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    #[error("{} exists already: name a path where nothing is", .0.display())]
    Exists(PathBuf),
    #[error("{}: cannot {doing}: {source}", path.display())]
    Io { doing: &'static str, path: PathBuf, source: std::io::Error },
    #[error("the copy did not arrive whole: {}", .0.message())]
    Broken(Status),
    #[error(transparent)]
    Storage(#[from] StorageError),
    #[error("{} belongs to replica {replica} of cluster {cluster}: restore into a new directory", dir.display())]
    InUse { dir: PathBuf, cluster: ClusterId, replica: u64 },
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error("the backup breaks {0}: it is not restored")]
    Invalid(statemachine::Violation),
    #[error("{}", .0.detail)]
    Refused(Rejection),
    #[error(transparent)]
    Log(#[from] LogError),
    #[error("{0}")]
    Server(#[from] server::ServerError),
}

/// Receives a copy into `path`, which does not exist yet; it is there whole and durable, for its owner alone, or not at all.
pub async fn receive(path: &Path, parts: Streaming<v1::SnapshotPart>) -> Result<Snapshot, BackupError> {
    if path.exists() {
        return Err(BackupError::Exists(path.to_owned()));
    }
    let mut aside = path.as_os_str().to_owned();
    aside.push(".unfinished");
    let aside = PathBuf::from(aside);
    let received = service::receive_files(&aside, parts).await.map_err(BackupError::Broken);
    let moved = received.and_then(|files| {
        // It holds the environments of jobs.
        std::fs::set_permissions(files.dir(), Permissions::from_mode(0o700))
            .map_err(io_error("close to others", path))?;
        std::fs::rename(files.dir(), path).map_err(io_error("rename to", path))?;
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        std::fs::File::open(parent).and_then(|dir| dir.sync_all()).map_err(io_error("sync", parent))?;
        Ok(Snapshot::kept_at(path)?)
    });
    // The error to tell is the first one.
    let _ = std::fs::remove_dir_all(&aside);
    moved
}

/// What a copy holds.
#[derive(Debug, Serialize)]
pub struct Facts {
    /// Hex.
    pub cluster_id: String,
    pub generation: u32,
    /// Of the last entry in it.
    pub index: u64,
    pub term: u64,
    pub revision: u64,
    /// In decimal, as text: JSON numbers end at 2^53 for some readers.
    pub last_token: String,
    /// Of the last entry, Unix ms.
    pub wall_ms: i64,
    pub live_jobs: usize,
    /// Ended, but still in memory.
    pub ended_jobs: usize,
    /// Ended, on disk alone.
    pub history_jobs: u64,
    pub leases: usize,
    pub nodes: usize,
    pub tenants: usize,
    pub level: u16,
    /// Hex.
    pub digest: String,
    pub bytes: u64,
}

/// Every file compared with its checksum, the state with its digest and its invariants.
pub fn inspect(path: &Path) -> Result<Facts, BackupError> {
    let (backup, state) = verified(path)?;
    let live_jobs = state.jobs.iter().filter(|(_, job)| job.value.ended.is_none()).count();
    Ok(Facts {
        cluster_id: ClusterId(state.meta.cluster).to_string(),
        generation: state.generation(),
        index: backup.id.0.index,
        term: backup.id.0.term,
        revision: state.meta.rev.0,
        last_token: state.meta.token.to_string(),
        wall_ms: state.meta.wall_ms,
        live_jobs,
        ended_jobs: state.jobs.len() - live_jobs,
        history_jobs: state.buckets.iter().map(|(_, bucket)| bucket.rows).sum(),
        leases: state.leases.len(),
        nodes: state.nodes.len(),
        tenants: state.tenants.len(),
        level: state.meta.level,
        bytes: backup.size(),
        digest: backup.manifest.digest,
    })
}

fn verified(path: &Path) -> Result<(Snapshot, State), BackupError> {
    let backup = Snapshot::kept_at(path)?;
    backup.verify()?;
    let state = backup.load()?;
    state.check().map_err(BackupError::Invalid)?;
    Ok((backup, state))
}

/// Where a restored group's first replica is.
pub struct Restore<'a> {
    pub backup: &'a Path,
    /// New or empty.
    pub dir: &'a Path,
    /// Where the replica will listen.
    pub peer: Peer,
    /// `None`: minutes since 2026-01-01, or one above the backup's if that is more.
    pub generation: Option<u32>,
}

/// What came of it.
pub struct Restored {
    pub identity: Identity,
    pub generation: u32,
    /// Jobs that wait for what the old life may have started.
    pub held_jobs: usize,
    pub nodes: usize,
}

/// Makes the directory of a replica that is a group by itself. It is the replica's once its identity is written, which is the last step.
pub fn restore(wanted: &Restore) -> Result<Restored, BackupError> {
    let (backup, old) = verified(wanted.backup)?;
    let home = Home::lock(wanted.dir)?;
    if let Some(Identity { cluster, replica, .. }) = home.identity()? {
        return Err(BackupError::InUse { dir: wanted.dir.to_owned(), cluster, replica });
    }
    let identity = Identity::new(ClusterId(old.meta.cluster), Stage::Member);
    let last = backup.id.0;
    let position = LogPosition { term: last.term + 1, leader: identity.replica, index: last.index + 1 };
    let life = NewLife {
        generation: wanted.generation.unwrap_or_else(|| generation_after(&old)),
        position,
        membership: wire::sole_member(position, &wanted.peer),
        wall_ms: wall_ms(),
    };
    drop(old);
    let state = storage::renew(wanted.dir, &backup, &life)?.map_err(BackupError::Refused)?;
    begin_log(&wanted.dir.join(LOG_DIR), position)?;
    server::note_addresses(wanted.dir, &wanted.peer)?;
    home.write(&identity)?;
    let (generation, held_jobs, nodes) = (state.generation(), state.index.restoring.len(), state.nodes.len());
    Ok(Restored { identity, generation, held_jobs, nodes })
}

/// Minutes never repeat, so that even a second restore of one backup is a generation of its own.
fn generation_after(old: &State) -> u32 {
    let minutes = wall_ms().saturating_sub(EPOCH_MS) / 60_000;
    u32::try_from(minutes).unwrap_or(0).max(old.generation() + 1)
}

/// A log that begins behind the snapshot, and a vote that lets no earlier term come again.
fn begin_log(dir: &Path, position: LogPosition) -> Result<(), LogError> {
    let log = Log::open(dir, Options::default())?;
    let vote = Vote { term: position.term, node: position.leader, committed: false };
    durable(|done| log.save_vote(vote, done))?;
    let begins = EntryId { index: position.index, term: position.term, node: position.leader };
    durable(|done| log.purge(begins, done))
}

/// Waits for what the log's thread does.
fn durable(ask: impl FnOnce(Done) -> Result<(), LogError>) -> Result<(), LogError> {
    let (done, ended) = std::sync::mpsc::channel();
    ask(Box::new(move |result| drop(done.send(result))))?;
    ended.recv().map_err(|_| LogError::Stopped("its IO thread ended".into()))?
}

fn io_error(doing: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> BackupError {
    move |source| BackupError::Io { doing, path: path.to_owned(), source }
}
