//! The usual jobs of a cluster, and what a machine's idle GPUs are worth to them. Owns the fragmentation measure of
//! Weng et al. (ATC '23) with its published coarse points, and our own measure, which asks of a shared GPU what the shares
//! to come will leave unused. All are integers: weights are counts of jobs.

use std::collections::BTreeMap;

use crate::world::{Free, Machine, Request, WHOLE};

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
    /// `unfilled[left]`: thousandths of a shared GPU with `left` thousandths left that no share will use, in millionths.
    unfilled: Vec<i64>,
}

const POPULAR_PERCENT: u64 = 95;

/// Shares that are offered to a shared GPU until the cluster is full. Results hardly differ from 1 to 16.
const OFFERS: i64 = 3;

const MILLIONTHS: i64 = 1_000_000;

/// Losses are compared in steps of so many millionths of a thousandth: 60 thousandths. Where machines tie, the first one
/// fills up, which keeps others whole; compared exactly, jobs would spread.
const STEP: i64 = 60 * MILLIONTHS;

impl Kinds {
    pub fn of<'a>(jobs: impl Iterator<Item = &'a Request>) -> Self {
        let mut counts: BTreeMap<Request, (u32, usize)> = BTreeMap::new();
        let mut all = 0u64;
        for (at, request) in jobs.enumerate() {
            counts.entry(Request { mem_mib: 0, ..*request }).or_insert((0, at)).0 += 1;
            all += 1;
        }
        let unfilled = unfilled(counts.iter().map(|(request, (count, _))| (request, *count)));
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
        Self { kinds, total, without_gpus, thresholds: thresholds(), unfilled }
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

    /// What a placement loses: less is better. Whole steps first, then what is lost of shared GPUs.
    pub fn loss(&self, machine: &Machine, before: &Free, after: &Free) -> i64 {
        let stranded = |free: &Free| i128::from(self.stranded(machine, free)) * i128::from(MILLIONTHS);
        let unfilled = self.unfilled(after) - self.unfilled(before);
        let lost = ((stranded(after) - stranded(before)) / i128::from(self.total)) as i64 + unfilled;
        // A placement changes one shared GPU, so the tie-break stays within a step's width.
        lost.div_euclid(STEP) * (4 * i64::from(WHOLE) * MILLIONTHS) + unfilled
    }

    /// Idle thousandths where a kind finds no room at all, summed over the kinds with their counts as weights.
    fn stranded(&self, machine: &Machine, free: &Free) -> i64 {
        let idle = i64::from(free.milli());
        let finds_none = |kind: &&Kind| {
            let request = &kind.request;
            request.gpus == 0 || !request.accepts(machine.gpu_type) || !free.fits(request)
        };
        self.kinds.iter().filter(finds_none).map(|kind| i64::from(kind.count) * idle).sum()
    }

    fn unfilled(&self, free: &Free) -> i64 {
        let of = |left: &u16| self.unfilled.get(usize::from(*left)).copied().unwrap_or(i64::from(*left) * MILLIONTHS);
        free.shared.iter().map(|(_, left)| of(left)).sum()
    }

    /// floor(100 * sigmoid(decrease / 1000)) of the fragmentation that a placement takes away.
    pub fn points(&self, machine: &Machine, before: &Free, after: &Free) -> i64 {
        let decrease = self.fragments(machine, before) - self.fragments(machine, after);
        let millionths = decrease * 1_000_000 / self.total;
        self.thresholds.partition_point(|least| *least <= millionths) as i64
    }
}

/// By thousandths left of a GPU, how many will stay unused, in millionths: none of the shares that fit comes, or one
/// does and less is left. Of the shares offered each kind is as many as it is of all shares.
fn unfilled<'a>(counts: impl Iterator<Item = (&'a Request, u32)>) -> Vec<i64> {
    let mut by_milli: BTreeMap<usize, i64> = BTreeMap::new();
    for (request, count) in counts.filter(|(request, _)| request.is_share()) {
        *by_milli.entry(request.milli as usize).or_default() += i64::from(count);
    }
    let all: i64 = by_milli.values().sum();
    let mut unfilled: Vec<i64> = vec![0; WHOLE as usize + 1];
    for left in 1..unfilled.len() {
        let mut weight = i128::from(all.max(1));
        let mut sum = weight * left as i128 * i128::from(MILLIONTHS);
        for (milli, count) in by_milli.range(1..=left) {
            let offered = i128::from(OFFERS * count);
            sum += offered * i128::from(unfilled[left - milli]);
            weight += offered;
        }
        unfilled[left] = (sum / weight) as i64;
    }
    unfilled
}

/// Where the points of the published score begin: ln(s / (100 - s)) * 1000 for s of 1 to 99, in millionths.
fn thresholds() -> Vec<i64> {
    (1..100).map(|points| ((f64::from(points) / f64::from(100 - points)).ln() * 1e9).ceil() as i64).collect()
}
