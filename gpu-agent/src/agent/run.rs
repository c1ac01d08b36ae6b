//! The shell around the pure core: one loop that turns its actions into IO, and what comes back into events.

use std::collections::BTreeMap;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, mpsc as blocking};
use std::time::Duration;

use proto::client::{Client, Identity as Caller};
use proto::v1;
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::Server;

use super::attach::{Site, attach_all, look_again};
use super::attempts::Attempts;
use super::core::{Action, Core, Event, Listing};
use super::cores::Cores;
use super::fence::{Fence, Found};
use super::health;
use super::identity::{Identity, hex};
use super::inventory;
use super::launcher::{Launcher, Order, Setup};
use super::logs::Logs;
use super::machine::{self, Machine};
use super::ports::Ports;
use super::session::{PATIENCE, Session, Told, is_final};
use super::shims::Shims;
use super::{Error, Left, Options, environment, rights};
use crate::clock::boot_ms;
use crate::discovery::GpuBackend;
use crate::shim::record::Containment;

/// Messages of a session that wait for the loop.
const INBOX: usize = 64;
/// Between two tries to report the state of GPUs.
const HEALTH_RETRY: Duration = Duration::from_secs(1);
/// How long a leaving agent waits for its fence file.
const FINISH: Duration = Duration::from_secs(5);

/// Runs an agent until `stop` resolves, or another one takes its place. Jobs outlive it. Call it within a multi-threaded
/// tokio runtime.
pub async fn run(options: Options, stop: impl Future<Output = ()>) -> Result<Left, Error> {
    let mut agent = Agent::start(options).await?;
    tokio::pin!(stop);
    loop {
        let now = boot_ms();
        let wait = Duration::from_millis(agent.core.next_wake(now).saturating_sub(now));
        let event = tokio::select! {
            () = &mut stop => {
                agent.finish().await;
                return Ok(Left::Stopped);
            }
            Some(event) = agent.inbox.recv() => Some(event),
            Some((generation, told)) = agent.from_session.recv() => agent.heard(generation, told),
            () = agent.gpu_signal.notified() => {
                agent.take_health();
                None
            }
            Some(facts) = agent.health_back.recv() => {
                // Not answered: told again at once, with the epoch as it is now.
                agent.sick.extend(facts);
                agent.report_health();
                None
            }
            Some(error) = agent.refused.recv() => return Err(Error::Refused(error)),
            () = tokio::time::sleep(wait) => Some(Event::Tick),
        };
        let Some(event) = event else { continue };
        agent.note(&event)?;
        for action in agent.core.step(event, boot_ms()) {
            if let Some(left) = agent.act(action)? {
                agent.finish().await;
                return Ok(left);
            }
        }
    }
}

struct Agent {
    options: Options,
    identity: Identity,
    core: Core,
    client: Client,
    facts: v1::MachineFacts,
    fence_new: bool,
    /// Highest token ever taken up here.
    max_token: u64,
    shims: Shims,
    ports: Arc<Mutex<Ports>>,
    orders: blocking::Sender<Order>,
    events: mpsc::UnboundedSender<Event>,
    inbox: mpsc::UnboundedReceiver<Event>,
    told: mpsc::Sender<(u64, Told)>,
    from_session: mpsc::Receiver<(u64, Told)>,
    refusals: mpsc::Sender<proto::Error>,
    refused: mpsc::Receiver<proto::Error>,
    session: Option<Session>,
    generation: u64,
    /// For the log service.
    cluster: Arc<Mutex<String>>,
    backend: Arc<dyn GpuBackend>,
    gpu_signal: Arc<Notify>,
    /// What was seen of GPUs and not reported yet.
    sick: Vec<v1::GpuHealthFact>,
    health_told: mpsc::UnboundedSender<Vec<v1::GpuHealthFact>>,
    health_back: mpsc::UnboundedReceiver<Vec<v1::GpuHealthFact>>,
    looks: JoinHandle<()>,
}

