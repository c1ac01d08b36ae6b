//! Random states for the storage tests: every table gets inserts, updates and removals, jobs leave memory, buckets are
//! dropped. Only tables are changed, as apply would, without its rules: storage must keep whatever they hold.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::sync::Arc;

use statemachine::event::{Change, Event};
use statemachine::record::*;
use statemachine::spec::{Retry, Shape};
use statemachine::storage::{HistoryKey, weigh};
use statemachine::*;

/// splitmix64: the same numbers on every run.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn text(&mut self, limit: u64) -> String {
        (0..self.below(limit)).map(|_| char::from(b'a' + (self.below(26)) as u8)).collect()
    }

    fn bytes(&mut self) -> [u8; 16] {
        u128::from(self.next()).wrapping_mul(u128::from(self.next()) << 61 | 1).to_be_bytes()
    }
}

/// The state after `entries` entries of a seed: the same state for the same arguments.
pub fn after(seed: u64, entries: u64) -> State {
    let mut state = State::default();
    let mut random = Random(seed);
    (0..entries).for_each(|_| entry(&mut state, &mut random));
    state
}

/// One log entry's worth of changes.
pub fn entry(state: &mut State, random: &mut Random) {
    let applied = &mut state.meta.applied;
    *applied = LogPosition { term: 3, leader: 0x9_0000_0001, index: applied.index + 1 };
    state.meta.level = 1;
    state.meta.membership = vec![1, 2, 3];
    state.meta.clock_ms += random.below(400_000);
    for _ in 0..1 + random.below(30) {
        state.meta.rev.0 += 1;
        change(state, random);
        let what = Change::JobSubmitted { job: JobId(state.meta.next_job) };
        let event = Event { rev: state.meta.rev, sub: 0, clock_ms: state.meta.clock_ms, wall_ms: -5, what };
        state.events.push_back(Arc::new(event));
        if state.events.len() > 200 {
            state.events.pop_front();
        }
    }
}

fn change(state: &mut State, random: &mut Random) {
    let job = JobId(1 + random.below(state.meta.next_job.max(1)));
    let node = NodeId(random.below(40) as u32);
    match random.below(24) {
        0..=7 => submit(state, random),
        8 | 9 => {
            state.jobs.update(&job, |row| row.value.holds.launch ^= true);
        }
        10..=12 => archive(state, job),
        13 => {
            state.tasks.insert(TaskKey::only(job), versioned(state, task(random)));
        }
        14 => {
            state.tasks.remove(&TaskKey::only(job));
        }
        15 => {
            state.leases.insert(Token(random.below(300) << 32), versioned(state, lease(random, job, node)));
        }
        16 => {
            state.leases.remove(&Token(random.below(300) << 32));
        }
        17 => {
            state.allocs.insert(node, alloc(random));
            state.gpu_tokens.insert(GpuUuid(random.bytes()), versioned(state, Token(random.next())));
        }
        18 => {
            let name = random.text(40);
            let lock = Lock { holder: None, waiters: (0..random.below(4)).map(SessionId).collect() };
            state.locks.insert(name.clone(), versioned(state, lock));
            state.sessions.insert(
                SessionId(random.below(90)),
                Session { owner: random.text(9), ttl_ms: 30_000, opened_clock_ms: 1, locks: vec![name] },
            );
        }
        19 => {
            let name = state.locks.iter().next().map(|(name, _)| name.clone());
            name.and_then(|name| state.locks.remove(&name));
            state.sessions.remove(&SessionId(random.below(90)));
        }
        20 => {
            state.names.insert(NameKey::User(UserId(random.below(50) as u32)), random.text(30));
            state.names.insert(NameKey::GpuType(GpuTypeId(random.below(50) as u16)), random.text(30));
            state.queues.insert(QueueId(random.below(9) as u16), Queue { name: random.text(9), tenant: TenantId(1) });
        }
        21 => {
            let gpus = random.below(4) as u8;
            let class = Class { gpus, nvlinks: vec![2; usize::from(gpus).pow(2)], ..Class::default() };
            state.classes.insert(ClassId(random.below(20) as u32), class);
            let tenant = Tenant { name: random.text(9), live_jobs: 1, body_bytes: 2, ..Tenant::default() };
            state.tenants.insert(TenantId(random.below(20) as u32), tenant);
        }
        22 => {
            let request = state.requests.iter().nth(random.below(200) as usize).map(|(id, _)| *id);
            request.and_then(|id| state.requests.remove(&id));
        }
        _ => {
            let oldest = state.buckets.iter().next().map(|(bucket, _)| *bucket);
            if let Some(bucket) = oldest.filter(|_| state.buckets.len() > 6) {
                drop_bucket(state, bucket);
            }
        }
    }
}

fn submit(state: &mut State, random: &mut Random) {
    state.meta.next_job += 1;
    let id = JobId(state.meta.next_job);
    let mut request = random.bytes();
    if random.below(2) == 0 {
        request[..6].copy_from_slice(&(1_764_000_000_000 + id.0).to_be_bytes()[2..]);
    }
    let request = RequestId(request);
    state.jobs.insert(id, versioned(state, job(random, request)));
    let large = if random.below(60) == 0 { random.below(400_000) } else { 0 };
    let cwd = "x".repeat(large as usize);
    state.bodies.insert(id, Body { argv: vec![random.text(50), random.text(300)], env: Default::default(), cwd });
    state.requests.insert(request, Request { body: 7 << 100, reply: StoredReply::Job(id), bucket: 3 });
}

