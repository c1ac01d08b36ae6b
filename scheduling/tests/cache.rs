//! What a planner keeps from plan to plan changes no answer: through random histories of a cluster, with all that jobs may say and all that
//! may happen to machines, each plan, reason and start is that of a planner which has seen nothing before.

mod site;

use std::collections::BTreeSet;

use proptest::prelude::*;
use scheduling::plan::{Cache, Limits, Plan, plan};
use scheduling::reason::Reason;
use scheduling::{Explainer, Outlook};
use site::{Machine, Site, cpu_only, hgx, mock_v100, shape};
use statemachine::command::{CreateReservation, Machines, SetPriority};
use statemachine::domain::{Level, Topology};
use statemachine::selector::Selector;
use statemachine::spec::Shape;
use statemachine::{Command, NodeId, Outcome, Token};

const MINUTE: u64 = 60_000;

#[derive(Clone, Debug)]
enum Step {
    Join(Machine, u8),
    Submit {
        shape: Shape,
        class: &'static str,
        types: Vec<&'static str>,
        limit_ms: u64,
    },
    Inside(Shape),
    /// What the plan says is done, with its preemptions or without.
    Start(bool),
    Finish(usize),
    FailLaunch(usize),
    Out(usize),
    Back(usize),
    Sick(usize, u8),
    Silent(usize),
    Heard,
    Wait(u64),
    SetAside {
        node: usize,
        in_ms: u64,
        maintenance: bool,
    },
    LeasesPerNode(u32),
}

fn machine() -> impl Strategy<Value = Machine> {
    prop_oneof![
        1 => Just(mock_v100()),
        3 => Just(hgx("h100")),
        1 => Just(hgx("a100")),
        1 => Just(cpu_only()),
        1 => Just(Machine { cores_by_numa: vec![3, 1], mem_mib: 6_000, ..mock_v100() }),
    ]
}

fn selector() -> impl Strategy<Value = Option<Box<Selector>>> {
    let by_labels = |text: &str| Selector { constraint: text.parse().unwrap(), ..Selector::default() };
    let all = [
        by_labels("rack=r0"),
        by_labels("rack!=r0"),
        by_labels("rack=r1|rack=r2"),
        by_labels("rack=nowhere"),
        Selector { without: ["n0".to_owned()].into(), ..Selector::default() },
    ];
    prop_oneof![
        4 => Just(None),
        1 => prop::sample::select(all.to_vec()).prop_map(|selector| Some(Box::new(selector))),
    ]
}

fn topology() -> impl Strategy<Value = Option<Topology>> {
    let near = (prop::sample::select(vec![Level::Rack, Level::Block]), any::<bool>());
    prop_oneof![2 => Just(None), 1 => near.prop_map(|(level, required)| Some(Topology { level, required }))]
}

fn shapes() -> impl Strategy<Value = Shape> {
    let memory = prop_oneof![Just(0u64), Just(500), Just(40_000)];
    let bandwidth = prop_oneof![4 => Just(0u32), 1 => Just(30_000), 1 => Just(300_000)];
    let counts = (prop_oneof![3 => Just(1u16), 2 => 2u16..=3], 1u16..=2, 0u16..=4, 0u16..=5);
    (counts, memory, bandwidth, topology(), selector(), any::<bool>()).prop_map(
        |((nodes, ranks, gpus, cores_per_rank), mem_mib_per_rank, min_bandwidth_mbps, topology, machines, mixes)| {
            Shape {
                cores_per_rank,
                mem_mib_per_rank,
                min_bandwidth_mbps,
                topology: topology.filter(|_| nodes > 1),
                machines,
                mix_types: mixes && nodes > 1 && gpus > 0,
                ..shape(nodes, ranks, gpus)
            }
        },
    )
}

