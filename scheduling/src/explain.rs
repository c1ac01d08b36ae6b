//! Why a task waits: finds the first thing that binds. The planner's reasons and every replica's answer to
//! `ares queue` and `ares show` come from here.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use statemachine::domain::Path;
use statemachine::fit::{self, NoFit};
use statemachine::record::{Alloc, GpuHealth, Job, Node, NodeAdmin, Phase};
use statemachine::spec::Shape;
use statemachine::{GpuTypeId, NodeId, State, TaskKey};

use crate::choose::Shortage;
use crate::domains::domain_for;
use crate::machines::{Cache, Machines, is_present, want_of};
use crate::outlook::{Outlook, Start};
use crate::plan::waiting_task;
use crate::quota::Planned;
use crate::reason::{Best, Lack, Needs, Reason};
use crate::selection::{allowed, told};
use crate::windows;

/// Why a task waits, from any replica's state; `None` when it does not wait (it runs, has ended, or is unknown).
///
/// Plans a whole cycle; for a whole queue ask one `Explainer`.
pub fn reason_for(state: &State, task: TaskKey, unheard: &BTreeSet<NodeId>) -> Option<Reason> {
    let mut cache = Cache::default();
    let outlook = Arc::new(Outlook::new(state, &mut cache, unheard, 0));
    let reason = Explainer::new(state, &mut cache, unheard).with(outlook).reason_for(task)?;
    Some(Reason::clone(&reason))
}

/// The first thing that binds a task by itself, whoever else waits.
pub(crate) fn reason_with(
    state: &State,
    cache: &mut Cache,
    task: TaskKey,
    unheard: &BTreeSet<NodeId>,
) -> Option<Reason> {
    Explainer::new(state, cache, unheard).reason_for(task).map(|reason| Reason::clone(&reason))
}

/// Domains that a reason names.
const DOMAINS: usize = 4;

/// Answers for many tasks of one state: equal shapes are looked at once.
pub struct Explainer<'a> {
    machines: Machines<'a>,
    cache: &'a mut Cache,
    by_shape: BTreeMap<&'a Shape, Arc<Reason>>,
    /// What a whole cycle says of all.
    outlook: Option<Arc<Outlook>>,
}

impl<'a> Explainer<'a> {
    /// `unheard` as the leader knows it; elsewhere empty, which takes silent machines for busy or free ones.
    pub fn new(state: &'a State, cache: &'a mut Cache, unheard: &'a BTreeSet<NodeId>) -> Self {
        cache.keep_what_holds(state);
        Self { machines: Machines::new(state, unheard), cache, by_shape: BTreeMap::new(), outlook: None }
    }

    /// With the outlook of this state, or of one a little older.
    pub fn with(self, outlook: Arc<Outlook>) -> Self {
        Self { outlook: Some(outlook), ..self }
    }

    /// Why a task waits; `None` when it does not.
    pub fn reason_for(&mut self, key: TaskKey) -> Option<Arc<Reason>> {
        let state = self.machines.state;
        let job = &state.jobs.get(&key.job)?.value;
        let task = state.tasks.get(&key).map(|task| &task.value);
        if let Some(Phase::Retrying { not_before_ms }) = task.map(|task| &task.phase) {
            let attempt = task.map_or(0, |task| task.attempt).saturating_add(1);
            let in_ms = not_before_ms.saturating_sub(state.meta.clock_ms);
            return Some(Arc::new(Reason::Backoff { attempt, in_ms }));
        }
        if task.is_none_or(|task| task.phase == Phase::Pending) && job.holds.any() {
            return Some(Arc::new(held(state, job)));
        }
        if let Some(reason) = of_array(state, job) {
            return Some(Arc::new(reason));
        }
        let (spec, _) = waiting_task(state, key)?;
        if let Some(reason) = windows::not_yet(state, spec) {
            return Some(Arc::new(reason));
        }
        let shape = &spec.shape;
        if let Some(claim) = state.claims.get(&key) {
            let left = claim.victims.iter().filter(|victim| state.leases.contains(victim)).count();
            let victims = u32::try_from(left).unwrap_or(u32::MAX);
            return Some(Arc::new(Reason::Preempting { needs: needs_of(state, shape), victims }));
        }
        if let Some(reason) = Planned::default().hit_by_shape(state, job.tenant, shape) {
            return Some(Arc::new(reason));
        }
        if !spec.reservation().is_empty() {
            // Its machines are few of those that a shape is explained by.
            let known = self.outlook.as_ref().and_then(|outlook| outlook.reason(key)).cloned();
            return Some(known.unwrap_or(Arc::new(Reason::Soon)));
        }
        let explained = || Arc::new(explain(&self.machines, self.cache, shape));
        let reason = self.by_shape.entry(shape).or_insert_with(explained).clone();
        if *reason != Reason::Soon {
            return Some(reason);
        }
        // It fits: what it could have may be kept for another one, or goes before its turn comes.
        Some(self.outlook.as_ref().and_then(|outlook| outlook.reason(key)).cloned().unwrap_or(reason))
    }

