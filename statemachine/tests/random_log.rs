//! Random logs of valid and hostile commands. After each entry all invariants hold and nothing panics; what a client
//! was told stays true; the same log gives the same state, also when one begins in its middle; a list and the events
//! after it are a later list.

#[path = "random_log/told.rs"]
mod told;
mod world;

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use statemachine::command::*;
use statemachine::domain::{Level, Topology};
use statemachine::keyspace::{self, Kv};
use statemachine::record::*;
use statemachine::selector::Selector;
use statemachine::settings::Settings;
use statemachine::spec::{After, AfterKind, Terms};
use statemachine::storage::codec;
use statemachine::*;
use told::Told;
use world::*;

/// What somebody may try. Small numbers pick among what exists at that time, so that most commands have an effect.
#[derive(Clone, Debug)]
enum Op {
    Submit {
        kind: u8,
        request: Option<u8>,
        stale: bool,
        terms: u8,
    },
    Cancel {
        pick: u8,
    },
    Steer {
        pick: u8,
        how: u8,
    },
    Place {
        picks: Vec<(u8, u8)>,
        twist: u8,
    },
    Register {
        machine: u8,
        boot: u8,
        gpus: u8,
        fate: u8,
        fence_new: bool,
        max_token: u64,
    },
    Report {
        pick: u8,
        part: u8,
        what: u8,
        code: u8,
        twist: u8,
    },
    Silent {
        pick: u8,
        part: u8,
        twist: u8,
    },
    Due {
        pick: u8,
        limit: bool,
    },
    ConfirmDead {
        node: u8,
        all: bool,
    },
    Health {
        node: u8,
        slot: u8,
        health: u8,
        end_lease: bool,
    },
    Admin {
        node: u8,
        out: bool,
    },
    Open,
    End {
        session: u8,
    },
    Acquire {
        session: u8,
        name: u8,
    },
    Unlock {
        session: u8,
        name: u8,
    },
    Compact {
        back: u8,
    },
    Retain {
        bucket: u8,
    },
    Wild {
        token: u64,
        node: u32,
        job: u64,
        epoch: u64,
        which: u8,
    },
    Wait {
        ms: u32,
    },
    Tenant {
        name: u8,
        parent: u8,
        limit: u8,
        remove: bool,
    },
    Preempt {
        pick: u8,
        victims: Vec<u8>,
        node: u8,
    },
    Checkpoint {
        pick: u8,
        twist: u8,
    },
    Reserve {
        name: u8,
        nodes: u8,
        from_ms: u32,
        what: u8,
    },
    /// Ends the entry: what follows sees its effect.
    Cut,
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        6 => (any::<u8>(), proptest::option::of(0..12u8), any::<bool>(), any::<u8>())
            .prop_map(|(kind, request, stale, terms)| Op::Submit { kind, request, stale, terms }),
        2 => any::<u8>().prop_map(|pick| Op::Cancel { pick }),
        3 => (any::<u8>(), 0..4u8).prop_map(|(pick, how)| Op::Steer { pick, how }),
        8 => (proptest::collection::vec((any::<u8>(), any::<u8>()), 1..4), any::<u8>())
            .prop_map(|(picks, twist)| Op::Place { picks, twist }),
        3 => (0..3u8, 0..2u8, 0..5u8, any::<u8>(), any::<bool>(), any::<u64>()).prop_map(
            |(machine, boot, gpus, fate, fence_new, max_token)| {
                // Most agents have seen little; a few claim the impossible.
                let max_token = if max_token.is_multiple_of(31) { max_token } else { max_token % 50 };
                Op::Register { machine, boot, gpus, fate, fence_new: fence_new && fate.is_multiple_of(4), max_token }
            }
        ),
        12 => (any::<u8>(), 0..3u8, 0..8u8, any::<u8>(), any::<u8>())
            .prop_map(|(pick, part, what, code, twist)| Op::Report { pick, part, what, code, twist }),
        2 => (any::<u8>(), 0..3u8, any::<u8>()).prop_map(|(pick, part, twist)| Op::Silent { pick, part, twist }),
        1 => (any::<u8>(), any::<bool>()).prop_map(|(pick, limit)| Op::Due { pick, limit }),
        1 => (0..4u8, any::<bool>()).prop_map(|(node, all)| Op::ConfirmDead { node, all }),
        1 => (0..4u8, 0..6u8, 0..6u8, any::<bool>())
            .prop_map(|(node, slot, health, end_lease)| Op::Health { node, slot, health, end_lease }),
        1 => (0..4u8, any::<bool>()).prop_map(|(node, out)| Op::Admin { node, out: out && node == 1 }),
        1 => Just(Op::Open),
        1 => (0..6u8).prop_map(|session| Op::End { session }),
        2 => (0..6u8, 0..2u8).prop_map(|(session, name)| Op::Acquire { session, name }),
        1 => (0..6u8, 0..2u8).prop_map(|(session, name)| Op::Unlock { session, name }),
        1 => any::<u8>().prop_map(|back| Op::Compact { back }),
        1 => (0..3u8).prop_map(|bucket| Op::Retain { bucket }),
        2 => (any::<u64>(), any::<u32>(), any::<u64>(), any::<u64>(), any::<u8>())
            .prop_map(|(token, node, job, epoch, which)| Op::Wild { token, node, job, epoch, which }),
        3 => (0..400_000u32).prop_map(|ms| Op::Wait { ms }),
        2 => (0..3u8, 0..4u8, any::<u8>(), any::<bool>())
            .prop_map(|(name, parent, limit, remove)| Op::Tenant { name, parent, limit, remove: remove && limit < 40 }),
        8 => (any::<u8>(), proptest::collection::vec(any::<u8>(), 1..3), any::<u8>())
            .prop_map(|(pick, victims, node)| Op::Preempt { pick, victims, node }),
        1 => (any::<u8>(), any::<u8>()).prop_map(|(pick, twist)| Op::Checkpoint { pick, twist }),
        2 => (0..3u8, 1..8u8, 0..100_000u32, any::<u8>())
            .prop_map(|(name, nodes, from_ms, what)| Op::Reserve { name, nodes, from_ms, what }),
        12 => Just(Op::Cut),
    ];
    proptest::collection::vec(op, 1..160)
}

