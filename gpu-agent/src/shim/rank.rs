//! Starting the rank's command: rights, directory, CPUs, output; and telling the job's faults from the node's when it
//! can't be started.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::fchown;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::errno::Errno;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::{Gid, Pid, Uid, setgid, setgroups, setsid, setuid};

use super::record::{Containment, Spec};

/// Why a rank could not be started, and by whose fault.
#[derive(Debug, PartialEq, Eq)]
pub struct Failure {
    pub node_fault: bool,
    pub why: String,
}

/// How far the child had come when it failed; one byte each through a pipe.
const STEP_RIGHTS: u8 = 1;
const STEP_DIRECTORY: u8 = 2;
const STEP_EXEC: u8 = 3;

/// Starts the command in a session of its own, its output appended to `log`. `late` comes on top of the spec's
/// environment (what was only known when the barrier opened).
pub fn spawn(spec: &Spec, log: &Path, late: Vec<(String, String)>) -> Result<Pid, Failure> {
    let node = |what: &str| {
        let what = what.to_owned();
        move |error: io::Error| Failure { node_fault: true, why: format!("{what}: {error}") }
    };
    let program = spec.argv.first().ok_or_else(|| Failure { node_fault: false, why: "argv is empty".into() })?;
    let out = open_log(spec, log).map_err(node(&format!("log {}", log.display())))?;
    let err = out.try_clone().map_err(node("log"))?;
    let (seen, told) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(|e| node("pipe")(e.into()))?;
    let cgroup = open_cgroup(&spec.containment).map_err(node("cgroup"))?;

    let mut command = Command::new(program);
    command.args(&spec.argv[1..]).env_clear().envs(spec.env.iter().cloned()).envs(late);
    command.stdin(Stdio::null()).stdout(out).stderr(err);
    let child = Child { spec: spec.clone(), told, cgroup, cpus: cpu_set(&spec.cpus), groups: groups(spec) };
    // SAFETY: the closure makes system calls only, on values made before the fork; it allocates nothing.
    unsafe { command.pre_exec(move || child.prepare()) };
    let spawned = command.spawn();
    // Closes the parent's end of the steps' pipe, so that reading it ends.
    drop(command);
    match spawned {
        Ok(child) => Ok(Pid::from_raw(child.id() as i32)),
        Err(error) => Err(judge(spec, program, last_step(&seen), &error)),
    }
}

struct Child {
    spec: Spec,
    told: std::os::fd::OwnedFd,
    cgroup: Option<File>,
    cpus: Option<CpuSet>,
    groups: Vec<Gid>,
}

impl Child {
    /// Runs between fork and exec.
    fn prepare(&self) -> io::Result<()> {
        self.tell(STEP_RIGHTS);
        setsid()?;
        SigSet::empty().thread_set_mask()?;
        if let Some(mut procs) = self.cgroup.as_ref() {
            procs.write_all(b"0")?;
        }
        if let Some(cpus) = &self.cpus {
            // Not permitted, or a cpuset without these CPUs: then unpinned.
            let _ = sched_setaffinity(Pid::from_raw(0), cpus);
        }
        if self.spec.own_cwd {
            std::env::set_current_dir(&self.spec.cwd)?;
        }
        if let Some(user) = &self.spec.user {
            setgroups(&self.groups)?;
            setgid(Gid::from_raw(user.gid))?;
            setuid(Uid::from_raw(user.uid))?;
        }
        if !matches!(self.spec.containment, Containment::PidNamespace { .. }) {
            prctl::set_pdeathsig(Signal::SIGKILL)?;
        }
        if !self.spec.own_cwd {
            self.tell(STEP_DIRECTORY);
            std::env::set_current_dir(&self.spec.cwd)?;
        }
        self.tell(STEP_EXEC);
        Ok(())
    }

    fn tell(&self, step: u8) {
        let _ = rustix::io::write(&self.told, &[step]);
    }
}

fn last_step(seen: impl AsFd) -> u8 {
    let mut bytes = [0; 8];
    match rustix::io::read(seen, &mut bytes) {
        Ok(n) if n > 0 => bytes[n - 1],
        _ => 0,
    }
}

fn judge(spec: &Spec, program: &str, step: u8, error: &io::Error) -> Failure {
    let errno = Errno::from_raw(error.raw_os_error().unwrap_or(0));
    let job = |why: String| Failure { node_fault: false, why };
    match (step, errno) {
        (STEP_DIRECTORY, _) => job(format!("directory {}: {error}", spec.cwd.display())),
        (STEP_EXEC, Errno::ENOENT) => {
            job(format!("command {program:?} not found (or, for a script, the interpreter that it names)"))
        }
        (STEP_EXEC, Errno::E2BIG) => job(format!("arguments and environment of {program:?} are too large: {error}")),
        (
            STEP_EXEC,
            Errno::EACCES
            | Errno::EPERM
            | Errno::ENOTDIR
            | Errno::EISDIR
            | Errno::ELOOP
            | Errno::ENOEXEC
            | Errno::ENAMETOOLONG
            | Errno::ETXTBSY
            | Errno::EINVAL
            | Errno::ELIBBAD,
        ) => job(format!("command {program:?} can't be executed: {error}")),
        (_, _) if error.kind() == io::ErrorKind::InvalidInput => {
            job(format!("command or environment holds a NUL character: {error}"))
        }
        (STEP_EXEC, _) => Failure { node_fault: true, why: format!("starting {program:?}: {error}") },
        _ => Failure { node_fault: true, why: format!("preparing the rank's process: {error}") },
    }
}

/// The log belongs to the rank's user, so that a script may write to /dev/stderr by name.
fn open_log(spec: &Spec, log: &Path) -> io::Result<File> {
    let file = OpenOptions::new().create(true).append(true).open(log)?;
    if let Some(user) = &spec.user {
        fchown(&file, Some(user.uid), Some(user.gid))?;
    }
    Ok(file)
}

fn open_cgroup(containment: &Containment) -> io::Result<Option<File>> {
    match containment {
        Containment::Cgroup(path) => OpenOptions::new().write(true).open(path.join("cgroup.procs")).map(Some),
        _ => Ok(None),
    }
}

fn cpu_set(cpus: &[u32]) -> Option<CpuSet> {
    let mut set = CpuSet::new();
    let known = cpus.iter().filter(|cpu| set.set(**cpu as usize).is_ok()).count();
    (known > 0).then_some(set)
}

fn groups(spec: &Spec) -> Vec<Gid> {
    spec.user.iter().flat_map(|user| &user.groups).map(|gid| Gid::from_raw(*gid)).collect()
}
