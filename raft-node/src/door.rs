//! The one door to the log: stamps cluster time, wall time and salt, and packs concurrent commands into few entries.
//!
//! A command goes out at once while fewer than [`IN_FLIGHT`] entries are under way; else it waits for one of them to return, and
//! all that came meanwhile go together: the window is the batcher, no timer delays anyone. Who may propose, and what it means, is the
//! callers' and apply's.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use openraft::async_runtime::watch::WatchReceiver;
use openraft::errors::ClientWriteError;
use openraft::impls::ProgressResponder;
use statemachine::storage::codec::{self, EncodedCmd, EntryHead};
use statemachine::{Cmd, Outcome};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};

use crate::office::Office;
use crate::raft::Raft;
use crate::raft::types::{Payload, Peer, TypeConfig};

/// Entries under way at once. Measured with a file log: fewer let half the clients wait, more make the entries small.
pub const IN_FLIGHT: usize = 8;
/// Commands in one entry ...
pub const ENTRY_COMMANDS: usize = 1_000;
/// ... and their bytes. One larger command travels alone.
pub const ENTRY_BYTES: usize = 128 << 10;
/// Bytes of the largest command.
pub const COMMAND_BYTES: usize = 320 << 10;
/// Commands that may wait for the door: a second's work of a fast disk. Above it callers are told to come again.
pub const QUEUE: usize = 65_536;
/// ... when, in ms.
const BUSY_RETRY_MS: u64 = 100;
/// A caller waits this long for its command's answer; after that the outcome is unknown to it.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// Why a command has no outcome. Only [`ProposeError::Unknown`] may have taken effect.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    #[error("this replica does not lead{}", .0.as_ref().map(|(id, peer)| format!("; the leader is replica {id} at {}", peer.api_addr)).unwrap_or_default())]
    NotLeader(Option<(u64, Peer)>),
    #[error("{QUEUE} commands wait already; come again in {retry_ms} ms")]
    Busy { retry_ms: u64 },
    #[error("the image is too far behind the log: the disk is slower than the load; come again in {retry_ms} ms")]
    ImageBehind { retry_ms: u64 },
    #[error("the leader's disk is full")]
    DiskFull,
    #[error("the command has {bytes} bytes, the limit is {COMMAND_BYTES}")]
    TooLarge { bytes: usize },
    #[error("the outcome is unknown: repeat the command with the same request id")]
    Unknown,
    #[error("this replica stops")]
    Stopped,
}

/// What the door must know of the machine before it lets a command in.
#[derive(Clone)]
pub struct Obstacles {
    pub image_behind: watch::Receiver<bool>,
    pub disk_full: watch::Receiver<bool>,
}

type Answer = Result<(Outcome, u64), ProposeError>;

struct Waiting {
    cmd: EncodedCmd,
    /// Only in this term of office; `None`: in any.
    term: Option<u64>,
    answer: oneshot::Sender<Answer>,
}

/// Cloning shares the queue.
#[derive(Clone)]
pub struct Door {
    queue: mpsc::Sender<Waiting>,
    office: watch::Receiver<Option<Office>>,
    obstacles: Obstacles,
    /// Entries that may still go out at once.
    window: Arc<Semaphore>,
    closed: Arc<AtomicBool>,
    /// Commands refused because the image was behind.
    behind: Arc<AtomicU64>,
    raft: Raft,
}

/// The packing half: runs until the replica stops.
pub struct Packer {
    queue: mpsc::Receiver<Waiting>,
    /// Taken from the queue but too large for the entry before it.
    held: Option<Waiting>,
    office: watch::Receiver<Option<Office>>,
    window: Arc<Semaphore>,
    raft: Raft,
}

impl Door {
    pub fn new(raft: Raft, office: watch::Receiver<Option<Office>>, obstacles: Obstacles) -> (Self, Packer) {
        let (sender, queue) = mpsc::channel(QUEUE);
        let window = Arc::new(Semaphore::new(IN_FLIGHT));
        let packer = Packer { queue, held: None, office: office.clone(), window: window.clone(), raft: raft.clone() };
        (
            Self { queue: sender, office, obstacles, window, closed: Arc::default(), behind: Arc::default(), raft },
            packer,
        )
    }