fn pick<T: Clone>(from: &[T], nth: u8) -> Option<T> {
    (!from.is_empty()).then(|| from[usize::from(nth) % from.len()].clone())
}

fn command(world: &World, op: &Op) -> Option<(Option<RequestId>, Command)> {
    let state = &world.state;
    let jobs: Vec<JobId> = state.jobs.iter().map(|(id, _)| *id).collect();
    let pending: Vec<JobId> = state.index.queue.keys().map(|key| key.task.job).collect();
    let tokens: Vec<Token> = state.leases.iter().map(|(token, _)| *token).collect();
    let nodes: Vec<NodeId> = state.nodes.iter().map(|(id, _)| *id).collect();
    let lease = |nth: u8| {
        let token = pick(&tokens, nth)?;
        Some((token, state.leases.get(&token)?.value.clone()))
    };
    let body = match op {
        Op::Submit { kind, request: id, stale, terms } => {
            let mut submit = job(shape(1 + u16::from(kind % 3 == 2), 1 + u16::from(kind & 1), u16::from(kind / 4 % 3)));
            submit.spec.retry.max = u16::from(kind / 16 % 3);
            submit.spec.priority = i32::from(kind % 5) - 2;
            submit.spec.limit_ms = u64::from(kind % 2) * 50_000;
            if world.state.index.tenant_by_name.contains_key(tenant_name(kind / 64)) {
                submit.tenant = tenant_name(kind / 64).into();
            }
            if kind % 5 > 1 {
                submit.spec.priority = 0;
                submit.priority_class = ["low", "high"][usize::from(kind / 5 % 2)].into();
            }
            submit.spec.shape.topology = [None, Some(true), Some(false)][usize::from(kind / 8 % 3)]
                .map(|required| Topology { level: Level::Rack, required });
            let known = |name: &str| state.index.node_by_name.contains_key(name);
            submit.spec.shape.machines =
                some_machines(kind / 8 % 7).filter(|it| it.without.iter().all(|name| known(name)));
            submit.spec.terms = some_terms(state, &jobs, *terms);
            let windows = state.reservations.iter().filter(|(_, window)| !window.is_maintenance());
            let windows: Vec<String> = windows.map(|(_, window)| window.name.clone()).collect();
            if let Some(reservation) = pick(&windows, kind / 8).filter(|_| kind % 2 == 1) {
                submit.spec.terms = Some(Box::new(Terms { reservation, ..Terms::default() }));
            }
            if kind % 7 == 3 {
                let array =
                    Array { ranges: vec![(0, 0), (5, 5 + u32::from(kind / 32))], throttle: u32::from(kind % 3) };
                let terms = submit.spec.terms.get_or_insert_default();
                // Some wait, task by task, for those of the newest one before them.
                let older = jobs.iter().rev().find_map(|id| Some((*id, state.jobs.get(id)?.value.array()?.0.clone())));
                match older.filter(|_| kind % 4 > 1) {
                    Some((job, older)) => {
                        terms.after = vec![After { kind: AfterKind::Corr, job }];
                        terms.array = Some(Array { ranges: older.ranges, ..array });
                    }
                    None => terms.array = Some(array),
                }
            }
            // Some leave their machines open; of these some have no GPUs to cut.
            if kind % 16 > 12 && submit.spec.reservation().is_empty() {
                submit.spec.shape.nodes = 0;
                submit.spec.shape.ranks_per_node = 1;
                // And of those that have, some take more.
                let doublings = kind / 16 % 3;
                submit.spec.terms.get_or_insert_default().doublings = doublings;
                submit.spec.shape.gpus_per_rank *= if doublings == 0 { 2 } else { 1 };
            }
            let now = WALL0 + i64::try_from(world.clock_ms).unwrap();
            let id = id.map(|n| match n % 3 {
                0 => request(n),
                1 => request_at(WALL0, n),
                _ if *stale => request_at(now - 100_000_000, n),
                _ => request_at(now, n),
            });
            return Some((id, Command::SubmitJob(Box::new(submit))));
        }
        Op::Cancel { pick: nth } => Command::Cancel { job: pick(&jobs, *nth)? },
        Op::Steer { pick: nth, how } => {
            let job = pick(&jobs, *nth)?;
            match how {
                0 => Command::Hold { job },
                1 | 2 => Command::Release { job },
                _ => Command::Requeue { job },
            }
        }
        Op::Place { picks, twist } => {
            let places = picks.iter().filter_map(|(job, node)| {
                let id = pick(&pending, *job)?;
                let shape = &state.jobs.get(&id)?.value.spec.shape;
                let first = usize::from(*node);
                let count = if shape.is_open() { 1 + usize::from(*job % 2) } else { shape.nodes.into() };
                let on: Vec<NodeId> =
                    (0..count).filter_map(|nth| nodes.get((first + nth) % nodes.len().max(1)).copied()).collect();
                (!on.is_empty()).then(|| world.grown(id, &on, usize::from(*job / 64)))
            });
            let mut places: Vec<Place> = places.collect();
            twist_plan(&mut places, *twist);
            Command::Plan(Plan { base_index: 0, places })
        }
        Op::Register { machine: n, boot, gpus, fate, fence_new, max_token } => {
            Command::RegisterNode(Box::new(registration(state, *n, *boot, *gpus, *fate, *fence_new, *max_token)))
        }
        Op::Report { pick: nth, part, what, code, twist } => {
            let (token, lease) = lease(*nth)?;
            let part = pick(&lease.parts, *part)?;
            let epoch = state.nodes.get(&part.node)?.value.epoch;
            Command::Report(Report {
                node: part.node,
                epoch: if *twist == 0 { epoch.wrapping_sub(1) } else { epoch },
                items: vec![ReportItem { token, what: part_report(&part, *what, *code) }],
            })
        }
        Op::Silent { pick: nth, part, twist } => {
            let (token, lease) = lease(*nth)?;
            let part = pick(&lease.parts, *part)?;
            Command::NodeSilent {
                node: part.node,
                epoch: state.nodes.get(&part.node)?.value.epoch + u64::from(*twist == 0),
                tokens: vec![token, Token(u64::from(*twist))],
            }
        }
        Op::Due { pick: nth, limit } => {
            let cause = if *limit { DueCause::TimeLimit } else { DueCause::StartTimeout };
            Command::LeaseDue { token: pick(&tokens, *nth)?, cause }
        }
        Op::ConfirmDead { node, all } => Command::ConfirmDead {
            node: pick(&nodes, *node)?,
            token: if *all { None } else { tokens.first().copied() },
        },
        Op::Health { node, slot, health, end_lease } => {
            let node = pick(&nodes, *node)?;
            let all = [
                GpuHealth::Ok,
                GpuHealth::DrainWhenIdle,
                GpuHealth::Quarantined,
                GpuHealth::Dirty,
                GpuHealth::Unresponsive,
                GpuHealth::Gone,
            ];
            Command::GpuHealth(GpuHealthChange {
                node,
                epoch: state.nodes.get(&node)?.value.epoch,
                slot: *slot,
                health: all[usize::from(*health) % all.len()],
                xid: 79,
                reason: "x".repeat(600),
                end_lease: *end_lease,
            })
        }
        Op::Admin { node, out } => {
            let out =
                out.then(|| NodeOut { reason: "maintenance".into(), evict_in_ms: Some(u64::from(*node) * 9_000) });
            Command::NodeAdmin { node: pick(&nodes, *node)?, out }
        }
        Op::Open => Command::OpenSession { owner: "ada".into(), ttl_ms: 5_000 },
        Op::End { session } => Command::EndSession { session: SessionId(u64::from(*session)) },
        Op::Acquire { session, name } => {
            Command::Acquire { session: SessionId(u64::from(*session)), name: format!("lock/{name}") }
        }
        Op::Unlock { session, name } => {
            Command::Unlock { session: SessionId(u64::from(*session)), name: format!("lock/{name}") }
        }
        Op::Compact { back } => {
            Command::Compact { rev: Revision(state.meta.rev.0.saturating_sub(u64::from(*back) * 8)) }
        }
        Op::Retain { bucket } => Command::Retain { bucket: u32::from(*bucket) },
        Op::Wild { token, node, job, epoch, which } => wild(*token, *node, *job, *epoch, *which),
        Op::Tenant { name, remove: true, .. } => Command::RemoveTenant { name: tenant_name(*name).into() },
        Op::Tenant { name, parent, limit, remove: false } => {
            let exists = state.index.tenant_by_name.contains_key(tenant_name(*name));
            Command::SetTenant(Box::new(SetTenant {
                name: tenant_name(*name).into(),
                create: !exists,
                parent: (*parent < 3).then(|| tenant_name(*parent).into()),
                guaranteed: (limit % 2 == 0).then(|| [("h100".into(), u32::from(limit % 3))].into()),
                limit_gpus: Some((limit % 5 != 0).then(|| u32::from(limit % 7))),
                may_borrow: Some(limit % 4 != 0),
                max_pending: Some(u64::from(limit / 4 % 8)),
                default_limit_ms: Some(u64::from(limit / 32) * 10_000),
                ..SetTenant::default()
            }))
        }
        Op::Preempt { pick: nth, victims, node } => {
            let job_of = |job: &JobId| state.jobs.get(job).map(|job| &job.value);
            let urgent =
                pending.iter().copied().filter(|job| job_of(job).is_some_and(|job| state.preempts_by_class(job)));
            let job = pick(&urgent.collect::<Vec<_>>(), *nth)?;
            let preemptible = |token: &&Token| {
                let lease = state.leases.get(token);
                lease.and_then(|lease| job_of(&lease.value.task.job)).is_some_and(|job| state.is_preemptible(job))
            };
            let tokens: Vec<Token> = tokens.iter().filter(preemptible).copied().collect();
            let shape = &*state.cut_of(&job_of(&job)?.spec);
            let fits = |node: NodeId, leaving: &[Token]| {
                let free = state.free_after(node, leaving, TaskKey::only(job)).expect("a known node");
                fit::room_for(&state.nodes.get(&node).expect("a known node").value, &free, shape).is_ok()
            };
            // Mostly one whose end is what it needs, on the machine that it frees.
            let needed = |(token, node): &(Token, NodeId)| fits(*node, &[*token]) && !fits(*node, &[]);
            let pairs = tokens.iter().flat_map(|token| nodes.iter().map(move |node| (*token, *node)));
            match pick(&pairs.filter(needed).collect::<Vec<_>>(), *node) {
                Some((token, node)) if shape.nodes == 1 => Command::Preempt(world.preemption(job, &[token], &[node])),
                _ => {
                    let victims: BTreeSet<Token> = victims.iter().filter_map(|nth| pick(&tokens, *nth)).collect();
                    let count = usize::from(shape.nodes).min(nodes.len());
                    let on: Vec<NodeId> = nodes.iter().cycle().skip(usize::from(*node)).take(count).copied().collect();
                    Command::Preempt(world.preemption(job, &victims.into_iter().collect::<Vec<_>>(), &on))
                }
            }
        }
        Op::Checkpoint { pick: nth, twist } => {
            let token = if *twist == 0 { Token(u64::from(*nth)) } else { pick(&tokens, *nth)? };
            Command::Checkpoint { token, path: "c".repeat(usize::from(*twist) * 5), step: 1 }
        }
        Op::Reserve { name, what: 200.., .. } => Command::EndReservation { name: window_name(*name).into() },
        Op::Reserve { name, nodes: mask, from_ms, what } => {
            let named = nodes.iter().enumerate().filter(|(nth, _)| mask & (1 << nth) != 0);
            let names = named.map(|(_, id)| state.node_name(*id).to_owned()).collect();
            Command::CreateReservation(Box::new(CreateReservation {
                name: window_name(*name).into(),
                maintenance: what % 2 == 0,
                users: if what % 3 == 0 { vec!["bob".into()] } else { Vec::new() },
                machines: Machines { names, ..Machines::default() },
                start_wall_ms: match what % 4 {
                    1 => 0,
                    _ => WALL0.saturating_add_unsigned(world.clock_ms) + i64::from(*from_ms),
                },
                duration_ms: 1_000 + u64::from(*what) * 1_000,
                requeue: what % 5 < 2,
                ..CreateReservation::default()
            }))
        }
        Op::Wait { .. } | Op::Cut => return None,
    };
    Some((None, body))
}

