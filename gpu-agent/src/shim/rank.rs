//! Starting the rank's command: rights, directory, CPUs, output; and telling the job's faults from the node's when it
//! can't be started.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::fchown;
use std::path::Path;

use nix::errno::Errno;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::prctl;
use nix::sys::signal::{SigHandler, SigSet, Signal, signal};
use nix::unistd::{ForkResult, Gid, Pid, Uid, execvpe, fork, getppid, setgid, setgroups, setsid, setuid};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::chdir;

use super::record::{Containment, Spec};

/// Why a rank could not be started, and by whose fault.
#[derive(Debug, PartialEq, Eq)]
pub struct Failure {
    pub node_fault: bool,
    pub why: String,
}

/// How far the child had come when it failed.
const STEP_RIGHTS: u8 = 1;
const STEP_DIRECTORY: u8 = 2;
const STEP_EXEC: u8 = 3;

/// A rank's process on its way to its command.
pub struct Starting {
    pub pid: Pid,
    /// Ends empty once the command runs; carries step and errno when it can't.
    answer: OwnedFd,
}

/// What became of a start.
pub enum Answer {
    /// The command, or its directory, is not there yet: a network file system can take long.
    NotYet,
    Runs,
    Failed(Failure),
}

/// Makes the rank's process, in a session of its own, its output appended to `log`. `late` comes on top of the spec's
/// environment (what was only known when the barrier opened). It does not wait for the command to run: the deadline must
/// be kept meanwhile.
pub fn start(spec: &Spec, log: &Path, late: Vec<(String, String)>) -> Result<Starting, Failure> {
    let node = |what: &str| {
        let what = what.to_owned();
        move |error: io::Error| Failure { node_fault: true, why: format!("{what}: {error}") }
    };
    let image = Image::of(spec, late)?;
    let output = open_log(spec, log).map_err(node(&format!("log {}", log.display())))?;
    let cgroup = open_cgroup(&spec.containment).map_err(node("cgroup"))?;
    let (answer, told) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).map_err(|e| node("pipe")(e.into()))?;
    let child =
        Child { spec, shim: Pid::this(), image, output, cgroup, cpus: cpu_set(&spec.cpus), groups: groups(spec) };
    // SAFETY: this process has one thread.
    match unsafe { fork() } {
        Ok(ForkResult::Parent { child }) => Ok(Starting { pid: child, answer }),
        Ok(ForkResult::Child) => {
            let (step, errno) = child.become_the_command();
            let mut bytes = vec![step];
            bytes.extend((errno as i32).to_ne_bytes());
            let _ = rustix::io::write(&told, &bytes);
            // No destructor of the shim's runs here.
            // SAFETY: ends the process.
            unsafe { nix::libc::_exit(127) }
        }
        Err(errno) => Err(node("fork")(errno.into())),
    }
}

impl Starting {
    pub fn answer(&self, spec: &Spec) -> Answer {
        let mut bytes = [0; 5];
        match rustix::io::read(&self.answer, &mut bytes) {
            Ok(0) => Answer::Runs,
            Ok(_) => {
                let [step, errno @ ..] = bytes;
                Answer::Failed(judge(spec, step, Errno::from_raw(i32::from_ne_bytes(errno))))
            }
            Err(_) => Answer::NotYet,
        }
    }
}

impl AsFd for Starting {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.answer.as_fd()
    }
}

/// The command as the kernel takes it.
struct Image {
    argv: Vec<CString>,
    env: Vec<CString>,
    path: String,
}

