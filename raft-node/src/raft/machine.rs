//! The state machine as openraft drives it: decodes entries, applies them, answers, installs and offers snapshots. The rules of apply are the
//! `statemachine` crate's; when the image is written is `image`'s; when the log is purged is `upkeep`'s.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::{Stream, StreamExt};
use openraft::storage::{EntryResponder, RaftStateMachine};
use statemachine::State;
use statemachine::record::LogPosition;
use statemachine::settings::Settings;
use statemachine::storage::snapshot::{self, Manifest};
use statemachine::storage::{
    self, BEHIND_BYTES, BEHIND_RECORDS, CUT_RECORDS, Cause, Cut, Image, Persisted, Recovered, Source, StorageError,
    codec,
};
use tokio::sync::watch;

use super::build::Builder;
use super::image::Bell;
use super::mark::Mark;
use super::mend::MenderOf;
use super::types::{
    ApplyReply, Entry, EntryPayload, LeaderId, LogId, Payload, Peer, SnapshotMeta, StoredMembership, TypeConfig, log_id,
};
use super::wire;

/// A finished snapshot on this machine: what openraft hands from the machine to the network.
pub use statemachine::storage::Snapshot as SnapshotFiles;

/// Each replica publishes its digest at the multiples of this index.
pub const DIGEST_EVERY: u64 = 4_096;
/// Changed records brought into the digest after each batch, so that no digest stalls apply for long.
const DIGEST_STEP: usize = 512;
/// How long a snapshot's installation waits for readers of the old image.
const IMAGE_CLOSES: Duration = Duration::from_secs(60);
/// Between tries to write to a full disk.
const ROOM_RETRY: Duration = Duration::from_secs(1);
/// Tries to write a snapshot while history is dropped under it.
const SNAPSHOT_TRIES: usize = 3;

pub(super) type Snapshot = openraft::Snapshot<LeaderId, u64, Peer, SnapshotFiles>;

/// How far the state has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Of the last entry applied; 0 also before the first.
    pub index: u64,
    pub revision: u64,
    /// Who proposed the last entry; `None` before the first.
    pub(crate) leader: Option<LeaderId>,
}

impl Applied {
    /// Whether the entry at `index` is applied.
    pub fn has(&self, index: u64) -> bool {
        self.leader.is_some() && self.index >= index
    }
}

/// A state's digest at one log index: replicas must agree on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Digest {
    pub index: u64,
    pub value: u128,
}

/// What decides how much of the log must stay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Marks {
    /// Last index of the oldest and newest snapshot kept.
    pub oldest_snapshot: Option<u64>,
    pub newest_snapshot: Option<u64>,
    /// Index up to which the image is on disk.
    pub image: Option<u64>,
    /// Bytes of payloads applied since the newest snapshot.
    pub bytes_since_snapshot: u64,
}

impl Marks {
    /// The log up to here is not needed for any way back: both the oldest snapshot and the image are past it.
    pub fn purgeable(&self) -> Option<u64> {
        Some(self.oldest_snapshot?.min(self.image?))
    }
}

/// What apply, readers and the image's thread share.
pub struct Shared {
    live: Mutex<Live>,
    /// `None` while a snapshot is installed, and for good if that failed.
    image: Mutex<Option<Arc<Image>>>,
    /// Held by who replaces the image or writes to it.
    pub(super) writing: Mutex<()>,
    /// The replica's directory.
    dir: PathBuf,
    /// The newest snapshot that verified.
    current: Mutex<Option<SnapshotFiles>>,
    pub(super) bell: Bell,
    pub(crate) mark: Mark,
    /// Who makes damaged history whole, once there is one.
    pub(crate) mender: MenderOf,
    applied: watch::Sender<Applied>,
    digest: watch::Sender<Option<Digest>>,
    marks: watch::Sender<Marks>,
    image_behind: watch::Sender<bool>,
    /// The disk has no room for another cut.
    short_of_room: watch::Sender<bool>,
    failed: watch::Sender<Option<String>>,
}

struct Live {
    state: State,
    /// Bytes of entries applied since the last cut.
    uncut_bytes: usize,
    /// Of the last cut.
    cut_at: LogPosition,
}

