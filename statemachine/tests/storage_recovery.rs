//! The way back from disk: image, newest snapshot, older snapshot, the log alone, the leader; and when to stop instead.

mod random_state;

use std::fs;
use std::path::Path;

use random_state::Random;
use statemachine::State;
use statemachine::record::LogPosition;
use statemachine::storage::{self, Cause, Image, LogBounds, Snapshot, Source, snapshot};

fn position(index: u64) -> Option<LogPosition> {
    Some(LogPosition { term: 3, leader: 0x9_0000_0001, index })
}

/// A log that holds entries above `purged` up to `last`.
fn log(purged: u64, last: u64) -> LogBounds {
    LogBounds { purged: position(purged).filter(|_| purged > 0), last: position(last) }
}

fn cut(state: &mut State, image: &Image) {
    let persisted = image.write(state.cut()).expect("a working disk");
    state.forget_archived(&persisted);
}

/// Snapshots at entries 20 and 30, the image at 40.
fn replica(dir: &Path) -> (State, [Snapshot; 2]) {
    let fresh = storage::open(dir, LogBounds::default()).expect("an empty directory");
    assert_eq!(fresh.source, Source::Empty);
    let (mut state, image) = (State::default(), fresh.image);
    let mut random = Random(6);
    let mut to = |index: u64, state: &mut State| {
        while state.meta.applied.index < index {
            random_state::entry(state, &mut random);
        }
        cut(state, &image);
    };
    to(20, &mut state);
    let older = snapshot::write(&storage::snapshots_dir(dir), state.clone(), &image).unwrap();
    to(30, &mut state);
    let newer = snapshot::write(&storage::snapshots_dir(dir), state.clone(), &image).unwrap();
    to(40, &mut state);
    (state, [older, newer])
}

fn recover(dir: &Path, log: LogBounds) -> (State, Source) {
    let recovered = storage::open(dir, log).expect("recoverable");
    (recovered.state, recovered.source)
}

/// The state of the seed in `replica` after so many entries.
fn digest_at(index: u64) -> u128 {
    random_state::after(6, index).digest()
}

#[test]
fn image_alone_and_snapshot_alone_give_the_same_digest() {
    let dir = tempfile::tempdir().unwrap();
    let (mut state, _) = replica(dir.path());
    let snapshots = storage::snapshots_dir(dir.path());
    {
        let recovered = storage::open(dir.path(), log(40, 40)).unwrap();
        assert_eq!(recovered.source, Source::Image);
        snapshot::write(&snapshots, recovered.state, &recovered.image).unwrap();
    }
    fs::rename(&snapshots, dir.path().join("away")).unwrap();
    let (mut from_image, source) = recover(dir.path(), log(40, 40));
    assert_eq!(source, Source::Image);
    fs::rename(dir.path().join("away"), &snapshots).unwrap();
    fs::remove_dir_all(dir.path().join("image")).unwrap();
    let (mut from_snapshot, source) = recover(dir.path(), log(40, 40));
    assert!(matches!(source, Source::Snapshot(id) if id.0.index == 40));
    assert_eq!(from_image.digest(), state.digest());
    assert_eq!(from_snapshot.digest(), state.digest());
    assert_eq!(state.digest(), digest_at(40));
}

#[test]
fn a_damaged_image_gives_way_to_the_newest_snapshot_that_verifies() {
    let dir = tempfile::tempdir().unwrap();
    let (_, [older, newer]) = replica(dir.path());
    let wreck = || fs::write(dir.path().join("image/db"), vec![0xa5; 1 << 20]).unwrap();

    wreck();
    let (mut state, source) = recover(dir.path(), log(20, 45));
    assert_eq!((source, state.digest()), (Source::Snapshot(newer.id), digest_at(30)));
    assert!(dir.path().join("image.damaged/db").exists(), "kept for inspection");
    // The new image stands: the next start uses it.
    let (mut state, source) = recover(dir.path(), log(20, 45));
    assert_eq!((source, state.digest()), (Source::Image, digest_at(30)));

    wreck();
    fs::write(newer.path("live").unwrap(), b"torn").unwrap();
    let (mut state, source) = recover(dir.path(), log(20, 45));
    assert_eq!((source, state.digest()), (Source::Snapshot(older.id), digest_at(20)));
}

/// Its store leaves a note in its directory when it finds its pages damaged in the course of the day.
#[test]
fn an_image_that_was_given_up_gives_way_to_a_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let (_, [_, newer]) = replica(dir.path());
    fs::write(dir.path().join("image/given-up"), "read: a page is not what was written").unwrap();
    let (mut state, source) = recover(dir.path(), log(20, 45));
    assert_eq!((source, state.digest()), (Source::Snapshot(newer.id), digest_at(30)));
    assert!(dir.path().join("image.damaged/given-up").exists(), "with the reason");
    let (_, source) = recover(dir.path(), log(20, 45));
    assert_eq!(source, Source::Image, "of the new one nothing is known");
}

