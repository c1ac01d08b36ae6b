//! What keeps a late attempt from writing where a newer one writes: a target (a file or directory, of a job's own, on a
//! file system that all attempts share) with a durable record of the highest token that it has seen.
//!
//! The record is `.NAME.fence` beside the target: lines of 32 bytes, `TOKEN CRC32`, appended and synced before anything is
//! done under a new token. It is locked with flock(2), and so only as good as the file system's flock: on NFS since Linux
//! 2.6.12 and on Lustre with `-o flock` it is shared by all clients; where locks are local to a machine it excludes only
//! the attempts of that machine. Tokens are compared as numbers: one target belongs to jobs of one cluster.
//!
//! What it leaves to others: where the token comes from (`ARES_FENCING_TOKEN`), and running a command.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with};

/// A record's line; a divisor of every disk's block, so that none lies across two.
const LINE: usize = 32;
/// Between two looks at a lock that somebody holds.
const LOCK_POLL: Duration = Duration::from_millis(20);

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("token {token} is older than {highest}, which {} has seen: a later attempt has it now; nothing was changed", target.display())]
    Stale { target: PathBuf, token: u64, highest: u64 },
    #[error("the fence record {} was locked by another step for {waited:?}", record.display())]
    Locked { record: PathBuf, waited: Duration },
    #[error("the fence record {} is damaged at byte {offset}: restore it, or write into it the highest token that may ever have been used (ares show JOB names them)", record.display())]
    Damaged { record: PathBuf, offset: usize },
    #[error("{}: {what}", path.display())]
    BadTarget { path: PathBuf, what: &'static str },
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { path, source }
}

/// A file or directory under a fence. It need not exist; its parent must.
#[derive(Clone, Debug)]
pub struct Target {
    parent: PathBuf,
    name: String,
}

/// The target's lock, held under a token that nothing newer has passed. It ends with the last copy of its descriptor.
#[derive(Debug)]
pub struct Held {
    target: Target,
    token: u64,
    record: File,
}

impl Target {
    pub fn at(path: &Path) -> Result<Self, Error> {
        let bad = |what| Error::BadTarget { path: path.to_owned(), what };
        let name = path.file_name().ok_or_else(|| bad("names no file or directory of its own"))?;
        let name = name.to_str().ok_or_else(|| bad("its name is not UTF-8"))?.to_owned();
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let parent = parent.canonicalize().map_err(at(parent))?;
        Ok(Self { parent, name })
    }

    pub fn path(&self) -> PathBuf {
        self.parent.join(&self.name)
    }

    pub fn record_path(&self) -> PathBuf {
        self.parent.join(format!(".{}.fence", self.name))
    }

    /// Where the holder of a token prepares what it will publish: beside the target, so that a rename is enough.
    pub fn staging(&self, token: u64) -> PathBuf {
        self.parent.join(format!(".{}.{token}-{}.new", self.name, std::process::id()))
    }

    /// The highest token seen; `None` = no token yet.
    pub fn highest(&self) -> Result<Option<u64>, Error> {
        let path = self.record_path();
        match File::open(&path) {
            Ok(mut file) => read(&mut file, &path).map(|(highest, _)| highest),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(at(&path)(error)),
        }
    }

    /// Whether the token is the newest or newer; changes nothing. It says what was, not what will be: only what is done
    /// under [`Target::admit`]'s lock excludes.
    pub fn check(&self, token: u64) -> Result<(), Error> {
        self.judge(token, self.highest()?)
    }

    /// Takes the lock, waiting at most `wait` (`None`: as long as it takes), and makes the token the newest, on disk. From
    /// here on every older one is refused.
    pub fn admit(&self, token: u64, wait: Option<Duration>) -> Result<Held, Error> {
        let path = self.record_path();
        let existed = path.exists();
        let mut options = OpenOptions::new();
        let mut record = options.read(true).write(true).create(true).truncate(false).open(&path).map_err(at(&path))?;
        lock(&record, &path, wait)?;
        let (highest, good) = read(&mut record, &path)?;
        self.judge(token, highest)?;
        if highest != Some(token) {
            append(&mut record, good, token).map_err(at(&path))?;
        }
        if !existed || good == 0 {
            sync_dir(&self.parent)?;
        }
        Ok(Held { target: self.clone(), token, record })
    }

