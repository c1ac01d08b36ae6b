//! Bytes of what replicas say to each other and of a stored membership. Payloads are copied as they are, never encoded again.
//! Integers are little-endian; lists are a u32 count and their items; an optional value is a byte 0, or 1 and the value.

use std::collections::{BTreeMap, BTreeSet};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use openraft::raft::{
    AppendEntriesRequest, StreamAppendError, StreamAppendResult, TransferLeaderRequest, VoteRequest, VoteResponse,
};

use planted::{Bug, planted};
use statemachine::record::LogPosition;

use super::types::{
    Entry, EntryPayload, LeaderId, LogId, Membership, Payload, Peer, SnapshotMeta, StoredMembership, TypeConfig, Vote,
    log_id,
};

/// First byte of every message. A replica that meets another one is too old, or too new, to talk to its sender.
const FORMAT: u8 = 1;

/// Why bytes are no message: damage on the way, or a sender of another format.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    #[error("message ends {0} bytes too early")]
    Short(usize),
    #[error("{0} bytes are left after the message")]
    Trailing(usize),
    #[error("format {0} is unknown (this replica speaks {FORMAT})")]
    Format(u8),
    #[error("{what} has the unknown tag {tag}")]
    Tag { what: &'static str, tag: u8 },
    #[error("an address is no UTF-8")]
    Text,
    #[error("membership: {0}")]
    Membership(String),
}

type Result<T> = std::result::Result<T, WireError>;

/// A value that has bytes.
pub trait Wire: Sized {
    fn put(&self, out: &mut BytesMut);
    fn read(from: &mut Bytes) -> Result<Self>;

    /// Bytes that `put` will need, about: a buffer that grows copies what it holds.
    fn weight(&self) -> usize {
        128
    }
}

/// The message with its format byte.
pub fn encode<T: Wire>(value: &T) -> Bytes {
    let mut out = BytesMut::with_capacity(1 + value.weight());
    out.put_u8(FORMAT);
    value.put(&mut out);
    out.freeze()
}

/// Reads what [`encode`] wrote, all of it. Payloads borrow from `bytes`.
pub fn decode<T: Wire>(mut bytes: Bytes) -> Result<T> {
    let format = u8::read(&mut bytes)?;
    if format != FORMAT {
        return Err(WireError::Format(format));
    }
    let value = T::read(&mut bytes)?;
    if bytes.is_empty() { Ok(value) } else { Err(WireError::Trailing(bytes.len())) }
}

fn need(from: &Bytes, len: usize) -> Result<()> {
    if from.len() < len { Err(WireError::Short(len - from.len())) } else { Ok(()) }
}

// -------------------------------------------------------------------------------------------------------------- parts

impl Wire for u8 {
    fn put(&self, out: &mut BytesMut) {
        out.put_u8(*self);
    }

    fn read(from: &mut Bytes) -> Result<Self> {
        need(from, 1)?;
        Ok(from.get_u8())
    }
}

impl Wire for u32 {
    fn put(&self, out: &mut BytesMut) {
        out.put_u32_le(*self);
    }

    fn read(from: &mut Bytes) -> Result<Self> {
        need(from, 4)?;
        Ok(from.get_u32_le())
    }
}

impl Wire for u64 {
    fn put(&self, out: &mut BytesMut) {
        out.put_u64_le(*self);
    }

    fn read(from: &mut Bytes) -> Result<Self> {
        need(from, 8)?;
        Ok(from.get_u64_le())
    }
}

impl Wire for bool {
    fn put(&self, out: &mut BytesMut) {
        out.put_u8(u8::from(*self));
    }

    fn read(from: &mut Bytes) -> Result<Self> {
        match u8::read(from)? {
            0 => Ok(false),
            1 => Ok(true),
            tag => Err(WireError::Tag { what: "a flag", tag }),
        }
    }
}

impl Wire for Bytes {
    fn put(&self, out: &mut BytesMut) {
        out.put_u32_le(self.len() as u32);
        out.extend_from_slice(self);
    }

    fn read(from: &mut Bytes) -> Result<Self> {
        let len = u32::read(from)? as usize;
        need(from, len)?;
        Ok(from.split_to(len))
    }
}

impl Wire for String {
    fn put(&self, out: &mut BytesMut) {
        out.put_u32_le(self.len() as u32);
        out.extend_from_slice(self.as_bytes());
    }

