//! Why a task waits: finds the first thing that binds. The planner's reasons and every replica's answer to
//! `ares queue` and `ares show` come from here.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use statemachine::fit;
use statemachine::record::{Job, Phase};
use statemachine::spec::{AfterKind, Shape};
use statemachine::{GpuTypeId, NodeId, State, TaskKey};

use crate::cache::{Able, Cache, Choices};
use crate::cuts::uncut;
use crate::fleet::{Alike, Fleet};
use crate::machines::Machines;
use crate::outlook::{Outlook, Start};
use crate::plan::waiting_task;
use crate::quota::Planned;
use crate::reason::{Lack, Needs, Reason};
use crate::selection::{allowed, told};
use crate::survey::{Asked, Room, Step, Survey, Tally, name_of};
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
        cache.begin(state, unheard);
        Self { machines: Machines::new(state, cache, unheard), cache, by_shape: BTreeMap::new(), outlook: None }
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
        let spec = &waiting_task(state, key)?.0.spec;
        if let Some(reason) = windows::not_yet(state, spec) {
            return Some(Arc::new(reason));
        }
        let shape = &spec.shape;
        if let Some(claim) = state.claims.get(&key) {
            let left = claim.victims.iter().filter(|victim| state.leases.contains(victim)).count();
            let victims = u32::try_from(left).unwrap_or(u32::MAX);
            let gpus = claim.parts.iter().map(|part| part.gpu_order.len()).sum();
            let shape = spec.shape_of(claim.parts.len(), gpus).unwrap_or(Cow::Borrowed(shape));
            return Some(Arc::new(Reason::Preempting { needs: needs_of(state, &shape), victims }));
        }
        if let Some(reason) = Planned::default().hit_by_shape(state, job.tenant, shape) {
            return Some(Arc::new(reason));
        }
        if !spec.reservation().is_empty() {
            // Its machines are few of those that a shape is explained by.
            let known = self.outlook.as_ref().and_then(|outlook| outlook.reason(key)).cloned();
            return Some(known.unwrap_or(Arc::new(Reason::Soon)));
        }
        let explained = || {
            let reason = explain(&self.machines, self.cache, &state.cut_of(spec));
            Arc::new(uncut(state, spec, &reason))
        };
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
    if let Some(first) = job.peers().next().filter(|_| progress.waits_for_peers()) {
        let parents = u32::try_from(job.peers().count()).unwrap_or(u32::MAX);
        return Some(Reason::Dependency { first: (AfterKind::Corr, first), parents });
    }
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
    let state = machines.state;
    if state.nodes.is_empty() {
        return Reason::NoNodes;
    }
    cache.fleet.follow(machines);
    let chosen = shape.machines.as_ref().map(|selector| cache.fleet.chosen(selector));
    let Cache { choices, fleet, able, .. } = cache;
    let fleet = &*fleet;
    let open = fleet.in_window(machines, chosen.as_ref());
    let present: Vec<GpuTypeId> = fleet.present().collect();
    let count = |machines: usize| u32::try_from(machines).unwrap_or(u32::MAX);
    let question = Question {
        state,
        fleet,
        shape,
        idle: fleet.alike(chosen.as_ref().map(|chosen| &*chosen.grouped)),
        open: open.as_ref().map(|grouped| fleet.alike(Some(grouped))),
        allowed: chosen.as_ref().map(|chosen| (count(chosen.nodes.len()), count(fleet.machines()))),
    };
    if shape.gpus_per_node() == 0 {
        return question.answer(choices, able, &[]).1;
    }
    let types: Vec<GpuTypeId> = match shape.gpu_types.is_empty() {
        true => present.iter().copied().filter(|gpu_type| shape.accepts(*gpu_type)).collect(),
        false => shape.gpu_types.iter().copied().filter(|gpu_type| present.contains(gpu_type)).collect(),
    };
    if shape.mix_types && !types.is_empty() {
        return question.answer(choices, able, &types).1;
    }
    // max_by_key takes the last of equals: the most preferred type goes last.
    let answers = types.chunks(1).rev().map(|types| question.answer(choices, able, types));
    answers.max_by_key(|(progress, _)| *progress).map_or_else(
        || Reason::NoSuchGpuType { wanted: type_names(state, &shape.gpu_types), present: type_names(state, &present) },
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

fn type_names<'a>(state: &State, types: impl IntoIterator<Item = &'a GpuTypeId>) -> Vec<String> {
    types.into_iter().map(|gpu_type| state.gpu_type_name(*gpu_type).to_owned()).collect()
}

/// How far a question came: an idle cluster could run it; enough of it is in service; the step that is short, the
/// machines that pass it, and how much the best of the others has.
type Progress = (bool, bool, Step, u32, u64);

