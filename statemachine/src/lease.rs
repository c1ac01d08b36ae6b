//! The end of a lease in its three steps: it is *decided* once, *drains* part by part, and *closes* with the release
//! of its last part, which writes the task's next state and its one result.
//!
//! Callers run these inside [`State::change_job`] of the lease's job.

use planted::{Bug, planted};

use crate::apply::Ctx;
use crate::command::{Code, Rejection};
use crate::fit;
use crate::id::*;
use crate::preemption::Loss;
use crate::record::*;
use crate::retry;
use crate::state::State;
use crate::transition::{self, Burn, By, CloseFacts};
use crate::turns::gpus_of;

const AVOIDED_NODES: usize = 8;
const ATTEMPT_ROWS: usize = 4;
/// Bytes of a reason that somebody else wrote; longer ones are cut.
const TEXT_BYTES: usize = 512;

/// What a lease is to be decided as.
#[derive(Clone, Debug)]
pub(crate) struct Ruling {
    pub kind: VerdictKind,
    pub exit: Option<Exit>,
    pub node: Option<NodeId>,
    pub preemptor: Option<JobId>,
    pub for_turn: bool,
    pub text: String,
}

impl Ruling {
    pub(crate) fn new(kind: VerdictKind, text: impl Into<String>) -> Self {
        Self { kind, exit: None, node: None, preemptor: None, for_turn: false, text: text.into() }
    }

    pub(crate) fn on(self, node: NodeId) -> Self {
        Self { node: Some(node), ..self }
    }

    pub(crate) fn making_room_for(self, job: JobId, for_turn: bool) -> Self {
        Self { preemptor: Some(job), for_turn, ..self }
    }

    pub(crate) fn with_exit(self, exit: Exit) -> Self {
        Self { exit: Some(exit), ..self }
    }
}

pub(crate) fn clip(text: &str) -> String {
    text[..text.floor_char_boundary(TEXT_BYTES)].to_owned()
}

pub(crate) fn stale(token: Token) -> Rejection {
    Rejection::new(Code::TokenStale, format!("token {token} names no live lease of this node"))
}

pub(crate) fn decided(token: Token, kind: VerdictKind) -> Rejection {
    Rejection::new(Code::AlreadyDecided, format!("lease {token} was already decided: {}", kind.name()))
}

impl Part {
    pub(crate) fn all_exited(&self) -> bool {
        self.exits.len() >= usize::from(self.ranks)
    }
}

impl State {
    /// Gives the lease its verdict, if it has none: the first one by log order stands.
    pub(crate) fn decide(&mut self, ctx: &Ctx<'_>, token: Token, ruling: Ruling) -> Result<(), Rejection> {
        let lease = &self.leases.get(&token).ok_or_else(|| stale(token))?.value;
        if let Some(verdict) = &lease.verdict {
            return Err(decided(token, verdict.kind));
        }
        let verdict = Verdict {
            kind: ruling.kind,
            rev: ctx.rev,
            clock_ms: self.meta.clock_ms,
            exit: ruling.exit,
            node: ruling.node,
            preemptor: ruling.preemptor,
            for_turn: ruling.for_turn,
            text: clip(&ruling.text),
        };
        self.leases.update(&token, |lease| lease.value.verdict = Some(verdict));
        Ok(())
    }

    /// Decides by the exits recorded so far: the first bad one, or success once every rank of every part exited 0.
    pub(crate) fn decide_by_exits(&mut self, ctx: &Ctx<'_>, token: Token, news: &[RankExit], node: NodeId) {
        let Some(lease) = self.leases.get(&token) else { return };
        let bad =
            news.iter().find(|exit| !exit.exit.ok() || !matches!(exit.cause, ExitCause::Own | ExitCause::Stopped));
        let ruling = match bad {
            Some(bad) => {
                let text = match bad.exit {
                    Exit { signal: 0, code } => format!("rank {} exited with {code}", bad.rank),
                    Exit { signal, .. } => format!("rank {} was ended by signal {signal}", bad.rank),
                };
                let (kind, text) = match bad.cause {
                    ExitCause::Own | ExitCause::Stopped => (VerdictKind::Failed, text),
                    ExitCause::TimeLimit => {
                        (VerdictKind::TimedOut, format!("rank {} reached the time limit", bad.rank))
                    }
                    ExitCause::LeaseEnd => (VerdictKind::Lost, format!("rank {} outlived its lease", bad.rank)),
                    ExitCause::GpuFault => (VerdictKind::GpuFault, format!("{text} after a GPU fault")),
                };
                Ruling::new(kind, text).on(node).with_exit(bad.exit)
            }
            None if lease.value.parts.iter().all(Part::all_exited) => {
                Ruling::new(VerdictKind::Succeeded, "every rank exited 0").with_exit(Exit { code: 0, signal: 0 })
            }
            None => return,
        };
        // An older verdict stands; the exits are recorded all the same.
        let _ = self.decide(ctx, token, ruling);
    }