    fn judge(&self, token: u64, highest: Option<u64>) -> Result<(), Error> {
        match highest.filter(|highest| *highest > token) {
            Some(highest) => Err(Error::Stale { target: self.path(), token, highest }),
            None => Ok(()),
        }
    }

    /// Token of a staging path of this target.
    fn staged_by(&self, name: &str) -> Option<u64> {
        let middle = name.strip_prefix(&format!(".{}.", self.name))?.strip_suffix(".new")?;
        let (token, pid) = middle.split_once('-')?;
        pid.parse::<u32>().ok()?;
        token.parse().ok()
    }
}

impl Held {
    /// Puts `new` (a file or directory beside the target, or anywhere on its file system) in the target's place, whole
    /// and synced: who looks sees the old or the new one. What older attempts left in staging goes.
    pub fn publish(&self, new: &Path) -> Result<(), Error> {
        sync_tree(new)?;
        let path = self.target.path();
        let exchanged = match (new.symlink_metadata(), path.symlink_metadata()) {
            (Ok(new), Ok(old)) => new.is_dir() || old.is_dir(),
            _ => false,
        };
        let flags = if exchanged { RenameFlags::EXCHANGE } else { RenameFlags::empty() };
        let renamed = if exchanged {
            renameat_with(CWD, new, CWD, &path, flags).map_err(io::Error::from)
        } else {
            fs::rename(new, &path)
        };
        renamed.map_err(at(&path))?;
        sync_dir(&self.target.parent)?;
        if exchanged {
            // The old one, by now under the new one's name.
            remove(new)?;
        }
        self.tidy()
    }

    fn tidy(&self) -> Result<(), Error> {
        for entry in fs::read_dir(&self.target.parent).map_err(at(&self.target.parent))?.flatten() {
            let name = entry.file_name();
            let staged = name.to_str().and_then(|name| self.target.staged_by(name));
            if staged.is_some_and(|token| token < self.token) {
                remove(&entry.path())?;
            }
        }
        Ok(())
    }
}

impl AsFd for Held {
    /// The lock: a command that inherits it keeps it for as long as one of its processes lives.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.record.as_fd()
    }
}

/// Removes a file or a whole directory; one that is gone is no error.
pub fn remove(path: &Path) -> Result<(), Error> {
    let removed = match path.symlink_metadata() {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at(path)(error)),
        _ => Ok(()),
    }
}

fn lock(record: &File, path: &Path, wait: Option<Duration>) -> Result<(), Error> {
    let Some(wait) = wait else {
        return flock(record, FlockOperation::LockExclusive).map_err(|errno| at(path)(errno.into()));
    };
    let began = Instant::now();
    loop {
        match flock(record, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(()),
            Err(rustix::io::Errno::WOULDBLOCK) if began.elapsed() < wait => std::thread::sleep(LOCK_POLL),
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(Error::Locked { record: path.to_owned(), waited: wait }),
            Err(errno) => return Err(at(path)(errno.into())),
        }
    }
}

fn line(token: u64) -> String {
    let token = format!("{token:020}");
    format!("{token} {:08x}  \n", crc32fast::hash(token.as_bytes()))
}

/// The highest token, and how many bytes of whole lines there are. A last line that was not finished never counted: its
/// sync had not returned.
fn read(record: &mut File, path: &Path) -> Result<(Option<u64>, usize), Error> {
    let mut bytes = Vec::new();
    record.seek(SeekFrom::Start(0)).and_then(|_| record.read_to_end(&mut bytes)).map_err(at(path))?;
    let mut highest = None;
    let whole = bytes.chunks_exact(LINE);
    let good = bytes.len() - whole.remainder().len();
    for (number, text) in whole.enumerate() {
        let token = std::str::from_utf8(text).ok().and_then(|text| text.get(..20)?.parse::<u64>().ok());
        let token = token.filter(|token| line(*token).as_bytes() == text);
        let damaged = || Error::Damaged { record: path.to_owned(), offset: number * LINE };
        highest = highest.max(Some(token.ok_or_else(damaged)?));
    }
    Ok((highest, good))
}

fn append(record: &mut File, good: usize, token: u64) -> io::Result<()> {
    record.set_len(good as u64)?;
    record.seek(SeekFrom::Start(good as u64))?;
    record.write_all(line(token).as_bytes())?;
    record.sync_all()
}

