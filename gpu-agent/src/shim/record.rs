//! What agent and shim leave for each other on disk, in the directory of one rank: the order (`spec`), who watches
//! (`pid`), and how it ended (`exit`, synced, written atomically).

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub const SPEC: &str = "spec";
pub const LOCK: &str = "lock";
pub const CONTROL: &str = "control";
pub const PID: &str = "pid";
pub const GO: &str = "go";
pub const EXIT: &str = "exit";
pub const LOG: &str = "log";

/// What a shim is told to run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    pub argv: Vec<String>,
    pub env: Vec<(String, String)>,
    pub cwd: PathBuf,
    /// The directory is the attempt's own: entered with the shim's rights, before the user's are taken on.
    pub own_cwd: bool,
    pub user: Option<User>,
    /// CPUs that the rank may use; empty = all.
    pub cpus: Vec<u32>,
    pub grace_ms: u64,
    /// 0 = none.
    pub limit_ms: u64,
    pub containment: Containment,
}

/// Whose rights a rank has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    pub name: String,
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
    pub home: PathBuf,
    pub shell: PathBuf,
}

/// What holds a rank's processes together, strongest first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Containment {
    /// The shim is init of the rank's PID namespace: its death kills every descendant.
    PidNamespace {
        /// Made inside a user namespace, for an agent that is not root.
        user_namespace: bool,
    },
    /// A control group (v2) of the rank's own, killed as a whole. Of an agent: the beginning of their paths, which no
    /// other agent of the machine has.
    Cgroup(PathBuf),
    /// The process group, and descendants found through the child subreaper: a shim that is killed leaves some behind.
    Weak,
}

impl Containment {
    /// That of one rank.
    pub fn of_rank(&self, token: u64, rank: u32) -> Self {
        match self {
            Containment::Cgroup(prefix) => {
                let mut path = prefix.clone().into_os_string();
                path.push(format!("-{token}-{rank}"));
                Containment::Cgroup(path.into())
            }
            other => other.clone(),
        }
    }

    /// The word in the node's record.
    pub fn word(&self) -> &'static str {
        match self {
            Containment::PidNamespace { .. } => "pidns",
            Containment::Cgroup(_) => "cgroup",
            Containment::Weak => "weak",
        }
    }
}

/// How the rank's own process ended: the code, or the signal (code 0 then).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    pub code: i32,
    pub signal: u8,
}

/// Why it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cause {
    Own,
    Stopped,
    TimeLimit,
    LeaseEnd,
}

impl Cause {
    /// The word on the wire.
    pub fn word(self) -> &'static str {
        match self {
            Cause::Own => "OWN",
            Cause::Stopped => "STOPPED",
            Cause::TimeLimit => "TIME_LIMIT",
            Cause::LeaseEnd => "LEASE_END",
        }
    }
}

/// The end of one rank. Written when no process of it is left.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    Exited {
        exit: Exit,
        cause: Cause,
    },
    /// Stopped, or out of time, behind the barrier.
    NeverStarted,
    /// `node_fault`: disk, shim, rights of the agent; else the job's: command, directory, environment.
    LaunchFailed {
        node_fault: bool,
        why: String,
    },
}

/// The exit record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    pub outcome: Outcome,
    /// ms since 1970, for display and for how long it is kept.
    pub wall_ms: u64,
}

/// A process that can't be mistaken for a later one with the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pid {
    pub number: i32,
    /// Clock ticks since boot, field 22 of /proc/PID/stat.
    pub start: u64,
}

impl Pid {
    /// The process that reads, as /proc (of whichever PID namespace it was mounted in) knows it.
    pub fn of_self() -> io::Result<Self> {
        let number = fs::read_link("/proc/self")?;
        let number =
            number.to_str().and_then(|text| text.parse().ok()).ok_or_else(|| io::Error::other("no /proc/self"))?;
        Self::of(number)
    }

    fn of(number: i32) -> io::Result<Self> {
        Self::look(number).map(|(pid, _)| pid)
    }