    /// Frees the part's GPUs, cores and memory; the last part closes the lease. A part that is released before all its
    /// ranks exited takes its gang with it.
    pub(crate) fn release_part(&mut self, ctx: &mut Ctx<'_>, token: Token, node: NodeId) {
        let Some(lease) = self.leases.get(&token) else { return };
        let Some(part) = lease.value.parts.iter().find(|part| part.node == node) else { return };
        if part.state == PartState::Released {
            return;
        }
        if !part.all_exited() {
            let text = format!("{} released its part before its ranks had exited", self.node_name(node));
            let _ = self.decide(ctx, token, Ruling::new(VerdictKind::Lost, text).on(node));
        }
        let open = self.leases.update(&token, |lease| {
            for part in lease.value.parts.iter_mut().filter(|part| part.node == node) {
                part.state = PartState::Released;
            }
            lease.value.parts.iter().any(|part| part.state != PartState::Released)
        });
        self.recount(node);
        if open == Some(false) {
            self.close(ctx, token);
        }
    }

    /// Computes what is free on a node anew, from its parts that are not Released.
    pub(crate) fn recount(&mut self, node: NodeId) {
        let Some(alloc) = self.allocs.get(&node) else { return };
        let orphans = alloc.orphans.clone();
        if let Some(alloc) = self.count_alloc(node, &alloc.leases, orphans) {
            self.allocs.insert(node, alloc);
        }
    }

    pub(crate) fn count_alloc(&self, id: NodeId, tokens: &[Token], orphans: Vec<Orphan>) -> Option<Alloc> {
        let node = self.nodes.get(&id)?;
        let parts = tokens.iter().filter_map(|token| {
            let part = self.leases.get(token)?.value.parts.iter().find(|part| part.node == id)?;
            Some((*token, part))
        });
        Some(fit::alloc_of(&node.value, parts, orphans))
    }

    /// Writes the task's next state and, if it ended, its result; the lease is no more.
    fn close(&mut self, ctx: &mut Ctx<'_>, token: Token) {
        let Some(lease) = self.leases.remove(&token) else { return };
        let lease = &lease.value;
        let verdict = lease.verdict.clone().unwrap_or_else(|| Verdict {
            kind: VerdictKind::Succeeded,
            rev: ctx.rev,
            clock_ms: self.meta.clock_ms,
            exit: Some(Exit { code: 0, signal: 0 }),
            node: None,
            preemptor: None,
            for_turn: false,
            text: String::new(),
        });
        if let Some(tenant) = self.jobs.get(&lease.task.job).map(|job| job.value.tenant) {
            self.discharge(tenant, lease);
        }
        let stopped = self.jobs.get(&lease.task.job).is_some_and(|job| self.is_stopped(&job.value));
        let verdict = if stopped { verdict } else { soften(lease, verdict) };
        let Some(facts) = self.close_facts(ctx, lease, &verdict) else { return };
        let Some(phase) = self.tasks.get(&lease.task).map(|task| &task.value.phase) else { return };
        let Some(next) = transition::next(phase, By::Close { verdict: verdict.kind, facts }) else { return };
        self.write_attempt(token, lease, &verdict, &next);
        if next.hold {
            self.jobs.update(&lease.task.job, |job| job.value.holds.launch = true);
        }
        if let Phase::Ended { outcome } = next.phase {
            self.learn_run(lease, &verdict);
            let exit = lease_exit(lease, &verdict);
            self.end_task(
                ctx,
                lease.task,
                TaskResult {
                    outcome,
                    token: Some(token),
                    attempt: lease.attempt,
                    exit,
                    rev: ctx.rev,
                    wall_ms: self.meta.wall_ms,
                    cause: None,
                },
            );
        }
    }

    fn close_facts(&self, ctx: &Ctx<'_>, lease: &Lease, verdict: &Verdict) -> Option<CloseFacts> {
        let job = &self.jobs.get(&lease.task.job)?.value;
        let task = &self.tasks.get(&lease.task)?.value;
        let (spec, settings) = (&job.spec.retry, &self.meta.settings);
        let wanted =
            spec.on_exit.is_empty() || verdict.exit.is_some_and(|exit| spec.on_exit.contains(&exit.shell_code()));
        let nth = match verdict.kind {
            VerdictKind::Lost => u32::from(task.used.lost),
            VerdictKind::LaunchNode | VerdictKind::GpuFault => u32::from(task.excused_in_row).saturating_add(1),
            _ => u32::from(task.used.retries).saturating_add(1),
        };
        let wait_ms = match nth {
            // The first lost node is nobody's habit: start again at once.
            0 => 0,
            nth => retry::backoff_ms(spec, nth, ctx.salt, lease.task, lease.attempt),
        };
        Some(CloseFacts {
            stop: self.is_stopped(job),
            retry_left: wanted && task.used.retries < spec.max,
            excused_out: task.excused_in_row.saturating_add(1) >= settings.excused_in_row
                || task.used.excused().saturating_add(1) >= settings.excused_in_sum,
            not_before_ms: self.meta.clock_ms.saturating_add(wait_ms),
        })
    }

