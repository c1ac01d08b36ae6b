//! Whether a whole history has an order that explains it: the search of Wing and Gong with Lowe's memory of what was tried. It knows
//! calls with their times and a model of the object, and nothing of Ares. A call whose outcome is unknown may take effect at any time
//! after it began, or never.

use std::collections::{BTreeSet, HashSet};
use std::hash::Hash;

/// The sequential object.
pub trait Model {
    type State: Clone + Default + Eq + Hash;
    type Call;

    /// The state after the call, if the object may answer as it was answered.
    fn step(state: &Self::State, call: &Self::Call) -> Option<Self::State>;
}

/// One call on one object.
#[derive(Clone, Debug)]
pub struct Timed<C> {
    pub call: C,
    /// In any unit that grows with time.
    pub from: u64,
    /// `None`: its outcome is unknown.
    pub to: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    Found,
    /// No order explains the answers; the most calls that one explains.
    None {
        explained: usize,
    },
    /// More was tried than is allowed: no verdict.
    GivenUp,
}

/// What was tried: at most so many states of the search, about 100 bytes each.
const TRIED: usize = 2_000_000;

/// Looks for an order of the calls in which each answer is right, and no call comes before one that had ended when it began.
pub fn order<M: Model>(calls: &[Timed<M::Call>]) -> Order {
    let (mut answered, mut unknown): (Vec<_>, Vec<_>) = calls.iter().partition(|call| call.to.is_some());
    answered.sort_by_key(|call| call.from);
    unknown.sort_by_key(|call| call.from);
    Search::<M> { answered, unknown, tried: HashSet::new(), explained: 0 }.run()
}

/// Calls by their beginnings, so that those that may come next lie close together: a long history costs a look at few of them a step.
struct Search<'a, M: Model> {
    answered: Vec<&'a Timed<M::Call>>,
    unknown: Vec<&'a Timed<M::Call>>,
    tried: HashSet<(Done, M::State)>,
    explained: usize,
}

/// Which calls have taken effect.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Done {
    /// All answered ones before this, and not this one.
    first: usize,
    /// Those behind it.
    beyond: BTreeSet<usize>,
    unknown: BTreeSet<usize>,
}

impl Done {
    fn has(&self, at: usize) -> bool {
        at < self.first || self.beyond.contains(&at)
    }

    fn with(mut self, at: usize) -> Self {
        self.beyond.insert(at);
        while self.beyond.remove(&self.first) {
            self.first += 1;
        }
        self
    }
}

/// One choice: which calls have taken effect, what the object is then, and which call is to be tried next: an answered one, or behind
/// all of these one of unknown outcome.
struct Place<S> {
    done: Done,
    state: S,
    next: usize,
}

