//! The agents' service of one replica, spoken to as an agent would.

mod support;
#[path = "../../statemachine/tests/world/mod.rs"]
mod world;

use std::time::Duration;

use proto::client::JOIN_TOKEN;
use proto::v1::agents_client::AgentsClient;
use proto::v1::{AgentMessage, Desired, LeaderMessage, MachineFacts, RegisterReply, RegisterRequest, leader_message};
use raft_node::server::{self, Mode, Options, Running};
use statemachine::record::StoredReply;
use statemachine::{Cmd, Command, JobId, Outcome, Reply};
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Request, Streaming};

use support::{SOON, free_addr, until};

/// A machine without GPUs.
struct Agent {
    client: AgentsClient<Channel>,
    token: String,
    node: RegisterReply,
}

/// One of its streams.
struct Session {
    out: mpsc::Sender<AgentMessage>,
    from_leader: Streaming<LeaderMessage>,
}

impl Agent {
    async fn register(at: &Running) -> Self {
        let client = AgentsClient::connect(format!("http://{}", at.api_addr)).await.expect("it listens");
        let mut agent = Self { client, token: at.join_token.clone(), node: RegisterReply::default() };
        let machine = MachineFacts {
            name: "n1".into(),
            address: "127.0.0.1:1".into(),
            host: "n1".into(),
            machine_id: vec![1; 16].into(),
            boot_id: vec![1; 16].into(),
            version: "0".into(),
            cores_by_numa: vec![8],
            mem_mib: 1 << 10,
            kill: "cgroup".into(),
            ..Default::default()
        };
        let request = agent.joining(RegisterRequest { machine: Some(machine), ..Default::default() });
        agent.node = agent.client.register(request).await.expect("registered").into_inner();
        agent
    }

    fn joining<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert(JOIN_TOKEN, self.token.parse().expect("plain ASCII"));
        request
    }

    /// A stream on which nothing was said yet.
    async fn connect(&mut self) -> Session {
        let (out, messages) = mpsc::channel(4);
        let request = self.joining(ReceiverStream::new(messages));
        let from_leader = self.client.session(request).await.expect("the leader listens").into_inner();
        Session { out, from_leader }
    }

    fn beat(&self, heartbeat: u64) -> AgentMessage {
        AgentMessage { node_id: self.node.node_id, epoch: self.node.epoch, heartbeat, ..Default::default() }
    }
}

impl Session {
    /// The next desired set.
    async fn desired(&mut self) -> Desired {
        let next = async {
            loop {
                let message = self.from_leader.next().await.expect("the stream goes on").expect("it speaks");
                if let Some(leader_message::What::Desired(set)) = message.what {
                    return set;
                }
            }
        };
        tokio::time::timeout(SOON, next).await.expect("a desired set within time")
    }

    /// Until this heartbeat is acknowledged.
    async fn acknowledged(&mut self, heartbeat: u64) {
        let next = async {
            loop {
                let message = self.from_leader.next().await.expect("the stream goes on").expect("it speaks");
                if matches!(message.what, Some(leader_message::What::Ack(ack)) if ack.heartbeat == heartbeat) {
                    return;
                }
            }
        };
        tokio::time::timeout(SOON, next).await.expect("an acknowledgement within time");
    }
}

async fn submit(at: &Running) -> JobId {
    let submit = world::job(world::shape(1, 1, 0));
    let body = Command::SubmitJob(Box::new(submit));
    let cmd = Cmd { request: None, actor: "tests".into(), body };
    match at.replica.propose(cmd).await.expect("committed").0 {
        Outcome::Done(Reply::Stored(StoredReply::Job(job))) => job,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_old_stream_of_an_agent_does_not_keep_the_place_of_its_newer_one() {
    let dir = tempfile::tempdir().expect("a directory");
    let options = Options {
        dir: dir.path().join("replica"),
        mode: Mode::Bootstrap,
        join_token: None,
        listen: Some("127.0.0.1:0".into()),
        peer_listen: Some(free_addr().await.to_string()),
        advertise: None,
        insecure: false,
        snapshot_entries: None,
    };
    let running = server::start(options).await.expect("it starts");
    until(SOON, || running.replica.is_leader().then_some(())).await.expect("it leads");
    // It leads a moment before its desk is open.
    tokio::time::sleep(Duration::from_millis(200)).await;

    let mut agent = Agent::register(&running).await;
    let (mut old, mut new) = (agent.connect().await, agent.connect().await);
    new.out.send(agent.beat(1)).await.expect("sent");
    assert!(new.desired().await.leases.is_empty());
    // What the agent said on the stream that it gave up comes after all, and the stream hangs there.
    old.out.send(agent.beat(1)).await.expect("sent");
    old.acknowledged(1).await;
    new.out.send(agent.beat(2)).await.expect("sent");
    new.acknowledged(2).await;

    let job = submit(&running).await;
    let set = new.desired().await;
    assert_eq!(set.leases.iter().map(|lease| lease.job_id).collect::<Vec<_>>(), [job.0], "{set:?}");
    drop((old, new));
    running.stop().await;
}