impl Shared {
    /// Goes on from what was recovered from `dir`; `cluster` is the id of a group that has no state yet.
    pub fn new(dir: &Path, cluster: [u8; 16], recovered: Recovered) -> io::Result<Self> {
        let Recovered { state, image, source } = recovered;
        let (state, on_disk) = match source {
            Source::Empty => (State::new(cluster, Settings::default()), None),
            Source::Image | Source::Snapshot(_) => {
                let index = state.meta.applied.index;
                (state, Some(index))
            }
            // `fetch` comes before this.
            Source::NeedsLeaderSnapshot => return Err(io::Error::other("there is no state to begin from")),
        };
        let applied = applied_of(&state);
        let cut_at = state.meta.applied;
        let shared = Self {
            live: Mutex::new(Live { state, uncut_bytes: 0, cut_at }),
            image: Mutex::new(Some(Arc::new(image))),
            writing: Mutex::default(),
            dir: dir.to_owned(),
            current: Mutex::default(),
            bell: Bell::default(),
            mark: Mark::default(),
            mender: MenderOf::default(),
            applied: watch::Sender::new(applied),
            digest: watch::Sender::default(),
            marks: watch::Sender::new(Marks { image: on_disk, ..Marks::default() }),
            image_behind: watch::Sender::default(),
            short_of_room: watch::Sender::default(),
            failed: watch::Sender::default(),
        };
        let newest = snapshot::newest_valid(&shared.snapshots(), 0).map_err(io::Error::other)?;
        shared.has_snapshot(newest).map_err(io::Error::other)?;
        Ok(shared)
    }

    /// Where snapshots are kept.
    pub fn snapshots(&self) -> PathBuf {
        storage::snapshots_dir(&self.dir)
    }

    /// Reads the newest applied state where it lies. Apply waits meanwhile, so this is for microseconds; but a clone makes the next
    /// entry copy what it changes, which a reader that looks after each entry must spare it.
    pub fn look<T>(&self, at: impl FnOnce(&State) -> T) -> T {
        at(&self.live().state)
    }

    /// A clone of the newest applied state: O(1).
    pub fn state(&self) -> State {
        self.live().state.clone()
    }

    pub fn applied(&self) -> watch::Receiver<Applied> {
        self.applied.subscribe()
    }

    pub fn digest(&self) -> watch::Receiver<Option<Digest>> {
        self.digest.subscribe()
    }

    pub fn marks(&self) -> watch::Receiver<Marks> {
        self.marks.subscribe()
    }

    /// Whether the image waits for room on the disk.
    pub fn short_of_room(&self) -> watch::Receiver<bool> {
        self.short_of_room.subscribe()
    }

    pub(super) fn say_short_of_room(&self, short: bool) {
        self.short_of_room.send_if_modified(|known| std::mem::replace(known, short) != short);
    }

    pub fn image_behind(&self) -> watch::Receiver<bool> {
        self.image_behind.subscribe()
    }

    /// Where the image lies.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The image, for history; another one after a snapshot was installed, none meanwhile. Do not keep it longer than a read lasts.
    pub fn image(&self) -> Option<Arc<Image>> {
        self.image_slot().clone()
    }

    fn image_slot(&self) -> MutexGuard<'_, Option<Arc<Image>>> {
        self.image.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Blocks while a snapshot is installed.
    fn image_in_time(&self) -> Result<Arc<Image>, StorageError> {
        let _no_one_replaces_it = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        self.image().ok_or_else(|| {
            let cause = Cause::Damaged("a snapshot's installation failed".to_owned());
            StorageError { file: self.dir.clone(), operation: "open the image of", cause }
        })
    }

    /// Why this replica must stop, once it must.
    pub fn failed(&self) -> watch::Receiver<Option<String>> {
        self.failed.subscribe()
    }

    pub(super) fn fail(&self, reason: String) {
        tracing::error!(%reason, "this replica must stop");
        self.failed.send_if_modified(|failed| {
            let first = failed.is_none();
            if first {
                *failed = Some(reason);
            }
            first
        });
    }

    pub(super) fn count_bytes_anew(&self) {
        self.marks.send_modify(|marks| marks.bytes_since_snapshot = 0);
    }

    /// The next cut of the image; `None` if nothing was applied since the last.
    pub(super) fn take_cut(&self) -> Option<Cut> {
        let mut live = self.live();
        if live.state.meta.applied == live.cut_at {
            return None;
        }
        live.uncut_bytes = 0;
        live.cut_at = live.state.meta.applied;
        self.image_behind.send_if_modified(|behind| std::mem::replace(behind, false));
        Some(live.state.cut())
    }