impl<M: Model> Search<'_, M> {
    fn run(&mut self) -> Order {
        let answered = self.answered.len();
        let mut path = vec![Place { done: Done::default(), state: M::State::default(), next: 0 }];
        while let Some(place) = path.last_mut() {
            // No open call may begin behind the end of another open one.
            let Some(end) = self.first_end(&place.done) else { return Order::Found };
            if place.next < answered && self.answered[place.next].from > end {
                place.next = answered;
            }
            let at = place.next;
            let known = at < answered;
            let call = if known { self.answered.get(at) } else { self.unknown.get(at - answered) };
            let Some(call) = call.filter(|call| call.from <= end) else {
                path.pop();
                continue;
            };
            place.next += 1;
            if if known { place.done.has(at) } else { place.done.unknown.contains(&(at - answered)) } {
                continue;
            }
            let Some(state) = M::step(&place.state, &call.call) else { continue };
            let mut done = place.done.clone();
            if known {
                done = done.with(at);
            } else {
                done.unknown.insert(at - answered);
            }
            if self.tried.insert((done.clone(), state.clone())) {
                if self.tried.len() > TRIED {
                    return Order::GivenUp;
                }
                path.push(Place { next: done.first, done, state });
                self.explained = self.explained.max(path.len() - 1);
            }
        }
        Order::None { explained: self.explained }
    }

    /// When the first call that was answered and has not taken effect yet ended; `None`: all have.
    fn first_end(&self, done: &Done) -> Option<u64> {
        let mut first = None;
        for at in done.first..self.answered.len() {
            if first.is_some_and(|end| self.answered[at].from > end) {
                break;
            }
            if !done.has(at) {
                first = self.answered[at].to.into_iter().chain(first).min();
            }
        }
        first
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    /// A register that holds a number.
    struct Register;

    #[derive(Clone, Debug)]
    enum Call {
        Write(u64),
        Read(u64),
    }

    impl Model for Register {
        type State = u64;
        type Call = Call;

        fn step(state: &u64, call: &Call) -> Option<u64> {
            match call {
                Call::Write(value) => Some(*value),
                Call::Read(value) => (value == state).then_some(*state),
            }
        }
    }

    fn timed(call: Call, from: u64, to: impl Into<Option<u64>>) -> Timed<Call> {
        Timed { call, from, to: to.into() }
    }

    #[test]
    fn a_read_may_see_a_write_that_overlaps_it_or_not_but_no_older_one_after_it() {
        let write = timed(Call::Write(1), 10, 20);
        for (seen, from, to, right) in
            [(0, 12, 18, true), (1, 12, 18, true), (0, 21, 22, false), (1, 0, 9, false), (0, 0, 9, true)]
        {
            let found = order::<Register>(&[write.clone(), timed(Call::Read(seen), from, to)]);
            assert_eq!(found == Order::Found, right, "{seen} from {from} to {to}");
        }
    }

    #[test]
    fn a_write_of_unknown_outcome_may_come_late_or_never_but_is_not_undone() {
        let write = timed(Call::Write(1), 10, None);
        let read = |seen, from| timed(Call::Read(seen), from, from + 1);
        assert_eq!(order::<Register>(&[write.clone(), read(0, 20), read(1, 30)]), Order::Found);
        assert_eq!(order::<Register>(&[write.clone(), read(0, 20)]), Order::Found);
        assert_eq!(order::<Register>(&[write, read(1, 20), read(0, 30)]), Order::None { explained: 2 });
    }

    /// Clients that write and read at random instants of a register that is right, and what they saw.
    fn good(seed: u64, calls: usize) -> Vec<Timed<Call>> {
        let mut rng = StdRng::seed_from_u64(seed);
        let (mut value, mut history) = (0, Vec::new());
        for at in 1..=calls as u64 {
            // Each takes effect at 100 * at; calls overlap their neighbours'.
            let (before, after) = (rng.random_range(0..250), rng.random_range(1..250));
            let (from, to) = ((100 * at).saturating_sub(before), 100 * at + after);
            let unknown = rng.random_range(0..50) == 0;
            if rng.random_bool(0.4) {
                value = at;
                history.push(timed(Call::Write(at), from, (!unknown).then_some(to)));
            } else {
                history.push(timed(Call::Read(value), from, to));
            }
        }
        history
    }

    #[test]
    fn good_histories_have_an_order_and_one_wrong_read_takes_it_away() {
        for seed in 0..20 {
            assert_eq!(order::<Register>(&good(seed, 300)), Order::Found, "seed {seed}");
            let mut history = good(seed, 40);
            let last = history.iter_mut().rev().find_map(|timed| match &mut timed.call {
                Call::Read(seen) => Some(seen),
                Call::Write(_) => None,
            });
            // A number that nobody wrote.
            *last.expect("there are reads") = 7_777;
            assert!(matches!(order::<Register>(&history), Order::None { .. }), "seed {seed}");
        }
    }

    #[test]
    fn a_stale_read_is_found() {
        let mut history: Vec<_> = (1..40)
            .flat_map(|at| {
                [timed(Call::Write(at), 10 * at, 10 * at + 3), timed(Call::Read(at), 10 * at + 4, 10 * at + 8)]
            })
            .collect();
        assert_eq!(order::<Register>(&history), Order::Found);
        history[51].call = Call::Read(25);
        assert!(matches!(order::<Register>(&history), Order::None { .. }));
    }
}
