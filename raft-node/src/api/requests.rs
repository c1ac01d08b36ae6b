//! From the wire to commands: every field is checked here or in apply, and all field errors of a request come at once.

use proto::error::invalid_fields;
use proto::{reason, v1};
use statemachine::command::*;
use statemachine::domain::Topology;
use statemachine::record::{Array, Class, Exit, Nic};
use statemachine::selector::Selector;
use statemachine::spec::{After, Body, JobSpec, Retry, Shape, Terms};
use statemachine::{JobId, NodeId, RequestId, State, Token, is_slice_name};
use tonic::Status;

use super::words;
use crate::leader::keeper::HEARTBEAT_MS;

/// Lease of a job that names none, in ms: a control plane that is away for minutes must not kill a training run.
const DEFAULT_LEASE_TTL_MS: u64 = 300_000;
/// SIGTERM to SIGKILL of a job that names none, in ms.
const DEFAULT_KILL_GRACE_MS: u64 = 5_000;
/// Bytes of a person's display name.
const USER_BYTES: usize = 64;

/// Gathers what is wrong with a request.
#[derive(Default)]
pub(super) struct Fields(Vec<(String, String)>);

impl Fields {
    pub(super) fn refuse(&mut self, field: &str, what: impl Into<String>) {
        self.0.push((field.to_owned(), what.into()));
    }

    /// The value in the narrower type, or a field error and zero.
    fn narrow<T: TryFrom<u32> + Default>(&mut self, field: &str, value: u32, limit: u32) -> T {
        match T::try_from(value) {
            Ok(narrow) if value <= limit => narrow,
            _ => {
                self.refuse(field, format!("{value} is above the limit of {limit}"));
                T::default()
            }
        }
    }

    pub(super) fn done<T>(self, value: T) -> Result<T, Status> {
        if self.0.is_empty() { Ok(value) } else { Err(invalid_fields(&self.0)) }
    }
}

/// The 16 bytes of a mutation's request id.
pub fn request_id(bytes: &[u8]) -> Result<RequestId, Status> {
    bytes.try_into().map(RequestId).map_err(|_| {
        invalid_fields(&[(
            "request_id".to_owned(),
            format!("{} bytes; a request id has 16 (a UUIDv7 that a retry repeats)", bytes.len()),
        )])
    })
}

/// A display name as it is shown; not believed.
pub fn user(name: &str) -> Result<String, Status> {
    if name.len() > USER_BYTES || name.chars().any(char::is_control) {
        let what = format!("{} bytes; at most {USER_BYTES} without control characters", name.len());
        return Err(invalid_fields(&[("user".to_owned(), what)]));
    }
    Ok(if name.is_empty() { "anonymous".to_owned() } else { name.to_owned() })
}

