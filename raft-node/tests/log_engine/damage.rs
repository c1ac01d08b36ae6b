//! Damage to what was synced: refused, with file and offset, never repaired in silence.

use std::os::unix::fs::FileExt;

use super::*;

fn flip(path: &Path, bit: u64) {
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).expect("open");
    let mut byte = [0];
    file.read_exact_at(&mut byte, bit / 8).expect("read");
    byte[0] ^= 1 << (bit % 8);
    file.write_all_at(&byte, bit / 8).expect("write");
}

/// Asserts that the error names this file and an offset at or shortly before `at`.
fn assert_names(error: &LogError, file: &Path, at: u64, frame: u64) {
    let LogError::Damaged { path, offset, .. } = error else { panic!("another error: {error}") };
    assert_eq!(path.file_name(), file.file_name());
    assert!(*offset <= at && at < offset + frame, "damage at {at}, the error says {offset}");
    let text = error.to_string();
    assert!(text.contains(&path.display().to_string()) && text.contains(&offset.to_string()));
}

/// Many synced batches in one segment, as a crash leaves them: without the mark of an orderly end.
fn synced_store(batches: u64) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a directory");
    let log = open(dir.path(), &quiet());
    save_vote(&log, 1);
    for batch in 0..batches {
        append(&log, records(batch * 20..batch * 20 + 20, 1, 300));
    }
    copy(dir.path())
}

#[test]
fn one_flipped_bit_far_from_the_end_is_refused_with_file_and_offset() {
    let dir = synced_store(60);
    let segment = last_segment(dir.path());
    let len = frames_end(&segment);
    let limit = (len - 45_000) * 8;
    assert!(len > 300_000 && std::fs::metadata(&segment).expect("the segment").len() > len + 300_000);
    std::fs::remove_file(dir.path().join("durable")).expect("remove");
    for round in 0..84 {
        if round == 42 {
            cut_room(&segment);
        }
        // Odd steps reach all parts of a frame; the first ones reach the header and the base frame.
        let bit = if round < 20 { round * 53 } else { (round * 7_919 * 307) % limit };
        flip(&segment, bit);
        let error = refused(dir.path(), &quiet());
        assert_names(&error, &segment, bit / 8, 400);
        flip(&segment, bit);
    }
    assert_eq!(all(&open(dir.path(), &quiet()).reader()).len(), 1200);
}

#[test]
fn damage_in_the_newest_batch_is_seen_once_the_log_was_quiet() {
    let dir = tempfile::tempdir().expect("a directory");
    let options = Options { mark_after: Duration::from_millis(5), ..quiet() };
    let log = open(dir.path(), &options);
    save_vote(&log, 1);
    append(&log, records(0..10, 1, 300));
    let end = frames_end(&last_segment(dir.path()));
    let marked = (0..2000).any(|_| {
        std::thread::sleep(Duration::from_millis(5));
        frames_end(&last_segment(dir.path())) > end
    });
    assert!(marked, "no mark after a pause");
    let crashed = copy(dir.path());
    std::fs::remove_file(crashed.path().join("durable")).expect("remove");
    flip(&last_segment(crashed.path()), (end - 100) * 8);
    assert_names(&refused(crashed.path(), &quiet()), &last_segment(crashed.path()), end - 100, 400);
}

#[test]
fn an_orderly_end_closes_the_same_window() {
    let dir = tempfile::tempdir().expect("a directory");
    let log = open(dir.path(), &quiet());
    save_vote(&log, 1);
    append(&log, records(0..10, 1, 300));
    let end = frames_end(&last_segment(dir.path()));
    drop(log);
    std::fs::remove_file(dir.path().join("durable")).expect("remove");
    flip(&last_segment(dir.path()), (end - 100) * 8);
    assert_names(&refused(dir.path(), &quiet()), &last_segment(dir.path()), end - 100, 400);
}

#[test]
fn a_last_segment_cut_short_or_damaged_at_its_end_or_lost_is_refused() {
    let dir = synced_store(3);
    let segment = last_segment(dir.path());
    let whole = std::fs::read(&segment).expect("read");
    let len = frames_end(&segment);
    // Not where the bytes cut off were zeros anyway.
    for cut in [0, 1, 16, 30, 400, len / 2, len - 400, len - 9] {
        for zeros in [0, 1, 4096, whole.len() - cut as usize] {
            std::fs::write(&segment, [&whole[..cut as usize], &vec![0; zeros]].concat()).expect("write");
            assert_names(&refused(dir.path(), &quiet()), &segment, cut, 400);
        }
    }
    std::fs::write(&segment, &whole).expect("write");
    flip(&segment, (len - 3) * 8);
    assert_names(&refused(dir.path(), &quiet()), &segment, len - 3, 400);

    let dir = store_of_many_segments();
    let lost = last_segment(dir.path());
    std::fs::remove_file(&lost).expect("remove");
    assert_names(&refused(dir.path(), &quiet()), &lost, 0, 1);
}

