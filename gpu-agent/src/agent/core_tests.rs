//! The agent's pure step, event by event; and a random world around it that must never see an attempt started twice, or
//! kept alive without an acknowledgement.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use proto::v1::leader_message::What;
use proto::v1::{self, report_item};

use super::core::{Action, Core, Event, Launch};
use super::part::{Part, Rank};
use crate::shim::record::{Cause, Exit, Outcome};

const CLUSTER: &str = "c0";

fn message(what: What) -> Event {
    Event::FromLeader(v1::LeaderMessage { what: Some(what) })
}

fn ack(epoch: u64, heartbeat: u64, tokens: &[u64]) -> Event {
    message(What::Ack(v1::HeartbeatAck { epoch, heartbeat, tokens: tokens.to_vec(), incarnation: 1 }))
}

fn desired_of(incarnation: u32, epoch: u64, index: u64, leases: Vec<v1::DesiredLease>) -> Event {
    message(What::Desired(v1::Desired { cluster_id: CLUSTER.into(), incarnation, epoch, index, leases }))
}

fn desired(index: u64, leases: Vec<v1::DesiredLease>) -> Event {
    desired_of(1, 1, index, leases)
}

fn lease(token: u64) -> v1::DesiredLease {
    v1::DesiredLease {
        token,
        job_id: token,
        ranks: 1,
        ttl_ms: 10_000,
        kill_grace_ms: 1_000,
        go: true,
        nodes: 1,
        ..Default::default()
    }
}

fn body(job_id: u64) -> v1::JobBody {
    v1::JobBody { job_id, argv: vec!["true".into()], ..Default::default() }
}

fn registered(epoch: u64) -> Event {
    Event::Registered(v1::RegisterReply {
        node_id: 3,
        epoch,
        cluster_id: CLUSTER.into(),
        heartbeat_ms: 2_000,
        incarnation: 1,
    })
}

fn ended(code: i32) -> Rank {
    Rank::Ended(Outcome::Exited { exit: Exit { code, signal: 0 }, cause: Cause::Own })
}

fn items(actions: &[Action]) -> Vec<v1::ReportItem> {
    let of = |action: &Action| match action {
        Action::Report(items) => items.clone(),
        _ => Vec::new(),
    };
    actions.iter().flat_map(of).collect()
}

fn launches(actions: &[Action]) -> Vec<Launch> {
    let of = |action: &Action| match action {
        Action::Launch { launches, .. } => launches.clone(),
        _ => Vec::new(),
    };
    actions.iter().flat_map(of).collect()
}

fn registers(actions: &[Action]) -> Option<super::core::Listing> {
    actions.iter().find_map(|action| match action {
        Action::Register(listing) => Some(listing.clone()),
        _ => None,
    })
}

fn heartbeat(actions: &[Action]) -> Option<(u64, Vec<u64>)> {
    actions.iter().find_map(|action| match action {
        Action::Heartbeat { number, tokens } => Some((*number, tokens.clone())),
        _ => None,
    })
}

/// Registered at 1,000 with epoch 1, its first heartbeat acknowledged.
fn core() -> Core {
    let mut core = Core::new((0, 0));
    assert!(registers(&core.step(Event::Tick, 1_000)).is_some());
    assert!(core.step(registered(1), 1_000).contains(&Action::Connect));
    let (number, _) = heartbeat(&core.step(Event::Connected, 1_000)).unwrap();
    core.step(ack(1, number, &[]), 1_000);
    core
}

/// With one attempt running that the leader knows of.
fn running(token: u64) -> Core {
    let mut core = core();
    core.step(desired(5, vec![lease(token)]), 1_000);
    core.step(Event::Bodies(vec![body(token)]), 1_000);
    let actions = core.step(Event::Launched { token, port: 29_500, ranks: vec![Rank::Started] }, 1_100);
    assert!(matches!(items(&actions)[0].what, Some(report_item::What::Started(_))));
    core.step(Event::Reported(vec![String::new()]), 1_100);
    core
}

