//! The agents' streams: acknowledgements in order, and the newest desired set. A slow agent has at most one pending set;
//! an older one is never worth sending.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proto::v1;
use statemachine::NodeId;
use tokio::sync::{mpsc, watch};

use super::Desk;
use super::desired::desired;
use super::touched::Touched;

/// Changes within this time are one desired set.
const COALESCE: Duration = Duration::from_millis(2);
/// Acknowledgements that wait for a slow agent; more are dropped, the next heartbeat brings another.
const ACKS: usize = 16;

/// The leader's end of one agent's stream.
#[derive(Clone)]
pub struct Link {
    acks: mpsc::Sender<v1::leader_message::What>,
    desired: Arc<watch::Sender<Option<v1::Desired>>>,
}

/// The stream's end of it.
pub struct LinkEnd {
    acks: mpsc::Receiver<v1::leader_message::What>,
    desired: watch::Receiver<Option<v1::Desired>>,
}

impl LinkEnd {
    /// What the agent is told next; `None` once the link is gone. Sets are looked for first: an acknowledgement, which lets an agent
    /// start what its newest set has, never overtakes the set before it.
    pub async fn next(&mut self) -> Option<v1::leader_message::What> {
        loop {
            tokio::select! {
                biased;
                changed = self.desired.changed() => {
                    changed.ok()?;
                    if let Some(desired) = self.desired.borrow_and_update().clone() {
                        return Some(v1::leader_message::What::Desired(desired));
                    }
                }
                ack = self.acks.recv() => return ack,
            }
        }
    }
}

impl Link {
    pub fn new() -> (Self, LinkEnd) {
        let (acks, ack_end) = mpsc::channel(ACKS);
        let (desired, desired_end) = watch::channel(None);
        (Self { acks, desired: Arc::new(desired) }, LinkEnd { acks: ack_end, desired: desired_end })
    }

    pub fn send(&self, message: v1::leader_message::What) {
        if self.acks.try_send(message).is_err() {
            tracing::debug!("an agent does not read its acknowledgements; one is dropped");
        }
    }

    /// Replaces the pending set unless it says the same; the index alone is no change.
    fn offer(&self, set: v1::Desired) {
        self.desired.send_if_modified(|last| {
            let same = last.as_ref().is_some_and(|last| last.epoch == set.epoch && last.leases == set.leases);
            if !same {
                *last = Some(set);
            }
            !same
        });
    }
}

/// Links by node: the newest stream of a node replaces an older one.
#[derive(Default)]
pub struct Links(Mutex<BTreeMap<NodeId, Link>>);

impl Links {
    pub fn connect(&self, node: NodeId, link: Link) {
        self.map().insert(node, link);
    }

    /// The node's sets go to this link.
    pub fn are(&self, node: NodeId, link: &Link) -> bool {
        self.map().get(&node).is_some_and(|current| Arc::ptr_eq(&current.desired, &link.desired))
    }

    /// Forgets the link if it is still this one.
    pub fn disconnect(&self, node: NodeId, link: &Link) {
        let mut map = self.map();
        if map.get(&node).is_some_and(|current| Arc::ptr_eq(&current.desired, &link.desired)) {
            map.remove(&node);
        }
    }

    fn map(&self) -> std::sync::MutexGuard<'_, BTreeMap<NodeId, Link>> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Desk {
    /// Offers nodes (`None`: all) their present sets. The state is read under the lock: an older set never replaces a newer one.
    pub fn offer(&self, nodes: Option<&BTreeSet<NodeId>>) {
        let map = self.links.map();
        let keeper = self.keeper();
        let state = self.replica.state();
        for (node, link) in map.iter().filter(|(node, _)| nodes.is_none_or(|nodes| nodes.contains(node))) {
            if let Some(set) = desired(&state, *node, |token| keeper.is_ending(token, *node)) {
                link.offer(set);
            }
        }
    }
}

/// Keeps the desired sets of connected agents for one term of office.
pub(super) async fn run(desk: Arc<Desk>) {
    let mut applied = desk.replica.applied();
    let mut touched = Touched::new(&desk.replica.state());
    loop {
        if applied.changed().await.is_err() {
            return;
        }
        tokio::time::sleep(COALESCE).await;
        applied.mark_unchanged();
        match desk.replica.look(|state| touched.follow(state)) {
            Some(nodes) if nodes.is_empty() => {}
            nodes => desk.offer(nodes.as_ref()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_acknowledgement_never_overtakes_the_set_before_it() {
        use v1::leader_message::What;
        // The order must not be luck: a fair choice would pass half of the rounds.
        for round in 1..=64 {
            let (link, mut end) = Link::new();
            link.offer(v1::Desired { epoch: round, ..Default::default() });
            link.send(What::Ack(v1::HeartbeatAck { heartbeat: round, ..Default::default() }));
            assert!(matches!(end.next().await, Some(What::Desired(set)) if set.epoch == round), "round {round}");
            assert!(matches!(end.next().await, Some(What::Ack(ack)) if ack.heartbeat == round), "round {round}");
            drop(link);
            assert!(end.next().await.is_none());
        }
    }

    #[test]
    fn a_late_old_stream_does_not_take_the_new_ones_place() {
        let (links, node) = (Links::default(), NodeId(1));
        let (old, _old_end) = Link::new();
        let (new, _new_end) = Link::new();
        links.connect(node, old.clone());
        links.connect(node, new.clone());
        links.disconnect(node, &old);
        assert!(links.are(node, &new) && !links.are(node, &old));
        links.disconnect(node, &new);
        assert!(!links.are(node, &new));
    }
}
