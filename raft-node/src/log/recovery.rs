//! Opening a log: what is there, what of it counts, what must be refused. Owns the rule that tells a write that never
//! finished (cut, with a warning) from damage (refused, with file and offset); changes nothing on disk before
//! everything was checked.
//!
//! The rule: a bad frame in a closed segment is damage. In the last segment it is damage if any valid frame behind it
//! says that more was durable when that frame was written; else nobody was ever told of it, or of anything behind it.
//! Nothing but zeros up to the end of the last segment is no frame at all, but room for the next.

use std::collections::VecDeque;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use rustix::fs::{FlockOperation, flock};

use super::frame::{self, Base, Frame, Kind};
use super::segment::{Segment, SegmentFile, sync_dir};
use super::space::is_zero;
use super::view::{Place, View};
use super::vote::{Found, VoteFiles};
use super::witness::{Known, Witness};
use super::{LogError, Options, Record, Vote};

/// Together 300 ms.
const LOCK_TRIES: u32 = 30;
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// An opened log: everything in it is durable.
pub(super) struct Recovered {
    pub view: View,
    /// Oldest first, the last one is written to; never empty.
    pub segments: VecDeque<Segment>,
    pub votes: VoteFiles,
    /// Held as long as the log is open.
    pub lock: File,
}

pub(super) fn open(dir: &Path, options: &Options) -> Result<Recovered, LogError> {
    std::fs::create_dir_all(dir).map_err(LogError::io("create", dir))?;
    if let Some(parent) = dir.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        sync_dir(parent).map_err(LogError::io("sync", parent))?;
    }
    let lock = lock(dir)?;
    let (kept, orphans) = segment_numbers(dir)?;
    let (vote, known) = find_vote(dir, !kept.is_empty())?;
    let plan = replay(dir, &kept, vote, options)?;
    let known = known.max(Witness::look(dir).unwrap_or_default());
    check_durable(dir, &plan, known)?;
    commit(dir, options, plan, orphans, (vote, known), lock)
}

/// Only one process may write here. Asks for a while: the last holder may be on its way out, and a process that it
/// just forked has the lock too until its exec.
fn lock(dir: &Path) -> Result<File, LogError> {
    let file = File::open(dir).map_err(LogError::io("open", dir))?;
    for _ in 0..LOCK_TRIES {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(rustix::io::Errno::WOULDBLOCK) => std::thread::sleep(LOCK_PAUSE),
            Err(error) => return Err(LogError::io("lock", dir)(error.into())),
        }
    }
    Err(LogError::InUse { path: dir.to_owned() })
}

/// The gapless run of newest segments, ascending, and the files below it: a purge removes the oldest first, but a
/// removal may not have lasted. If something in between was lost instead, the run lacks entries and is refused.
fn segment_numbers(dir: &Path) -> Result<(Vec<u32>, Vec<PathBuf>), LogError> {
    let mut numbers = Vec::new();
    for item in std::fs::read_dir(dir).map_err(LogError::io("list", dir))? {
        let name = item.map_err(LogError::io("list", dir))?.file_name();
        numbers.extend(name.to_str().and_then(SegmentFile::number));
    }
    numbers.sort_unstable();
    let gap = numbers.windows(2).rposition(|pair| pair[0] + 1 != pair[1]);
    let kept = numbers.split_off(gap.map_or(0, |at| at + 1));
    Ok((kept, numbers.into_iter().map(|number| SegmentFile::path(dir, number)).collect()))
}

/// The vote, and how far the log was durable when it was saved.
fn find_vote(dir: &Path, has_log: bool) -> Result<(Option<Vote>, Known), LogError> {
    let lost = |what: &str| Err(LogError::VoteLost { path: dir.join("vote-a"), what: what.to_owned() });
    match (VoteFiles::look(dir)?, has_log) {
        (Found::Vote(Some(_), _), false) => Err(LogError::damaged(dir, 0, "there is a vote but no log")),
        (Found::Vote(vote, known), _) => Ok((vote, known)),
        (Found::Blank, false) => Ok((None, Known::default())),
        (Found::Blank, true) => lost("there is a log but no readable vote, neither here nor in vote-b"),
        (Found::Bad, _) => lost("both copies of the vote, this one and vote-b, are damaged"),
    }
}

