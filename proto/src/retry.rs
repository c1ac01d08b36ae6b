//! Which replica to ask next, and when: the client's retry as a pure step, without clock or socket.
//!
//! A call repeats the *same* request (and request id) until it is answered or its deadline passes. NOT_LEADER is
//! followed at once; without a hint, and when nobody answers, the client goes round the replicas with a growing wait. Between
//! two waits it asks nobody twice: followers go on naming a leader that died, and all who wait would ask without pause.
//! No try may spend the call's whole time: a replica that is frozen, or cut off, must leave time to ask the next one.

/// What happened to the last try.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The beginning, and the end of a wait.
    Ready,
    /// The replica named the leader, or knows of none.
    NotLeader(Option<String>),
    /// The request surely did not reach a replica, or the replica is stopping.
    Unreachable,
    /// Sent, but not answered: it may have taken effect.
    Lost,
    /// The replica is over a bound and says when to come back.
    Busy { retry_ms: u64 },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Ask this address, and wait for its answer so long.
    Call { addr: String, timeout_ms: u64 },
    /// Then step with [`Event::Ready`].
    Wait { ms: u64 },
    /// The deadline has passed, or too little time is left to ask once more.
    GiveUp,
}

/// First wait of a round without an answer, in ms; doubles up to the maximum.
const WAIT_FIRST_MS: u64 = 10;
const WAIT_MAX_MS: u64 = 80;

/// A try gets half of the time that is left, but no less than this (as far as it is there).
const TRY_MIN_MS: u64 = 250;
/// With less time none is made but the first: unanswered, it would only make a sure refusal an unknown outcome.
const TRY_WORTH_MS: u64 = 100;

/// One call's way through the replicas.
#[derive(Clone, Debug)]
pub struct Retry {
    servers: Vec<String>,
    at: usize,
    target: Option<String>,
    /// Since the last wait.
    asked: Vec<String>,
    wait_ms: u64,
    has_tried: bool,
    deadline_ms: u64,
    try_timeout_ms: u64,
}

impl Retry {
    /// Begins at `first` where the client knows a leader, else at the `start`-th server. A try is given up after
    /// `try_timeout_ms` or half of what is left, the whole call at `deadline_ms` on the caller's clock.
    pub fn new(
        servers: Vec<String>,
        first: Option<String>,
        start: usize,
        deadline_ms: u64,
        try_timeout_ms: u64,
    ) -> Self {
        let at = if servers.is_empty() { 0 } else { start % servers.len() };
        Self {
            servers,
            at,
            target: first,
            asked: Vec::new(),
            wait_ms: WAIT_FIRST_MS,
            has_tried: false,
            deadline_ms,
            try_timeout_ms,
        }
    }

    pub fn step(&mut self, event: Event, now_ms: u64) -> Action {
        if now_ms >= self.deadline_ms || (self.servers.is_empty() && self.target.is_none()) {
            return Action::GiveUp;
        }
        match event {
            Event::Ready => self.call(now_ms),
            Event::NotLeader(Some(addr)) if !self.asked.contains(&addr) => {
                self.target = Some(addr);
                self.call(now_ms)
            }
            Event::NotLeader(_) | Event::Lost => {
                self.next_server();
                self.wait(now_ms)
            }
            Event::Unreachable => {
                self.next_server();
                let round = self.servers.iter().cycle().skip(self.at).take(self.servers.len());
                match round.zip(self.at..).find(|(addr, _)| !self.asked.contains(addr)) {
                    Some((_, at)) => {
                        self.at = at % self.servers.len();
                        self.call(now_ms)
                    }
                    None => self.wait(now_ms),
                }
            }
            Event::Busy { retry_ms } => Action::Wait { ms: retry_ms.clamp(1, self.deadline_ms - now_ms) },
        }
    }

    fn call(&mut self, now_ms: u64) -> Action {
        let left = self.deadline_ms - now_ms;
        if std::mem::replace(&mut self.has_tried, true) && left < TRY_WORTH_MS {
            return Action::GiveUp;
        }
        let addr = match &self.target {
            Some(addr) => addr.clone(),
            None => self.servers[self.at].clone(),
        };
        self.asked.push(addr.clone());
        let share = (left / 2).max(TRY_MIN_MS);
        Action::Call { addr, timeout_ms: self.try_timeout_ms.min(share).min(left).max(1) }
    }

    /// A target that failed is forgotten; then the list, one after the other.
    fn next_server(&mut self) {
        if self.target.take().is_none() && !self.servers.is_empty() {
            self.at = (self.at + 1) % self.servers.len();
        }
    }

