//! Disk space kept back. When the disk is full the reserve is given up, so that what the log holds can still be written
//! and acknowledged while the replica, told by [`super::Log::disk_full`], hands over leadership and refuses new writes.
//! When it can be made again, there is space again. Owns the file `reserve`; leaves waiting to the writer.

use std::fs::OpenOptions;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, fallocate};

use super::space::{is_ample, is_full, write_zeros};

pub(super) struct Reserve {
    path: PathBuf,
    bytes: u64,
    held: bool,
}

impl Reserve {
    pub(super) fn new(dir: &Path, bytes: u64) -> Reserve {
        Reserve { path: dir.join("reserve"), bytes, held: false }
    }

    pub(super) fn held(&self) -> bool {
        self.held
    }

    /// Takes the space at the start. Fails if there is not as much.
    pub(super) fn take(&mut self) -> io::Result<()> {
        let taken = self.fill();
        self.held = taken.is_ok();
        if !self.held {
            std::fs::remove_file(&self.path).ok();
        }
        taken
    }

    /// Takes the space again. Asks for twice as much to be free, else a disk at its edge would be full and not full in
    /// turns, and leadership would wander with it.
    pub(super) fn take_again(&mut self) -> io::Result<()> {
        let dir = self.path.parent().expect("the reserve lies in a directory");
        if !is_ample(dir, self.bytes)? {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.take()
    }

    fn fill(&self) -> io::Result<()> {
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(&self.path)?;
        match fallocate(&file, FallocateFlags::empty(), 0, self.bytes) {
            Ok(()) => Ok(()),
            Err(error) if is_full(&error.into()) => Err(error.into()),
            // A file system that cannot reserve: zeros take the space as well.
            Err(_) => write_zeros(&file, 0..self.bytes),
        }
    }

    /// Gives the space back to the disk; false if it was given back before.
    pub(super) fn give_up(&mut self) -> bool {
        std::mem::take(&mut self.held) && std::fs::remove_file(&self.path).is_ok()
    }
}