    fn read(from: &mut Bytes) -> Result<Self> {
        String::from_utf8(Bytes::read(from)?.into()).map_err(|_| WireError::Text)
    }
}

impl<T: Wire> Wire for Option<T> {
    fn put(&self, out: &mut BytesMut) {
        self.is_some().put(out);
        if let Some(value) = self {
            value.put(out);
        }
    }

    fn read(from: &mut Bytes) -> Result<Self> {
        if bool::read(from)? { Ok(Some(T::read(from)?)) } else { Ok(None) }
    }
}

impl<T: Wire> Wire for Vec<T> {
    fn put(&self, out: &mut BytesMut) {
        out.put_u32_le(self.len() as u32);
        for item in self {
            item.put(out);
        }
    }

    fn read(from: &mut Bytes) -> Result<Self> {
        // An item has a byte at least: a false count can't ask for more memory than a small multiple of the message.
        let count = u32::read(from)? as usize;
        need(from, count)?;
        (0..count).map(|_| T::read(from)).collect()
    }
}

impl Wire for LeaderId {
    fn put(&self, out: &mut BytesMut) {
        self.term.put(out);
        self.node_id.put(out);
    }

    fn read(from: &mut Bytes) -> Result<Self> {
        Ok(LeaderId { term: u64::read(from)?, node_id: u64::read(from)? })
    }
}

impl Wire for LogId {
    fn put(&self, out: &mut BytesMut) {
        self.leader_id.put(out);
        self.index.put(out);
    }

    fn read(from: &mut Bytes) -> Result<Self> {
        let leader = LeaderId::read(from)?;
        Ok(log_id(leader.term, leader.node_id, u64::read(from)?))
    }
}

impl Wire for Vote {
    fn put(&self, out: &mut BytesMut) {
        self.leader_id.put(out);
        self.committed.put(out);
    }

    fn read(from: &mut Bytes) -> Result<Self> {
        Ok(Vote { leader_id: LeaderId::read(from)?, committed: bool::read(from)? })
    }
}

impl Wire for Peer {
    fn put(&self, out: &mut BytesMut) {
        self.peer_addr.put(out);
        self.api_addr.put(out);
    }

    fn read(from: &mut Bytes) -> Result<Self> {
        Ok(Peer { peer_addr: String::read(from)?, api_addr: String::read(from)? })
    }
}

impl Wire for Membership {
    fn put(&self, out: &mut BytesMut) {
        let configs = self.get_joint_config();
        out.put_u32_le(configs.len() as u32);
        for voters in configs {
            voters.iter().copied().collect::<Vec<u64>>().put(out);
        }
        out.put_u32_le(self.nodes().count() as u32);
        for (id, peer) in self.nodes() {
            id.put(out);
            peer.put(out);
        }
    }

    fn read(from: &mut Bytes) -> Result<Self> {
        let configs: Vec<Vec<u64>> = Vec::read(from)?;
        let configs: Vec<BTreeSet<u64>> = configs.into_iter().map(|voters| voters.into_iter().collect()).collect();
        let count = u32::read(from)? as usize;
        need(from, count)?;
        let mut nodes = BTreeMap::new();
        for _ in 0..count {
            nodes.insert(u64::read(from)?, Peer::read(from)?);
        }
        if configs.is_empty() && nodes.is_empty() {
            // What a replica that nobody has told anything yet holds; `new` would refuse it.
            return Ok(Membership::default());
        }
        let configs = if planted(Bug::LearnerCounts) { vec![nodes.keys().copied().collect()] } else { configs };
        Membership::new(configs, nodes).map_err(|err| WireError::Membership(err.to_string()))
    }
}

/// The membership of a group of one, decided at `at` by that one, in the form of `Meta::membership`.
pub fn sole_member(at: LogPosition, peer: &Peer) -> Vec<u8> {
    let members = BTreeMap::from([(at.leader, peer.clone())]);
    let membership = Membership::new(vec![BTreeSet::from([at.leader])], members).expect("the one voter is a member");
    encode(&StoredMembership::new(Some(log_id(at.term, at.leader, at.index)), membership)).to_vec()
}

impl Wire for StoredMembership {
    fn put(&self, out: &mut BytesMut) {
        self.log_id().put(out);
        self.membership().put(out);
    }