    /// When the task starts, as the outlook has it.
    pub fn start_of(&self, key: TaskKey) -> Start {
        self.outlook.as_ref().map_or(Start::Unknown, |outlook| outlook.start(key))
    }
}

/// What an array holds back: its own tasks under way, or a person's word against it.
fn of_array(state: &State, job: &Job) -> Option<Reason> {
    if let Some(holds) = state.array_of(job).map(|array| array.holds).filter(|holds| holds.user) {
        return Some(Reason::Held { holds });
    }
    let (array, progress) = job.array()?;
    let full = progress.left(array) > 0 && progress.room(array, &state.meta.settings) == 0;
    let limit = array.most_open(&state.meta.settings);
    full.then_some(Reason::ArrayLimit { open: progress.open, limit })
}

/// Which hold binds: a person's or a fault's first, then other jobs, then the calendar.
fn held(state: &State, job: &Job) -> Reason {
    let holds = job.holds;
    if holds.user || holds.launch || holds.orphan || holds.restore {
        return Reason::Held { holds };
    }
    let mut parents = job.waits_for();
    if let Some(first) = parents.next() {
        let more = u32::try_from(parents.count()).unwrap_or(u32::MAX);
        return Reason::Dependency { first: (first.kind, first.job), parents: more.saturating_add(1) };
    }
    let in_ms = job.spec.begin_wall_ms().saturating_sub(state.meta.wall_ms);
    Reason::BeginTime { in_ms: u64::try_from(in_ms).unwrap_or(0) }
}

/// The first thing that binds a shape on these machines.
///
/// A gang gets GPUs of one type, so each acceptable type is its own question, and the one that came farthest answers;
/// a gang that may mix types asks one question about all.
pub(crate) fn explain(machines: &Machines<'_>, cache: &mut Cache, shape: &Shape) -> Reason {
    if machines.state.nodes.is_empty() {
        return Reason::NoNodes;
    }
    if shape.gpus_per_node() == 0 {
        return Question::new(machines, shape, Vec::new()).answer(cache).1;
    }
    let present = present_types(machines.state);
    let mut types: Vec<GpuTypeId> = present.iter().copied().collect();
    if !shape.gpu_types.is_empty() {
        types = shape.gpu_types.iter().copied().filter(|gpu_type| present.contains(gpu_type)).collect();
    }
    // max_by_key takes the last of equals: the most preferred type goes last.
    let questions: Vec<Vec<GpuTypeId>> = match shape.mix_types && !types.is_empty() {
        true => vec![types],
        false => types.into_iter().rev().map(|gpu_type| vec![gpu_type]).collect(),
    };
    let answers = questions.into_iter().map(|types| Question::new(machines, shape, types).answer(cache));
    answers.max_by_key(|(progress, _)| *progress).map_or_else(
        || Reason::NoSuchGpuType {
            wanted: type_names(machines.state, &shape.gpu_types),
            present: type_names(machines.state, &present),
        },
        |(_, reason)| reason,
    )
}

/// What the gang asks for, whichever machines it gets.
pub(crate) fn needs_of(state: &State, shape: &Shape) -> Needs {
    let (cores, mem_mib) = (shape.cores_per_rank.into(), shape.mem_mib_per_rank);
    let (types, within) = (type_names(state, &shape.gpu_types), shape.required_level());
    let allowed = allowed(state, shape);
    Needs { machines: shape.nodes.into(), gpus: shape.gpus_per_node(), types, cores, mem_mib, within, allowed }
}

fn present_types(state: &State) -> BTreeSet<GpuTypeId> {
    let gpus = state.nodes.iter().flat_map(|(_, node)| &node.value.gpus);
    gpus.filter(|gpu| is_present(gpu)).map(|gpu| gpu.gpu_type).collect()
}

fn type_names<'a>(state: &State, types: impl IntoIterator<Item = &'a GpuTypeId>) -> Vec<String> {
    types.into_iter().map(|gpu_type| state.gpu_type_name(*gpu_type).to_owned()).collect()
}

