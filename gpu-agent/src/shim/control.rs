//! The page that the agent and one shim share: a mapped file of one attempt's rank. The agent extends the deadline by one
//! store, without waking anybody; the shim reads it again when its timer fires. A stop and the barrier's opening are
//! stores as well, followed by a SIGUSR1.
//!
//! It lives for one boot at most: what must survive a power cut stands in the fence file and in the exit record.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

const BYTES: usize = 4096;
const MAGIC: u64 = 0x0001_4c52_5443_5241; // "ARCTRL", version 1

#[repr(C)]
struct Page {
    magic: AtomicU64,
    deadline: AtomicU64,
    stop: AtomicU64,
    go: AtomicU64,
    phase: AtomicU64,
}

/// How far a rank has come, as its shim tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The shim is not ready yet.
    New,
    /// Ready, and waiting for the barrier.
    Waiting,
    /// The rank's command runs.
    Started,
    /// The exit record is on disk.
    Ended,
}

/// A request to end the rank: this signal, then SIGKILL after the grace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stop {
    pub signal: u8,
    pub grace_ms: u64,
}

impl Stop {
    const MARK: u64 = 1 << 63;
    const GRACE: u64 = (1 << 48) - 1;

    fn pack(self) -> u64 {
        Self::MARK | u64::from(self.signal) << 48 | self.grace_ms.min(Self::GRACE)
    }

    fn unpack(word: u64) -> Option<Self> {
        (word & Self::MARK != 0).then_some(Self { signal: (word >> 48 & 0x7f) as u8, grace_ms: word & Self::GRACE })
    }
}

/// A mapped control page.
pub struct Control {
    page: NonNull<Page>,
}

// SAFETY: the page is only touched through atomics, and stays mapped until the drop.
unsafe impl Send for Control {}
// SAFETY: as above.
unsafe impl Sync for Control {}

impl Control {
    /// A new page, with its first deadline (ms of CLOCK_BOOTTIME). All its blocks are allocated: a full disk is an error
    /// here, and not a SIGBUS later.
    pub fn create(path: &Path, deadline: u64, go: bool) -> io::Result<Self> {
        let mut file = OpenOptions::new().read(true).write(true).create_new(true).open(path)?;
        file.write_all(&[0; BYTES])?;
        let control = Self::map(&file)?;
        control.page().deadline.store(deadline, Ordering::Relaxed);
        control.page().go.store(u64::from(go), Ordering::Relaxed);
        control.page().magic.store(MAGIC, Ordering::Release);
        Ok(control)
    }

    pub fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        if file.metadata()?.len() < BYTES as u64 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the control page is too short"));
        }
        let control = Self::map(&file)?;
        if control.page().magic.load(Ordering::Acquire) != MAGIC {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "not a control page of this version"));
        }
        Ok(control)
    }

    fn map(file: &File) -> io::Result<Self> {
        let flags = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh shared mapping of BYTES, which the file covers; nobody shrinks it.
        let at = unsafe { mmap(std::ptr::null_mut(), BYTES, flags, MapFlags::SHARED, file, 0)? };
        let page = NonNull::new(at.cast::<Page>()).ok_or_else(|| io::Error::other("mapped at address zero"))?;
        Ok(Self { page })
    }

    fn page(&self) -> &Page {
        // SAFETY: mapped for the life of self; every bit pattern is a valid Page.
        unsafe { self.page.as_ref() }
    }

    /// ms of CLOCK_BOOTTIME at which everything of this rank is killed.
    pub fn deadline(&self) -> u64 {
        self.page().deadline.load(Ordering::Acquire)
    }

    /// A deadline never moves back.
    pub fn extend(&self, deadline: u64) {
        self.page().deadline.fetch_max(deadline, Ordering::AcqRel);
    }

    pub fn stop(&self) -> Option<Stop> {
        Stop::unpack(self.page().stop.load(Ordering::Acquire))
    }

    pub fn ask_stop(&self, stop: Stop) {
        self.page().stop.store(stop.pack(), Ordering::Release);
    }

    pub fn is_open(&self) -> bool {
        self.page().go.load(Ordering::Acquire) != 0
    }

    pub fn open_barrier(&self) {
        self.page().go.store(1, Ordering::Release);
    }

    pub fn phase(&self) -> Phase {
        match self.page().phase.load(Ordering::Acquire) {
            0 => Phase::New,
            1 => Phase::Waiting,
            2 => Phase::Started,
            _ => Phase::Ended,
        }
    }

    pub fn set_phase(&self, phase: Phase) {
        self.page().phase.store(phase as u64, Ordering::Release);
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with the same length, and not used any more.
        let _ = unsafe { munmap(self.page.as_ptr().cast(), BYTES) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_mappings_see_each_other_and_a_deadline_never_moves_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control");
        let agent = Control::create(&path, 100, false).unwrap();
        let shim = Control::open(&path).unwrap();
        agent.extend(500);
        agent.extend(300);
        assert_eq!(shim.deadline(), 500);
        assert_eq!(shim.stop(), None);
        agent.ask_stop(Stop { signal: 15, grace_ms: 5_000 });
        assert_eq!(shim.stop(), Some(Stop { signal: 15, grace_ms: 5_000 }));
        assert!(!shim.is_open());
        agent.open_barrier();
        assert!(shim.is_open());
        shim.set_phase(Phase::Started);
        assert_eq!(agent.phase(), Phase::Started);
    }

    #[test]
    fn a_foreign_or_short_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control");
        std::fs::write(&path, b"short").unwrap();
        assert!(Control::open(&path).is_err());
        std::fs::write(&path, [7; BYTES]).unwrap();
        assert!(Control::open(&path).is_err());
    }
}