    /// A cut that could not be written: its changes are the next one's.
    pub(super) fn take_back(&self, cut: &Cut) {
        let mut live = self.live();
        live.state.take_back(cut);
        // Nothing new need be applied for the next one.
        live.cut_at = LogPosition::default();
    }

    /// Blocks: opens the image anew, as it was at the last cut that was written.
    pub(super) fn reopen_image(&self) -> Result<(), StorageError> {
        let _alone = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(old) = self.image_slot().take() {
            close(old, &self.dir)?;
        }
        let image = storage::reopen(&self.dir)?;
        *self.image_slot() = Some(Arc::new(image));
        tracing::info!(dir = %self.dir.display(), "the image is open again");
        Ok(())
    }

    /// Blocks: does what writes to the disk, again and again while that is full and the replica runs.
    pub(super) fn when_there_is_room<T>(&self, work: impl Fn() -> Result<T, StorageError>) -> Result<T, StorageError> {
        loop {
            match work() {
                Err(full) if full.is_full() && !self.bell.ends() => {
                    tracing::error!(%full, "the disk is full: it is tried again");
                    std::thread::sleep(ROOM_RETRY);
                }
                done => return done,
            }
        }
    }

    pub(super) fn cut_written(&self, persisted: &Persisted) {
        self.live().state.forget_archived(persisted);
        self.marks.send_modify(|marks| marks.image = Some(persisted.applied.index));
    }

    fn has_snapshot(&self, newest: Option<SnapshotFiles>) -> Result<(), StorageError> {
        let kept = snapshot::list(&self.snapshots())?;
        self.marks.send_modify(|marks| {
            marks.newest_snapshot = newest.as_ref().map(|newest| newest.id.0.index);
            marks.oldest_snapshot = kept.last().map(|oldest| oldest.0.index);
        });
        *self.current() = newest;
        Ok(())
    }

    /// Blocks: writes a snapshot of the state as it is now.
    pub(super) fn write_snapshot(&self) -> Result<SnapshotFiles, StorageError> {
        let mut tries = 0;
        let written = loop {
            tries += 1;
            let image = self.image_in_time()?;
            self.count_bytes_anew();
            match snapshot::write(&self.snapshots(), self.state(), &image) {
                Err(StorageError { cause: Cause::Superseded { .. }, .. }) if tries < SNAPSHOT_TRIES => {}
                written => break written?,
            }
        };
        self.has_snapshot(Some(written.clone()))?;
        Ok(written)
    }

    /// Blocks: makes a snapshot from the leader this replica's state.
    fn install(&self, files: &SnapshotFiles) -> Result<(), StorageError> {
        let _alone = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(old) = self.image_slot().take() {
            close(old, &self.dir)?;
        }
        let (state, new) = storage::install(&self.dir, files)?;
        *self.image_slot() = Some(Arc::new(new));
        let applied = applied_of(&state);
        {
            let mut live = self.live();
            live.cut_at = state.meta.applied;
            live.uncut_bytes = 0;
            live.state = state;
        }
        self.applied.send_replace(applied);
        self.marks.send_modify(|marks| {
            marks.image = Some(applied.index);
            marks.bytes_since_snapshot = 0;
        });
        self.has_snapshot(Some(files.clone()))
    }

    /// The newest snapshot that verified.
    pub(super) fn newest_snapshot(&self) -> Option<SnapshotFiles> {
        self.current().clone()
    }

    /// From where openraft goes on at a start: from the state, or from a snapshot of another replica that was not made the state yet.
    pub fn start(&self) -> Option<LogId> {
        let snapshot = self.current().as_ref().map(|files| files.id.0);
        self.look(position).max(snapshot.map(|at| log_id(at.term, at.leader, at.index)))
    }