#[test]
fn a_lease_is_fetched_launched_started_and_its_end_told() {
    let mut core = core();
    assert_eq!(core.step(desired(5, vec![lease(7)]), 1_100), vec![Action::Fetch(vec![7])]);
    let actions = core.step(Event::Bodies(vec![body(7)]), 1_200);
    let launches = launches(&actions);
    assert_eq!((launches[0].lease.token, launches[0].deadline, launches[0].open), (7, 11_000, true));
    core.step(Event::Launched { token: 7, port: 1, ranks: vec![Rank::Started] }, 1_300);
    core.step(Event::Reported(vec![String::new()]), 1_300);
    let actions = core.step(Event::Rank { token: 7, local: 0, rank: ended(0) }, 1_400);
    let Some(report_item::What::Exited(exited)) = items(&actions)[0].what.clone() else { panic!("{actions:?}") };
    assert!(exited.released);
    let actions = core.step(Event::Reported(vec![String::new()]), 1_500);
    assert_eq!(actions, vec![Action::Forget(vec![7])]);
    assert_eq!(core.step(desired(6, vec![lease(7)]), 1_600), vec![], "never twice");
}

#[test]
fn an_end_that_comes_before_its_launch_is_told_stands() {
    let mut core = core();
    core.step(desired(5, vec![v1::DesiredLease { ranks: 2, ..lease(7) }]), 1_000);
    core.step(Event::Bodies(vec![body(7)]), 1_000);
    assert_eq!(core.step(Event::Rank { token: 7, local: 0, rank: ended(0) }, 1_100), vec![]);
    let launched = Event::Launched { token: 7, port: 1, ranks: vec![Rank::Started, Rank::Started] };
    let told = items(&core.step(launched, 1_200));
    assert!(matches!(told[0].what, Some(report_item::What::Started(_))), "{told:?}");
    assert!(matches!(told[1].what, Some(report_item::What::Exited(_))), "{told:?}");
    core.step(Event::Reported(vec![String::new(); 2]), 1_200);
    let actions = core.step(Event::Rank { token: 7, local: 1, rank: ended(0) }, 1_300);
    let Some(report_item::What::Exited(exited)) = items(&actions)[0].what.clone() else { panic!("{actions:?}") };
    assert!(exited.released);
}

#[test]
fn lower_desired_index_is_ignored() {
    let mut core = running(7);
    assert_eq!(core.step(desired(4, vec![]), 1_200), vec![]);
    assert_eq!(core.step(desired_of(0, 1, 99, vec![]), 1_200), vec![]);
    let stop = Action::Stop { token: 7, signal: 15, grace_ms: 1_000 };
    assert_eq!(core.step(desired(6, vec![]), 1_200), vec![stop]);
}

#[test]
fn the_fence_files_index_counts_after_a_restart() {
    let mut core = Core::new((1, 50));
    core.step(Event::Tick, 0);
    core.step(registered(1), 0);
    assert_eq!(core.step(desired(49, vec![lease(7)]), 0), vec![]);
    assert_eq!(core.step(desired(50, vec![lease(7)]), 0), vec![Action::Fetch(vec![7])]);
}

#[test]
fn a_set_of_another_epoch_or_cluster_is_ignored() {
    let mut core = running(7);
    assert_eq!(core.step(desired_of(1, 2, 9, vec![]), 1_200), vec![]);
    let other = v1::Desired { cluster_id: "other".into(), incarnation: 1, epoch: 1, index: 9, leases: vec![] };
    assert_eq!(core.step(message(What::Desired(other)), 1_200), vec![]);
}

#[test]
fn an_ack_extends_what_it_names_and_an_old_epochs_ack_nothing() {
    let mut core = running(7);
    let (number, tokens) = heartbeat(&core.step(Event::Tick, 3_000)).unwrap();
    assert_eq!(tokens, vec![7]);
    assert_eq!(core.step(ack(0, number, &[7]), 3_100), vec![]);
    assert_eq!(core.step(ack(1, number, &[8]), 3_100), vec![]);
    let extend = Action::Extend { token: 7, deadline: 13_000 };
    assert_eq!(core.step(ack(1, number, &[7]), 3_900), vec![extend]);
}

#[test]
fn an_older_incarnations_ack_extends_nothing() {
    let mut core = running(7);
    core.step(desired_of(2, 1, 1, vec![lease(7)]), 1_200);
    let (number, _) = heartbeat(&core.step(Event::Tick, 3_000)).unwrap();
    assert_eq!(core.step(ack(1, number, &[7]), 3_100), vec![]);
}

#[test]
fn heartbeats_go_out_every_interval_and_silence_leads_to_another_replica() {
    let mut core = core();
    assert_eq!(core.next_wake(1_000), 3_000);
    assert_eq!(core.step(Event::Tick, 2_999), vec![]);
    for now in [3_000, 5_000, 7_000] {
        assert!(heartbeat(&core.step(Event::Tick, now)).is_some());
    }
    assert_eq!(core.step(Event::Tick, 9_000), vec![Action::Connect]);
    assert_eq!(core.step(Event::Tick, 9_100), vec![], "once");
}

