//! Golden bytes: every stored type, every variant of every stored enum, as it was first written. A line of
//! `tests/golden/*.hex` is a name and the bytes; what was released is never changed, only added to. When a test here
//! fails, the encoding changed: disks and replicas of the released version could not be read any more. A new sample
//! (and, before the first release, a wanted change) is written by running the tests with `ARES_BLESS=1`.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::path::PathBuf;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::codec::{self, StoredKey, Tag};
use super::history::HistoryKey;
use super::image::Head;
use crate::command::*;
use crate::domain::{Level, Topology};
use crate::event::{Change, Event, QueuePlace};
use crate::record::*;
use crate::runs::{OfLimit, Runs};
use crate::selector::Selector;
use crate::settings::{OrderBy, Settings};
use crate::spec::{After, AfterKind, Retry, Shape, Terms};
use crate::view::{LeaseView, PartView, ShownState, TaskView};
use crate::*;

mod commands;

use commands::{commands, name};

/// The lines of one file.
struct Golden {
    path: PathBuf,
    old: BTreeMap<String, String>,
    new: BTreeMap<String, String>,
}

impl Golden {
    fn open(file: &str) -> Self {
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(format!("{file}.hex"));
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        let old = text.lines().filter_map(|line| line.split_once(' ')).map(|(name, hex)| (name.into(), hex.into()));
        Self { path, old: old.collect(), new: BTreeMap::new() }
    }

    fn bytes(&mut self, name: &str, bytes: &[u8]) {
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        assert!(self.new.insert(name.into(), hex).is_none(), "two samples are named {name}");
    }

    /// A record: its canonical bytes, and that they read back.
    fn record<T: Serialize + DeserializeOwned + PartialEq + Debug>(&mut self, name: &str, value: &T) {
        let mut bytes = Vec::new();
        codec::canonical(value, &mut bytes);
        assert_eq!(codec::decode_record::<T>(&bytes).as_ref(), Ok(value), "{name}");
        self.bytes(name, &bytes);
    }

    fn check(self) {
        if std::env::var_os("ARES_BLESS").is_some() {
            let text: String = self.new.iter().map(|(name, hex)| format!("{name} {hex}\n")).collect();
            std::fs::create_dir_all(self.path.parent().expect("a directory")).unwrap();
            std::fs::write(&self.path, text).unwrap();
            return;
        }
        for (name, hex) in &self.new {
            assert_eq!(self.old.get(name), Some(hex), "{name} of {} is encoded differently", self.path.display());
        }
        for name in self.old.keys() {
            assert!(self.new.contains_key(name), "{name} of {} has no sample any more", self.path.display());
        }
    }
}

fn versioned<T>(value: T) -> Versioned<T> {
    Versioned { create_rev: Revision(300), mod_rev: Revision(70_000), version: 2, value }
}

fn spec() -> JobSpec {
    let shape = Shape {
        nodes: 2,
        ranks_per_node: 4,
        gpus_per_rank: 1,
        gpu_types: [GpuTypeId(1), GpuTypeId(300)].into(),
        cores_per_rank: 8,
        mem_mib_per_rank: 65_536,
        mix_types: false,
        min_bandwidth_mbps: 20_000,
        topology: Some(Topology { level: Level::Rack, required: true }),
        machines: Some(Box::new(Selector {
            constraint: "rack=r1&ssd|rack!=r2".parse().expect("a constraint"),
            only: ["n1".into(), "n2".into()].into(),
            without: ["n3".into()].into(),
        })),
    };
    let retry = Retry { max: 3, initial_ms: 1_000, mult_milli: 2_000, max_ms: 300_000, on_exit: [1, 137].into() };
    JobSpec {
        name: "digits".into(),
        priority: -2,
        shape,
        limit_ms: 3_600_000,
        lease_ttl_ms: 30_000,
        kill_grace_ms: 5_000,
        retry,
        labels: [("team".into(), "vision".into()), ("a".into(), "".into())].into(),
        terms: Some(Box::new(terms())),
    }
}

