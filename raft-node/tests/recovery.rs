//! Replicas that lost their state: image and snapshots damaged or gone, the log purged.

mod support;

use std::fs;
use std::path::Path;
use std::time::Duration;

use raft_node::replica::{Mode, Replica, StartError};
use statemachine::Outcome;
use statemachine::storage::snapshots_dir;

use support::{Group, SOON, until};

/// Of so many entries a snapshot is made.
const ENTRIES: u64 = 60;

async fn write(group: &Group, requests: std::ops::Range<u64>) {
    for request in requests {
        let outcome = group.open_session(request).await;
        assert!(matches!(outcome, Outcome::Done(_)), "{outcome:?}");
    }
}

/// A group with so much behind it that every log is purged.
async fn with_purged_logs(size: usize) -> Group {
    let group = Group::with(size, ENTRIES).await;
    write(&group, 0..250).await;
    let purged =
        until(SOON, || group.running().all(|(_, replica)| replica.metrics().purged_index > ENTRIES).then_some(()));
    assert!(purged.await.is_some(), "every log is purged");
    group
}

/// Nothing of the image and no snapshot is usable any more.
fn wreck(dir: &Path) {
    fs::write(dir.join("image/db"), vec![0xa5; 1 << 20]).expect("overwritten");
    let snapshots = fs::read_dir(snapshots_dir(dir)).expect("listed").flatten();
    let mut wrecked = 0;
    for snapshot in snapshots {
        fs::write(snapshot.path().join("live"), b"torn").expect("overwritten");
        wrecked += 1;
    }
    assert!(wrecked > 0, "there were snapshots");
}

fn rob(dir: &Path) {
    fs::remove_dir_all(dir.join("image")).expect("removed");
    fs::remove_dir_all(snapshots_dir(dir)).expect("removed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_without_image_and_snapshots_takes_the_state_of_another_and_goes_on() {
    let mut group = with_purged_logs(3).await;
    for (round, lose) in [wreck as fn(&Path), rob].into_iter().enumerate() {
        // The leader's place once, a follower's once.
        let victim = if round == 0 { group.leader().await } else { (group.leader().await + 1) % 3 };
        let id = group.replica(victim).id();
        let term = group.replica(victim).metrics().term;
        group.kill(victim).await;
        let dir = group.places[victim].dir.clone();
        lose(&dir);
        // What is committed meanwhile reaches it by the log, behind the snapshot.
        let first = 1_000 * (round as u64 + 1);
        write(&group, first..first + 20).await;
        group.resume(victim).await;
        write(&group, first + 20..first + 40).await;
        group.assert_equal().await;
        let replica = group.replica(victim);
        assert_eq!(replica.id(), id, "the same replica");
        assert!(replica.metrics().term >= term, "it kept its vote");
        assert_eq!(replica.state().sessions.len(), 250 + 40 * (round + 1));
        let voters = replica.members().iter().filter(|member| member.voter).count();
        assert_eq!(voters, 3, "it is a voter as before");
        // The new image is good: the next start uses it.
        let image = until(SOON, || (replica.metrics().image_index >= replica.metrics().applied_index).then_some(()));
        assert!(image.await.is_some(), "the image is written again");
        group.stop(victim).await;
        let alone = Replica::start(group.options(victim, Mode::Resume)).await.expect("its directory is whole");
        assert!(alone.state().sessions.len() >= 250 + 40 * round);
        alone.shutdown().await;
        drop(alone);
        group.resume(victim).await;
        group.assert_equal().await;
    }
    // Its vote counts again: with another one dead, the group goes on.
    let dead = (0..3).find(|n| !group.replica(*n).is_leader()).expect("a follower");
    group.kill(dead).await;
    write(&group, 5_000..5_010).await;
    group.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn until_it_has_a_state_it_takes_no_part() {
    let mut group = with_purged_logs(3).await;
    for n in 0..3 {
        group.kill(n).await;
    }
    wreck(&group.places[0].dir);
    let options = group.options(0, Mode::Resume);
    let start = tokio::spawn(Replica::start(options));
    // The second has all that was acknowledged, but it would need the vote of the first.
    group.resume(1).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let before = group.replica(1).metrics();
    assert!(before.leader.is_none() || start.is_finished(), "{before:#?}");
    let waited = tokio::time::timeout(SOON, start).await.expect("it found the state").expect("ran");
    let first = waited.expect("it starts");
    let there = until(SOON, || (first.is_leader() || group.replica(1).is_leader()).then_some(()));
    assert!(there.await.is_some(), "two of three lead");
    assert_eq!(first.state().sessions.len(), 250);
    first.shutdown().await;
    group.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn alone_it_waits_for_the_others_and_never_leads_with_less() {
    let mut group = with_purged_logs(3).await;
    for n in 0..3 {
        group.kill(n).await;
    }
    wreck(&group.places[0].dir);
    let options = group.options(0, Mode::Resume);
    let start = tokio::spawn(Replica::start(options));
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(!start.is_finished(), "with nobody to ask it waits");
    assert!(group.places[0].dir.join("snapshots.damaged").exists(), "kept for inspection");
    group.resume(1).await;
    group.resume(2).await;
    let first = tokio::time::timeout(SOON, start).await.expect("in time").expect("ran").expect("it starts");
    let same = until(SOON, || {
        let all = [first.state(), group.replica(1).state(), group.replica(2).state()];
        all.iter().all(|state| state.sessions.len() == 250).then_some(())
    });
    assert!(same.await.is_some(), "all have what was acknowledged");
    first.shutdown().await;
    group.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_only_replica_stops_with_file_and_advice() {
    let mut group = with_purged_logs(1).await;
    group.stop(0).await;
    let dir = group.places[0].dir.clone();
    wreck(&dir);
    for _ in 0..2 {
        let refused = Replica::start(group.options(0, Mode::Resume)).await.err().expect("refused");
        assert!(matches!(refused, StartError::StateLost { .. }), "{refused}");
        let text = refused.to_string();
        assert!(text.contains(&dir.display().to_string()) && text.contains("backup"), "{text}");
    }
}
