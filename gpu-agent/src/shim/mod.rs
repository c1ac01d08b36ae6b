//! The shim: one small process for each rank, which outlives the agent. It is init of the rank's PID namespace where that
//! is permitted, starts the command, reaps, keeps the deadline by itself, and leaves how it ended on disk.
//!
//! It decides nothing about leases ([`watch`] is its whole policy), and talks to nobody: the agent writes into a shared
//! page ([`control`]), and reads the exit record. No threads, no async: it must start within a millisecond or two.

pub mod contain;
pub mod control;
pub mod rank;
pub mod record;
pub mod watch;

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal, killpg};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, setsid};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

use crate::clock::{boot_ms, leap, wall_ms};
use control::{Control, Phase, Stop};
use rank::{Answer, Failure, Starting};
use record::{Containment, Ended, Exit, Outcome, Spec};
use watch::{Do, SIGTERM, Seen, Watch};

/// Argument that asks whether a containment works here, instead of a rank's directory.
pub const PROBE: &str = "--probe";
/// How often a record that the disk does not take is tried again, until the lease ends.
const RECORD_RETRY: Duration = Duration::from_millis(500);

/// The hidden subcommand: `shim DIR`, with the rank's lock, held, as standard input. Returns once the rank runs, waits
/// at the barrier, or could not be started; what came of it stands in DIR. Call it before any thread is made.
pub fn main(args: &[OsString]) -> i32 {
    let outcome = match args {
        [flag, kind] if flag == PROBE => probe(&kind.to_string_lossy()),
        [dir] => launch(Path::new(dir)),
        _ => Err(io::Error::other("shim takes the directory of one rank; it is run by the agent, not by people")),
    };
    match outcome {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("ares shim: {error}");
            1
        }
    }
}

/// `pidns` or `userns`: enters it as a rank's shim would.
fn probe(kind: &str) -> io::Result<()> {
    let containment = Containment::PidNamespace { user_namespace: kind == "userns" };
    contain::separate(&containment)?;
    // SAFETY: this process has one thread.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => match waitpid(child, None)? {
            WaitStatus::Exited(_, 0) => Ok(()),
            other => Err(io::Error::other(format!("{kind}: {other:?}"))),
        },
        ForkResult::Child => std::process::exit(contain::settle(&containment).map_or(1, |()| 0)),
    }
}

fn launch(dir: &Path) -> io::Result<()> {
    let lock = take_lock()?;
    let spec = match Spec::take(dir).and_then(|spec| contain::separate(&spec.containment).map(|()| spec)) {
        Ok(spec) => spec,
        Err(error) => return record(dir, node_fault("shim", &error)),
    };
    let (ready, told) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    // SAFETY: this process has one thread.
    match unsafe { fork() } {
        Ok(ForkResult::Parent { .. }) => {
            drop((told, lock));
            // Ends when the watching process says that it is ready, or dies.
            let _ = File::from(ready).read(&mut [0; 1]);
            Ok(())
        }
        Ok(ForkResult::Child) => {
            drop(ready);
            let code = i32::from(watch_over(dir, spec, told).is_err());
            drop(lock);
            std::process::exit(code)
        }
        Err(errno) => record(dir, node_fault("fork", &errno.into())),
    }
}

/// The lock came as standard input, so that it is held without a gap from before this process was made. It moves out of
/// the rank's way.
fn take_lock() -> io::Result<OwnedFd> {
    let lock = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 10)?;
    rustix::stdio::dup2_stdin(File::open("/dev/null")?)?;
    Ok(lock)
}

fn node_fault(what: &str, error: &io::Error) -> Outcome {
    Outcome::LaunchFailed { node_fault: true, why: format!("{what}: {error}") }
}

fn record(dir: &Path, outcome: Outcome) -> io::Result<()> {
    Ended { outcome, wall_ms: wall_ms() }.write(dir)
}

fn watch_over(dir: &Path, spec: Spec, told: OwnedFd) -> io::Result<()> {
    let _ = setsid();
    let prepared = record::Pid::of_self()
        .and_then(|me| me.write(dir))
        .and_then(|()| contain::settle(&spec.containment))
        .and_then(|()| Shim::new(dir, spec, told));
    match prepared {
        Ok(shim) => shim.run(),
        Err(error) => record(dir, node_fault("shim", &error)),
    }
}

struct Shim {
    dir: PathBuf,
    spec: Spec,
    control: Control,
    watch: Watch,
    signals: SignalFd,
    timer: OwnedFd,
    /// Dropped when the agent need not wait any longer.
    told: Option<OwnedFd>,
    rank: Option<Pid>,
    starting: Option<Starting>,
    /// A person's signal to the shim itself is a stop as well.
    asked: bool,
}