fn sync_dir(path: &Path) -> Result<(), Error> {
    File::open(path).and_then(|dir| dir.sync_all()).map_err(at(path))
}

fn sync_tree(path: &Path) -> Result<(), Error> {
    let meta = path.symlink_metadata().map_err(at(path))?;
    if meta.is_dir() {
        for entry in fs::read_dir(path).map_err(at(path))? {
            sync_tree(&entry.map_err(at(path))?.path())?;
        }
    } else if !meta.is_file() {
        // A link is part of its directory.
        return Ok(());
    }
    File::open(path).and_then(|file| file.sync_all()).map_err(at(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Option<Duration> = Some(Duration::ZERO);

    fn target() -> (tempfile::TempDir, Target) {
        let dir = tempfile::tempdir().unwrap();
        let target = Target::at(&dir.path().join("model")).unwrap();
        (dir, target)
    }

    #[test]
    fn an_older_token_is_refused_for_good() {
        let (_dir, target) = target();
        target.check(5).unwrap();
        drop(target.admit(5, NOW).unwrap());
        drop(target.admit(5, NOW).unwrap());
        drop(target.admit(9, NOW).unwrap());
        assert!(matches!(target.admit(5, NOW), Err(Error::Stale { token: 5, highest: 9, .. })));
        assert!(matches!(target.check(8), Err(Error::Stale { .. })));
        assert_eq!(target.highest().unwrap(), Some(9));
    }

    #[test]
    fn a_lock_is_held_as_long_as_one_copy_of_it() {
        let (_dir, target) = target();
        let held = target.admit(5, NOW).unwrap();
        let copy = held.as_fd().try_clone_to_owned().unwrap();
        drop(held);
        assert!(matches!(target.admit(9, NOW), Err(Error::Locked { .. })));
        drop(copy);
        target.admit(9, NOW).unwrap();
    }

    #[test]
    fn what_is_published_is_there_whole_and_what_older_attempts_staged_is_gone() {
        let (dir, target) = target();
        let stage = |token: u64, text: &str| {
            let new = target.staging(token);
            fs::create_dir(&new).unwrap();
            fs::write(new.join("weights"), text).unwrap();
            new
        };
        let (old, new) = (stage(5, "old"), stage(9, "new"));
        target.admit(9, NOW).unwrap().publish(&new).unwrap();
        assert!(!old.exists() && !new.exists());
        let newer = stage(9, "newer");
        target.admit(9, NOW).unwrap().publish(&newer).unwrap();
        assert_eq!(fs::read_to_string(target.path().join("weights")).unwrap(), "newer");
        let names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names.len(), 2, "{names:?}");
        fs::write(target.staging(9), "a file").unwrap();
        target.admit(9, NOW).unwrap().publish(&target.staging(9)).unwrap();
        assert_eq!(fs::read_to_string(target.path()).unwrap(), "a file");
    }

    #[test]
    fn a_torn_line_never_counted_and_a_damaged_one_stops() {
        let (_dir, target) = target();
        drop(target.admit(5, NOW).unwrap());
        let path = target.record_path();
        let mut bytes = fs::read(&path).unwrap();
        assert_eq!(bytes.len(), LINE);
        bytes.extend(&line(7).as_bytes()[..31]);
        fs::write(&path, &bytes).unwrap();
        assert_eq!(target.highest().unwrap(), Some(5));
        drop(target.admit(6, NOW).unwrap());
        assert_eq!(fs::read(&path).unwrap().len(), 2 * LINE);
        bytes[3] ^= 1;
        fs::write(&path, &bytes[..LINE]).unwrap();
        assert!(matches!(target.admit(9, NOW), Err(Error::Damaged { offset: 0, .. })));
    }

    #[test]
    fn a_target_has_a_name_and_one_record_by_whatever_way_it_is_named() {
        let (dir, target) = target();
        assert!(matches!(Target::at(Path::new("/")), Err(Error::BadTarget { .. })));
        fs::create_dir(dir.path().join("sub")).unwrap();
        let other = Target::at(&dir.path().join("sub/../model/")).unwrap();
        assert_eq!(other.record_path(), target.record_path());
    }
}