/// What is to be done to make the disk equal to what was recovered.
struct Plan {
    view: View,
    segments: VecDeque<Segment>,
    /// The last segment's creation never finished; nothing is in it.
    unborn: Option<PathBuf>,
    /// The last segment has bytes behind its last whole frame.
    cut: bool,
}

fn replay(dir: &Path, numbers: &[u32], vote: Option<Vote>, options: &Options) -> Result<Plan, LogError> {
    let mut plan = Plan { view: View::new(options.tail_bytes), segments: VecDeque::new(), unborn: None, cut: false };
    for (at, &number) in numbers.iter().enumerate() {
        let file = SegmentFile::open(dir, number)?;
        let newest = at + 1 == numbers.len();
        let bytes = Bytes::from(std::fs::read(&file.path).map_err(LogError::io("read", &file.path))?);
        if newest && is_unborn(&file, &bytes)? {
            if at == 0 && (vote.is_some() || number != 1) {
                return Err(LogError::damaged(
                    &file.path,
                    0,
                    "the only segment has no valid head, though the log was in use",
                ));
            }
            plan.unborn = Some(file.path);
            break;
        }
        let file = Arc::new(file);
        plan.view.segments.insert(number, file.clone());
        let segment = replay_segment(&mut plan.view, file, &bytes, newest)?;
        plan.cut = segment.size < bytes.len() as u64;
        plan.segments.push_back(segment);
    }
    if let (Some(index), Some(first)) = (plan.view.missing_place(), plan.segments.front()) {
        let what = format!("entry {index} is in no segment: a segment before this one, or between others, is missing");
        return Err(LogError::damaged(&first.file.path, 0, what));
    }
    Ok(plan)
}

/// Whether everything is there that was once durable.
fn check_durable(dir: &Path, plan: &Plan, known: Known) -> Result<(), LogError> {
    let end =
        plan.segments.back().map(|last| Known { segment: last.file.number, offset: last.len }).unwrap_or_default();
    if end >= known {
        return Ok(());
    }
    let valid = if end.segment == known.segment { end.offset } else { 0 };
    let what = format!("it is valid up to here, but was durable up to {}: entries are lost", known.offset);
    Err(LogError::damaged(&SegmentFile::path(dir, known.segment), valid, what))
}

/// Whether the newest segment is one whose creation never finished: header and base frame are synced before anything
/// else is written.
fn is_unborn(file: &SegmentFile, bytes: &[u8]) -> Result<bool, LogError> {
    let head = frame::FILE_HEADER;
    let version = frame::file_version(bytes);
    if let Some(found) = version.filter(|found| *found != frame::VERSION) {
        return Err(LogError::Format { path: file.path.clone(), found, known: frame::VERSION });
    }
    let base = bytes.get(head..).and_then(|rest| Frame::decode(rest, file.number, head as u64));
    if version.is_some() && base.is_some() {
        return Ok(false);
    }
    if frame::synced_beyond(bytes, file.number, 0, 0) {
        return Err(LogError::damaged(&file.path, 0, "its head is not valid, but synced frames lie behind it"));
    }
    tracing::warn!(path = %file.path.display(), "a segment whose creation never finished is removed; it was empty");
    Ok(true)
}

fn replay_segment(view: &mut View, file: Arc<SegmentFile>, bytes: &Bytes, newest: bool) -> Result<Segment, LogError> {
    match frame::file_version(bytes) {
        Some(frame::VERSION) => {}
        Some(found) => return Err(LogError::Format { path: file.path.clone(), found, known: frame::VERSION }),
        None => return Err(LogError::damaged(&file.path, 0, "its header is not valid")),
    }
    let size = bytes.len() as u64;
    let mut segment = Segment { len: frame::FILE_HEADER as u64, size, recorded: 0, max_index: None, file };
    while segment.len < size {
        let at = segment.len;
        let Some(found) = Frame::decode(&bytes[at as usize..], segment.file.number, at) else {
            if !newest || !is_zero(&bytes[at as usize..]) {
                judge_bad_frame(&segment.file, bytes, at, newest)?;
                segment.size = at;
            }
            break;
        };
        let place = Place { segment: segment.file.number, offset: at as u32 };
        apply(view, &found, place, bytes).map_err(|what| LogError::damaged(&segment.file.path, at, what))?;
        if found.kind == Kind::Entry {
            segment.max_index = segment.max_index.max(Some(found.id.index));
        }
        segment.recorded = found.synced;
        segment.len += found.len() as u64;
    }
    if segment.len == frame::FILE_HEADER as u64 {
        return Err(LogError::damaged(&segment.file.path, segment.len, "it has no base frame"));
    }
    Ok(segment)
}

