//! When this replica leads: an office begins once the first entry of the leader's own term is applied here, so that its state holds
//! all that any leader before it acknowledged. The loops that only the leader runs live from one office to the next.

use std::time::Instant;

use openraft::ServerState;
use openraft::async_runtime::watch::WatchReceiver;
use tokio::sync::watch;

use crate::raft::Raft;
use crate::raft::machine::Shared;
use crate::raft::types::LeaderId;

/// One replica's leadership in one term.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Office {
    pub term: u64,
    pub(crate) leader: LeaderId,
    /// When it began here, by this machine's monotonic clock.
    pub started: Instant,
    /// Cluster time then, in ms.
    pub clock_at_start_ms: u64,
    /// Level of the commands that may be proposed.
    pub level: u16,
}

impl Office {
    /// Cluster time now, in ms: grows with this machine's monotonic clock, whatever the wall clocks say.
    pub fn clock_ms(&self) -> u64 {
        let since = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.clock_at_start_ms.saturating_add(since)
    }
}

/// Follows openraft and announces offices, until openraft stops.
pub async fn announce(raft: Raft, shared: std::sync::Arc<Shared>, office: watch::Sender<Option<Office>>) {
    // Not `metrics`, which tell of each entry.
    let mut metrics = raft.server_metrics();
    let mut applied = shared.applied();
    loop {
        let leader = {
            let metrics = metrics.borrow_and_update();
            let leads = metrics.state == ServerState::Leader && metrics.vote.committed;
            leads.then_some(metrics.vote.leader_id).filter(|leader| leader.node_id == *raft.node_id())
        };
        let in_office = applied.borrow_and_update().leader;
        office.send_if_modified(|office| {
            let next = match (leader, office.as_ref()) {
                (None, _) => None,
                (Some(leader), Some(now)) if now.leader == leader => return false,
                (Some(leader), _) if in_office == Some(leader) => Some(begin(leader, &shared)),
                (Some(_), _) => None,
            };
            let changed = *office != next;
            *office = next;
            changed
        });
        // What is applied later matters only to a leader that is not in office yet.
        let settled = office.borrow().is_some() || leader.is_none();
        let goes_on = tokio::select! {
            changed = metrics.changed() => changed.is_ok(),
            changed = applied.changed(), if !settled => changed.is_ok(),
        };
        if !goes_on {
            office.send_replace(None);
            return;
        }
    }
}

fn begin(leader: LeaderId, shared: &Shared) -> Office {
    let state = shared.state();
    Office {
        term: leader.term,
        leader,
        started: Instant::now(),
        clock_at_start_ms: state.meta.clock_ms,
        level: state.meta.level,
    }
}