    fn wait(&mut self, now_ms: u64) -> Action {
        self.asked.clear();
        let ms = self.wait_ms.min(self.deadline_ms - now_ms);
        self.wait_ms = (self.wait_ms * 2).min(WAIT_MAX_MS);
        Action::Wait { ms }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn retry() -> Retry {
        Retry::new(vec!["a".into(), "b".into(), "c".into()], None, 0, 10_000, 1_000)
    }

    fn call(addr: &str) -> Action {
        Action::Call { addr: addr.into(), timeout_ms: 1_000 }
    }

    #[test]
    fn a_leader_hint_is_followed_at_once() {
        let mut retry = retry();
        assert_eq!(retry.step(Event::Ready, 0), call("a"));
        assert_eq!(retry.step(Event::NotLeader(Some("c".into())), 1), call("c"));
    }

    #[test]
    fn replicas_that_name_each_other_do_not_make_a_busy_loop() {
        let mut retry = retry();
        retry.step(Event::Ready, 0);
        let waited = (0..10).any(|i| {
            let hint = if i % 2 == 0 { "b" } else { "c" };
            matches!(retry.step(Event::NotLeader(Some(hint.into())), i), Action::Wait { .. })
        });
        assert!(waited);
    }

    #[test]
    fn a_dead_leader_that_followers_name_is_asked_once_a_round() {
        let mut retry = retry();
        let dead = || Event::NotLeader(Some("c".into()));
        assert_eq!(retry.step(Event::Ready, 0), call("a"));
        assert_eq!(retry.step(dead(), 1), call("c"));
        assert_eq!(retry.step(Event::Unreachable, 2), call("b"));
        assert_eq!(retry.step(dead(), 3), Action::Wait { ms: WAIT_FIRST_MS });
        // The next round begins with another one, who may lead by then.
        assert_eq!(retry.step(Event::Ready, 13), call("c"));
        assert_eq!(retry.step(Event::Unreachable, 14), call("a"));
        assert_eq!(retry.step(Event::NotLeader(Some("b".into())), 15), call("b"));
    }

    #[test]
    fn every_server_is_tried_before_the_first_wait() {
        let mut retry = retry();
        assert_eq!(retry.step(Event::Ready, 0), call("a"));
        assert_eq!(retry.step(Event::Unreachable, 1), call("b"));
        assert_eq!(retry.step(Event::Unreachable, 2), call("c"));
        assert_eq!(retry.step(Event::Unreachable, 3), Action::Wait { ms: WAIT_FIRST_MS });
        assert_eq!(retry.step(Event::Ready, 13), call("a"));
    }

    #[test]
    fn a_dead_leader_is_forgotten() {
        let mut retry = Retry::new(vec!["a".into(), "b".into()], Some("x".into()), 0, 10_000, 1_000);
        assert_eq!(retry.step(Event::Ready, 0), call("x"));
        assert_eq!(retry.step(Event::Unreachable, 1), call("a"));
    }

    #[test]
    fn a_busy_replica_is_asked_again_after_its_own_wait() {
        let mut retry = retry();
        retry.step(Event::Ready, 0);
        assert_eq!(retry.step(Event::Busy { retry_ms: 70 }, 1), Action::Wait { ms: 70 });
        assert_eq!(retry.step(Event::Ready, 71), call("a"));
    }

    #[test]
    fn a_frozen_replica_leaves_time_to_ask_the_others() {
        let mut retry = Retry::new(vec!["a".into(), "b".into(), "c".into()], None, 0, 3_000, 5_000);
        let mut now = 0;
        let mut asked = Vec::new();
        let mut event = Event::Ready;
        loop {
            match retry.step(event, now) {
                Action::Call { addr, timeout_ms } => {
                    asked.push((addr, timeout_ms));
                    now += timeout_ms;
                    event = Event::Lost;
                }
                Action::Wait { ms } => {
                    now += ms;
                    event = Event::Ready;
                }
                Action::GiveUp => break,
            }
        }
        assert_eq!(asked[0], ("a".to_owned(), 1_500));
        assert_eq!(asked[1].0, "b");
        assert_eq!(asked[2].0, "c");
        assert!(asked[2].1 >= TRY_MIN_MS, "{asked:?}");
    }

    #[test]
    fn no_try_is_made_that_could_hardly_be_answered_but_the_first() {
        let mut retry = retry();
        assert_eq!(retry.step(Event::Ready, 9_990), Action::Call { addr: "a".into(), timeout_ms: 10 });
        let mut retry = self::retry();
        retry.step(Event::Ready, 9_000);
        assert_eq!(retry.step(Event::NotLeader(Some("b".into())), 9_901), Action::GiveUp);
    }

    #[test]
    fn the_deadline_ends_it_and_bounds_each_wait_and_try() {
        let mut retry = retry();
        assert_eq!(retry.step(Event::Ready, 9_800), Action::Call { addr: "a".into(), timeout_ms: 200 });
        assert_eq!(retry.step(Event::Busy { retry_ms: 5_000 }, 9_900), Action::Wait { ms: 100 });
        assert_eq!(retry.step(Event::Ready, 10_000), Action::GiveUp);
    }
}
