//! The Raft group and the machines, for operators.

use proto::{error, reason, v1};
use statemachine::command::{Command, NodeOut};
use statemachine::record::{GpuHealth, Node, NodeAdmin, Versioned};
use statemachine::{NodeId, State, Token};
use tonic::{Request, Response, Status};

use super::{Api, requests, status, words};
use crate::members::Member;
use crate::replica::Peer;

#[tonic::async_trait]
impl v1::cluster_server::Cluster for Api {
    /// Answers without a quorum: it is what one looks at when there is none.
    async fn status(&self, request: Request<v1::StatusRequest>) -> Result<Response<v1::StatusReply>, Status> {
        self.admit(&request)?;
        let state = self.replica.state();
        let metrics = self.replica.metrics();
        let (leader_id, leader) = metrics.leader.unwrap_or_default();
        Ok(Response::new(v1::StatusReply {
            replica_id: self.replica.id(),
            cluster_id: self.replica.cluster().to_string(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            role: metrics.role.to_owned(),
            term: metrics.term,
            leader_id,
            leader_addr: leader.api_addr,
            last_log_index: metrics.last_log_index,
            committed_index: metrics.committed_index,
            applied_index: state.meta.applied.index,
            snapshot_index: metrics.snapshot_index,
            purged_index: metrics.purged_index,
            image_index: metrics.image_index,
            revision: state.meta.rev.0,
            cluster_clock_ms: state.meta.clock_ms,
            members: shown(metrics.members),
            live_jobs: live_jobs(&state),
            pending_tasks: (state.index.queue.len() + state.index.waiting.len()) as u64,
            leases: state.leases.len() as u64,
            nodes: state.nodes.len() as u64,
            disk_full: metrics.disk_full,
            digest: metrics.digest.map(|digest| format!("{:032x}", digest.value)).unwrap_or_default(),
            digest_index: metrics.digest.map(|digest| digest.index).unwrap_or_default(),
            incarnation: state.meta.incarnation,
            quorum_silent_ms: metrics.quorum_silent_ms.unwrap_or_default(),
            image_refusals: self.replica.door().refused_behind(),
        }))
    }

    async fn add_replica(
        &self,
        request: Request<v1::AddReplicaRequest>,
    ) -> Result<Response<v1::AddReplicaReply>, Status> {
        self.admit_join(&request)?;
        let request = request.into_inner();
        let peer = Peer { peer_addr: request.peer_addr, api_addr: request.api_addr };
        let members = self.replica.add_learner(request.replica_id, peer).await;
        let members = members.map_err(|error| status::membership(self, error))?;
        let cluster_id = self.replica.cluster().to_string();
        Ok(Response::new(v1::AddReplicaReply { cluster_id, members: shown(members) }))
    }

    async fn promote_replica(
        &self,
        request: Request<v1::ReplicaRequest>,
    ) -> Result<Response<v1::ReplicaReply>, Status> {
        self.admit(&request)?;
        let id = request.into_inner().replica_id;
        let members = self.replica.promote(id).await.map_err(|error| status::membership(self, error))?;
        Ok(Response::new(v1::ReplicaReply { members: shown(members) }))
    }

    async fn remove_replica(&self, request: Request<v1::ReplicaRequest>) -> Result<Response<v1::ReplicaReply>, Status> {
        self.admit(&request)?;
        let id = request.into_inner().replica_id;
        let members = self.replica.remove(id).await.map_err(|error| status::membership(self, error))?;
        Ok(Response::new(v1::ReplicaReply { members: shown(members) }))
    }

    async fn transfer_leader(
        &self,
        request: Request<v1::ReplicaRequest>,
    ) -> Result<Response<v1::ReplicaReply>, Status> {
        self.admit(&request)?;
        let to = request.into_inner().replica_id;
        self.replica.transfer((to != 0).then_some(to)).await.map_err(|error| status::membership(self, error))?;
        Ok(Response::new(v1::ReplicaReply { members: shown(self.replica.members()) }))
    }

    async fn list_nodes(&self, request: Request<v1::ListNodesRequest>) -> Result<Response<v1::ListNodesReply>, Status> {
        self.admit(&request)?;
        let mode = request.get_ref().read;
        if mode != v1::ReadMode::Stale as i32 {
            // Who is silent, only the leader knows: a follower would call a dead machine ready.
            self.desk()?;
        }
        let state = self.read(mode).await?;
        let nodes = state.nodes.iter().map(|(id, node)| self.node(&state, *id, node)).collect();
        Ok(Response::new(v1::ListNodesReply { nodes, revision: state.meta.rev.0 }))
    }

    async fn confirm_dead(
        &self,
        request: Request<v1::ConfirmDeadRequest>,
    ) -> Result<Response<v1::ConfirmDeadReply>, Status> {
        self.admit(&request)?;
        let request = request.into_inner();
        let id = requests::request_id(&request.request_id)?;
        let node = self.node_by_name(&request.node)?;
        let token = (request.token != 0).then_some(Token(request.token));
        self.commit(Some(id), "operator".to_owned(), Command::ConfirmDead { node, token }).await?;
        Ok(Response::new(v1::ConfirmDeadReply {}))
    }

    async fn set_node_admin(
        &self,
        request: Request<v1::SetNodeAdminRequest>,
    ) -> Result<Response<v1::SetNodeAdminReply>, Status> {
        self.admit(&request)?;
        let request = request.into_inner();
        let id = requests::request_id(&request.request_id)?;
        let node = self.node_by_name(&request.node)?;
        let evict_in_ms = request.evict_in_ms;
        let reason = request.out_reason;
        let out = (!reason.is_empty()).then_some(NodeOut { reason, evict_in_ms });
        self.commit(Some(id), "operator".to_owned(), Command::NodeAdmin { node, out }).await?;
        Ok(Response::new(v1::SetNodeAdminReply {}))
    }
}

impl Api {
    /// Looked up on the leader, whose state is the newest; NOT_LEADER elsewhere.
    fn node_by_name(&self, name: &str) -> Result<NodeId, Status> {
        self.desk()?;
        self.replica
            .state()
            .index
            .node_by_name
            .get(name)
            .copied()
            .ok_or_else(|| error::refusal(reason::NOT_FOUND, format!("no node is named {name:?}")))
    }