#[test]
fn a_log_that_lost_all_but_its_head_is_refused_by_what_the_vote_says() {
    let dir = tempfile::tempdir().expect("a directory");
    let log = open(dir.path(), &quiet());
    append(&log, records(0..10, 1, 300));
    save_vote(&log, 2);
    let voted = frames_end(&last_segment(dir.path()));
    append(&log, records(10..20, 2, 300));
    let crashed = copy(dir.path());
    // Nothing but the vote was ever synced, as on a disk that lies; the note of what was durable is gone with the rest.
    std::fs::remove_file(crashed.path().join("durable")).expect("remove");
    let segment = last_segment(crashed.path());
    let whole = std::fs::read(&segment).expect("read");
    for kept in [voted - 1, 400, 150] {
        let mut bytes = whole[..kept as usize].to_vec();
        bytes.resize(whole.len(), 0);
        std::fs::write(&segment, &bytes).expect("write");
        let error = refused(crashed.path(), &quiet());
        assert_names(&error, &segment, kept, 400);
        assert!(error.to_string().contains(&format!("durable up to {voted}")), "{error}");
        assert!(std::fs::read(&segment).expect("read") == bytes, "a refusal changes nothing");
    }
    // What came after the vote may be a write that never finished.
    std::fs::write(&segment, &whole[..voted as usize]).expect("write");
    assert_eq!(all(&open(crashed.path(), &quiet()).reader()).len(), 10);
}

#[test]
fn a_bad_note_of_what_was_durable_is_no_reason_to_stop() {
    for bad in [&b""[..], b"ARESSYNC", &[0; 28]] {
        let dir = synced_store(3);
        std::fs::write(dir.path().join("durable"), bad).expect("write");
        assert_eq!(all(&open(dir.path(), &quiet()).reader()).len(), 60);
    }
}

#[test]
fn damage_behind_the_frames_is_cut_off_and_the_room_is_zeros_again() {
    let dir = synced_store(3);
    let segment = last_segment(dir.path());
    let size = std::fs::metadata(&segment).expect("the segment").len();
    for behind in [0, 1, 50_000, 1_000_000] {
        flip(&segment, (frames_end(&segment) + behind) * 8 + 3);
        assert_eq!(all(&open(dir.path(), &quiet()).reader()).len(), 60);
        assert!(ends_clean(&segment));
        assert_eq!(std::fs::metadata(&segment).expect("the segment").len(), size);
    }
}

fn store_of_many_segments() -> tempfile::TempDir {
    store_of_many_segments_in_term(1)
}

fn store_of_many_segments_in_term(term: u64) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a directory");
    let log = open(dir.path(), &Options { segment_bytes: 4000, ..quiet() });
    save_vote(&log, term);
    append(&log, records(0..100, term, 200));
    drop(log);
    assert!(segments(dir.path()).len() > 4);
    dir
}

#[test]
fn a_closed_segment_with_any_damage_is_refused() {
    let dir = store_of_many_segments();
    let segment = segments(dir.path())[1].clone();
    let whole = std::fs::read(&segment).expect("read");
    for bit in (0..whole.len() as u64 * 8).step_by(1571) {
        flip(&segment, bit);
        assert_names(&refused(dir.path(), &quiet()), &segment, bit / 8, 300);
        flip(&segment, bit);
    }
    for len in [0, 7, 16, 100, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&segment, &whole[..len]).expect("write");
        let LogError::Damaged { .. } = refused(dir.path(), &quiet()) else { panic!("cut to {len}") };
    }
    std::fs::write(&segment, [&whole[..], &[0; 10]].concat()).expect("write");
    assert_names(&refused(dir.path(), &quiet()), &segment, whole.len() as u64, 1);
}

#[test]
fn a_missing_segment_is_a_hole_and_refused() {
    for missing in [0, 1, 3] {
        let dir = store_of_many_segments();
        let paths = segments(dir.path());
        std::fs::remove_file(&paths[missing]).expect("remove");
        let before = segments(dir.path());
        let error = refused(dir.path(), &quiet()).to_string();
        assert!(error.contains("is in no segment"), "{error}");
        assert_eq!(segments(dir.path()), before, "a refusal changes nothing");
    }
}

