//! What a part holds on a machine and when it ends, as far as that is known: the future of one machine. Which future
//! matters to a task, and what is kept for it, is `reserve`'s.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use statemachine::command::PlacePart;
use statemachine::record::{Alloc, Lease, Node, PartState, Versioned};
use statemachine::table::Table;
use statemachine::{NodeId, State, Token};

/// Times from here on stand for "when jobs without a time limit have ended": the n-th such job of a machine, the oldest
/// first, is taken to end n times this later. So waiting for few of them comes before waiting for many.
pub const ENDLESS_MS: u64 = 1 << 45;

/// How much later than at its limit and grace a part may end before it counts as one without a limit.
const OVERDUE_MS: u64 = 600_000;

/// When a part ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// At this cluster time at the latest.
    By(u64),
    /// Of a lease: by its job's limit, or its grace. One that is long overdue can't be waited for: nobody knows when its
    /// processes can be killed.
    Due { since_ms: u64, end_ms: u64 },
    /// Its job has no time limit; since when it holds its machine.
    Unknown { since_ms: u64 },
}

impl End {
    /// By when it ends, as it is taken now; where that is not known, since when the part holds its machine.
    fn seen_at(self, now_ms: u64) -> Result<u64, u64> {
        match self {
            End::By(end_ms) => Ok(end_ms),
            End::Due { end_ms, .. } if now_ms <= end_ms.saturating_add(OVERDUE_MS) => Ok(end_ms),
            End::Due { since_ms, .. } | End::Unknown { since_ms } => Err(since_ms),
        }
    }
}

/// The share of one part on one machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Holding {
    end: End,
    gpus: u128,
    cores_by_numa: Vec<u16>,
    mem_mib: u64,
}

/// A part that is kept: for a task that waits, or by a reservation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Kept {
    pub from_ms: u64,
    pub until_ms: u64,
    pub part: PlacePart,
    /// Which of `Machines::windows` keeps it.
    pub window: Option<usize>,
}

impl Holding {
    pub(crate) fn of_placed(part: &PlacePart, end: End) -> Self {
        let gpus = part.gpu_order.iter().fold(0, |mask, slot| mask | 1 << slot);
        Self { end, gpus, cores_by_numa: part.cores_by_numa.clone(), mem_mib: part.mem_mib }
    }

    pub(crate) fn gpus(&self) -> u128 {
        self.gpus
    }

    pub(crate) fn take_from(&self, alloc: &mut Alloc) {
        alloc.free_gpus &= !self.gpus;
        for (free, cores) in alloc.cores_free.iter_mut().zip(&self.cores_by_numa) {
            *free = free.saturating_sub(*cores);
        }
        alloc.mem_free_mib = alloc.mem_free_mib.saturating_sub(self.mem_mib);
    }

    /// Never more than the machine has: it may have registered with less than what its parts hold.
    pub(crate) fn give_back(&self, node: &Node, alloc: &mut Alloc) {
        alloc.free_gpus |= self.gpus;
        for ((free, cores), all) in alloc.cores_free.iter_mut().zip(&self.cores_by_numa).zip(&node.cores_by_numa) {
            *free = free.saturating_add(*cores).min(*all);
        }
        alloc.mem_free_mib = alloc.mem_free_mib.saturating_add(self.mem_mib).min(node.mem_mib);
    }
}

/// What is free, without who has the rest.
pub(crate) fn free_of(alloc: &Alloc) -> Alloc {
    let Alloc { free_gpus, mem_free_mib, .. } = *alloc;
    Alloc { free_gpus, mem_free_mib, cores_free: alloc.cores_free.clone(), ..Alloc::default() }
}

/// Takes what the part holds out of what is free.
pub(crate) fn take(alloc: &mut Alloc, part: &PlacePart) {
    for slot in &part.gpu_order {
        alloc.free_gpus &= !(1 << slot);
    }
    for (free, cores) in alloc.cores_free.iter_mut().zip(&part.cores_by_numa) {
        *free = free.saturating_sub(*cores);
    }
    alloc.mem_free_mib = alloc.mem_free_mib.saturating_sub(part.mem_mib);
}