fn window_name(nth: u8) -> &'static str {
    ["w0", "w1", "w2"][usize::from(nth) % 3]
}

fn tenant_name(nth: u8) -> &'static str {
    ["default", "a", "b"][usize::from(nth) % 3]
}

/// Half of the jobs have none; the others wait for jobs, times or both.
fn some_terms(state: &State, jobs: &[JobId], terms: u8) -> Option<Box<Terms>> {
    if terms < 128 {
        return None;
    }
    let kinds = [AfterKind::Ok, AfterKind::Any, AfterKind::NotOk, AfterKind::Corr];
    let after = |nth: u8| Some(After { kind: kinds[usize::from(nth) % 4], job: pick(jobs, nth)? });
    let mut parents: Vec<After> = [after(terms), after(terms / 3)].into_iter().flatten().collect();
    parents.truncate(usize::from(terms % 3));
    if terms == 255 {
        parents.push(After { kind: AfterKind::Ok, job: JobId(u64::from(terms)) });
    }
    let wall_ms = state.meta.wall_ms;
    let at = |ms: i64| if ms == 0 { 0 } else { wall_ms + ms };
    let begin_wall_ms = at(i64::from(terms / 4 % 2) * 90_000);
    let deadline_wall_ms = at(i64::from(terms / 8 % 3) * 200_000);
    let reservation = if terms % 8 == 3 { window_name(terms / 16).to_owned() } else { String::new() };
    Some(Box::new(Terms { begin_wall_ms, deadline_wall_ms, after: parents, reservation, ..Terms::default() }))
}

