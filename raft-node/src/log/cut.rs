//! What a power cut may take of the segment that is written: a simulated disk keeps what was synced, and of the rest each sector on its
//! own. Which sectors, the simulator draws.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use planted::{Bug, planted};

const SECTOR: u64 = 512;

/// The bytes of the current segment that no sync has made durable.
pub(super) struct AtRisk {
    /// Everything from here on.
    from: u64,
    /// What a failed sync left: later syncs do not write it again.
    dropped: Vec<Range<u64>>,
}

impl AtRisk {
    /// All that is written from here on.
    pub(super) fn behind(len: u64) -> Self {
        Self { from: len, dropped: Vec::new() }
    }

    /// A sync of everything up to `len` ended.
    pub(super) fn synced(&mut self, len: u64, well: bool) {
        if planted(Bug::AckWithoutFsync) {
            return;
        }
        if !well {
            self.dropped.push(self.from..len);
        }
        self.from = len;
    }

    /// Takes each sector that `kept` does not spare. How many bytes were lost.
    pub(super) fn cut(self, file: &File, len: u64, mut kept: impl FnMut() -> bool) -> io::Result<u64> {
        let mut lost = 0;
        for span in self.dropped.into_iter().chain(std::iter::once(self.from..len)) {
            let mut at = span.start;
            while at < span.end {
                let next = ((at / SECTOR + 1) * SECTOR).min(span.end);
                if !kept() {
                    file.write_all_at(&vec![0; (next - at) as usize], at)?;
                    lost += next - at;
                }
                at = next;
            }
        }
        Ok(lost)
    }
}
