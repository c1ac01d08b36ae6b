//! What a planner keeps from plan to plan: predicted bandwidths, choices of GPUs, machines by groups.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use statemachine::record::Class;
use statemachine::settings::Settings;
use statemachine::spec::{JobSpec, Shape};
use statemachine::{ClassId, GpuTypeId, NodeId, State};

use crate::bandwidth::BandwidthTable;
use crate::choose::{Choice, Shortage, Want, choose};
use crate::fleet::Fleet;
use crate::holding::Held;
use crate::links::Mask;
use crate::tables::Tables;

/// Remembered choices; ~100 bytes each. Over it all are forgotten: recomputing is cheaper than an order of eviction.
const CHOICES: usize = 65_536;
/// Shapes of which it is remembered how they are cut, that idle machines would do, or that too few have seats; over it all are forgotten.
const SHAPES: usize = 16_384;

/// What a planner may keep from plan to plan. Everything in it follows from the state: an empty cache gives the same
/// plan, later.
#[derive(Clone, Debug, Default)]
pub struct Cache {
    pub(crate) choices: Choices,
    pub(crate) fleet: Fleet,
    pub(crate) able: Able,
    pub(crate) cutting: Cutting,
    pub(crate) seatless: Seatless,
    pub(crate) held: Arc<Held>,
}

impl Cache {
    /// An empty one that asks these tables.
    pub fn with(tables: &Tables) -> Self {
        Self { choices: Choices { shared: tables.clone(), ..Choices::default() }, ..Self::default() }
    }

    /// The best set of a machine's usable GPUs, as `choose` finds it; remembered.
    pub fn choose(&mut self, state: &State, class: ClassId, usable: Mask, want: Want) -> &Result<Choice, Shortage> {
        self.choices.choose(state, class, usable, want)
    }

    /// Follows a state without a plan: the first one of a new leader then looks at what has changed since, not at everything.
    pub fn follow(&mut self, state: &State) {
        self.begin(state, &BTreeSet::new());
    }

    /// What is known of this state, as one with these machines unheard sees it before it plans.
    pub(crate) fn begin(&mut self, state: &State, unheard: &BTreeSet<NodeId>) {
        if !self.choices.keep_what_holds(state) || self.seatless.since.len() >= SHAPES {
            self.seatless = Seatless::default();
        }
        self.fleet.begin(state, unheard);
        self.able.begin(self.fleet.facts());
        self.cutting.begin(self.fleet.facts(), &state.meta.settings);
        Arc::make_mut(&mut self.held).begin(state);
    }
}

/// Shapes that could run on the machines in service if these were idle, with GPUs of which types: how many machines that would do are
/// out of service. It follows from what machines are, not from what they do.
#[derive(Clone, Debug, Default)]
pub(crate) struct Able {
    /// `Fleet::facts` when it was learned.
    facts: u64,
    away: BTreeMap<Shape, BTreeMap<Vec<GpuTypeId>, u32>>,
}

impl Able {
    fn begin(&mut self, facts: u64) {
        if self.facts != facts || self.away.len() >= SHAPES {
            (self.facts, self.away) = (facts, BTreeMap::new());
        }
    }

    /// Machines could run the shape were they idle, with GPUs of some type.
    pub fn is_known(&self, shape: &Shape) -> bool {
        self.away.contains_key(shape)
    }

    pub fn away(&self, shape: &Shape, types: &[GpuTypeId]) -> Option<u32> {
        self.away.get(shape)?.get(types).copied()
    }

    pub fn note(&mut self, shape: &Shape, types: &[GpuTypeId], away: u32) {
        self.away.entry(shape.clone()).or_default().insert(types.to_vec(), away);
    }
}

/// How open shapes are cut, by how often they may be doubled. It follows from what machines are and from two limits; but for a job that names a
/// reservation, from that too.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cutting {
    /// `Fleet::facts` when it was learned, and the limits on parts and ranks of a lease.
    of: (u64, u32, u32),
    known: BTreeMap<Shape, BTreeMap<u8, Arc<[Shape]>>>,
}

impl Cutting {
    fn begin(&mut self, facts: u64, settings: &Settings) {
        let of = (facts, settings.parts_per_lease, settings.ranks_per_lease);
        if self.of != of || self.known.len() >= SHAPES {
            (self.of, self.known) = (of, BTreeMap::new());
        }
    }

    /// As `State::cuts` has them.
    pub fn cuts(&mut self, state: &State, spec: &JobSpec) -> Arc<[Shape]> {
        if !spec.reservation().is_empty() {
            return state.cuts(spec).into();
        }
        if let Some(known) = self.known.get(&spec.shape).and_then(|known| known.get(&spec.doublings())) {
            return known.clone();
        }
        let cuts: Arc<[Shape]> = state.cuts(spec).into();
        self.known.entry(spec.shape.clone()).or_default().insert(spec.doublings(), cuts.clone());
        cuts
    }
}

/// Shapes for which too few machines had seats: after how many of `Fleet::moves`.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seatless {
    since: BTreeMap<Shape, u64>,
}

impl Seatless {
    pub fn since(&self, shape: &Shape) -> Option<u64> {
        self.since.get(shape).copied()
    }

    pub fn note(&mut self, shape: &Shape, moves: u64) {
        match self.since.get_mut(shape) {
            Some(since) => *since = moves,
            None => _ = self.since.insert(shape.clone(), moves),
        }
    }
}

/// Which GPUs of a machine are the best, as often as it is asked.
#[derive(Clone, Debug, Default)]
pub(crate) struct Choices {
    shared: Tables,
    tables: BTreeMap<ClassId, Arc<BandwidthTable>>,
    known: BTreeMap<(ClassId, Want), BTreeMap<Mask, Result<Choice, Shortage>>>,
    count: usize,
}

impl Choices {
    /// Forgets all if some was derived from classes that are not those of the state; false if so.
    fn keep_what_holds(&mut self, state: &State) -> bool {
        let holds =
            |(class, table): (&ClassId, &Arc<BandwidthTable>)| state.classes.get(class) == Some(table.links().facts());
        let hold = self.tables.iter().all(holds);
        if !hold {
            *self = Self { shared: self.shared.clone(), ..Self::default() };
        }
        hold
    }

    pub fn choose(&mut self, state: &State, class: ClassId, usable: Mask, want: Want) -> &Result<Choice, Shortage> {
        if self.count >= CHOICES {
            self.known.clear();
            self.count = 0;
        }
        let Self { shared, tables, known, count } = self;
        known.entry((class, want)).or_default().entry(usable).or_insert_with(|| {
            *count += 1;
            let new = || shared.of(state.classes.get(&class).unwrap_or(&Class::default()));
            choose(tables.entry(class).or_insert_with(new), usable, want)
        })
    }
}
