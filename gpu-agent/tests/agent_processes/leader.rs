//! A leader as an agent sees it, driven by the test: it registers, acknowledges, hands out desired sets and bodies, and
//! keeps what it was told.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use futures::Stream;
use proto::v1::agents_server::{Agents, AgentsServer};
use proto::v1::report_item::What;
use proto::v1::{self, leader_message};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming};

pub const CLUSTER: &str = "00112233445566778899aabbccddeeff";
const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Default)]
pub struct State {
    pub registrations: Vec<v1::RegisterRequest>,
    pub reports: Vec<v1::ReportItem>,
    pub health: Vec<v1::GpuHealthFact>,
    pub heartbeats: u64,
    pub muted: bool,
    pub supersede: bool,
    bodies: BTreeMap<u64, v1::JobBody>,
    leases: BTreeMap<String, Vec<v1::DesiredLease>>,
    nodes: Vec<(Vec<u8>, String)>,
    epochs: u64,
    index: u64,
}

#[derive(Clone)]
pub struct Leader {
    pub addr: String,
    state: Arc<Mutex<State>>,
    changed: watch::Sender<u64>,
}

impl Leader {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap().to_string();
        let leader = Self { addr, state: Arc::default(), changed: watch::channel(0).0 };
        let service = AgentsServer::new(leader.clone());
        let serving = tonic::transport::Server::builder().add_service(service);
        tokio::spawn(serving.serve_with_incoming(TcpListenerStream::new(listener)));
        leader
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Grants a lease on a node of this name, with its job's command.
    pub fn grant(&self, node: &str, lease: v1::DesiredLease, argv: &[&str]) {
        let mut state = self.state();
        let body = v1::JobBody {
            job_id: lease.job_id,
            argv: argv.iter().map(|arg| (*arg).to_owned()).collect(),
            ..Default::default()
        };
        state.bodies.entry(lease.job_id).or_insert(body);
        state.leases.entry(node.to_owned()).or_default().push(lease);
        self.publish(state);
    }

    pub fn set_body(&self, body: v1::JobBody) {
        self.state().bodies.insert(body.job_id, body);
    }

    pub fn change(&self, node: &str, change: impl FnOnce(&mut Vec<v1::DesiredLease>)) {
        let mut state = self.state();
        change(state.leases.entry(node.to_owned()).or_default());
        self.publish(state);
    }

    fn publish(&self, mut state: MutexGuard<'_, State>) {
        state.index += 1;
        let index = state.index;
        drop(state);
        self.changed.send_replace(index);
    }

