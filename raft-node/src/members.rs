//! Who belongs to the group, as this replica sees it, and the changes to it that only the leader makes.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use openraft::async_runtime::watch::WatchReceiver;
use openraft::errors::{ClientWriteError, RaftError};
use openraft::{ChangeMembers, Instant, RaftMetrics, ServerState};

use crate::door;
use crate::raft::types::{Peer, TypeConfig};
use crate::raft::upkeep::{self, ChangeError};
use crate::replica::{Digest, Replica};

/// How long a handed-over leadership may take.
const TRANSFER: Duration = Duration::from_secs(2);

/// One replica of the group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    pub id: u64,
    pub peer: Peer,
    /// Counts in every quorum: a learner that is catching up does not, and neither does who enters or leaves until the change is done. Until
    /// then the voters from before it decide by themselves, and one of two that dies stops the group.
    pub voter: bool,
    /// Leader's view of how much of the log it has; 0 on others.
    pub matched_index: u64,
    /// Leader's view of how long ago it answered, in ms; `None` on others, and when it never did.
    pub heard_ms_ago: Option<u64>,
}

/// What a replica knows of itself and its group, for operators.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metrics {
    /// LEADER FOLLOWER LEARNER CANDIDATE SHUTDOWN
    pub role: &'static str,
    pub term: u64,
    /// The leader it knows of, itself included.
    pub leader: Option<(u64, Peer)>,
    pub last_log_index: u64,
    pub committed_index: u64,
    pub applied_index: u64,
    pub snapshot_index: u64,
    pub purged_index: u64,
    /// Index up to which the image is on disk.
    pub image_index: u64,
    pub disk_full: bool,
    pub digest: Option<Digest>,
    pub members: Vec<Member>,
    /// Leader only: ms since a quorum last answered; `None` before the first time.
    pub quorum_silent_ms: Option<u64>,
}

/// Why the membership stays as it is. After [`MemberError::Unknown`] it may have changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MemberError {
    #[error("this replica does not lead")]
    NotLeader(Option<(u64, Peer)>),
    #[error("{0}")]
    Refused(String),
    #[error("the outcome is unknown: look at the members")]
    Unknown,
    #[error("this replica stops")]
    Stopped,
}

impl Replica {
    /// The group as this replica knows it, by id.
    pub fn members(&self) -> Vec<Member> {
        members_of(&self.inner.raft.metrics().borrow_watched())
    }

    /// What `ares cluster status` shows; never waits.
    pub fn metrics(&self) -> Metrics {
        let metrics = self.inner.raft.metrics();
        let metrics = metrics.borrow_watched();
        let marks = *self.shared().marks().borrow();
        let index = |id: Option<crate::raft::types::LogId>| id.map_or(0, |id| id.index);
        let leader = metrics.current_leader.and_then(|id| Some((id, peer_of(&metrics, id)?)));
        Metrics {
            role: role(metrics.state),
            term: metrics.current_term,
            leader,
            last_log_index: metrics.last_log_index.unwrap_or(0),
            committed_index: index(metrics.local_committed),
            applied_index: self.shared().applied().borrow().index,
            snapshot_index: marks.newest_snapshot.unwrap_or(0),
            purged_index: index(metrics.purged),
            image_index: marks.image.unwrap_or(0),
            disk_full: self.disk_full(),
            digest: *self.shared().digest().borrow(),
            members: members_of(&metrics),
            quorum_silent_ms: metrics.last_quorum_acked.map(|acked| acked.elapsed().as_millis() as u64),
        }
    }

    /// Takes a replica in as a learner, or gives a member another address. It becomes a voter by itself once it has caught up.
    pub async fn add_learner(&self, id: u64, peer: Peer) -> Result<Vec<Member>, MemberError> {
        if id == 0 {
            return Err(MemberError::Refused("replica id 0 is no id".to_owned()));
        }
        let known = self.leading(|metrics| peer_of(metrics, id))?;
        let change = match known {
            Some(known) if known == peer => return Ok(self.members()),
            Some(_) => ChangeMembers::SetNodes(BTreeMap::from([(id, peer)])),
            None => ChangeMembers::AddNodes(BTreeMap::from([(id, peer)])),
        };
        self.change(change, true).await
    }

