//! From what the leader wants to what must be done here: a pure function of the whole desired set and the whole actual
//! state. It is asked again after every change, so a step that could not be taken yet is found again.

use std::collections::{BTreeMap, BTreeSet};

use proto::v1::DesiredLease;

use super::part::{Part, Rank};
use crate::shim::watch::SIGTERM;

/// The verdict after which a job goes back to the queue as it was.
const PREEMPTED: &str = "PREEMPTED";

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Prepare it, or start it at once where the barrier is open.
    Launch { token: u64, open: bool },
    /// The barrier opened.
    Open { token: u64 },
    /// Signal, grace, kill.
    Stop { token: u64, signal: u8, grace_ms: u64 },
    /// It is to end, and was never taken up here: its part is free at once.
    Decline { token: u64 },
}

/// `desired`: the newest set; `actual`: every attempt that is alive here or whose end is not settled; `ended`: settled
/// ones, which are never taken up again.
pub fn reconcile(desired: &[DesiredLease], actual: &BTreeMap<u64, Part>, ended: impl Fn(u64) -> bool) -> Vec<Step> {
    let mut steps = Vec::new();
    let wanted: BTreeSet<u64> = desired.iter().map(|lease| lease.token).collect();
    for (token, part) in actual {
        if !wanted.contains(token) {
            stop(&mut steps, *token, part, (SIGTERM, part.grace_ms));
        }
    }
    for lease in desired {
        let token = lease.token;
        match actual.get(&token) {
            Some(part) if !lease.stop.is_empty() => {
                stop(&mut steps, token, part, (signal_of(lease), lease.kill_grace_ms));
            }
            Some(part) if part.ranks.contains(&Rank::Vanished) || part.failure().is_some() => {
                stop(&mut steps, token, part, (SIGTERM, part.grace_ms));
            }
            Some(part) => {
                if lease.go && !part.open && part.ranks.contains(&Rank::Waiting) {
                    steps.push(Step::Open { token });
                }
            }
            None if ended(token) => {}
            None if !lease.stop.is_empty() => steps.push(Step::Decline { token }),
            None if gpu_in_use(lease, actual) => {}
            None => steps.push(Step::Launch { token, open: lease.nodes == 1 || lease.go }),
        }
    }
    steps
}

/// Once; a part whose shims are still being started is stopped when they are there.
fn stop(steps: &mut Vec<Step>, token: u64, part: &Part, (signal, grace_ms): (u8, u64)) {
    if part.is_alive() && !part.stopping && !part.ranks.contains(&Rank::Launching) {
        steps.push(Step::Stop { token, signal, grace_ms });
    }
}

/// A job that will run again may have asked for another signal, on which it saves its work.
fn signal_of(lease: &DesiredLease) -> u8 {
    match u8::try_from(lease.checkpoint_signal) {
        Ok(signal) if signal > 0 && lease.stop == PREEMPTED => signal,
        _ => SIGTERM,
    }
}

