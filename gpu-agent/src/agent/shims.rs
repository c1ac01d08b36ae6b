//! The shims of this machine as the agent holds them: control page, pidfd, and a watcher that tells when one is gone.
//! Waiting is the kernel's: an idle shim costs the agent nothing.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::process::{PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid};
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc::UnboundedSender;

use super::core::Event;
use super::part::Rank;
use crate::shim::contain;
use crate::shim::control::{Control, Phase, Stop};
use crate::shim::record::{self, Containment, Ended, Pid};

/// How often a rank is looked at between the barrier's opening and its start: nothing tells the agent of it.
const START_POLL: Duration = Duration::from_millis(2);

/// How often what a killed shim left behind is killed again, until nothing is found.
pub const SWEEP: Duration = Duration::from_millis(20);

/// Token and local rank.
pub type Key = (u64, u32);

struct Shim {
    control: Control,
    pidfd: AsyncFd<OwnedFd>,
    dir: PathBuf,
    containment: Containment,
}

/// Clones share the shims.
#[derive(Clone)]
pub struct Shims {
    all: Arc<Mutex<BTreeMap<Key, Arc<Shim>>>>,
    events: UnboundedSender<Event>,
}

impl Shims {
    pub fn new(events: UnboundedSender<Event>) -> Self {
        Self { all: Arc::default(), events }
    }

    /// What a rank's directory says after its shim was started, or when the agent starts again: its state, and from here
    /// on a watcher where a shim is alive. Must be called within the runtime.
    pub fn attach(&self, key: Key, dir: &Path, containment: Containment) -> io::Result<Rank> {
        if let Some(known) = self.lock().get(&key) {
            return Ok(if known.control.phase() == Phase::Started { Rank::Started } else { Rank::Waiting });
        }
        let ended =
            |dir: &Path| -> io::Result<Option<Rank>> { Ok(Ended::read(dir)?.map(|ended| Rank::Ended(ended.outcome))) };
        if let Some(rank) = ended(dir)? {
            return Ok(rank);
        }
        let alive = Pid::read(dir).ok().filter(Pid::is_alive);
        let Some(pid) = alive else {
            // It may have ended between the two looks.
            return Ok(ended(dir)?.unwrap_or(Rank::Vanished));
        };
        let number = rustix::process::Pid::from_raw(pid.number).ok_or_else(|| io::Error::other("pid 0"))?;
        let pidfd = pidfd_open(number, PidfdFlags::NONBLOCK);
        let (Ok(pidfd), true) = (pidfd, pid.is_alive()) else {
            return Ok(ended(dir)?.unwrap_or(Rank::Vanished));
        };
        let control = Control::open(&dir.join(record::CONTROL))?;
        let rank = if control.phase() == Phase::Started { Rank::Started } else { Rank::Waiting };
        // SAFETY: the pidfd stays open and the same as long as it is registered: nothing takes it out.
        let pidfd = unsafe { AsyncFd::register(pidfd) }?;
        let shim = Arc::new(Shim { control, pidfd, dir: dir.to_owned(), containment });
        self.lock().insert(key, shim.clone());
        if rank == Rank::Waiting && shim.control.is_open() {
            self.await_start(key, shim.clone());
        }
        tokio::spawn(self.clone().watch(key, shim));
        Ok(rank)
    }

    async fn watch(self, key: Key, shim: Arc<Shim>) {
        let rank = loop {
            match shim.pidfd.readable().await {
                Ok(_) => {}
                Err(error) => tracing::warn!(token = key.0, rank = key.1, %error, "waiting for a shim"),
            }
            // Where the agent is the reaper of orphans (it may be a container's first process), none stays a zombie.
            let _ = waitid(WaitId::PidFd(shim.pidfd.get_ref().as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOHANG);
            match Ended::read(&shim.dir) {
                Ok(Some(ended)) => break Rank::Ended(ended.outcome),
                Ok(None) => {
                    // Only a process seen dead is dead.
                    let attempt = shim.dir.parent().unwrap_or(&shim.dir);
                    while !contain::sweep(&shim.containment, attempt) {
                        tokio::time::sleep(SWEEP).await;
                    }
                    break Rank::Vanished;
                }
                Err(error) => {
                    tracing::error!(dir = %shim.dir.display(), %error, "the exit record can't be read");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            }
        };
        self.lock().remove(&key);
        let _ = self.events.send(Event::Rank { token: key.0, local: key.1, rank });
    }

    /// One store a rank; wakes nobody.
    pub fn extend(&self, token: u64, deadline: u64) {
        for (_, shim) in self.of(token) {
            shim.control.extend(deadline);
        }
    }

    pub fn stop(&self, token: u64, signal: u8, grace_ms: u64) {
        for (_, shim) in self.of(token) {
            shim.control.ask_stop(Stop { signal, grace_ms });
            shim.wake();
        }
    }

    /// Opens the barrier; `late` is the environment that came with it. Tells of each rank that starts.
    pub fn open(&self, token: u64, late: &[(&'static str, String)]) {
        let text: String = late.iter().map(|(name, value)| format!("{name}={value}\n")).collect();
        for (key, shim) in self.of(token) {
            if let Err(error) = record::replace(&shim.dir.join(record::GO), text.as_bytes(), false) {
                // Without it the rank would not find its gang; the start timeout names this machine.
                tracing::error!(token, rank = key.1, %error, "the barrier can't be opened");
                continue;
            }
            shim.control.open_barrier();
            shim.wake();
            self.await_start(key, shim);
        }
    }

    /// Tells when the rank has started; a rank that ends without is told by its watcher.
    fn await_start(&self, key: Key, shim: Arc<Shim>) {
        let shims = self.clone();
        tokio::spawn(async move {
            while matches!(shim.control.phase(), Phase::New | Phase::Waiting) && shims.lock().contains_key(&key) {
                tokio::time::sleep(START_POLL).await;
            }
            if shim.control.phase() == Phase::Started {
                let _ = shims.events.send(Event::Rank { token: key.0, local: key.1, rank: Rank::Started });
            }
        });
    }

    /// Deadline that the shims of an attempt have; `None` = none is alive.
    pub fn deadline(&self, token: u64) -> Option<u64> {
        self.of(token).iter().map(|(_, shim)| shim.control.deadline()).min()
    }

    fn of(&self, token: u64) -> Vec<(Key, Arc<Shim>)> {
        let all = self.lock();
        all.range((token, 0)..=(token, u32::MAX)).map(|(key, shim)| (*key, shim.clone())).collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<Key, Arc<Shim>>> {
        self.all.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Shim {
    fn wake(&self) {
        let _ = pidfd_send_signal(self.pidfd.get_ref(), Signal::USR1);
    }
}