pub fn submit(job: v1::JobSpec) -> Result<SubmitJob, Status> {
    if !job.image.is_empty() {
        return Err(proto::error::refusal(
            reason::NOT_IMPLEMENTED_YET,
            format!("image: {:?}; container images do not exist yet: leave it out and name a command", job.image),
        ));
    }
    let mut fields = Fields::default();
    let body = job.body.unwrap_or_default();
    if body.argv.first().is_none_or(String::is_empty) {
        fields.refuse("body.argv", "empty; name the command to run");
    }
    check_environment(&body.env, &mut fields);
    let shape = job.shape.unwrap_or_default();
    let is_open = shape.nodes == 0 && shape.gpus_per_rank > 0;
    let retry = job.retry.unwrap_or_default();
    let ttl_ms = or_default(job.lease_ttl_ms, DEFAULT_LEASE_TTL_MS);
    let grace_limit_ms = ttl_ms / 4;
    let kill_grace_ms = or_default(job.kill_grace_ms, DEFAULT_KILL_GRACE_MS.min(grace_limit_ms));
    if kill_grace_ms > grace_limit_ms {
        fields.refuse(
            "kill_grace_ms",
            format!("{kill_grace_ms} is above {grace_limit_ms}, a quarter of lease_ttl_ms ({ttl_ms})"),
        );
    }
    let terms = Terms {
        begin_wall_ms: job.begin_unix_ms,
        deadline_wall_ms: job.deadline_unix_ms,
        after: job.after.iter().filter_map(|parent| after(parent, &mut fields)).collect(),
        class: String::new(),
        checkpoint_signal: fields.narrow("checkpoint_signal", job.checkpoint_signal, 31),
        reservation: job.reservation,
        array: job.array.map(|array| Array {
            ranges: array.ranges.iter().map(|range| (range.first, range.last)).collect(),
            throttle: array.throttle,
        }),
        doublings: doublings(&shape, &mut fields),
    };
    let name = if job.name.is_empty() { default_name(&body.argv) } else { job.name };
    let spec = JobSpec {
        name: name.into(),
        priority: job.priority,
        shape: Shape {
            nodes: fields.narrow("shape.nodes", if is_open { 0 } else { shape.nodes.max(1) }, 2_048),
            ranks_per_node: fields.narrow("shape.ranks_per_node", shape.ranks_per_node.max(1), 1_024),
            // What is cut over machines may be as much as these hold together.
            gpus_per_rank: fields.narrow(
                "shape.gpus_per_rank",
                shape.gpus_per_rank,
                if is_open { 65_535 } else { 112 },
            ),
            gpu_types: [].into(),
            mix_types: shape.mix_types,
            cores_per_rank: fields.narrow("shape.cores_per_rank", shape.cores_per_rank, 4_096),
            mem_mib_per_rank: shape.mem_mib_per_rank,
            min_bandwidth_mbps: shape.min_bandwidth_mbps,
            topology: topology(&shape.topology, &mut fields),
            machines: machines(&shape, &mut fields),
        },
        limit_ms: job.limit_ms,
        lease_ttl_ms: ttl_ms,
        kill_grace_ms,
        retry: Retry {
            max: fields.narrow("retry.max", retry.max, 1_000),
            initial_ms: or_default(retry.initial_ms, default_retry().initial_ms),
            mult_milli: if retry.mult_milli == 0 { default_retry().mult_milli } else { retry.mult_milli },
            max_ms: or_default(retry.max_ms, default_retry().max_ms),
            on_exit: retry.on_exit.iter().map(|code| fields.narrow("retry.on_exit", *code, 255)).collect(),
        },
        labels: job.labels.into_iter().collect(),
        terms: (terms != Terms::default()).then(|| Box::new(terms)),
    };
    let gpu_types = shape.gpu_types;
    if gpu_types.len() > 4 {
        fields.refuse("shape.gpu_types", format!("{} types; at most 4", gpu_types.len()));
    }
    if spec.shape.gpus_per_rank == 0 && !gpu_types.is_empty() {
        fields.refuse("shape.gpu_types", "set without GPUs; ask for at least one GPU");
    }
    fields.done(SubmitJob {
        tenant: non_empty(job.tenant, "default"),
        queue: non_empty(job.queue, "default"),
        gpu_types: gpu_types.iter().map(|slug| slug.to_ascii_lowercase()).collect(),
        spec,
        body: Body { argv: body.argv, env: body.env.into_iter().collect(), cwd: body.cwd },
        hold: job.hold,
        priority_class: job.priority_class,
    })
}

fn after(parent: &v1::After, fields: &mut Fields) -> Option<After> {
    let kind = words::parse_after(&parent.kind);
    if kind.is_none() {
        fields.refuse("after", format!("{:?}; afterok, afterany, afternotok or aftercorr", parent.kind));
    }
    kind.map(|kind| After { kind, job: JobId(parent.job_id) })
}