fn gpu_in_use(lease: &DesiredLease, actual: &BTreeMap<u64, Part>) -> bool {
    let mut busy = actual.values().filter(|part| part.is_alive()).flat_map(|part| &part.gpus);
    busy.any(|gpu| lease.gpu_uuids.contains(gpu))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shim::record::Outcome;

    fn lease(token: u64) -> DesiredLease {
        DesiredLease { token, ranks: 1, nodes: 1, go: true, ttl_ms: 40_000, kill_grace_ms: 7, ..Default::default() }
    }

    fn gang(token: u64, go: bool) -> DesiredLease {
        DesiredLease { nodes: 2, go, ..lease(token) }
    }

    fn with(lease: &DesiredLease, rank: Rank) -> BTreeMap<u64, Part> {
        BTreeMap::from([(lease.token, Part::new(lease, rank))])
    }

    fn never(_: u64) -> bool {
        false
    }

    #[test]
    fn a_new_lease_is_launched_and_a_known_one_is_not() {
        let want = [lease(1)];
        assert_eq!(reconcile(&want, &BTreeMap::new(), never), vec![Step::Launch { token: 1, open: true }]);
        assert_eq!(reconcile(&want, &with(&want[0], Rank::Launching), never), vec![]);
        assert_eq!(reconcile(&want, &with(&want[0], Rank::Started), never), vec![]);
    }

    #[test]
    fn an_attempt_that_ended_here_is_not_taken_up_again() {
        assert_eq!(reconcile(&[lease(1)], &BTreeMap::new(), |token| token == 1), vec![]);
    }

    #[test]
    fn a_gang_over_nodes_is_prepared_and_opened_once() {
        let mut actual = BTreeMap::new();
        assert_eq!(reconcile(&[gang(1, false)], &actual, never), vec![Step::Launch { token: 1, open: false }]);
        actual = with(&gang(1, false), Rank::Waiting);
        assert_eq!(reconcile(&[gang(1, false)], &actual, never), vec![]);
        assert_eq!(reconcile(&[gang(1, true)], &actual, never), vec![Step::Open { token: 1 }]);
        actual.get_mut(&1).unwrap().open = true;
        assert_eq!(reconcile(&[gang(1, true)], &actual, never), vec![]);
    }

    #[test]
    fn what_the_set_lacks_is_stopped_once() {
        let mut actual = with(&lease(1), Rank::Started);
        assert_eq!(reconcile(&[], &actual, never), vec![Step::Stop { token: 1, signal: 15, grace_ms: 7 }]);
        actual.get_mut(&1).unwrap().stopping = true;
        assert_eq!(reconcile(&[], &actual, never), vec![]);
    }

    #[test]
    fn only_a_preemption_is_told_by_the_jobs_own_signal() {
        for (stop, signal) in [("PREEMPTED", 10), ("CANCELLED", 15), ("LOST", 15)] {
            let want = [DesiredLease { stop: stop.into(), checkpoint_signal: 10, ..lease(1) }];
            let steps = reconcile(&want, &with(&want[0], Rank::Started), never);
            assert_eq!(steps, vec![Step::Stop { token: 1, signal, grace_ms: 7 }], "{stop}");
        }
    }

    #[test]
    fn a_stop_waits_until_the_shims_are_there() {
        let want = [DesiredLease { stop: "CANCELLED".into(), ..lease(1) }];
        assert_eq!(reconcile(&want, &with(&want[0], Rank::Launching), never), vec![]);
        assert_eq!(
            reconcile(&want, &with(&want[0], Rank::Started), never),
            vec![Step::Stop { token: 1, signal: 15, grace_ms: 7 }]
        );
    }

    #[test]
    fn a_lease_that_is_to_end_before_it_began_is_declined() {
        let want = [DesiredLease { stop: "CANCELLED".into(), ..lease(1) }];
        assert_eq!(reconcile(&want, &BTreeMap::new(), never), vec![Step::Decline { token: 1 }]);
    }

    #[test]
    fn a_gpu_is_not_given_to_a_second_attempt_while_the_first_lives() {
        let old = DesiredLease { gpu_uuids: vec!["GPU-a".into()], ..lease(1) };
        let new = DesiredLease { gpu_uuids: vec!["GPU-a".into()], ..lease(2) };
        let mut actual = with(&old, Rank::Started);
        assert_eq!(
            reconcile(std::slice::from_ref(&new), &actual, never),
            vec![Step::Stop { token: 1, signal: 15, grace_ms: 7 }]
        );
        actual.get_mut(&1).unwrap().ranks[0] = Rank::Ended(Outcome::NeverStarted);
        assert_eq!(reconcile(&[new], &actual, never), vec![Step::Launch { token: 2, open: true }]);
    }

    #[test]
    fn the_ranks_beside_a_vanished_shim_are_stopped() {
        let want = [DesiredLease { ranks: 2, ..lease(1) }];
        let mut actual = with(&want[0], Rank::Started);
        actual.get_mut(&1).unwrap().ranks[0] = Rank::Vanished;
        assert_eq!(reconcile(&want, &actual, never), vec![Step::Stop { token: 1, signal: 15, grace_ms: 7 }]);
    }
}