    fn read(from: &mut Bytes) -> Result<Self> {
        Ok(StoredMembership::new(Option::read(from)?, Membership::read(from)?))
    }
}

impl Wire for SnapshotMeta {
    fn put(&self, out: &mut BytesMut) {
        self.last_log_id.put(out);
        self.last_membership.put(out);
    }

    fn read(from: &mut Bytes) -> Result<Self> {
        Ok(SnapshotMeta { last_log_id: Option::read(from)?, last_membership: StoredMembership::read(from)? })
    }
}

impl Wire for Entry {
    fn put(&self, out: &mut BytesMut) {
        self.log_id.put(out);
        match &self.payload {
            EntryPayload::Blank => out.put_u8(0),
            EntryPayload::Normal(Payload(bytes)) => {
                out.put_u8(1);
                bytes.put(out);
            }
            EntryPayload::Membership(membership) => {
                out.put_u8(2);
                membership.put(out);
            }
        }
    }

    fn read(from: &mut Bytes) -> Result<Self> {
        let log_id = LogId::read(from)?;
        let payload = match u8::read(from)? {
            0 => EntryPayload::Blank,
            1 => EntryPayload::Normal(Payload(Bytes::read(from)?)),
            2 => EntryPayload::Membership(Membership::read(from)?),
            tag => return Err(WireError::Tag { what: "an entry", tag }),
        };
        Ok(Entry { log_id, payload })
    }
}

// ----------------------------------------------------------------------------------------------------------- messages

impl Wire for AppendEntriesRequest<TypeConfig> {
    fn put(&self, out: &mut BytesMut) {
        self.vote.put(out);
        self.prev_log_id.put(out);
        self.leader_commit.put(out);
        self.entries.put(out);
    }

    fn read(from: &mut Bytes) -> Result<Self> {
        Ok(Self {
            vote: Vote::read(from)?,
            prev_log_id: Option::read(from)?,
            leader_commit: Option::read(from)?,
            entries: Vec::read(from)?,
        })
    }

    fn weight(&self) -> usize {
        const ENTRY: usize = 32;
        let payload = |entry: &Entry| match &entry.payload {
            EntryPayload::Normal(Payload(bytes)) => bytes.len(),
            EntryPayload::Blank | EntryPayload::Membership(_) => 0,
        };
        128 + self.entries.iter().map(|entry| ENTRY + payload(entry)).sum::<usize>()
    }
}

/// The answer to one append of a stream, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AppendAnswer(pub StreamAppendResult<TypeConfig>);

impl Wire for AppendAnswer {
    fn put(&self, out: &mut BytesMut) {
        match &self.0 {
            Ok(matched) => {
                out.put_u8(0);
                matched.put(out);
            }
            Err(StreamAppendError::Conflict(at)) => {
                out.put_u8(1);
                at.put(out);
            }
            Err(StreamAppendError::HigherVote(vote)) => {
                out.put_u8(2);
                vote.put(out);
            }
        }
    }

    fn read(from: &mut Bytes) -> Result<Self> {
        Ok(AppendAnswer(match u8::read(from)? {
            0 => Ok(Option::read(from)?),
            1 => Err(StreamAppendError::Conflict(LogId::read(from)?)),
            2 => Err(StreamAppendError::HigherVote(Vote::read(from)?)),
            tag => return Err(WireError::Tag { what: "an append's answer", tag }),
        }))
    }
}

impl Wire for VoteRequest<TypeConfig> {
    fn put(&self, out: &mut BytesMut) {
        self.vote.put(out);
        self.last_log_id.put(out);
        self.leadership_transfer.put(out);
    }

    fn read(from: &mut Bytes) -> Result<Self> {
        Ok(Self { vote: Vote::read(from)?, last_log_id: Option::read(from)?, leadership_transfer: bool::read(from)? })
    }
}

impl Wire for VoteResponse<TypeConfig> {
    fn put(&self, out: &mut BytesMut) {
        self.vote.put(out);
        self.vote_granted.put(out);
        self.last_log_id.put(out);
    }

    fn read(from: &mut Bytes) -> Result<Self> {
        Ok(Self { vote: Vote::read(from)?, vote_granted: bool::read(from)?, last_log_id: Option::read(from)? })
    }
}

impl Wire for TransferLeaderRequest<TypeConfig> {
    fn put(&self, out: &mut BytesMut) {
        self.from_leader().put(out);
        self.to_node_id().put(out);
        self.last_log_id().copied().put(out);
    }

