//! The directories of attempts: `attempts/TOKEN/` with `part` (what it is), `work/` (its directory where the job names
//! none), and one directory a rank, shared with its shim. The newest ended ones are kept, for their logs.
//!
//! A log is the rank's own output file: it is not bounded while the rank runs. What is bounded is the number of ended
//! attempts whose records are kept.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, chown};
use std::path::{Path, PathBuf};

use proto::v1::DesiredLease;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::fence::Live;
use crate::shim::record::{self, Containment, User, replace};

const ATTEMPTS: &str = "attempts";
const PART: &str = "part";
const WORK: &str = "work";
/// Of a rank's directory without its lock.
const UNFINISHED: &str = ".new";

/// What an agent that starts again must know of an attempt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    pub job_id: u64,
    pub first_rank: u32,
    pub ranks: u32,
    pub gpus: Vec<String>,
    pub ttl_ms: u64,
    pub grace_ms: u64,
    /// Started at once: no barrier.
    pub open: bool,
    pub port: u32,
    pub cpus: Vec<u32>,
    pub boot: String,
    pub containment: Containment,
}

#[derive(Clone, Debug)]
pub struct Attempts {
    root: PathBuf,
}

impl Attempts {
    pub fn open(dir: &Path) -> io::Result<Self> {
        let root = dir.join(ATTEMPTS);
        make_dir(&root, 0o711)?;
        Ok(Self { root })
    }

    pub fn dir(&self, token: u64) -> PathBuf {
        self.root.join(token.to_string())
    }

    pub fn rank_dir(&self, token: u64, rank: u32) -> PathBuf {
        self.dir(token).join(rank.to_string())
    }

    pub fn log(&self, token: u64, rank: u32) -> PathBuf {
        self.rank_dir(token, rank).join(record::LOG)
    }

    pub fn work(&self, token: u64) -> PathBuf {
        self.dir(token).join(WORK)
    }

    /// A new attempt's directory, with its work directory where `user` may write.
    pub fn make(&self, token: u64, kept: &Kept, user: Option<&User>) -> io::Result<()> {
        let dir = self.dir(token);
        make_dir(&dir, 0o711)?;
        let work = self.work(token);
        make_dir(&work, 0o700)?;
        if let Some(user) = user {
            chown(&work, Some(user.uid), Some(user.gid))?;
        }
        replace(&dir.join(PART), &serde_json::to_vec(kept)?, false)
    }

    /// A rank's directory, and its lock, held: it is passed on to the shim. The directory appears with the lock, so that nobody takes
    /// a rank that is to come for one that has ended.
    pub fn make_rank(&self, token: u64, rank: u32) -> io::Result<(PathBuf, File)> {
        let made = self.dir(token).join(format!("{rank}{UNFINISHED}"));
        DirBuilder::new().mode(0o700).create(&made)?;
        let lock = OpenOptions::new().create_new(true).read(true).write(true).open(made.join(record::LOCK))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive)?;
        let dir = self.rank_dir(token, rank);
        fs::rename(made, &dir)?;
        Ok((dir, lock))
    }

    pub fn kept(&self, token: u64) -> io::Result<Kept> {
        Ok(serde_json::from_slice(&fs::read(self.dir(token).join(PART))?)?)
    }

    /// Tokens with a directory, ascending.
    pub fn tokens(&self) -> io::Result<Vec<u64>> {
        let mut tokens = Vec::new();
        for entry in fs::read_dir(&self.root)? {
            tokens.extend(entry?.file_name().to_str().and_then(|name| name.parse::<u64>().ok()));
        }
        tokens.sort_unstable();
        Ok(tokens)
    }

    pub fn remove(&self, token: u64) -> io::Result<()> {
        fs::remove_dir_all(self.dir(token))
    }
}

impl Kept {
    /// As the fence file has it.
    pub fn live(&self) -> Live {
        Live { job_id: self.job_id, first_rank: self.first_rank, ranks: self.ranks, gpus: self.gpus.clone() }
    }

    pub fn of(lease: &DesiredLease, grace_ms: u64, open: bool, boot: &str, containment: Containment) -> Self {
        Self {
            job_id: lease.job_id,
            first_rank: lease.first_rank,
            ranks: lease.ranks,
            gpus: lease.gpu_uuids.clone(),
            ttl_ms: lease.ttl_ms,
            grace_ms,
            open,
            port: 0,
            cpus: Vec::new(),
            boot: boot.to_owned(),
            containment,
        }
    }
}

/// Whether a shim holds the rank's lock. A directory without a lock never had one.
pub fn is_held(rank_dir: &Path) -> bool {
    match File::open(rank_dir.join(record::LOCK)) {
        Ok(lock) => flock(&lock, FlockOperation::NonBlockingLockShared).is_err(),
        Err(_) => false,
    }
}

fn make_dir(path: &Path, mode: u32) -> io::Result<()> {
    match DirBuilder::new().mode(mode).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn a_rank_that_is_to_come_never_looks_as_if_it_had_ended() {
        let root = tempfile::tempdir().unwrap();
        let attempts = Attempts::open(root.path()).unwrap();
        let dir = attempts.dir(1);
        make_dir(&dir, 0o711).unwrap();
        for rank in 0..300 {
            let dir = attempts.rank_dir(1, rank);
            let reader = thread::spawn(move || {
                while !dir.exists() {}
                is_held(&dir)
            });
            let _made = attempts.make_rank(1, rank).unwrap();
            assert!(reader.join().unwrap(), "rank {rank} seems to have ended");
        }
    }
}