fn twist_plan(places: &mut [Place], twist: u8) {
    let Some(place) = places.first_mut() else { return };
    let Some(part) = place.parts.first_mut() else { return };
    match twist {
        0 => place.attempt += 1,
        1 => part.epoch += 1,
        2 => part.gpu_order.push(200),
        3 => part.cores_by_numa = vec![u16::MAX; 90],
        4 => part.mem_mib = u64::MAX,
        5 => place.parts.clear(),
        6 => place.task.index = 7,
        7 => part.gpu_order.iter_mut().for_each(|slot| *slot = 0),
        _ => {}
    }
}

fn part_report(part: &Part, what: u8, code: u8) -> PartReport {
    let code = if code < 128 { 0 } else { i32::from(code % 5) };
    let cause = match code {
        2 => ExitCause::Stopped,
        3 => ExitCause::GpuFault,
        4 => ExitCause::TimeLimit,
        _ => ExitCause::Own,
    };
    let count = u32::from(part.ranks);
    match what {
        0 => PartReport::Prepared { port: 29_500 },
        1 | 2 => PartReport::Started { port: 29_500 },
        3 => PartReport::Exited { exits: exits(part.first_rank, 1, code, cause), released: false },
        4 | 5 => PartReport::Exited { exits: exits(part.first_rank, count, code, cause), released: true },
        6 => PartReport::Released,
        _ => PartReport::LaunchFailed { fault: LaunchFault::Node, why: "disk".into() },
    }
}

