//! Bandwidth tables by class, shared by all who have a clone: one takes a linear program for each set of GPUs, which is much for a
//! look at a job, and follows from the class alone.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use statemachine::record::Class;

use crate::bandwidth::BandwidthTable;

/// Clones share what they know.
#[derive(Clone, Debug, Default)]
pub struct Tables(Arc<Mutex<BTreeMap<Class, Arc<BandwidthTable>>>>);

impl Tables {
    pub fn of(&self, class: &Class) -> Arc<BandwidthTable> {
        let known = self.map().get(class).cloned();
        known.unwrap_or_else(|| {
            // Not under the lock: two that need the same one at once both make it.
            let table = Arc::new(BandwidthTable::new(class));
            self.map().insert(class.clone(), table.clone());
            table
        })
    }

    fn map(&self) -> MutexGuard<'_, BTreeMap<Class, Arc<BandwidthTable>>> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}