/// From the least that it takes to the most.
fn doublings(shape: &v1::Shape, fields: &mut Fields) -> u8 {
    let (least, most) = (shape.gpus_per_rank, shape.most_gpus_per_rank);
    if most == 0 {
        return 0;
    }
    let reached = (0u8..16).find(|times| u64::from(least) << times == u64::from(most));
    let what = match reached {
        Some(_) if shape.nodes != 0 => {
            format!("{most} beside shape.nodes {}; leave the nodes open, or it out", shape.nodes)
        }
        Some(times) if least > 0 => return times,
        _ => format!("{most} is not shape.gpus_per_rank, {least}, doubled some times over"),
    };
    fields.refuse("shape.most_gpus_per_rank", what);
    0
}

/// Empty = none.
fn topology(text: &str, fields: &mut Fields) -> Option<Topology> {
    if text.is_empty() {
        return None;
    }
    text.parse().map_err(|what: String| fields.refuse("shape.topology", what)).ok()
}

/// Nothing said = any machine.
fn machines(shape: &v1::Shape, fields: &mut Fields) -> Option<Box<Selector>> {
    let constraint = shape.constraint.parse().map_err(|what: String| fields.refuse("shape.constraint", what));
    let selector = Selector {
        constraint: constraint.unwrap_or_default(),
        only: shape.nodelist.iter().cloned().collect(),
        without: shape.exclude.iter().cloned().collect(),
    };
    (!selector.is_empty()).then(|| Box::new(selector))
}

fn check_environment(env: &std::collections::HashMap<String, String>, fields: &mut Fields) {
    for (key, value) in env {
        if key.is_empty() || key.contains(['=', '\0']) || value.contains('\0') {
            fields.refuse("body.env", format!("{key:?} is no variable name, or its value holds a NUL byte"));
        }
    }
}

/// The command's file name.
fn default_name(argv: &[String]) -> String {
    let command = argv.first().map(String::as_str).unwrap_or_default();
    let name = command.rsplit('/').next().unwrap_or_default();
    let mut end = name.len().min(64);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    non_empty(name[..end].to_owned(), "job")
}

fn or_default(value: u64, default: u64) -> u64 {
    if value == 0 { default } else { value }
}

fn non_empty(text: String, default: &str) -> String {
    if text.is_empty() { default.to_owned() } else { text }
}

pub fn register(request: v1::RegisterRequest) -> Result<RegisterNode, Status> {
    let mut fields = Fields::default();
    let machine = request.machine.unwrap_or_default();
    if machine.name.is_empty() || machine.name.len() > 128 || machine.name.contains(['/', '\0', ' ']) {
        fields.refuse("machine.name", format!("{:?}; 1 to 128 bytes without slash or space", machine.name));
    }
    let id = |bytes: &[u8], field: &str, fields: &mut Fields| {
        <[u8; 16]>::try_from(bytes).unwrap_or_else(|_| {
            fields.refuse(field, format!("{} bytes; it has 16", bytes.len()));
            [0; 16]
        })
    };
    let machine_id = id(&machine.machine_id, "machine.machine_id", &mut fields);
    let boot_id = id(&machine.boot_id, "machine.boot_id", &mut fields);
    let gpus: Vec<GpuFacts> = machine.gpus.iter().map(|gpu| gpu_facts(gpu, &mut fields)).collect();
    let class = class(machine.links.unwrap_or_default(), gpus.len(), &mut fields);
    let cores_by_numa: Vec<u16> =
        machine.cores_by_numa.iter().map(|cores| fields.narrow("machine.cores_by_numa", *cores, 65_535)).collect();
    if cores_by_numa.is_empty() || cores_by_numa.len() > 64 {
        fields.refuse("machine.cores_by_numa", format!("{} NUMA nodes; 1 to 64", cores_by_numa.len()));
    }
    let kill = words::parse_kill(&machine.kill).unwrap_or_else(|| {
        fields.refuse("machine.kill", format!("{:?}; pidns, cgroup or weak", machine.kill));
        statemachine::record::KillStrength::Weak
    });
    let running = request.running.iter().map(|part| running(part, &mut fields)).collect();
    let finished = request
        .finished
        .iter()
        .map(|part| FinishedPart {
            token: Token(part.token),
            exits: part.exits.iter().map(|exit| rank_exit(exit, &mut fields)).collect(),
        })
        .collect();
    fields.done(RegisterNode {
        name: machine.name,
        address: machine.address,
        host: machine.host,
        machine_id,
        boot_id,
        version: machine.version,
        class,
        cores_by_numa,
        mem_mib: machine.mem_mib,
        gpus,
        simulated: machine.simulated,
        kill,
        labels: machine.labels.into_iter().collect(),
        max_token: Token(request.max_token),
        fence_new: request.fence_new,
        running,
        finished,
        dead: request.dead.into_iter().map(Token).collect(),
        after_epoch: request.after_epoch,
    })
}

