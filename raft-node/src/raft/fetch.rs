//! The way back for a replica that lost its state, image and snapshots, but not its vote and log, which begins too late to make the
//! state anew: it asks the others for a snapshot, before it takes part in anything. Until it has one it runs no Raft: it gives no vote,
//! does not campaign and acknowledges nothing. Then it goes on from its own vote and log, so it never vouches for less than before.
//!
//! Which files were lost is `statemachine::storage`'s to find; how files cross the wire is `service`'s.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use statemachine::record::LogPosition;
use statemachine::storage::{self, Recovered, Source};

use super::machine::SnapshotFiles;
use super::network::Pool;
use super::service::receive_files;
use super::types::Peer;
use crate::replica::StartError;

/// Between rounds over the others.
const RETRY: Duration = Duration::from_secs(1);
/// How often it says that it still waits.
const REMIND: Duration = Duration::from_secs(10);

/// What was lost, and who may have it.
pub struct Lost<'a> {
    pub dir: &'a Path,
    /// The snapshot must reach to here, where the log begins.
    pub purged: LogPosition,
    /// The other replicas.
    pub others: BTreeMap<u64, Peer>,
}

/// Waits for a snapshot of another replica, as long as it takes, and makes it this one's state. An error when there is nobody to ask.
pub async fn from_others(lost: Lost<'_>, pool: &Pool) -> Result<Recovered, StartError> {
    if lost.others.is_empty() {
        return Err(StartError::StateLost { dir: lost.dir.to_owned(), purged: lost.purged.index });
    }
    let dir = lost.dir.to_owned();
    blocking(move || storage::set_snapshots_aside(&dir)).await??;
    let files = wait_for_files(&lost, pool).await;
    let dir = lost.dir.to_owned();
    let source = Source::Snapshot(files.id);
    let (state, image) = blocking(move || storage::install(&dir, &files)).await??;
    Ok(Recovered { state, image, source })
}

async fn wait_for_files(lost: &Lost<'_>, pool: &Pool) -> SnapshotFiles {
    let snapshots = storage::snapshots_dir(lost.dir);
    let mut said: Option<Instant> = None;
    loop {
        for (id, peer) in &lost.others {
            match fetch(pool, *id, peer, lost.purged.index, &snapshots).await {
                Ok(files) => {
                    tracing::info!(from = id, snapshot = %files.id, "the lost state is replaced by another replica's");
                    return files;
                }
                Err(status) => tracing::debug!(from = id, addr = peer.peer_addr, %status, "no snapshot"),
            }
        }
        if said.is_none_or(|said| said.elapsed() >= REMIND) {
            let others: Vec<&str> = lost.others.values().map(|peer| peer.peer_addr.as_str()).collect();
            tracing::error!(
                dir = %lost.dir.display(), purged = lost.purged.index, ?others,
                "image and snapshots are damaged or missing: this replica takes no part until another one gives it a snapshot"
            );
            said = Some(Instant::now());
        }
        tokio::time::sleep(RETRY).await;
    }
}

async fn fetch(
    pool: &Pool,
    id: u64,
    peer: &Peer,
    at_least: u64,
    snapshots: &Path,
) -> Result<SnapshotFiles, tonic::Status> {
    let parts = pool.fetch_snapshot(id, peer, at_least).await?;
    let files = receive_files(snapshots, parts).await?;
    if files.id.0.index < at_least {
        return Err(tonic::Status::data_loss(format!("snapshot {} ends before entry {at_least}", files.id)));
    }
    Ok(files)
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, StartError> {
    let ran = crate::runtime::blocking(work).await;
    ran.map_err(|err| StartError::Internal { doing: "take over a snapshot", what: err.to_string() })
}