#[test]
fn a_start_that_would_have_less_than_its_grace_left_heartbeats_first() {
    let mut core = core();
    core.step(desired(5, vec![lease(7)]), 1_000);
    // The last acknowledged heartbeat was sent at 1,000: 500 ms would be left.
    let actions = core.step(Event::Bodies(vec![body(7)]), 10_500);
    assert_eq!(launches(&actions), vec![]);
    let actions = core.step(Event::Connected, 10_500);
    let (number, _) = heartbeat(&actions).unwrap();
    core.step(desired(5, vec![lease(7)]), 10_500);
    let launches = launches(&core.step(ack(1, number, &[]), 10_600));
    assert_eq!(launches[0].deadline, 20_500);
}

#[test]
fn a_new_session_starts_nothing_of_an_older_set() {
    let mut core = core();
    core.step(desired(5, vec![lease(7)]), 1_000);
    core.step(Event::Disconnected, 2_000);
    let (number, _) = heartbeat(&core.step(Event::Connected, 30_000)).unwrap();
    core.step(Event::Bodies(vec![body(7)]), 30_000);
    // What was in the set may have been ended meanwhile; the leader's present one says so.
    assert_eq!(launches(&core.step(ack(1, number, &[]), 30_010)), vec![]);
    assert_eq!(launches(&core.step(desired(9, vec![]), 30_020)), vec![]);
}

#[test]
fn a_report_without_an_answer_is_made_again_after_a_growing_wait() {
    let mut core = running(7);
    let first = items(&core.step(Event::Rank { token: 7, local: 0, rank: ended(3) }, 2_000));
    core.step(Event::ReportFailed { stale_epoch: false }, 2_100);
    assert_eq!(items(&core.step(Event::Tick, 2_150)), vec![]);
    assert!(core.next_wake(2_150) <= 2_200);
    assert_eq!(items(&core.step(Event::Tick, 2_200)), first);
}

#[test]
fn a_refusal_is_final_but_for_a_stale_epoch() {
    let mut core = running(7);
    core.step(Event::Rank { token: 7, local: 0, rank: ended(3) }, 2_000);
    let actions = core.step(Event::Reported(vec!["EPOCH_STALE".into()]), 2_000);
    let listing = registers(&actions).unwrap();
    assert_eq!(listing.finished[0].token, 7);
    let mut core = running(7);
    core.step(Event::Rank { token: 7, local: 0, rank: ended(3) }, 2_000);
    let actions = core.step(Event::Reported(vec!["TOKEN_STALE".into()]), 2_000);
    assert_eq!(actions, vec![Action::Forget(vec![7])]);
}

#[test]
fn a_registration_lists_what_runs_what_ended_and_what_is_dead() {
    let mut core = Core::new((1, 5));
    let part = |token| Part::new(&lease(token), Rank::Vanished);
    let mut alive = part(1);
    alive.ranks[0] = Rank::Started;
    core.adopt(1, alive, 9_000, false, 0);
    let mut over = part(2);
    over.ranks[0] = ended(4);
    core.adopt(2, over.clone(), 0, false, 0);
    core.adopt(3, part(3), 0, false, 0);
    core.adopt(4, over, 0, true, 0);
    let listing = registers(&core.step(Event::Tick, 0)).unwrap();
    assert_eq!(listing.running.iter().map(|part| (part.token, part.started)).collect::<Vec<_>>(), vec![(1, true)]);
    assert_eq!(listing.finished.iter().map(|part| part.token).collect::<Vec<_>>(), vec![2, 4]);
    assert_eq!(listing.dead, vec![3]);
    let actions = core.step(registered(9), 100);
    assert!(actions.contains(&Action::Forget(vec![3, 2])), "{actions:?}");
    // The one that runs is told as started once more: the answer to the first time may have been lost.
    assert_eq!(items(&actions).iter().map(|item| item.token).collect::<Vec<_>>(), vec![1]);
}