fn terms() -> Terms {
    let kinds = [AfterKind::Ok, AfterKind::Any, AfterKind::NotOk, AfterKind::Corr];
    Terms {
        begin_wall_ms: 1_800_000_000_000,
        deadline_wall_ms: -2,
        after: kinds.map(|kind| After { kind, job: JobId(300) }).into(),
        class: "urgent".into(),
        checkpoint_signal: 10,
        reservation: "spring".into(),
        array: Some(Array { ranges: vec![(0, 9), (300, 300)], throttle: 3 }),
        doublings: 2,
    }
}

fn body() -> Body {
    let argv = vec!["python3".into(), "train.py".into()];
    Body { argv, env: [("SEED".into(), "7".into())].into(), cwd: "/work".into() }
}

fn progress() -> Progress {
    let rest = Some((TaskOutcome::Skipped, Some(EndCause::Parent(JobId(2)))));
    let paced = Some(Paced { parents: 8, freed: 301, due: true });
    Progress { begun: 300, open: 1, ended: [1, 0, 2, 3, 4], rest, sweep: Some(JobId(7)), queued: Revision(6), paced }
}

fn rare(role: ArrayRole) -> Box<Rare> {
    Rare { stop: Some(Stop { by: UserId(9), rev: Revision(8) }), role: Some(role) }.into()
}

fn job() -> Job {
    Job {
        spec: spec(),
        tenant: TenantId(1),
        user: UserId(2),
        queue: QueueId(3),
        request: Some(RequestId([0xab; 16])),
        submitted_clock_ms: 1 << 33,
        submitted_wall_ms: 1_800_000_000_000,
        seq: 42,
        holds: Holds { launch: true, orphan: false, user: true, begin: true, after: true, restore: true },
        rare: Some(rare(ArrayRole::Whole(progress()))),
        ended: Some(JobEnd { outcome: TaskOutcome::Succeeded, clock_ms: 5, wall_ms: -6 }.into()),
        unmet: 1 << 63 | 1,
    }
}

const EXIT: Exit = Exit { code: -1, signal: 9 };

fn attempt(verdict: VerdictKind) -> AttemptRow {
    AttemptRow {
        attempt: 2,
        token: Token(1 << 40 | 7),
        verdict,
        exit: Some(EXIT),
        nodes: vec![NodeId(1), NodeId(2)],
        granted_ms: 10,
        started_ms: Some(20),
        ended_ms: 30,
        text: "why".into(),
        preemptor: Some(JobId(300)),
        lost_gpu_ms: 1 << 40,
    }
}

fn result(outcome: TaskOutcome) -> TaskResult {
    TaskResult {
        outcome,
        token: Some(Token(5)),
        attempt: 2,
        exit: Some(EXIT),
        rev: Revision(9),
        wall_ms: -1,
        cause: Some(EndCause::Parent(JobId(4))),
    }
}

fn task(phase: Phase) -> Task {
    Task {
        phase,
        attempt: 4,
        used: Used { retries: 1, lost: 2, launch: 3, gpu_fault: 4, preempted: 5, timeout: 6 },
        excused_in_row: 7,
        avoid: [NodeId(3)].into(),
        attempts: VERDICTS.map(attempt).into(),
        result: Some(result(TaskOutcome::Failed)),
        fence: Some(versioned(Token(77))),
        displaced: 8,
        checkpoint: Some(Checkpoint { path: "/c".into(), attempt: 2, clock_ms: 3, step: 300 }.into()),
        had: Had { gpu_ms: 300, run_ms: 301, turn: true, given: 9 },
    }
}

const VERDICTS: [VerdictKind; 9] = [
    VerdictKind::Succeeded,
    VerdictKind::Failed,
    VerdictKind::TimedOut,
    VerdictKind::Cancelled,
    VerdictKind::Lost,
    VerdictKind::LaunchJob,
    VerdictKind::LaunchNode,
    VerdictKind::GpuFault,
    VerdictKind::Preempted,
];
const OUTCOMES: [TaskOutcome; 5] =
    [TaskOutcome::Failed, TaskOutcome::TimedOut, TaskOutcome::Cancelled, TaskOutcome::Skipped, TaskOutcome::Succeeded];
const CAUSES: [ExitCause; 5] =
    [ExitCause::Own, ExitCause::Stopped, ExitCause::TimeLimit, ExitCause::LeaseEnd, ExitCause::GpuFault];
const HEALTHS: [GpuHealth; 6] = [
    GpuHealth::Ok,
    GpuHealth::DrainWhenIdle,
    GpuHealth::Quarantined,
    GpuHealth::Dirty,
    GpuHealth::Unresponsive,
    GpuHealth::Gone,
];

