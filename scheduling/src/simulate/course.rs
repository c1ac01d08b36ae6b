//! What became of each job of a simulated run, and the figures by which policies are compared. All integers: means and
//! ratios are in thousandths.

use super::trace::Trace;

/// One job from submission to end, in seconds of the trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Journey {
    /// The first start.
    pub start_s: u64,
    pub end_s: u64,
    pub preemptions: u32,
}

/// A time during which a job held its GPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spell {
    /// Number of the job in the trace.
    pub job: usize,
    pub from_s: u64,
    pub until_s: u64,
}

/// A run of a whole trace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Course {
    /// By job; `None` for one that no machines of its pool could ever hold.
    pub journeys: Vec<Option<Journey>>,
    pub spells: Vec<Spell>,
}

/// Seconds and ratios in thousandths, but for the counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// Jobs that ended; the means are over these.
    pub jobs: u64,
    pub never_started: u64,
    pub jct_mean: u64,
    pub jct_p99: u64,
    pub wait_mean: u64,
    pub wait_max: u64,
    /// max(1, (wait + run) / max(run, 10 s)).
    pub bounded_slowdown_mean: u64,
    pub bounded_slowdown_max: u64,
    pub makespan: u64,
    pub preemptions: u64,
    /// Jain's index over tenants, each with the run time of its jobs as a part of their time from submission to end.
    pub jain_tenants: u64,
}

const MILLI: u64 = 1_000;

impl Journey {
    /// From submission to end, less the run itself: what preemption makes a job lose counts as waiting.
    pub fn wait_s(&self, submit_s: u64, duration_s: u64) -> u64 {
        if self.preemptions == 0 {
            return self.start_s - submit_s;
        }
        (self.end_s - submit_s).saturating_sub(duration_s)
    }
}

impl Course {
    /// Seconds that a job waited; `None` for one that never starts.
    pub fn wait_s(&self, trace: &Trace, job: usize) -> Option<u64> {
        let (of, journey) = (&trace.jobs[job], self.journeys[job]?);
        Some(journey.wait_s(of.submit_s, of.duration_s))
    }

    /// Hundredths of a percent of the GPU time demanded that tenants lacked: over tenants and time, what a tenant had less
    /// than both its share and its demand. `shares` are GPU thousandths by tenant.
    pub fn shortfall(&self, trace: &Trace, shares: &[u64]) -> u64 {
        // By tenant: when, by how much demand and allocation change.
        let mut changes: Vec<Vec<(u64, i64, i64)>> = vec![Vec::new(); trace.tenants.len()];
        let mut demanded = 0u128;
        for (job, journey) in trace.jobs.iter().zip(&self.journeys) {
            let Some(journey) = journey else { continue };
            let milli = job.request.total_milli();
            demanded += u128::from(milli) * u128::from(job.duration_s);
            let of = &mut changes[job.tenant as usize];
            of.extend([(job.submit_s, milli as i64, 0), (journey.end_s, -(milli as i64), 0)]);
        }
        for spell in &self.spells {
            let (job, of) = (&trace.jobs[spell.job], spell);
            let milli = job.request.total_milli() as i64;
            changes[job.tenant as usize].extend([(of.from_s, 0, milli), (of.until_s, 0, -milli)]);
        }
        let lacked: u128 = changes.into_iter().zip(shares).map(|(changes, share)| lacked(changes, *share as i64)).sum();
        (lacked * 10_000 / demanded.max(1)) as u64
    }

