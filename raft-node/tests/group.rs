//! Groups of real replicas in one process: what commits, who leads, what survives a stop, a kill and a restart of all.

mod support;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use proto::v1::ReadIndexRequest;
use proto::v1::peer_client::PeerClient;
use raft_node::door::{COMMAND_BYTES, ProposeError};
use raft_node::identity::{IdentityError, LOG_DIR};
use raft_node::members::MemberError;
use raft_node::replica::{Mode, Replica, StartError};
use statemachine::{Cmd, Command, Outcome, Reply, Revision};
use tonic::Code;

use support::{Group, SOON, Wire, request_id, session, until};

fn is_done(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Done(Reply::Stored(_)) | Outcome::Replayed(_))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_replicas_commit_and_agree() {
    let group = Group::of(3).await;
    let leader = group.leader().await;
    let mut newest = 0;
    for request in 0..50 {
        let (outcome, revision) = group.replica(leader).propose(session(request)).await.expect("committed");
        assert!(is_done(&outcome), "{outcome:?}");
        assert!(revision >= newest, "revisions never go back");
        newest = revision;
    }
    let (again, _) = group.replica(leader).propose(session(7)).await.expect("committed");
    assert!(matches!(again, Outcome::Replayed(_)), "the same request is the same session: {again:?}");
    for (n, replica) in group.running() {
        let index = replica.read_index().await.expect("a linearizable read");
        assert!(replica.state().meta.applied.index >= index);
        assert_eq!(replica.state().sessions.len(), 50, "replica {n} reads all that was acknowledged");
    }
    group.assert_equal().await;
    group.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_callers_share_entries_and_each_gets_its_own_outcome() {
    let group = Group::of(3).await;
    let leader = group.replica(group.leader().await).clone();
    let before = leader.state().meta.applied.index;
    let calls = (0..2_000u64).map(|request| {
        let leader = leader.clone();
        tokio::spawn(async move { (request, leader.propose(session(request)).await) })
    });
    let mut sessions = BTreeSet::new();
    for call in futures::future::join_all(calls).await {
        let (request, answer) = call.expect("ran");
        let (outcome, _) = answer.expect("committed");
        let Outcome::Done(Reply::Stored(stored)) = outcome else { panic!("request {request}: {outcome:?}") };
        sessions.insert(format!("{stored:?}"));
    }
    assert_eq!(sessions.len(), 2_000, "2,000 callers, 2,000 sessions");
    let entries = leader.state().meta.applied.index - before;
    assert!(entries < 1_000, "2,000 commands took {entries} entries");
    group.assert_equal().await;
    group.stop_all().await;
}

/// As the calls of one packet do: the runtime would let the door run after the first of them.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn commands_that_are_ready_together_share_an_entry() {
    let group = Group::of(1).await;
    let leader = group.replica(group.leader().await).clone();
    let before = leader.state().meta.applied.index;
    let one_packet = tokio::spawn({
        let leader = leader.clone();
        async move {
            let calls = (0..60u64).map(|request| {
                let leader = leader.clone();
                tokio::spawn(async move { leader.propose(session(request)).await })
            });
            futures::future::join_all(calls.collect::<Vec<_>>()).await
        }
    });
    for answer in one_packet.await.expect("ran") {
        answer.expect("ran").expect("committed");
    }
    let entries = leader.state().meta.applied.index - before;
    assert!(entries <= 3, "60 commands took {entries} entries");
    group.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_sends_callers_to_the_leader() {
    let group = Group::of(3).await;
    let leader = group.leader().await;
    let follower = (leader + 1) % 3;
    let refused = group.replica(follower).propose(session(1)).await.expect_err("it does not lead");
    let ProposeError::NotLeader(Some((id, peer))) = refused else { panic!("{refused:?}") };
    assert_eq!(id, group.replica(leader).id());
    assert_eq!(&peer, group.replica(leader).peer());
    let refused = group.replica(follower).remove(id).await.expect_err("it does not lead");
    assert!(matches!(refused, MemberError::NotLeader(Some(_))), "{refused:?}");
    group.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_leader_hands_over_and_a_killed_one_loses_nothing() {
    let mut group = Group::of(3).await;
    for request in 0..20 {
        assert!(is_done(&group.open_session(request).await));
    }
    let first = group.leader().await;
    let office = group.replica(first).leadership().borrow().clone().expect("in office");
    group.stop(first).await;
    let second = group.leader().await;
    let next = group.replica(second).leadership().borrow().clone().expect("in office");
    assert!(next.term > office.term);
    assert!(next.clock_at_start_ms >= office.clock_at_start_ms, "cluster time never goes back");
    for request in 20..40 {
        assert!(is_done(&group.open_session(request).await));
    }
    group.resume(first).await;
    group.assert_equal().await;
    group.kill(second).await;
    for request in 40..60 {
        assert!(is_done(&group.open_session(request).await));
    }
    group.resume(second).await;
    group.assert_equal().await;
    assert_eq!(group.replica(second).state().sessions.len(), 60);
    group.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leadership_can_be_handed_to_a_chosen_replica() {
    let group = Group::of(3).await;
    let leader = group.leader().await;
    let to = (leader + 1) % 3;
    let id = group.replica(to).id();
    group.replica(leader).transfer(Some(id)).await.expect("handed over");
    let there = until(SOON, || group.replica(to).is_leader().then_some(())).await;
    assert!(there.is_some(), "the chosen replica leads");
    let refused = group.replica(to).transfer(Some(12_345)).await.expect_err("unknown");
    assert!(matches!(refused, MemberError::Refused(_)), "{refused:?}");
    group.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_replicas_killed_resume_by_themselves() {
    let mut group = Group::of(3).await;
    for request in 0..100 {
        assert!(is_done(&group.open_session(request).await));
    }
    let term = group.replica(group.leader().await).metrics().term;
    for n in 0..3 {
        group.kill(n).await;
    }
    for n in 0..3 {
        group.resume(n).await;
    }
    let leader = group.leader().await;
    assert!(group.replica(leader).metrics().term > term, "no leader resumes its term without an election");
    group.replica(leader).recovered(SOON).await.expect("recovered");
    assert_eq!(group.replica(leader).state().sessions.len(), 100);
    group.assert_equal().await;
    group.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_whose_log_holds_nothing_is_refused_even_with_its_vote() {
    let mut group = Group::of(1).await;
    assert!(is_done(&group.open_session(1).await));
    group.stop(0).await;
    let dir = group.places[0].dir.join(LOG_DIR);
    let empty = tempfile::tempdir().expect("a directory");
    drop(raft_node::log::Log::open(empty.path(), Default::default()).expect("an empty log"));
    let head = std::fs::read(empty.path().join("000000000001.log")).expect("read");
    std::fs::write(dir.join("000000000001.log"), head).expect("written");
    let refused = Replica::start(group.options(0, Mode::Resume)).await.err().expect("refused").to_string();
    assert!(refused.contains("000000000001.log") && refused.contains("offset"), "{refused}");
    // Nothing says where its end was; that it was a member is enough.
    for note in ["durable", "vote-a", "vote-b"] {
        let empty = empty.path().join(note);
        let bytes = if empty.exists() { std::fs::read(empty).expect("read") } else { Vec::new() };
        std::fs::write(dir.join(note), bytes).expect("written");
    }
    let refused = Replica::start(group.options(0, Mode::Resume)).await.err().expect("refused");
    assert!(matches!(refused, StartError::LogLost { .. }), "{refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_goes_on_where_it_was_after_all_replicas_were_stopped() {
    let mut group = Group::of(3).await;
    for request in 0..20 {
        assert!(is_done(&group.open_session(request).await));
    }
    for lock in 0..20 {
        let leader = group.replica(group.leader().await);
        let session = *leader.state().sessions.iter().next().expect("one was opened").0;
        let body = Command::Acquire { session, name: format!("lock {lock}") };
        leader.propose(Cmd { request: None, actor: "tests".to_owned(), body }).await.expect("committed");
    }
    group.assert_equal().await;
    let seen = Revision(5);
    let events = |replica: &Replica| -> Vec<_> {
        let state = replica.state();
        state.events_since(seen).expect("they are kept").cloned().collect()
    };
    let before = events(group.replica(0));
    assert!(before.len() >= 15, "{before:?}");
    for n in 0..3 {
        group.stop(n).await;
    }
    for n in 0..3 {
        group.resume(n).await;
    }
    group.assert_equal().await;
    for (n, replica) in group.running() {
        assert_eq!(events(replica), before, "replica {n}");
    }
    group.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lone_leader_that_restarts_is_elected_again() {
    let mut group = Group::of(1).await;
    assert!(is_done(&group.open_session(1).await));
    group.replica(0).read_index().await.expect("a group of one has its quorum");
    let term = group.replica(0).metrics().term;
    group.kill(0).await;
    group.resume(0).await;
    group.leader().await;
    assert!(group.replica(0).metrics().term > term, "a restored leader would give the same log ids to other commands");
    assert!(is_done(&group.open_session(1).await));
    group.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_behind_a_purged_log_catches_up_by_snapshot() {
    let mut group = Group::with(3, 200).await;
    let leader = group.leader().await;
    let late = (leader + 1) % 3;
    group.kill(late).await;
    let behind = group.replica(leader).metrics().last_log_index;
    for request in 0..700 {
        assert!(is_done(&group.open_session(request).await));
    }
    let purged = until(SOON, || {
        let leader = group.running().find(|(_, replica)| replica.is_leader())?.1;
        (leader.metrics().purged_index > behind + 1).then_some(())
    });
    assert!(purged.await.is_some(), "the log is purged: {:#?}", group.replica(leader).metrics());
    group.resume(late).await;
    group.assert_equal().await;
    assert!(group.replica(late).metrics().snapshot_index > behind, "it took a snapshot");
    assert_eq!(group.replica(late).state().sessions.len(), 700);
    // And a restart from what it installed.
    group.kill(late).await;
    group.resume(late).await;
    group.assert_equal().await;
    group.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_joins_is_promoted_and_removed() {
    let mut group = Group::of(3).await;
    for request in 0..10 {
        assert!(is_done(&group.open_session(request).await));
    }
    let fourth = group.add_place().await;
    // Through any replica: a follower's API sends it to the leader.
    let follower = (group.leader().await + 1) % 3;
    let mode = group.join_mode(follower);
    group.start(fourth, mode).await.expect("joins");
    group.wait_voters(4).await;
    group.assert_equal().await;
    let leader = group.leader().await;
    let out = if leader == fourth { 0 } else { fourth };
    let id = group.replica(out).id();
    let members = group.replica(leader).remove(id).await.expect("removed");
    assert!(members.iter().all(|member| member.id != id));
    // Again, as one does who heard nothing of the first.
    assert_eq!(group.replica(leader).remove(id).await.expect("it is out").len(), 3);
    group.kill(out).await;
    group.wait_voters(3).await;
    assert!(is_done(&group.open_session(11).await));
    group.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removal_that_would_lose_the_quorum_is_refused() {
    let mut group = Group::of(3).await;
    let leader = group.leader().await;
    let (dead, alive) = ((leader + 1) % 3, (leader + 2) % 3);
    group.kill(dead).await;
    // Until the leader has noticed.
    tokio::time::sleep(Duration::from_millis(1_200)).await;
    let id = group.replica(alive).id();
    let refused = group.replica(leader).remove(id).await.expect_err("two voters would be left, one of them dead");
    assert!(matches!(&refused, MemberError::Refused(why) if why.contains("quorum")), "{refused:?}");
    assert!(is_done(&group.open_session(1).await), "the group is as it was");
    group.stop_all().await;

    let group = Group::of(1).await;
    group.leader().await;
    let refused = group.replica(0).remove(group.replica(0).id()).await.expect_err("the only voter");
    assert!(matches!(refused, MemberError::Refused(_)), "{refused:?}");
    group.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_quorum_nothing_is_acknowledged_and_no_read_is_linearizable() {
    let mut group = Group::of(3).await;
    let leader = group.leader().await;
    group.kill((leader + 1) % 3).await;
    group.kill((leader + 2) % 3).await;
    let replica = group.replica(leader).clone();
    let (proposed, read) = tokio::join!(replica.propose(session(1)), replica.read_index());
    assert!(proposed.is_err(), "{proposed:?}");
    assert!(read.is_err(), "{read:?}");
    assert_eq!(replica.state().sessions.len(), 0);
    drop(replica);
    group.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_bootstrap_is_refused() {
    let mut group = Group::of(1).await;
    let busy = Replica::start(group.options(0, Mode::Bootstrap)).await.err().expect("refused");
    assert!(matches!(busy, StartError::Listen { .. } | StartError::Identity(IdentityError::InUse(_))), "{busy}");
    group.stop(0).await;
    let refused = Replica::start(group.options(0, Mode::Bootstrap)).await.err().expect("refused");
    assert!(matches!(refused, StartError::Identity(IdentityError::Founded { .. })), "{refused}");
    group.resume(0).await;
    group.leader().await;
    group.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_foreign_or_empty_or_robbed_directory_is_refused() {
    let mut ours = Group::of(1).await;
    let mut theirs = Group::of(1).await;
    theirs.stop(0).await;
    // Their directory, our group.
    let foreign = Replica::start(theirs.options(0, ours.join_mode(0))).await.err().expect("refused");
    assert!(matches!(foreign, StartError::Identity(IdentityError::Foreign { .. })), "{foreign}");
    // Nobody's directory.
    let empty = ours.add_place().await;
    let nobodys = Replica::start(ours.options(empty, Mode::Resume)).await.err().expect("refused");
    assert!(matches!(nobodys, StartError::Identity(IdentityError::Nobodys(_))), "{nobodys}");
    // A member without its log would vote twice.
    ours.stop(0).await;
    std::fs::remove_dir_all(ours.places[0].dir.join(LOG_DIR)).expect("removed");
    let robbed = Replica::start(ours.options(0, Mode::Resume)).await.err().expect("refused");
    assert!(matches!(robbed, StartError::LogLost { .. }), "{robbed}");
    // Without its identity it is nobody, and not to be founded anew.
    std::fs::remove_file(theirs.places[0].dir.join("IDENTITY")).expect("removed");
    for mode in [Mode::Resume, Mode::Bootstrap] {
        let lost = Replica::start(theirs.options(0, mode)).await.err().expect("refused");
        assert!(matches!(lost, StartError::Identity(IdentityError::Missing(_))), "{lost}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partitioned_followers_return_deposes_nobody() {
    let mut group = Group::of(2).await;
    let third = group.add_place().await;
    // What the others send to the third goes over a wire that can be cut; what it sends itself always arrives.
    let wire = Wire::to(group.places[third].peer_addr).await;
    group.places[third].advertise = Some(wire.addr);
    let mode = group.join_mode(group.leader().await);
    group.start(third, mode).await.expect("joins");
    group.wait_voters(3).await;
    if group.leader().await == third {
        group.replica(third).transfer(None).await.expect("handed over");
    }
    let leader = group.leader().await;
    let office = group.replica(leader).leadership().borrow().clone().expect("in office");
    wire.cut(true);
    for request in 0..30 {
        group.replica(leader).propose(session(request)).await.expect("two of three commit");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let alone = group.replica(third).metrics();
    assert!(alone.applied_index < group.replica(leader).metrics().applied_index, "it was cut off");
    assert_eq!(alone.term, office.term, "a replica that would not be elected keeps its term");
    wire.cut(false);
    group.assert_equal().await;
    assert_eq!(group.replica(leader).leadership().borrow().as_ref(), Some(&office), "the same office all along");
    group.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_over_the_limit_is_refused_and_one_just_below_travels_alone() {
    let group = Group::of(1).await;
    let leader = group.replica(group.leader().await);
    let with_owner = |bytes: usize| {
        let mut cmd = session(1);
        cmd.body = Command::OpenSession { owner: "o".repeat(bytes), ttl_ms: 60_000 };
        cmd
    };
    let refused = leader.propose(with_owner(COMMAND_BYTES + 1)).await.expect_err("too large");
    assert!(matches!(refused, ProposeError::TooLarge { .. }), "{refused:?}");
    // What apply thinks of such a name is apply's matter.
    leader.propose(with_owner(COMMAND_BYTES - 200)).await.expect("proposed");
    group.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_index_covers_what_was_acknowledged_before_it() {
    let group = Group::of(3).await;
    let leader = group.leader().await;
    for request in 0..30u64 {
        assert!(is_done(&group.replica(leader).propose(session(request)).await.expect("committed").0));
        let follower = group.replica((leader + 1 + request as usize % 2) % 3);
        follower.read_index().await.expect("a linearizable read");
        assert!(follower.state().sessions.len() as u64 > request, "the read sees request {request}");
    }
    group.stop_all().await;
}

/// Writers that keep proposing, a replica killed and started again each round: what was acknowledged is on every replica in the end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acknowledged_writes_survive_kills_under_load() {
    const ROUNDS: usize = 6;
    const WRITERS: u64 = 8;
    let mut group = Group::with(3, 1_000).await;
    let mut acknowledged = BTreeSet::new();
    for round in 0..ROUNDS {
        let stop = Arc::new(AtomicBool::new(false));
        let replicas: Vec<Replica> = group.running().map(|(_, replica)| replica.clone()).collect();
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| {
                let (replicas, stop) = (replicas.clone(), stop.clone());
                let first = (round as u64 * WRITERS + writer) * 1_000_000;
                tokio::spawn(write_until(replicas, stop, first))
            })
            .collect();
        tokio::time::sleep(Duration::from_millis(400)).await;
        // The leader twice as often as the others: its death is the harder one.
        let leader = group.leader().await;
        let victim = if round % 2 == 0 { leader } else { (leader + 1 + round / 2 % 2) % 3 };
        group.kill(victim).await;
        tokio::time::sleep(Duration::from_millis(900)).await;
        stop.store(true, Ordering::Release);
        for writer in writers {
            acknowledged.extend(writer.await.expect("ran"));
        }
        drop(replicas);
        group.resume(victim).await;
        group.assert_equal().await;
    }
    assert!(acknowledged.len() > ROUNDS * 10, "{} acknowledged", acknowledged.len());
    for (n, replica) in group.running() {
        let state = replica.state();
        let missing = acknowledged.iter().filter(|request| !state.requests.contains(&request_id(**request))).count();
        assert_eq!(missing, 0, "replica {n} lacks {missing} of {} acknowledged writes", acknowledged.len());
    }
    group.stop_all().await;
}

async fn write_until(replicas: Vec<Replica>, stop: Arc<AtomicBool>, first: u64) -> Vec<u64> {
    let mut acknowledged = Vec::new();
    let mut request = first;
    while !stop.load(Ordering::Acquire) {
        match replicas.iter().find(|replica| replica.is_leader()) {
            Some(leader) => match leader.propose(session(request)).await {
                Ok((outcome, _)) if is_done(&outcome) => acknowledged.push(request),
                Ok((outcome, _)) => panic!("request {request}: {outcome:?}"),
                Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            },
            None => tokio::time::sleep(Duration::from_millis(5)).await,
        }
        request += 1;
    }
    acknowledged
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_from_another_cluster_or_for_another_replica_is_refused() {
    let group = Group::of(1).await;
    group.leader().await;
    let replica = group.replica(0);
    let url = format!("http://{}", replica.peer().peer_addr);
    let call = |cluster: String, to: u64| {
        let url = url.clone();
        async move {
            let mut client = PeerClient::connect(url).await.expect("connected");
            let mut request = tonic::Request::new(ReadIndexRequest {});
            request.metadata_mut().insert("ares-cluster", cluster.parse().expect("ASCII"));
            request.metadata_mut().insert("ares-replica", to.into());
            client.read_index(request).await.map_err(|status| status.code())
        }
    };
    let (cluster, id) = (replica.cluster().to_string(), replica.id());
    call(cluster.clone(), id).await.expect("the call of a peer");
    assert_eq!(call("0".repeat(32), id).await.err(), Some(Code::FailedPrecondition));
    assert_eq!(call(cluster, id ^ 1).await.err(), Some(Code::FailedPrecondition));
    group.stop_all().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_concluded_in_one_term_is_not_proposed_in_another() {
    let group = Group::of(1).await;
    let leader = group.replica(group.leader().await);
    let term = leader.leadership().borrow().as_ref().map(|office| office.term).expect("it leads");
    let before = leader.state().meta.applied.index;
    let late = leader.propose_in(session(1), term - 1).await;
    assert!(matches!(late, Err(ProposeError::NotLeader(_))), "{late:?}");
    assert_eq!(leader.state().meta.applied.index, before);
    leader.propose_in(session(1), term).await.expect("in its own term");
    group.stop_all().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_gives_no_quorum_check_of_its_own() {
    let group = Group::of(3).await;
    let leader = group.leader().await;
    for (n, replica) in group.running() {
        assert_eq!(replica.reads().leader_index().await.is_ok(), n == leader, "replica {n}");
        replica.read_index().await.expect("through the leader");
    }
    group.stop_all().await;
}
