//! What one planning cycle comes to, and how it is told to apply.

use std::sync::Arc;

use statemachine::TaskKey;
use statemachine::command::{self, Place, PlacePart};

use crate::holding::ENDLESS_MS;
use crate::order::Position;
use crate::reason::Reason;

/// Placements in one `Plan` command, as apply bounds it.
pub(crate) const PLACES_PER_COMMAND: usize = 4_096;

/// Bytes of one `Plan` command: an entry of the log holds 128 KiB.
const BYTES_PER_COMMAND: usize = 120 << 10;

/// The outcome of one cycle.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Log index of the state that was planned on.
    pub base_index: u64,
    /// In the order of the queue.
    pub places: Vec<Place>,
    /// Why each other task that was looked at does not start, in the order of the queue; shared by equal shapes.
    pub reasons: Vec<(TaskKey, Arc<Reason>)>,
    /// What is kept for tasks that wait, in the order of the queue.
    pub reservations: Vec<Reservation>,
    /// Who ends for whom.
    pub preempts: Vec<command::Preempt>,
    /// Cluster time at which the first of those who could end for a task that waits will have run for the least time.
    pub preempts_from: Option<u64>,
    /// What it took, in `Limits::steps`.
    pub steps: u64,
    /// The limits were reached before the queue's end.
    pub unfinished: bool,
    /// How far the order was looked at: `Limits::after` of the next cycle when this one is unfinished and placed nothing.
    pub reached: Option<Position>,
}

/// Machines kept for a task from the time at which it can start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reservation {
    pub task: TaskKey,
    /// Cluster time; from `ENDLESS_MS` on it is not known, as it waits for tasks without a time limit.
    pub start_ms: u64,
    pub parts: Vec<PlacePart>,
}

impl Reservation {
    /// When it starts at the latest, if that is known.
    pub fn known_start_ms(&self) -> Option<u64> {
        (self.start_ms < ENDLESS_MS).then_some(self.start_ms)
    }
}

impl Plan {
    /// The placements as commands within apply's bounds, in order, cut between placements.
    pub fn commands(&self) -> Vec<command::Plan> {
        let mut commands: Vec<command::Plan> = Vec::new();
        let mut bytes = 0;
        for place in &self.places {
            let more = encoded_bytes(place);
            let full =
                |last: &command::Plan| last.places.len() >= PLACES_PER_COMMAND || bytes + more > BYTES_PER_COMMAND;
            if commands.last().is_none_or(full) {
                commands.push(command::Plan { base_index: self.base_index, places: Vec::new() });
                bytes = 0;
            }
            bytes += more;
            if let Some(last) = commands.last_mut() {
                last.places.push(place.clone());
            }
        }
        commands
    }
}

/// An upper bound of what a placement takes in the log: full-width integers, 8-byte lengths.
fn encoded_bytes(place: &Place) -> usize {
    let parts = place.parts.iter().map(|part| 36 + part.gpu_order.len() + 2 * part.cores_by_numa.len());
    24 + parts.sum::<usize>()
}
