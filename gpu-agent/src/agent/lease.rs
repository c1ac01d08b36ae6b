//! How long the attempts of this machine may live: heartbeats and deadlines, pure. `now` is ms of CLOCK_BOOTTIME.
//!
//! The inequality that it rests on: an acknowledgement of a heartbeat *sent* at `s` moves a deadline to `s + ttl`; the
//! leader received that heartbeat at `r >= s`, and ends the lease at `r + ttl x 1.01 + margin` at the earliest. So, with
//! clock rates within 1 %, the processes are dead before their GPUs are granted again.

use std::collections::{BTreeMap, VecDeque};

use planted::{Bug, planted};

/// Heartbeats whose acknowledgement may still come; older ones extend nothing.
const REMEMBERED: usize = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Held {
    ttl_ms: u64,
    deadline: u64,
}

/// The keeper of one registration's heartbeats, and of the deadlines of all live attempts.
#[derive(Clone, Debug, Default)]
pub struct Keeper {
    number: u64,
    sent: VecDeque<(u64, u64)>,
    last_acked_sent: Option<u64>,
    held: BTreeMap<u64, Held>,
}

impl Keeper {
    /// A new epoch: heartbeats count from one again, and those of the old epoch extend nothing any more. Deadlines stay.
    pub fn new_epoch(&mut self) {
        self.number = 0;
        self.sent.clear();
        self.last_acked_sent = None;
    }

    /// The next heartbeat's number; it counts as sent now, before it is.
    pub fn beat(&mut self, now: u64) -> u64 {
        self.number += 1;
        if self.sent.len() == REMEMBERED {
            self.sent.pop_front();
        }
        self.sent.push_back((self.number, now));
        self.number
    }

    /// The deadline of an attempt that starts: from the last acknowledged heartbeat of this epoch. `None` when less than
    /// `grace_ms` would be left, or nothing was acknowledged yet: a heartbeat must come first.
    pub fn hold(&mut self, token: u64, ttl_ms: u64, grace_ms: u64, now: u64) -> Option<u64> {
        let deadline = self.last_acked_sent?.saturating_add(ttl_ms);
        if deadline <= now.saturating_add(grace_ms) {
            return None;
        }
        self.held.insert(token, Held { ttl_ms, deadline });
        Some(deadline)
    }

    /// An attempt found running, with the deadline that its shim has.
    pub fn adopt(&mut self, token: u64, ttl_ms: u64, deadline: u64) {
        self.held.insert(token, Held { ttl_ms, deadline });
    }

    pub fn release(&mut self, token: u64) {
        self.held.remove(&token);
    }

    /// An acknowledgement: the deadlines that it moved, none back. Only named tokens are extended, and none whose deadline
    /// has passed: a machine that was suspended finds what it must kill, whoever hears what first after it woke.
    pub fn acked(&mut self, number: u64, tokens: &[u64], now: u64) -> Vec<(u64, u64)> {
        let Some(&(_, sent)) = self.sent.iter().find(|(known, _)| *known == number) else {
            return Vec::new();
        };
        let sent = if planted(Bug::DeadlineFromAck) { now } else { sent };
        self.last_acked_sent = self.last_acked_sent.max(Some(sent));
        let mut moved = Vec::new();
        for token in tokens {
            if let Some(held) = self.held.get_mut(token) {
                let deadline = sent.saturating_add(held.ttl_ms);
                if deadline > held.deadline && now < held.deadline {
                    held.deadline = deadline;
                    moved.push((*token, deadline));
                }
            }
        }
        moved
    }

    /// Send time of the newest acknowledged heartbeat of this epoch.
    pub fn last_acked_sent(&self) -> Option<u64> {
        self.last_acked_sent
    }