#[test]
fn a_segment_of_another_history_is_refused() {
    let (dir, other) = (store_of_many_segments(), store_of_many_segments_in_term(2));
    let (own, foreign) = (segments(dir.path())[2].clone(), segments(other.path())[2].clone());
    std::fs::copy(foreign, &own).expect("copy");
    let error = refused(dir.path(), &quiet());
    assert_names(&error, &own, 16, 1);
    assert!(error.to_string().contains("the segments before it end at"), "{error}");
}

#[test]
fn damage_that_comes_later_is_seen_when_the_entry_is_read() {
    let dir = tempfile::tempdir().expect("a directory");
    let log = open(dir.path(), &Options { tail_bytes: 0, ..quiet() });
    append(&log, records(0..100, 1, 300));
    let segment = last_segment(dir.path());
    let at = frames_end(&segment) / 2;
    flip(&segment, at * 8);
    let error = log.reader().read(0..100, usize::MAX).expect_err("damage");
    assert_names(&error, &segment, at, 400);
    assert_eq!(log.reader().read(0..10, usize::MAX).expect("read"), records(0..10, 1, 300));
}

#[test]
fn all_segments_missing_is_not_an_empty_log() {
    let dir = store_of_many_segments();
    for path in segments(dir.path()) {
        std::fs::remove_file(path).expect("remove");
    }
    let error = refused(dir.path(), &quiet()).to_string();
    assert!(error.contains("there is a vote but no log"), "{error}");
}

#[test]
fn a_segment_of_a_newer_format_is_refused_as_such() {
    let dir = synced_store(2);
    let segment = last_segment(dir.path());
    let mut bytes = std::fs::read(&segment).expect("read");
    bytes[8..12].copy_from_slice(&20990101u32.to_le_bytes());
    let crc = crc32fast::hash(&bytes[..12]);
    bytes[12..16].copy_from_slice(&crc.to_le_bytes());
    std::fs::write(&segment, bytes).expect("write");
    let LogError::Format { found: 20990101, .. } = refused(dir.path(), &quiet()) else { panic!("another error") };
}

#[test]
fn one_bad_copy_of_the_vote_is_replaced_by_the_good_one() {
    for name in ["vote-a", "vote-b"] {
        for bad in [Some(&b""[..]), Some(b"ARESVOTE but not for long enough"), None] {
            let dir = synced_store(1);
            let path = dir.path().join(name);
            match bad {
                Some(bytes) => std::fs::write(&path, bytes).expect("write"),
                None => std::fs::remove_file(&path).expect("remove"),
            }
            let log = open(dir.path(), &quiet());
            assert_eq!(log.reader().vote(), Some(Vote { term: 1, node: 1, committed: true }));
            drop(log);
            let other = if name == "vote-a" { "vote-b" } else { "vote-a" };
            std::fs::remove_file(dir.path().join(other)).expect("remove");
            assert!(open(dir.path(), &quiet()).reader().vote().is_some(), "the bad copy was not written anew");
        }
    }
}

#[test]
fn the_higher_of_two_good_votes_counts() {
    let dir = synced_store(1);
    let old = std::fs::read(dir.path().join("vote-b")).expect("read");
    let log = open(dir.path(), &quiet());
    save_vote(&log, 9);
    drop(log);
    std::fs::write(dir.path().join("vote-b"), &old).expect("write");
    assert_eq!(open(dir.path(), &quiet()).reader().vote().map(|vote| vote.term), Some(9));
}

#[test]
fn every_flipped_bit_of_a_vote_is_seen() {
    let dir = synced_store(1);
    let len = std::fs::metadata(dir.path().join("vote-a")).expect("the vote").len();
    std::fs::remove_file(dir.path().join("vote-b")).expect("remove");
    for bit in 0..len * 8 {
        flip(&dir.path().join("vote-a"), bit);
        let LogError::VoteLost { .. } = refused(dir.path(), &quiet()) else { panic!("bit {bit}") };
        flip(&dir.path().join("vote-a"), bit);
    }
}

#[test]
fn a_log_without_its_vote_is_refused() {
    let dir = synced_store(1);
    std::fs::write(dir.path().join("vote-a"), b"bad").expect("write");
    std::fs::write(dir.path().join("vote-b"), b"bad").expect("write");
    let error = refused(dir.path(), &quiet()).to_string();
    assert!(error.contains("both copies of the vote") && error.contains("as a new member"), "{error}");

    std::fs::remove_file(dir.path().join("vote-a")).expect("remove");
    std::fs::remove_file(dir.path().join("vote-b")).expect("remove");
    let error = refused(dir.path(), &quiet()).to_string();
    assert!(error.contains("there is a log but no readable vote"), "{error}");
}
