//! The disks under the simulated replicas' logs: who does a log's writing while there is no thread for it, by the log's directory. When
//! a disk works, how its syncs fail, and when its power goes, is the simulator's.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::log::{ByHand, LogError};

thread_local! {
    static DISKS: RefCell<BTreeMap<PathBuf, ByHand>> = const { RefCell::new(BTreeMap::new()) };
}

/// Where an opened log leaves its writing.
pub(crate) fn mount(log: &Path, by_hand: ByHand) {
    DISKS.with_borrow_mut(|disks| disks.insert(log.to_owned(), by_hand));
}

fn on<T>(log: &Path, work: impl FnOnce(&mut ByHand) -> T) -> Option<T> {
    // Taken out meanwhile: what is answered may ask the disk again.
    let mut by_hand = DISKS.with_borrow_mut(|disks| disks.remove(log))?;
    let done = work(&mut by_hand);
    mount(log, by_hand);
    Some(done)
}

/// Makes durable what waits, and answers it. After an error the log has stopped for good.
pub fn work(log: &Path) -> Result<(), LogError> {
    let all = |by_hand: &mut ByHand| {
        while by_hand.step()? {}
        Ok(())
    };
    on(log, all).unwrap_or(Ok(()))
}

/// The next sync fails.
pub fn fail_next_sync(log: &Path) {
    on(log, |by_hand| by_hand.fail_next_sync());
}

/// What the log says of its disk while the simulator lets it write nothing.
pub fn say_full(log: &Path, full: bool) {
    on(log, |by_hand| by_hand.say_full(full));
}

/// The power fails: of what was written and not synced, each sector is on disk only where `kept` says so. How many bytes were lost. The
/// replica must be gone.
pub fn cut_power(log: &Path, kept: impl FnMut() -> bool) -> Result<u64, LogError> {
    let by_hand = DISKS.with_borrow_mut(|disks| disks.remove(log));
    by_hand.map_or(Ok(0), |by_hand| by_hand.cut_power(kept))
}
