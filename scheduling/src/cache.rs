//! What a planner keeps from plan to plan: predicted bandwidths, choices of GPUs, machines by groups.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use statemachine::record::Class;
use statemachine::spec::Shape;
use statemachine::{ClassId, GpuTypeId, NodeId, State};

use crate::bandwidth::BandwidthTable;
use crate::choose::{Choice, Shortage, Want, choose};
use crate::fleet::Fleet;
use crate::holding::Held;
use crate::links::Mask;

/// Remembered choices; ~100 bytes each. Over it all are forgotten: recomputing is cheaper than an order of eviction.
const CHOICES: usize = 65_536;
/// Shapes of which it is remembered that idle machines would do; over it all are forgotten.
const SHAPES: usize = 16_384;

/// What a planner may keep from plan to plan. Everything in it follows from the state: an empty cache gives the same
/// plan, later.
#[derive(Clone, Debug, Default)]
pub struct Cache {
    pub(crate) choices: Choices,
    pub(crate) fleet: Fleet,
    pub(crate) able: Able,
    pub(crate) held: Arc<Held>,
}

impl Cache {
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
        self.choices.keep_what_holds(state);
        self.fleet.begin(state, unheard);
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
    pub fn away(&mut self, facts: u64, shape: &Shape, types: &[GpuTypeId]) -> Option<u32> {
        if self.facts != facts || self.away.len() >= SHAPES {
            (self.facts, self.away) = (facts, BTreeMap::new());
        }
        self.away.get(shape)?.get(types).copied()
    }

    pub fn note(&mut self, shape: &Shape, types: &[GpuTypeId], away: u32) {
        self.away.entry(shape.clone()).or_default().insert(types.to_vec(), away);
    }
}

/// Which GPUs of a machine are the best, as often as it is asked.
#[derive(Clone, Debug, Default)]
pub(crate) struct Choices {
    tables: BTreeMap<ClassId, Arc<BandwidthTable>>,
    known: BTreeMap<(ClassId, Want), BTreeMap<Mask, Result<Choice, Shortage>>>,
    count: usize,
}

impl Choices {
    /// Forgets what was derived from classes that are not those of the state.
    fn keep_what_holds(&mut self, state: &State) {
        let holds =
            |(class, table): (&ClassId, &Arc<BandwidthTable>)| state.classes.get(class) == Some(table.links().facts());
        if !self.tables.iter().all(holds) {
            *self = Self::default();
        }
    }

    pub fn choose(&mut self, state: &State, class: ClassId, usable: Mask, want: Want) -> &Result<Choice, Shortage> {
        if self.count >= CHOICES {
            self.known.clear();
            self.count = 0;
        }
        let Self { tables, known, count } = self;
        known.entry((class, want)).or_default().entry(usable).or_insert_with(|| {
            *count += 1;
            let new = || Arc::new(BandwidthTable::new(state.classes.get(&class).unwrap_or(&Class::default())));
            choose(tables.entry(class).or_insert_with(new), usable, want)
        })
    }
}
