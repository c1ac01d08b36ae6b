//! The log's engine on a real disk: against a model, under damage, through its life, on a full disk. No openraft here.

#[path = "log_engine/damage.rs"]
mod damage;
#[path = "log_engine/full_disk.rs"]
mod full_disk;
#[path = "log_engine/lifecycle.rs"]
mod lifecycle;
#[path = "log_engine/model.rs"]
mod model;
#[path = "log_engine/torn_tail.rs"]
mod torn_tail;

use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use raft_node::log::{Done, EntryId, Log, LogError, LogReader, Options, Record, Vote};

/// Longer than any test: no mark is written but at the end.
const NEVER: Duration = Duration::from_secs(3600);

/// Nothing in the background: no reserve, no marks. Segments that are quick to copy.
fn quiet() -> Options {
    Options { segment_bytes: 1 << 20, reserve_bytes: 4096, mark_after: NEVER, ..Options::default() }
}

fn id(index: u64, term: u64) -> EntryId {
    EntryId { index, term, node: term % 3 + 1 }
}

/// An entry whose data tells where it belongs.
fn record(index: u64, term: u64, len: usize) -> Record {
    let byte = |at: usize| (index.wrapping_mul(31) ^ term.wrapping_mul(17) ^ at as u64) as u8;
    Record { id: id(index, term), tag: (index % 7) as u8, data: (0..len).map(byte).collect::<Vec<u8>>().into() }
}

fn records(indices: std::ops::Range<u64>, term: u64, len: usize) -> Vec<Record> {
    indices.map(|index| record(index, term, len)).collect()
}

/// Calls and waits until it is durable.
fn durably(call: impl FnOnce(Done) -> Result<(), LogError>) -> Result<(), LogError> {
    let (tell, told) = mpsc::channel();
    call(Box::new(move |result| tell.send(result).expect("the test waits")))?;
    told.recv_timeout(Duration::from_secs(60)).expect("the log answers")
}

fn append(log: &Log, records: Vec<Record>) {
    durably(|done| log.append(records, done)).expect("append");
}

fn save_vote(log: &Log, term: u64) {
    durably(|done| log.save_vote(Vote { term, node: 1, committed: true }, done)).expect("save the vote");
}

fn all(reader: &LogReader) -> Vec<Record> {
    reader.read(0..u64::MAX, usize::MAX).expect("read")
}

fn open(dir: &Path, options: &Options) -> Log {
    Log::open(dir, options.clone()).unwrap_or_else(|error| panic!("{error}"))
}

fn refused(dir: &Path, options: &Options) -> LogError {
    match Log::open(dir, options.clone()) {
        Ok(_) => panic!("{} opened, it must be refused", dir.display()),
        Err(error) => error,
    }
}

/// The segments of `dir`, oldest first.
fn segments(dir: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<_> = std::fs::read_dir(dir)
        .expect("list")
        .map(|item| item.expect("list").path())
        .filter(|path| path.extension().is_some_and(|ext| ext == "log"))
        .collect();
    paths.sort();
    paths
}

fn last_segment(dir: &Path) -> PathBuf {
    segments(dir).pop().expect("a segment")
}

/// Where the frames of a segment end: what comes then is room for more.
fn frames_end(segment: &Path) -> u64 {
    let bytes = std::fs::read(segment).expect("read");
    let word = |at: usize| bytes.get(at..at + 4).map(|word| u32::from_le_bytes(word.try_into().expect("four bytes")));
    let mut end = 16;
    while word(end) == Some(0x5EC0_A7E5) {
        end += 12 + word(end + 4).expect("a length") as usize;
    }
    end as u64
}

/// Whether there is nothing but zeros behind the frames of a segment.
fn ends_clean(segment: &Path) -> bool {
    std::fs::read(segment).expect("read")[frames_end(segment) as usize..].iter().all(|byte| *byte == 0)
}

/// Leaves the segment without room behind its frames, as one that was made when space was short.
fn cut_room(segment: &Path) {
    let file = std::fs::OpenOptions::new().write(true).open(segment).expect("open");
    file.set_len(frames_end(segment)).expect("cut");
}

/// A copy of the store as a crash at this moment would leave it, all writes kept.
fn copy(from: &Path) -> tempfile::TempDir {
    let to = tempfile::tempdir().expect("a directory");
    for item in std::fs::read_dir(from).expect("list") {
        let path = item.expect("list").path();
        std::fs::copy(&path, to.path().join(path.file_name().expect("a name"))).expect("copy");
    }
    to
}
