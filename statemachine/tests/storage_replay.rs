//! A replica that lives from its image, and one that lives from its snapshots, replay the rest of the log to the state
//! of the one that never stopped: digest, invariants, history.

mod world;

use std::path::Path;

use statemachine::command::*;
use statemachine::record::LogPosition;
use statemachine::settings::Settings;
use statemachine::storage::{self, HistoryKey, Image, LogBounds, Source, snapshot};
use statemachine::*;
use world::*;

/// Two days in which jobs of two machines come, run, fail, end, leave memory and history.
fn log() -> Vec<Entry> {
    let mut world = World::new();
    let nodes: Vec<NodeId> = (1..3).map(|seed| world.register(machine(&format!("n{seed}"), seed, 4)).0).collect();
    let mut live: Vec<(JobId, NodeId, Option<Token>)> = Vec::new();
    for round in 0..150u64 {
        let node = nodes[round as usize % 2];
        let mut submission = one_gpu();
        submission.body.cwd = "/x".repeat(if round % 50 == 7 { 60_000 } else { round as usize });
        live.push((world.submit(submission), node, None));
        for (job, node, token) in live.iter_mut().take(8) {
            if token.is_none() {
                *token = world.place(*job, &[*node]).ok();
            }
        }
        if round % 3 == 2 {
            let (job, node, token) = live.remove(0);
            match token {
                Some(token) if round % 2 == 0 => {
                    world.report(node, token, PartReport::Started { port: 1 }).expect("a live lease");
                    world.report(node, token, ended(0, 1, 0)).expect("a live lease");
                }
                Some(token) => {
                    let failed = PartReport::LaunchFailed { fault: LaunchFault::Job, why: "no file".into() };
                    world.report(node, token, failed).expect("a live lease");
                    world.report(node, token, PartReport::Released).ok();
                    world.run(Command::Cancel { job });
                }
                None => {
                    world.run(Command::Cancel { job });
                }
            }
        }
        world.wait(if round % 40 == 39 { 4 * 3_600_000 } else { 400_000 });
        if round == 120 {
            let oldest = *world.state.buckets.iter().next().expect("history").0;
            assert!(matches!(world.run(Command::Retain { bucket: oldest }), Outcome::Done(_)));
        }
    }
    assert!(world.state.buckets.len() > 3 && world.state.jobs.len() > 20 && world.state.leases.len() > 2);
    world.log
}

fn apply(state: &mut State, log: &[Entry], up_to: u64) {
    while state.meta.applied.index < up_to {
        let index = state.meta.applied.index + 1;
        // Through the bytes that the log would hold.
        let bytes = storage::codec::encode_entry(&log[index as usize - 1]);
        state.apply(&storage::codec::decode_entry(&bytes).expect("our own bytes")).expect("a known level");
        state.set_applied(LogPosition { term: 1, leader: 5, index });
    }
}

fn bounds(purged: u64, last: u64) -> LogBounds {
    let at = |index| Some(LogPosition { term: 1, leader: 5, index });
    LogBounds { purged: at(purged).filter(|_| purged > 0), last: at(last) }
}

fn start(dir: &Path, purged: u64, last: u64) -> (State, Image, Source) {
    let recovered = storage::open(dir, bounds(purged, last)).expect("recoverable");
    let state = match recovered.source {
        Source::Empty => State::new([7; 16], Settings::default()),
        _ => recovered.state,
    };
    state.check().expect("all invariants hold after a start");
    (state, recovered.image, recovered.source)
}

fn cut(state: &mut State, image: &Image) {
    let persisted = image.write(state.cut()).expect("a working disk");
    state.forget_archived(&persisted);
}

/// All history that a replica shows.
fn history(state: &State, image: &Image) -> Vec<(HistoryKey, u128)> {
    let rows = image.history_list(state, None, usize::MAX).expect("a good image");
    rows.iter().map(|row| (HistoryKey::of(row), storage::weigh(row).0)).collect()
}

#[test]
fn image_and_snapshot_replicas_reach_the_state_of_the_one_that_never_stopped() {
    let log = log();
    let last = log.len() as u64;
    let (steady_dir, image_dir, snapshot_dir) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (mut steady, steady_image, _) = start(steady_dir.path(), 0, 0);

    let mut at = 0;
    while at < last {
        let purged = at;
        at = (at + last / 9).min(last);
        apply(&mut steady, &log, at);

        // Lives from its image: the log below it is purged, snapshots are gone.
        let _ = std::fs::remove_dir_all(storage::snapshots_dir(image_dir.path()));
        let (mut state, image, source) = start(image_dir.path(), purged, at);
        assert_eq!(source, if purged == 0 { Source::Empty } else { Source::Image });
        apply(&mut state, &log, at - 10);
        cut(&mut state, &image);
        apply(&mut state, &log, at);
        assert_eq!(state.digest(), steady.digest());
        cut(&mut state, &image);
        assert_eq!(history(&state, &image), history(&steady, &steady_image));

        // Lives from its snapshots: no image survives.
        let _ = std::fs::remove_dir_all(snapshot_dir.path().join("image"));
        let (mut state, image, source) = start(snapshot_dir.path(), purged, at);
        assert!(purged == 0 || matches!(source, Source::Snapshot(id) if id.0.index == purged), "{source}");
        apply(&mut state, &log, at);
        assert_eq!(state.digest(), steady.digest());
        assert_eq!(history(&state, &image), history(&steady, &steady_image));
        snapshot::write(&storage::snapshots_dir(snapshot_dir.path()), state, &image).expect("a working disk");
    }
    assert_eq!(steady.digest(), steady.digest_from_scratch());
    assert!(history(&steady, &steady_image).len() > 20);
}