    pub fn deadline(&self, token: u64) -> Option<u64> {
        self.held.get(&token).map(|held| held.deadline)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn keeper() -> Keeper {
        let mut keeper = Keeper::default();
        let first = keeper.beat(1_000);
        keeper.acked(first, &[], 1_000);
        keeper
    }

    #[test]
    fn a_deadline_that_has_passed_is_not_moved_any_more() {
        for (now, moved) in [(10_999, vec![(7, 13_000)]), (11_000, vec![]), (400_000, vec![])] {
            let mut keeper = keeper();
            keeper.hold(7, 10_000, 0, 1_000);
            let number = keeper.beat(3_000);
            assert_eq!(keeper.acked(number, &[7], now), moved, "at {now}");
        }
    }

    #[test]
    fn ack_extends_only_named_tokens() {
        let mut keeper = keeper();
        keeper.hold(7, 10_000, 0, 1_000);
        keeper.hold(8, 10_000, 0, 1_000);
        let number = keeper.beat(3_000);
        assert_eq!(keeper.acked(number, &[7], 0), vec![(7, 13_000)]);
        assert_eq!(keeper.deadline(8), Some(11_000));
    }

    #[test]
    fn deadline_counts_from_send_not_from_ack() {
        let mut keeper = keeper();
        keeper.hold(7, 10_000, 0, 1_000);
        let number = keeper.beat(3_000);
        // The acknowledgement takes five seconds: nothing in it says so.
        assert_eq!(keeper.acked(number, &[7], 0), vec![(7, 13_000)]);
        assert_eq!(keeper.hold(9, 10_000, 0, 8_000), Some(13_000));
    }

    #[test]
    fn first_deadline_is_the_last_acked_heartbeat_plus_ttl() {
        let mut keeper = keeper();
        keeper.beat(3_000);
        assert_eq!(keeper.hold(7, 10_000, 0, 3_500), Some(11_000));
    }

    #[test]
    fn a_start_with_less_than_the_grace_left_waits_for_a_heartbeat() {
        let mut keeper = keeper();
        assert_eq!(keeper.hold(7, 10_000, 2_500, 8_500), None);
        let number = keeper.beat(8_600);
        keeper.acked(number, &[], 0);
        assert_eq!(keeper.hold(7, 10_000, 2_500, 8_700), Some(18_600));
    }

    #[test]
    fn nothing_starts_before_the_first_ack_of_an_epoch() {
        let mut keeper = keeper();
        keeper.new_epoch();
        assert_eq!(keeper.hold(7, 10_000, 0, 1_500), None);
    }

    #[test]
    fn a_heartbeat_of_an_older_epoch_extends_nothing() {
        let mut keeper = keeper();
        keeper.hold(7, 10_000, 0, 1_000);
        let old = keeper.beat(3_000);
        keeper.new_epoch();
        assert_eq!(keeper.acked(old, &[7], 0), vec![]);
        assert_eq!(keeper.deadline(7), Some(11_000));
    }

    #[test]
    fn acks_out_of_order_move_no_deadline_back() {
        let mut keeper = keeper();
        keeper.hold(7, 10_000, 0, 1_000);
        let early = keeper.beat(3_000);
        let late = keeper.beat(5_000);
        assert_eq!(keeper.acked(late, &[7], 0), vec![(7, 15_000)]);
        assert_eq!(keeper.acked(early, &[7], 0), vec![]);
        assert_eq!(keeper.deadline(7), Some(15_000));
    }

    #[test]
    fn an_ack_nobody_asked_for_extends_nothing() {
        let mut keeper = keeper();
        keeper.hold(7, 10_000, 0, 1_000);
        assert_eq!(keeper.acked(99, &[7], 0), vec![]);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
        /// Whatever is acknowledged in whatever order, a deadline is the send time of an acknowledged heartbeat that
        /// named the token (or of the last acknowledged one at its start) plus its ttl.
        #[test]
        fn no_deadline_is_later_than_the_last_naming_send_plus_ttl(
            steps in proptest::collection::vec((1u64..3_000, any::<bool>(), 0usize..6, any::<bool>()), 1..80)
        ) {
            let mut keeper = keeper();
            let mut now = 1_000;
            keeper.hold(7, 10_000, 0, now);
            let mut allowed = 11_000;
            let mut beats: Vec<(u64, u64)> = Vec::new();
            for (wait, beat, which, named) in steps {
                now += wait;
                if beat {
                    beats.push((keeper.beat(now), now));
                } else if let Some((number, sent)) = beats.iter().rev().nth(which).copied() {
                    keeper.acked(number, if named { &[7] } else { &[] }, 0);
                    if named { allowed = allowed.max(sent + 10_000); }
                }
                prop_assert_eq!(keeper.deadline(7), Some(allowed));
            }
        }
    }
}