#[test]
fn a_shim_that_vanished_is_told_by_a_new_registration_once_the_rest_is_gone() {
    let mut core = core();
    core.step(desired(5, vec![v1::DesiredLease { ranks: 2, ..lease(7) }]), 1_000);
    core.step(Event::Bodies(vec![body(7)]), 1_000);
    core.step(Event::Launched { token: 7, port: 1, ranks: vec![Rank::Started, Rank::Started] }, 1_000);
    core.step(Event::Reported(vec![String::new()]), 1_000);
    let actions = core.step(Event::Rank { token: 7, local: 0, rank: Rank::Vanished }, 2_000);
    assert_eq!(actions, vec![Action::Stop { token: 7, signal: 15, grace_ms: 1_000 }]);
    let actions = core.step(Event::Rank { token: 7, local: 1, rank: ended(0) }, 2_100);
    assert_eq!(registers(&actions).unwrap().dead, vec![7]);
    let actions = core.step(registered(2), 2_200);
    assert!(actions.contains(&Action::Forget(vec![7])));
}

/// One try of a registration may be recorded and its answer lost: the next is told so.
#[test]
fn an_overtaken_registration_is_written_anew_after_the_one_that_came_first() {
    let mut core = Core::new((0, 0));
    assert_eq!(registers(&core.step(Event::Tick, 0)).unwrap().after_epoch, 0);
    let listing = registers(&core.step(Event::Overtaken { epoch: 4 }, 10)).unwrap();
    assert_eq!(listing.after_epoch, 4);
    assert_eq!(core.epoch(), 0);
    assert!(core.step(registered(5), 20).contains(&Action::Connect));
    let why = v1::Reregister { reason: "node 3 is not known here".into(), superseded: false };
    assert_eq!(registers(&core.step(message(What::Reregister(why)), 30)).unwrap().after_epoch, 5);
}

/// Else the leader would keep what the registration listed as an orphan that nobody ever tells the end of.
#[test]
fn an_end_that_is_answered_while_a_registration_is_under_way_is_told_again_after_it() {
    let failed = |core: &mut Core| {
        core.step(desired(5, vec![lease(7)]), 1_000);
        core.step(Event::Bodies(vec![body(7)]), 1_000);
        let why = Outcome::LaunchFailed { node_fault: false, why: "no such command".into() };
        items(&core.step(Event::Launched { token: 7, port: 1, ranks: vec![Rank::Ended(why)] }, 1_000))
    };
    let why = v1::Reregister { reason: "node 3 is not known here".into(), superseded: false };
    for answered_first in [true, false] {
        let mut core = core();
        let said = failed(&mut core);
        assert_eq!(said.len(), 2, "{said:?}");
        let listing = registers(&core.step(message(What::Reregister(why.clone())), 1_010)).unwrap();
        assert_eq!(listing.running.iter().map(|part| part.token).collect::<Vec<_>>(), [7]);
        let (answer, reply) = (Event::Reported(vec![String::new(); 2]), registered(2));
        let (first, then) = if answered_first { (answer, reply) } else { (reply, answer) };
        core.step(first, 1_020);
        assert_eq!(items(&core.step(then, 1_030)), said, "answered first: {answered_first}");
    }
}

#[test]
fn a_superseded_agent_does_nothing_more() {
    let mut core = running(7);
    let why = v1::Reregister { reason: "node 3 registered again".into(), superseded: true };
    let actions = core.step(message(What::Reregister(why)), 2_000);
    assert_eq!(actions, vec![Action::Leave("node 3 registered again".into())]);
    assert_eq!(core.step(Event::Tick, 90_000), vec![]);
}

#[test]
fn an_agent_is_not_superseded_by_its_own_registration() {
    let mut core = running(7);
    let actions = core.step(Event::Rank { token: 7, local: 0, rank: Rank::Vanished }, 2_000);
    assert!(registers(&actions).is_some());
    // It was committed, and a heartbeat of before it is answered sooner than the registration itself.
    let why = v1::Reregister { reason: "epoch 1 is over".into(), superseded: true };
    assert_eq!(core.step(message(What::Reregister(why)), 2_010), vec![]);
    let actions = core.step(registered(2), 2_020);
    assert!(actions.contains(&Action::Connect), "{actions:?}");
    assert_eq!(core.epoch(), 2);
}

#[test]
fn an_attempt_that_may_be_alive_is_neither_taken_up_nor_told_as_gone() {
    let mut core = Core::new((1, 0));
    core.leave_alone(7);
    let listing = registers(&core.step(Event::Tick, 0)).unwrap();
    assert_eq!(listing, super::core::Listing::default());
    core.step(registered(1), 0);
    core.step(Event::Connected, 0);
    core.step(ack(1, 1, &[]), 0);
    let to_end = v1::DesiredLease { stop: "LOST".into(), ..lease(7) };
    assert_eq!(core.step(desired(5, vec![to_end]), 10), vec![]);
    assert_eq!(core.step(desired(6, vec![lease(7)]), 20), vec![]);
}