    /// Waits until the state answers.
    pub async fn until<T>(&self, what: &str, look: impl Fn(&State) -> Option<T>) -> T {
        let began = Instant::now();
        loop {
            if let Some(found) = look(&self.state()) {
                return found;
            }
            assert!(began.elapsed() < PATIENCE, "waited in vain for {what}; told: {:#?}", self.state().reports);
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    pub async fn registered(&self, count: usize) -> v1::RegisterRequest {
        self.until("a registration", |state| state.registrations.get(count - 1).cloned()).await
    }

    pub async fn started(&self, token: u64) -> u32 {
        self.until("Started", |state| {
            said(state, token).find_map(|what| match what {
                What::Started(started) => Some(started.port),
                _ => None,
            })
        })
        .await
    }

    /// The exits of all ranks of one part, once it is released.
    pub async fn exits(&self, token: u64) -> Vec<v1::RankExit> {
        self.until("Exited and released", |state| {
            let released = said(state, token).any(|what| matches!(what, What::Exited(exited) if exited.released));
            released.then(|| {
                said(state, token)
                    .flat_map(|what| match what {
                        What::Exited(exited) => exited.exits.clone(),
                        _ => Vec::new(),
                    })
                    .collect()
            })
        })
        .await
    }

    pub async fn failure(&self, token: u64) -> v1::LaunchFailed {
        self.until("LaunchFailed", |state| {
            said(state, token).find_map(|what| match what {
                What::LaunchFailed(failed) => Some(failed.clone()),
                _ => None,
            })
        })
        .await
    }
}

pub fn said(state: &State, token: u64) -> impl Iterator<Item = &What> {
    state.reports.iter().filter(move |item| item.token == token).filter_map(|item| item.what.as_ref())
}

/// A lease of one rank on one node.
pub fn lease(token: u64) -> v1::DesiredLease {
    v1::DesiredLease {
        token,
        job_id: token,
        attempt: 1,
        ranks: 1,
        world_size: 1,
        nodes: 1,
        ttl_ms: 30_000,
        kill_grace_ms: 2_000,
        go: true,
        ..Default::default()
    }
}

type Down = Pin<Box<dyn Stream<Item = Result<v1::LeaderMessage, Status>> + Send>>;

#[tonic::async_trait]
impl Agents for Leader {
    type SessionStream = Down;

    async fn register(&self, request: Request<v1::RegisterRequest>) -> Result<Response<v1::RegisterReply>, Status> {
        let request = request.into_inner();
        let machine = request.machine.clone().unwrap_or_default();
        let mut state = self.state();
        state.epochs += 1;
        let id = machine.machine_id.to_vec();
        let known = state.nodes.iter().position(|(known, _)| *known == id);
        let at = known.unwrap_or_else(|| {
            state.nodes.push((id, machine.name.clone()));
            state.nodes.len() - 1
        });
        let reply = v1::RegisterReply {
            node_id: at as u32 + 1,
            epoch: state.epochs,
            cluster_id: CLUSTER.into(),
            heartbeat_ms: 200,
            incarnation: 1,
        };
        state.registrations.push(request);
        Ok(Response::new(reply))
    }

    async fn session(&self, request: Request<Streaming<v1::AgentMessage>>) -> Result<Response<Down>, Status> {
        let mut up = request.into_inner();
        let (down, stream) = mpsc::channel(64);
        let leader = self.clone();
        let mut changed = self.changed.subscribe();
        tokio::spawn(async move {
            let mut who: Option<(String, u64)> = None;
            loop {
                tokio::select! {
                    message = up.message() => {
                        let Ok(Some(message)) = message else { return };
                        let first = who.is_none();
                        who = leader.answer(&message, &down).await;
                        if first { leader.send_desired(&who, &down).await; }
                    }
                    _ = changed.changed() => leader.send_desired(&who, &down).await,
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn report(&self, request: Request<v1::ReportRequest>) -> Result<Response<v1::ReportReply>, Status> {
        let items = request.into_inner().items;
        let refusals = vec![String::new(); items.len()];
        self.state().reports.extend(items);
        Ok(Response::new(v1::ReportReply { refusals }))
    }

    async fn report_health(
        &self,
        request: Request<v1::ReportHealthRequest>,
    ) -> Result<Response<v1::ReportHealthReply>, Status> {
        self.state().health.extend(request.into_inner().facts);
        Ok(Response::new(v1::ReportHealthReply {}))
    }

    async fn fetch_bodies(
        &self,
        request: Request<v1::FetchBodiesRequest>,
    ) -> Result<Response<v1::FetchBodiesReply>, Status> {
        let state = self.state();
        let bodies = request.into_inner().job_ids.iter().filter_map(|job| state.bodies.get(job).cloned()).collect();
        Ok(Response::new(v1::FetchBodiesReply { bodies }))
    }
}

type DownSender = mpsc::Sender<Result<v1::LeaderMessage, Status>>;

impl Leader {
    /// Acknowledges one heartbeat, naming all leases of the node.
    async fn answer(&self, message: &v1::AgentMessage, down: &DownSender) -> Option<(String, u64)> {
        let (name, reply) = {
            let mut state = self.state();
            let (_, name) = state.nodes.get(message.node_id as usize - 1)?.clone();
            state.heartbeats += 1;
            let tokens = state.leases.get(&name).into_iter().flatten().map(|lease| lease.token).collect();
            let what = if state.supersede {
                leader_message::What::Reregister(v1::Reregister { reason: "another one came".into(), superseded: true })
            } else {
                leader_message::What::Ack(v1::HeartbeatAck {
                    epoch: message.epoch,
                    heartbeat: message.heartbeat,
                    tokens,
                    incarnation: 1,
                })
            };
            (name, (!state.muted).then_some(what))
        };
        if let Some(what) = reply {
            let _ = down.send(Ok(v1::LeaderMessage { what: Some(what) })).await;
        }
        Some((name, message.epoch))
    }

    async fn send_desired(&self, who: &Option<(String, u64)>, down: &DownSender) {
        let Some((name, epoch)) = who else { return };
        let set = {
            let state = self.state();
            v1::Desired {
                cluster_id: CLUSTER.into(),
                incarnation: 1,
                epoch: *epoch,
                index: state.index,
                leases: state.leases.get(name).cloned().unwrap_or_default(),
            }
        };
        let what = Some(leader_message::What::Desired(set));
        let _ = down.send(Ok(v1::LeaderMessage { what })).await;
    }
}