    fn write_attempt(&mut self, token: Token, lease: &Lease, verdict: &Verdict, next: &transition::Next) {
        let preempted = verdict.kind == VerdictKind::Preempted;
        let loss = if preempted { self.loss(lease) } else { Loss::default() };
        let row = AttemptRow {
            attempt: lease.attempt,
            token,
            verdict: verdict.kind,
            exit: verdict.exit,
            nodes: lease.parts.iter().map(|part| part.node).collect(),
            granted_ms: lease.granted_ms,
            started_ms: lease.started_ms,
            ended_ms: self.meta.clock_ms,
            text: if preempted { loss.told(&verdict.text) } else { verdict.text.clone() },
            preemptor: verdict.preemptor.filter(|_| preempted),
            lost_gpu_ms: loss.gpu_ms,
        };
        let (run_ms, gpus) = (self.run_ms(lease), gpus_of(lease));
        let turn_gpu_ms = self.meta.settings.planning.turn_gpu_ms;
        self.tasks.update(&lease.task, |task| {
            let task = &mut task.value;
            task.phase = next.phase.clone();
            task.charge(next.burns);
            task.had.add(run_ms, gpus, turn_gpu_ms);
            if row.preemptor.is_some() && next.burns == Some(Burn::Preempted) {
                let count = if verdict.for_turn { &mut task.had.given } else { &mut task.displaced };
                *count = count.saturating_add(1);
            }
            if let Some(node) = verdict.node.filter(|_| next.burns.is_some()) {
                task.avoid.retain(|avoided| *avoided != node);
                task.avoid.push_back(node);
                while task.avoid.len() > AVOIDED_NODES {
                    task.avoid.pop_front();
                }
            }
            task.attempts.push_back(row);
            while task.attempts.len() > ATTEMPT_ROWS {
                task.attempts.pop_front();
            }
        });
    }

    /// Ends a task and with it its job, and tells the array that it is of. The phase is already Ended.
    pub(crate) fn end_task(&mut self, ctx: &mut Ctx<'_>, task: TaskKey, result: TaskResult) {
        let end = JobEnd { outcome: result.outcome, clock_ms: self.meta.clock_ms, wall_ms: self.meta.wall_ms };
        debug_assert_eq!(result.rev, ctx.rev);
        self.tasks.update(&task, |task| task.value.result = Some(result));
        let outcome = end.outcome;
        let job = self.jobs.update(&task.job, |job| {
            job.value.ended = Some(Box::new(end));
            (job.value.tenant, job.value.element())
        });
        let Some((tenant, element)) = job else { return };
        self.tenants.update(&tenant, |tenant| tenant.live_jobs = tenant.live_jobs.saturating_sub(1));
        if let Some(element) = element {
            self.count_ended(ctx, element.array, outcome);
        }
    }
}

/// Only PREEMPTED is soft: where every rank exited 0 by itself, before it was told to stop, the work was done. After
/// the signal any exit is the preemption's, for a training script exits 0 once it has saved its checkpoint.
fn soften(lease: &Lease, verdict: Verdict) -> Verdict {
    let done = |exit: &RankExit| exit.exit.ok() && exit.cause == ExitCause::Own;
    let whole = lease.parts.iter().all(|part| part.all_exited() && part.exits.iter().all(done));
    match verdict.kind {
        VerdictKind::Preempted if whole => {
            Verdict { kind: VerdictKind::Succeeded, exit: Some(Exit { code: 0, signal: 0 }), ..verdict }
        }
        _ => verdict,
    }
}

/// The exit that the result shows: the verdict's, else the first bad one of any rank.
fn lease_exit(lease: &Lease, verdict: &Verdict) -> Option<Exit> {
    let exits = lease.parts.iter().flat_map(|part| &part.exits);
    verdict.exit.or_else(|| exits.map(|exit| exit.exit).find(|exit| !exit.ok()))
}

impl Task {
    /// A task that never left its first PENDING.
    pub(crate) fn untouched() -> Self {
        Self {
            phase: Phase::Pending,
            attempt: 0,
            used: Used::default(),
            excused_in_row: 0,
            avoid: Default::default(),
            attempts: Default::default(),
            result: None,
            fence: None,
            displaced: 0,
            checkpoint: None,
            had: Had::default(),
        }
    }

    fn charge(&mut self, burns: Option<Burn>) {
        let excused = matches!(burns, Some(Burn::Lost | Burn::Launch | Burn::GpuFault));
        self.excused_in_row = if excused { self.excused_in_row.saturating_add(1) } else { 0 };
        let used = &mut self.used;
        let counter = match burns {
            None => return,
            Some(Burn::Retry) => &mut used.retries,
            Some(Burn::Lost) if planted(Bug::LostBurnsRetry) => &mut used.retries,
            Some(Burn::Lost) => &mut used.lost,
            Some(Burn::Launch) => &mut used.launch,
            Some(Burn::GpuFault) => &mut used.gpu_fault,
            Some(Burn::Preempted) => &mut used.preempted,
            Some(Burn::Timeout) => &mut used.timeout,
        };
        *counter = counter.saturating_add(1);
    }
}