fn part(state: PartState) -> Part {
    Part {
        node: NodeId(4),
        epoch: 5,
        gpus: 1 << 100 | 3,
        gpu_order: vec![1, 0, 100],
        first_rank: 8,
        ranks: 2,
        cores_by_numa: vec![4, 300],
        mem_mib: 1 << 20,
        state,
        exits: CAUSES.map(|cause| RankExit { rank: 9, exit: EXIT, cause }).into(),
    }
}

fn lease(phase: LeasePhase) -> Lease {
    let parts = [
        PartState::Held,
        PartState::Prepared { port: 40_000 },
        PartState::Started,
        PartState::Exited,
        PartState::Released,
        PartState::Stuck,
    ];
    Lease {
        task: TaskKey { job: JobId(11), index: 0 },
        attempt: 2,
        phase,
        granted_ms: 1,
        go_ms: Some(2),
        started_ms: None,
        ttl_ms: 30_000,
        verdict: Some(Verdict {
            kind: VerdictKind::GpuFault,
            rev: Revision(6),
            clock_ms: 7,
            exit: None,
            node: Some(NodeId(8)),
            preemptor: Some(JobId(9)),
            for_turn: true,
            text: "XID 79".into(),
        }),
        master: Some(Master { node: NodeId(4), port: 29_500 }),
        parts: parts.map(part).into(),
        amounts: Amounts { gpus: [(GpuTypeId(1), 300)].into(), cores: 4, mem_mib: 5 },
    }
}

fn node(admin: NodeAdmin, kill: KillStrength) -> Node {
    let gpu = |health| Gpu {
        uuid: GpuUuid([0xcd; 16]),
        gpu_type: GpuTypeId(1),
        mem_mib: 81_559,
        numa: 1,
        health,
        reason: "r".into(),
        xid: 79,
    };
    Node {
        name: "n1".into(),
        address: "10.0.0.1:7000".into(),
        host: "10.0.0.1".into(),
        machine_id: [1; 16],
        boot_id: [2; 16],
        epoch: 3,
        version: "0.1.0".into(),
        class: ClassId(4),
        cores_by_numa: vec![64, 64],
        mem_mib: 2_000_000,
        gpus: HEALTHS.map(gpu).into(),
        simulated: true,
        kill,
        admin,
        launch_fails: vec![JobId(5)],
        labels: [("rack".into(), "7".into())].into(),
        registered_clock_ms: 6,
    }
}

fn class() -> Class {
    let pci = vec![PciClass::Same, PciClass::Pix, PciClass::Pxb, PciClass::Phb, PciClass::Node, PciClass::Sys];
    Class {
        gpus: 2,
        nvlinks: vec![0, 12, 12, 0],
        pci: pci.clone(),
        nvlink_mbps_per_link: 25_000,
        nvswitch: true,
        pcie_mbps: 26_000,
        inter_socket_mbps: 19_000,
        intel_cpu: false,
        p2p: true,
        numa: vec![0, 1],
        nics: vec![Nic { name: "mlx5_0".into(), mbps: 50_000, class_to_gpu: pci }],
    }
}

fn alloc() -> Alloc {
    Alloc {
        free_gpus: 0xf0,
        cores_free: vec![60, 64],
        mem_free_mib: 1_000_000,
        holders: [(0, Token(5)), (1, Token(6))].into(),
        leases: vec![Token(5), Token(6)],
        orphans: vec![Orphan { token: Token(4), job: JobId(3), gpus: 4 }],
    }
}

fn meta() -> Meta {
    Meta {
        cluster: [9; 16],
        incarnation: 1,
        applied: LogPosition { term: 2, leader: 1 << 60, index: 3 },
        membership: vec![1, 2, 255],
        clock_ms: 4,
        wall_ms: -5,
        rev: Revision(6),
        compacted_rev: Revision(5),
        next_job: 7,
        next_node: 8,
        next_class: 9,
        next_user: 10,
        next_gpu_type: 11,
        next_session: 12,
        next_tenant: 16,
        next_reservation: 19,
        policy: 17,
        token: Token(13),
        level: 1,
        settings: Settings::default(),
        members: [(1 << 60, 1)].into(),
        request_horizon_wall_ms: i64::MIN,
        retiring: [(14, 15)].into(),
        restored_ms: Some(16),
    }
}

