//! A whole trace over virtual time: which machines serve which jobs, and each pool's run.

use std::collections::BTreeSet;

use super::course::Course;
use super::policy::{Policy, Queue};
use super::trace::Trace;
use super::{queue, turns};
use crate::fragmentation::Kinds;
use crate::world::{Machine, WHOLE};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// For what a policy draws.
    pub seed: u64,
    /// All machines serve all jobs. Else a tenant whose name is a type of machines has those for itself, as the virtual
    /// clusters of Philly.
    pub pooled: bool,
}

/// Machines, and the numbers of the jobs that they serve, in order of submission.
pub(super) struct Pool {
    pub machines: Vec<Machine>,
    pub jobs: Vec<usize>,
}

pub fn run(trace: &Trace, policy: &Policy, options: Options) -> Course {
    let mut course = Course { journeys: vec![None; trace.jobs.len()], spells: Vec::new() };
    for pool in pools(trace, options.pooled) {
        let states_limits = pool.jobs.iter().any(|job| trace.jobs[*job].requested_s.is_some());
        let queue = match policy.queue {
            Queue::RatioOrTurns if !states_limits => {
                turns::run(trace, pool, policy, options.seed, shares(trace, options.pooled), &mut course);
                continue;
            }
            Queue::RatioOrTurns => Queue::ResponseRatio,
            queue => queue,
        };
        queue::run(trace, pool, &Policy { queue, ..*policy }, options.seed, &mut course);
    }
    course
}

/// By tenant, the GPU thousandths of the machines that are named as it. None without `pooled`: who has machines of its own
/// shares them with nobody.
pub fn shares(trace: &Trace, pooled: bool) -> Vec<u64> {
    let of = |name: &String| -> u64 {
        let own = trace.machines.iter().filter(|machine| &trace.types[usize::from(machine.gpu_type)] == name);
        own.map(|machine| u64::from(machine.gpus) * u64::from(WHOLE)).sum()
    };
    trace.tenants.iter().map(|name| if pooled { of(name) } else { 0 }).collect()
}

fn pools(trace: &Trace, pooled: bool) -> Vec<Pool> {
    let mut order: Vec<usize> = (0..trace.jobs.len()).collect();
    order.sort_by_key(|job| trace.jobs[*job].submit_s);
    let own: BTreeSet<u8> = if pooled { BTreeSet::new() } else { types_of_tenants(trace) };
    let type_of = |job: usize| {
        let tenant = trace.tenants.get(trace.jobs[job].tenant as usize);
        let at = trace.types.iter().position(|name| Some(name) == tenant)? as u8;
        Some(at).filter(|at| own.contains(at))
    };
    let mut pools: Vec<Pool> = Vec::new();
    for of in own.iter().copied().map(Some).chain([None]) {
        let serves = |machine: &&Machine| of.map_or(!own.contains(&machine.gpu_type), |of| machine.gpu_type == of);
        let machines: Vec<Machine> = trace.machines.iter().filter(serves).copied().collect();
        let jobs: Vec<usize> = order.iter().copied().filter(|job| type_of(*job) == of).collect();
        pools.push(Pool { machines, jobs });
    }
    pools
}

/// The types of machines that are named as a tenant.
fn types_of_tenants(trace: &Trace) -> BTreeSet<u8> {
    let names: BTreeSet<&String> = trace.tenants.iter().filter(|name| !name.is_empty()).collect();
    (0u8..).zip(&trace.types).filter(|(_, name)| names.contains(name)).map(|(at, _)| at).collect()
}

/// The usual jobs, for the scores that look at them.
pub(super) fn kinds(trace: &Trace, pool: &Pool) -> Kinds {
    Kinds::of(pool.jobs.iter().map(|job| &trace.jobs[*job].request))
}