/// What a machine must have, in the order in which it is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    Gpus,
    Cores,
    Memory,
    Links,
    /// Fewer leases than a machine may hold.
    Leases,
    /// As many of them in one domain as the gang has.
    Together,
    /// Machines that could run it, were it not for its own word.
    Allowed,
    /// Nothing is short.
    Fits,
}

/// How far a question came: an idle cluster could run it; enough of it is in service; the step that is short, the
/// machines that pass it, and how much the best of the others has.
type Progress = (bool, bool, Step, u32, u64);

struct Question<'a> {
    machines: &'a Machines<'a>,
    /// Accepts these types alone.
    shape: Shape,
    asked: &'a Shape,
    /// Any of them will do on a machine; empty for a shape without GPUs.
    types: Vec<GpuTypeId>,
}

impl<'a> Question<'a> {
    fn new(machines: &'a Machines<'a>, asked: &'a Shape, types: Vec<GpuTypeId>) -> Self {
        let shape = Shape { gpu_types: types.clone().into(), ..asked.clone() };
        Self { machines, shape, asked, types }
    }

    fn answer(&self, cache: &mut Cache) -> (Progress, Reason) {
        let needed = u32::from(self.shape.nodes);
        let idle = self.survey_idle(cache);
        if let Some((able, reason)) = self.kept_out(cache, &idle, needed) {
            return ((false, false, Step::Allowed, able, 0), reason);
        }
        if let Some((step, tally)) = idle.short_step(needed) {
            return ((false, false, step, tally.passed, tally.best().has), self.never(step, tally));
        }
        if let Some((domain, able)) = idle.short_domain(needed, |room| room.able) {
            let lack = Lack::Domain { domain, able };
            return ((false, false, Step::Together, able, 0), Reason::Never { needs: self.needs(None), lack });
        }
        if let Some(reason) = self.nodes_out(&idle, needed) {
            return ((true, false, Step::Gpus, 0, 0), reason);
        }
        let away = idle.all.away();
        let now = self.survey_now(cache);
        if let Some((step, tally)) = now.short_step(needed) {
            let progress = (true, true, step, tally.passed, tally.best().has);
            return (progress, self.busy(step, tally, now.unhealthy, away));
        }
        match now.short_domain(needed, |room| room.able) {
            Some((_, most)) => ((true, true, Step::Together, most, 0), self.apart(&now, away)),
            None => ((true, true, Step::Fits, 0, 0), Reason::Soon),
        }
    }

