//! Why a task that a cycle looked at finds no machines: with all numbers, or in brief for a planner that tells nobody.

use std::sync::Arc;

use statemachine::JobId;
use statemachine::command::PlacePart;
use statemachine::fit;
use statemachine::spec::{JobSpec, Shape};

use crate::explain::{explain, needs_of};
use crate::outcome::Reservation;
use crate::plan::{Ask, Cycle};
use crate::reason::{Best, Needs, Reason};
use crate::seats::has_enough;
use crate::windows;

/// Reasons without numbers.
pub(crate) struct Brief {
    busy: Arc<Reason>,
    kept: Arc<Reason>,
}

impl Brief {
    pub(crate) fn new() -> Self {
        let needs = Needs::default();
        let kept = Reason::Reserved { needs: needs.clone(), job: JobId::default(), starts_in_ms: None, fits_ms: None };
        let busy = Reason::GpusBusy { needs, ready: 0, best: Best::default(), unhealthy: 0, away: 0 };
        Self { busy: Arc::new(busy), kept: Arc::new(kept) }
    }
}

impl<'a> Cycle<'a> {
    /// That it has too few seats is remembered from cycle to cycle.
    pub(crate) fn is_remembered(&self, shape: &Shape) -> bool {
        self.machines.inside().is_none() && shape.required_level().is_none()
    }

    /// What a first look at its seats counts when there are too few: without a domain that it must be in, a gang is then listed fewer
    /// than it has machines. It is the same whether that was remembered or found.
    pub(crate) fn few_looks(&self, shape: &Shape) -> u64 {
        self.cache.fleet.len() as u64 + u64::from(shape.nodes)
    }

    /// The shape starts nowhere beside what is kept from the bar on, for the rest of this cycle: why. No machine has a seat for it from
    /// `full_from` on.
    pub(crate) fn seatless(
        &mut self,
        asked: (&'a JobSpec, &'a Shape),
        bar: u64,
        full_from: Option<u64>,
    ) -> Arc<Reason> {
        let (_, shape) = asked;
        self.steps += self.looks_to_explain(shape);
        let reason = self.no_room(asked, bar, full_from);
        self.failed.insert(Ask::new(self.machines.inside(), shape), (bar, reason.clone()));
        reason
    }

    fn no_room(&mut self, (spec, shape): (&JobSpec, &Shape), bar: u64, full_from: Option<u64>) -> Arc<Reason> {
        let is_remembered = full_from.is_some() && self.is_remembered(shape);
        let cache = &mut *self.cache;
        // Where machines are counted by domains, which of them are short is told in any case.
        let brief = self.brief.as_ref().filter(|_| shape.required_level().is_none());
        // Idle machines would do: it waits for those that are busy, or for those that are kept.
        let would_do = brief.is_some() && is_remembered && cache.able.is_known(shape);
        let reason = match would_do {
            true if full_from == Some(0) || !has_enough(&self.machines, cache, shape) => None,
            true => Some(Reason::Soon),
            false => Some(explain(&self.machines, cache, shape)),
        };
        let fits = reason == Some(Reason::Soon);
        if !fits && is_remembered {
            cache.seatless.note(shape, cache.fleet.moves());
        }
        match (brief, reason) {
            (Some(brief), None) => brief.busy.clone(),
            (Some(brief), Some(reason)) if reason.ends_with_time() => brief.busy.clone(),
            _ if fits && bar > 0 => self.kept_for_another((spec, shape), bar),
            (_, reason) => Arc::new(reason.unwrap_or(Reason::Soon)),
        }
    }

    /// A shape is explained by groups of machines, one that says which machines it may have, or how near, by these.
    fn looks_to_explain(&self, shape: &Shape) -> u64 {
        let by_machine =
            shape.machines.is_some() || shape.required_level().is_some() || self.machines.inside().is_some();
        let fleet = &self.cache.fleet;
        if by_machine { fleet.machines() as u64 } else { fleet.len() as u64 }
    }

    /// What is kept from the bar on or sooner.
    fn barred(&self, bar: u64) -> impl Iterator<Item = &Reservation> {
        self.plan.reservations.iter().filter(move |kept| kept.start_ms <= bar)
    }

    /// Who has the machines that it could have, and how short it would have to be.
    fn kept_for_another(&self, (spec, shape): (&JobSpec, &Shape), bar: u64) -> Arc<Reason> {
        let (state, is_kept) = (self.machines.state, self.barred(bar).next().is_some());
        match windows::in_the_way(&self.machines, (spec, shape), self.machines.room_until(spec)) {
            Some((reason, others_have_room)) if !is_kept || !others_have_room => return Arc::new(reason),
            None if !is_kept => return Arc::new(Reason::Soon),
            _ => {}
        }
        if let Some(brief) = &self.brief {
            return brief.kept.clone();
        }
        let has_room = |part: &PlacePart| {
            let machine = self.machines.node(part.node);
            machine.is_some_and(|(node, alloc)| fit::room_for(node, alloc, shape).is_ok())
        };
        let first = self.barred(bar).find(|kept| kept.parts.iter().any(has_room)).or_else(|| self.barred(bar).next());
        let in_ms = |kept: &Reservation| kept.known_start_ms().map(|start| start.saturating_sub(state.meta.clock_ms));
        let starts_in_ms = first.and_then(in_ms);
        Arc::new(Reason::Reserved {
            needs: needs_of(state, shape),
            job: first.map(|kept| kept.task.job).unwrap_or_default(),
            starts_in_ms,
            fits_ms: starts_in_ms.and_then(|ms| ms.checked_sub(spec.kill_grace_ms)),
        })
    }
}
