//! A small cluster to tell stories with: every entry is applied, then the whole state is checked.
#![allow(dead_code)] // Each test binary uses its part.

use std::borrow::Cow;
use std::collections::BTreeMap;

use statemachine::command::*;
use statemachine::record::*;
use statemachine::settings::Settings;
use statemachine::spec::{JobSpec, Shape};
use statemachine::*;

pub struct World {
    pub state: State,
    pub clock_ms: u64,
    /// How far the leader's wall clock has leapt.
    pub wall_ahead_ms: i64,
    pub log: Vec<Entry>,
}

pub const WALL0: i64 = 1_800_000_000_000;

impl World {
    pub fn new() -> Self {
        Self::with(Settings::default())
    }

    pub fn with(settings: Settings) -> Self {
        Self { state: State::new([7; 16], settings), clock_ms: 1_000, wall_ahead_ms: 0, log: Vec::new() }
    }

    /// One entry with these commands, at the world's clock.
    pub fn entry(&mut self, cmds: Vec<Cmd>) -> Vec<Outcome> {
        let entry = Entry {
            level: LEVEL,
            clock_ms: self.clock_ms,
            wall_ms: WALL0 + i64::try_from(self.clock_ms).unwrap() + self.wall_ahead_ms,
            salt: 99 + u64::try_from(self.log.len()).unwrap(),
            cmds,
        };
        let outcomes = self.state.apply(&entry).expect("a known level");
        self.log.push(entry);
        self.state.check().expect("all invariants hold");
        outcomes
    }

    pub fn run(&mut self, body: Command) -> Outcome {
        self.run_as("ada", None, body)
    }

    pub fn run_as(&mut self, actor: &str, request: Option<RequestId>, body: Command) -> Outcome {
        self.entry(vec![Cmd { request, actor: actor.into(), body }]).pop().expect("one outcome")
    }

    /// Time passes; due timers fire.
    pub fn wait(&mut self, ms: u64) {
        self.clock_ms += ms;
        self.entry(Vec::new());
    }

    pub fn submit(&mut self, job: SubmitJob) -> JobId {
        match self.run(Command::SubmitJob(Box::new(job))) {
            Outcome::Done(Reply::Stored(StoredReply::Job(id))) => id,
            other => panic!("submit: {other:?}"),
        }
    }

    /// As the newest registration of its node.
    pub fn register(&mut self, mut node: RegisterNode) -> (NodeId, u64) {
        node.after_epoch = self.state.node_epoch(&node.name);
        match self.run(Command::RegisterNode(Box::new(node))) {
            Outcome::Done(Reply::Registered { node, epoch }) => (node, epoch),
            other => panic!("register: {other:?}"),
        }
    }

    /// Places the job's next attempt on the first GPUs that are free on each of these nodes.
    pub fn place(&mut self, job: JobId, nodes: &[NodeId]) -> Result<Token, Rejection> {
        let place = self.placement(job, nodes);
        self.plan(vec![place]).pop().expect("one placement")
    }

    pub fn plan(&mut self, places: Vec<Place>) -> Vec<Result<Token, Rejection>> {
        match self.run(Command::Plan(Plan { base_index: 0, places })) {
            Outcome::Done(Reply::Plan(answers)) => answers,
            other => panic!("plan: {other:?}"),
        }
    }

    pub fn placement(&self, job: JobId, nodes: &[NodeId]) -> Place {
        self.grown(job, nodes, 0)
    }

    /// With its GPUs doubled so many times over.
    pub fn grown(&self, job: JobId, nodes: &[NodeId], times: usize) -> Place {
        let shape = self.shape_on(job, nodes.len(), times);
        // The next task of an array, or the only one.
        let task = self.state.front_task(job);
        let attempt = self.state.tasks.get(&task).map_or(0, |task| task.value.attempt) + 1;
        let parts = nodes.iter().map(|id| self.part(*id, &shape)).collect();
        Place { task, attempt, parts }
    }

    /// The job's shape on so many nodes: cut, where it is open and can be.
    fn shape_on(&self, job: JobId, nodes: usize, times: usize) -> Shape {
        let Some(spec) = self.state.jobs.get(&job).map(|job| &job.value.spec) else { return shape(1, 1, 1) };
        let gpus = spec.sizes().nth(times).unwrap_or(spec.shape.gpus());
        spec.shape_of(nodes, gpus as usize).map_or_else(|| spec.shape.clone(), Cow::into_owned)
    }

    pub fn part(&self, id: NodeId, shape: &Shape) -> PlacePart {
        self.part_of(id, self.state.allocs.get(&id).unwrap(), shape)
    }

    fn part_of(&self, id: NodeId, alloc: &Alloc, shape: &Shape) -> PlacePart {
        let node = &self.state.nodes.get(&id).unwrap().value;
        let (cores, mem_mib) = fit::request_on(node, shape);
        let usable = fit::usable_gpus(node, alloc, &shape.gpu_types);
        let free = (0..128u8).filter(|slot| usable & (1 << slot) != 0);
        PlacePart {
            node: id,
            epoch: node.epoch,
            gpu_order: free.take(usize::try_from(shape.gpus_per_node()).unwrap()).collect(),
            cores_by_numa: fit::take_cores(alloc, cores, &[]).unwrap_or_else(|| vec![u16::try_from(cores).unwrap()]),
            mem_mib,
        }
    }

