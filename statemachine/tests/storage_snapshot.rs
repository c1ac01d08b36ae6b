//! Snapshots: whole or not there, shared history, received in pieces, never trusted without their checksums.

mod random_state;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use random_state::{Random, history_keys};
use statemachine::State;
use statemachine::storage::snapshot::{self, MANIFEST};
use statemachine::storage::{self, Image, Incoming, LogBounds, Snapshot, Source};

/// A replica's directory with an image that was cut at the state returned.
fn replica(dir: &Path, seed: u64, entries: u64) -> (State, Image) {
    let fresh = storage::open(dir, LogBounds::default()).expect("an empty directory");
    let mut state = random_state::after(seed, entries);
    cut(&mut state, &fresh.image);
    (state, fresh.image)
}

fn cut(state: &mut State, image: &Image) {
    let persisted = image.write(state.cut()).expect("a working disk");
    state.forget_archived(&persisted);
}

fn snap(dir: &Path, state: &State, image: &Image) -> Snapshot {
    snapshot::write(&storage::snapshots_dir(dir), state.clone(), image).expect("a working disk")
}

/// What a snapshot alone gives: state, events and every history row.
fn assert_alone_gives(snapshot: &Snapshot, state: &State) {
    snapshot.verify().expect("a good snapshot");
    let dir = tempfile::tempdir().unwrap();
    let (mut loaded, image) = storage::install(dir.path(), snapshot).expect("a good snapshot");
    assert_eq!(loaded.digest(), state.digest_from_scratch());
    assert_eq!(loaded.digest_from_scratch(), state.digest_from_scratch());
    assert_eq!(loaded.events, state.events);
    let keys = history_keys(state);
    let listed = image.history_list(&loaded, None, usize::MAX).expect("a good image");
    assert_eq!(listed.iter().map(|row| storage::HistoryKey::of(row)).collect::<Vec<_>>(), keys);
    for key in keys {
        assert_eq!(image.history(&loaded, key.job).unwrap().expect("a row").bucket, key.bucket);
    }
    // The image made from it is one to restart from.
    drop(image);
    let log = LogBounds { purged: Some(snapshot.id.0), last: Some(snapshot.id.0) };
    let recovered = storage::open(dir.path(), log).expect("a good image");
    assert_eq!(recovered.source, Source::Image);
    let mut reopened = recovered.state;
    assert_eq!(reopened.digest(), loaded.digest());
}

#[test]
fn a_snapshot_alone_gives_state_events_and_history() {
    for seed in 0..4 {
        let dir = tempfile::tempdir().unwrap();
        let (mut state, image) = replica(dir.path(), seed, 40);
        // Rows that no cut holds yet come from the state, the others from the image.
        (0..10).for_each(|number| random_state::entry(&mut state, &mut Random(seed << 8 | number)));
        assert!(!state.archived.is_empty());
        assert_alone_gives(&snap(dir.path(), &state, &image), &state);
    }
}

#[test]
fn an_image_that_is_ahead_of_the_clone_adds_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (mut state, image) = replica(dir.path(), 21, 40);
    let clone = state.clone();
    let mut random = Random(3);
    for _ in 0..20 {
        // Buckets stay: one dropped meanwhile is another matter.
        let buckets = state.buckets.clone();
        random_state::entry(&mut state, &mut random);
        if buckets.iter().any(|(bucket, _)| !state.buckets.contains(bucket)) {
            break;
        }
        cut(&mut state, &image);
    }
    assert!(history_keys(&state).len() > history_keys(&clone).len());
    assert_alone_gives(&snap(dir.path(), &clone, &image), &clone);
}

