//! The shapes of one cycle's open jobs: each is cut once (`statemachine::cut` says how), and what looks at machines then
//! sees a shape like any other.

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::sync::Arc;

use statemachine::State;
use statemachine::spec::{JobSpec, Shape};

use crate::cache::Cutting;
use crate::reason::{Lack, Needs, Reason};

/// Keeps what was cut where it is for as long as a cycle lasts: a list that only grows.
#[derive(Default)]
pub(crate) struct Shelf(OnceCell<Box<(Arc<[Shape]>, Shelf)>>);

/// What jobs say: their reservation, the open shape, and how often its GPUs may be doubled.
type Said<'a> = (&'a str, &'a Shape, u8);

pub(crate) struct Cuts<'a> {
    known: BTreeMap<Said<'a>, &'a [Shape]>,
    /// Of those that can't be cut.
    reasons: BTreeMap<Said<'a>, Arc<Reason>>,
    /// The end of the list.
    shelf: &'a Shelf,
}

impl<'a> Cuts<'a> {
    pub(crate) fn on(shelf: &'a Shelf) -> Self {
        Self { known: BTreeMap::new(), reasons: BTreeMap::new(), shelf }
    }

    /// The shapes in which the job is looked at, the largest first: its own alone, or where that is open the cut of each
    /// size. Adds the looks that it took to `steps`, or would have without what is known.
    pub(crate) fn sizes_of(
        &mut self,
        (state, known): (&State, &mut Cutting),
        spec: &'a JobSpec,
        steps: &mut u64,
    ) -> &'a [Shape] {
        if !spec.shape.is_open() {
            return std::slice::from_ref(&spec.shape);
        }
        let key = said(spec);
        if let Some(sizes) = self.known.get(&key).copied() {
            return sizes;
        }
        *steps += state.nodes.len() as u64;
        let (sizes, next) = &**self.shelf.0.get_or_init(|| Box::new((known.cuts(state, spec), Shelf::default())));
        self.shelf = next;
        self.known.insert(key, sizes);
        sizes
    }

    /// The reason of a job that was looked at in this shape, in the words of what it asked for.
    pub(crate) fn told(&mut self, state: &State, spec: &'a JobSpec, reason: Arc<Reason>) -> Arc<Reason> {
        if !is_uncut(spec, &reason) {
            return reason;
        }
        let known = self.reasons.entry(said(spec));
        known.or_insert_with(|| Arc::new(uncut(state, spec, &reason))).clone()
    }
}

fn said(spec: &JobSpec) -> Said<'_> {
    (spec.reservation(), &spec.shape, spec.doublings())
}

/// Its shape is open, and no machine has as many GPUs as the part that it was left in.
fn is_uncut(spec: &JobSpec, reason: &Reason) -> bool {
    spec.shape.is_open() && matches!(reason, Reason::Never { lack: Lack::Gpus(_), .. })
}

/// The same reason, but for a shape that can't be cut: which ones could be.
pub(crate) fn uncut(state: &State, spec: &JobSpec, reason: &Reason) -> Reason {
    match reason {
        Reason::Never { needs, .. } if is_uncut(spec, reason) => {
            Reason::Never { needs: Needs { machines: 0, ..needs.clone() }, lack: Lack::Cut(state.nearest_cuts(spec)) }
        }
        _ => reason.clone(),
    }
}

/// One after the other: a list drops its rest inside itself otherwise, and thousands are too deep for that.
impl Drop for Shelf {
    fn drop(&mut self) {
        let mut next = self.0.take();
        while let Some(mut kept) = next {
            next = kept.1.0.take();
        }
    }
}
