//! A small cluster for the planner's tests: machines and jobs made by the same commands as in the real one.
#![allow(dead_code)]

use std::collections::{BTreeMap, BTreeSet};

use scheduling::plan::{Cache, Limits, Plan, plan};
use scheduling::{Reason, reason_for};
use statemachine::command::{
    GpuFacts, GpuHealthChange, LaunchFault, NodeOut, PartReport, RegisterNode, Report, ReportExit, ReportItem,
    SetPolicy, SetPriority, SetTenant, SubmitJob, default_retry,
};
use statemachine::record::{Array, Class, Exit, ExitCause, GpuHealth, KillStrength, PartState, PciClass, StoredReply};
use statemachine::settings::Settings;
use statemachine::spec::{Body, JobSpec, Shape, Terms};
use statemachine::{Cmd, Command, Entry, GpuUuid, JobId, NodeId, Outcome, Reply, State, Token};

pub struct Site {
    pub state: State,
    pub unheard: BTreeSet<NodeId>,
    /// Cluster time that passes from one command to the next.
    pub tick_ms: u64,
}

/// A machine to register: cores in two NUMA domains, GPUs of one type.
#[derive(Clone, Debug)]
pub struct Machine {
    pub gpu_type: &'static str,
    pub class: Class,
    pub cores_by_numa: Vec<u16>,
    pub mem_mib: u64,
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

/// The original's mock machine: 4 V100, NVLink pairs 0-1 and 2-3, one socket a pair.
pub fn mock_v100() -> Machine {
    Machine { gpu_type: "v100", class: pairs(4, 2, 20_000), cores_by_numa: vec![16, 16], mem_mib: 131_072 }
}

/// Eight GPUs behind one NVSwitch.
pub fn hgx(gpu_type: &'static str) -> Machine {
    let mut class = pairs(8, 18, 20_600);
    class.nvlinks = (0..64).map(|cell| if cell / 8 == cell % 8 { 0 } else { 18 }).collect();
    class.nvswitch = true;
    Machine { gpu_type, class, cores_by_numa: vec![48, 48], mem_mib: 1 << 20 }
}

pub fn cpu_only() -> Machine {
    Machine { gpu_type: "", class: Class::default(), cores_by_numa: vec![8, 8], mem_mib: 32_768 }
}

/// NVLink pairs (0-1, 2-3 ...); the lower half of the GPUs on one socket, the upper on the other.
pub fn pairs(gpus: u8, links: u8, mbps_per_link: u32) -> Class {
    let cells = || (0..gpus).flat_map(|a| (0..gpus).map(move |b| (a, b)));
    let socket = |gpu: u8| u8::from(gpu >= gpus / 2);
    Class {
        gpus,
        nvlinks: cells().map(|(a, b)| if a != b && a / 2 == b / 2 { links } else { 0 }).collect(),
        pci: cells()
            .map(|(a, b)| match () {
                () if a == b => PciClass::Same,
                () if socket(a) == socket(b) => PciClass::Node,
                () => PciClass::Sys,
            })
            .collect(),
        nvlink_mbps_per_link: mbps_per_link,
        nvswitch: false,
        pcie_mbps: 12_000,
        inter_socket_mbps: 10_000,
        intel_cpu: true,
        p2p: true,
        numa: (0..gpus).map(socket).collect(),
        nics: Vec::new(),
    }
}

impl Default for Site {
    fn default() -> Self {
        Self { state: State::new([7; 16], Settings::default()), unheard: BTreeSet::new(), tick_ms: 1 }
    }
}

impl Site {
    pub fn command(&mut self, body: Command) -> Outcome {
        self.command_of("alice", body)
    }

    fn command_of(&mut self, user: &str, body: Command) -> Outcome {
        let cmd = Cmd { request: None, actor: user.into(), body };
        let entry = Entry {
            level: self.state.meta.level,
            clock_ms: self.state.meta.clock_ms + self.tick_ms,
            wall_ms: 1_700_000_000_001i64.saturating_add_unsigned(self.state.meta.clock_ms),
            salt: 9,
            cmds: vec![cmd],
        };
        self.state.apply(&entry).expect("this level").remove(0)
    }