/// Machines by their rack, or without one of them.
fn some_machines(kind: u8) -> Option<Box<Selector>> {
    let selector = match kind {
        1 => Selector { constraint: "rack=r0".parse().expect("a constraint"), ..Selector::default() },
        2 => Selector { constraint: "rack!=r0&rack|cold".parse().expect("a constraint"), ..Selector::default() },
        3 => Selector { without: ["n0".to_owned()].into(), ..Selector::default() },
        _ => return None,
    };
    Some(Box::new(selector))
}

/// An agent that tells one of several stories about each lease the state has on its node.
fn registration(state: &State, n: u8, boot: u8, gpus: u8, fate: u8, fence_new: bool, max_token: u64) -> RegisterNode {
    let mut register = machine(&format!("n{n}"), n + 1, gpus);
    register.boot_id = [boot; 16];
    register.fence_new = fence_new;
    // Two of three machines stand in one rack, until one is carried away.
    let rack = if fate.is_multiple_of(5) { 2 } else { n / 2 };
    register.labels = [("rack".to_owned(), format!("r{rack}"))].into();
    register.max_token = Token(max_token);
    register.kill = if n == 1 { KillStrength::Weak } else { KillStrength::Cgroup };
    if fate % 5 == 4 {
        // Somebody else's GPU.
        register.gpus.truncate(1);
        if let Some(gpu) = register.gpus.first_mut() {
            gpu.uuid.0[0] = (n + 1) % 3 + 1;
            register.class = machine("x", 0, 1).class;
        }
    }
    // Of two in one entry the second comes late.
    register.after_epoch = state.node_epoch(&register.name);
    let Some(id) = state.index.node_by_name.get(&register.name) else { return register };
    for token in state.allocs.get(id).map(|alloc| alloc.leases.clone()).unwrap_or_default() {
        let Some(lease) = state.leases.get(&token) else { continue };
        let Some(part) = lease.value.parts.iter().find(|part| part.node == *id) else { continue };
        match (fate ^ u8::try_from(token.0 % 7).unwrap()) % 4 {
            0 => register.running.push(RunningPart { token, job: lease.value.task.job, gpus: vec![], started: true }),
            1 => register
                .finished
                .push(FinishedPart { token, exits: exits(part.first_rank, u32::from(part.ranks), 0, ExitCause::Own) }),
            2 => register.dead.push(token),
            _ => {}
        }
    }
    if fate.is_multiple_of(6) {
        let gpus = register.gpus.iter().take(2).map(|gpu| gpu.uuid).collect();
        register.running.push(RunningPart { token: Token(3), job: JobId(2), gpus, started: true });
    }
    register
}

