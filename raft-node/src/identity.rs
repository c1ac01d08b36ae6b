//! Whose directory this is: the lock that keeps a second process out, and the IDENTITY file. Refuses a foreign directory and one that lost
//! its identity; what the log, the vote and the image hold is for their owners to judge.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

/// Version of the directory's layout: the day on which it was fixed.
const FORMAT: u32 = 20_261_125;
const LOCK: &str = "LOCK";
const IDENTITY: &str = "IDENTITY";

/// The cluster's id: drawn once, at the bootstrap.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ClusterId(pub [u8; 16]);

impl fmt::Display for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::str::FromStr for ClusterId {
    type Err = String;

    /// 32 hex digits.
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no cluster id: 32 hex digits");
        if text.len() != 32 || !text.is_ascii() {
            return Err(wrong());
        }
        let mut bytes = [0u8; 16];
        for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
            let digits = std::str::from_utf8(digits).map_err(|_| wrong())?;
            *byte = u8::from_str_radix(digits, 16).map_err(|_| wrong())?;
        }
        Ok(Self(bytes))
    }
}

/// How far this replica's membership has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// It founds the group; the first entry may not be written yet.
    Founding,
    /// It asked to be taken in; its log may be empty yet.
    Joining,
    /// The group's membership names it: an empty log would be a lost one.
    Member,
}

/// Who this replica is. Ids are never used again: a directory that is lost takes its id with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    pub cluster: ClusterId,
    /// Random, never 0.
    pub replica: u64,
    pub stage: Stage,
}

impl Identity {
    /// A new replica's, with a random id.
    pub fn new(cluster: ClusterId, stage: Stage) -> Self {
        Self { cluster, replica: rand::random_range(1..=u64::MAX), stage }
    }
}

#[derive(Serialize, Deserialize)]
struct Stored {
    format: u32,
    /// Hex.
    cluster: String,
    /// In decimal, as text: JSON numbers end at 2^53 for some readers.
    replica: String,
    stage: Stage,
}

#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    #[error("{}: cannot {doing}: {source}", path.display())]
    Io { doing: &'static str, path: PathBuf, source: io::Error },
    #[error("{} is in use by another process", .0.display())]
    InUse(PathBuf),
    #[error(
        "{} holds files, but no {IDENTITY}: it is not known whose they are. Give another directory; or, if it was a replica's and the \
         file was lost, remove that replica from the group and let it join again with an empty directory, as a new member",
        .0.display()
    )]
    Missing(PathBuf),
    #[error("{} can't be read: {what}. Restore it from a copy, or remove this replica from the group and let it join again with an empty directory", path.display())]
    Damaged { path: PathBuf, what: String },
    #[error("{} has format {found}, this program knows {FORMAT}: start it with the newer program that wrote it", path.display())]
    Format { path: PathBuf, found: u32 },
    #[error("{} belongs to cluster {found}, the group is cluster {wanted}: give another directory, or join its own cluster", path.display())]
    Foreign { path: PathBuf, found: ClusterId, wanted: ClusterId },
    #[error(
        "{} belongs to replica {replica} of cluster {cluster} already: a group is founded once. Start it without --bootstrap; or, for another \
         group, give another directory",
        path.display()
    )]
    Founded { path: PathBuf, cluster: ClusterId, replica: u64 },
    #[error("{} is no replica's directory: start the first replica of a group with --bootstrap, others with --join", .0.display())]
    Nobodys(PathBuf),
}

/// A locked directory. The lock is let go when the last owner of this value is gone, whatever else the process does.
#[derive(Debug)]
pub struct Home {
    dir: PathBuf,
    _lock: File,
}