fn step() -> impl Strategy<Value = Step> {
    let types = prop_oneof![4 => Just(vec![]), 1 => Just(vec!["h100"]), 1 => Just(vec!["a100", "h100"])];
    let class = prop::sample::select(vec!["", "", "low", "high"]);
    let limit_ms = prop::sample::select(vec![0, MINUTE, 3 * MINUTE, 20 * MINUTE]);
    prop_oneof![
        1 => (machine(), 0u8..4).prop_map(|(machine, rack)| Step::Join(machine, rack)),
        10 => (shapes(), class, types, limit_ms)
            .prop_map(|(shape, class, types, limit_ms)| Step::Submit { shape, class, types, limit_ms }),
        1 => shapes().prop_map(Step::Inside),
        5 => any::<bool>().prop_map(Step::Start),
        3 => any::<usize>().prop_map(Step::Finish),
        1 => any::<usize>().prop_map(Step::FailLaunch),
        1 => any::<usize>().prop_map(Step::Out),
        1 => any::<usize>().prop_map(Step::Back),
        1 => (any::<usize>(), 0u8..8).prop_map(|(node, slot)| Step::Sick(node, slot)),
        1 => any::<usize>().prop_map(Step::Silent),
        1 => Just(Step::Heard),
        2 => prop::sample::select(vec![10, MINUTE, 15 * MINUTE]).prop_map(Step::Wait),
        1 => (any::<usize>(), prop::sample::select(vec![MINUTE, 5 * MINUTE]), any::<bool>())
            .prop_map(|(node, in_ms, maintenance)| Step::SetAside { node, in_ms, maintenance }),
        1 => (1u32..5).prop_map(|limit| Step::LeasesPerNode(limit * limit)),
    ]
}

/// A cluster and what has come of it.
struct History {
    site: Site,
    nodes: Vec<(NodeId, u8)>,
    running: Vec<Token>,
}

impl History {
    fn new(machines: Vec<(Machine, u8)>) -> Self {
        let mut history = Self { site: Site::default(), nodes: Vec::new(), running: Vec::new() };
        for (name, value, preempts, preemptible) in [("low", 0, false, true), ("high", 50, true, false)] {
            let set =
                SetPriority { name: name.into(), create: true, value, tenants: Vec::new(), preempts, preemptible };
            history.site.command(Command::SetPriority(set));
        }
        machines.into_iter().for_each(|(machine, rack)| history.join(machine, rack));
        history
    }

    fn join(&mut self, machine: Machine, rack: u8) {
        let gpus = machine.class.gpus;
        let (name, rack) = (format!("n{}", self.nodes.len()), format!("r{rack}"));
        // One without labels, too.
        let labels = [("rack", rack.as_str()), ("block", "b")];
        let node = self.site.join_with(&name, machine, if rack == "r3" { &[] } else { &labels });
        self.nodes.push((node, gpus));
    }

    fn node(&self, nth: usize) -> (NodeId, u8) {
        self.nodes[nth % self.nodes.len()]
    }

    fn take(&mut self, nth: usize) -> Option<Token> {
        self.running
            .retain(|token| self.site.state.leases.get(token).is_some_and(|lease| lease.value.verdict.is_none()));
        (!self.running.is_empty()).then(|| self.running.remove(nth % self.running.len()))
    }

    fn play(&mut self, step: Step) {
        match step {
            Step::Join(machine, rack) => self.join(machine, rack),
            Step::Submit { shape, class: "", types, limit_ms } => {
                self.site.submit_limited("default", shape, 0, &types, limit_ms);
            }
            Step::Submit { shape, class, limit_ms, .. } => {
                self.site.submit_of_limited(class, shape, limit_ms);
            }
            Step::Inside(shape) => {
                self.site.try_submit_inside("demo", shape, MINUTE);
            }
            Step::Start(preempts) => {
                let plan = self.site.plan();
                for made in plan.preempts.iter().filter(|_| preempts) {
                    self.site.command(Command::Preempt(made.clone()));
                }
                self.grant(plan.commands());
            }
            Step::Finish(nth) => {
                if let Some(token) = self.take(nth) {
                    self.site.started(token);
                    self.site.finish(token);
                }
            }
            Step::FailLaunch(nth) => {
                if let Some(token) = self.take(nth) {
                    self.site.fail_launch(token);
                }
            }
            Step::Out(nth) => self.site.out(self.node(nth).0),
            Step::Back(nth) => {
                let node = self.node(nth).0;
                self.site.command(Command::NodeAdmin { node, out: None });
            }
            Step::Sick(nth, slot) => {
                let (node, gpus) = self.node(nth);
                if gpus > 0 {
                    self.site.sick(node, slot % gpus);
                }
            }
            Step::Silent(nth) => {
                self.site.unheard.insert(self.node(nth).0);
            }
            Step::Heard => self.site.unheard.clear(),
            Step::Wait(ms) => self.site.wait_ms(ms),
            Step::SetAside { node, in_ms, maintenance } => {
                let name = self.site.name(self.node(node).0);
                let create = CreateReservation {
                    name: if maintenance { format!("m{}", self.site.state.reservations.len()) } else { "demo".into() },
                    maintenance,
                    machines: Machines { names: vec![name], ..Machines::default() },
                    start_wall_ms: self.site.state.meta.wall_ms.saturating_add_unsigned(in_ms),
                    duration_ms: 10 * MINUTE,
                    ..CreateReservation::default()
                };
                self.site.command(Command::CreateReservation(Box::new(create)));
            }
            Step::LeasesPerNode(limit) => self.site.state.meta.settings.leases_per_node = limit,
        }
    }

