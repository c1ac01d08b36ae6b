//! The soonest time at which each machine can have so many GPUs, by what runs there alone. What a plan takes or keeps only delays that:
//! so it is found once a plan, and whoever seeks a start looks at the machines in this order and stops behind the first start that
//! is sure.

use std::collections::BTreeMap;

use statemachine::fit;
use statemachine::record::{Node, NodeAdmin};
use statemachine::spec::Shape;
use statemachine::{GpuTypeId, NodeId};

use crate::machines::Machines;

/// By the types of GPUs that are accepted; none = any.
#[derive(Default)]
pub(crate) struct Prospects(BTreeMap<Vec<GpuTypeId>, Vec<Prospect>>);

/// The machines in service that can have a number of GPUs, which is this one's place: when, in cluster time.
#[derive(Clone, Default)]
struct Prospect {
    machines: Vec<(u64, NodeId)>,
    is_sorted: bool,
}

impl Prospects {
    /// The machines that can have the shape's GPUs, the soonest first, and of equals the oldest. Adds the looks that it took to `steps`.
    pub fn of(&mut self, machines: &Machines<'_>, shape: &Shape, steps: &mut u64) -> &[(u64, NodeId)] {
        let by_count = self.0.entry(shape.gpu_types.to_vec()).or_insert_with(|| {
            *steps += machines.state.nodes.len() as u64;
            of_types(machines, &shape.gpu_types)
        });
        let Some(prospect) = by_count.get_mut(shape.gpus_per_node() as usize) else { return &[] };
        if !prospect.is_sorted {
            prospect.machines.sort_unstable();
            prospect.is_sorted = true;
        }
        &prospect.machines
    }
}

fn of_types(machines: &Machines<'_>, types: &[GpuTypeId]) -> Vec<Prospect> {
    let mut by_count: Vec<Prospect> = Vec::new();
    for (id, node) in machines.state.nodes.iter() {
        if node.value.admin != NodeAdmin::Ready || machines.unheard.contains(id) {
            continue;
        }
        let mut known = 0;
        for (time, gpus) in free_at(machines, *id, &node.value, types) {
            if by_count.len() <= gpus {
                by_count.resize(gpus + 1, Prospect::default());
            }
            by_count[known..=gpus].iter_mut().for_each(|prospect| prospect.machines.push((time, *id)));
            known = gpus + 1;
        }
    }
    by_count
}

/// From when on a machine has how many usable GPUs, each time with more than before.
fn free_at(machines: &Machines<'_>, id: NodeId, node: &Node, types: &[GpuTypeId]) -> Vec<(u64, usize)> {
    let Some((_, alloc)) = machines.node(id) else { return Vec::new() };
    let healthy = fit::healthy_gpus(node, types);
    let mut ends: Vec<(u64, u128)> =
        machines.holdings(id).iter().map(|(end, holding)| (*end, holding.gpus())).collect();
    ends.sort_unstable_by_key(|(end, _)| *end);
    let mut free = alloc.free_gpus & healthy;
    let mut steps = vec![(machines.state.meta.clock_ms, free.count_ones() as usize)];
    for (end, gpus) in ends {
        free |= gpus & healthy;
        let count = free.count_ones() as usize;
        if steps.last().is_some_and(|(_, before)| *before < count) {
            steps.push((end, count));
        }
    }
    steps
}
