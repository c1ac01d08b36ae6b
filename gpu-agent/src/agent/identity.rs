//! Who this agent is: its directory (one agent at a time), the machine's random id in it, the boot, and the cluster that
//! it once joined.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use crate::shim::record::replace;

const LOCK: &str = "lock";
const MACHINE: &str = "machine";
const CLUSTER: &str = "cluster";

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("another agent uses {0}: give this one a directory of its own with --dir")]
    InUse(PathBuf),
    #[error("{path} holds {text:?}, which is no machine id: restore the file, or start with a new directory")]
    BadMachine { path: PathBuf, text: String },
    #[error(
        "{dir} belongs to an agent of cluster {known}, not of {asked}: give this cluster's agent another directory"
    )]
    OtherCluster { dir: PathBuf, known: String, asked: String },
}

pub struct Identity {
    pub dir: PathBuf,
    pub machine: [u8; 16],
    /// Made just now: no agent used the directory before.
    pub fresh: bool,
    pub boot: [u8; 16],
    /// Held as long as the agent lives.
    _lock: File,
}

impl Identity {
    pub fn open(dir: &Path) -> Result<Self, Error> {
        let at = |path: &Path| {
            let path = path.to_owned();
            move |source| Error::Io { path, source }
        };
        fs::create_dir_all(dir).map_err(at(dir))?;
        let dir = dir.canonicalize().map_err(at(dir))?;
        let path = dir.join(LOCK);
        let lock = OpenOptions::new().create(true).truncate(false).write(true).open(&path).map_err(at(&path))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|_| Error::InUse(dir.clone()))?;

        let path = dir.join(MACHINE);
        let (machine, fresh) = match fs::read_to_string(&path) {
            Ok(text) => {
                let machine = unhex(text.trim()).ok_or(Error::BadMachine { path, text })?;
                (machine, false)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let mut machine = [0; 16];
                File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut machine)).map_err(at(&path))?;
                replace(&path, hex(&machine).as_bytes(), true).map_err(at(&path))?;
                (machine, true)
            }
            Err(error) => return Err(at(&path)(error)),
        };
        Ok(Self { boot: boot_id().map_err(at(Path::new(BOOT_ID)))?, dir, machine, fresh, _lock: lock })
    }

    /// The cluster of the first registration; empty before it.
    pub fn cluster(&self) -> String {
        fs::read_to_string(self.dir.join(CLUSTER)).unwrap_or_default().trim().to_owned()
    }

    /// Joins for good; another cluster's directory is refused. `asked` may be empty: any.
    pub fn check_cluster(&self, asked: &str) -> Result<(), Error> {
        let known = self.cluster();
        if known.is_empty() || asked.is_empty() || known == asked {
            return Ok(());
        }
        Err(Error::OtherCluster { dir: self.dir.clone(), known, asked: asked.to_owned() })
    }

    pub fn join(&self, cluster: &str) -> Result<(), Error> {
        self.check_cluster(cluster)?;
        if self.cluster().is_empty() {
            let path = self.dir.join(CLUSTER);
            replace(&path, cluster.as_bytes(), true).map_err(|source| Error::Io { path, source })?;
        }
        Ok(())
    }
}

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

fn boot_id() -> io::Result<[u8; 16]> {
    let text = fs::read_to_string(BOOT_ID)?.replace('-', "");
    unhex(text.trim()).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, text))
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Option<[u8; 16]> {
    let mut bytes = [0; 16];
    if text.len() != 32 || !text.is_ascii() {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_keeps_its_id_and_its_directory_to_itself() {
        let dir = tempfile::tempdir().unwrap();
        let first = Identity::open(dir.path()).unwrap();
        assert!(first.fresh);
        assert!(matches!(Identity::open(dir.path()), Err(Error::InUse(_))));
        let id = first.machine;
        drop(first);
        let second = Identity::open(dir.path()).unwrap();
        assert!(!second.fresh && second.machine == id);
    }

    #[test]
    fn a_directory_stays_with_its_cluster() {
        let dir = tempfile::tempdir().unwrap();
        let identity = Identity::open(dir.path()).unwrap();
        identity.check_cluster("c1").unwrap();
        identity.join("c1").unwrap();
        assert!(matches!(identity.join("c2"), Err(Error::OtherCluster { .. })));
        identity.check_cluster("").unwrap();
    }

    #[test]
    fn a_machine_file_that_is_no_id_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(MACHINE), "zz").unwrap();
        assert!(matches!(Identity::open(dir.path()), Err(Error::BadMachine { .. })));
    }
}
