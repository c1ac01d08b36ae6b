//! The reservations of time as one plan sees them: their windows in cluster time, on the machines that they set aside. To a
//! job that does not name it a window is room that is kept for another, whole machines at a time; to one that does, it is
//! where and when it may start. The law itself is `statemachine::reservation`'s.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use statemachine::command::PlacePart;
use statemachine::domain::Path;
use statemachine::fit;
use statemachine::record::{Node, Reservation};
use statemachine::spec::{JobSpec, Shape};
use statemachine::{NodeId, State};

use crate::domains::domain_for;
use crate::explain::needs_of;
use crate::machines::Machines;
use crate::reason::Reason;

/// One reservation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Window<'a> {
    pub record: &'a Reservation,
    /// Cluster times; now, once it has begun.
    pub from_ms: u64,
    pub until_ms: u64,
}

/// By their ids.
pub(crate) fn of_state(state: &State) -> Vec<Window<'_>> {
    let windows = state.reservations.iter().map(|(_, record)| {
        let (from_ms, until_ms) = state.window_ms(record);
        Window { record, from_ms, until_ms }
    });
    windows.collect()
}

/// All that a machine has.
pub(crate) fn whole(id: NodeId, node: &Node) -> PlacePart {
    let slots = node.gpus.len().min(fit::MAX_GPUS);
    PlacePart {
        node: id,
        epoch: node.epoch,
        gpu_order: (0..slots).filter_map(|slot| u8::try_from(slot).ok()).collect(),
        cores_by_numa: node.cores_by_numa.clone(),
        mem_mib: node.mem_mib,
    }
}

/// Why a job can't start yet by its own reservation, wherever there is room.
pub(crate) fn not_yet(state: &State, spec: &JobSpec) -> Option<Reason> {
    let name = spec.reservation();
    if name.is_empty() {
        return None;
    }
    let Some((_, window)) = state.reservation(name) else {
        return Some(Reason::ReservationGone { name: name.to_owned() });
    };
    let (from_ms, _) = state.window_ms(window);
    let in_ms = from_ms.saturating_sub(state.meta.clock_ms);
    window.begun.is_none().then(|| Reason::ReservationAhead { name: name.to_owned(), in_ms })
}

/// The window that keeps the task from machines with room, if one does; and whether enough others have room.
pub(crate) fn in_the_way(
    machines: &Machines<'_>,
    (spec, shape): (&JobSpec, &Shape),
    until_ms: u64,
) -> Option<(Reason, bool)> {
    if !machines.has_windows_before(until_ms) {
        return None;
    }
    let state = machines.state;
    let has_room = |id: &NodeId| {
        let machine = machines.node(*id).filter(|_| machines.is_open(*id) && machines.takes_leases(*id));
        machine.is_some_and(|(node, alloc)| fit::room_for(node, alloc, shape).is_ok())
    };
    let needed = usize::from(shape.nodes);
    let mut by_domain: BTreeMap<Path<'_>, Vec<Option<Window<'_>>>> = BTreeMap::new();
    for (id, node) in state.nodes.iter().filter(|(id, _)| has_room(id)) {
        if let Some(domain) = domain_for(&node.value, shape) {
            by_domain.entry(domain).or_default().push(machines.window_on(*id, until_ms));
        }
    }
    // Where it comes nearest, if it must be in one domain.
    let room = |windows: &Vec<Option<Window<'_>>>| {
        (windows.len() >= needed, windows.iter().filter(|window| window.is_none()).count())
    };
    let first = by_domain.into_values().max_by_key(room).unwrap_or_default();
    let others = first.iter().filter(|window| window.is_none()).count();
    let mut barred: Vec<Window<'_>> = first.into_iter().flatten().collect();
    // Those that begin last leave most time.
    barred.sort_by_key(|window| Reverse(window.from_ms));
    let binding = barred.get(needed.saturating_sub(others + 1)).or(barred.last())?;
    let now_ms = state.meta.clock_ms;
    let starts_in_ms = binding.from_ms.saturating_sub(now_ms);
    let reason = Reason::SetAside {
        needs: needs_of(state, shape),
        name: binding.record.name.clone(),
        maintenance: binding.record.is_maintenance(),
        starts_in_ms,
        ends_in_ms: binding.until_ms.saturating_sub(now_ms),
        fits_ms: starts_in_ms.checked_sub(spec.kill_grace_ms).filter(|_| binding.record.begun.is_none()),
    };
    Some((reason, others >= needed))
}