    fn node(&self, state: &State, id: NodeId, node: &Versioned<Node>) -> v1::Node {
        let node = &node.value;
        let desk = self.board.desk();
        let heard_ms_ago = desk.as_ref().and_then(|desk| desk.keeper().heard_ms_ago(id, desk.now_ms()));
        let silent = desk.is_some_and(|desk| desk.unheard(state).contains(&id));
        let (word, reason, evict_ms) = match &node.admin {
            NodeAdmin::Out { reason, evict_ms } => ("OUT", reason.clone(), *evict_ms),
            NodeAdmin::Ready if silent => ("SILENT", "not heard for three heartbeats".to_owned(), None),
            NodeAdmin::Ready => ("READY", String::new(), None),
        };
        let alloc = state.allocs.get(&id).cloned().unwrap_or_default();
        let sum = |cores: &[u16]| cores.iter().map(|cores| u32::from(*cores)).sum::<u32>();
        v1::Node {
            id: id.0,
            name: node.name.clone(),
            address: node.address.clone(),
            epoch: node.epoch,
            version: node.version.clone(),
            state: word.to_owned(),
            reason,
            simulated: node.simulated,
            cores: sum(&node.cores_by_numa),
            cores_free: sum(&alloc.cores_free),
            mem_mib: node.mem_mib,
            mem_free_mib: alloc.mem_free_mib,
            gpus: (0u8..).zip(&node.gpus).map(|(slot, gpu)| view_gpu(state, &alloc, slot, gpu)).collect(),
            kill: words::kill(node.kill).to_owned(),
            cores_by_numa: node.cores_by_numa.iter().map(|cores| u32::from(*cores)).collect(),
            links: state.classes.get(&node.class).map(links),
            heard_ms_ago,
            evict_in_ms: evict_ms.map(|at| at.saturating_sub(state.meta.clock_ms)),
            leases: alloc.leases.len() as u32,
            windows: windows(state, id),
            labels: node.labels.clone().into_iter().collect(),
        }
    }
}

fn windows(state: &State, id: NodeId) -> Vec<v1::NodeWindow> {
    let shown = state.reserved_on(id).map(|(_, window)| v1::NodeWindow {
        reservation: window.name.clone(),
        maintenance: window.is_maintenance(),
        start_unix_ms: window.start_wall_ms,
        end_unix_ms: window.end_wall_ms,
        begun: window.begun.is_some(),
    });
    let mut windows: Vec<v1::NodeWindow> = shown.collect();
    windows.sort_by_key(|window| window.start_unix_ms);
    windows
}

fn shown(members: Vec<Member>) -> Vec<v1::Member> {
    members
        .into_iter()
        .map(|member| v1::Member {
            replica_id: member.id,
            peer_addr: member.peer.peer_addr,
            api_addr: member.peer.api_addr,
            voter: member.voter,
            matched_index: member.matched_index,
        })
        .collect()
}

fn view_gpu(state: &State, alloc: &statemachine::record::Alloc, slot: u8, gpu: &statemachine::record::Gpu) -> v1::Gpu {
    let token = alloc.holders.get(&slot).copied();
    let job = token.and_then(|token| state.leases.get(&token)).map(|lease| lease.value.task.job);
    v1::Gpu {
        slot: u32::from(slot),
        uuid: words::gpu_uuid(gpu),
        r#type: super::view::gpu_type(state, gpu.gpu_type),
        mem_mib: gpu.mem_mib,
        numa: u32::from(gpu.numa),
        health: gpu.health.name().to_owned(),
        reason: if gpu.health == GpuHealth::Ok { String::new() } else { gpu.reason.clone() },
        token: token.unwrap_or_default().0,
        job_id: job.unwrap_or_default().0,
    }
}

fn links(class: &statemachine::record::Class) -> v1::MachineLinks {
    v1::MachineLinks {
        gpus: u32::from(class.gpus),
        nvlinks: class.nvlinks.iter().map(|count| u32::from(*count)).collect(),
        pci: class.pci.iter().map(|class| words::pci_class(*class) as i32).collect(),
        nvlink_mbps_per_link: class.nvlink_mbps_per_link,
        nvswitch: class.nvswitch,
        pcie_mbps: class.pcie_mbps,
        inter_socket_mbps: class.inter_socket_mbps,
        intel_cpu: class.intel_cpu,
        p2p: class.p2p,
        numa: class.numa.iter().map(|domain| u32::from(*domain)).collect(),
        nics: class
            .nics
            .iter()
            .map(|nic| v1::Nic {
                name: nic.name.clone(),
                mbps: nic.mbps,
                class_to_gpu: nic.class_to_gpu.iter().map(|class| words::pci_class(*class) as i32).collect(),
            })
            .collect(),
    }
}

fn live_jobs(state: &State) -> u64 {
    state.tenants.iter().map(|(_, tenant)| tenant.live_jobs).sum()
}
