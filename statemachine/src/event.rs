//! What changed, at which revision: the source of watches and of a job's story.
//!
//! A change holds what its keys show *then*, except the spec of a job, which never changes and is read where it lies.
//! How a change reads as keys and values is for `keyspace` to say.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::id::*;
use crate::record::{Holder, Node, TaskResult};
use crate::state::State;
use crate::view::{LeaseView, TaskView};

/// One change of the keyspace. `(rev, sub)` orders the events of one command.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    pub rev: Revision,
    pub sub: u16,
    pub clock_ms: u64,
    pub wall_ms: i64,
    pub what: Change,
}

/// The typed content; the keyspace renders it as keys and values.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Change {
    JobSubmitted {
        job: JobId,
    },
    /// The shown state of a task.
    TaskState {
        task: TaskKey,
        state: TaskView,
    },
    /// The task may be placed from now on.
    Queued {
        place: QueuePlace,
    },
    Dequeued {
        place: QueuePlace,
    },
    RetrySet {
        task: TaskKey,
        attempt: u32,
        not_before_ms: u64,
    },
    RetryOver {
        task: TaskKey,
    },
    /// Granted, or another phase, verdict or master.
    LeaseShown {
        token: Token,
        lease: Box<LeaseView>,
    },
    LeaseClosed {
        token: Token,
    },
    JobFenced {
        task: TaskKey,
        token: Token,
    },
    GpusFenced {
        token: Token,
        gpus: Vec<GpuUuid>,
    },
    ResultCommitted {
        task: TaskKey,
        result: TaskResult,
    },
    /// Registered, or another health or admin state.
    NodeShown {
        node: NodeId,
        record: Box<Node>,
    },
    LockShown {
        name: String,
        holder: Option<Holder>,
        waiters: u32,
    },
    LockFree {
        name: String,
    },
}

/// Where a task stands in `/queue/pending/`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct QueuePlace {
    pub tenant: TenantId,
    pub priority: i32,
    pub seq: u64,
    pub task: TaskKey,
}

impl Event {
    fn is_followed_by(&self, next: &Event) -> bool {
        match next.sub {
            0 => next.rev.0 == self.rev.0.saturating_add(1),
            sub => next.rev == self.rev && sub == self.sub.saturating_add(1),
        }
    }
}

/// The keys that a change writes: of two changes of one command with the same subject only the later one counts.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Subject<'a> {
    Job(JobId),
    State(TaskKey),
    Queue(QueuePlace),
    Retry(TaskKey),
    Lease(Token),
    JobFence(TaskKey),
    GpuFence(Token),
    Result(TaskKey),
    Node(NodeId),
    Lock(&'a str),
}

impl Change {
    fn subject(&self) -> Subject<'_> {
        match self {
            Change::JobSubmitted { job } => Subject::Job(*job),
            Change::TaskState { task, .. } => Subject::State(*task),
            Change::Queued { place } | Change::Dequeued { place } => Subject::Queue(*place),
            Change::RetrySet { task, .. } | Change::RetryOver { task } => Subject::Retry(*task),
            Change::LeaseShown { token, .. } | Change::LeaseClosed { token } => Subject::Lease(*token),
            Change::JobFenced { task, .. } => Subject::JobFence(*task),
            Change::GpusFenced { token, .. } => Subject::GpuFence(*token),
            Change::ResultCommitted { task, .. } => Subject::Result(*task),
            Change::NodeShown { node, .. } => Subject::Node(*node),
            Change::LockShown { name, .. } | Change::LockFree { name } => Subject::Lock(name),
        }
    }

    /// Keeps the last change of each key.
    fn last_of_each(changes: Vec<Change>) -> Vec<Change> {
        if changes.len() < 2 {
            return changes;
        }
        let mut seen = std::collections::BTreeSet::new();
        let mut keep: Vec<bool> = changes.iter().rev().map(|change| seen.insert(change.subject())).collect();
        keep.reverse();
        drop(seen);
        changes.into_iter().zip(keep).filter_map(|(change, keep)| keep.then_some(change)).collect()
    }
}

/// A watch asked for revisions that this replica does not hold any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("revisions up to {floor} were compacted: read the keys again and watch from there")]
pub struct Compacted {
    /// The smallest revision after which a watch may begin.
    pub floor: Revision,
}