#[test]
fn an_attempt_left_alone_is_told_as_dead_once_it_is_found_so() {
    let mut core = Core::new((1, 0));
    core.leave_alone(7);
    core.step(Event::Tick, 0);
    core.step(registered(1), 0);
    let part = Part::new(&lease(7), Rank::Vanished);
    let actions = core.step(Event::Found { token: 7, part: part.clone(), deadline: 0 }, 50);
    assert_eq!(registers(&actions).unwrap().dead, vec![7]);
    core.step(registered(2), 60);
    // Told twice, it is no second attempt.
    assert_eq!(registers(&core.step(Event::Found { token: 7, part, deadline: 0 }, 70)), None);
}

#[test]
fn a_launch_that_failed_is_kept_by_a_registration_and_told_after_it() {
    let mut core = Core::new((1, 0));
    let failed = Rank::Ended(Outcome::LaunchFailed { node_fault: true, why: "no space".into() });
    core.adopt(7, Part::new(&lease(7), failed), 0, false, 0);
    let listing = registers(&core.step(Event::Tick, 0)).unwrap();
    assert_eq!(listing.running.iter().map(|part| (part.token, part.started)).collect::<Vec<_>>(), vec![(7, false)]);
    assert!(listing.dead.is_empty() && listing.finished.is_empty());
    let told = items(&core.step(registered(1), 10));
    assert!(matches!(told[0].what, Some(report_item::What::LaunchFailed(_))), "{told:?}");
}

#[test]
fn a_cluster_that_went_back_to_an_older_incarnation_is_left() {
    let mut core = Core::new((2, 5));
    core.step(Event::Tick, 0);
    let actions = core.step(registered(1), 0);
    assert!(matches!(actions[0], Action::Leave(_)), "{actions:?}");
}

#[test]
fn registering_waits_between_tries() {
    let mut core = Core::new((0, 0));
    assert!(registers(&core.step(Event::Tick, 0)).is_some());
    assert_eq!(core.step(Event::RegisterFailed, 10), vec![]);
    let wake = core.next_wake(10);
    assert!(wake > 10);
    assert!(registers(&core.step(Event::Tick, wake)).is_some());
}

/// A world of one agent: the leader grants, ends, acknowledges late or not at all; shims start, end, vanish; calls fail.
#[derive(Default)]
struct World {
    now: u64,
    epoch: u64,
    index: u64,
    token: u64,
    leases: Vec<v1::DesiredLease>,
    /// (epoch, number, sent)
    beats: Vec<(u64, u64, u64)>,
    started: BTreeSet<u64>,
    /// By token: deadline that its shim has.
    alive: BTreeMap<u64, u64>,
    /// By token: latest deadline that acknowledgements allow.
    allowed: BTreeMap<u64, u64>,
    asked: Vec<Event>,
    reports: Vec<usize>,
    registering: bool,
}

fn is_of(event: &Event, of: u64) -> bool {
    matches!(event, Event::Launched { token, .. } | Event::Rank { token, .. } if *token == of)
}

impl World {
    fn act(&mut self, actions: Vec<Action>) -> Result<(), TestCaseError> {
        for action in actions {
            match action {
                Action::Register(listing) => {
                    self.registering = true;
                    for token in listing.dead {
                        prop_assert!(!self.alive.contains_key(&token), "said dead, but alive");
                    }
                    for part in listing.running {
                        prop_assert!(self.started.contains(&part.token), "said running, but never started");
                    }
                }
                Action::Heartbeat { number, tokens } => {
                    for token in tokens {
                        let known =
                            self.alive.contains_key(&token) || self.asked.iter().any(|event| is_of(event, token));
                        prop_assert!(known, "token {token} is asked for, but gone");
                    }
                    self.beats.push((self.epoch, number, self.now));
                }
                Action::Fetch(jobs) => self.asked.push(Event::Bodies(jobs.into_iter().map(body).collect())),
                Action::Launch { launches, .. } => {
                    for launch in launches {
                        let token = launch.lease.token;
                        prop_assert!(self.started.insert(token), "token {token} started twice");
                        prop_assert!(launch.deadline > self.now + 1_000, "started with less than its grace");
                        let allowed = self.allowed.get(&0).copied().unwrap_or(0);
                        prop_assert!(launch.deadline <= allowed, "{} > {allowed}", launch.deadline);
                        self.alive.insert(token, launch.deadline);
                        self.allowed.insert(token, launch.deadline);
                        let ranks = vec![Rank::Started];
                        self.asked.push(Event::Launched { token, port: 1, ranks });
                    }
                }
                Action::Extend { token, deadline } => {
                    prop_assert!(deadline <= self.allowed.get(&token).copied().unwrap_or(0), "extended too far");
                    if let Some(at) = self.alive.get_mut(&token) {
                        *at = deadline.max(*at);
                    }
                }
                Action::Stop { token, .. } => {
                    if self.alive.remove(&token).is_some() {
                        self.asked.push(Event::Rank { token, local: 0, rank: ended(15) });
                    }
                }
                Action::Report(items) => self.reports.push(items.len()),
                Action::Open { .. } | Action::Connect | Action::Forget(_) | Action::Leave(_) => {}
            }
        }
        Ok(())
    }