#[test]
fn records_are_encoded_as_they_were() {
    let mut golden = Golden::open("records");
    golden.record("head", &Head { meta: meta(), digest: 1 << 127 | 1 });
    golden.record("meta", &meta());
    golden.record("job", &versioned(job()));
    let plain = JobSpec { terms: None, ..spec() };
    let of_array = ArrayRole::Task(Element { array: JobId(300), index: u32::MAX });
    golden.record("job.plain", &versioned(Job { spec: plain.clone(), rare: None, ..job() }));
    golden.record("job.of_array", &versioned(Job { spec: plain, rare: Some(rare(of_array)), ..job() }));
    let late = TaskResult { cause: Some(EndCause::Deadline), ..result(TaskOutcome::Cancelled) };
    golden.record("task.late", &versioned(Task { result: Some(late), ..task(Phase::Pending) }));
    golden.record("body", &body());
    golden.record("task.pending", &versioned(task(Phase::Pending)));
    golden.record("task.retrying", &versioned(task(Phase::Retrying { not_before_ms: 99 })));
    golden.record("task.leased", &versioned(task(Phase::Leased { token: Token(8) })));
    for outcome in OUTCOMES {
        golden.record(&format!("task.ended.{outcome:?}"), &versioned(task(Phase::Ended { outcome })));
    }
    for phase in [LeasePhase::Prepare, LeasePhase::Go, LeasePhase::Running] {
        golden.record(&format!("lease.{phase:?}"), &versioned(lease(phase)));
    }
    for kill in [KillStrength::PidNamespace, KillStrength::Cgroup, KillStrength::Weak] {
        golden.record(&format!("node.{kill:?}"), &versioned(node(NodeAdmin::Ready, kill)));
    }
    let out = NodeAdmin::Out { reason: "fans".into(), evict_ms: Some(60_000) };
    golden.record("node.out", &versioned(node(out, KillStrength::Weak)));
    golden.record("alloc", &alloc());
    golden.record("class", &class());
    let parent = Some(TenantId(0));
    let amounts = Amounts { gpus: [(GpuTypeId(1), 300)].into(), cores: 4, mem_mib: 5 };
    let tenant = Tenant {
        name: "a".into(),
        parent,
        live_jobs: 1,
        body_bytes: 2,
        leases: 3,
        policy: Policy {
            weight: 300,
            guaranteed: [(GpuTypeId(1), 8)].into(),
            limit: Ceiling { gpus: Some(16), by_type: [(GpuTypeId(2), 9)].into(), cores: None, mem_mib: Some(1 << 40) },
            may_borrow: false,
            default_limit_ms: 3_600_000,
            max_limit_ms: 7_200_000,
            max_pending: 7,
        },
        used: amounts.clone(),
        used_at_change: Amounts::default(),
        usage: Usage { gpu_ms: 1 << 50, core_ms: 2, at_ms: 3, decayed_ms: 4 },
        removed: true,
    };
    golden.record("tenant", &tenant);
    let tenants = vec![TenantId(1), TenantId(300)];
    golden.record("priority", &Priority { value: -7, tenants, preempts: true, preemptible: false });
    let part = PlacePart { node: NodeId(1), epoch: 2, gpu_order: vec![3], cores_by_numa: vec![4], mem_mib: 5 };
    golden.record("claim", &Claim { parts: vec![part], victims: vec![Token(9)], amounts, until_ms: 7 });
    let window = |whom, begun| Reservation {
        name: "spring".into(),
        whom,
        nodes: [NodeId(1), NodeId(300)].into(),
        start_wall_ms: 1_800_000_000_000,
        end_wall_ms: -2,
        requeue: true,
        reason: "r".into(),
        begun,
    };
    golden.record("reservation_maintenance", &window(Whom::Maintenance, None));
    let whom = Whom::Jobs { tenants: vec![TenantId(1)], users: vec![UserId(300)] };
    golden.record("reservation_jobs", &window(whom, Some(Token(9))));
    let by_limit =
        [(0, OfLimit { last_ms: vec![7], at: 300 }), (3_600_000, OfLimit { last_ms: vec![1 << 40, 8], at: 299 })];
    golden.record("runs", &Runs { last_ms: vec![7, 1 << 40, 8], by_limit: by_limit.into(), learned: 300, clock_ms: 9 });
    golden.record("queue", &Queue { name: "q".into(), tenant: TenantId(1) });
    let session = Session { owner: "o".into(), ttl_ms: 1, opened_clock_ms: 2, locks: vec!["l".into()] };
    golden.record("session", &session);
    let holder = Some(Holder { session: SessionId(1), token: Token(2) });
    golden.record("lock", &versioned(Lock { holder, waiters: [SessionId(3), SessionId(4)].into() }));
    let replies = [
        StoredReply::Done,
        StoredReply::Job(JobId(1)),
        StoredReply::Session(SessionId(2)),
        StoredReply::Lock(Some(Token(3))),
        StoredReply::Lock(None),
    ];
    for reply in replies {
        golden.record(&format!("request.{reply:?}"), &Request { body: 1 << 99, reply, bucket: 4 });
    }
    golden.record("ended", &Ended { jobs: OUTCOMES.iter().zip(250u8..).map(|(out, job)| (job, (*out, 9))).collect() });
    golden.record(
        "bucket",
        &Bucket { rows: 1, bytes: 2, sum: u128::MAX, highest_job: JobId(3), newest_wall_ms: i64::MAX },
    );
    golden.record("name", &"ann".to_string());
    golden.record("gpu_token", &versioned(Token(7)));
    let task = Some(versioned(task(Phase::Ended { outcome: TaskOutcome::Failed })));
    golden.record("history", &HistoryRow { id: JobId(1), job: versioned(job()), body: body(), task, bucket: 2 });
    golden.check();
}