    /// Commands refused since the start because the image was behind.
    pub fn refused_behind(&self) -> u64 {
        self.behind.load(Ordering::Relaxed)
    }

    /// Lets no command in any more, and waits until those inside have their answers.
    pub async fn close(&self, within: Duration) {
        const LOOK: Duration = Duration::from_millis(5);
        self.closed.store(true, Ordering::Release);
        let drained = async {
            while self.queue.capacity() < QUEUE || self.window.available_permits() < IN_FLIGHT {
                tokio::time::sleep(LOOK).await;
            }
        };
        if tokio::time::timeout(within, drained).await.is_err() {
            tracing::warn!("commands under way did not end in time: their callers will repeat them");
        }
    }

    /// Proposes one command and waits until it is applied: its outcome, and the keyspace's revision after its entry.
    pub async fn propose(&self, cmd: Cmd) -> Answer {
        self.propose_within(cmd, None).await
    }

    /// The same for what the leader concluded in one term: it never reaches the log in a later one, whose leader may know better (a
    /// node that was silent then may have been heard since).
    pub async fn propose_in(&self, cmd: Cmd, term: u64) -> Answer {
        self.propose_within(cmd, Some(term)).await
    }

    async fn propose_within(&self, cmd: Cmd, term: Option<u64>) -> Answer {
        match tokio::time::timeout(PATIENCE, self.propose_patiently(cmd, term)).await {
            Ok(answer) => answer,
            Err(_) => Err(ProposeError::Unknown),
        }
    }

    async fn propose_patiently(&self, cmd: Cmd, term: Option<u64>) -> Answer {
        if self.closed.load(Ordering::Acquire) {
            return Err(ProposeError::Stopped);
        }
        self.ensure_office().await?;
        if *self.obstacles.disk_full.borrow() {
            return Err(ProposeError::DiskFull);
        }
        if *self.obstacles.image_behind.borrow() {
            self.behind.fetch_add(1, Ordering::Relaxed);
            return Err(ProposeError::ImageBehind { retry_ms: BUSY_RETRY_MS });
        }
        let cmd = EncodedCmd::new(&cmd);
        if cmd.len() > COMMAND_BYTES {
            return Err(ProposeError::TooLarge { bytes: cmd.len() });
        }
        let (answer, answered) = oneshot::channel();
        match self.queue.try_send(Waiting { cmd, term, answer }) {
            Ok(()) => {}
            Err(mpsc::error::TrySendError::Full(_)) => return Err(ProposeError::Busy { retry_ms: BUSY_RETRY_MS }),
            Err(mpsc::error::TrySendError::Closed(_)) => return Err(ProposeError::Stopped),
        }
        // The packer drops a command only when the replica stops, maybe after proposing it.
        answered.await.unwrap_or(Err(ProposeError::Unknown))
    }

    /// Returns once this replica is in office. A leader just elected gets there by itself within a round trip.
    async fn ensure_office(&self) -> Result<(), ProposeError> {
        if self.office.borrow().is_some() {
            return Ok(());
        }
        let mut office = self.office.clone();
        let mut metrics = self.raft.server_metrics();
        loop {
            if office.borrow_and_update().is_some() {
                return Ok(());
            }
            if !metrics.borrow_and_update().state.is_leader() {
                return Err(ProposeError::NotLeader(leader_hint(&self.raft)));
            }
            tokio::select! {
                changed = office.changed() => changed.map_err(|_| ProposeError::Stopped)?,
                changed = metrics.changed() => changed.map_err(|_| ProposeError::Stopped)?,
            }
        }
    }
}

/// The leader that this replica knows of, another one than itself.
pub fn leader_hint(raft: &Raft) -> Option<(u64, Peer)> {
    let metrics = raft.metrics();
    let metrics = metrics.borrow_watched();
    let leader = metrics.current_leader.filter(|leader| leader != raft.node_id())?;
    let peer = metrics.membership_config.membership().get_node(&leader)?;
    Some((leader, peer.clone()))
}