    fn done(&mut self, body: Command) -> Reply {
        match self.command(body) {
            Outcome::Done(reply) => reply,
            other => panic!("refused: {other:?}"),
        }
    }

    pub fn join(&mut self, name: &str, machine: Machine) -> NodeId {
        self.join_with(name, machine, &[])
    }

    /// With labels.
    pub fn join_with(&mut self, name: &str, machine: Machine, labels: &[(&str, &str)]) -> NodeId {
        let id = self.state.nodes.len() as u8 + 1;
        let gpus = (0..machine.class.gpus).map(|slot| GpuFacts {
            uuid: GpuUuid([id, slot, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, (self.state.nodes.len() >> 8) as u8]),
            gpu_type: machine.gpu_type.into(),
            mem_mib: 32_510,
            numa: machine.class.numa[usize::from(slot)],
            health: GpuHealth::Ok,
            reason: String::new(),
        });
        let register = RegisterNode {
            name: name.into(),
            address: format!("{name}:1"),
            host: name.into(),
            machine_id: [id; 16],
            boot_id: [id; 16],
            version: "test".into(),
            gpus: gpus.collect(),
            class: machine.class,
            cores_by_numa: machine.cores_by_numa,
            mem_mib: machine.mem_mib,
            simulated: true,
            kill: KillStrength::PidNamespace,
            labels: labels.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect(),
            max_token: Token(0),
            fence_new: false,
            running: Vec::new(),
            finished: Vec::new(),
            dead: Vec::new(),
            after_epoch: 0,
        };
        match self.done(Command::RegisterNode(Box::new(register))) {
            Reply::Registered { node, .. } => node,
            other => panic!("{other:?}"),
        }
    }

    pub fn submit(&mut self, shape: Shape, priority: i32, gpu_types: &[&str]) -> JobId {
        self.submit_for("default", shape, priority, gpu_types)
    }

    pub fn policy(&mut self, set: SetPolicy) {
        self.done(Command::SetPolicy(set));
    }

    /// Jobs of `high` end those of `low`, and nobody else ends any.
    pub fn urgent_and_low(&mut self) {
        for (name, value, preempts) in [("low", 0, false), ("high", 100, true)] {
            let (name, create, tenants) = (name.into(), true, Vec::new());
            let set = SetPriority { name, create, value, tenants, preempts, preemptible: !preempts };
            self.done(Command::SetPriority(set));
        }
        self.policy(SetPolicy { turn_gpu_ms: Some(0), ..SetPolicy::default() });
    }

    pub fn tenant(&mut self, set: SetTenant) {
        self.done(Command::SetTenant(Box::new(SetTenant { create: true, ..set })));
    }

    pub fn submit_for(&mut self, tenant: &str, shape: Shape, priority: i32, gpu_types: &[&str]) -> JobId {
        self.submit_limited(tenant, shape, priority, gpu_types, 0)
    }

    /// Of a named priority; empty = none.
    pub fn submit_of(&mut self, class: &str, tenant: &str, shape: Shape) -> JobId {
        let submit = SubmitJob { priority_class: class.into(), ..asked(tenant, shape, 0, &[], 0) };
        self.submitted(submit)
    }

    /// Of a named priority, with a time limit.
    pub fn submit_of_limited(&mut self, class: &str, shape: Shape, limit_ms: u64) -> JobId {
        let submit = SubmitJob { priority_class: class.into(), ..asked("default", shape, 0, &[], limit_ms) };
        self.submitted(submit)
    }