    fn current(&self) -> MutexGuard<'_, Option<SnapshotFiles>> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn live(&self) -> MutexGuard<'_, Live> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn apply(&self, entry: &Entry) -> io::Result<ApplyReply> {
        let decoded = match &entry.payload {
            EntryPayload::Normal(Payload(bytes)) => {
                Some(codec::decode_entry(bytes).map_err(|err| unreadable(entry, &err))?)
            }
            EntryPayload::Blank | EntryPayload::Membership(_) => None,
        };
        let mut live = self.live();
        let mut outcomes = Vec::new();
        if let Some(decoded) = &decoded {
            outcomes = live.state.apply(decoded).map_err(|too_new| unreadable(entry, &too_new))?;
        }
        if let EntryPayload::Membership(membership) = &entry.payload {
            let stored = StoredMembership::new(Some(entry.log_id), membership.clone());
            live.state.set_membership(wire::encode(&stored).to_vec());
        }
        let LeaderId { term, node_id } = entry.log_id.leader_id;
        live.state.set_applied(LogPosition { term, leader: node_id, index: entry.log_id.index });
        live.uncut_bytes += payload_len(entry);
        if let Some(decoded) = &decoded {
            self.mark.keep(decoded, &live.state);
        }
        if entry.log_id.index.is_multiple_of(DIGEST_EVERY) {
            let value = live.state.digest();
            self.digest.send_replace(Some(Digest { index: entry.log_id.index, value }));
        }
        Ok(ApplyReply { outcomes, revision: live.state.meta.rev.0 })
    }

    /// After a batch: tells all who wait for the state, and the image's thread when it has enough to do.
    fn publish(&self, bytes: u64) {
        let (applied, uncut, behind) = {
            let mut live = self.live();
            live.state.digest_some(DIGEST_STEP);
            let uncut = live.state.uncut();
            let behind = uncut >= BEHIND_RECORDS || live.uncut_bytes >= BEHIND_BYTES;
            (applied_of(&live.state), uncut, behind)
        };
        self.applied.send_replace(applied);
        self.image_behind.send_if_modified(|now| std::mem::replace(now, behind) != behind);
        if uncut >= CUT_RECORDS {
            self.bell.cut_now();
        }
        self.marks.send_if_modified(|marks| {
            marks.bytes_since_snapshot += bytes;
            marks.bytes_since_snapshot >= super::settings::SNAPSHOT_BYTES
        });
    }
}

fn payload_len(entry: &Entry) -> usize {
    match &entry.payload {
        EntryPayload::Normal(Payload(bytes)) => bytes.len(),
        EntryPayload::Blank | EntryPayload::Membership(_) => 0,
    }
}

/// An entry that this binary can't apply stops the replica: skipping it would make it differ from the others.
fn unreadable(entry: &Entry, err: &dyn std::fmt::Display) -> io::Error {
    io::Error::other(format!("entry {} can't be applied: {err}. Start a newer binary on this replica", entry.log_id))
}

fn applied_of(state: &State) -> Applied {
    let at = state.meta.applied;
    Applied { index: at.index, revision: state.meta.rev.0, leader: position(state).map(|id| id.leader_id) }
}

/// The last entry applied. A group's first entry is its membership, so a state without one has applied nothing.
fn position(state: &State) -> Option<LogId> {
    let at = state.meta.applied;
    (!state.meta.membership.is_empty()).then(|| log_id(at.term, at.leader, at.index))
}

fn membership(state: &State) -> io::Result<StoredMembership> {
    if state.meta.membership.is_empty() {
        return Ok(StoredMembership::default());
    }
    wire::decode(Bytes::copy_from_slice(&state.meta.membership))
        .map_err(|err| io::Error::other(format!("stored membership: {err}")))
}

/// What openraft must know of a snapshot, from its manifest.
pub(super) fn meta(manifest: &Manifest) -> io::Result<SnapshotMeta> {
    let unreadable = |what: String| io::Error::other(format!("membership in a snapshot's manifest: {what}"));
    let hex = manifest.membership.as_bytes();
    let bytes: Option<Vec<u8>> =
        hex.chunks(2).map(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()).collect();
    let bytes = bytes.ok_or_else(|| unreadable("it is not hex".to_owned()))?;
    let last_membership = wire::decode(Bytes::from(bytes)).map_err(|err| unreadable(err.to_string()))?;
    let at = manifest.position;
    Ok(SnapshotMeta { last_log_id: Some(log_id(at.term, at.leader, at.index)), last_membership })
}