fn wild(token: u64, node: u32, job: u64, epoch: u64, which: u8) -> Command {
    let (token, node, job) = (Token(token), NodeId(node), JobId(job));
    match which % 8 {
        0 => Command::Cancel { job },
        1 => Command::NodeSilent { node, epoch, tokens: vec![token] },
        2 => Command::LeaseDue { token, cause: DueCause::TimeLimit },
        3 => Command::ConfirmDead { node, token: Some(token) },
        4 => Command::Compact { rev: Revision(epoch) },
        5 => Command::Retain { bucket: node.0 },
        6 => Command::Member { replica: epoch, level: u16::from(which) },
        _ => {
            let part = PlacePart { node, epoch, gpu_order: vec![which], cores_by_numa: vec![], mem_mib: epoch };
            let place = Place { task: TaskKey { job, index: node.0 }, attempt: node.0, parts: vec![part] };
            Command::Plan(Plan { base_index: epoch, places: vec![place] })
        }
    }
}

/// All keys as of a revision.
type List = (Revision, BTreeMap<String, Kv>);

fn play(ops: &[Op]) -> (World, Vec<List>) {
    let settings = Settings { excused_in_row: 4, excused_in_sum: 9, requests: 6, ..Settings::default() };
    let mut world = World::with(settings);
    for (name, value, preempts) in [("low", -1, false), ("high", 3, true)] {
        let set = SetPriority { name: name.into(), create: true, value, tenants: vec![], preempts, preemptible: true };
        world.run(Command::SetPriority(set));
    }
    let (mut told, mut cmds, mut lists) = (Told::default(), Vec::new(), Vec::new());
    for op in ops.iter().chain([&Op::Cut]) {
        match op {
            Op::Wait { ms } => world.clock_ms += u64::from(*ms),
            Op::Cut => {
                let cmds: Vec<Cmd> = std::mem::take(&mut cmds);
                let outcomes = world.entry(cmds.clone());
                assert_eq!(cmds.len(), outcomes.len());
                told.hear(&cmds, &outcomes);
                told.compare(&world.state);
                if world.log.len() % 7 == 1 {
                    lists.push((world.state.meta.rev, list(&world.state)));
                }
            }
            op => {
                if let Some((request, body)) = command(&world, op) {
                    cmds.push(Cmd { request, actor: "ada".into(), body });
                }
            }
        }
    }
    (world, lists)
}

fn list(state: &State) -> BTreeMap<String, Kv> {
    let (all, more) = keyspace::range(state, "/", usize::MAX, None);
    assert!(!more);
    all.into_iter().map(|kv| (kv.key.clone(), kv)).collect()
}

fn replay(log: &[Entry], state: &mut State) {
    for entry in log {
        let bytes = codec::encode_entry(entry);
        state.apply(&codec::decode_entry(&bytes).expect("what was encoded decodes")).expect("a known level");
    }
}