    /// Makes a voter of a learner, caught up or not.
    pub async fn promote(&self, id: u64) -> Result<Vec<Member>, MemberError> {
        let (known, voter) = self.leading(|metrics| (peer_of(metrics, id).is_some(), is_voter(metrics, id)))?;
        if !known {
            return Err(MemberError::Refused(format!("replica {id} is no member: let it join first")));
        }
        if voter {
            return Ok(self.members());
        }
        self.change(ChangeMembers::AddVoterIds(BTreeSet::from([id])), true).await
    }

    /// Takes a replica out. One that is no member is out: whoever repeats a removal that he heard nothing of is told so. Refused when the rest would have no quorum alive: then nothing could ever be committed again.
    pub async fn remove(&self, id: u64) -> Result<Vec<Member>, MemberError> {
        let (known, voter, refused) =
            self.leading(|metrics| (peer_of(metrics, id).is_some(), is_voter(metrics, id), loses_quorum(metrics, id)))?;
        if !known {
            return Ok(self.members());
        }
        if !voter {
            return self.change(ChangeMembers::RemoveNodes(BTreeSet::from([id])), false).await;
        }
        if let Some(why) = refused {
            return Err(MemberError::Refused(why));
        }
        self.change(ChangeMembers::RemoveVoters(BTreeSet::from([id])), false).await
    }

    /// Hands leadership to `to`, or to the voter that is most up to date. Returns when another replica leads.
    pub async fn transfer(&self, to: Option<u64>) -> Result<(), MemberError> {
        let to = match to {
            None => self
                .leading(upkeep::successor)?
                .ok_or_else(|| MemberError::Refused("no other voter is alive".to_owned()))?,
            Some(to) => {
                let (voter, alive) = self.leading(|metrics| (is_voter(metrics, to), upkeep::is_alive(metrics, to)))?;
                if !voter || !alive {
                    let what = if voter { "does not answer" } else { "is no voter" };
                    return Err(MemberError::Refused(format!("replica {to} {what}")));
                }
                to
            }
        };
        if to == self.id() {
            return Ok(());
        }
        let raft = &self.inner.raft;
        raft.trigger().transfer_leader(to).await.map_err(|_| MemberError::Stopped)?;
        let mut metrics = raft.metrics();
        let me = self.id();
        let moved = metrics.wait_until(|metrics| metrics.current_leader.is_some_and(|leader| leader != me));
        match tokio::time::timeout(TRANSFER, moved).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(MemberError::Stopped),
            Err(_) => Err(MemberError::Unknown),
        }
    }

    /// Looks at the metrics, if this replica leads.
    fn leading<T>(&self, look: impl FnOnce(&RaftMetrics<TypeConfig>) -> T) -> Result<T, MemberError> {
        let metrics = self.inner.raft.metrics();
        let metrics = metrics.borrow_watched();
        if metrics.state == ServerState::Leader {
            return Ok(look(&metrics));
        }
        drop(metrics);
        Err(MemberError::NotLeader(door::leader_hint(&self.inner.raft)))
    }

    async fn change(&self, change: ChangeMembers<u64, Peer>, retain: bool) -> Result<Vec<Member>, MemberError> {
        match self.inner.changes.make(change, retain).await {
            Ok(()) => Ok(self.members()),
            Err(ChangeError::Late) => Err(MemberError::Unknown),
            Err(ChangeError::Raft(RaftError::APIError(err))) => Err(match err {
                ClientWriteError::ForwardToLeader(to) => MemberError::NotLeader(to.leader_id.zip(to.leader_node)),
                ClientWriteError::LogEntryDiscarded(_) => MemberError::Unknown,
                err => MemberError::Refused(err.to_string()),
            }),
            Err(ChangeError::Raft(RaftError::Fatal(_))) => Err(MemberError::Stopped),
        }
    }
}

