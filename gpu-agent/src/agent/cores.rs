//! Which CPUs a rank may use: the part's count in each NUMA domain, nearest to the rank's GPUs first. A simulated machine
//! pins nothing.

use std::collections::{BTreeMap, BTreeSet};

/// The CPUs of this machine by NUMA domain (in the order of the registration), and who has them.
#[derive(Clone, Debug, Default)]
pub struct Cores {
    by_numa: Vec<Vec<u32>>,
    taken: BTreeMap<u64, Vec<u32>>,
}

impl Cores {
    /// Empty: nothing is pinned.
    pub fn new(by_numa: Vec<Vec<u32>>) -> Self {
        Self { by_numa, taken: BTreeMap::new() }
    }

    /// CPUs found in use by an attempt that was re-attached.
    pub fn adopt(&mut self, token: u64, cpus: Vec<u32>) {
        self.taken.insert(token, cpus);
    }

    /// One list per rank; an empty one = unpinned. `near`: NUMA domain that each rank prefers (its GPU's).
    pub fn take(&mut self, token: u64, wanted: &[u32], near: &[Option<usize>]) -> Vec<Vec<u32>> {
        let ranks = near.len();
        let used: BTreeSet<u32> = self.taken.values().flatten().copied().collect();
        let mut free: Vec<Vec<u32>> = Vec::new();
        for (domain, cpus) in self.by_numa.iter().enumerate() {
            let count = wanted.get(domain).copied().unwrap_or(0) as usize;
            free.push(cpus.iter().copied().filter(|cpu| !used.contains(cpu)).take(count).collect());
        }
        let all: Vec<u32> = free.iter().flatten().copied().collect();
        let short = all.len() < wanted.iter().map(|count| *count as usize).sum();
        if all.is_empty() || short {
            // The books do not match this machine: unpinned is slower, a wrong pin would be wrong.
            return vec![Vec::new(); ranks];
        }
        self.taken.insert(token, all.clone());
        if all.len() < ranks {
            return vec![all; ranks];
        }
        let each = all.len() / ranks.max(1);
        near.iter().map(|near| pick(&mut free, each, *near)).collect()
    }

    pub fn give_back(&mut self, token: u64) {
        self.taken.remove(&token);
    }
}

fn pick(free: &mut [Vec<u32>], count: usize, near: Option<usize>) -> Vec<u32> {
    let mut order: Vec<usize> = (0..free.len()).collect();
    order.sort_by_key(|domain| Some(*domain) != near);
    let mut picked = Vec::new();
    for domain in order {
        let n = free[domain].len().min(count - picked.len());
        picked.extend(free[domain].drain(..n));
    }
    picked
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cores() -> Cores {
        Cores::new(vec![vec![0, 1, 2, 3], vec![4, 5, 6, 7]])
    }

    #[test]
    fn each_rank_gets_its_share_beside_its_gpu() {
        let mut cores = cores();
        assert_eq!(cores.take(1, &[2, 2], &[Some(1), Some(0)]), vec![vec![4, 5], vec![0, 1]]);
        assert_eq!(cores.take(2, &[2, 0], &[None]), vec![vec![2, 3]]);
        cores.give_back(1);
        assert_eq!(cores.take(3, &[2, 0], &[None]), vec![vec![0, 1]]);
    }

    #[test]
    fn books_that_do_not_match_pin_nothing() {
        let mut cores = cores();
        assert_eq!(cores.take(1, &[9, 0], &[None]), vec![Vec::<u32>::new()]);
        assert_eq!(Cores::default().take(1, &[1], &[None, None]), vec![Vec::<u32>::new(); 2]);
    }

    #[test]
    fn more_ranks_than_cores_share_them() {
        let mut cores = cores();
        assert_eq!(cores.take(1, &[1, 0], &[None, None]), vec![vec![0], vec![0]]);
    }
}