fn same(left: &mut State, right: &mut State) {
    assert_eq!(left.digest(), right.digest());
    assert_eq!(left.meta, right.meta);
    assert_eq!(left.index, right.index);
    assert_eq!(left.events, right.events);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn replay_equal(ops in ops(), cut in any::<prop::sample::Index>()) {
        let (world, _) = play(&ops);
        let fresh = || State::new([7; 16], world.state.meta.settings.clone());
        let mut whole = fresh();
        replay(&world.log, &mut whole);
        let middle = cut.index(world.log.len());
        let mut first = fresh();
        replay(&world.log[..middle], &mut first);
        let mut second = first.clone();
        second.rebuild_indexes();
        second.digest();
        replay(&world.log[middle..], &mut second);
        let mut played = world.state.clone();
        same(&mut whole, &mut second);
        same(&mut whole, &mut played);
    }

    #[test]
    fn a_list_and_the_events_after_it_are_a_later_list(ops in ops()) {
        let kept: Vec<Op> = ops.into_iter().filter(|op| !matches!(op, Op::Retain { .. } | Op::Compact { .. } | Op::Wild { .. })).collect();
        let (world, lists) = play(&kept);
        let last = list(&world.state);
        for (rev, kvs) in lists {
            let mut watched: BTreeMap<String, (String, Revision)> =
                kvs.into_iter().map(|(key, kv)| (key, (kv.value, kv.mod_rev))).collect();
            let mut seen = BTreeSet::new();
            for event in world.state.events_since(rev).expect("nothing was compacted") {
                for (key, value) in keyspace::project(event, &world.state) {
                    prop_assert!(seen.insert((event.rev, key.clone())), "{key} changed twice in {}", event.rev);
                    match value {
                        Some(value) => watched.insert(key, (value, event.rev)),
                        None => watched.remove(&key),
                    };
                }
            }
            let listed: BTreeMap<String, (String, Revision)> =
                last.iter().map(|(key, kv)| (key.clone(), (kv.value.clone(), kv.mod_rev))).collect();
            prop_assert_eq!(watched, listed);
        }
    }

    #[test]
    fn pages_of_a_range_are_the_range(ops in ops(), size in 1..5usize) {
        let (world, _) = play(&ops);
        for prefix in ["/", "/jobs/", "/state/1", "/queue/pending/", "/leases/", "/fencing/", "/results/"] {
            let (all, _) = keyspace::range(&world.state, prefix, usize::MAX, None);
            let (mut pages, mut after): (Vec<Kv>, Option<String>) = (Vec::new(), None);
            loop {
                let (page, more) = keyspace::range(&world.state, prefix, size, after.as_deref());
                pages.extend(page);
                after = pages.last().map(|kv| kv.key.clone());
                if !more {
                    break;
                }
            }
            prop_assert_eq!(&pages, &all);
            for kv in &all {
                prop_assert_eq!(keyspace::get(&world.state, &kv.key), Some(kv.clone()));
                prop_assert!(kv.create_rev <= kv.mod_rev && kv.mod_rev <= world.state.meta.rev && kv.version > 0);
            }
        }
    }
}

#[test]
fn any_bytes_that_decode_apply_without_a_panic() {
    // Flips bytes of real entries: most of what decodes is nonsense of a kind no client would send.
    let mut world = World::new();
    world.register(machine("n0", 1, 3));
    for _ in 0..3 {
        let id = world.submit(one_gpu());
        let _ = world.place(id, &[NodeId(1)]);
    }
    let mut applied = 0;
    for entry in world.log.clone() {
        let bytes = codec::encode_entry(&entry);
        for at in 3..bytes.len() {
            for flip in [0x01u8, 0x80, 0xff] {
                let mut bad = bytes.clone();
                bad[at] ^= flip;
                if let Ok(entry) = codec::decode_entry(&bad)
                    && entry.level <= LEVEL
                {
                    let mut state = world.state.clone();
                    state.apply(&entry).expect("a known level");
                    state.check().expect("all invariants hold");
                    applied += 1;
                }
            }
        }
    }
    assert!(applied > 500, "only {applied} entries decoded");
}

