//! The jobs that wait, searched in the order of arrival without looking at each: by request, a tree of the shortest limit
//! below every branch.

use crate::world::Request;

/// Nobody waits here.
const NOBODY: u64 = u64::MAX;

/// The jobs of one request, those that wait and those that don't.
struct Alike {
    request: Request,
    /// Positions in the pool's order of arrival, ascending.
    positions: Vec<usize>,
    /// `shortest[1]` is the root, `shortest[width + at]` the limit of the `at`-th position; `NOBODY` where none waits.
    shortest: Vec<u64>,
}

/// Positions are numbers from 0 up; their requests and limits are fixed when it is made, and nobody waits.
pub struct Waiting {
    alike: Vec<Alike>,
    /// By position, the number of its request, its place there and its limit.
    of: Vec<(usize, usize, u64)>,
}

impl Waiting {
    /// Request and limit in seconds by position.
    pub fn new(jobs: impl Iterator<Item = (Request, u64)>) -> Self {
        let jobs: Vec<(Request, u64)> = jobs.collect();
        let mut requests: Vec<Request> = jobs.iter().map(|(request, _)| *request).collect();
        requests.sort_unstable();
        requests.dedup();
        let of_request = |request: &Request| Alike { request: *request, positions: Vec::new(), shortest: Vec::new() };
        let mut alike: Vec<Alike> = requests.iter().map(of_request).collect();
        let mut of = Vec::with_capacity(jobs.len());
        for (position, (request, limit_s)) in jobs.into_iter().enumerate() {
            let number = requests.partition_point(|known| *known < request);
            of.push((number, alike[number].positions.len(), limit_s.min(NOBODY - 1)));
            alike[number].positions.push(position);
        }
        for alike in &mut alike {
            alike.shortest = vec![NOBODY; 2 * alike.positions.len().next_power_of_two()];
        }
        Self { alike, of }
    }

    pub fn insert(&mut self, position: usize) {
        let (alike, at, limit_s) = self.of[position];
        self.alike[alike].set(at, limit_s);
    }

    pub fn remove(&mut self, position: usize) {
        let (alike, at, _) = self.of[position];
        self.alike[alike].set(at, NOBODY);
    }

    /// The first position at `from` or behind whose limit is at most what `longest` says for its request; `None` for a
    /// request that may not start at all.
    pub fn next(&self, from: usize, longest: impl Fn(&Request) -> Option<u64>) -> Option<usize> {
        let waits = self.alike.iter().filter(|alike| alike.shortest[1] != NOBODY);
        waits.filter_map(|alike| alike.next(from, longest(&alike.request)?)).min()
    }
}

impl Alike {
    fn set(&mut self, at: usize, limit_s: u64) {
        let mut node = self.shortest.len() / 2 + at;
        self.shortest[node] = limit_s;
        while node > 1 {
            node /= 2;
            self.shortest[node] = self.shortest[2 * node].min(self.shortest[2 * node + 1]);
        }
    }

    fn next(&self, from: usize, longest_s: u64) -> Option<usize> {
        let longest_s = longest_s.min(NOBODY - 1);
        let first = self.positions.partition_point(|position| *position < from);
        let width = self.shortest.len() / 2;
        if first >= self.positions.len() || self.shortest[1] > longest_s {
            return None;
        }
        // Up to the first branch on the right that has one, then down to its leftmost.
        let mut node = width + first;
        while self.shortest[node] > longest_s {
            while node % 2 == 1 {
                node /= 2;
            }
            if node == 0 {
                return None;
            }
            node += 1;
        }
        while node < width {
            node *= 2;
            if self.shortest[node] > longest_s {
                node += 1;
            }
        }
        Some(self.positions[node - width])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpus(gpus: u64) -> Request {
        Request { gpus: gpus as u32, milli: 1_000, cpus: 0, mem_mib: 0, types: 0 }
    }

    #[test]
    fn finds_the_first_that_may_start() {
        let jobs = [(8, 10), (4, 100), (4, 50), (2, 50), (1, 5), (2, 7)].map(|(size, limit_s)| (gpus(size), limit_s));
        let mut waiting = Waiting::new(jobs.into_iter());
        let next = |waiting: &Waiting, from, most: u32, longest: u64| {
            waiting.next(from, |request| (request.gpus <= most).then_some(longest))
        };
        assert_eq!(next(&waiting, 0, 9, u64::MAX), None);
        [0, 1, 3, 4, 5].into_iter().for_each(|position| waiting.insert(position));
        let found = [(0, 8, 100), (1, 8, 100), (2, 8, 100), (0, 7, 60), (0, 1, 60), (0, 8, 7), (4, 2, 4), (6, 9, 99)];
        let found = found.map(|(from, most, longest)| next(&waiting, from, most, longest));
        assert_eq!(found, [Some(0), Some(1), Some(3), Some(3), Some(4), Some(4), None, None]);
        waiting.remove(3);
        assert_eq!(next(&waiting, 0, 2, 60), Some(4));
    }

    #[test]
    fn agrees_with_a_scan() {
        let jobs: Vec<(Request, u64)> = (0..97u64).map(|at| (gpus(at * 7 % 5), at * 31 % 23)).collect();
        let mut waiting = Waiting::new(jobs.iter().copied());
        let mut waits = vec![false; jobs.len()];
        for turn in 0..600usize {
            let position = turn * 41 % jobs.len();
            waits[position] = !waits[position];
            if waits[position] {
                waiting.insert(position)
            } else {
                waiting.remove(position)
            }
            let most = |request: &Request| turn as u64 % 25 / (u64::from(request.gpus) + 1);
            let longest = |request: &Request| (request.gpus != 3).then(|| most(request));
            let may = |at: &usize| waits[*at] && longest(&jobs[*at].0).is_some_and(|most| jobs[*at].1 <= most);
            let from = turn * 13 % jobs.len();
            assert_eq!(waiting.next(from, longest), (from..jobs.len()).find(may), "turn {turn}");
        }
    }
}
