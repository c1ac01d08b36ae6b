//! How long a job will run, from the jobs that have ended: the longest of the last few of the same user with the same
//! limit. Owns what is remembered and nothing of the order; a limit stays the only promise. Integers, and all of it
//! follows from the sequence of ends.

use std::collections::{BTreeMap, VecDeque};

/// How many ended jobs a guess rests on. The longest of four is rarely below the next one, and forgets in a day.
const REMEMBERED: usize = 4;

/// Fewer than these with the same limit say less than the user's last jobs of any limit.
const TELLING: usize = 2;

/// Run times in seconds, the newest first.
type Last = VecDeque<u64>;

/// What was learned: a few run times per user, and per user and limit.
#[derive(Clone, Debug, Default)]
pub struct Foresight {
    of_user: BTreeMap<u32, Last>,
    of_limit: BTreeMap<(u32, u64), Last>,
}

impl Foresight {
    /// A job of this user and limit has run so long and ended.
    pub fn learn(&mut self, user: u32, limit_s: u64, ran_s: u64) {
        for last in [self.of_user.entry(user).or_default(), self.of_limit.entry((user, limit_s)).or_default()] {
            last.push_front(ran_s);
            last.truncate(REMEMBERED);
        }
    }

    /// Seconds, at least 1 and at most the limit; the limit itself of a user of whom nothing is known.
    pub fn guess_s(&self, user: u32, limit_s: u64) -> u64 {
        let alike = self.of_limit.get(&(user, limit_s)).filter(|last| last.len() >= TELLING);
        let longest = alike.or_else(|| self.of_user.get(&user)).and_then(|last| last.iter().max());
        longest.map_or(limit_s, |ran| *ran).clamp(1, limit_s.max(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_of_the_last_four_alike() {
        let mut foresight = Foresight::default();
        assert_eq!(foresight.guess_s(1, 3_600), 3_600);
        foresight.learn(1, 3_600, 50);
        // One of this limit says no more than one of any.
        assert_eq!((foresight.guess_s(1, 3_600), foresight.guess_s(1, 600), foresight.guess_s(1, 20)), (50, 50, 20));
        foresight.learn(1, 600, 400);
        foresight.learn(1, 3_600, 60);
        assert_eq!((foresight.guess_s(1, 3_600), foresight.guess_s(1, 600), foresight.guess_s(2, 600)), (60, 400, 600));
        (0..4).for_each(|_| foresight.learn(1, 3_600, 7));
        assert_eq!((foresight.guess_s(1, 3_600), foresight.guess_s(1, 600)), (7, 7));
    }
}