/// Keeps what is free in both.
pub(crate) fn lower(free: &mut Alloc, other: &Alloc) {
    free.free_gpus &= other.free_gpus;
    for (free, other) in free.cores_free.iter_mut().zip(&other.cores_free) {
        *free = (*free).min(*other);
    }
    free.mem_free_mib = free.mem_free_mib.min(other.mem_free_mib);
}

/// What every lease of a state holds on each machine, kept from plan to plan.
#[derive(Clone, Debug, Default)]
pub(crate) struct Held {
    leases: Table<Token, Versioned<Lease>>,
    /// By the tokens.
    on: BTreeMap<NodeId, Vec<(Token, Holding)>>,
}

impl Held {
    /// Reads the leases that changed. A running job's limit never changes, so a lease tells when it ends once and for all.
    pub fn begin(&mut self, state: &State) {
        let changed: Vec<Token> = state.leases.changed_since(&self.leases).copied().collect();
        for token in changed {
            for part in self.leases.get(&token).iter().flat_map(|lease| &lease.value.parts) {
                if let Entry::Occupied(mut here) = self.on.entry(part.node) {
                    here.get_mut().retain(|(of, _)| *of != token);
                    if here.get().is_empty() {
                        here.remove();
                    }
                }
            }
            let Some(lease) = state.leases.get(&token) else { continue };
            let end = due(state, &lease.value);
            for part in lease.value.parts.iter().filter(|part| part.state != PartState::Released) {
                let (gpus, cores_by_numa, mem_mib) = (part.gpus, part.cores_by_numa.clone(), part.mem_mib);
                let here = self.on.entry(part.node).or_default();
                let at = here.partition_point(|(of, _)| *of <= token);
                here.insert(at, (token, Holding { end, gpus, cores_by_numa, mem_mib }));
            }
        }
        self.leases = state.leases.clone();
    }

    /// By the tokens.
    pub fn on(&self, id: NodeId) -> impl ExactSizeIterator<Item = &Holding> + Clone {
        let here = self.on.get(&id).map(Vec::as_slice).unwrap_or_default();
        here.iter().map(|(_, holding)| holding)
    }
}

/// By its job's limit from the start of its ranks; one that was decided, by its grace.
fn due(state: &State, lease: &Lease) -> End {
    let Some(job) = state.jobs.get(&lease.task.job) else { return End::By(0) };
    let spec = &job.value.spec;
    let since_ms = lease.started_ms.unwrap_or(lease.granted_ms);
    let end_ms = match &lease.verdict {
        Some(verdict) => Some(verdict.clock_ms.saturating_add(spec.kill_grace_ms)),
        None => spec.length_ms().map(|length| since_ms.saturating_add(length)),
    };
    end_ms.map_or(End::Unknown { since_ms }, |end_ms| End::Due { since_ms, end_ms })
}

/// When a lease ends, as it is taken now, if that is known.
pub(crate) fn lease_end_ms(state: &State, lease: &Lease) -> Option<u64> {
    due(state, lease).seen_at(state.meta.clock_ms).ok()
}

/// The holdings of one machine with the times at which they end: in the future, as they have not ended yet.
pub(crate) fn with_ends<'a>(
    holdings: impl Iterator<Item = &'a Holding> + Clone,
    now_ms: u64,
) -> Vec<(u64, &'a Holding)> {
    let since = |holding: &Holding| holding.end.seen_at(now_ms).err();
    let mut endless: Vec<u64> = holdings.clone().filter_map(since).collect();
    endless.sort_unstable();
    // Equal ages are told apart by their order.
    let mut equal: BTreeMap<u64, u64> = BTreeMap::new();
    let mut end_ms = |holding: &Holding| match holding.end.seen_at(now_ms) {
        Ok(end_ms) => end_ms.max(now_ms.saturating_add(1)),
        Err(since_ms) => {
            let nth = equal.entry(since_ms).or_default();
            *nth += 1;
            let older = endless.partition_point(|other| *other < since_ms) as u64;
            ENDLESS_MS.saturating_mul(older + *nth).saturating_add(since_ms)
        }
    };
    holdings.map(|holding| (end_ms(holding), holding)).collect()
}