/// A job leaves memory, if it is there.
pub fn archive(state: &mut State, id: JobId) {
    let Some(job) = state.jobs.remove(&id) else { return };
    let body = state.bodies.remove(&id).expect("each job has a body");
    let task = state.tasks.remove(&TaskKey::only(id)).map(|task| (*task).clone());
    let bucket = (state.meta.clock_ms / 3_600_000) as u32;
    let row = HistoryRow { id, job: (*job).clone(), body: (*body).clone(), task, bucket };
    let (hash, bytes) = weigh(&row);
    let mut sums = state.buckets.get(&bucket).copied().unwrap_or_default();
    sums.rows += 1;
    sums.bytes += bytes;
    sums.sum = sums.sum.wrapping_add(hash);
    sums.highest_job = sums.highest_job.max(id);
    state.buckets.insert(bucket, sums);
    let mut ended = state.ended.get(&(id.0 / 256)).cloned().unwrap_or_default();
    ended.jobs.insert((id.0 % 256) as u8, (TaskOutcome::Failed, bucket));
    state.ended.insert(id.0 / 256, ended);
    state.archived.insert(id, Arc::new(row));
}

/// Retention: an hour of history goes.
pub fn drop_bucket(state: &mut State, bucket: u32) {
    state.buckets.remove(&bucket);
    let gone: Vec<_> = state.archived.iter().filter(|(_, row)| row.bucket == bucket).map(|(id, _)| *id).collect();
    gone.iter().for_each(|id| {
        state.archived.remove(id);
    });
}

/// Ids of all jobs whose history the state promises, with their keys, the newest first.
pub fn history_keys(state: &State) -> Vec<HistoryKey> {
    let mut keys: Vec<HistoryKey> = state
        .ended
        .iter()
        .flat_map(|(chunk, ended)| {
            ended.jobs.iter().map(move |(low, (_, bucket))| (chunk * 256 + u64::from(*low), *bucket))
        })
        .filter(|(_, bucket)| state.buckets.contains(bucket))
        .map(|(job, bucket)| HistoryKey { bucket, job: JobId(job) })
        .collect();
    keys.sort();
    keys.reverse();
    keys
}

fn versioned<T>(state: &State, value: T) -> Versioned<T> {
    Versioned { create_rev: Revision(1), mod_rev: state.meta.rev, version: 2, value }
}

fn job(random: &mut Random, request: RequestId) -> Job {
    let shape = Shape {
        nodes: 1 + random.below(4) as u16,
        ranks_per_node: 2,
        gpus_per_rank: 1,
        gpu_types: [GpuTypeId(3)].into(),
        cores_per_rank: 0,
        mem_mib_per_rank: random.next(),
        mix_types: false,
        min_bandwidth_mbps: 0,
        topology: None,
        machines: None,
    };
    let retry = Retry { max: 3, initial_ms: 1_000, mult_milli: 2_000, max_ms: 9, on_exit: [1, 137].into() };
    let labels = [("team".to_string(), random.text(9))].into();
    let spec = JobSpec {
        name: random.text(30).into(),
        priority: -3,
        shape,
        limit_ms: random.next(),
        lease_ttl_ms: 30_000,
        kill_grace_ms: 5_000,
        retry,
        labels,
        terms: None,
    };
    Job {
        spec,
        tenant: TenantId(0),
        user: UserId(1),
        queue: QueueId(0),
        request: Some(request),
        submitted_clock_ms: random.below(1 << 40),
        submitted_wall_ms: -1,
        seq: random.next(),
        holds: Holds::default(),
        rare: None,
        ended: None,
        unmet: 0,
    }
}

fn task(random: &mut Random) -> Task {
    Task {
        phase: Phase::Retrying { not_before_ms: random.next() },
        attempt: random.below(9) as u32,
        used: Used::default(),
        excused_in_row: 1,
        avoid: [NodeId(4)].into(),
        attempts: Default::default(),
        result: None,
        fence: None,
        displaced: 0,
        checkpoint: None,
        had: Had::default(),
    }
}

fn lease(random: &mut Random, job: JobId, node: NodeId) -> Lease {
    let part = Part {
        node,
        epoch: 5,
        gpus: u128::from(random.next()) << 40,
        gpu_order: vec![1, 0],
        first_rank: 0,
        ranks: 2,
        cores_by_numa: vec![4, 4],
        mem_mib: random.next(),
        state: PartState::Prepared { port: 700 },
        exits: vec![RankExit { rank: 1, exit: Exit { code: 0, signal: 9 }, cause: ExitCause::Stopped }],
    };
    Lease {
        task: TaskKey::only(job),
        attempt: 1,
        phase: LeasePhase::Go,
        granted_ms: random.next(),
        go_ms: Some(3),
        started_ms: None,
        ttl_ms: 30_000,
        verdict: None,
        master: Some(Master { node, port: 800 }),
        parts: vec![part; 1 + random.below(3) as usize],
        amounts: Amounts::default(),
    }
}

fn alloc(random: &mut Random) -> Alloc {
    Alloc {
        free_gpus: u128::from(random.next()),
        cores_free: vec![random.below(64) as u16],
        holders: [(3, Token(9))].into(),
        ..Alloc::default()
    }
}
