//! What a set of runs must have seen at least once. A run in which the interesting never happened shows nothing.

use std::collections::BTreeMap;

/// Must be reached by a run over many seeds.
pub const REQUIRED: &[&str] = &[
    "a cancel reached running tasks of an array",
    "a gang started in the rack that it requires",
    "a gang waited for a rack",
    "a gang was planned over several racks",
    "a gang was planned whole into one rack",
    "a job started inside its reservation",
    "a job started on machines that it chose",
    "a job that gave its place for another's turn came to its end",
    "a job that a window sent away came to its end",
    "a job waited for the end of a window",
    "a job was cut over several machines",
    "a job started on slices of GPUs",
    "a leader was lost between a grant and its receipt",
    "a new leader gave running leases their grace",
    "a placement was refused",
    "a preempted job ran to its end",
    "a registration was overtaken by another",
    "a report was refused: EPOCH_STALE",
    "a report was refused: TOKEN_STALE",
    "a process outlived its SIGKILL by more than the margin",
    "a repeated request was answered from the table",
    "a running attempt made room for an urgent job",
    "a replica was restarted and replayed its log",
    "a shim ended its rank after the agent had died",
    "a stale leader refused a read",
    "a task started behind the one of its index",
    "a task was skipped, for the one of its index had failed",
    "a younger job stood before an older one by its ratio",
    "an agent re-attached to running ranks",
    "an array came to its end with the last of its tasks",
    "an elastic job had its least",
    "an elastic job had more than its least",
    "an uncommitted entry was adopted by the next leader",
    "an uncommitted entry was lost",
    "heartbeats were not acknowledged for want of a quorum",
    "snapshot installed on a replica that was away",
    "two leaders alive in different terms",
];

/// Counts by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sometimes(pub BTreeMap<String, u64>);

impl Sometimes {
    pub fn hit(&mut self, what: &str) {
        match self.0.get_mut(what) {
            Some(hits) => *hits += 1,
            None => {
                self.0.insert(what.to_owned(), 1);
            }
        }
    }

    /// Of several kinds: counted in sum and each.
    pub fn hit_code(&mut self, what: &str, code: &str) {
        self.hit(what);
        self.hit(&format!("{what}: {code}"));
    }
}