impl Agent {
    async fn start(options: Options) -> Result<Self, Error> {
        if !options.listen.ip().is_loopback() {
            if !options.insecure {
                return Err(Error::Exposed(options.listen));
            }
            tracing::warn!(listen = %options.listen, "--insecure: whoever reaches this address can read the jobs' output");
        }
        let identity = Identity::open(&options.dir)?;
        identity.check_cluster(&options.cluster)?;
        let name = options.name.clone().unwrap_or_else(host_name);
        let (machine, backend) = machine::discover(options.gpus.as_deref(), &name, &identity).await?;
        tracing::info!(source = %machine.source, gpus = machine.gpus.len(), "machine");
        for note in &machine.notes {
            tracing::warn!("{note}");
        }
        let (user, refusal) = rights::of_jobs(&options)?;
        if let Some(why) = &refusal {
            tracing::warn!("{why}");
        }
        let containment = rights::containment(&options, &identity);
        say_containment(&containment);

        let boot = hex(&identity.boot);
        let (mut fence, found) = Fence::open(&identity.dir, &boot, identity.fresh).map_err(Error::io("fence file"))?;
        let attempts = Attempts::open(&identity.dir).map_err(Error::io("attempts' directory"))?;
        let cluster = Arc::new(Mutex::new(identity.cluster()));
        let address = serve_logs(&options, attempts.clone(), cluster.clone()).await?;
        let host = options.advertise.clone().unwrap_or_else(|| match options.listen.ip() {
            // Every address of the machine is no address to reach it by.
            ip if ip.is_unspecified() => host_name(),
            ip => ip.to_string(),
        });

        let (events, inbox) = mpsc::unbounded_channel();
        let (told, from_session) = mpsc::channel(INBOX);
        let (refusals, refused) = mpsc::channel(1);
        let (health_told, health_back) = mpsc::unbounded_channel();
        let shims = Shims::new(events.clone());
        let mut core = Core::new((fence.content.incarnation, fence.content.index));
        let mut cores = Cores::new(machine.cpus_by_numa.clone());
        let site = Site { attempts: attempts.clone(), shims: shims.clone(), boot: boot.clone(), found };
        let sum = attach_all(&site, &mut fence, &mut cores, &mut core).map_err(Error::io("attempts"))?;
        if sum.all > 0 {
            tracing::info!(running = sum.running, all = sum.all, "attempts found");
        }
        for (token, live) in sum.left_alone {
            look_again(site.clone(), token, live, events.clone());
        }

        let facts = v1::MachineFacts {
            address: format!("{host}:{}", address.port()),
            host: host.clone(),
            machine_id: identity.machine.to_vec().into(),
            boot_id: identity.boot.to_vec().into(),
            kill: containment.word().to_owned(),
            labels: options.labels.clone().into_iter().collect(),
            ..registration(&machine, &name)
        };
        let asked = if options.cluster.is_empty() { identity.cluster() } else { options.cluster.clone() };
        let caller = Caller::new(&asked, &options.join_token).map_err(Error::Refused)?;
        let ports = Arc::new(Mutex::new(Ports::new(options.ports.clone())));
        let max_token = fence.content.max_token;
        let setup = Setup {
            node_name: name,
            host,
            servers: options.servers.join(","),
            cluster: options.cluster.clone(),
            boot,
            user,
            refusal,
            shim: options.shim.clone(),
            containment,
            numa_of_gpu: machine.numa_of_gpu(),
            keep: options.keep_attempts,
        };
        let launcher = Launcher {
            setup,
            fence,
            attempts,
            shims: shims.clone(),
            cores,
            ports: ports.clone(),
            events: events.clone(),
            runtime: Handle::current(),
            ports_of: BTreeMap::new(),
        };
        let (orders, queue) = blocking::channel();
        std::thread::Builder::new()
            .name("launcher".into())
            .spawn(move || launcher.run(queue))
            .map_err(Error::io("launcher"))?;
        let client = Client::new(options.servers.clone(), caller).with_patience(PATIENCE);
        let registered: Vec<String> = facts.gpus.iter().map(|gpu| gpu.uuid.clone()).collect();
        let looks = tokio::spawn(inventory::watch(Arc::clone(&backend), registered.into_iter(), inventory::EVERY));
        let _ = events.send(Event::Tick);
        Ok(Self {
            fence_new: found == Found::Damaged,
            options,
            identity,
            core,
            client,
            facts,
            max_token,
            shims,
            ports,
            orders,
            events,
            inbox,
            told,
            from_session,
            refusals,
            refused,
            session: None,
            generation: 0,
            cluster,
            gpu_signal: backend.health_signal(),
            backend,
            sick: Vec::new(),
            health_told,
            health_back,
            looks,
        })
    }