/// Damage, or the end of what was written?
fn judge_bad_frame(file: &SegmentFile, bytes: &[u8], at: u64, newest: bool) -> Result<(), LogError> {
    if !newest {
        return Err(LogError::damaged(&file.path, at, "a frame is not valid in a closed segment"));
    }
    if frame::synced_beyond(bytes, file.number, at as usize + 1, at) {
        return Err(LogError::damaged(
            &file.path,
            at,
            "a frame is not valid, and frames behind it show that it was synced",
        ));
    }
    tracing::warn!(
        path = %file.path.display(), offset = at, bytes = bytes.len() as u64 - at,
        "the end of the log was never synced and is cut off; nobody was told of it"
    );
    Ok(())
}

/// One frame's effect. The error says what does not fit.
fn apply(view: &mut View, found: &Frame<'_>, place: Place, bytes: &Bytes) -> Result<(), String> {
    let at_head = place.offset as usize == frame::FILE_HEADER;
    if at_head != (found.kind == Kind::Base) {
        return Err(format!("a {:?} frame may not lie here", found.kind));
    }
    match found.kind {
        Kind::Base => apply_base(view, found)?,
        Kind::Entry => {
            let record = Record { id: found.id, tag: found.tag, data: bytes.slice_ref(found.data) };
            view.check(std::slice::from_ref(&record)).map_err(|error| error.to_string())?;
            view.push(record);
            view.place(found.id.index, place);
            view.settle(found.id.index + 1, view.generation());
        }
        Kind::Truncate => {
            if let Some(end) = view.truncate(found.optional_id()).map_err(|error| error.to_string())? {
                view.displace(end);
            }
        }
        Kind::Purge => {
            view.purge(found.id);
            view.settle(view.live().end, view.generation());
        }
        Kind::Mark => view.committed = found.optional_id().or(view.committed),
    }
    Ok(())
}

/// The first segment's base says where the log begins; the others must agree with what came before them.
fn apply_base(view: &mut View, found: &Frame<'_>) -> Result<(), String> {
    let base = Base::decode(found.data).ok_or("its base frame is not understood")?;
    if view.segments.len() == 1 {
        view.begin(found.optional_id(), base.first, base.last);
        view.settle(view.live().end, view.generation());
        return Ok(());
    }
    let state = view.state();
    if (state.purged, state.last) != (found.optional_id(), base.last) {
        return Err(format!("the segments before it end at {:?}, it goes on from {:?}", state.last, base.last));
    }
    Ok(())
}

/// Makes the disk agree, and durable: after a kill, what was read may be in the page cache only.
fn commit(
    dir: &Path,
    options: &Options,
    plan: Plan,
    orphans: Vec<PathBuf>,
    (vote, known): (Option<Vote>, Known),
    lock: File,
) -> Result<Recovered, LogError> {
    let Plan { mut view, mut segments, unborn, cut } = plan;
    for path in orphans.iter().chain(&unborn) {
        std::fs::remove_file(path).map_err(LogError::io("remove", path))?;
    }
    let votes = VoteFiles::open(dir, vote, known)?;
    view.vote = vote;
    match segments.back() {
        Some(last) => {
            let SegmentFile { path, file, .. } = &*last.file;
            if cut {
                file.set_len(last.len).map_err(LogError::io("cut", path))?;
            }
            file.sync_all().map_err(LogError::io("sync", path))?;
            sync_dir(dir).map_err(LogError::io("sync", dir))?;
        }
        None => {
            let base = Base { first: 0, last: None };
            let first = Segment::create(dir, 1, None, base, None);
            let first = first.map_err(LogError::io("create the first segment in", dir))?;
            view.segments.insert(1, first.file.clone());
            segments.push_back(first);
        }
    }
    let last = segments.back_mut().expect("made if there was none");
    last.extend(dir, options.segment_bytes).map_err(LogError::io("extend the last segment in", dir))?;
    Ok(Recovered { view, segments, votes, lock })
}
