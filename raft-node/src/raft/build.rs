//! openraft's way to a new snapshot. History that can't be read stops neither the replica nor, for good, its snapshots: it is made whole
//! first, and while no copy is to be had the log stays as long as it is.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use openraft::storage::RaftSnapshotBuilder;

use super::machine::{Shared, Snapshot, SnapshotFiles, meta};
use super::types::TypeConfig;
use crate::runtime::blocking;

/// Between tries, while damaged history has no copy.
const RETRY: Duration = Duration::from_secs(10);

/// Writes a snapshot of the state as it is when the writing begins.
pub struct Builder {
    shared: Arc<Shared>,
}

impl Builder {
    pub fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }
}

impl RaftSnapshotBuilder<TypeConfig> for Builder {
    type SnapshotData = SnapshotFiles;

    async fn build_snapshot(&mut self) -> io::Result<Snapshot> {
        loop {
            let shared = self.shared.clone();
            let written = blocking(move || shared.when_there_is_room(|| shared.write_snapshot()));
            let error = match written.await.map_err(io::Error::other)? {
                Ok(files) => return Ok(Snapshot { meta: meta(&files.manifest)?, snapshot: files }),
                Err(error) => error,
            };
            let Some(bucket) = error.damaged_bucket() else { return Err(io::Error::other(error)) };
            tracing::warn!(%error, "a snapshot waits for damaged history");
            if let Err(why) = self.shared.mender.mend(bucket).await {
                tracing::error!(%error, %why, "no snapshot is made, and the log is not shortened, until this history is whole");
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}