    /// With a time limit in ms; 0 = none. The kill grace is 10 s.
    pub fn submit_limited(
        &mut self,
        tenant: &str,
        shape: Shape,
        priority: i32,
        gpu_types: &[&str],
        limit_ms: u64,
    ) -> JobId {
        self.submitted(asked(tenant, shape, priority, gpu_types, limit_ms))
    }

    /// Of this user, in the default tenant.
    pub fn submit_by(&mut self, user: &str, shape: Shape, priority: i32, limit_ms: u64) -> JobId {
        let submit = asked("default", shape, priority, &[], limit_ms);
        match self.command_of(user, Command::SubmitJob(Box::new(submit))) {
            Outcome::Done(Reply::Stored(StoredReply::Job(job))) => job,
            other => panic!("{other:?}"),
        }
    }

    /// A job of this user with this limit ran for so long: with a GPU to spare and nothing that waits.
    pub fn ran(&mut self, user: &str, limit_ms: u64, ran_ms: u64) {
        self.submit_by(user, shape(1, 1, 1), 0, limit_ms);
        let token = self.start()[0];
        self.started(token);
        self.wait_ms(ran_ms);
        self.finish(token);
    }

    /// In a reservation.
    pub fn submit_inside(&mut self, name: &str, shape: Shape, limit_ms: u64) -> JobId {
        self.submitted(asked_inside(name, shape, limit_ms))
    }

    /// The same, where it may be refused.
    pub fn try_submit_inside(&mut self, name: &str, shape: Shape, limit_ms: u64) -> Outcome {
        self.command(Command::SubmitJob(Box::new(asked_inside(name, shape, limit_ms))))
    }

    /// An array of `tasks` tasks.
    pub fn submit_array(&mut self, tenant: &str, shape: Shape, tasks: u32, throttle: u32) -> JobId {
        let array = Some(Array { ranges: vec![(0, tasks - 1)], throttle });
        let mut submit = asked(tenant, shape, 0, &[], 0);
        submit.spec.terms = Some(Box::new(Terms { array, ..Terms::default() }));
        self.submitted(submit)
    }

    /// It has twice the GPUs where there is room, up to so many times over.
    pub fn submit_elastic(&mut self, tenant: &str, shape: Shape, doublings: u8, limit_ms: u64) -> JobId {
        let mut submit = asked(tenant, shape, 0, &[], limit_ms);
        submit.spec.terms = Some(Box::new(Terms { doublings, ..Terms::default() }));
        self.submitted(submit)
    }

    fn submitted(&mut self, submit: SubmitJob) -> JobId {
        match self.done(Command::SubmitJob(Box::new(submit))) {
            Reply::Stored(StoredReply::Job(job)) => job,
            other => panic!("{other:?}"),
        }
    }

    /// Plans with an empty cache.
    pub fn plan(&self) -> Plan {
        plan(&self.state, &mut Cache::default(), &Limits::default(), &self.unheard)
    }

    /// Plans and applies: every placement must be accepted. The tokens, in order.
    pub fn start(&mut self) -> Vec<Token> {
        let plan = self.plan();
        self.grant(&plan)
    }

    pub fn grant(&mut self, plan: &Plan) -> Vec<Token> {
        let mut tokens = Vec::new();
        for command in plan.commands() {
            match self.done(Command::Plan(command)) {
                Reply::Plan(answers) => {
                    tokens.extend(answers.into_iter().map(|answer| answer.expect("a placement that fits")));
                }
                other => panic!("{other:?}"),
            }
        }
        tokens
    }

    pub fn reason(&self, job: JobId) -> Reason {
        reason_for(&self.state, self.state.front_task(job), &self.unheard).expect("a waiting job")
    }

    /// Names of the nodes and the GPU slots of a job's placement in the plan.
    pub fn placed(&self, plan: &Plan, job: JobId) -> Option<Vec<(String, Vec<u8>)>> {
        let place = plan.places.iter().find(|place| place.task.job == job)?;
        let part = |part: &statemachine::command::PlacePart| (self.name(part.node), part.gpu_order.clone());
        Some(place.parts.iter().map(part).collect())
    }