    /// Too few machines are left by what the job says of them, or of those too few could run it and in all there are enough.
    fn kept_out(&self, cache: &mut Cache, idle: &Survey<'_>, needed: u32) -> Option<(u32, Reason)> {
        let (allowed, machines) = allowed(self.machines.state, &self.shape)?;
        let is_short = |idle: &Survey<'_>| {
            idle.short_step(needed).is_some() || idle.short_domain(needed, |room| room.able).is_some()
        };
        if allowed == machines || !is_short(idle) {
            return None;
        }
        let anywhere =
            Self { shape: Shape { machines: None, ..self.shape.clone() }, types: self.types.clone(), ..*self };
        let all = anywhere.survey_idle(cache);
        if allowed >= needed && is_short(&all) {
            return None;
        }
        let text = self.shape.machines.as_ref().map_or_else(String::new, |selector| told(selector));
        let (able, others) = (idle.all.able, all.all.able.saturating_sub(idle.all.able));
        Some((able, Reason::Constraint { needs: self.needs(None), text, able, others }))
    }

    /// Too few of those that could run it are in service: in all, or in each domain.
    fn nodes_out(&self, idle: &Survey<'_>, needed: u32) -> Option<Reason> {
        let told = |room: Room, domain: String| {
            let Room { able, out, silent } = room;
            Reason::NodesOut { needs: self.needs(None), able, out, silent, domain }
        };
        if idle.all.in_service() < needed {
            return Some(told(idle.all, String::new()));
        }
        idle.short_domain(needed, Room::in_service)?;
        let fullest = idle.rooms.iter().max_by_key(|(_, room)| (room.able >= needed, room.in_service()));
        fullest.map(|(domain, room)| told(*room, name_of(domain)))
    }

    /// The domains with the most machines that have room.
    fn apart(&self, now: &Survey<'_>, away: u32) -> Reason {
        let mut rooms: Vec<(String, u32)> =
            now.rooms.iter().map(|(domain, room)| (name_of(domain), room.able)).collect();
        rooms.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
        let more = rooms.len().saturating_sub(DOMAINS);
        rooms.truncate(DOMAINS);
        Reason::Topology { needs: self.needs(None), rooms, more: u32::try_from(more).unwrap_or(u32::MAX), away }
    }

    fn never(&self, step: Step, tally: &Tally) -> Reason {
        let lack = match step {
            _ if tally.passed > 0 => Lack::Machines { able: tally.passed },
            Step::Gpus => Lack::Gpus(tally.best()),
            Step::Cores => Lack::Cores(tally.best()),
            Step::Memory => Lack::Memory(tally.best()),
            Step::Links | Step::Leases | Step::Together | Step::Allowed | Step::Fits => Lack::Bandwidth(tally.best()),
        };
        Reason::Never { needs: self.needs(tally.nearest()), lack }
    }

    fn busy(&self, step: Step, tally: &Tally, unhealthy: u32, away: u32) -> Reason {
        let (needs, ready, best) = (self.needs(tally.nearest()), tally.passed, tally.best());
        match step {
            Step::Gpus => Reason::GpusBusy { needs, ready, best, unhealthy, away },
            Step::Cores => Reason::CoresBusy { needs, ready, best, away },
            Step::Memory => Reason::MemBusy { needs, ready, best, away },
            Step::Links => Reason::Bandwidth { needs, ready, best, wanted_mbps: self.shape.min_bandwidth_mbps },
            Step::Leases | Step::Together | Step::Allowed | Step::Fits => {
                Reason::LeasesFull { needs, limit: self.machines.state.meta.settings.leases_per_node }
            }
        }
    }

    /// `nearest` is the machine whose default share is named.
    fn needs(&self, nearest: Option<NodeId>) -> Needs {
        let nearest = nearest.and_then(|id| self.machines.state.nodes.get(&id));
        let (cores, mem_mib) = nearest.map_or((0, 0), |node| fit::request_on(&node.value, &self.shape));
        Needs {
            machines: self.shape.nodes.into(),
            gpus: self.shape.gpus_per_node(),
            types: type_names(self.machines.state, &self.asked.gpu_types),
            cores,
            mem_mib,
            within: self.shape.required_level(),
            allowed: allowed(self.machines.state, &self.shape),
        }
    }

    /// Every machine as it would be in service, healthy and empty.
    fn survey_idle(&self, cache: &mut Cache) -> Survey<'a> {
        let mut survey = self.new_survey();
        for (id, node, alloc) in self.machines.idle().iter().filter(|(_, node, _)| self.shape.allows(node)) {
            if survey.count(*id, node, self.first_lack(cache, node, alloc)) {
                let in_service =
                    self.machines.state.nodes.get(id).is_some_and(|node| node.value.admin == NodeAdmin::Ready);
                let (out, silent) = (!in_service, in_service && self.machines.unheard.contains(id));
                survey.add(node, &self.shape, Room { able: 1, out: out.into(), silent: silent.into() });
            }
        }
        survey
    }

    /// The machines in service as the plan has left them.
    fn survey_now(&self, cache: &mut Cache) -> Survey<'a> {
        let mut survey = self.new_survey();
        for (id, _) in self.machines.state.nodes.iter() {
            let Some((node, alloc)) = self.machines.node(*id).filter(|(node, _)| self.shape.allows(node)) else {
                continue;
            };
            if node.admin != NodeAdmin::Ready || self.machines.unheard.contains(id) || !self.machines.is_open(*id) {
                continue;
            }
            let lack = self.first_lack(cache, node, alloc);
            let full = lack == (Step::Fits, 0) && !self.machines.takes_leases(*id);
            if survey.count(*id, node, if full { (Step::Leases, 0) } else { lack }) {
                survey.add(node, &self.shape, Room { able: 1, ..Room::default() });
            }
            survey.unhealthy += self.unhealthy(node, alloc);
        }
        survey
    }

    fn new_survey(&self) -> Survey<'a> {
        Survey { must_be_together: self.shape.required_level().is_some(), ..Survey::default() }
    }

    /// The first step that the machine fails, and how much it has of what is short there.
    fn first_lack(&self, cache: &mut Cache, node: &Node, alloc: &Alloc) -> (Step, u64) {
        let of_type = self.types.iter().map(|gpu_type| fit::usable_gpus(node, alloc, &[*gpu_type]));
        let usable = of_type.max_by_key(|usable| usable.count_ones()).unwrap_or(0);
        if usable.count_ones() < self.shape.gpus_per_node() {
            return (Step::Gpus, usable.count_ones().into());
        }
        match fit::room_for(node, alloc, &self.shape) {
            Err(NoFit::Cores { free, .. }) => return (Step::Cores, free.into()),
            Err(NoFit::Memory { free, .. }) => return (Step::Memory, free),
            _ => {}
        }
        let Some(want) = want_of(&self.shape) else { return (Step::Fits, 0) };
        match cache.choose(self.machines.state, node.class, usable, want) {
            Ok(_) => (Step::Fits, 0),
            Err(Shortage::Bandwidth { best_mbps }) => (Step::Links, best_mbps.into()),
            // More GPUs than the class has links for: nothing is known to link them.
            Err(Shortage::Gpus { .. }) => (Step::Links, 0),
        }
    }

    /// GPUs of the type that are idle only because they are not healthy.
    fn unhealthy(&self, node: &Node, alloc: &Alloc) -> u32 {
        let slots = node.gpus.iter().take(fit::MAX_GPUS).enumerate();
        let sick = slots.filter(|(slot, gpu)| {
            self.types.contains(&gpu.gpu_type) && gpu.health != GpuHealth::Ok && alloc.free_gpus & (1 << slot) != 0
        });
        sick.count() as u32
    }
}