impl Shim {
    fn new(dir: &Path, spec: Spec, told: OwnedFd) -> io::Result<Self> {
        let mut mask = SigSet::empty();
        for signal in
            [Signal::SIGCHLD, Signal::SIGUSR1, Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT]
        {
            mask.add(signal);
        }
        mask.thread_block()?;
        Ok(Self {
            control: Control::open(&dir.join(record::CONTROL))?,
            watch: Watch::new(spec.grace_ms, spec.limit_ms),
            signals: SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?,
            timer: timerfd_create(TimerfdClockId::Boottime, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?,
            dir: dir.to_owned(),
            spec,
            told: Some(told),
            rank: None,
            starting: None,
            asked: false,
        })
    }

    fn run(mut self) -> io::Result<()> {
        loop {
            let page = self.page();
            self.step(page)?;
            self.look_at_start()?;
            for seen in self.reap()? {
                self.step(seen)?;
            }
            let Some(at) = self.watch.next_wake() else {
                return Ok(());
            };
            if self.rank.is_none() && self.told.is_some() {
                self.ready(Phase::Waiting);
            }
            self.sleep_until(at)?;
        }
    }

    fn page(&self) -> Seen {
        let own = self.asked.then_some(Stop { signal: SIGTERM, grace_ms: self.spec.grace_ms });
        Seen::Page {
            deadline: self.control.deadline(),
            stop: self.control.stop().or(own),
            open: self.control.is_open(),
        }
    }

    fn step(&mut self, seen: Seen) -> io::Result<()> {
        for what in self.watch.step(seen, boot_ms()) {
            match what {
                Do::Start => self.start()?,
                Do::Signal(signal) => self.signal(signal),
                Do::KillAll => contain::kill_all(&self.spec.containment, self.rank),
                Do::Record(outcome) => self.finish(outcome)?,
            }
        }
        Ok(())
    }

    fn start(&mut self) -> io::Result<()> {
        match rank::start(&self.spec, &self.dir.join(record::LOG), self.late_environment()) {
            Ok(starting) => {
                self.rank = Some(starting.pid);
                self.starting = Some(starting);
                Ok(())
            }
            Err(failure) => self.fail(failure),
        }
    }

    /// Whether the rank's process has become its command by now.
    fn look_at_start(&mut self) -> io::Result<()> {
        let Some(starting) = &self.starting else { return Ok(()) };
        match starting.answer(&self.spec) {
            Answer::NotYet => Ok(()),
            Answer::Runs => {
                self.starting = None;
                self.ready(Phase::Started);
                self.step(Seen::Started)
            }
            Answer::Failed(failure) => self.fail(failure),
        }
    }

    fn fail(&mut self, failure: Failure) -> io::Result<()> {
        self.finish(Outcome::LaunchFailed { node_fault: failure.node_fault, why: failure.why })?;
        std::process::exit(0)
    }

    /// NAME=VALUE lines that the agent left when the barrier opened.
    fn late_environment(&self) -> Vec<(String, String)> {
        let text = fs::read_to_string(self.dir.join(record::GO)).unwrap_or_default();
        text.lines().filter_map(|line| line.split_once('=')).map(|(k, v)| (k.to_owned(), v.to_owned())).collect()
    }

    fn signal(&self, number: u8) {
        if let (Some(group), Ok(signal)) = (self.rank, Signal::try_from(i32::from(number))) {
            let _ = killpg(group, signal);
        }
    }

    fn ready(&mut self, phase: Phase) {
        self.control.set_phase(phase);
        self.told = None;
    }

    /// A disk that takes no record is asked again until the lease ends: then the attempt counts as lost. A directory
    /// that somebody removed takes none ever.
    fn finish(&mut self, outcome: Outcome) -> io::Result<()> {
        contain::dissolve(&self.spec.containment);
        while let Err(error) = record(&self.dir, outcome.clone()) {
            let removed = error.kind() == io::ErrorKind::NotFound;
            if removed || boot_ms() >= self.control.deadline() {
                return Err(error);
            }
            std::thread::sleep(RECORD_RETRY);
        }
        self.ready(Phase::Ended);
        Ok(())
    }

    /// Everything that ended since the last time.
    fn reap(&mut self) -> io::Result<Vec<Seen>> {
        let mut seen = Vec::new();
        loop {
            let (pid, exit) = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => (pid, Exit { code, signal: 0 }),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, Exit { code: 0, signal: signal as i32 as u8 }),
                Ok(WaitStatus::StillAlive) => return Ok(seen),
                Err(Errno::ECHILD) => {
                    seen.push(Seen::AllGone);
                    return Ok(seen);
                }
                Ok(_) | Err(Errno::EINTR) => continue,
                Err(errno) => return Err(errno.into()),
            };
            if Some(pid) == self.rank {
                // It may have said in its last moment that it could not become the command.
                self.look_at_start()?;
                seen.push(Seen::RankEnded(exit));
                // Its number may be another process's from here on: the group is killed first.
                contain::kill_all(&self.spec.containment, self.rank.take());
            }
        }
    }

    /// Until `at`, a signal, or a wake by the agent.
    fn sleep_until(&mut self, at: u64) -> io::Result<()> {
        let at = at.saturating_sub(leap::ms()).max(1);
        let value = Timespec { tv_sec: (at / 1_000) as i64, tv_nsec: (at % 1_000 * 1_000_000) as i64 };
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
        timerfd_settime(&self.timer, TimerfdTimerFlags::ABSTIME, &once)?;
        let mut fds = vec![
            PollFd::from_borrowed_fd(self.signals.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.timer.as_fd(), PollFlags::IN),
        ];
        fds.extend(self.starting.iter().map(|starting| PollFd::new(starting, PollFlags::IN)));
        match poll(&mut fds, leap::wake().as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        while let Ok(Some(info)) = self.signals.read_signal() {
            let signal = info.ssi_signo as i32;
            self.asked |= signal != Signal::SIGCHLD as i32 && signal != Signal::SIGUSR1 as i32;
        }
        Ok(())
    }
}