impl State {
    /// The smallest revision after which [`State::events_since`] is complete.
    pub fn events_floor(&self) -> Revision {
        let ring = match self.events.front() {
            // A revision whose first events fell out of the ring is not complete.
            Some(first) if first.sub > 0 => first.rev,
            Some(first) => Revision(first.rev.0.saturating_sub(1)),
            None => self.meta.rev,
        };
        ring.max(self.meta.compacted_rev)
    }

    /// All events after revision `rev`, in order.
    pub fn events_since(&self, rev: Revision) -> Result<impl Iterator<Item = &Arc<Event>> + '_, Compacted> {
        let floor = self.events_floor();
        if rev < floor {
            return Err(Compacted { floor });
        }
        // By index: the iterator's own `skip` walks through the whole ring.
        Ok((self.first_event_after(rev)..self.events.len()).filter_map(|at| self.events.get(at)))
    }

    /// Gives the changes of one command the next revision, and makes them events.
    pub(crate) fn publish(&mut self, changes: Vec<Change>) {
        if changes.is_empty() {
            return;
        }
        self.meta.rev = Revision(self.meta.rev.0.saturating_add(1));
        for (sub, what) in Change::last_of_each(changes).into_iter().enumerate() {
            self.events.push_back(Arc::new(Event {
                rev: self.meta.rev,
                sub: u16::try_from(sub).unwrap_or(u16::MAX),
                clock_ms: self.meta.clock_ms,
                wall_ms: self.meta.wall_ms,
                what,
            }));
        }
        while self.events.len() > self.meta.settings.event_ring as usize {
            self.events.pop_front();
        }
    }

    /// Puts back events that were stored in order, as far as they lead without a hole to this state's revision: a watch
    /// may be refused, but never misses one.
    pub(crate) fn restore_events(&mut self, mut stored: Vec<Arc<Event>>) {
        if stored.last().is_none_or(|last| last.rev != self.meta.rev) {
            stored.clear();
        }
        let hole = stored.windows(2).rposition(|pair| !pair[0].is_followed_by(&pair[1])).map_or(0, |at| at + 1);
        let over = stored.len().saturating_sub(self.meta.settings.event_ring as usize);
        self.events = stored.drain(..).skip(hole.max(over)).collect();
        self.drop_events_to(self.meta.compacted_rev);
    }

    /// Forgets the events up to `rev`.
    pub(crate) fn drop_events_to(&mut self, rev: Revision) {
        let first = self.first_event_after(rev);
        self.events = self.events.split_off(first);
    }

    fn first_event_after(&self, rev: Revision) -> usize {
        let (mut low, mut high) = (0, self.events.len());
        while low < high {
            let middle = low.midpoint(high);
            if self.events.get(middle).is_some_and(|event| event.rev <= rev) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        low
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored(events: &[(u64, u16)]) -> Vec<Arc<Event>> {
        let event = |(rev, sub)| Event {
            rev: Revision(rev),
            sub,
            clock_ms: 0,
            wall_ms: 0,
            what: Change::JobSubmitted { job: JobId(rev) },
        };
        events.iter().map(|place| Arc::new(event(*place))).collect()
    }

    fn restored(rev: u64, compacted: u64, ring: u32, events: &[(u64, u16)]) -> Vec<(u64, u16)> {
        let mut state = State::default();
        (state.meta.rev, state.meta.compacted_rev) = (Revision(rev), Revision(compacted));
        state.meta.settings.event_ring = ring;
        state.restore_events(stored(events));
        state.events.iter().map(|event| (event.rev.0, event.sub)).collect()
    }

    #[test]
    fn stored_events_are_taken_from_their_last_hole_on() {
        let whole = [(3, 1), (3, 2), (4, 0), (5, 0), (5, 1)];
        assert_eq!(restored(5, 0, 9, &whole), whole);
        assert_eq!(restored(5, 0, 9, &[]), []);
        assert_eq!(restored(6, 0, 9, &whole), [], "the newest revision is missing");
        assert_eq!(restored(5, 0, 9, &[(3, 0), (5, 0), (5, 1)]), [(5, 0), (5, 1)], "revision 4 is missing");
        assert_eq!(restored(5, 0, 9, &[(4, 0), (4, 2), (5, 0)]), [(4, 2), (5, 0)], "a part of revision 4 is missing");
        assert_eq!(restored(5, 0, 2, &whole), [(5, 0), (5, 1)], "the ring is shorter now");
        assert_eq!(restored(5, 4, 9, &whole), [(5, 0), (5, 1)], "compacted");
    }
}