    /// What apply refuses stays.
    fn grant(&mut self, plans: Vec<statemachine::command::Plan>) {
        for plan in plans {
            if let Outcome::Done(statemachine::Reply::Plan(answers)) = self.site.command(Command::Plan(plan)) {
                self.running.extend(answers.into_iter().flatten());
            }
        }
    }
}

fn agrees(site: &Site, warm: &mut Cache) -> Result<(), TestCaseError> {
    let Site { state, unheard, .. } = site;
    for limits in [Limits::default(), Limits { steps: 30, ..Limits::default() }, Limits::of_leader()] {
        let mut at = limits;
        // On to the end, piece by piece.
        for _ in 0..20 {
            let fresh = plan(state, &mut Cache::default(), &at, unheard);
            prop_assert_eq!(&plan(state, warm, &at, unheard), &fresh);
            says_less(&plan(state, warm, &Limits { in_brief: true, ..at.clone() }, unheard), &fresh)?;
            if !fresh.unfinished || fresh.reached == at.after {
                break;
            }
            at.after = fresh.reached;
        }
    }
    let waiting: BTreeSet<_> = state.index.queue.iter().map(|(key, ())| key.task).collect();
    let fresh = Outlook::new(state, &mut Cache::default(), unheard, 10_000);
    let kept = Outlook::new(state, warm, unheard, 10_000);
    for task in waiting {
        prop_assert_eq!((kept.start(task), kept.reason(task)), (fresh.start(task), fresh.reason(task)));
        let alone = Explainer::new(state, &mut Cache::default(), unheard).reason_for(task);
        prop_assert_eq!(Explainer::new(state, warm, unheard).reason_for(task), alone);
    }
    Ok(())
}

/// In brief a plan differs in the reasons alone, and these only in their numbers.
fn says_less(brief: &Plan, full: &Plan) -> Result<(), TestCaseError> {
    prop_assert_eq!(&Plan { reasons: full.reasons.clone(), ..brief.clone() }, full);
    prop_assert_eq!(brief.reasons.len(), full.reasons.len());
    for ((task, short), (of, long)) in brief.reasons.iter().zip(&full.reasons) {
        prop_assert_eq!(task, of);
        let is_kept = |reason: &Reason| matches!(reason, Reason::Reserved { .. });
        let alike = short == long || short.ends_with_time() && long.ends_with_time() && is_kept(short) == is_kept(long);
        prop_assert!(alike, "{task:?} waits: {long}; in brief: {short}");
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, max_shrink_iters: 256, ..ProptestConfig::default() })]

    #[test]
    fn a_kept_cache_answers_as_an_empty_one(
        machines in prop::collection::vec((machine(), 0u8..4), 1..7),
        steps in prop::collection::vec(step(), 1..50),
    ) {
        let mut history = History::new(machines);
        let mut warm = Cache::default();
        for step in steps {
            history.play(step);
            agrees(&history.site, &mut warm)?;
        }
    }
}