#[test]
fn random_logs_reach_what_matters() {
    use proptest::strategy::ValueTree;
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let (mut verdicts, mut states, mut codes) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    let (mut preempted, mut checkpoints, mut inside, mut sent_away) = (0, 0, 0, 0);
    let (mut together, mut chosen, mut torn, mut grown) = (0, 0, 0, 0);
    for _ in 0..240 {
        let ops = ops().new_tree(&mut runner).expect("a list of operations").current();
        let (world, _) = play(&ops);
        for event in &world.state.events {
            match &event.what {
                Change::TaskState { state, .. } => states.insert(state.state.name()),
                Change::LeaseShown { lease, .. } => lease.verdict.is_some_and(|kind| verdicts.insert(kind.name())),
                _ => continue,
            };
        }
        checkpoints += world.state.tasks.iter().filter(|(_, task)| task.value.checkpoint.is_some()).count();
        let rows = world.state.tasks.iter().flat_map(|(_, task)| &task.value.attempts);
        sent_away += rows.filter(|row| row.text.starts_with("reservation ")).count();
        let mut again = State::new([7; 16], world.state.meta.settings.clone());
        for entry in &world.log {
            for (cmd, outcome) in entry.cmds.iter().zip(again.apply(entry).expect("a known level")) {
                preempted += usize::from(matches!((&cmd.body, &outcome), (Command::Preempt(_), Outcome::Done(_))));
                if let (Command::Plan(plan), Outcome::Done(Reply::Plan(all))) = (&cmd.body, &outcome) {
                    let granted = plan.places.iter().zip(all).filter(|(_, answer)| answer.is_ok());
                    let spec = |place: &Place| again.jobs.get(&place.task.job).map(|job| job.value.spec.clone());
                    let own = |place: &Place| spec(place).is_some_and(|spec| !spec.reservation().is_empty());
                    let near = |place: &Place| spec(place).is_some_and(|spec| spec.shape.required_level().is_some());
                    together += granted.clone().filter(|(place, _)| near(place)).count();
                    let open = |place: &Place| spec(place).is_some_and(|spec| spec.shape.is_open());
                    let cut = |place: &Place| open(place) && place.parts.len() > 1;
                    torn += granted.clone().filter(|(place, _)| cut(place)).count();
                    let gpus = |place: &Place| place.parts.iter().map(|part| part.gpu_order.len() as u32).sum::<u32>();
                    let more =
                        |place: &Place| open(place) && spec(place).is_some_and(|it| gpus(place) > it.shape.gpus());
                    grown += granted.clone().filter(|(place, _)| more(place)).count();
                    let chose = |place: &Place| spec(place).is_some_and(|spec| spec.shape.machines.is_some());
                    chosen += granted.clone().filter(|(place, _)| chose(place)).count();
                    inside += granted.filter(|(place, _)| own(place)).count();
                }
                match outcome {
                    Outcome::Rejected(rejection) => codes.extend([rejection.code.name()]),
                    Outcome::Done(Reply::Plan(all)) => {
                        codes.extend(all.into_iter().filter_map(Result::err).map(|r| r.code.name()))
                    }
                    Outcome::Done(Reply::Report(all)) => {
                        codes.extend(all.into_iter().filter_map(Result::err).map(|r| r.code.name()))
                    }
                    _ => {}
                }
            }
        }
    }
    assert!(together > 0, "{together} gangs were granted machines in the rack that they require");
    assert!(grown > 0, "{grown} have more GPUs than the least that they take");
    assert!(torn > 0, "{torn} that leave their machines open were cut over several");
    assert!(chosen > 0, "{chosen} were granted machines that they chose");
    assert!(inside > 0 && sent_away > 0, "{inside} started in a reservation, {sent_away} were sent away by one");
    println!("{verdicts:?} {states:?} {codes:?}");
    assert!(preempted > 0 && checkpoints > 3, "room was made {preempted} times, {checkpoints} have a checkpoint");
    for verdict in
        ["SUCCEEDED", "FAILED", "TIMED_OUT", "CANCELLED", "LOST", "LAUNCH_FAILED_BY_NODE", "GPU_FAULT", "PREEMPTED"]
    {
        assert!(verdicts.contains(verdict), "no lease was decided {verdict}: {verdicts:?}");
    }
    for state in ["RUNNING", "RETRYING", "LOST", "PREEMPTED", "SUCCEEDED", "FAILED", "CANCELLED", "SKIPPED"] {
        assert!(states.contains(state), "no task was {state}: {states:?}");
    }
    for code in
        "GPU_TAKEN EPOCH_STALE TOKEN_STALE ALREADY_DECIDED REQUEST_MISMATCH IDENTITY_CONFLICT QUOTA VICTIM_PROTECTED \
         RESERVED RESERVATION_UNKNOWN RESERVATION_DENIED CONFLICT"
            .split(' ')
    {
        assert!(codes.contains(code), "no command was refused as {code}: {codes:?}");
    }
}