#[test]
fn a_bucket_dropped_under_a_snapshot_is_an_error_to_try_again_after() {
    let dir = tempfile::tempdir().unwrap();
    let (mut state, image) = replica(dir.path(), 21, 40);
    let clone = state.clone();
    let bucket = *state.buckets.iter().next().expect("a bucket").0;
    random_state::drop_bucket(&mut state, bucket);
    cut(&mut state, &image);
    let error = snapshot::write(&storage::snapshots_dir(dir.path()), clone, &image).expect_err("rows are gone");
    assert!(matches!(error.cause, storage::Cause::Superseded { bucket: found } if found == bucket), "{error}");
    assert_eq!(snapshot::list(&storage::snapshots_dir(dir.path())).unwrap(), []);
    assert_alone_gives(&snap(dir.path(), &state, &image), &state);
}

#[test]
fn two_are_kept_and_share_the_files_of_unchanged_buckets() {
    let dir = tempfile::tempdir().unwrap();
    let (mut state, image) = replica(dir.path(), 8, 60);
    let mut inodes = BTreeMap::new();
    let mut shared = 0;
    for number in 0..4 {
        random_state::entry(&mut state, &mut Random(number));
        cut(&mut state, &image);
        let snapshot = snap(dir.path(), &state, &image);
        for (name, _) in snapshot.files().iter().filter(|(name, _)| name.starts_with("history-")) {
            let inode = fs::metadata(snapshot.path(name).unwrap()).unwrap().ino();
            shared += u32::from(inodes.insert(name.clone(), inode) == Some(inode));
        }
    }
    assert!(shared > 5, "{shared} files were shared");
    let kept = snapshot::list(&storage::snapshots_dir(dir.path())).unwrap();
    assert_eq!(kept.iter().map(|id| id.0.index).collect::<Vec<_>>(), [64, 63]);
    let newest = snapshot::newest_valid(&storage::snapshots_dir(dir.path()), 0).unwrap().unwrap();
    assert_alone_gives(&newest, &state);
    assert!(snapshot::newest_valid(&storage::snapshots_dir(dir.path()), 65).unwrap().is_none());
}

#[test]
fn every_flipped_bit_and_every_cut_is_found_by_the_checksums() {
    let dir = tempfile::tempdir().unwrap();
    let (state, image) = replica(dir.path(), 4, 40);
    let snapshot = snap(dir.path(), &state, &image);
    let mut random = Random(1);
    for (name, size) in snapshot.files() {
        let path = snapshot.path(&name).unwrap();
        let good = fs::read(&path).unwrap();
        assert_eq!(good.len() as u64, size);
        for _ in 0..10 {
            let mut bad = good.clone();
            match random.below(3) {
                0 => bad.truncate(random.below(size) as usize),
                1 => bad.extend_from_slice(&[0; 9][..1 + random.below(8) as usize]),
                _ => bad[random.below(size) as usize] ^= 1 << random.below(8),
            }
            fs::write(&path, &bad).unwrap();
            let opened = Snapshot::open(&storage::snapshots_dir(dir.path()), snapshot.id);
            let verified = opened.and_then(|found| found.verify());
            let error = verified.expect_err("damage");
            assert!(error.to_string().contains(&name), "{error} names no file");
            // The blocks' own checksums find it too, for a reader that does not take the whole file first.
            if name != MANIFEST {
                let installed = storage::install(tempfile::tempdir().unwrap().path(), &snapshot);
                assert!(installed.is_err(), "{name} with damage was loaded");
            }
        }
        fs::write(&path, good).unwrap();
    }
    assert_alone_gives(&snapshot, &state);
}

