//! The next segment's file, made ahead: zeros on disk, so that each write to it is an overwrite. The sync of an
//! overwrite waits for its data alone; that of a growing file waits for the file system's journal too, and with it, on
//! ext4, for the dirty pages of everyone else. Owns the file `spare` and the thread that makes it; leaves its use to the
//! writer, who does without where there is none.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::space::{is_ample, is_zero, write_zeros};

/// Zeros written before each sync. A sync of the log waits behind one such piece, not behind all of it.
const STEP: u64 = 1 << 20;
/// How long after a failure it is tried again.
const RETRY: Duration = Duration::from_secs(5);

pub(super) struct Spare {
    path: PathBuf,
    bytes: u64,
    ready: Option<File>,
    maker: Option<JoinHandle<io::Result<File>>>,
    next_try: Instant,
    stop: Arc<AtomicBool>,
}

/// A file of zeros, durable, but for its name.
pub(super) struct SpareFile {
    pub path: PathBuf,
    pub file: File,
    pub bytes: u64,
}

impl Spare {
    pub(super) fn new(dir: &Path, bytes: u64) -> Spare {
        Spare {
            path: dir.join("spare"),
            bytes,
            ready: None,
            maker: None,
            next_try: Instant::now(),
            stop: Arc::default(),
        }
    }

    /// Sees to it that there will be one. Does not block.
    pub(super) fn prepare(&mut self) {
        self.collect();
        if self.ready.is_some() || self.maker.is_some() || Instant::now() < self.next_try {
            return;
        }
        let (path, bytes, stop) = (self.path.clone(), self.bytes, self.stop.clone());
        let maker = std::thread::Builder::new()
            .name("ares-log-spare".to_owned())
            .spawn(move || make(&path, bytes, &stop).inspect_err(|_| drop(std::fs::remove_file(&path))));
        match maker {
            Ok(maker) => self.maker = Some(maker),
            Err(error) => self.failed(&error),
        }
    }

    /// The file, if it is ready.
    pub(super) fn take(&mut self) -> Option<SpareFile> {
        self.collect();
        let file = self.ready.take()?;
        Some(SpareFile { path: self.path.clone(), file, bytes: self.bytes })
    }

    /// Gives the space back to the disk; false if there was none to give.
    pub(super) fn give_up(&mut self) -> bool {
        self.take().is_some_and(|spare| std::fs::remove_file(spare.path).is_ok())
    }

    fn collect(&mut self) {
        if let Some(maker) = self.maker.take_if(|maker| maker.is_finished()) {
            match maker.join().unwrap_or_else(|_| Err(io::Error::other("its thread panicked"))) {
                Ok(file) => self.ready = Some(file),
                Err(error) => self.failed(&error),
            }
        }
    }

    fn failed(&mut self, error: &io::Error) {
        tracing::debug!(path = %self.path.display(), %error, "the next segment's file was not made ahead");
        self.next_try = Instant::now() + RETRY;
    }
}

impl Drop for Spare {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(maker) = self.maker.take() {
            maker.join().ok();
        }
    }
}

/// Blocks. Takes what an earlier run left, if that is whole.
fn make(path: &Path, bytes: u64, stop: &AtomicBool) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
    if !is_whole(&file, bytes)? {
        fill(path, &file, bytes, stop)?;
    }
    file.sync_all()?;
    Ok(file)
}

/// A spare whose use as a segment was begun, but not finished, has that segment's head in it.
fn is_whole(mut file: &File, bytes: u64) -> io::Result<bool> {
    if file.metadata()?.len() != bytes {
        return Ok(false);
    }
    let mut piece = vec![0; bytes.min(STEP) as usize];
    loop {
        match file.read(&mut piece)? {
            0 => return Ok(true),
            n if is_zero(&piece[..n]) => {}
            _ => return Ok(false),
        }
    }
}

fn fill(path: &Path, file: &File, bytes: u64, stop: &AtomicBool) -> io::Result<()> {
    file.set_len(0)?;
    if !is_ample(path.parent().expect("the spare lies in a directory"), bytes)? {
        return Err(io::ErrorKind::StorageFull.into());
    }
    let mut at = 0;
    while at < bytes {
        if stop.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let next = bytes.min(at + STEP);
        write_zeros(file, at..next)?;
        file.sync_data()?;
        at = next;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    fn wait_for(spare: &mut Spare) -> Option<SpareFile> {
        spare.prepare();
        (0..1000).find_map(|_| {
            std::thread::sleep(Duration::from_millis(5));
            spare.take()
        })
    }

    #[test]
    fn it_is_zeros_of_full_size_and_is_made_once() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut spare = Spare::new(dir.path(), 3_000_000);
        assert!(spare.take().is_none());
        let made = wait_for(&mut spare).expect("a spare");
        assert!(std::fs::read(&made.path).expect("read") == vec![0; 3_000_000]);
        assert!(spare.take().is_none());
    }

    #[test]
    fn what_was_left_is_used_if_it_is_whole() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = wait_for(&mut Spare::new(dir.path(), 100_000)).expect("a spare").path;
        let before = std::fs::metadata(&path).and_then(|meta| meta.modified()).expect("the spare");
        let again = wait_for(&mut Spare::new(dir.path(), 100_000)).expect("a spare");
        assert_eq!(again.file.metadata().and_then(|meta| meta.modified()).expect("the spare"), before);

        for damage in 0..3 {
            let file = OpenOptions::new().write(true).open(&path).expect("open");
            match damage {
                0 => file.write_all_at(b"ARES-LOG", 0).expect("write"),
                1 => file.write_all_at(&[1], 99_999).expect("write"),
                _ => file.set_len(99_999).expect("shorten"),
            }
            let made = wait_for(&mut Spare::new(dir.path(), 100_000)).expect("a spare");
            assert!(std::fs::read(&made.path).expect("read") == vec![0; 100_000], "damage {damage}");
        }
    }

    #[test]
    fn it_is_not_made_where_space_is_short_and_can_be_given_up() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut huge = Spare::new(dir.path(), 1 << 60);
        huge.prepare();
        let maker = huge.maker.take().expect("a thread");
        let error = maker.join().expect("no panic").expect_err("no disk is as large");
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        assert!(!dir.path().join("spare").exists());

        let mut spare = Spare::new(dir.path(), 5000);
        spare.ready = wait_for(&mut spare).map(|made| made.file);
        assert!(spare.path.exists() && spare.give_up() && !spare.give_up());
        assert!(!dir.path().join("spare").exists());
    }
}
