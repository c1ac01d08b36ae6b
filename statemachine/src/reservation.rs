//! Which machines a job may use when, by the reservations: the law that apply enforces and the planner plans by. How
//! they come and go is `apply::reservation`'s.
//!
//! A window is of wall time. Nothing starts on its machines that may run into it, by its time limit and grace from the
//! grant on, but the jobs that name it, and these start there once it has begun. A job without a time limit may run into
//! every window. What started before the reservation was made, and what starts by its right and outlasts it, runs on.

use crate::command::{Code, Rejection};
use crate::id::*;
use crate::record::{Reservation, Whom};
use crate::spec::JobSpec;
use crate::state::{Calendar, CalendarKind, Index, State};

impl Reservation {
    pub fn is_maintenance(&self) -> bool {
        self.whom == Whom::Maintenance
    }

    /// Both set some machine aside at one time.
    pub fn overlaps(&self, other: &Reservation) -> bool {
        let at_one_time = self.start_wall_ms < other.end_wall_ms && other.start_wall_ms < self.end_wall_ms;
        at_one_time && !self.nodes.is_disjoint(&other.nodes)
    }

    /// One that starts now and holds its machines so long (`None` = without end) may run into it.
    pub fn is_reached_by(&self, length_ms: Option<u64>, wall_ms: i64) -> bool {
        self.begun.is_some()
            || length_ms.is_none_or(|length| wall_ms.saturating_add_unsigned(length) > self.start_wall_ms)
    }

    pub(crate) fn rule(&self, id: ReservationId) -> Calendar {
        match self.begun {
            None => Calendar { due_wall_ms: self.start_wall_ms, what: CalendarKind::ReservationBegins(id) },
            Some(_) => Calendar { due_wall_ms: self.end_wall_ms, what: CalendarKind::ReservationEnds(id) },
        }
    }
}

impl State {
    /// The reservation of this name that has not ended.
    pub fn reservation(&self, name: &str) -> Option<(ReservationId, &Reservation)> {
        let id = *self.index.reservation_by_name.get(name)?;
        Some((id, self.reservations.get(&id)?))
    }

    /// Those that set the machine aside now or later.
    pub fn reserved_on(&self, node: NodeId) -> impl Iterator<Item = (ReservationId, &Reservation)> {
        let from = self.index.reserved.range((node, ReservationId(0))..);
        let here = from.take_while(move |(of, _)| *of == node);
        here.filter_map(|(_, id)| Some((*id, self.reservations.get(id)?)))
    }

    /// Why the job may not start on this machine now, if a reservation forbids it: RESERVED.
    pub fn may_use(&self, spec: &JobSpec, node: NodeId) -> Result<(), Rejection> {
        let refused = |detail: String| Err(Rejection::new(Code::Reserved, detail));
        let own = spec.reservation();
        if !own.is_empty() {
            match self.reservation(own) {
                None => return refused(format!("there is no reservation {own:?}")),
                Some((_, window)) if window.begun.is_none() => {
                    return refused(format!("reservation {own:?} has not begun"));
                }
                Some((_, window)) if !window.nodes.contains(&node) => {
                    return refused(format!("node {} is not of reservation {own:?}", self.node_name(node)));
                }
                Some(_) => {}
            }
        }
        let mut others = self.reserved_on(node).filter(|(_, window)| window.name != own);
        match others.find(|(_, window)| window.is_reached_by(spec.length_ms(), self.meta.wall_ms)) {
            None => Ok(()),
            Some((_, window)) => refused(format!(
                "node {} is set aside by {:?} from {} to {} (wall time, ms), and the job may run into that",
                self.node_name(node),
                window.name,
                window.start_wall_ms,
                window.end_wall_ms
            )),
        }
    }

    /// Cluster times at which the window begins and ends, as far as wall time goes on like cluster time; one that has begun, now.
    pub fn window_ms(&self, window: &Reservation) -> (u64, u64) {
        let now_ms = self.meta.clock_ms;
        let at = |wall_ms: i64| {
            let ahead = u64::try_from(wall_ms.saturating_sub(self.meta.wall_ms)).unwrap_or(0);
            now_ms.saturating_add(ahead)
        };
        let from_ms = if window.begun.is_some() { now_ms } else { at(window.start_wall_ms) };
        (from_ms, at(window.end_wall_ms).max(from_ms.saturating_add(1)))
    }
}

impl Index {
    pub(crate) fn enter_reservation(&mut self, id: ReservationId, window: &Reservation) {
        self.reservation_by_name.insert(window.name.clone(), id);
        self.reserved.extend(window.nodes.iter().map(|node| (*node, id)));
        self.calendar.insert(window.rule(id));
    }

    pub(crate) fn leave_reservation(&mut self, id: ReservationId, window: &Reservation) {
        self.reservation_by_name.remove(&window.name);
        for node in &window.nodes {
            self.reserved.remove(&(*node, id));
        }
        self.calendar.remove(&window.rule(id));
    }
}