impl Packer {
    pub async fn run(mut self) {
        loop {
            let first = match self.held.take() {
                Some(held) => held,
                None => match self.queue.recv().await {
                    Some(first) => first,
                    None => return,
                },
            };
            let Ok(permit) = self.window.clone().acquire_owned().await else { return };
            // Behind all that are ready: the calls that came with this one in one packet get into its entry.
            tokio::task::yield_now().await;
            let batch = self.fill(first);
            // Cloned out of the channel before anything waits.
            let office = self.office.borrow().clone();
            let term = office.as_ref().map(|office| office.term);
            let (batch, late): (Vec<_>, Vec<_>) = batch
                .into_iter()
                .partition(|waiting| term.is_some() && waiting.term.is_none_or(|only| Some(only) == term));
            refuse(late, &ProposeError::NotLeader(leader_hint(&self.raft)));
            if let Some(office) = office.filter(|_| !batch.is_empty()) {
                drop(tokio::spawn(propose(self.raft.clone(), office, batch, permit)));
            }
        }
    }

    /// Takes what else waits, up to the bounds.
    fn fill(&mut self, first: Waiting) -> Vec<Waiting> {
        let mut bytes = 0;
        let mut batch = Vec::new();
        let mut next = Some(first);
        while batch.len() < ENTRY_COMMANDS && bytes < ENTRY_BYTES {
            let Some(next) = next.take().or_else(|| self.queue.try_recv().ok()) else { break };
            // Nobody waits for it any more: its caller was told that the outcome is unknown.
            if next.answer.is_closed() {
                continue;
            }
            bytes += next.cmd.len();
            if bytes > ENTRY_BYTES && !batch.is_empty() {
                self.held = Some(next);
                break;
            }
            batch.push(next);
        }
        batch
    }
}

fn refuse(batch: Vec<Waiting>, err: &ProposeError) {
    for waiting in batch {
        let _ = waiting.answer.send(Err(err.clone()));
    }
}

/// Proposes one entry and hands each caller its outcome. The permit is the entry's place in the window.
async fn propose(raft: Raft, office: Office, batch: Vec<Waiting>, permit: OwnedSemaphorePermit) {
    let (cmds, answers): (Vec<EncodedCmd>, Vec<_>) =
        batch.into_iter().map(|waiting| (waiting.cmd, waiting.answer)).unzip();
    let result = write(&raft, &office, cmds).await;
    drop(permit);
    match result {
        Ok((outcomes, revision)) => {
            for (answer, outcome) in answers.into_iter().zip(outcomes) {
                let _ = answer.send(Ok((outcome, revision)));
            }
        }
        Err(err) => {
            for answer in answers {
                let _ = answer.send(Err(err.clone()));
            }
        }
    }
}

async fn write(raft: &Raft, office: &Office, cmds: Vec<EncodedCmd>) -> Result<(Vec<Outcome>, u64), ProposeError> {
    let wanted = cmds.len();
    let payload = Payload(Bytes::from(codec::encode_entry_of(&stamp(office), &cmds)));
    let (responder, written) = ProgressResponder::complete_only();
    // Only while this office lasts: a later leader would stamp another time.
    raft.write(payload).responder(responder).with_leader(office.leader).await.map_err(|_| ProposeError::Stopped)?;
    let reply = match written.await {
        Ok(Ok(written)) => written.data,
        Ok(Err(err)) => return Err(why_not_written(raft, err)),
        Err(_) => return Err(ProposeError::Unknown),
    };
    // Fewer answers than commands would hand a caller another one's outcome.
    if reply.outcomes.len() != wanted {
        tracing::error!(wanted, got = reply.outcomes.len(), "apply did not answer each command");
        return Err(ProposeError::Unknown);
    }
    Ok((reply.outcomes, reply.revision))
}

fn why_not_written(raft: &Raft, err: ClientWriteError<TypeConfig>) -> ProposeError {
    match err {
        ClientWriteError::ForwardToLeader(to) => {
            let known = to.leader_id.zip(to.leader_node).filter(|(id, _)| id != raft.node_id());
            ProposeError::NotLeader(known)
        }
        // The entry may yet be committed by another leader.
        _ => ProposeError::Unknown,
    }
}

/// This machine's wall clock, as Unix time in ms: for display and calendar rules alone.
pub(crate) fn wall_ms() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as i64)
}

/// Cluster time is the clock at which the office was taken and the leader's own monotonic time since.
fn stamp(office: &Office) -> EntryHead {
    EntryHead { level: office.level, clock_ms: office.clock_ms(), wall_ms: wall_ms(), salt: rand::random() }
}