    pub fn name(&self, node: NodeId) -> String {
        self.state.nodes.get(&node).unwrap().value.name.clone()
    }

    pub fn cancel(&mut self, job: JobId) {
        self.done(Command::Cancel { job });
    }

    pub fn out(&mut self, node: NodeId) {
        self.done(Command::NodeAdmin { node, out: Some(NodeOut { reason: "maintenance".into(), evict_in_ms: None }) });
    }

    pub fn sick(&mut self, node: NodeId, slot: u8) {
        let epoch = self.state.nodes.get(&node).unwrap().value.epoch;
        self.done(Command::GpuHealth(GpuHealthChange {
            node,
            epoch,
            slot,
            health: GpuHealth::Quarantined,
            xid: 79,
            reason: "fell off the bus".into(),
            end_lease: false,
        }));
    }

    fn report(&mut self, token: Token, what: impl Fn(u32, u16) -> PartReport) {
        let lease = self.state.leases.get(&token).unwrap().value.clone();
        for part in lease.parts.into_iter().filter(|part| part.state != PartState::Released) {
            let items = vec![ReportItem { token, what: what(part.first_rank, part.ranks) }];
            self.done(Command::Report(Report { node: part.node, epoch: part.epoch, items }));
        }
    }

    /// All ranks exit 0 and their GPUs are free.
    pub fn finish(&mut self, token: Token) {
        self.exited(token, Exit { code: 0, signal: 0 }, ExitCause::Own);
    }

    /// The ranks of a lease that was decided are gone after their signal.
    pub fn drain(&mut self, token: Token) {
        self.exited(token, Exit { code: 0, signal: 15 }, ExitCause::Stopped);
    }

    fn exited(&mut self, token: Token, exit: Exit, cause: ExitCause) {
        self.report(token, |first, ranks| {
            let ranks = first..first + u32::from(ranks);
            PartReport::Exited { exits: ranks.map(|rank| ReportExit { rank, exit, cause }).collect(), released: true }
        });
    }

    /// All its ranks run.
    pub fn started(&mut self, token: Token) {
        if self.state.leases.get(&token).unwrap().value.parts.len() > 1 {
            self.report(token, |_, _| PartReport::Prepared { port: 1 });
        }
        self.report(token, |_, _| PartReport::Started { port: 1 });
    }

    /// The launch fails by the node's fault, and nothing of it is left.
    pub fn fail_launch(&mut self, token: Token) {
        self.report(token, |_, _| PartReport::LaunchFailed { fault: LaunchFault::Node, why: "disk full".into() });
        if self.state.leases.get(&token).is_some() {
            self.report(token, |_, _| PartReport::Released);
        }
    }

    /// Lets cluster time pass.
    pub fn wait_ms(&mut self, ms: u64) {
        self.state.meta.clock_ms += ms;
        self.done(Command::Tick);
    }
}

fn asked_inside(name: &str, shape: Shape, limit_ms: u64) -> SubmitJob {
    let mut asked = asked("default", shape, 0, &[], limit_ms);
    asked.spec.terms = Some(Box::new(Terms { reservation: name.into(), ..Terms::default() }));
    asked
}

fn asked(tenant: &str, shape: Shape, priority: i32, gpu_types: &[&str], limit_ms: u64) -> SubmitJob {
    let spec = JobSpec {
        name: "job".into(),
        priority,
        shape,
        limit_ms,
        lease_ttl_ms: 300_000,
        kill_grace_ms: 10_000,
        retry: default_retry(),
        labels: BTreeMap::new(),
        terms: None,
    };
    SubmitJob {
        tenant: tenant.into(),
        queue: "default".into(),
        gpu_types: gpu_types.iter().map(|name| (*name).to_owned()).collect(),
        spec,
        body: Body { argv: vec!["true".into()], ..Body::default() },
        hold: false,
        priority_class: String::new(),
    }
}