    fn event(&mut self, kind: u8, pick: usize) -> Option<Event> {
        match kind {
            0 | 1 => Some(Event::Tick),
            2 => {
                self.token += 1;
                self.index += 1;
                self.leases.push(lease(self.token));
                Some(desired_of(1, self.epoch, self.index, self.leases.clone()))
            }
            3 if !self.leases.is_empty() => {
                self.index += 1;
                self.leases.remove(pick % self.leases.len());
                Some(desired_of(1, self.epoch, self.index, self.leases.clone()))
            }
            4 => {
                // A set from the past, delivered late.
                let some = self.leases.iter().take(pick % 3).cloned().collect();
                Some(desired_of(1, self.epoch, self.index.saturating_sub(1 + pick as u64 % 3), some))
            }
            5 | 6 if !self.beats.is_empty() => {
                let (epoch, number, sent) = self.beats[pick % self.beats.len()];
                let tokens: Vec<u64> = self.leases.iter().map(|lease| lease.token).collect();
                if epoch == self.epoch {
                    for token in tokens.iter().chain([&0]) {
                        let allowed = self.allowed.entry(*token).or_default();
                        *allowed = (*allowed).max(sent + 10_000);
                    }
                }
                Some(ack(epoch, number, &tokens))
            }
            7 => {
                let token = *self.alive.keys().nth(pick % self.alive.len().max(1))?;
                self.alive.remove(&token);
                let rank = if pick.is_multiple_of(4) { Rank::Vanished } else { ended(pick as i32 % 3) };
                Some(Event::Rank { token, local: 0, rank })
            }
            8 if !self.asked.is_empty() => Some(self.asked.remove(pick % self.asked.len())),
            9 if !self.reports.is_empty() => {
                let count = self.reports.remove(0);
                Some(match pick % 5 {
                    0 => Event::ReportFailed { stale_epoch: false },
                    1 => Event::Reported(vec!["TOKEN_STALE".into(); count]),
                    2 => Event::Reported(vec!["EPOCH_STALE".into(); count]),
                    _ => Event::Reported(vec![String::new(); count]),
                })
            }
            10 if self.registering => {
                self.registering = false;
                if pick.is_multiple_of(3) {
                    return Some(Event::RegisterFailed);
                }
                self.epoch += 1;
                self.allowed.remove(&0);
                Some(registered(self.epoch))
            }
            11 => Some(if pick.is_multiple_of(2) { Event::Connected } else { Event::Disconnected }),
            _ => None,
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_attempt_starts_twice_or_lives_past_what_was_acknowledged(
        steps in proptest::collection::vec((0u8..12, 0usize..64, 0u64..900), 20..250)
    ) {
        let mut core = Core::new((0, 0));
        let mut world = World { now: 1_000, ..World::default() };
        world.act(core.step(Event::Tick, world.now))?;
        for (kind, pick, wait) in steps {
            world.now += wait;
            // A shim kills at its own deadline, whatever the agent does.
            let due: Vec<u64> =
                world.alive.iter().filter(|(_, at)| **at <= world.now).map(|(token, _)| *token).collect();
            for token in due {
                world.alive.remove(&token);
                world.asked.push(Event::Rank { token, local: 0, rank: ended(9) });
            }
            if let Some(event) = world.event(kind, pick) {
                let actions = core.step(event, world.now);
                world.act(actions)?;
            }
        }
    }
}