fn role(state: ServerState) -> &'static str {
    match state {
        ServerState::Leader => "LEADER",
        ServerState::Follower => "FOLLOWER",
        ServerState::Learner => "LEARNER",
        ServerState::Candidate => "CANDIDATE",
        ServerState::Shutdown => "SHUTDOWN",
    }
}

fn peer_of(metrics: &RaftMetrics<TypeConfig>, id: u64) -> Option<Peer> {
    metrics.membership_config.membership().get_node(&id).cloned()
}

fn is_voter(metrics: &RaftMetrics<TypeConfig>, id: u64) -> bool {
    metrics.membership_config.voter_ids().any(|voter| voter == id)
}

fn members_of(metrics: &RaftMetrics<TypeConfig>) -> Vec<Member> {
    let matched = |id: &u64| metrics.replication.as_ref()?.get(id).copied().flatten();
    let heard = |id: &u64| metrics.heartbeat.as_ref()?.get(id).copied().flatten();
    let membership = metrics.membership_config.membership();
    // Two of them while a change is under way, each with a quorum of its own.
    let configs = membership.get_joint_config();
    membership
        .nodes()
        .map(|(id, peer)| Member {
            id: *id,
            peer: peer.clone(),
            voter: configs.iter().all(|config| config.contains(id)),
            matched_index: matched(id).map_or(0, |matched| matched.index),
            heard_ms_ago: heard(id).map(|heard| heard.elapsed().as_millis() as u64),
        })
        .collect()
}

/// Why the voters without `id` could not go on; the change itself also needs a majority of the voters as they are.
fn loses_quorum(metrics: &RaftMetrics<TypeConfig>, id: u64) -> Option<String> {
    let voters: BTreeSet<u64> = metrics.membership_config.voter_ids().collect();
    let rest: BTreeSet<u64> = voters.iter().copied().filter(|voter| *voter != id).collect();
    if rest.is_empty() {
        return Some(format!("replica {id} is the only voter: without it there is no group"));
    }
    for (set, what) in [(&rest, "the rest"), (&voters, "the group")] {
        let alive = set.iter().filter(|voter| upkeep::is_alive(metrics, **voter)).count();
        let needed = set.len() / 2 + 1;
        if alive < needed {
            return Some(format!(
                "without replica {id} there would be no quorum: {alive} of {} voters of {what} answer, {needed} are needed",
                set.len()
            ));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use openraft::{Membership, StoredMembership};

    use super::*;

    fn voters(configs: Vec<BTreeSet<u64>>) -> Vec<u64> {
        let peer = Peer { peer_addr: "127.0.0.1:1".to_owned(), api_addr: "127.0.0.1:2".to_owned() };
        let nodes: BTreeMap<u64, Peer> = (1..=4).map(|id| (id, peer.clone())).collect();
        let membership = Membership::new(configs, nodes).expect("valid");
        let mut metrics = RaftMetrics::<TypeConfig>::new_initial(1);
        metrics.membership_config = Arc::new(StoredMembership::new(None, membership));
        members_of(&metrics).into_iter().filter(|member| member.voter).map(|member| member.id).collect()
    }

    #[test]
    fn a_member_is_a_voter_once_it_counts_in_every_quorum() {
        let set = |ids: &[u64]| ids.iter().copied().collect::<BTreeSet<u64>>();
        assert_eq!(voters(vec![set(&[1, 2, 3])]), [1, 2, 3], "4 is a learner");
        assert_eq!(voters(vec![set(&[1, 2]), set(&[1, 2, 3])]), [1, 2], "3 enters: without 2 nothing commits");
        assert_eq!(voters(vec![set(&[1, 2, 3]), set(&[1, 2])]), [1, 2], "3 leaves");
    }
}
