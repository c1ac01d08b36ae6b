//! Heartbeats and their acknowledgement: each waits in the tray until a quorum check that began after its receipt has
//! succeeded. One check serves all that came before it.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use planted::{Bug, planted};
use statemachine::{NodeId, State};
use tokio::sync::Notify;

use super::keeper::{Answer, Keeper};
use super::{Desk, Link};
use proto::v1;

/// Heartbeats that wait for the next check. Agents send one each 2 s, so this holds a check that is late by seconds at
/// 10,000 agents; over it the oldest are dropped, which an agent survives: it sends the next one.
const TRAY_SIZE: usize = 65_536;

/// Gathers heartbeats a little, so that thousands of agents cost tens of checks a second.
const GATHER: Duration = Duration::from_millis(20);

/// One heartbeat as received.
#[derive(Clone)]
pub struct Beat {
    pub node: NodeId,
    pub epoch: u64,
    pub number: u64,
    pub link: Link,
}

#[derive(Default)]
pub(super) struct Tray {
    beats: Mutex<Vec<Beat>>,
    filled: Notify,
}

impl Tray {
    pub(super) fn put(&self, beat: Beat) {
        let mut beats = self.beats.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if beats.len() >= TRAY_SIZE {
            beats.remove(0);
        }
        beats.push(beat);
        self.filled.notify_one();
    }

    fn take(&self) -> Vec<Beat> {
        std::mem::take(&mut self.beats.lock().unwrap_or_else(|poisoned| poisoned.into_inner()))
    }
}

/// Answers heartbeats for one term of office.
pub(super) async fn run(desk: Arc<Desk>) {
    loop {
        desk.beats.filled.notified().await;
        tokio::time::sleep(GATHER).await;
        let beats = desk.beats.take();
        if beats.is_empty() {
            continue;
        }
        // Begun after the receipt of everything in `beats`. A failure means that no quorum answered: no one is
        // acknowledged, and the agents' deadlines go on counting from the last heartbeat that was.
        if behind_quorum_check()
            && let Err(error) = desk.check_quorum().await
        {
            tracing::debug!(%error, waiting = beats.len(), "heartbeats are not acknowledged");
            continue;
        }
        answer(&desk, &beats);
    }
}

fn answer(desk: &Desk, beats: &[Beat]) {
    // An acknowledgement lets an agent start what its newest set has: a part that is ending must be out of it before.
    let ending = desk.keeper().ending_nodes();
    if !ending.is_empty() {
        desk.offer(Some(&ending));
    }
    let state = desk.replica.state();
    for beat in beats {
        // The lock is held from the look into `ending` until the answer is on its way.
        let keeper = desk.keeper();
        if keeper.has_ending(beat.node) && !ending.contains(&beat.node) {
            // Since a moment ago: the next heartbeat is answered.
            continue;
        }
        beat.link.send(answer_to(&keeper, &state, beat.node, beat.epoch, beat.number));
        drop(keeper);
    }
}

/// What one heartbeat is answered, by state applied behind a quorum check that began after its receipt.
pub fn answer_to(keeper: &Keeper, state: &State, node: NodeId, epoch: u64, number: u64) -> v1::leader_message::What {
    match keeper.answer(state, node, epoch) {
        Answer::Extend(tokens) => v1::leader_message::What::Ack(v1::HeartbeatAck {
            epoch,
            heartbeat: number,
            tokens: tokens.into_iter().map(|token| token.0).collect(),
            incarnation: state.meta.incarnation,
        }),
        Answer::Reregister { superseded, reason } => {
            v1::leader_message::What::Reregister(v1::Reregister { reason, superseded })
        }
    }
}

/// Whether a quorum check stands between a heartbeat and its answer: always.
pub fn behind_quorum_check() -> bool {
    !planted(Bug::AckWithoutQuorum)
}