impl Image {
    fn of(spec: &Spec, late: Vec<(String, String)>) -> Result<Self, Failure> {
        let job = |why: &str| Failure { node_fault: false, why: why.to_owned() };
        let text = |text: String| CString::new(text).map_err(|_| job("command or environment holds a NUL character"));
        if spec.argv.is_empty() {
            return Err(job("argv is empty"));
        }
        let mut env: BTreeMap<String, String> = spec.env.iter().cloned().collect();
        env.extend(late);
        Ok(Self {
            argv: spec.argv.iter().cloned().map(text).collect::<Result<_, _>>()?,
            path: env.get("PATH").cloned().unwrap_or_default(),
            env: env.into_iter().map(|(name, value)| text(format!("{name}={value}"))).collect::<Result<_, _>>()?,
        })
    }
}

struct Child<'a> {
    spec: &'a Spec,
    shim: Pid,
    image: Image,
    output: File,
    cgroup: Option<File>,
    cpus: Option<CpuSet>,
    groups: Vec<Gid>,
}

impl Child<'_> {
    /// Returns only when it failed.
    fn become_the_command(&self) -> (u8, Errno) {
        if let Err(errno) = self.take_rights() {
            return (STEP_RIGHTS, errno);
        }
        if !self.spec.own_cwd
            && let Err(error) = chdir(&self.spec.cwd)
        {
            return (STEP_DIRECTORY, errno(error));
        }
        // The search for the command is by the job's PATH.
        // SAFETY: this process has one thread.
        unsafe { std::env::set_var("PATH", &self.image.path) };
        match execvpe(&self.image.argv[0], &self.image.argv, &self.image.env) {
            Err(errno) => (STEP_EXEC, errno),
            Ok(never) => match never {},
        }
    }

    fn take_rights(&self) -> nix::Result<()> {
        setsid()?;
        // SAFETY: no handler is installed, the default is.
        unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) }?;
        SigSet::empty().thread_set_mask()?;
        rustix::stdio::dup2_stdout(&self.output).map_err(errno)?;
        rustix::stdio::dup2_stderr(&self.output).map_err(errno)?;
        if let Some(procs) = &self.cgroup {
            rustix::io::write(procs, b"0").map_err(errno)?;
        }
        if let Some(cpus) = &self.cpus {
            // Not permitted, or a cpuset without these CPUs: then unpinned.
            let _ = sched_setaffinity(Pid::from_raw(0), cpus);
        }
        if self.spec.own_cwd {
            chdir(&self.spec.cwd).map_err(errno)?;
        }
        if let Some(user) = &self.spec.user {
            setgroups(&self.groups)?;
            setgid(Gid::from_raw(user.gid))?;
            setuid(Uid::from_raw(user.uid))?;
        }
        if !matches!(self.spec.containment, Containment::PidNamespace { .. }) {
            prctl::set_pdeathsig(Signal::SIGKILL)?;
            if getppid() != self.shim {
                // The shim died before it could be noticed.
                return Err(Errno::ESRCH);
            }
        }
        Ok(())
    }
}

fn errno(error: rustix::io::Errno) -> Errno {
    Errno::from_raw(error.raw_os_error())
}

fn judge(spec: &Spec, step: u8, errno: Errno) -> Failure {
    let program = spec.argv.first().map_or("", String::as_str);
    let error = io::Error::from(errno);
    let job = |why: String| Failure { node_fault: false, why };
    match (step, errno) {
        (STEP_DIRECTORY, _) => job(format!("directory {}: {error}", spec.cwd.display())),
        (STEP_EXEC, Errno::ENOENT | Errno::EACCES) if errno == Errno::ENOENT || !is_in_path(spec, program) => {
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
        (STEP_EXEC, _) => Failure { node_fault: true, why: format!("starting {program:?}: {error}") },
        _ => Failure { node_fault: true, why: format!("preparing the rank's process: {error}") },
    }
}

/// A directory of PATH that may not be searched makes a missing command look forbidden.
fn is_in_path(spec: &Spec, program: &str) -> bool {
    let path = spec.env.iter().find(|(name, _)| name == "PATH").map_or("", |(_, path)| path);
    program.contains('/') || path.split(':').any(|dir| Path::new(dir).join(program).exists())
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
