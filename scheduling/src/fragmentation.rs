//! The usual jobs of a cluster, and what a machine's idle GPUs are worth to them. Owns the fragmentation measure of
//! Weng et al. (ATC '23) and of its published coarse points; all are integers: weights are counts of jobs.

use std::collections::BTreeMap;

use crate::world::{Free, Machine, Request};

/// A kind of job: what it asks for (memory apart) and how many of the jobs are of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    pub request: Request,
    pub count: u32,
}

/// The most popular kinds, 95 % of all jobs.
#[derive(Clone, Debug, Default)]
pub struct Kinds {
    kinds: Vec<Kind>,
    total: i64,
    /// Jobs without GPUs among the kinds.
    without_gpus: i64,
    /// `THRESHOLDS[s]`: the least decrease, in millionths of a thousandth, that has `s` points or more.
    thresholds: Vec<i64>,
}

const POPULAR_PERCENT: u64 = 95;

impl Kinds {
    pub fn of<'a>(jobs: impl Iterator<Item = &'a Request>) -> Self {
        let mut counts: BTreeMap<Request, (u32, usize)> = BTreeMap::new();
        let mut all = 0u64;
        for (at, request) in jobs.enumerate() {
            counts.entry(Request { mem_mib: 0, ..*request }).or_insert((0, at)).0 += 1;
            all += 1;
        }
        let mut kinds: Vec<(Kind, usize)> =
            counts.into_iter().map(|(request, (count, first))| (Kind { request, count }, first)).collect();
        kinds.sort_by_key(|(kind, first)| (std::cmp::Reverse(kind.count), *first));
        let mut covered = 0u64;
        kinds.retain(|(kind, _)| {
            let keep = covered * 100 < all * POPULAR_PERCENT;
            covered += u64::from(kind.count);
            keep
        });
        let kinds: Vec<Kind> = kinds.into_iter().map(|(kind, _)| kind).collect();
        let without_gpus = kinds.iter().filter(|kind| kind.request.gpus == 0).map(|kind| i64::from(kind.count)).sum();
        let total = kinds.iter().map(|kind| i64::from(kind.count)).sum::<i64>().max(1);
        Self { kinds, total, without_gpus, thresholds: thresholds() }
    }

    /// Idle thousandths that the kinds cannot use, summed over the kinds with their counts as weights.
    pub fn fragments(&self, machine: &Machine, free: &Free) -> i64 {
        let idle = i64::from(free.milli());
        if idle == 0 {
            return 0;
        }
        let of = |kind: &Kind| {
            let request = &kind.request;
            if request.gpus == 0 {
                return 0;
            }
            let fits = request.accepts(machine.gpu_type) && free.fits(request);
            let wasted = if fits {
                free.shared
                    .iter()
                    .filter(|(_, left)| u32::from(*left) < request.milli)
                    .map(|(_, left)| i64::from(*left))
                    .sum()
            } else {
                idle
            };
            i64::from(kind.count) * wasted
        };
        self.without_gpus * idle + self.kinds.iter().map(of).sum::<i64>()
    }

    /// floor(100 * sigmoid(decrease / 1000)) of the fragmentation that a placement takes away.
    pub fn points(&self, machine: &Machine, before: &Free, after: &Free) -> i64 {
        let decrease = self.fragments(machine, before) - self.fragments(machine, after);
        let millionths = decrease * 1_000_000 / self.total;
        self.thresholds.partition_point(|least| *least <= millionths) as i64
    }
}

/// Where the points of the published score begin: ln(s / (100 - s)) * 1000 for s of 1 to 99, in millionths.
fn thresholds() -> Vec<i64> {
    (1..100).map(|points| ((f64::from(points) / f64::from(100 - points)).ln() * 1e9).ceil() as i64).collect()
}
