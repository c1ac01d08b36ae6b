//! History of this replica that was found damaged, on its way back: from the kept snapshots, else from the other replicas' rows. One
//! bucket at a time, and only while nothing else is mended. What makes a copy believable is `statemachine::storage::mend`'s.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, OnceLock, Weak};

use openraft::async_runtime::WatchReceiver;
use statemachine::storage::{self, Copies, Image, StorageError};
use statemachine::{JobId, State};
use tokio::runtime::Handle;
use tokio::sync::Mutex;
use tonic::Status;

use super::Raft;
use super::machine::Shared;
use super::network::Pool;
use super::service::HISTORY_JOBS;
use super::types::Peer;

/// Why damaged history stays so, for now.
#[derive(Debug, thiserror::Error)]
pub enum MendError {
    #[error(transparent)]
    Storage(#[from] StorageError),
    #[error("a snapshot is being installed")]
    Installing,
    #[error("{missing} rows are in no snapshot kept here, and no other replica gave them{}", .last.as_ref().map(|last| format!(" ({last})")).unwrap_or_default())]
    NoCopy { missing: usize, last: Option<String> },
    #[error("{0}")]
    Internal(String),
}

/// The replica's mender, for those whom it knows itself; it is gone when the replica is.
#[derive(Default)]
pub struct MenderOf(OnceLock<Weak<Inner>>);

impl MenderOf {
    pub fn set(&self, mender: &Mender) {
        // A replica has one.
        let _ = self.0.set(Arc::downgrade(&mender.0));
    }

    /// See [`Mender::mend`].
    pub async fn mend(&self, bucket: u32) -> Result<(), MendError> {
        match self.0.get().and_then(Weak::upgrade) {
            Some(inner) => Mender(inner).mend(bucket).await,
            None => Err(MendError::Internal("the replica is starting or stopping".to_owned())),
        }
    }
}

/// Mends history for whoever meets damage. Cloning shares it.
#[derive(Clone)]
pub struct Mender(Arc<Inner>);

pub struct Inner {
    me: u64,
    shared: Arc<Shared>,
    pool: Pool,
    raft: Raft,
    runtime: Handle,
    /// The second reader of one damage finds it mended.
    one: Mutex<()>,
}

impl Mender {
    /// On Raft's runtime: the other replicas are called from it.
    pub fn new(me: u64, shared: Arc<Shared>, pool: Pool, raft: Raft) -> Self {
        Self(Arc::new(Inner { me, shared, pool, raft, runtime: Handle::current(), one: Mutex::new(()) }))
    }

    /// Makes an hour of history whole.
    pub async fn mend(&self, bucket: u32) -> Result<(), MendError> {
        let this = self.clone();
        let mended = self.0.runtime.spawn(async move {
            let _one = this.0.one.lock().await;
            this.0.mend(bucket).await
        });
        mended.await.map_err(|error| MendError::Internal(error.to_string()))?
    }
}

impl Inner {
    async fn mend(&self, bucket: u32) -> Result<(), MendError> {
        let image = self.shared.image().ok_or(MendError::Installing)?;
        let state = self.shared.state();
        let damage = Damage { bucket, state, image };
        let (damage, missing) = damage.survey().await?;
        let dir = self.shared.dir().to_owned();
        let (mut copies, missing) = blocking(move || {
            let copies = storage::copies_in_snapshots(&dir, bucket, &missing)?;
            Ok((copies, missing))
        })
        .await?;
        let mut last = None;
        if copies.len() < missing.len() {
            for (id, peer) in self.others() {
                if let Err(status) = self.ask(id, &peer, &missing, &mut copies).await {
                    last = Some(format!("{}: {}", peer.peer_addr, status.message()));
                }
            }
        }
        if copies.len() < missing.len() {
            return Err(MendError::NoCopy { missing: missing.len() - copies.len(), last });
        }
        let rows = copies.len();
        blocking(move || damage.image.mend_history(&damage.state, bucket, &copies)).await?;
        tracing::warn!(bucket, rows, "damaged history of finished jobs was made whole from copies");
        Ok(())
    }

    /// Adds what a peer has of the rows that no one gave yet.
    async fn ask(&self, id: u64, peer: &Peer, missing: &BTreeSet<JobId>, copies: &mut Copies) -> Result<(), Status> {
        let wanted: Vec<u64> = missing.iter().filter(|job| !copies.contains_key(job)).map(|job| job.0).collect();
        for jobs in wanted.chunks(HISTORY_JOBS) {
            let mut rows = self.pool.fetch_history(id, peer, jobs.to_vec()).await?;
            while let Some(row) = rows.message().await? {
                if missing.contains(&JobId(row.job_id)) {
                    copies.insert(JobId(row.job_id), row.row.to_vec());
                }
            }
        }
        Ok(())
    }

    fn others(&self) -> BTreeMap<u64, Peer> {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        let nodes = metrics.membership_config.membership().nodes();
        nodes.filter(|(id, _)| **id != self.me).map(|(id, peer)| (*id, peer.clone())).collect()
    }
}

/// A bucket of which something can't be read.
struct Damage {
    bucket: u32,
    state: State,
    image: Arc<Image>,
}

impl Damage {
    async fn survey(self) -> Result<(Self, BTreeSet<JobId>), MendError> {
        blocking(move || {
            let missing = self.image.missing_history(&self.state, self.bucket)?;
            Ok((self, missing))
        })
        .await
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StorageError> + Send + 'static,
) -> Result<T, MendError> {
    let ran = crate::runtime::blocking(work).await;
    Ok(ran.map_err(|error| MendError::Internal(error.to_string()))??)
}
