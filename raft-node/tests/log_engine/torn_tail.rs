//! A power loss during the last, unsynced write: each of its blocks is kept, lost, or shows older bytes, on its own. The
//! log must open with every synced entry.

use std::os::unix::fs::FileExt;

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{RngAlgorithm, TestRng, TestRunner};

use super::*;

#[derive(Clone, Copy, Debug)]
enum Fate {
    Kept,
    Zeroed,
    Older,
}

const SYNCED_ENTRIES: u64 = 60;
const ALL_ENTRIES: u64 = 120;

/// A store with synced entries and one more batch of about 18 kB; the store, and where that batch begins.
fn store_with_a_last_batch(entry_len: usize) -> (tempfile::TempDir, u64) {
    let dir = tempfile::tempdir().expect("a directory");
    let log = open(dir.path(), &quiet());
    save_vote(&log, 3);
    for first in (0..SYNCED_ENTRIES).step_by(10) {
        append(&log, records(first..first + 10, 3, entry_len));
    }
    let begin = frames_end(&last_segment(dir.path()));
    let known = std::fs::read(dir.path().join("durable")).expect("read");
    append(&log, records(SYNCED_ENTRIES..ALL_ENTRIES, 3, entry_len));
    // As it was before the sync: the log is still open, so it has no mark of its end, and the note is the older one.
    let crashed = copy(dir.path());
    std::fs::write(crashed.path().join("durable"), known).expect("write");
    (crashed, begin)
}

fn tear(segment: &Path, begin: u64, block: u64, fates: &[Fate]) {
    let end = frames_end(segment);
    let file = std::fs::OpenOptions::new().read(true).write(true).open(segment).expect("open");
    let mut at = begin;
    for fate in fates.iter().cycle() {
        let next = ((at / block + 1) * block).min(end);
        let mut bytes = vec![0; (next - at) as usize];
        match fate {
            Fate::Kept => {}
            Fate::Zeroed => file.write_all_at(&bytes, at).expect("write"),
            Fate::Older => {
                file.read_exact_at(&mut bytes, at / 3).expect("read");
                file.write_all_at(&bytes, at).expect("write");
            }
        }
        at = next;
        if at == end {
            return;
        }
    }
}

fn opens_with_all_synced(dir: &Path) -> usize {
    let log = open(dir, &quiet());
    let found = all(&log.reader());
    assert!(found.len() as u64 >= SYNCED_ENTRIES, "synced entries are gone: {} left", found.len());
    assert_eq!(found, records(0..found.len() as u64, 3, found[0].data.len()));
    assert_eq!(log.reader().vote().map(|vote| vote.term), Some(3));
    let next = found.len() as u64;
    append(&log, records(next..next + 50, 4, 40));
    drop(log);
    let log = open(dir, &quiet());
    assert_eq!(all(&log.reader()).len() as u64, next + 50, "what is appended after the cut stays");
    assert!(ends_clean(&last_segment(dir)), "something is left of what was cut");
    next as usize
}

#[test]
fn ninety_torn_tails_open_with_every_synced_entry() {
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]);
    let mut runner = TestRunner::new_with_rng(Default::default(), rng);
    let fate = prop_oneof![3 => Just(Fate::Kept), 2 => Just(Fate::Zeroed), 1 => Just(Fate::Older)];
    let case =
        (prop_oneof![Just(512u64), Just(4096)], proptest::collection::vec(fate, 40), 50..500usize, any::<bool>());
    let mut cut_at = std::collections::BTreeSet::new();
    for round in 0..30 {
        let (block, fates, entry_len, short) = case.new_tree(&mut runner).expect("a case").current();
        let (store, begin) = store_with_a_last_batch(entry_len);
        let segment = last_segment(store.path());
        let whole = frames_end(&segment);
        if round % 3 == 2 {
            cut_room(&segment);
        }

        let torn = copy(store.path());
        tear(&last_segment(torn.path()), begin, block, &fates);
        cut_at.insert(opens_with_all_synced(torn.path()));

        let mut only_lost = fates.clone();
        only_lost.rotate_left(round % fates.len());
        only_lost[0] = Fate::Zeroed;
        let torn = copy(store.path());
        tear(&last_segment(torn.path()), begin, block, &only_lost);
        let left = opens_with_all_synced(torn.path()) as u64;
        assert!(left < ALL_ENTRIES, "the first block of the batch is gone");

        let torn = copy(store.path());
        let len = if short { begin + (round as u64 * 577) % (whole - begin) } else { begin };
        let file = std::fs::OpenOptions::new().write(true).open(last_segment(torn.path())).expect("open");
        let size = file.metadata().expect("its length").len();
        file.set_len(len).expect("shorten");
        if round % 2 == 0 {
            file.set_len(size).expect("fill with zeros");
        }
        cut_at.insert(opens_with_all_synced(torn.path()));
    }
    assert!(cut_at.len() > 10, "the tails were cut at few places, so the test tries little: {cut_at:?}");
}