#[test]
fn what_is_behind_the_purged_log_is_never_used() {
    let dir = tempfile::tempdir().unwrap();
    let (_, [_, newer]) = replica(dir.path());
    let (_, source) = recover(dir.path(), log(40, 60));
    assert_eq!(source, Source::Image, "the image joins the log without a gap");
    fs::remove_dir_all(dir.path().join("image")).unwrap();
    let (state, source) = recover(dir.path(), log(30, 60));
    assert_eq!((source, state.meta.applied.index), (Source::Snapshot(newer.id), 30));

    // Now the image is at 30, the log begins at 32.
    for _ in 0..2 {
        let (state, source) = recover(dir.path(), log(31, 60));
        assert_eq!(source, Source::NeedsLeaderSnapshot, "and again after a restart");
        assert_eq!(state.meta.applied.index, 0);
    }
}

#[test]
fn without_image_and_snapshot_a_whole_log_is_enough() {
    let dir = tempfile::tempdir().unwrap();
    replica(dir.path());
    fs::remove_dir_all(dir.path().join("image")).unwrap();
    fs::remove_dir_all(storage::snapshots_dir(dir.path())).unwrap();
    let (state, source) = recover(dir.path(), log(0, 45));
    assert_eq!((source, state.meta.applied.index), (Source::Empty, 0));
}

#[test]
fn an_image_ahead_of_the_log_stops_the_replica_and_stays_where_it_is() {
    let dir = tempfile::tempdir().unwrap();
    replica(dir.path());
    for bounds in [log(0, 39), log(20, 20), LogBounds::default()] {
        let error = storage::open(dir.path(), bounds).err().expect("the log lost entries");
        assert!(matches!(error.cause, Cause::AheadOfLog { image: 40, .. }), "{error}");
        assert!(error.to_string().contains("join again with a new id"), "{error}");
    }
    assert_eq!(recover(dir.path(), log(0, 40)).1, Source::Image);
}

#[test]
fn a_snapshot_installed_ahead_of_the_log_is_no_lost_entry() {
    let (home, away) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (_, [_, newer]) = replica(home.path());
    let mut incoming = storage::Incoming::new(&storage::snapshots_dir(away.path())).unwrap();
    for (name, _) in newer.files() {
        incoming.write(&name, 0, &fs::read(newer.path(&name).unwrap()).unwrap()).unwrap();
    }
    let received = incoming.finish().unwrap();
    // A crash here: the image is not written yet, the log still short.
    let (_, source) = recover(away.path(), log(0, 5));
    assert_eq!(source, Source::Snapshot(received.id));
    let (mut state, source) = recover(away.path(), log(0, 5));
    assert_eq!((source, state.digest()), (Source::Image, digest_at(30)));
}

#[test]
fn an_installed_snapshot_replaces_the_image() {
    let dir = tempfile::tempdir().unwrap();
    let (_, [older, _]) = replica(dir.path());
    let (mut state, image) = storage::install(dir.path(), &older).unwrap();
    assert_eq!(state.digest(), digest_at(20));
    let mut random = Random(1);
    random_state::entry(&mut state, &mut random);
    cut(&mut state, &image);
    drop(image);
    let (mut again, source) = recover(dir.path(), log(20, 21));
    assert_eq!((source, again.digest()), (Source::Image, state.digest()));
}

#[test]
fn a_newer_level_stops_the_replica_and_touches_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let recovered = storage::open(dir.path(), LogBounds::default()).unwrap();
    let mut state = random_state::after(1, 5);
    state.meta.level = statemachine::LEVEL + 1;
    cut(&mut state, &recovered.image);
    snapshot::write(&storage::snapshots_dir(dir.path()), state.clone(), &recovered.image).unwrap();
    drop(recovered.image);
    for remove in ["", "image"] {
        if !remove.is_empty() {
            fs::remove_dir_all(dir.path().join(remove)).unwrap();
        }
        let error = storage::open(dir.path(), log(0, 9)).err().expect("a newer binary wrote it");
        assert!(matches!(error.cause, Cause::NewerLevel { .. }), "{error}");
        assert!(!dir.path().join("image.damaged").exists());
    }
}

#[test]
fn an_unfinished_sled_snapshot_is_removed_before_the_image_is_opened() {
    let dir = tempfile::tempdir().unwrap();
    replica(dir.path());
    let unfinished = dir.path().join("image/snap.0000000000000001.generating");
    fs::write(&unfinished, b"").unwrap();
    assert_eq!(recover(dir.path(), log(0, 40)).1, Source::Image);
    assert!(!unfinished.exists());
}