#[test]
fn stored_values_and_keys_are_encoded_as_they_were() {
    let mut golden = Golden::open("values");
    let key = JobId(258).bytes();
    let value = codec::encode_value(Tag::Body, &key, &body());
    assert_eq!(codec::decode_value(Tag::Body, &key, &value), Ok(body()));
    golden.bytes("value", &value);
    golden.bytes("row_hash", &codec::hash_row(Tag::Body, &key, b"canonical").to_be_bytes());
    golden.bytes("row_hash.large", &codec::hash_row(Tag::Body, &key, &[7; 5_000]).to_be_bytes());
    golden.bytes("key.job", &key);
    golden.bytes("key.task", &TaskKey { job: JobId(258), index: 3 }.bytes());
    golden.bytes("key.token", &Token(1 << 40).bytes());
    golden.bytes("key.node", &NodeId(259).bytes());
    golden.bytes("key.class", &ClassId(260).bytes());
    golden.bytes("key.tenant", &TenantId(261).bytes());
    golden.bytes("key.learned_of", &UserId(270).bytes());
    golden.bytes("key.queue", &QueueId(262).bytes());
    golden.bytes("key.session", &SessionId(263).bytes());
    golden.bytes("key.lock", &StoredKey::bytes(&"lock".to_string()));
    golden.bytes("key.request", &RequestId([5; 16]).bytes());
    golden.bytes("key.ended", &264u64.bytes());
    golden.bytes("key.bucket", &265u32.bytes());
    golden.bytes("key.user", &NameKey::User(UserId(266)).bytes());
    golden.bytes("key.gpu_type", &NameKey::GpuType(GpuTypeId(267)).bytes());
    golden.bytes("key.gpu", &GpuUuid([6; 16]).bytes());
    golden.bytes("key.history", &HistoryKey { bucket: 268, job: JobId(269) }.bytes());
    let tags = [Tag::Meta, Tag::History, Tag::Event].into_iter().chain(super::rows::TAGS.iter().copied());
    tags.for_each(|tag| golden.bytes(&format!("tag.{tag:?}"), &[tag as u8]));
    golden.check();
}

