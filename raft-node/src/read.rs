//! Linearizable reads: an index that a read must have applied. Many readers share one question to the group: a *round*. A reader is
//! only ever served by a round that began after it asked, because heartbeat acknowledgements rely on that (a deposed leader must not
//! extend a lease by an older round's answer).

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use openraft::ReadPolicy;
use openraft::async_runtime::watch::WatchReceiver;
use openraft::errors::{LinearizableReadError, RaftError};
use planted::{Bug, planted};
use tokio::sync::{Notify, oneshot, watch};

use crate::raft::Raft;
use crate::raft::machine::Applied;
use crate::raft::network::Pool;
use crate::raft::types::Peer;

/// How long a reader waits for a round and for apply to come to its index.
const PATIENCE: Duration = Duration::from_secs(3);
/// Readers that may wait at once: each costs ~100 bytes.
const WAITING: usize = 65_536;

/// Why a read can't be answered now. Nothing was changed; another replica may know better.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    #[error("no leader is known right now")]
    NoLeader,
    #[error("the leader got no answer from a majority of the replicas")]
    NoQuorum,
    #[error("this replica is {behind} entries behind the group after {} s", PATIENCE.as_secs())]
    Behind { behind: u64 },
    #[error("{WAITING} reads wait already")]
    Busy,
    #[error("this replica stops")]
    Stopped,
}

type Waiter = oneshot::Sender<Result<u64, ReadError>>;

/// Reads of one replica. Cloning shares the rounds.
#[derive(Clone)]
pub struct Reads {
    /// Served by this replica's leader, whoever it is.
    anywhere: Arc<Queue>,
    /// Served only while this replica leads: what others ask of it.
    here: Arc<Queue>,
    applied: watch::Receiver<Applied>,
}

#[derive(Default)]
struct Queue {
    waiting: Mutex<Vec<Waiter>>,
    wake: Notify,
}

impl Queue {
    async fn ask(&self) -> Result<u64, ReadError> {
        let (answer, answered) = oneshot::channel();
        {
            let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            if waiting.len() >= WAITING {
                return Err(ReadError::Busy);
            }
            waiting.push(answer);
        }
        self.wake.notify_one();
        match tokio::time::timeout(PATIENCE, answered).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(ReadError::Stopped),
            Err(_) => Err(ReadError::NoQuorum),
        }
    }

    /// Serves round after round, one at a time, until the task is dropped.
    async fn serve<F, Fut>(&self, round: F)
    where
        F: Fn() -> Fut,
        Fut: Future<Output = Result<u64, ReadError>>,
    {
        loop {
            self.wake.notified().await;
            let served = std::mem::take(&mut *self.waiting.lock().unwrap_or_else(PoisonError::into_inner));
            if served.is_empty() {
                continue;
            }
            // All of `served` asked before this line: the round begins after each of them.
            let answer = round().await;
            for waiter in served {
                let _ = waiter.send(answer.clone());
            }
        }
    }
}

impl Reads {
    /// Readers may ask at once; [`Reads::serve`] answers them.
    pub fn new(applied: watch::Receiver<Applied>) -> Self {
        Self { anywhere: Arc::default(), here: Arc::default(), applied }
    }

    /// Serves until dropped.
    pub async fn serve(self, raft: Raft, pool: Pool) {
        let leader_round = || leader_round(&raft);
        let any_round = || any_round(&raft, &pool);
        futures::future::join(self.here.serve(leader_round), self.anywhere.serve(any_round)).await;
    }

    /// Waits until this replica's state holds everything that was acknowledged before the call; returns the index that it waited for.
    /// Its quorum check began after the call.
    pub async fn read_index(&self) -> Result<u64, ReadError> {
        if !behind_quorum_check() {
            return Ok(self.applied.borrow().index);
        }
        let index = self.anywhere.ask().await?;
        self.wait_applied(index).await?;
        Ok(index)
    }

    /// The leader's half of another replica's read: an index, for the asker to wait for.
    pub async fn leader_index(&self) -> Result<u64, ReadError> {
        self.here.ask().await
    }

    /// Waits until the state holds the entry at `index`.
    pub async fn wait_applied(&self, index: u64) -> Result<(), ReadError> {
        let mut applied = self.applied.clone();
        match tokio::time::timeout(PATIENCE, applied.wait_for(|applied| applied.has(index))).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(ReadError::Stopped),
            Err(_) => Err(ReadError::Behind { behind: index.saturating_sub(self.applied.borrow().index) }),
        }
    }
}

/// Whether a linearizable read waits for a quorum: always.
pub fn behind_quorum_check() -> bool {
    !planted(Bug::ReadWithoutQuorum)
}

/// One quorum check of this replica as the leader.
async fn leader_round(raft: &Raft) -> Result<u64, ReadError> {
    match raft.get_read_linearizer(ReadPolicy::ReadIndex).await {
        Ok(linearizer) => Ok(linearizer.read_log_id().index()),
        Err(RaftError::APIError(LinearizableReadError::ForwardToLeader(_))) => Err(ReadError::NoLeader),
        Err(RaftError::APIError(LinearizableReadError::QuorumNotEnough(_))) => Err(ReadError::NoQuorum),
        Err(RaftError::Fatal(_)) => Err(ReadError::Stopped),
    }
}

/// One question to the leader, which may be this replica.
async fn any_round(raft: &Raft, pool: &Pool) -> Result<u64, ReadError> {
    let (leader, peer): (u64, Option<Peer>) = {
        let metrics = raft.metrics();
        let metrics = metrics.borrow_watched();
        let leader = metrics.current_leader.ok_or(ReadError::NoLeader)?;
        (leader, metrics.membership_config.membership().get_node(&leader).cloned())
    };
    if leader == *raft.node_id() {
        return leader_round(raft).await;
    }
    let peer = peer.ok_or(ReadError::NoLeader)?;
    pool.read_index(leader, &peer).await.map_err(|status| {
        tracing::debug!(%status, leader, "the leader gave no read index");
        ReadError::NoQuorum
    })
}