    /// What the shell itself keeps of an event.
    fn note(&mut self, event: &Event) -> Result<(), Error> {
        match event {
            Event::Registered(reply) => {
                self.identity.join(&reply.cluster_id)?;
                self.cluster.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone_from(&reply.cluster_id);
                if self.core.cluster_id().is_empty() {
                    // From now on every call names the cluster.
                    let caller = Caller::new(&reply.cluster_id, &self.options.join_token).map_err(Error::Refused)?;
                    self.client = Client::new(self.options.servers.clone(), caller).with_patience(PATIENCE);
                }
                tracing::info!(node = reply.node_id, epoch = reply.epoch, name = %self.facts.name, "registered");
            }
            Event::Launched { token, ranks, .. } => tracing::debug!(token, ?ranks, "launched"),
            _ => {}
        }
        Ok(())
    }

    /// A session's word; an older one's counts no more.
    fn heard(&mut self, generation: u64, told: Told) -> Option<Event> {
        let session = self.session.as_mut().filter(|session| session.generation == generation)?;
        Some(match told {
            Told::Opened(outbox) => {
                session.outbox = Some(outbox);
                Event::Connected
            }
            Told::Message(message) => Event::FromLeader(message),
            Told::Closed => {
                session.outbox = None;
                Event::Disconnected
            }
        })
    }

    fn act(&mut self, action: Action) -> Result<Option<Left>, Error> {
        match action {
            Action::Register(listing) => self.register(listing),
            Action::Connect => {
                self.generation += 1;
                let hello = self.message(0, Vec::new());
                self.session = Some(Session::open(&self.client, hello, self.generation, self.told.clone()));
            }
            Action::Heartbeat { number, tokens } => {
                let message = self.message(number, tokens);
                if let Some(outbox) = self.session.as_ref().and_then(|session| session.outbox.as_ref()) {
                    // No room: not sent, not acknowledged; the core sees the silence.
                    let _ = outbox.try_send(message);
                }
            }
            Action::Fetch(job_ids) => self.fetch(job_ids),
            Action::Launch { set, launches } => {
                let newest = launches.iter().map(|launch| launch.lease.token).max();
                self.max_token = self.max_token.max(newest.unwrap_or(0));
                if let Err(blocking::SendError(Order::Launch { launches, .. })) =
                    self.orders.send(Order::Launch { set, launches })
                {
                    return Err(Error::Launcher(launches.len()));
                }
            }
            Action::Extend { token, deadline } => self.shims.extend(token, deadline),
            Action::Open { token, master_addr, master_port } => {
                self.ports.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).free(token);
                self.shims.open(token, &environment::master(&master_addr, master_port));
            }
            Action::Stop { token, signal, grace_ms } => self.shims.stop(token, signal, grace_ms),
            Action::Report(items) => self.report(items),
            Action::Forget(tokens) => {
                let _ = self.orders.send(Order::Forget(tokens));
            }
            Action::Leave(why) => return Ok(Some(Left::Superseded(why))),
        }
        Ok(None)
    }

    fn message(&self, heartbeat: u64, tokens: Vec<u64>) -> v1::AgentMessage {
        v1::AgentMessage {
            node_id: self.core.node_id(),
            epoch: self.core.epoch(),
            heartbeat,
            cluster_id: self.core.cluster_id().to_owned(),
            tokens,
            desired_index: self.core.seen_index(),
        }
    }

    fn register(&mut self, listing: Listing) {
        let request = v1::RegisterRequest {
            machine: Some(self.facts.clone()),
            max_token: self.max_token,
            fence_new: self.fence_new,
            running: listing.running,
            finished: listing.finished,
            dead: listing.dead,
            after_epoch: listing.after_epoch,
        };
        let (client, events, refusals) = (self.client.clone(), self.events.clone(), self.refusals.clone());
        let first = self.core.epoch() == 0;
        tokio::spawn(async move {
            let event = match client.register(request).await {
                Ok(reply) if reply.node_id == 0 => Event::Overtaken { epoch: reply.epoch },
                Ok(reply) => Event::Registered(reply),
                Err(error) if first && is_final(&error) => {
                    let _ = refusals.send(error).await;
                    return;
                }
                Err(error) => {
                    tracing::warn!(%error, "not registered");
                    Event::RegisterFailed
                }
            };
            let _ = events.send(event);
        });
    }

    fn report(&self, items: Vec<v1::ReportItem>) {
        let request = v1::ReportRequest { node_id: self.core.node_id(), epoch: self.core.epoch(), items };
        let (client, events) = (self.client.clone(), self.events.clone());
        tokio::spawn(async move {
            let event = match client.report(request).await {
                Ok(reply) => Event::Reported(reply.refusals),
                Err(error) => {
                    tracing::warn!(%error, "a report was not answered");
                    Event::ReportFailed { stale_epoch: error.reason() == proto::reason::EPOCH_STALE.name }
                }
            };
            let _ = events.send(event);
        });
    }

    fn fetch(&self, job_ids: Vec<u64>) {
        let (client, events) = (self.client.clone(), self.events.clone());
        tokio::spawn(async move {
            let event = match client.fetch_bodies(v1::FetchBodiesRequest { job_ids }).await {
                Ok(reply) => Event::Bodies(reply.bodies),
                Err(error) => {
                    tracing::warn!(%error, "bodies of jobs were not fetched");
                    Event::BodiesFailed
                }
            };
            let _ = events.send(event);
        });
    }

    /// What the driver told since the last time.
    fn take_health(&mut self) {
        for event in self.backend.drain_health() {
            tracing::warn!(gpu = %event.gpu_uuid, what = ?event.what, meaning = event.judgement.meaning, "GPU");
            let facts = health::facts(&event, &self.facts.gpus);
            health::remember(&mut self.facts.gpus, &facts);
            self.sick.extend(facts);
        }
        self.report_health();
    }

    /// Before the first registration nothing is told: it carries the GPUs' state itself.
    fn report_health(&mut self) {
        if self.sick.is_empty() || self.core.epoch() == 0 {
            self.sick.clear();
            return;
        }
        let facts = std::mem::take(&mut self.sick);
        let (node_id, epoch) = (self.core.node_id(), self.core.epoch());
        let (client, back) = (self.client.clone(), self.health_told.clone());
        tokio::spawn(async move {
            let request = v1::ReportHealthRequest { node_id, epoch, facts: facts.clone() };
            match client.report_health(request).await {
                Ok(_) => {}
                Err(proto::Error::Refused { reason, message, .. }) if reason != proto::reason::EPOCH_STALE.name => {
                    tracing::warn!(reason, message, "the state of GPUs was refused");
                }
                Err(error) => {
                    tracing::warn!(%error, "the state of GPUs was not reported");
                    tokio::time::sleep(HEALTH_RETRY).await;
                    let _ = back.send(facts);
                }
            }
        });
    }

    async fn finish(&mut self) {
        self.looks.abort();
        self.session = None;
        let (done, finished) = blocking::channel();
        if self.orders.send(Order::Finish(done)).is_ok() {
            let _ = tokio::task::spawn_blocking(move || finished.recv_timeout(FINISH)).await;
        }
    }
}