#[test]
fn log_entries_are_encoded_as_they_were() {
    let mut golden = Golden::open("entries");
    let mut seen = BTreeMap::new();
    for body in commands() {
        let count = seen.entry(name(&body)).and_modify(|count| *count += 1).or_insert(1);
        let sample = format!("{}.{count}", name(&body));
        let cmd = Cmd { request: Some(RequestId([0x11; 16])), actor: "ann".into(), body };
        let entry = Entry { level: 1, clock_ms: 1_000, wall_ms: -1, salt: u64::MAX, cmds: vec![cmd] };
        let bytes = codec::encode_entry(&entry);
        assert_eq!(codec::decode_entry(&bytes).as_ref(), Ok(&entry), "{sample}");
        golden.bytes(&sample, &bytes);
    }
    golden.bytes("empty", &codec::encode_entry(&Entry { level: 1, clock_ms: 0, wall_ms: 0, salt: 0, cmds: vec![] }));
    golden.check();
}

/// A new change is named here, and gets a sample below.
fn change_name(change: &Change) -> &'static str {
    match change {
        Change::JobSubmitted { .. } => "job_submitted",
        Change::TaskState { .. } => "task_state",
        Change::Queued { .. } => "queued",
        Change::Dequeued { .. } => "dequeued",
        Change::RetrySet { .. } => "retry_set",
        Change::RetryOver { .. } => "retry_over",
        Change::LeaseShown { .. } => "lease_shown",
        Change::LeaseClosed { .. } => "lease_closed",
        Change::JobFenced { .. } => "job_fenced",
        Change::GpusFenced { .. } => "gpus_fenced",
        Change::ResultCommitted { .. } => "result_committed",
        Change::NodeShown { .. } => "node_shown",
        Change::LockShown { .. } => "lock_shown",
        Change::LockFree { .. } => "lock_free",
    }
}

fn changes() -> Vec<Change> {
    let task = TaskKey { job: JobId(300), index: 1 };
    let place = QueuePlace { tenant: TenantId(1), priority: -1, seq: 2, task };
    let view = |state| TaskView {
        state,
        attempt: 1,
        token: Some(Token(2)),
        ending: Some(VerdictKind::Lost),
        not_before_ms: Some(3),
        holds: Holds { launch: false, orphan: true, user: false, begin: false, after: false, restore: false },
        exit: Some(EXIT),
    };
    let lease = LeaseView {
        task,
        attempt: 1,
        phase: LeasePhase::Go,
        verdict: Some(VerdictKind::Failed),
        master: Some(Master { node: NodeId(1), port: 2 }),
        granted_ms: 3,
        started_ms: Some(4),
        ttl_ms: 5,
        parts: vec![PartView { node: NodeId(1), first_rank: 2, ranks: 3, gpus: vec![GpuUuid([4; 16])] }],
    };
    let shown = [
        ShownState::Pending,
        ShownState::Starting,
        ShownState::Running,
        ShownState::Retrying,
        ShownState::Lost,
        ShownState::Preempted,
        ShownState::Succeeded,
        ShownState::Failed,
        ShownState::TimedOut,
        ShownState::Cancelled,
        ShownState::Skipped,
    ];
    let mut changes: Vec<Change> = shown.map(|state| Change::TaskState { task, state: view(state) }).into();
    changes.extend([
        Change::JobSubmitted { job: JobId(1) },
        Change::Queued { place },
        Change::Dequeued { place },
        Change::RetrySet { task, attempt: 1, not_before_ms: 2 },
        Change::RetryOver { task },
        Change::LeaseShown { token: Token(1), lease: Box::new(lease) },
        Change::LeaseClosed { token: Token(1) },
        Change::JobFenced { task, token: Token(1) },
        Change::GpusFenced { token: Token(1), gpus: vec![GpuUuid([2; 16])] },
        Change::ResultCommitted { task, result: result(TaskOutcome::TimedOut) },
        Change::NodeShown { node: NodeId(1), record: Box::new(node(NodeAdmin::Ready, KillStrength::Weak)) },
        Change::LockShown {
            name: "l".into(),
            holder: Some(Holder { session: SessionId(1), token: Token(2) }),
            waiters: 3,
        },
        Change::LockFree { name: "l".into() },
    ]);
    changes
}

#[test]
fn events_are_encoded_as_they_were() {
    let mut golden = Golden::open("events");
    let mut seen = BTreeMap::new();
    for what in changes() {
        let count = seen.entry(change_name(&what)).and_modify(|count| *count += 1).or_insert(1);
        let sample = format!("{}.{count}", change_name(&what));
        golden.record(&sample, &Event { rev: Revision(1 << 20), sub: 2, clock_ms: 3, wall_ms: -4, what });
    }
    golden.check();
}