    fn read(from: &mut Bytes) -> Result<Self> {
        Ok(Self::new(Vote::read(from)?, u64::read(from)?, Option::read(from)?))
    }
}

/// What a leader says before the files of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotHeader {
    pub vote: Vote,
    pub meta: SnapshotMeta,
}

impl Wire for SnapshotHeader {
    fn put(&self, out: &mut BytesMut) {
        self.vote.put(out);
        self.meta.put(out);
    }

    fn read(from: &mut Bytes) -> Result<Self> {
        Ok(Self { vote: Vote::read(from)?, meta: SnapshotMeta::read(from)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn membership() -> Membership {
        let peer = |n: u64| Peer { peer_addr: format!("127.0.0.1:{n}"), api_addr: format!("127.0.0.1:{}", n + 1) };
        Membership::new(
            vec![BTreeSet::from([1, 2]), BTreeSet::from([2, 3])],
            BTreeMap::from([1, 2, 3, 4].map(|n| (n, peer(n)))),
        )
        .expect("all voters have a peer")
    }

    fn append() -> AppendEntriesRequest<TypeConfig> {
        let entry = |index, payload| Entry { log_id: log_id(7, 1, index), payload };
        AppendEntriesRequest {
            vote: Vote::new_committed(7, 1),
            prev_log_id: Some(log_id(6, 2, 9)),
            leader_commit: None,
            entries: vec![
                entry(10, EntryPayload::Blank),
                entry(11, EntryPayload::Normal(Payload(Bytes::from_static(b"bytes as they are")))),
                entry(12, EntryPayload::Membership(membership())),
            ],
        }
    }

    #[test]
    fn an_append_comes_back_as_it_went() {
        let sent = append();
        let got: AppendEntriesRequest<TypeConfig> = decode(encode(&sent)).expect("decodes");
        assert_eq!((got.vote, got.prev_log_id, got.leader_commit), (sent.vote, sent.prev_log_id, sent.leader_commit));
        assert_eq!(got.entries, sent.entries);
    }

    #[test]
    fn answers_votes_and_snapshots_come_back_as_they_went() {
        for answer in [
            Ok(None),
            Ok(Some(log_id(1, 2, 3))),
            Err(StreamAppendError::Conflict(log_id(4, 5, 6))),
            Err(StreamAppendError::HigherVote(Vote::new(9, 9))),
        ] {
            assert_eq!(decode::<AppendAnswer>(encode(&AppendAnswer(answer.clone()))), Ok(AppendAnswer(answer)));
        }
        let vote = VoteRequest::<TypeConfig> { vote: Vote::new(3, 1), last_log_id: None, leadership_transfer: true };
        assert_eq!(decode(encode(&vote)), Ok(vote));
        let transfer = TransferLeaderRequest::<TypeConfig>::new(Vote::new_committed(3, 1), 2, Some(log_id(3, 1, 4)));
        assert_eq!(decode(encode(&transfer)), Ok(transfer));
        let meta = SnapshotMeta {
            last_log_id: Some(log_id(1, 1, 50)),
            last_membership: StoredMembership::new(Some(log_id(1, 1, 2)), membership()),
        };
        let header = SnapshotHeader { vote: Vote::new_committed(1, 1), meta };
        assert_eq!(decode(encode(&header)), Ok(header));
        let nobody = StoredMembership::default();
        assert_eq!(decode(encode(&nobody)), Ok(nobody));
    }

    #[test]
    fn a_cut_or_longer_message_is_refused_and_never_panics() {
        let whole = encode(&append());
        for len in 0..whole.len() {
            assert!(decode::<AppendEntriesRequest<TypeConfig>>(whole.slice(..len)).is_err(), "cut to {len} bytes");
        }
        let mut longer = BytesMut::from(&whole[..]);
        longer.put_u8(0);
        let refused = decode::<AppendEntriesRequest<TypeConfig>>(longer.freeze()).map(|_| ());
        assert_eq!(refused, Err(WireError::Trailing(1)));
        let mut foreign = BytesMut::from(&whole[..]);
        foreign[0] = 9;
        assert_eq!(decode::<AppendEntriesRequest<TypeConfig>>(foreign.freeze()).map(|_| ()), Err(WireError::Format(9)));
    }
}
