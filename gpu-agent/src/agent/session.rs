//! The wire side of the agent: registering, the session's stream, reports, bodies. Each call follows the leader by the
//! typed client; what comes back becomes an event.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use proto::client::Patience;
use proto::{Client, reason, v1};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;

/// Messages that wait for the network; a heartbeat that finds no room is not sent, and so not acknowledged.
const OUTBOX: usize = 16;
/// Between a session that could not be opened and the next try.
const RECONNECT: Duration = Duration::from_millis(200);
/// One try at one replica, and one call with all its tries.
pub const PATIENCE: Patience = Patience { call: Duration::from_secs(15), attempt: Duration::from_secs(2) };

/// What a session tells. `generation` names the session: an older one's word counts no more.
pub enum Told {
    Opened(mpsc::Sender<v1::AgentMessage>),
    Message(v1::LeaderMessage),
    Closed,
}

/// A session under way; dropped, it ends.
pub struct Session {
    pub generation: u64,
    task: JoinHandle<()>,
    pub outbox: Option<mpsc::Sender<v1::AgentMessage>>,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Session {
    /// `hello` is sent first: who we are, with heartbeat number 0, which no acknowledgement extends anything by.
    pub fn open(client: &Client, hello: v1::AgentMessage, generation: u64, told: mpsc::Sender<(u64, Told)>) -> Self {
        let client = client.with_patience(PATIENCE);
        let task = tokio::spawn(async move {
            if let Err(error) = hold(&client, hello, generation, &told).await {
                tracing::info!(%error, "the session with the leader ended");
            }
            tokio::time::sleep(RECONNECT).await;
            let _ = told.send((generation, Told::Closed)).await;
        });
        Self { generation, task, outbox: None }
    }
}

async fn hold(
    client: &Client,
    hello: v1::AgentMessage,
    generation: u64,
    told: &mpsc::Sender<(u64, Told)>,
) -> Result<(), String> {
    let slot: Arc<Mutex<Option<mpsc::Sender<v1::AgentMessage>>>> = Arc::default();
    let opened = client.leader_call(|transport| {
        // Each try has a stream of its own; the last one's is the session's.
        let (outbox, queue) = mpsc::channel(OUTBOX);
        let _ = outbox.try_send(hello.clone());
        *slot.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(outbox);
        async move {
            let mut agents =
                v1::agents_client::AgentsClient::new(transport).max_decoding_message_size(proto::client::MAX_MESSAGE);
            agents.session(ReceiverStream::new(queue)).await
        }
    });
    let mut stream = opened.await.map_err(|error| error.to_string())?;
    let outbox = slot.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
    let Some(outbox) = outbox else { return Ok(()) };
    let _ = told.send((generation, Told::Opened(outbox))).await;
    loop {
        match stream.message().await {
            Ok(Some(message)) => {
                let _ = told.send((generation, Told::Message(message))).await;
            }
            Ok(None) => return Err("the leader closed it".into()),
            Err(status) => return Err(status.message().to_owned()),
        }
    }
}

/// Whether a refused first registration would be refused again: then the agent says why, and ends.
pub fn is_final(error: &proto::Error) -> bool {
    let finals = [
        reason::JOIN_TOKEN_REFUSED,
        reason::CLUSTER_MISMATCH,
        reason::IDENTITY_CONFLICT,
        reason::LEVEL_TOO_OLD,
        reason::INVALID_ARGUMENT,
        reason::LIMIT,
    ];
    finals.iter().any(|reason| reason.name == error.reason())
}
