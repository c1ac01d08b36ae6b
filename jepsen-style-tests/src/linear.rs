//! Whether a whole history has an order that explains it: the search of Wing and Gong with Lowe's memory of what was tried. It knows
//! calls with their times and a model of the object, and nothing of Ares. A call whose outcome is unknown may take effect at any time
//! after it began, or never.

use std::collections::HashSet;
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
    let mut by_begin: Vec<&Timed<M::Call>> = calls.iter().collect();
    by_begin.sort_by_key(|call| call.from);
    let mut search = Search::<M> { calls: by_begin, tried: HashSet::new(), explained: 0 };
    search.run()
}

struct Search<'a, M: Model> {
    calls: Vec<&'a Timed<M::Call>>,
    tried: HashSet<(Vec<u64>, M::State)>,
    explained: usize,
}

/// One choice: which calls have taken effect, what the object is then, and which call is to be tried next.
struct Place<S> {
    done: Vec<u64>,
    state: S,
    next: usize,
}

impl<M: Model> Search<'_, M> {
    fn run(&mut self) -> Order {
        let words = self.calls.len().div_ceil(64);
        let mut path = vec![Place { done: vec![0; words], state: M::State::default(), next: 0 }];
        while let Some(place) = path.last_mut() {
            // No open call may begin behind the end of another open one.
            let end = self.first_end(&place.done);
            let Some(end) = end else { return Order::Found };
            let at = place.next;
            if at == self.calls.len() || self.calls[at].from > end {
                path.pop();
                continue;
            }
            place.next += 1;
            if is_done(&place.done, at) {
                continue;
            }
            let Some(state) = M::step(&place.state, &self.calls[at].call) else { continue };
            let mut done = place.done.clone();
            done[at / 64] |= 1 << (at % 64);
            if self.tried.insert((done.clone(), state.clone())) {
                if self.tried.len() > TRIED {
                    return Order::GivenUp;
                }
                path.push(Place { done, state, next: 0 });
                self.explained = self.explained.max(path.len() - 1);
            }
        }
        Order::None { explained: self.explained }
    }

    /// When the first call that was answered and has not taken effect yet ended; `None`: all have.
    fn first_end(&self, done: &[u64]) -> Option<u64> {
        let open = self.calls.iter().enumerate().filter(|(at, _)| !is_done(done, *at));
        open.filter_map(|(_, call)| call.to).min()
    }
}

fn is_done(done: &[u64], at: usize) -> bool {
    done[at / 64] & (1 << (at % 64)) != 0
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
