//! The machines counted by what keeps a shape from them: one look at each group of machines that are alike.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use statemachine::domain::Path;
use statemachine::spec::Shape;
use statemachine::{GpuTypeId, NodeId, State};

use crate::cache::Choices;
use crate::choose::Shortage;
use crate::domains::domain_for;
use crate::fleet::{Alike, Face, Service};
use crate::links::Mask;
use crate::machines::want_of;
use crate::reason::Best;

/// What a machine must have, in the order in which it is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Step {
    Gpus,
    Cores,
    Memory,
    Links,
    /// Fewer leases than a machine may hold.
    Leases,
    /// As many of them in one domain as the gang has.
    Together,
    /// Machines that could run it, were it not for its own word.
    Allowed,
    /// Nothing is short.
    Fits,
}

/// The steps at which a machine can fall short.
const STEPS: [Step; 5] = [Step::Gpus, Step::Cores, Step::Memory, Step::Links, Step::Leases];

/// The machines, counted at each step.
#[derive(Default)]
pub(crate) struct Survey<'a> {
    tallies: [Tally; STEPS.len()],
    pub all: Room,
    /// By domain, where the gang must be in one.
    pub rooms: BTreeMap<Path<'a>, Room>,
    must_be_together: bool,
    pub unhealthy: u32,
}

/// Machines that pass every step.
#[derive(Clone, Copy, Default)]
pub(crate) struct Room {
    pub able: u32,
    /// Of these.
    pub out: u32,
    pub silent: u32,
}

impl Room {
    fn of(service: Service, machines: u32) -> Self {
        let if_it_is = |what| if service == what { machines } else { 0 };
        Self { able: machines, out: if_it_is(Service::Out), silent: if_it_is(Service::Silent) }
    }

    fn add(&mut self, more: Room) {
        self.able += more.able;
        self.out += more.out;
        self.silent += more.silent;
    }

    pub fn away(&self) -> u32 {
        self.out + self.silent
    }

    pub fn in_service(self) -> u32 {
        self.able - self.away()
    }
}

/// Its names, outermost first.
pub(crate) fn name_of(domain: &Path<'_>) -> String {
    domain.iter().filter(|name| !name.is_empty()).copied().collect::<Vec<_>>().join("/")
}

/// One step: who passes it and all before it, and who of those that fail it comes nearest.
#[derive(Default)]
pub(crate) struct Tally {
    pub passed: u32,
    /// The first of those that have the most, and how much that is.
    nearest: Option<(u64, Reverse<NodeId>)>,
}

impl Tally {
    pub fn nearest(&self) -> Option<NodeId> {
        self.nearest.map(|(_, Reverse(node))| node)
    }

    pub fn best(&self, state: &State) -> Best {
        let Some((has, Reverse(node))) = self.nearest else { return Best::default() };
        Best { node: state.nodes.get(&node).map_or_else(String::new, |node| node.value.name.clone()), has }
    }

    /// How much the nearest one has.
    pub fn has(&self) -> u64 {
        self.nearest.map_or(0, |(has, _)| has)
    }
}

/// A shape that accepts these types alone: any of them will do on a machine; none for a shape without GPUs.
#[derive(Clone, Copy)]
pub(crate) struct Asked<'a> {
    pub shape: &'a Shape,
    pub types: &'a [GpuTypeId],
}

