//! The jobs that wait, in the order of arrival, searched without looking at each: a tree of the smallest request below
//! every branch.

/// GPU thousandths and limit in seconds; of a branch the least of each below it.
type Least = (u64, u64);

const NOBODY: Least = (u64::MAX, u64::MAX);

/// Positions are numbers from 0 up to the size, fixed when it is made.
pub struct Waiting {
    /// `tree[1]` is the root, `tree[size + at]` the leaf of position `at`.
    tree: Vec<Least>,
    size: usize,
}

impl Waiting {
    pub fn new(positions: usize) -> Self {
        let size = positions.next_power_of_two();
        Self { tree: vec![NOBODY; 2 * size], size }
    }

    pub fn insert(&mut self, at: usize, milli: u64, limit_s: u64) {
        self.set(at, (milli, limit_s));
    }

    pub fn remove(&mut self, at: usize) {
        self.set(at, NOBODY);
    }

    fn set(&mut self, at: usize, least: Least) {
        let mut node = self.size + at;
        self.tree[node] = least;
        while node > 1 {
            node /= 2;
            let (left, right) = (self.tree[2 * node], self.tree[2 * node + 1]);
            self.tree[node] = (left.0.min(right.0), left.1.min(right.1));
        }
    }

    /// The first position at `from` or behind whose request `may` start. `may` must hold for a smaller or a shorter
    /// request wherever it holds for a larger or a longer one.
    pub fn next(&self, from: usize, may: &dyn Fn(u64, u64) -> bool) -> Option<usize> {
        self.search(1, 0, self.size, from, may)
    }

    fn search(
        &self,
        node: usize,
        first: usize,
        width: usize,
        from: usize,
        may: &dyn Fn(u64, u64) -> bool,
    ) -> Option<usize> {
        let (milli, limit_s) = self.tree[node];
        if first + width <= from || milli == u64::MAX || !may(milli, limit_s) {
            return None;
        }
        if width == 1 {
            return Some(first);
        }
        let half = width / 2;
        self.search(2 * node, first, half, from, may)
            .or_else(|| self.search(2 * node + 1, first + half, half, from, may))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_first_that_may_start() {
        let mut waiting = Waiting::new(5);
        for (at, milli, limit_s) in [(0, 8, 10), (1, 4, 100), (3, 2, 50), (4, 1, 5)] {
            waiting.insert(at, milli, limit_s);
        }
        let next =
            |from, most: u64, longest: u64| waiting.next(from, &|milli, limit| milli <= most && limit <= longest);
        assert_eq!((next(0, 8, 100), next(1, 8, 100), next(2, 8, 100)), (Some(0), Some(1), Some(3)));
        assert_eq!((next(0, 7, 60), next(0, 1, 60), next(4, 2, 4)), (Some(3), Some(4), None));
        waiting.remove(3);
        assert_eq!(waiting.next(0, &|milli, limit| milli <= 7 && limit <= 60), Some(4));
    }
}