    /// The process, and its state: `R`, `S`, `Z` ...
    fn look(number: i32) -> io::Result<(Self, char)> {
        let stat = fs::read_to_string(format!("/proc/{number}/stat"))?;
        let parse = || {
            // The command's name, in parentheses, may hold blanks and parentheses.
            let mut rest = stat.rsplit(')').next()?.split_ascii_whitespace();
            let state = rest.next()?.chars().next()?;
            Some((Self { number, start: rest.nth(18)?.parse().ok()? }, state))
        };
        parse().ok_or_else(|| io::Error::other(format!("/proc/{number}/stat: {stat:?}")))
    }

    /// A zombie is dead: with an init of a PID namespace, so is everything in it.
    pub fn is_alive(&self) -> bool {
        Self::look(self.number).is_ok_and(|(now, state)| now.start == self.start && !matches!(state, 'Z' | 'X'))
    }

    pub fn write(&self, dir: &Path) -> io::Result<()> {
        replace(&dir.join(PID), format!("{} {}\n", self.number, self.start).as_bytes(), false)
    }

    pub fn read(dir: &Path) -> io::Result<Self> {
        let text = fs::read_to_string(dir.join(PID))?;
        let mut words = text.split_ascii_whitespace();
        let number = words.next().and_then(|word| word.parse().ok());
        let start = words.next().and_then(|word| word.parse().ok());
        match (number, start) {
            (Some(number), Some(start)) => Ok(Self { number, start }),
            _ => Err(io::Error::new(io::ErrorKind::InvalidData, format!("{}: {text:?}", dir.join(PID).display()))),
        }
    }
}

impl Spec {
    /// Readable by the agent's user alone: an environment may hold secrets.
    pub fn write(&self, dir: &Path) -> io::Result<()> {
        let text = serde_json::to_vec(self)?;
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(dir.join(SPEC))?;
        file.write_all(&text)
    }

    /// Read once: the file is gone afterwards.
    pub fn take(dir: &Path) -> io::Result<Self> {
        let path = dir.join(SPEC);
        let spec = serde_json::from_slice(&fs::read(&path)?)?;
        fs::remove_file(&path)?;
        Ok(spec)
    }
}

impl Ended {
    pub fn write(&self, dir: &Path) -> io::Result<()> {
        replace(&dir.join(EXIT), &serde_json::to_vec(self)?, true)
    }

    /// `None` = there is none.
    pub fn read(dir: &Path) -> io::Result<Option<Self>> {
        match fs::read(dir.join(EXIT)) {
            Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Writes a file whole or not at all; `sync`: it also survives a power cut from here on.
pub fn replace(path: &Path, bytes: &[u8], sync: bool) -> io::Result<()> {
    let fresh = path.with_extension("new");
    let mut file = File::create(&fresh)?;
    file.write_all(bytes)?;
    if sync {
        file.sync_all()?;
    }
    fs::rename(&fresh, path)?;
    match path.parent() {
        Some(dir) if sync => File::open(dir)?.sync_all(),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pid_is_alive_only_with_its_own_start_time() {
        let me = Pid::of_self().unwrap();
        assert_eq!(me.number as u32, std::process::id());
        assert!(me.is_alive());
        assert!(!Pid { start: me.start + 1, ..me }.is_alive());
    }

    #[test]
    fn a_spec_is_read_once() {
        let dir = tempfile::tempdir().unwrap();
        let spec = Spec {
            argv: vec!["true".into()],
            env: vec![("A".into(), "b".into())],
            cwd: "/".into(),
            own_cwd: false,
            user: None,
            cpus: vec![1],
            grace_ms: 5,
            limit_ms: 0,
            containment: Containment::Weak,
        };
        spec.write(dir.path()).unwrap();
        assert_eq!(Spec::take(dir.path()).unwrap(), spec);
        assert!(Spec::take(dir.path()).is_err());
    }
}