/// The answer to a registration that another one of its node has overtaken, as the state knows it; `None`: it may be proposed.
pub fn overtaken(state: &State, register: &RegisterNode) -> Option<v1::RegisterReply> {
    let epoch = state.node_epoch(&register.name);
    (epoch != register.after_epoch).then(|| registered(state, NodeId(0), epoch))
}

/// The answer to a registration; node 0 = it was overtaken.
pub fn registered(state: &State, node: NodeId, epoch: u64) -> v1::RegisterReply {
    v1::RegisterReply {
        node_id: node.0,
        epoch,
        cluster_id: words::hex(&state.meta.cluster),
        heartbeat_ms: HEARTBEAT_MS,
        incarnation: state.meta.incarnation,
    }
}

fn gpu_facts(gpu: &v1::GpuFacts, fields: &mut Fields) -> GpuFacts {
    let uuid = words::parse_gpu_uuid(&gpu.uuid).unwrap_or_else(|| {
        fields.refuse("machine.gpus.uuid", format!("{:?}; GPU- or MIG- and 32 hex digits", gpu.uuid));
        Default::default()
    });
    if gpu.uuid.starts_with("MIG-") != is_slice_name(&gpu.r#type.to_ascii_lowercase()) {
        let wanted = "the type of a slice, MIG-, and of no other GPU ends with its profile, as a100-1g.5gb";
        fields.refuse("machine.gpus.type", format!("{:?} of {}; {wanted}", gpu.r#type, gpu.uuid));
    }
    GpuFacts {
        uuid,
        gpu_type: gpu.r#type.to_ascii_lowercase(),
        mem_mib: gpu.mem_mib,
        numa: fields.narrow("machine.gpus.numa", gpu.numa, 63),
        health: health(&gpu.health, fields),
        reason: gpu.reason.clone(),
    }
}

fn health(word: &str, fields: &mut Fields) -> statemachine::record::GpuHealth {
    statemachine::record::GpuHealth::parse(if word.is_empty() { "OK" } else { word }).unwrap_or_else(|| {
        fields.refuse("health", format!("{word:?} is no health"));
        statemachine::record::GpuHealth::Ok
    })
}

fn class(links: v1::MachineLinks, gpus: usize, fields: &mut Fields) -> Class {
    let pairs = gpus * gpus;
    if gpus > 128 || links.gpus as usize != gpus || links.nvlinks.len() != pairs || links.pci.len() != pairs {
        fields.refuse(
            "machine.links",
            format!(
                "for {gpus} GPUs: gpus {}, {} NVLink counts, {} PCIe classes; it takes {gpus}, {pairs} and {pairs}",
                links.gpus,
                links.nvlinks.len(),
                links.pci.len()
            ),
        );
    }
    let mut pci = |numbers: &[i32]| -> Vec<_> {
        numbers
            .iter()
            .map(|number| {
                words::parse_pci_class(*number).unwrap_or_else(|| {
                    fields.refuse("machine.links.pci", format!("{number} is no PCIe class"));
                    Default::default()
                })
            })
            .collect()
    };
    let matrix = pci(&links.pci);
    let nics = links
        .nics
        .iter()
        .map(|nic| Nic { name: nic.name.clone(), mbps: nic.mbps, class_to_gpu: pci(&nic.class_to_gpu) })
        .collect();
    Class {
        gpus: gpus.min(128) as u8,
        nvlinks: links.nvlinks.iter().map(|count| fields.narrow("machine.links.nvlinks", *count, 255)).collect(),
        pci: matrix,
        nvlink_mbps_per_link: links.nvlink_mbps_per_link,
        nvswitch: links.nvswitch,
        pcie_mbps: links.pcie_mbps,
        inter_socket_mbps: links.inter_socket_mbps,
        intel_cpu: links.intel_cpu,
        p2p: links.p2p,
        numa: links.numa.iter().map(|domain| fields.narrow("machine.links.numa", *domain, 255)).collect(),
        nics,
    }
}

fn running(part: &v1::RunningPart, fields: &mut Fields) -> RunningPart {
    let gpus = part.gpu_uuids.iter().filter_map(|text| {
        let uuid = words::parse_gpu_uuid(text);
        if uuid.is_none() {
            fields.refuse("running.gpu_uuids", format!("{text:?}; GPU- or MIG- and 32 hex digits"));
        }
        uuid
    });
    RunningPart { token: Token(part.token), job: JobId(part.job_id), gpus: gpus.collect(), started: part.started }
}

fn rank_exit(exit: &v1::RankExit, fields: &mut Fields) -> ReportExit {
    let cause = words::parse_cause(&exit.cause).unwrap_or_else(|| {
        fields.refuse("exits.cause", format!("{:?} is no cause", exit.cause));
        statemachine::record::ExitCause::Own
    });
    let how = exit.exit.unwrap_or_default();
    let signal = fields.narrow("exits.exit.signal", how.signal, 127);
    ReportExit { rank: exit.rank, exit: Exit { code: how.code, signal }, cause }
}

pub fn report(request: v1::ReportRequest) -> Result<Report, Status> {
    let mut fields = Fields::default();
    let items = request.items.into_iter().filter_map(|item| report_item(item, &mut fields)).collect();
    fields.done(Report { node: NodeId(request.node_id), epoch: request.epoch, items })
}

fn report_item(item: v1::ReportItem, fields: &mut Fields) -> Option<ReportItem> {
    use v1::report_item::What;
    let Some(what) = item.what else {
        fields.refuse("items.what", "empty; say what happened");
        return None;
    };
    let what = match what {
        What::Prepared(prepared) => {
            PartReport::Prepared { port: fields.narrow("prepared.port", prepared.port, 65_535) }
        }
        What::Started(started) => PartReport::Started { port: fields.narrow("started.port", started.port, 65_535) },
        What::Exited(exited) => PartReport::Exited {
            exits: exited.exits.iter().map(|exit| rank_exit(exit, fields)).collect(),
            released: exited.released,
        },
        What::Released(_) => PartReport::Released,
        What::LaunchFailed(failed) => PartReport::LaunchFailed {
            fault: if failed.node_fault { LaunchFault::Node } else { LaunchFault::Job },
            why: failed.why.chars().take(512).collect(),
        },
    };
    Some(ReportItem { token: Token(item.token), what })
}

/// One command per fact: each is decided on its own.
pub fn health_facts(request: v1::ReportHealthRequest) -> Result<Vec<Command>, Status> {
    let mut fields = Fields::default();
    let (node, epoch) = (NodeId(request.node_id), request.epoch);
    let commands = request
        .facts
        .into_iter()
        .map(|fact| {
            Command::GpuHealth(GpuHealthChange {
                node,
                epoch,
                slot: fields.narrow("facts.slot", fact.slot, 127),
                health: health(&fact.health, &mut fields),
                xid: fields.narrow("facts.xid", fact.xid, 65_535),
                reason: fact.reason.chars().take(256).collect(),
                end_lease: fact.end_lease,
            })
        })
        .collect();
    fields.done(commands)
}