impl Asked<'_> {
    /// Every machine as it would be in service, healthy and empty.
    pub fn survey_idle<'a>(&self, state: &'a State, choices: &mut Choices, machines: &[Alike<'_>]) -> Survey<'a> {
        let mut survey = self.new_survey();
        // Many groups differ in what is free alone.
        let mut known: Option<(Mask, &Face, (Step, u64))> = None;
        for alike in machines {
            let face = alike.face;
            let gpus = self.most(|gpu_type| face.kind(gpu_type).map_or(0, |kind| kind.present));
            let same = known.filter(|(of, other, _)| (*of, other.class, other.total) == (gpus, face.class, face.total));
            let lack = same.map_or_else(
                || self.first_lack(state, choices, face, (gpus, face.total.cores, face.total.mem_mib)),
                |(.., lack)| lack,
            );
            known = Some((gpus, face, lack));
            if survey.count(alike, lack) {
                survey.add(state, self.shape, alike);
            }
        }
        survey
    }

    /// The machines in service as the plan has left them.
    pub fn survey_now<'a>(&self, state: &'a State, choices: &mut Choices, machines: &[Alike<'_>]) -> Survey<'a> {
        let mut survey = self.new_survey();
        for alike in machines.iter().filter(|alike| alike.face.service == Service::In) {
            let face = alike.face;
            let gpus = self.most(|gpu_type| face.kind(gpu_type).map_or(0, |kind| kind.usable));
            let lack = self.first_lack(state, choices, face, (gpus, face.cores_free, face.mem_free_mib));
            let is_full = lack == (Step::Fits, 0) && face.is_full;
            if survey.count(alike, if is_full { (Step::Leases, 0) } else { lack }) {
                survey.add(state, self.shape, alike);
            }
            let sick = face.kinds.iter().filter(|kind| self.types.contains(&kind.gpu_type)).map(|kind| kind.sick);
            survey.unhealthy += sick.sum::<u32>() * count_of(alike);
        }
        survey
    }

    fn new_survey<'a>(&self) -> Survey<'a> {
        Survey { must_be_together: self.shape.required_level().is_some(), ..Survey::default() }
    }

    /// The GPUs of the type of which there are most.
    fn most(&self, of_type: impl Fn(GpuTypeId) -> Mask) -> Mask {
        self.types.iter().map(|gpu_type| of_type(*gpu_type)).max_by_key(|gpus| gpus.count_ones()).unwrap_or(0)
    }

    /// The first step that a machine with so many GPUs, cores and so much memory fails, and how much it has of what is short
    /// there.
    fn first_lack(
        &self,
        state: &State,
        choices: &mut Choices,
        face: &Face,
        (gpus, cores, mem_mib): (Mask, u32, u64),
    ) -> (Step, u64) {
        if gpus.count_ones() < self.shape.gpus_per_node() {
            return (Step::Gpus, gpus.count_ones().into());
        }
        let (needs_cores, needs_mem_mib) = face.total.request(self.shape);
        if cores < needs_cores {
            return (Step::Cores, cores.into());
        }
        if mem_mib < needs_mem_mib {
            return (Step::Memory, mem_mib);
        }
        let Some(want) = want_of(self.shape) else { return (Step::Fits, 0) };
        match choices.choose(state, face.class, gpus, want) {
            Ok(_) => (Step::Fits, 0),
            Err(Shortage::Bandwidth { best_mbps }) => (Step::Links, (*best_mbps).into()),
            // More GPUs than the class has links for: nothing is known to link them.
            Err(Shortage::Gpus { .. }) => (Step::Links, 0),
        }
    }
}

fn count_of(alike: &Alike<'_>) -> u32 {
    u32::try_from(alike.nodes.len()).unwrap_or(u32::MAX)
}

impl<'a> Survey<'a> {
    /// Counts machines with the first step that they fail; true when they fail none.
    fn count(&mut self, alike: &Alike<'_>, (lacks, has): (Step, u64)) -> bool {
        let machines = count_of(alike);
        for (step, tally) in STEPS.into_iter().zip(&mut self.tallies) {
            if step == lacks {
                tally.nearest = tally.nearest.max(alike.nodes.first().map(|first| (has, Reverse(first))));
                return false;
            }
            tally.passed += machines;
        }
        true
    }

    /// The first step that fewer machines pass than are needed.
    pub fn short_step(&self, needed: u32) -> Option<(Step, &Tally)> {
        STEPS.into_iter().zip(&self.tallies).find(|(_, tally)| tally.passed < needed)
    }

    fn add(&mut self, state: &'a State, shape: &Shape, alike: &Alike<'_>) {
        let service = alike.face.service;
        self.all.add(Room::of(service, count_of(alike)));
        if !self.must_be_together {
            return;
        }
        for node in alike.nodes.iter().filter_map(|id| state.nodes.get(&id)) {
            if let Some(domain) = domain_for(&node.value, shape) {
                self.rooms.entry(domain).or_default().add(Room::of(service, 1));
            }
        }
    }

    /// The domain that comes nearest, and how many it has, where the gang must be in one and none has as many as are needed.
    pub fn short_domain(&self, needed: u32, count: impl Fn(Room) -> u32) -> Option<(String, u32)> {
        let counted = self.rooms.iter().map(|(domain, room)| (count(*room), domain));
        let most = counted.max_by_key(|(count, domain)| (*count, Reverse(*domain)));
        let (count, domain) = most.map_or((0, String::new()), |(count, domain)| (count, name_of(domain)));
        (self.must_be_together && count < needed).then_some((domain, count))
    }
}
