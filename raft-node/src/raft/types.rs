//! The types that openraft is instantiated with; the only place that fixes them.

use std::fmt;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use statemachine::Outcome;

/// One encoded [`statemachine::Entry`]: encoded once at the door, then borrowed by the log, the followers and apply.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Payload(pub Bytes);

impl fmt::Display for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

/// What apply answers for one entry.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApplyReply {
    /// One per command of the entry, in order.
    pub outcomes: Vec<Outcome>,
    /// The keyspace's revision after the entry.
    pub revision: u64,
}

/// Where a replica is reached.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// Raft's own port, `host:port`.
    pub peer_addr: String,
    /// Clients and agents, `host:port`.
    pub api_addr: String,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (raft {})", self.api_addr, self.peer_addr)
    }
}

openraft::declare_raft_types!(
    /// Ares' instance of openraft.
    pub TypeConfig:
        D = Payload,
        R = ApplyReply,
        NodeId = u64,
        Node = Peer,
);

/// Names a leader: the term and the replica.
pub type LeaderId = openraft::impls::leader_id_adv::LeaderId<u64, u64>;
pub type LogId = openraft::LogId<LeaderId>;
pub type Vote = openraft::Vote<LeaderId>;
pub type EntryPayload = openraft::EntryPayload<Payload, u64, Peer>;
pub type Entry = openraft::Entry<LeaderId, EntryPayload>;
pub type Membership = openraft::Membership<u64, Peer>;
pub type StoredMembership = openraft::StoredMembership<LeaderId, u64, Peer>;
pub type SnapshotMeta = openraft::SnapshotMeta<LeaderId, u64, Peer>;

/// A log id from its parts.
pub fn log_id(term: u64, leader: u64, index: u64) -> LogId {
    LogId { leader_id: LeaderId { term, node_id: leader }, index }
}
