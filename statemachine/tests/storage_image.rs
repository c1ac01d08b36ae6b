//! The image: what was cut is what is read back, archived jobs stay readable at every moment, damage is found.

mod random_state;

use std::path::Path;

use proptest::prelude::*;
use random_state::{Random, history_keys};
use statemachine::storage::{self, HistoryKey, Image, LogBounds, Source};
use statemachine::{JobId, Revision, State};

/// A log that holds everything.
fn whole_log() -> LogBounds {
    let last = statemachine::record::LogPosition { term: 9, leader: 0, index: u64::MAX };
    LogBounds { purged: None, last: Some(last) }
}

fn reopen(dir: &Path) -> (State, Image) {
    let recovered = storage::open(dir, whole_log()).expect("a good image");
    assert_eq!(recovered.source, Source::Image);
    (recovered.state, recovered.image)
}

fn write(state: &mut State, image: &Image) {
    let persisted = image.write(state.cut()).expect("a working disk");
    state.forget_archived(&persisted);
    assert_eq!(persisted.applied, state.meta.applied);
}

/// Every archived job reads by its id, and the list pages through all of them, newest first.
fn assert_history(state: &State, image: &Image) {
    let expected = history_keys(state);
    for key in &expected {
        let row = image.history(state, key.job).expect("a good image").expect("an archived job");
        assert_eq!((row.id, row.bucket), (key.job, key.bucket));
    }
    for limit in [1, 7, 1_000] {
        let mut found: Vec<HistoryKey> = Vec::new();
        loop {
            let page = image.history_list(state, found.last().copied(), limit).expect("a good image");
            assert!(page.len() <= limit);
            found.extend(page.iter().map(|row| HistoryKey::of(row)));
            if page.is_empty() {
                break;
            }
        }
        assert_eq!(found, expected, "pages of {limit}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 6, ..ProptestConfig::default() })]

    #[test]
    fn a_restart_from_the_image_gives_the_state_of_the_last_cut(seed: u64, entries in 1u64..80) {
        let dir = tempfile::tempdir().unwrap();
        let fresh = storage::open(dir.path(), LogBounds::default()).unwrap();
        prop_assert_eq!(fresh.source, Source::Empty);
        let (mut state, mut image) = (fresh.state, fresh.image);
        let mut random = Random(seed);
        for number in 0..entries {
            random_state::entry(&mut state, &mut random);
            if random.below(6) == 0 || number + 1 == entries {
                let cut = state.cut();
                prop_assert_eq!(state.uncut(), state.archived.len());
                // What comes after the cut is not in it.
                let at_cut = state.clone();
                random_state::entry(&mut state, &mut random);
                let persisted = image.write(cut).unwrap();
                prop_assert_eq!(persisted.digest, at_cut.digest_from_scratch());
                state.forget_archived(&persisted);
                assert_history(&state, &image);

                if random.below(3) == 0 || number + 1 == entries {
                    drop(image);
                    let (mut loaded, reopened) = reopen(dir.path());
                    prop_assert_eq!(loaded.digest(), at_cut.digest_from_scratch());
                    prop_assert_eq!(loaded.digest_from_scratch(), at_cut.digest_from_scratch());
                    prop_assert_eq!(loaded.uncut(), 0);
                    prop_assert_eq!(&loaded.events, &at_cut.events);
                    assert_history(&loaded, &reopened);
                    (state, image) = (loaded, reopened);
                }
            }
        }
    }
}

#[test]
fn a_ring_of_events_is_stored_as_far_as_it_reaches_and_no_further() {
    let dir = tempfile::tempdir().unwrap();
    let fresh = storage::open(dir.path(), LogBounds::default()).unwrap();
    let (mut state, mut image) = (fresh.state, fresh.image);
    let mut random = Random(4);
    // Small cuts, cuts over the whole ring (200 events here), one without an event, and a compaction.
    for entries in [1, 1, 1, 30, 2, 0, 60, 3] {
        (0..entries).for_each(|_| random_state::entry(&mut state, &mut random));
        state.meta.applied.index += 1;
        write(&mut state, &image);
        drop(image);
        let (loaded, reopened) = reopen(dir.path());
        assert_eq!(loaded.events, state.events);
        assert_eq!(loaded.events_floor(), state.events_floor());
        image = reopened;
    }
    let watched = state.meta.rev;
    random_state::entry(&mut state, &mut random);
    let last = state.meta.rev;
    state.meta.compacted_rev = Revision(last.0 - 1);
    write(&mut state, &image);
    drop(image);
    let (loaded, image) = reopen(dir.path());
    assert!(loaded.events_since(watched).is_err(), "compacted");
    assert_eq!(loaded.events_since(state.meta.compacted_rev).expect("kept").map(|event| event.rev).last(), Some(last));
    state.events.clear();
    write(&mut state, &image);
    drop(image);
    assert!(reopen(dir.path()).0.events.is_empty());
}

#[test]
fn bodies_above_the_value_limit_survive_shrink_and_go() {
    let dir = tempfile::tempdir().unwrap();
    let fresh = storage::open(dir.path(), LogBounds::default()).unwrap();
    let (mut state, image) = (fresh.state, fresh.image);
    let body = |bytes: usize| statemachine::spec::Body { cwd: "y".repeat(bytes), ..Default::default() };
    for (index, sizes) in [[300_000, 131_000, 131_200], [10, 5_000_000, 900_000], [200_000, 1, 0]].iter().enumerate() {
        state.meta.applied.index = 1 + index as u64;
        for (job, bytes) in sizes.iter().enumerate() {
            state.bodies.insert(JobId(job as u64), body(*bytes));
        }
        write(&mut state, &image);
    }
    state.bodies.remove(&JobId(0));
    write(&mut state, &image);
    drop(image);
    let (mut loaded, _image) = reopen(dir.path());
    assert_eq!(loaded.digest(), state.digest());
    assert_eq!(loaded.bodies.len(), 2);
    assert!(std::fs::read_dir(dir.path().join("image/blobs")).unwrap().next().is_none(), "sled never syncs blobs");
}

#[test]
fn archived_jobs_are_readable_before_during_and_after_their_cut() {
    let dir = tempfile::tempdir().unwrap();
    let fresh = storage::open(dir.path(), LogBounds::default()).unwrap();
    let (mut state, image) = (random_state::after(5, 30), fresh.image);
    assert_history(&state, &image);
    let cut = state.cut();
    assert_history(&state, &image);
    let persisted = image.write(cut).unwrap();
    assert_history(&state, &image);
    state.forget_archived(&persisted);
    assert!(state.archived.is_empty());
    assert_history(&state, &image);
    assert!(image.history(&state, JobId(1 << 40)).unwrap().is_none());
}

#[test]
fn a_cut_taken_before_the_last_ones_rows_were_forgotten_stores_them_once() {
    let dir = tempfile::tempdir().unwrap();
    let fresh = storage::open(dir.path(), LogBounds::default()).unwrap();
    let (mut state, image) = (random_state::after(5, 30), fresh.image);
    let first = state.cut();
    let second = state.cut();
    image.write(first).unwrap();
    let persisted = image.write(second).unwrap();
    state.forget_archived(&persisted);
    assert_history(&state, &image);
}

#[test]
fn a_dropped_bucket_takes_its_rows_along() {
    let dir = tempfile::tempdir().unwrap();
    let fresh = storage::open(dir.path(), LogBounds::default()).unwrap();
    let (mut state, image) = (random_state::after(11, 60), fresh.image);
    write(&mut state, &image);
    let gone = history_keys(&state).last().copied().expect("some history");
    assert!(image.history(&state, gone.job).unwrap().is_some());
    random_state::drop_bucket(&mut state, gone.bucket);
    assert!(image.history(&state, gone.job).unwrap().is_none(), "at once for readers");
    assert_history(&state, &image);
    write(&mut state, &image);
    assert_history(&state, &image);
    drop(image);
    let (loaded, image) = reopen(dir.path());
    assert!(image.history(&loaded, gone.job).unwrap().is_none());
    assert_history(&loaded, &image);
}

/// Whatever byte of the image is flipped: the state found is that of a whole cut (sled takes damage at the end of its
/// own log for an unfinished write, so it may be an older one, which the replicated log brings up to date), or the
/// image is recognised as damaged and moved aside. sled rewrites what it recovers, so each flip works on a copy.
#[test]
fn a_flipped_bit_never_gives_a_state_that_was_never_cut() {
    let dir = tempfile::tempdir().unwrap();
    let home = dir.path().join("home");
    let fresh = storage::open(&home, LogBounds::default()).unwrap();
    let (mut state, image) = (State::default(), fresh.image);
    let mut random = Random(99);
    let mut cuts = std::collections::BTreeMap::new();
    for _ in 0..12 {
        (0..6).for_each(|_| random_state::entry(&mut state, &mut random));
        write(&mut state, &image);
        cuts.insert(state.meta.applied, state.digest());
    }
    drop(image);
    let db = std::fs::read(home.join("image/db")).unwrap();
    let used = db.iter().rposition(|byte| *byte != 0).unwrap();
    let mut found_out = 0;
    for number in 0..30 {
        let copy = dir.path().join(format!("copy-{number}"));
        copy_dir(&home, &copy);
        let mut bytes = db.clone();
        bytes[random.below(used as u64) as usize] ^= 1 << random.below(8);
        std::fs::write(copy.join("image/db"), bytes).unwrap();
        let recovered = storage::open(&copy, whole_log()).expect("damage is not fatal");
        match recovered.source {
            Source::Image => {
                let mut loaded = recovered.state;
                assert_eq!(cuts.get(&loaded.meta.applied), Some(&loaded.digest()));
                assert_eq!(loaded.digest(), loaded.digest_from_scratch());
                found_out += u32::from(loaded.meta.applied != state.meta.applied);
            }
            Source::Empty => {
                found_out += 1;
                assert!(copy.join("image.damaged").exists());
                assert_eq!(recovered.state.meta.applied.index, 0);
            }
            other => panic!("came from {other}"),
        }
        drop(recovered.image);
        std::fs::remove_dir_all(&copy).unwrap();
    }
    assert!(found_out > 3, "only {found_out} of 30 flips were noticed: the test flips nothing that matters");
}

fn copy_dir(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_dir() {
            copy_dir(&entry.path(), &to.join(entry.file_name()));
        } else {
            std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    }
}