/// The steps at which a machine can fall short.
const STEPS: [Step; 5] = [Step::Gpus, Step::Cores, Step::Memory, Step::Links, Step::Leases];

/// The machines, counted at each step.
#[derive(Default)]
struct Survey<'a> {
    tallies: [Tally; STEPS.len()],
    all: Room,
    /// By domain, where the gang must be in one.
    rooms: BTreeMap<Path<'a>, Room>,
    must_be_together: bool,
    unhealthy: u32,
}

/// Machines that pass every step.
#[derive(Clone, Copy, Default)]
struct Room {
    able: u32,
    /// Of these.
    out: u32,
    silent: u32,
}

impl Room {
    fn add(&mut self, more: Room) {
        self.able += more.able;
        self.out += more.out;
        self.silent += more.silent;
    }

    fn away(&self) -> u32 {
        self.out + self.silent
    }

    fn in_service(self) -> u32 {
        self.able - self.away()
    }
}

/// Its names, outermost first.
fn name_of(domain: &Path<'_>) -> String {
    domain.iter().filter(|name| !name.is_empty()).copied().collect::<Vec<_>>().join("/")
}

/// One step: who passes it and all before it, and who of those that fail it comes nearest.
#[derive(Default)]
struct Tally {
    passed: u32,
    nearest: Option<(NodeId, Best)>,
}

impl<'a> Survey<'a> {
    /// Counts a machine with the first step that it fails; true when it fails none.
    fn count(&mut self, id: NodeId, node: &Node, (lacks, has): (Step, u64)) -> bool {
        for (step, tally) in STEPS.into_iter().zip(&mut self.tallies) {
            if step == lacks {
                if tally.nearest.as_ref().is_none_or(|(_, best)| has > best.has) {
                    tally.nearest = Some((id, Best { node: node.name.clone(), has }));
                }
                return false;
            }
            tally.passed += 1;
        }
        true
    }

    /// The first step that fewer machines pass than are needed.
    fn short_step(&self, needed: u32) -> Option<(Step, &Tally)> {
        STEPS.into_iter().zip(&self.tallies).find(|(_, tally)| tally.passed < needed)
    }

    fn add(&mut self, node: &'a Node, shape: &Shape, machine: Room) {
        self.all.add(machine);
        if let Some(domain) = domain_for(node, shape).filter(|_| self.must_be_together) {
            self.rooms.entry(domain).or_default().add(machine);
        }
    }

    /// The domain that comes nearest, and how many it has, where the gang must be in one and none has as many as are needed.
    fn short_domain(&self, needed: u32, count: impl Fn(Room) -> u32) -> Option<(String, u32)> {
        let counted = self.rooms.iter().map(|(domain, room)| (count(*room), domain));
        let most = counted.max_by_key(|(count, domain)| (*count, Reverse(*domain)));
        let (count, domain) = most.map_or((0, String::new()), |(count, domain)| (count, name_of(domain)));
        (self.must_be_together && count < needed).then_some((domain, count))
    }
}

impl Tally {
    fn nearest(&self) -> Option<NodeId> {
        self.nearest.as_ref().map(|(id, _)| *id)
    }

    fn best(&self) -> Best {
        self.nearest.as_ref().map_or_else(Best::default, |(_, best)| best.clone())
    }
}