#[test]
fn a_torn_or_missing_manifest_falls_back_to_the_older_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let snapshots = storage::snapshots_dir(dir.path());
    let (mut state, image) = replica(dir.path(), 4, 40);
    let older = snap(dir.path(), &state, &image);
    let at_older = state.clone();
    random_state::entry(&mut state, &mut Random(77));
    let newer = snap(dir.path(), &state, &image);
    let manifest = newer.path(MANIFEST).unwrap();
    let good = fs::read(&manifest).unwrap();
    for len in (0..good.len()).step_by(37) {
        fs::write(&manifest, &good[..len]).unwrap();
        assert_eq!(snapshot::newest_valid(&snapshots, 0).unwrap().unwrap().id, older.id, "{len} bytes");
    }
    fs::remove_file(&manifest).unwrap();
    assert_eq!(snapshot::newest_valid(&snapshots, 0).unwrap().unwrap().id, older.id);
    assert!(snapshot::newest_valid(&snapshots, newer.id.0.index).unwrap().is_none());
    assert_alone_gives(&older, &at_older);
}

fn send(from: &Snapshot, into: &mut Incoming, names: &[String], random: &mut Random) {
    let mut pieces = Vec::new();
    for name in names {
        let bytes = fs::read(from.path(name).expect("its own file")).unwrap();
        let size = 1 + random.below(5_000) as usize;
        pieces.extend(bytes.chunks(size).enumerate().map(|(number, piece)| (name, number * size, piece.to_vec())));
    }
    while !pieces.is_empty() {
        let (name, offset, piece) = pieces.swap_remove(random.below(pieces.len() as u64) as usize);
        into.write(name, offset as u64, &piece).expect("a good name");
    }
}

#[test]
fn a_snapshot_travels_in_pieces_and_known_history_is_not_sent_again() {
    let (home, away) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let snapshots = storage::snapshots_dir(away.path());
    let (mut state, image) = replica(home.path(), 14, 60);
    let mut random = Random(2);
    let mut sent = Vec::new();
    for _ in 0..2 {
        random_state::entry(&mut state, &mut random);
        let snapshot = snap(home.path(), &state, &image);
        let mut incoming = Incoming::new(&snapshots).unwrap();
        let manifest = fs::read(snapshot.path(MANIFEST).unwrap()).unwrap();
        let names = incoming.missing(&manifest).expect("a good manifest");
        assert_eq!(names.last().map(String::as_str), Some(MANIFEST));
        send(&snapshot, &mut incoming, &names, &mut random);
        let received = incoming.finish().expect("everything arrived");
        assert_eq!((received.id, &received.manifest), (snapshot.id, &snapshot.manifest));
        assert_alone_gives(&received, &state);
        sent.push(names.len());
    }
    assert!(sent[1] < sent[0], "{sent:?} files were sent");
}

#[test]
fn a_piece_that_never_came_or_a_wrong_name_is_no_snapshot() {
    let (home, away) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let snapshots = storage::snapshots_dir(away.path());
    let (state, image) = replica(home.path(), 14, 30);
    let snapshot = snap(home.path(), &state, &image);
    let names: Vec<String> = snapshot.files().into_iter().map(|(name, _)| name).collect();
    for left_out in 0..names.len() {
        let mut incoming = Incoming::new(&snapshots).unwrap();
        let mut some = names.clone();
        let name = some.remove(left_out);
        send(&snapshot, &mut incoming, &some, &mut Random(1));
        let error = incoming.finish().expect_err("a file is missing");
        assert!(error.to_string().contains(&name), "{error}");
    }
    let mut incoming = Incoming::new(&snapshots).unwrap();
    let long = "history-0000000001-0123456789abcdef0123456789abcdef/";
    for name in
        ["", ".", "..", "../live", "live/..", "/etc/passwd", "history-../../../../../../../../../../tmp/aaaaa", long]
    {
        assert!(incoming.write(name, 0, b"x").is_err(), "{name:?} was taken");
    }
    assert_eq!(snapshot::list(&snapshots).unwrap(), []);
    // What was left half received is gone after the next start.
    drop(incoming);
    assert_eq!(fs::read_dir(&snapshots).unwrap().count(), 1);
    let recovered = storage::open(away.path(), LogBounds::default()).unwrap();
    assert_eq!(recovered.source, Source::Empty);
    assert_eq!(fs::read_dir(&snapshots).unwrap().count(), 0);
}