/// In prepared room each block of the write may have reached the disk or not, in any order; what did not is zeros. The
/// last block kept alone is the hardest: valid frames behind a hole.
#[test]
fn each_block_of_the_last_write_lost_or_kept_alone_opens_with_every_synced_entry() {
    let (store, begin) = store_with_a_last_batch(260);
    let end = frames_end(&last_segment(store.path()));
    assert!(std::fs::metadata(last_segment(store.path())).expect("the segment").len() > end + 100_000, "no room");
    for block in [512, 4096] {
        let blocks = (end.div_ceil(block) - begin / block) as usize;
        for odd in 0..blocks {
            for (one, others) in [(Fate::Zeroed, Fate::Kept), (Fate::Kept, Fate::Zeroed), (Fate::Older, Fate::Zeroed)] {
                let fates: Vec<_> = (0..blocks).map(|at| if at == odd { one } else { others }).collect();
                let torn = copy(store.path());
                tear(&last_segment(torn.path()), begin, block, &fates);
                let left = opens_with_all_synced(torn.path()) as u64;
                assert!(left < ALL_ENTRIES, "block {odd} of {blocks}: an entry that is not whole was taken");
            }
        }
    }
}

#[test]
fn a_segment_whose_creation_was_torn_is_made_again() {
    let options = Options { segment_bytes: 2000, ..quiet() };
    let dir = tempfile::tempdir().expect("a directory");
    let log = open(dir.path(), &options);
    save_vote(&log, 1);
    append(&log, records(0..20, 1, 50));
    drop(log);
    for torn in [vec![], b"ARES".to_vec(), vec![0; 2000]] {
        let paths = segments(dir.path());
        let next = dir.path().join(format!("{:012}.log", paths.len() + 1));
        std::fs::write(&next, torn).expect("write");
        let log = open(dir.path(), &options);
        let found = all(&log.reader());
        assert_eq!(found, records(0..found.len() as u64, 1, 50));
        let next = found.len() as u64;
        append(&log, records(next..next + 40, 1, 50));
    }
    assert_eq!(all(&open(dir.path(), &options).reader()).len(), 140);
}

#[test]
fn a_store_whose_first_start_was_torn_starts_empty() {
    let dir = tempfile::tempdir().expect("a directory");
    drop(open(dir.path(), &quiet()));
    let whole = std::fs::read(last_segment(dir.path())).expect("read");
    let head = frames_end(&last_segment(dir.path())) as usize;
    for (kept, zeros) in [(0, 0), (5, 0), (head / 2, 0), (head - 9, 4096), (head - 9, 0)] {
        std::fs::write(last_segment(dir.path()), [&whole[..kept], &vec![0; zeros]].concat()).expect("write");
        std::fs::remove_file(dir.path().join("durable")).expect("remove");
        let log = open(dir.path(), &quiet());
        assert_eq!(log.reader().state().last, None);
    }
    std::fs::remove_file(last_segment(dir.path())).expect("remove");
    std::fs::remove_file(dir.path().join("durable")).expect("remove");
    std::fs::write(dir.path().join("vote-a"), b"").expect("write");
    std::fs::remove_file(dir.path().join("vote-b")).expect("remove");
    drop(open(dir.path(), &quiet()));
}