impl Home {
    /// Makes the directory if there is none, and locks it.
    pub fn lock(dir: &Path) -> Result<Self, IdentityError> {
        fs::create_dir_all(dir).map_err(io_error("create", dir))?;
        let path = dir.join(LOCK);
        let lock =
            OpenOptions::new().create(true).truncate(false).write(true).open(&path).map_err(io_error("open", &path))?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self { dir: dir.to_owned(), _lock: lock }),
            Err(Errno::WOULDBLOCK) => Err(IdentityError::InUse(dir.to_owned())),
            Err(err) => Err(io_error("lock", &path)(err.into())),
        }
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The identity; `None` in an empty directory, an error in one that holds anything else without it.
    pub fn identity(&self) -> Result<Option<Identity>, IdentityError> {
        let path = self.dir.join(IDENTITY);
        match fs::read(&path) {
            Ok(bytes) => parse(&path, &bytes).map(Some),
            Err(err) if err.kind() == io::ErrorKind::NotFound => {
                if self.holds_other_files()? {
                    Err(IdentityError::Missing(self.dir.clone()))
                } else {
                    Ok(None)
                }
            }
            Err(err) => Err(io_error("read", &path)(err)),
        }
    }

    /// Replaces the identity: durable, whole or not at all.
    pub fn write(&self, identity: &Identity) -> Result<(), IdentityError> {
        let stored = Stored {
            format: FORMAT,
            cluster: identity.cluster.to_string(),
            replica: identity.replica.to_string(),
            stage: identity.stage,
        };
        let text = serde_json::to_string_pretty(&stored).expect("plain fields always encode") + "\n";
        self.replace(IDENTITY, text.as_bytes())
    }

    /// Replaces a file of the directory: durable, whole or not at all.
    pub(crate) fn replace(&self, name: &str, bytes: &[u8]) -> Result<(), IdentityError> {
        let (new, path) = (self.dir.join(format!("{name}.new")), self.dir.join(name));
        let mut file = File::create(&new).map_err(io_error("create", &new))?;
        file.write_all(bytes).map_err(io_error("write", &new))?;
        file.sync_all().map_err(io_error("sync", &new))?;
        fs::rename(&new, &path).map_err(io_error("rename to", &path))?;
        File::open(&self.dir).and_then(|dir| dir.sync_all()).map_err(io_error("sync", &self.dir))
    }

    /// Not the lock, an unfinished first identity, or what others may lay here before a replica exists (`env`, logs of the process).
    fn holds_other_files(&self) -> Result<bool, IdentityError> {
        let entries = fs::read_dir(&self.dir).map_err(io_error("list", &self.dir))?;
        for entry in entries {
            let name = entry.map_err(io_error("list", &self.dir))?.file_name();
            if OWNED.iter().any(|owned| name == *owned) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// What a replica keeps in its directory; their presence without an identity means that the identity was lost.
pub const LOG_DIR: &str = "log";
pub const IMAGE_DIR: &str = "image";
pub const SNAPSHOT_DIR: &str = "snapshots";
const OWNED: [&str; 3] = [LOG_DIR, IMAGE_DIR, SNAPSHOT_DIR];

fn parse(path: &Path, bytes: &[u8]) -> Result<Identity, IdentityError> {
    let damaged = |what: String| IdentityError::Damaged { path: path.to_owned(), what };
    let stored: Stored = serde_json::from_slice(bytes).map_err(|err| damaged(err.to_string()))?;
    if stored.format != FORMAT {
        return Err(IdentityError::Format { path: path.to_owned(), found: stored.format });
    }
    let cluster = stored.cluster.parse().map_err(damaged)?;
    let replica = stored.replica.parse().ok().filter(|id| *id != 0);
    let replica = replica.ok_or_else(|| damaged(format!("replica id {:?} is no positive number", stored.replica)))?;
    Ok(Identity { cluster, replica, stage: stored.stage })
}

fn io_error(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> IdentityError {
    move |source| IdentityError::Io { doing, path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        Identity::new(ClusterId([7; 16]), Stage::Founding)
    }

    #[test]
    fn an_identity_is_read_as_it_was_written() {
        let dir = tempfile::tempdir().expect("a directory");
        let home = Home::lock(dir.path()).expect("locked");
        assert_eq!(home.identity().expect("empty"), None);
        let mine = identity();
        home.write(&mine).expect("written");
        assert_eq!(home.identity().expect("read"), Some(mine));
        let member = Identity { stage: Stage::Member, ..mine };
        home.write(&member).expect("written again");
        assert_eq!(home.identity().expect("read"), Some(member));
    }

    #[test]
    fn a_directory_is_one_processes_own() {
        let dir = tempfile::tempdir().expect("a directory");
        let first = Home::lock(dir.path()).expect("locked");
        assert!(matches!(Home::lock(dir.path()), Err(IdentityError::InUse(_))));
        drop(first);
        Home::lock(dir.path()).expect("free again");
    }

    #[test]
    fn files_without_an_identity_are_refused() {
        let dir = tempfile::tempdir().expect("a directory");
        fs::create_dir(dir.path().join(LOG_DIR)).expect("made");
        let home = Home::lock(dir.path()).expect("locked");
        assert!(matches!(home.identity(), Err(IdentityError::Missing(_))));
    }

    #[test]
    fn a_damaged_or_newer_identity_is_refused() {
        let dir = tempfile::tempdir().expect("a directory");
        let home = Home::lock(dir.path()).expect("locked");
        home.write(&identity()).expect("written");
        let path = dir.path().join(IDENTITY);
        let text = fs::read_to_string(&path).expect("read");
        fs::write(&path, &text[..text.len() / 2]).expect("cut");
        assert!(matches!(home.identity(), Err(IdentityError::Damaged { .. })));
        fs::write(&path, text.replace(&FORMAT.to_string(), "99999999")).expect("newer");
        assert!(matches!(home.identity(), Err(IdentityError::Format { found: 99_999_999, .. })));
    }
}
