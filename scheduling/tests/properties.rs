//! The planner over random clusters: what holds for every plan, whatever the machines and the jobs.

mod site;

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use scheduling::Reason;
use scheduling::plan::{Cache, Limits, plan};
use site::{Machine, Site, cpu_only, hgx, mock_v100, pairs, shape};
use statemachine::fit;
use statemachine::spec::Shape;
use statemachine::{JobId, NodeId, Token};

#[derive(Clone, Debug)]
enum Step {
    Submit {
        shape: Shape,
        priority: i32,
        types: Vec<&'static str>,
    },
    Start,
    /// Ends the n-th running job.
    Finish(usize),
    FailLaunch(usize),
    Out(usize),
    Sick(usize, u8),
    Silent(usize),
    Wait,
}

/// A type of slices of GPUs.
const SLICE: &str = "a100-1g.5gb";

fn machine() -> impl Strategy<Value = Machine> {
    prop_oneof![
        Just(mock_v100()),
        Just(hgx("h100")),
        Just(hgx("a100")),
        Just(Machine { gpu_type: SLICE, class: pairs(7, 0, 0), ..mock_v100() }),
        Just(cpu_only()),
        Just(Machine { cores_by_numa: vec![3, 1], mem_mib: 6_000, ..mock_v100() }),
    ]
}

fn shapes() -> impl Strategy<Value = Shape> {
    let memory = prop_oneof![Just(0u64), Just(500), Just(40_000)];
    let bandwidth = prop_oneof![3 => Just(0u32), 1 => Just(30_000), 1 => Just(300_000)];
    // Some leave their machines open.
    let counts = prop_oneof![4 => (1u16..=3, 0u16..=3), 1 => (Just(0u16), 1u16..=12)];
    (counts, 1u16..=3, 0u16..=5, memory, bandwidth).prop_map(
        |((nodes, gpus), ranks, cores_per_rank, mem_mib_per_rank, min_bandwidth_mbps)| Shape {
            cores_per_rank,
            mem_mib_per_rank,
            min_bandwidth_mbps,
            ..shape(nodes, ranks, gpus)
        },
    )
}

fn step() -> impl Strategy<Value = Step> {
    let types = prop_oneof![
        3 => Just(vec![]),
        1 => Just(vec!["h100"]),
        1 => Just(vec!["h100", "v100"]),
        1 => Just(vec!["tpu"]),
        1 => Just(vec![SLICE]),
    ];
    prop_oneof![
        8 => (shapes(), -1i32..=1, types).prop_map(|(shape, priority, types)| Step::Submit { shape, priority, types }),
        2 => Just(Step::Start),
        2 => any::<usize>().prop_map(Step::Finish),
        1 => any::<usize>().prop_map(Step::FailLaunch),
        1 => any::<usize>().prop_map(Step::Out),
        1 => (any::<usize>(), 0u8..8).prop_map(|(node, slot)| Step::Sick(node, slot)),
        1 => any::<usize>().prop_map(Step::Silent),
        1 => Just(Step::Wait),
    ]
}

/// A site after the steps, with some jobs waiting.
fn play(machines: Vec<Machine>, steps: Vec<Step>) -> Site {
    let mut site = Site::default();
    let mut nodes: Vec<(NodeId, u8)> = Vec::new();
    for (n, machine) in machines.into_iter().enumerate() {
        let gpus = machine.class.gpus;
        nodes.push((site.join(&format!("n{n}"), machine), gpus));
    }
    let mut running: Vec<Token> = Vec::new();
    for step in steps {
        match step {
            Step::Submit { mut shape, priority, types } => {
                if types == [SLICE] {
                    shape.gpus_per_rank = shape.gpus_per_rank.min(1);
                }
                site.submit(shape, priority, &types);
            }
            Step::Start => running.extend(site.start()),
            Step::Finish(n) if !running.is_empty() => {
                let token = running.remove(n % running.len());
                site.finish(token);
            }
            Step::FailLaunch(n) if !running.is_empty() => {
                let token = running.remove(n % running.len());
                site.fail_launch(token);
            }
            Step::Out(n) => site.out(nodes[n % nodes.len()].0),
            Step::Sick(n, slot) => {
                let (node, gpus) = nodes[n % nodes.len()];
                if gpus > 0 {
                    site.sick(node, slot % gpus);
                }
            }
            Step::Silent(n) => {
                site.unheard.insert(nodes[n % nodes.len()].0);
            }
            Step::Wait => site.wait_ms(60_000),
            Step::Finish(_) | Step::FailLaunch(_) => {}
        }
    }
    site
}

fn sites() -> impl Strategy<Value = Site> {
    let machines = prop::collection::vec(machine(), 1..6);
    (machines, prop::collection::vec(step(), 1..40)).prop_map(|(machines, steps)| play(machines, steps)).no_shrink()
}

impl std::fmt::Debug for Site {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let jobs: Vec<_> = self.state.jobs.iter().map(|(id, job)| (id, &job.value.spec.shape)).collect();
        f.debug_struct("Site").field("jobs", &jobs).field("unheard", &self.unheard).finish()
    }
}