/// Waits until no one reads the image any more, and closes it.
fn close(mut image: Arc<Image>, dir: &Path) -> Result<(), StorageError> {
    let began = Instant::now();
    loop {
        match Arc::try_unwrap(image) {
            Ok(alone) => {
                drop(alone);
                return Ok(());
            }
            Err(shared) if began.elapsed() < IMAGE_CLOSES => image = shared,
            Err(_) => {
                let cause = Cause::Damaged(format!("it is still read after {} s", IMAGE_CLOSES.as_secs()));
                return Err(StorageError { file: dir.to_owned(), operation: "close the image of", cause });
            }
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Runs what blocks on a thread of its own.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, StorageError> + Send + 'static) -> io::Result<T> {
    let done = crate::runtime::blocking(work).await.map_err(io::Error::other)?;
    done.map_err(io::Error::other)
}

/// openraft's handle to the machine.
pub struct Machine {
    shared: Arc<Shared>,
}

impl Machine {
    pub fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }
}

impl RaftStateMachine<TypeConfig> for Machine {
    type SnapshotData = SnapshotFiles;
    type SnapshotBuilder = Builder;

    async fn applied_state(&mut self) -> io::Result<(Option<LogId>, StoredMembership)> {
        let state = self.shared.state();
        Ok((position(&state), membership(&state)?))
    }

    async fn apply<S>(&mut self, mut entries: S) -> io::Result<()>
    where
        S: Stream<Item = io::Result<EntryResponder<TypeConfig>>> + Unpin + Send,
    {
        let mut bytes = 0;
        while let Some(next) = entries.next().await {
            let (entry, responder) = next?;
            let reply = self.shared.apply(&entry).inspect_err(|err| self.shared.fail(err.to_string()))?;
            bytes += payload_len(&entry) as u64;
            if let Some(responder) = responder {
                responder.send(reply);
            }
        }
        self.shared.publish(bytes);
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> Builder {
        Builder::new(self.shared.clone())
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, snapshot: SnapshotFiles) -> io::Result<()> {
        let shared = self.shared.clone();
        tracing::info!(last = ?meta.last_log_id, dir = %snapshot.dir().display(), "a snapshot is installed");
        blocking(move || shared.when_there_is_room(|| shared.install(&snapshot)))
            .await
            .inspect_err(|err| self.shared.fail(err.to_string()))
    }

    async fn get_current_snapshot(&mut self) -> io::Result<Option<Snapshot>> {
        let Some(files) = self.shared.current().clone() else { return Ok(None) };
        Ok(Some(Snapshot { meta: meta(&files.manifest)?, snapshot: files }))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use statemachine::storage::LogBounds;
    use statemachine::{Cmd, Command, LEVEL};

    use super::super::image::Writer;
    use super::*;

    fn shared(dir: &Path) -> Arc<Shared> {
        let recovered = storage::open(dir, LogBounds::default()).expect("an empty directory opens");
        Arc::new(Shared::new(dir, [7; 16], recovered).expect("a new state"))
    }

    fn entry(index: u64, level: u16) -> Entry {
        entry_of(index, level, "o".to_owned())
    }

    fn entry_of(index: u64, level: u16, owner: String) -> Entry {
        let body = Command::OpenSession { owner, ttl_ms: 60_000 };
        let cmds = vec![Cmd { request: None, actor: "a".to_owned(), body }];
        let entry = statemachine::Entry { level, clock_ms: index, wall_ms: 0, salt: index, cmds };
        let payload = EntryPayload::Normal(Payload(codec::encode_entry(&entry).into()));
        Entry { log_id: log_id(1, 1, index), payload }
    }

    fn first() -> Entry {
        let members = std::collections::BTreeMap::from([(1, Peer::default())]);
        let voters = vec![std::collections::BTreeSet::from([1])];
        let membership = super::super::types::Membership::new(voters, members).expect("one voter with its peer");
        Entry { log_id: log_id(0, 1, 0), payload: EntryPayload::Membership(membership) }
    }

    #[test]
    fn an_entry_of_a_newer_level_changes_nothing_and_is_an_error() {
        let dir = tempfile::tempdir().expect("a directory");
        let shared = shared(dir.path());
        shared.apply(&first()).expect("applied");
        assert_eq!(shared.apply(&entry(1, LEVEL)).expect("applied").outcomes.len(), 1);
        let refused = shared.apply(&entry(2, LEVEL + 1)).expect_err("this binary is too old");
        assert!(refused.to_string().contains("newer binary"), "{refused}");
        assert_eq!(shared.state().meta.applied.index, 1);
    }

    #[test]
    fn the_image_waits_for_the_log() {
        let dir = tempfile::tempdir().expect("a directory");
        let shared = shared(dir.path());
        for entry in [first(), entry(1, LEVEL), entry(2, LEVEL)] {
            shared.apply(&entry).expect("applied");
        }
        shared.publish(0);
        // A leader applies what the others have synced; its own log is durable up to entry 1 only.
        let (durable, log) = watch::channel(Some(1));
        let writer = Writer::start(shared.clone(), log).expect("a thread");
        std::thread::sleep(Duration::from_millis(storage::CUT_MS + 500));
        assert_eq!(shared.marks().borrow().image, None, "the cut at entry 2 waits");
        durable.send_replace(Some(2));
        writer.finish();
        assert_eq!(shared.marks().borrow().image, Some(2));
    }

    /// A file system of its own, in a mount namespace of its own; `None` where that is not allowed.
    fn small_disk(mib: u64) -> Option<tempfile::TempDir> {
        let dir = tempfile::tempdir().expect("a directory");
        let mount = |args: &[&str]| {
            let run = std::process::Command::new("mount").args(args).arg(dir.path()).output();
            run.is_ok_and(|output| output.status.success())
        };
        // SAFETY: file descriptors stay shared.
        let left = unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }.is_ok();
        let private = left && std::process::Command::new("mount").args(["--make-rprivate", "/"]).status().is_ok();
        if private && mount(&["-t", "tmpfs", "-o", &format!("size={mib}m"), "tmpfs"]) {
            return Some(dir);
        }
        eprintln!("SKIPPED: no disk was filled, that needs the right to mount");
        None
    }

    #[test]
    fn a_disk_that_fills_within_a_cut_holds_the_image_up_and_no_more() {
        let Some(dir) = small_disk(48) else { return };
        let home = dir.path().join("home");
        let shared = shared(&home);
        shared.apply(&first()).expect("applied");
        shared.apply(&entry(1, LEVEL)).expect("applied");
        let (_durable, log) = watch::channel(Some(u64::MAX));
        // No room is asked for, so that the write itself finds the disk full.
        let writer = Writer::start_with(shared.clone(), log, 0).expect("a thread");
        let wait = |what: &str, holds: &dyn Fn() -> bool| {
            let began = Instant::now();
            while !holds() {
                assert_eq!(*shared.failed().borrow(), None, "{what}");
                assert!(began.elapsed() < Duration::from_secs(30), "{what}");
                std::thread::sleep(Duration::from_millis(10));
            }
        };
        wait("a first cut", &|| shared.marks().borrow().image == Some(1));
        let ballast = dir.path().join("ballast");
        let mut file = std::fs::File::create(&ballast).expect("created");
        while std::io::Write::write_all(&mut file, &[1; 4096]).is_ok() {}
        drop(file);
        // The store has room of its own for some.
        let mut index = 1;
        while !*shared.short_of_room().borrow() {
            index += 1;
            let owner =
                (0..10u64).map(|word| format!("{:016x}", (index * 10 + word).wrapping_mul(0x9e37_79b9_7f4a_7c15)));
            shared.apply(&entry_of(index, LEVEL, owner.collect())).expect("apply goes on");
            assert!(index < 90_000, "the disk never was full");
            std::thread::sleep(Duration::from_micros(100));
        }
        assert!(shared.marks().borrow().image < Some(index));
        std::fs::remove_file(&ballast).expect("removed");
        wait("it goes on", &|| shared.marks().borrow().image == Some(index));
        wait("it says so", &|| !*shared.short_of_room().borrow());
        writer.finish();
        let mut state = shared.state();
        drop(shared);
        let last = Some(state.meta.applied);
        let recovered = storage::open(&home, LogBounds { purged: None, last }).expect("a good image");
        let mut found = recovered.state;
        assert_eq!((recovered.source, found.meta.applied), (Source::Image, state.meta.applied));
        assert_eq!(found.digest(), state.digest());
        assert_eq!(found.events, state.events);
    }

    #[test]
    fn the_log_is_purgeable_below_both_snapshot_and_image() {
        let marks = |oldest, image| Marks { oldest_snapshot: oldest, image, ..Marks::default() };
        assert_eq!(marks(None, Some(9)).purgeable(), None);
        assert_eq!(marks(Some(9), None).purgeable(), None);
        assert_eq!(marks(Some(5), Some(9)).purgeable(), Some(5));
        assert_eq!(marks(Some(9), Some(5)).purgeable(), Some(5));
    }

    #[test]
    fn nothing_is_applied_before_the_first_entry_and_index_0_after_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let shared = shared(dir.path());
        assert_eq!(position(&shared.state()), None);
        assert!(!shared.applied().borrow().has(0));
        shared.apply(&first()).expect("applied");
        shared.publish(0);
        assert_eq!(position(&shared.state()), Some(log_id(0, 1, 0)));
        assert!(shared.applied().borrow().has(0));
    }
}
