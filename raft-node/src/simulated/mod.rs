//! A replica inside the Raft simulator: the very replica, started in the runtime of a simulated host, on the simulated network and on a
//! disk that becomes durable when the simulator says so. Which faults happen, and what is checked, is the simulator's.
//!
//! Only what a simulation can't have is replaced: sockets (`sockets`), threads (the log's by `disk`, the image's by a task, what blocks by
//! doing it at once). Clocks and random numbers are the process's own; the simulator stands in for them below this program.

pub mod disk;
pub(crate) mod sockets;

use std::path::{Path, PathBuf};

use openraft::ServerState;
use openraft::async_runtime::watch::WatchReceiver;

use crate::identity::{ClusterId, Home, Identity, IdentityError, LOG_DIR, Stage};
use crate::log::{EntryId, LogState, Vote};
use crate::raft::service;
use crate::replica::{Options, Replica, Rest, StartError};

/// The port on which simulated replicas talk.
pub const PORT: u16 = 7_400;

/// What a running replica consists of beside its handles: who drops it ends the replica at once.
pub struct Running(#[expect(dead_code, reason = "held until it is dropped")] Rest);

/// Makes the directory of a replica that founds a group of its own, or that waits to be taken in by one.
pub fn make(dir: &Path, cluster: [u8; 16], replica: u64, founds: bool) -> Result<(), IdentityError> {
    let stage = if founds { Stage::Founding } else { Stage::Joining };
    Home::lock(dir)?.write(&Identity { cluster: ClusterId(cluster), replica, stage })
}

/// Recovers what the directory holds and takes part, on this host of the simulation.
pub async fn start(options: Options) -> Result<(Replica, Running), StartError> {
    let (replica, rest) = crate::replica::start_here(options).await?;
    Ok((replica, Running(rest)))
}

/// Where a replica's log lies in its directory.
pub fn log_dir(dir: &Path) -> PathBuf {
    dir.join(LOG_DIR)
}

/// What a log holds at one index: comparable over replicas.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    pub id: EntryId,
    /// Of kind and data.
    pub hash: u64,
}

/// What only a simulator looks at.
impl Replica {
    /// The term that it leads, by its own opinion, whether in office yet or not.
    pub fn leads(&self) -> Option<u64> {
        let metrics = self.inner.raft.metrics();
        let metrics = metrics.borrow_watched();
        (metrics.state == ServerState::Leader).then_some(metrics.current_term)
    }

    /// Whether a change of the membership is half-way, as far as it knows.
    pub fn is_in_joint_state(&self) -> bool {
        let metrics = self.inner.raft.metrics();
        metrics.borrow_watched().membership_config.membership().get_joint_config().len() > 1
    }

    /// The vote that it would find after a restart.
    pub fn vote(&self) -> Option<Vote> {
        self.log().reader().vote()
    }

    pub fn log_state(&self) -> LogState {
        self.log().reader().state()
    }

    /// The last index that is durable here.
    pub fn durable(&self) -> Option<u64> {
        *self.log().durable_index().borrow()
    }

    /// The entry at `index`; `None` when it was purged, or is not there yet.
    pub fn written(&self, index: u64) -> Option<Written> {
        let record = self.log().reader().read(index..index + 1, usize::MAX).ok()?.pop()?;
        let hash = u64::from(crc32fast::hash(&record.data)) << 8 | u64::from(record.tag);
        Some(Written { id: record.id, hash })
    }

    /// Asks for a snapshot of what is applied now, as another replica would.
    pub async fn has_snapshot_of_now(&self) -> bool {
        let applied = self.applied().borrow().index;
        service::snapshot_of(self.raft(), self.shared(), applied).await.is_ok()
    }
}