fn shape_of(site: &Site, job: JobId) -> Shape {
    site.state.jobs.get(&job).unwrap().value.spec.shape.clone()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Granting checks each part with the one `fit` against the state after the placements before it: a double booking
    /// or half a gang would be refused.
    #[test]
    fn every_placement_is_accepted_and_the_state_stays_sound(site in sites()) {
        let mut site = site;
        let plan = site.plan();
        let tokens = site.grant(&plan);
        prop_assert_eq!(tokens.len(), plan.places.len());
        prop_assert_eq!(site.state.check(), Ok(()));
        for place in &plan.places {
            let spec = &site.state.jobs.get(&place.task.job).unwrap().value.spec;
            let gpus = place.parts.iter().map(|part| part.gpu_order.len()).sum();
            let shape = spec.shape_of(place.parts.len(), gpus).expect("equal parts");
            prop_assert_eq!(place.parts.len(), usize::from(shape.nodes));
            for part in &place.parts {
                prop_assert!(!site.unheard.contains(&part.node));
            }
        }
    }

    #[test]
    fn no_gpu_and_no_core_is_booked_twice(site in sites()) {
        let mut taken: BTreeSet<(NodeId, u8)> = BTreeSet::new();
        let mut cores: BTreeMap<(NodeId, usize), u16> = BTreeMap::new();
        for part in site.plan().places.iter().flat_map(|place| &place.parts) {
            for slot in &part.gpu_order {
                prop_assert!(taken.insert((part.node, *slot)));
            }
            for (numa, count) in part.cores_by_numa.iter().enumerate() {
                *cores.entry((part.node, numa)).or_default() += count;
            }
        }
        for ((node, numa), count) in cores {
            prop_assert!(count <= site.state.allocs.get(&node).unwrap().cores_free[numa]);
        }
    }

    #[test]
    fn a_gang_gets_gpus_of_one_accepted_type(site in sites()) {
        for place in &site.plan().places {
            let shape = shape_of(&site, place.task.job);
            let types: BTreeSet<_> = place
                .parts
                .iter()
                .flat_map(|part| part.gpu_order.iter().map(|slot| (part.node, *slot)))
                .map(|(node, slot)| site.state.nodes.get(&node).unwrap().value.gpus[usize::from(slot)].gpu_type)
                .collect();
            prop_assert!(types.len() <= 1);
            for gpu_type in types {
                // Any of whole GPUs, or one that was named.
                let any = shape.gpu_types.is_empty() && site.state.gpu_type_name(gpu_type) != SLICE;
                prop_assert!(any || shape.gpu_types.contains(&gpu_type));
            }
        }
    }

    /// Of jobs with equal shapes, none starts before one that is ahead of it in the order.
    #[test]
    fn equal_shapes_start_in_order(site in sites()) {
        let placed: BTreeSet<_> = site.plan().places.iter().map(|place| place.task).collect();
        let mut waits: BTreeSet<Shape> = BTreeSet::new();
        for (key, ()) in &site.state.index.queue {
            let shape = shape_of(&site, key.task.job);
            if placed.contains(&key.task) {
                prop_assert!(!waits.contains(&shape), "{:?} overtook an equal job", key);
            } else {
                waits.insert(shape);
            }
        }
    }

    /// Nothing that would fit is left waiting, but for what is kept for a job before it; and each waiting task has a reason that says what it
    /// lacks.
    #[test]
    fn who_waits_does_not_fit_and_has_a_reason(site in sites()) {
        let mut site = site;
        let plan = site.plan();
        prop_assert_eq!(plan.places.len() + plan.reasons.len(), site.state.index.queue.len());
        for (_, reason) in &plan.reasons {
            prop_assert_ne!(&**reason, &Reason::Soon);
            prop_assert!(!reason.to_string().is_empty());
        }
        site.grant(&plan);
        for (key, ()) in &site.state.index.queue {
            let shape = site.state.cut_of(&site.state.jobs.get(&key.task.job).unwrap().value.spec).into_owned();
            let roomy = site.state.nodes.iter().filter(|(id, node)| {
                let alloc = site.state.allocs.get(id).unwrap();
                !site.unheard.contains(id) && fit::room_for(&node.value, alloc, &shape).is_ok()
            });
            let kept = matches!(site.reason(key.task.job), Reason::Reserved { .. });
            if shape.min_bandwidth_mbps == 0 && shape.nodes == 1 && !kept {
                prop_assert_eq!(roomy.count(), 0, "job {} would fit", key.task.job);
            }
            prop_assert_ne!(site.reason(key.task.job), Reason::Soon);
        }
        prop_assert!(site.plan().places.is_empty());
    }

    /// A cache filled by other states changes nothing, nor does planning piece by piece.
    #[test]
    fn the_cache_changes_no_plan(sites in prop::collection::vec(sites(), 2..4)) {
        let mut warm = Cache::default();
        for site in sites.iter().chain(&sites) {
            let again = plan(&site.state, &mut warm, &Limits::default(), &site.unheard);
            prop_assert_eq!(again, site.plan());
        }
    }
}
