//! What the log does in its ordinary life: rolling, purging, reading what left RAM, refusing what does not follow.

use super::*;

#[test]
fn a_new_log_is_empty_and_in_use_by_one() {
    let dir = tempfile::tempdir().expect("a directory");
    let log = open(&dir.path().join("made/log"), &quiet());
    assert_eq!(log.reader().state(), Default::default());
    assert_eq!((log.reader().vote(), log.reader().committed()), (None, None));
    assert_eq!(*log.durable_index().borrow(), None);
    let LogError::InUse { .. } = refused(&dir.path().join("made/log"), &quiet()) else { panic!("another error") };
}

#[test]
fn entries_that_do_not_follow_change_nothing() {
    let dir = tempfile::tempdir().expect("a directory");
    let log = open(dir.path(), &quiet());
    append(&log, records(0..5, 1, 10));
    for wrong in [records(6..8, 1, 10), records(4..6, 1, 10), vec![record(5, 1, 1), record(7, 1, 1)]] {
        let error = durably(|done| log.append(wrong, done)).expect_err("a hole");
        assert!(matches!(error, LogError::Hole { .. }), "{error}");
    }
    let huge = record(5, 1, raft_node::log::MAX_DATA + 1);
    let error = durably(|done| log.append(vec![huge], done)).expect_err("too large");
    assert!(error.to_string().contains(&raft_node::log::MAX_DATA.to_string()), "{error}");
    assert_eq!(all(&log.reader()), records(0..5, 1, 10));
}

#[test]
fn purging_removes_whole_segments_and_survives_reopening() {
    let options = Options { segment_bytes: 4000, tail_bytes: 1000, ..quiet() };
    let dir = tempfile::tempdir().expect("a directory");
    let log = open(dir.path(), &options);
    save_vote(&log, 1);
    append(&log, records(0..200, 1, 100));
    let before = segments(dir.path());
    durably(|done| log.purge(id(149, 1), done)).expect("purge");
    drop(log);
    let after = segments(dir.path());
    assert!(after.len() + 4 <= before.len(), "{} of {} segments left", after.len(), before.len());

    let log = open(dir.path(), &options);
    assert_eq!(all(&log.reader()), records(150..200, 1, 100));
    durably(|done| log.purge(id(500, 2), done)).expect("purge beyond the end");
    append(&log, records(501..510, 2, 100));
    drop(log);
    let log = open(dir.path(), &options);
    assert_eq!(log.reader().state().purged, Some(id(500, 2)));
    assert_eq!(all(&log.reader()), records(501..510, 2, 100));
    assert_eq!(segments(dir.path()).len(), 1);
}

#[test]
fn a_purged_segment_that_came_back_is_removed() {
    let options = Options { segment_bytes: 4000, ..quiet() };
    let dir = tempfile::tempdir().expect("a directory");
    let log = open(dir.path(), &options);
    save_vote(&log, 1);
    append(&log, records(0..200, 1, 100));
    let oldest = segments(dir.path())[0].clone();
    let bytes = std::fs::read(&oldest).expect("read");
    durably(|done| log.purge(id(149, 1), done)).expect("purge");
    drop(log);
    std::fs::write(&oldest, bytes).expect("write");
    let log = open(dir.path(), &options);
    assert_eq!(all(&log.reader()), records(150..200, 1, 100));
    assert!(!oldest.exists());
}

fn size(path: &Path) -> u64 {
    std::fs::metadata(path).expect("the file").len()
}

#[test]
fn segments_have_their_size_from_the_start_and_nothing_behind_their_frames_at_the_end() {
    let options = Options { segment_bytes: 100_000, ..quiet() };
    let dir = tempfile::tempdir().expect("a directory");
    let log = open(dir.path(), &options);
    save_vote(&log, 1);
    let (first, spare) = (last_segment(dir.path()), dir.path().join("spare"));
    assert_eq!(size(&first), 100_000);
    append(&log, records(0..1, 1, 1000));
    assert_eq!(size(&first), 100_000);
    assert!(!spare.exists(), "a log that hardly grows needs no spare");

    std::thread::sleep(Duration::from_millis(50));
    append(&log, records(1..41, 1, 1000));
    let made = (0..1000).any(|_| {
        std::thread::sleep(Duration::from_millis(5));
        spare.exists() && size(&spare) == 100_000
    });
    assert!(made, "no spare was made ahead");
    std::thread::sleep(Duration::from_millis(100));
    append(&log, records(41..120, 1, 1000));
    let paths = segments(dir.path());
    assert_eq!(paths.len(), 2);
    assert_eq!(size(&paths[0]), frames_end(&paths[0]));
    assert!(size(&paths[1]) == 100_000 && ends_clean(&paths[1]));
    drop(log);

    // With smaller segments the present one is full at once, its room is given back.
    let options = Options { segment_bytes: 10_000, ..options };
    let log = open(dir.path(), &options);
    append(&log, records(120..121, 1, 1000));
    drop(log);
    assert_eq!(size(&paths[1]), frames_end(&paths[1]));
    assert_eq!(all(&open(dir.path(), &options).reader()), records(0..121, 1, 1000));
}