struct Question<'a> {
    state: &'a State,
    fleet: &'a Fleet,
    shape: &'a Shape,
    /// The machines that it may be on.
    idle: Vec<Alike<'a>>,
    /// Of these, those of the window that it is for, where it is for one.
    open: Option<Vec<Alike<'a>>>,
    /// Machines that it may be on and all, where its job says which.
    allowed: Option<(u32, u32)>,
}

impl Question<'_> {
    /// With GPUs of one of these types.
    fn answer(&self, choices: &mut Choices, able: &mut Able, types: &[GpuTypeId]) -> (Progress, Reason) {
        let asked = Asked { shape: self.shape, types };
        let away = match able.away(self.shape, types) {
            Some(away) => away,
            None => {
                let idle = asked.survey_idle(self.state, choices, &self.idle);
                if let Some(bound) = self.bound_if_idle(choices, asked, &idle) {
                    return bound;
                }
                able.note(self.shape, types, idle.all.away());
                idle.all.away()
            }
        };
        let needed = u32::from(self.shape.nodes);
        let now = asked.survey_now(self.state, choices, self.open.as_ref().unwrap_or(&self.idle));
        if let Some((step, tally)) = now.short_step(needed) {
            let progress = (true, true, step, tally.passed, tally.has());
            return (progress, self.busy(step, tally, now.unhealthy, away));
        }
        match now.short_domain(needed, |room| room.able) {
            Some((_, most)) => ((true, true, Step::Together, most, 0), self.apart(&now, away)),
            None => ((true, true, Step::Fits, 0, 0), Reason::Soon),
        }
    }

    /// What binds were all machines idle.
    fn bound_if_idle(&self, choices: &mut Choices, asked: Asked<'_>, idle: &Survey<'_>) -> Option<(Progress, Reason)> {
        let needed = u32::from(self.shape.nodes);
        if let Some((able, reason)) = self.kept_out(choices, asked, idle) {
            return Some(((false, false, Step::Allowed, able, 0), reason));
        }
        if let Some((step, tally)) = idle.short_step(needed) {
            return Some(((false, false, step, tally.passed, tally.has()), self.never(step, tally)));
        }
        if let Some((domain, able)) = idle.short_domain(needed, |room| room.able) {
            let lack = Lack::Domain { domain, able };
            return Some(((false, false, Step::Together, able, 0), Reason::Never { needs: self.needs(None), lack }));
        }
        self.nodes_out(idle, needed).map(|reason| ((true, false, Step::Gpus, 0, 0), reason))
    }

    /// Too few machines are left by what the job says of them, or of those too few could run it and in all there are enough.
    fn kept_out(&self, choices: &mut Choices, asked: Asked<'_>, idle: &Survey<'_>) -> Option<(u32, Reason)> {
        let ((allowed, machines), needed) = (self.allowed?, u32::from(self.shape.nodes));
        let is_short = |idle: &Survey<'_>| {
            idle.short_step(needed).is_some() || idle.short_domain(needed, |room| room.able).is_some()
        };
        if allowed == machines || !is_short(idle) {
            return None;
        }
        let all = asked.survey_idle(self.state, choices, &self.fleet.alike(None));
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
            Step::Gpus => Lack::Gpus(tally.best(self.state)),
            Step::Cores => Lack::Cores(tally.best(self.state)),
            Step::Memory => Lack::Memory(tally.best(self.state)),
            Step::Links | Step::Leases | Step::Together | Step::Allowed | Step::Fits => {
                Lack::Bandwidth(tally.best(self.state))
            }
        };
        Reason::Never { needs: self.needs(tally.nearest()), lack }
    }

    fn busy(&self, step: Step, tally: &Tally, unhealthy: u32, away: u32) -> Reason {
        let (needs, ready, best) = (self.needs(tally.nearest()), tally.passed, tally.best(self.state));
        match step {
            Step::Gpus => Reason::GpusBusy { needs, ready, best, unhealthy, away },
            Step::Cores => Reason::CoresBusy { needs, ready, best, away },
            Step::Memory => Reason::MemBusy { needs, ready, best, away },
            Step::Links => Reason::Bandwidth { needs, ready, best, wanted_mbps: self.shape.min_bandwidth_mbps },
            Step::Leases | Step::Together | Step::Allowed | Step::Fits => {
                Reason::LeasesFull { needs, limit: self.state.meta.settings.leases_per_node }
            }
        }
    }

    /// `nearest` is the machine whose default share is named.
    fn needs(&self, nearest: Option<NodeId>) -> Needs {
        let nearest = nearest.and_then(|id| self.state.nodes.get(&id));
        let (cores, mem_mib) = nearest.map_or((0, 0), |node| fit::request_on(&node.value, self.shape));
        Needs {
            machines: self.shape.nodes.into(),
            gpus: self.shape.gpus_per_node(),
            types: type_names(self.state, &self.shape.gpu_types),
            cores,
            mem_mib,
            within: self.shape.required_level(),
            allowed: self.allowed,
        }
    }
}