async fn serve_logs(options: &Options, attempts: Attempts, cluster: Arc<Mutex<String>>) -> Result<SocketAddr, Error> {
    let what = format!("--listen {}", options.listen);
    let listener = TcpListener::bind(options.listen).await.map_err(Error::io(what.clone()))?;
    let address = listener.local_addr().map_err(Error::io(what))?;
    let cluster = move || cluster.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone();
    let logs = Logs { attempts, cluster: Box::new(cluster) };
    let service = v1::agent_logs_server::AgentLogsServer::new(logs);
    let serving = Server::builder().add_service(service).serve_with_incoming(TcpListenerStream::new(listener));
    tokio::spawn(async move {
        if let Err(error) = serving.await {
            tracing::error!(%error, "the log service ended");
        }
    });
    Ok(address)
}

fn registration(machine: &Machine, name: &str) -> v1::MachineFacts {
    v1::MachineFacts {
        name: name.to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        gpus: machine.gpus.clone(),
        links: Some(machine.links.clone()),
        cores_by_numa: machine.cores_by_numa.clone(),
        mem_mib: machine.mem_mib,
        simulated: machine.simulated,
        ..Default::default()
    }
}

fn say_containment(containment: &Containment) {
    match containment {
        Containment::PidNamespace { .. } => {}
        Containment::Cgroup(_) => tracing::warn!(
            "PID namespaces are not permitted here: ranks are held together by control groups (the node says `cgroup`)"
        ),
        Containment::Weak => tracing::warn!(
            "neither PID namespaces nor control groups are permitted here: when an agent and a shim die together, \
             processes may be left behind (the node says `weak`)"
        ),
    }
}

fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}