#[test]
fn a_segment_without_room_gets_it_at_the_next_start() {
    let dir = tempfile::tempdir().expect("a directory");
    let log = open(dir.path(), &quiet());
    save_vote(&log, 1);
    append(&log, records(0..10, 1, 100));
    drop(log);
    let segment = last_segment(dir.path());
    cut_room(&segment);
    let log = open(dir.path(), &quiet());
    assert_eq!(size(&segment), quiet().segment_bytes);
    append(&log, records(10..20, 1, 100));
    drop(log);
    assert!(size(&segment) == quiet().segment_bytes && ends_clean(&segment));
    assert_eq!(all(&open(dir.path(), &quiet()).reader()), records(0..20, 1, 100));
}

#[test]
fn a_spare_whose_use_was_begun_is_no_segment() {
    let options = Options { segment_bytes: 4000, ..quiet() };
    let dir = tempfile::tempdir().expect("a directory");
    drop(open(dir.path(), &options));
    let head = std::fs::read(last_segment(dir.path())).expect("read");
    std::fs::write(dir.path().join("spare"), head).expect("write");
    let log = open(dir.path(), &options);
    save_vote(&log, 1);
    for batch in 0..40 {
        append(&log, records(batch * 5..batch * 5 + 5, 1, 100));
    }
    drop(log);
    assert_eq!(all(&open(dir.path(), &options).reader()), records(0..200, 1, 100));
}

#[test]
fn a_read_that_began_before_a_purge_ends_well() {
    let options = Options { segment_bytes: 4000, tail_bytes: 0, ..quiet() };
    let dir = tempfile::tempdir().expect("a directory");
    let log = open(dir.path(), &options);
    append(&log, records(0..100, 1, 100));
    let pending = log.reader().begin_read(0..100, usize::MAX).expect("begin");
    assert!(pending.blocks(), "nothing is kept in RAM");
    durably(|done| log.purge(id(99, 1), done)).expect("purge");
    durably(|done| log.purge(id(100, 1), done)).expect("purge, after the segments are gone");
    assert_eq!(pending.finish().expect("read"), records(0..100, 1, 100));
    assert_eq!(all(&log.reader()), vec![]);
}

#[test]
fn memory_holds_the_bound_and_reads_go_on() {
    let options = Options { tail_bytes: 10_000, ..quiet() };
    let dir = tempfile::tempdir().expect("a directory");
    let log = open(dir.path(), &options);
    for batch in 0..50 {
        append(&log, records(batch * 10..batch * 10 + 10, 1, 400));
    }
    assert!(log.reader().begin_read(0..1, usize::MAX).expect("begin").blocks());
    assert!(!log.reader().begin_read(490..500, usize::MAX).expect("begin").blocks());
    assert_eq!(all(&log.reader()), records(0..500, 1, 400));
}

#[test]
fn durable_follows_truncation_at_once_and_new_entries_only_when_synced() {
    let dir = tempfile::tempdir().expect("a directory");
    let log = open(dir.path(), &quiet());
    append(&log, records(0..100, 1, 10));
    let durable = log.durable_index();
    assert_eq!(*durable.borrow(), Some(99));
    log.truncate_after(Some(id(59, 1)), Box::new(|_| {})).expect("truncate");
    assert!(*durable.borrow() <= Some(59));
    append(&log, records(60..70, 2, 10));
    assert_eq!(*durable.borrow(), Some(69));
    let new = all(&log.reader());
    assert_eq!(new[59..], [records(59..60, 1, 10), records(60..70, 2, 10)].concat());
}

#[test]
fn committed_is_found_again_after_a_pause() {
    let dir = tempfile::tempdir().expect("a directory");
    let options = Options { mark_after: Duration::from_millis(2), ..quiet() };
    let log = open(dir.path(), &options);
    append(&log, records(0..10, 1, 10));
    log.save_committed(Some(id(7, 1))).expect("save");
    let found = (0..2000).any(|_| {
        std::thread::sleep(Duration::from_millis(5));
        open(copy(dir.path()).path(), &quiet()).reader().committed() == Some(id(7, 1))
    });
    assert!(found);
}
