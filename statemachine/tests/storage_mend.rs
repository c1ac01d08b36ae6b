//! Damaged history: it is found when it is read, named, and made whole from snapshots or from another replica's rows,
//! never from rows that are not the bucket's.

mod random_state;

use std::collections::BTreeSet;
use std::path::Path;

use random_state::history_keys;
use statemachine::storage::{self, Copies, Image, LogBounds, snapshot};
use statemachine::{JobId, State};

/// First byte of the keys of history values, and the segments of the store: parts of the format.
const HISTORY: u8 = 17;
const SEGMENT: usize = 16 << 20;

/// A replica's directory whose image is written, and the state.
fn replica(dir: &Path) -> (State, Image) {
    let fresh = storage::open(dir, LogBounds::default()).expect("an empty directory");
    let mut state = random_state::after(5, 60);
    cut(&mut state, &fresh.image);
    assert!(history_keys(&state).len() > 20, "there is history");
    (state, fresh.image)
}

fn cut(state: &mut State, image: &Image) {
    let persisted = image.write(state.cut()).expect("a working disk");
    state.forget_archived(&persisted);
}

/// Every job of history, by its id and in the list.
fn assert_whole(state: &State, image: &Image) {
    let keys = history_keys(state);
    for key in &keys {
        assert_eq!(image.history(state, key.job).expect("readable").expect("there").id, key.job);
    }
    assert_eq!(image.history_list(state, None, usize::MAX).expect("readable").len(), keys.len());
}

/// Closes the image, changes stored history values by `harm`, and opens it again.
fn harm(dir: &Path, image: Image, harm: impl Fn(&sled::Tree, Vec<(sled::IVec, sled::IVec)>)) -> Image {
    drop(image);
    let db = sled::Config::new().path(dir.join("image")).segment_size(SEGMENT).open().expect("closed");
    let tree = db.open_tree("image").expect("the image's");
    let values: Vec<_> = tree.scan_prefix([HISTORY]).map(|value| value.expect("readable")).collect();
    assert!(!values.is_empty(), "history is stored");
    harm(&tree, values);
    db.flush().expect("flushed");
    drop((tree, db));
    let last = statemachine::record::LogPosition { term: 9, leader: 0, index: u64::MAX };
    storage::open(dir, LogBounds { purged: None, last: Some(last) }).expect("live state is whole").image
}

fn flip(tree: &sled::Tree, values: Vec<(sled::IVec, sled::IVec)>) {
    for (key, value) in values {
        let mut bytes = value.to_vec();
        let at = bytes.len() / 2;
        bytes[at] ^= 1;
        tree.insert(key, bytes).expect("written");
    }
}

fn remove(tree: &sled::Tree, values: Vec<(sled::IVec, sled::IVec)>) {
    for (key, _) in values {
        tree.remove(key).expect("removed");
    }
}

/// The rows that another replica would give.
fn rows_of(state: &State, image: &Image, jobs: &BTreeSet<JobId>) -> Copies {
    let row = |job: &JobId| {
        let row = image.history(state, *job).expect("readable").expect("there");
        (*job, storage::canonical_row(&row))
    };
    jobs.iter().map(row).collect()
}

#[test]
fn damaged_rows_are_named_and_come_back_from_a_kept_snapshot() {
    for (harm_it, word) in [(flip as fn(&_, _), "checksum"), (remove, "missing")] {
        let dir = tempfile::tempdir().unwrap();
        let (state, image) = replica(dir.path());
        snapshot::write(&storage::snapshots_dir(dir.path()), state.clone(), &image).expect("a working disk");
        let image = harm(dir.path(), image, harm_it);

        let victim = history_keys(&state)[0];
        let error = image.history(&state, victim.job).expect_err("damaged, not unknown");
        assert_eq!(error.damaged_bucket(), Some(victim.bucket), "{error}");
        let text = error.to_string();
        assert!(text.contains("the history of jobs") && text.contains(word), "{text}");

        for (bucket, _) in state.buckets.iter() {
            let missing = image.missing_history(&state, *bucket).expect("survives damage");
            let copies = storage::copies_in_snapshots(dir.path(), *bucket, &missing).expect("a snapshot");
            assert_eq!(copies.len(), missing.len());
            image.mend_history(&state, *bucket, &copies).expect("all copies are there");
        }
        assert_whole(&state, &image);
        // What was mended lasts.
        let image = harm(dir.path(), image, |_, _| {});
        assert_whole(&state, &image);
    }
}

#[test]
fn rows_of_another_replica_mend_and_wrong_ones_change_nothing() {
    let (dir, other_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (mut state, image) = replica(dir.path());
    let (other_state, other) = replica(other_dir.path());
    let image = harm(dir.path(), image, flip);
    let victim = history_keys(&state)[0];
    let missing = image.missing_history(&state, victim.bucket).expect("survives damage");
    assert!(missing.contains(&victim.job));

    let good = rows_of(&other_state, &other, &missing);
    let mut short = good.clone();
    short.remove(&victim.job);
    let mut wrong = good.clone();
    let before = wrong.values().next().expect("a row").clone();
    wrong.insert(victim.job, before.iter().rev().copied().collect());
    for copies in [Copies::new(), short, wrong] {
        let error = image.mend_history(&state, victim.bucket, &copies).expect_err("not the bucket's rows");
        assert_eq!(error.damaged_bucket(), Some(victim.bucket), "{error}");
        assert!(image.history(&state, victim.job).is_err(), "nothing changed");
    }
    image.mend_history(&state, victim.bucket, &good).expect("the bucket's rows");
    assert!(image.history(&state, victim.job).expect("readable").is_some());

    // Later cuts add to a mended bucket as to any other.
    let mut random = random_state::Random(9);
    (0..10).for_each(|_| random_state::entry(&mut state, &mut random));
    cut(&mut state, &image);
    assert!(image.missing_history(&state, victim.bucket).expect("readable").is_empty());
}