    /// Makes room for the job on these nodes: on the first GPUs that will be free there once the victims have drained.
    pub fn preempt(&mut self, job: JobId, victims: &[Token], nodes: &[NodeId]) -> Outcome {
        let preempt = self.preemption(job, victims, nodes);
        self.run(Command::Preempt(preempt))
    }

    pub fn preemption(&self, job: JobId, victims: &[Token], nodes: &[NodeId]) -> Preempt {
        let shape = self.shape_on(job, nodes.len(), 0);
        let task = self.state.front_task(job);
        let part = |node: &NodeId| {
            let free = self.state.free_after(*node, victims, task).expect("a known node");
            self.part_of(*node, &free, &shape)
        };
        Preempt { task, victims: victims.to_vec(), parts: nodes.iter().map(part).collect() }
    }

    pub fn report(&mut self, node: NodeId, token: Token, what: PartReport) -> Result<(), Rejection> {
        let epoch = self.epoch(node);
        self.report_in(node, epoch, token, what)
    }

    pub fn report_in(&mut self, node: NodeId, epoch: u64, token: Token, what: PartReport) -> Result<(), Rejection> {
        match self.run(Command::Report(Report { node, epoch, items: vec![ReportItem { token, what }] })) {
            Outcome::Done(Reply::Report(mut answers)) => answers.pop().expect("one item"),
            other => panic!("report: {other:?}"),
        }
    }

    pub fn epoch(&self, node: NodeId) -> u64 {
        self.state.nodes.get(&node).unwrap().value.epoch
    }

    /// What people see of the job.
    pub fn shown(&self, job: JobId) -> String {
        let view = self.state.job_view(job).expect("the job is known");
        match view.task.ending {
            Some(ending) if !["LOST", "PREEMPTED"].contains(&ending.name()) => {
                format!("{} ending={}", view.task.state.name(), ending.name())
            }
            _ => view.task.state.name().to_owned(),
        }
    }

    pub fn task(&self, job: JobId) -> &Task {
        &self.state.tasks.get(&TaskKey::only(job)).expect("the task has a record").value
    }

    pub fn code(outcome: &Outcome) -> Option<Code> {
        match outcome {
            Outcome::Rejected(rejection) => Some(rejection.code),
            _ => None,
        }
    }
}

pub fn shape(nodes: u16, ranks_per_node: u16, gpus_per_rank: u16) -> Shape {
    Shape {
        nodes,
        ranks_per_node,
        gpus_per_rank,
        gpu_types: [].into(),
        cores_per_rank: 0,
        mem_mib_per_rank: 0,
        mix_types: false,
        min_bandwidth_mbps: 0,
        topology: None,
        machines: None,
    }
}

pub fn job(shape: Shape) -> SubmitJob {
    SubmitJob {
        tenant: "default".into(),
        queue: "default".into(),
        gpu_types: Vec::new(),
        spec: JobSpec {
            name: "train".into(),
            priority: 0,
            shape,
            limit_ms: 0,
            lease_ttl_ms: 10_000,
            kill_grace_ms: 2_000,
            retry: default_retry(),
            labels: BTreeMap::new(),
            terms: None,
        },
        body: Body { argv: vec!["python3".into(), "train.py".into()], env: BTreeMap::new(), cwd: String::new() },
        hold: false,
        priority_class: String::new(),
    }
}

pub fn one_gpu() -> SubmitJob {
    job(shape(1, 1, 1))
}

/// A machine with GPUs `seed * 100 ..`, 8 cores a NUMA domain, 64 GiB.
pub fn machine(name: &str, seed: u8, gpus: u8) -> RegisterNode {
    let count = usize::from(gpus);
    RegisterNode {
        name: name.into(),
        address: format!("{name}:7401"),
        host: name.into(),
        machine_id: [seed; 16],
        boot_id: [1; 16],
        version: "0.1.0".into(),
        class: Class {
            gpus,
            nvlinks: vec![0; count * count],
            pci: vec![PciClass::Sys; count * count],
            numa: vec![0; count],
            ..Class::default()
        },
        cores_by_numa: vec![8, 8],
        mem_mib: 65_536,
        gpus: (0..gpus)
            .map(|slot| GpuFacts {
                uuid: GpuUuid([seed, slot, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]),
                gpu_type: "h100".into(),
                mem_mib: 81_559,
                numa: 0,
                health: GpuHealth::Ok,
                reason: String::new(),
            })
            .collect(),
        simulated: true,
        kill: KillStrength::PidNamespace,
        labels: BTreeMap::new(),
        max_token: Token(0),
        fence_new: false,
        running: Vec::new(),
        finished: Vec::new(),
        dead: Vec::new(),
        after_epoch: 0,
    }
}

pub fn exits(first: u32, count: u32, code: i32, cause: ExitCause) -> Vec<ReportExit> {
    (first..first + count).map(|rank| ReportExit { rank, exit: Exit { code, signal: 0 }, cause }).collect()
}

/// Ranks that ended by themselves, with nothing left behind.
pub fn ended(first: u32, count: u32, code: i32) -> PartReport {
    PartReport::Exited { exits: exits(first, count, code, ExitCause::Own), released: true }
}

pub fn request(n: u8) -> RequestId {
    RequestId([n; 16])
}

/// A UUIDv7 of this wall time.
pub fn request_at(wall_ms: i64, n: u8) -> RequestId {
    let mut id = [n; 16];
    id[..6].copy_from_slice(&wall_ms.to_be_bytes()[2..]);
    id[6] = 0x70;
    RequestId(id)
}