    pub fn figures(&self, trace: &Trace) -> Figures {
        let mut figures = Figures::default();
        let mut jcts: Vec<u64> = Vec::new();
        let (mut waits, mut slowdowns) = (0u128, 0u128);
        let mut tenants = vec![(0u128, 0u128); trace.tenants.len()];
        for (job, journey) in trace.jobs.iter().zip(&self.journeys) {
            let Some(journey) = journey else {
                figures.never_started += 1;
                continue;
            };
            let (jct, wait) = (journey.end_s - job.submit_s, journey.wait_s(job.submit_s, job.duration_s));
            let slowdown = ((wait + job.duration_s) * MILLI / job.duration_s.max(10)).max(MILLI);
            jcts.push(jct);
            waits += u128::from(wait);
            slowdowns += u128::from(slowdown);
            figures.wait_max = figures.wait_max.max(wait * MILLI);
            figures.bounded_slowdown_max = figures.bounded_slowdown_max.max(slowdown);
            figures.preemptions += u64::from(journey.preemptions);
            if let Some((ran, taken)) = tenants.get_mut(job.tenant as usize) {
                *ran += u128::from(journey.end_s - journey.start_s).min(u128::from(job.duration_s));
                *taken += u128::from(jct);
            }
        }
        jcts.sort_unstable();
        let jobs = jcts.len() as u128;
        let mean = |sum: u128| sum.checked_div(jobs).unwrap_or(0) as u64;
        figures.jobs = jcts.len() as u64;
        figures.jct_mean = mean(jcts.iter().map(|jct| u128::from(jct * MILLI)).sum());
        figures.jct_p99 = percentile(&jcts, 99) * MILLI;
        figures.wait_mean = mean(waits * u128::from(MILLI));
        figures.bounded_slowdown_mean = mean(slowdowns);
        figures.makespan = self.makespan_s(trace) * MILLI;
        figures.jain_tenants = jain(tenants.into_iter().filter(|(_, taken)| *taken > 0));
        figures
    }

    /// From the first submission to the last end.
    fn makespan_s(&self, trace: &Trace) -> u64 {
        let first = trace.jobs.iter().map(|job| job.submit_s).min().unwrap_or(0);
        let last = self.journeys.iter().flatten().map(|journey| journey.end_s).max().unwrap_or(first);
        last - first
    }
}

/// GPU thousandths times seconds during which less was allocated than both share and demand.
fn lacked(mut changes: Vec<(u64, i64, i64)>, share: i64) -> u128 {
    changes.sort_unstable();
    let (mut since, mut demand, mut allocated, mut sum) = (0, 0, 0, 0u128);
    for (at, more_demand, more_allocated) in changes {
        sum += u128::from(at - since) * i64::max(share.min(demand) - allocated, 0) as u128;
        (since, demand, allocated) = (at, demand + more_demand, allocated + more_allocated);
    }
    sum
}

/// The value that so many percent of the ascending values do not pass; 0 of none.
pub fn percentile(ascending: &[u64], percent: usize) -> u64 {
    let at = (ascending.len() * percent).div_ceil(100);
    ascending.get(at.saturating_sub(1)).copied().unwrap_or(0)
}

/// (sum of x)^2 / (n * sum of x^2) in thousandths, of the ratios given as (part, whole).
fn jain(ratios: impl Iterator<Item = (u128, u128)>) -> u64 {
    let ratios: Vec<u128> = ratios.map(|(part, whole)| part * 1_000_000 / whole).collect();
    let (sum, squares) = (ratios.iter().sum::<u128>(), ratios.iter().map(|ratio| ratio * ratio).sum::<u128>());
    if squares == 0 { 1_000 } else { (sum * sum * 1_000 / (squares * ratios.len() as u128)) as u64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_and_percentiles() {
        assert_eq!(jain([(1, 2), (2, 4)].into_iter()), 1_000);
        assert_eq!(jain([(1, 1), (0, 1)].into_iter()), 500);
        assert_eq!(jain([].into_iter()), 1_000);
        let hundred: Vec<u64> = (1..=100).collect();
        // 4 of 6 are its share: it lacks 4 for 10 s while it demands 5, then 1 for 5 s.
        assert_eq!(lacked(vec![(10, 5, 0), (20, 0, 3), (25, 0, 2), (40, -5, -5)], 4), 45);
        assert_eq!((percentile(&hundred, 99), percentile(&hundred, 50), percentile(&[], 99)), (99, 50, 0));
    }
}
