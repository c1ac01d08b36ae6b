//! What clients and agents call: gRPC services over the replica's handle and the leader's desk. Validation and words are
//! here; meaning is in the state machine.

mod agents;
mod audit;
mod cluster;
mod history;
mod jobs;
mod keyspace;
mod locks;
pub mod requests;
mod reservations;
mod server;
pub mod status;
mod tenants;
mod together;
mod view;
mod why;
pub mod words;

use std::sync::Arc;

use proto::client::{CLUSTER, JOIN_TOKEN};
use proto::{error, reason, v1};
use scheduling::tables::Tables;
use statemachine::command::Command;
use statemachine::record::StoredReply;
use statemachine::{Cmd, Outcome, Reply, RequestId, State};
use tokio::sync::Mutex;
use tonic::{Request, Status};

use crate::leader::{Board, Desk};
use crate::replica::Replica;

pub use server::{Served, serve};

/// Shared by all services of one replica.
#[derive(Clone)]
pub struct Api {
    pub replica: Replica,
    pub board: Board,
    /// Secret that agents and replicas show when they join.
    pub join_token: Arc<str>,
    /// Hex of the cluster's id.
    cluster: Arc<str>,
    tables: Tables,
    outlooks: why::Outlooks,
    /// Held by whoever judges a whole state: it takes a core for seconds, and anybody may ask.
    judging: Arc<Mutex<()>>,
}

impl Api {
    pub fn new(replica: Replica, board: Board, join_token: &str) -> Self {
        let cluster = replica.cluster().to_string().into();
        let (tables, outlooks, judging) = Default::default();
        Self { replica, board, join_token: join_token.into(), cluster, tables, outlooks, judging }
    }
}

impl Api {
    /// Refuses a call that names another cluster. A caller that does not know its cluster yet names none.
    fn admit<T>(&self, request: &Request<T>) -> Result<(), Status> {
        match request.metadata().get(CLUSTER).map(|value| value.as_bytes()) {
            Some(theirs) if theirs != self.cluster.as_bytes() => Err(error::refusal(
                reason::CLUSTER_MISMATCH,
                format!(
                    "this replica belongs to cluster {}, the call to {}",
                    self.cluster,
                    String::from_utf8_lossy(theirs)
                ),
            )),
            _ => Ok(()),
        }
    }

    /// Admits a join: it carries the cluster's join token.
    fn admit_join<T>(&self, request: &Request<T>) -> Result<(), Status> {
        self.admit(request)?;
        let shown = request.metadata().get(JOIN_TOKEN).map(|value| value.as_bytes()).unwrap_or_default();
        if !same_secret(shown, self.join_token.as_bytes()) {
            let what = if shown.is_empty() { "no join token was sent" } else { "the join token is not this cluster's" };
            return Err(error::refusal(reason::JOIN_TOKEN_REFUSED, what));
        }
        Ok(())
    }

    /// The desk of this replica's term of office, or NOT_LEADER.
    fn desk(&self) -> Result<Arc<Desk>, Status> {
        self.board.desk().ok_or_else(|| error::not_leader(self.leader_addr().as_deref()))
    }

    /// The leader's API address, where one is known and it is not this replica.
    fn leader_addr(&self) -> Option<String> {
        self.replica.leader_hint().map(|(_, peer)| peer.api_addr)
    }

    /// One command through the door; the reply and the revision after it.
    async fn commit(&self, request: Option<RequestId>, actor: String, body: Command) -> Result<Committed, Status> {
        let (outcome, revision) = self
            .replica
            .propose(Cmd { request, actor, body })
            .await
            .map_err(|error| status::not_proposed(self, error))?;
        match outcome {
            Outcome::Done(reply) => Ok(Committed { reply, replayed: false, revision }),
            Outcome::Replayed(reply) => Ok(Committed { reply: Reply::Stored(reply), replayed: true, revision }),
            Outcome::Rejected(rejection) => Err(status::rejected(&rejection)),
        }
    }

    /// State to read from: linearizable by default, this replica's memory on request.
    async fn read(&self, mode: i32) -> Result<State, Status> {
        if mode != v1::ReadMode::Stale as i32 {
            self.replica.read_index().await.map_err(|error| status::not_read(self, error))?;
        }
        Ok(self.replica.state())
    }
}

/// An accepted command.
struct Committed {
    reply: Reply,
    replayed: bool,
    revision: u64,
}

impl Committed {
    fn stored(&self) -> Result<StoredReply, Status> {
        match &self.reply {
            Reply::Stored(reply) => Ok(*reply),
            other => Err(Status::internal(format!("the state machine answered {other:?}"))),
        }
    }
}

/// Compares without telling by its duration how much of the secret was right.
fn same_secret(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |diff, (a, b)| diff | (a ^ b)) == 0
}
