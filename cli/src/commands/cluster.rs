//! `ares cluster`: the Raft group.

use std::process::ExitCode;
use std::time::Duration;

use proto::{Client, Patience, v1};

use super::snapshot;
use crate::Global;
use crate::connect::{answer_of, client, client_with_token, runtime, servers};
use crate::exit::{CONFLICT, Failure, LOOK_FOR_CLUSTER, Outcome, UNAVAILABLE};
use crate::json;
use crate::output::{self, Row};

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Each replica: role, term, indexes, disk
    Status,
    /// Copies of the whole cluster: take one, look at it, go on from it
    Snapshot(snapshot::Args),
    /// Who belongs to the group, as the leader knows it
    Members,
    /// Make a replica a learner; it becomes a voter once it has caught up
    Add {
        /// The new replica's id, as its server printed it
        id: u64,
        /// Its Raft address
        #[arg(long, value_name = "HOST:PORT")]
        peer: String,
        /// Its address for clients and agents
        #[arg(long, value_name = "HOST:PORT")]
        api: String,
        /// The cluster's join token, from a replica's DIR/env
        #[arg(long, env = "ARES_JOIN_TOKEN", hide_env_values = true, default_value = "", hide_default_value = true)]
        join_token: String,
    },
    /// Make a learner a voter
    Promote {
        /// As ares cluster members shows it
        id: u64,
    },
    /// Remove a replica; refused when the rest would have no quorum
    Remove {
        /// As ares cluster members shows it
        id: u64,
    },
    /// Hand leadership over, to a replica or to any that is up to date
    Transfer {
        /// As ares cluster members shows it
        id: Option<u64>,
    },
}

pub fn run(args: Args, global: Global) -> Outcome {
    let members = match args.verb {
        Verb::Status => return status(&global),
        Verb::Snapshot(args) => return snapshot::run(args, &global),
        Verb::Members => {
            let client = client(&global)?;
            runtime()?.block_on(leader_status(&client))?.members
        }
        Verb::Add { id, peer, api, join_token } => {
            let client = client_with_token(&global, &join_token)?;
            let request = v1::AddReplicaRequest {
                replica_id: id,
                peer_addr: crate::connect::address(&peer)?,
                api_addr: crate::connect::address(&api)?,
                version: env!("CARGO_PKG_VERSION").to_owned(),
            };
            runtime()?.block_on(client.add_replica(request))?.members
        }
        Verb::Promote { id } => {
            change(&global, |client, request| async move { client.promote_replica(request).await }, id)?
        }
        Verb::Remove { id } => {
            known(&global, id)?;
            change(&global, |client, request| async move { client.remove_replica(request).await }, id)?
        }
        Verb::Transfer { id } => change(
            &global,
            |client, request| async move { client.transfer_leader(request).await },
            id.unwrap_or_default(),
        )?,
    };
    print_members(&members, global.output);
    Ok(ExitCode::SUCCESS)
}

/// The group takes the removal of one that is out as done, so that a lost answer can be asked for again; a mistyped id is
/// caught here.
fn known(global: &Global, id: u64) -> Result<(), Failure> {
    let client = client(global)?;
    let members = runtime()?.block_on(leader_status(&client))?.members;
    if members.iter().any(|member| member.replica_id == id) {
        return Ok(());
    }
    Err(Failure::new(CONFLICT, format!("replica {id} is no member")).advise("look at ares cluster members"))
}

fn change<F, Fut>(global: &Global, call: F, id: u64) -> Result<Vec<v1::Member>, Failure>
where
    F: FnOnce(Client, v1::ReplicaRequest) -> Fut,
    Fut: Future<Output = Result<v1::ReplicaReply, proto::Error>>,
{
    let client = client(global)?;
    Ok(runtime()?.block_on(call(client, v1::ReplicaRequest { replica_id: id }))?.members)
}

/// Every replica that is known from any that answers, each asked by itself: works without a quorum.
fn status(global: &Global) -> Outcome {
    let first = client(global)?;
    let named = servers(global)?;
    let found = runtime()?.block_on(async {
        let mut addresses = named;
        let mut found = Vec::new();
        let mut at = 0;
        while at < addresses.len() {
            let address = addresses[at].clone();
            let reply = one_status(global, &first, &address).await;
            if let Ok(reply) = &reply {
                let more = reply.members.iter().map(|member| member.api_addr.clone());
                addresses.extend(more.filter(|address| !addresses.contains(address)).collect::<Vec<_>>());
            }
            found.push((address, reply));
            at += 1;
        }
        found
    });
    let answered = found.iter().filter(|(_, reply)| reply.is_ok()).count();
    let heads = ["ADDRESS", "ROLE", "TERM", "COMMITTED", "APPLIED", "REVISION", "JOBS", "NODES", "NOTE"];
    output::rows(global.output, &heads, found.iter().map(|(address, reply)| status_row(address, reply)).collect());
    if answered == 0 {
        return Err(Failure::new(UNAVAILABLE, "no replica answered").advise(LOOK_FOR_CLUSTER));
    }
    Ok(ExitCode::SUCCESS)
}

async fn one_status(global: &Global, client: &Client, address: &str) -> Result<v1::StatusReply, proto::Error> {
    let patience = Duration::from_secs(global.timeout.clamp(1, 2));
    let client = client.with_patience(Patience { call: patience, attempt: patience });
    let transport = client.transport(address)?;
    let call = async { v1::cluster_client::ClusterClient::new(transport).status(v1::StatusRequest {}).await };
    answer_of(address, patience, call).await
}

fn status_row(address: &str, reply: &Result<v1::StatusReply, proto::Error>) -> Row {
    match reply {
        Ok(status) => Row {
            name: address.to_owned(),
            cells: vec![
                address.to_owned(),
                status.role.clone(),
                status.term.to_string(),
                status.committed_index.to_string(),
                status.applied_index.to_string(),
                status.revision.to_string(),
                status.live_jobs.to_string(),
                status.nodes.to_string(),
                if status.disk_full { "DISK FULL".to_owned() } else { String::new() },
            ],
            json: json::status(address, status),
        },
        Err(error) => Row {
            name: address.to_owned(),
            cells: [address, "DOWN", "", "", "", "", "", "", &error.to_string()].map(str::to_owned).to_vec(),
            json: serde_json::json!({ "address": address, "role": "DOWN", "error": error.to_string() }),
        },
    }
}

/// The leader's own status: its members carry the matched indexes.
pub async fn leader_status(client: &Client) -> Result<v1::StatusReply, proto::Error> {
    let any = client.status(v1::StatusRequest {}).await?;
    if any.leader_addr.is_empty() || any.leader_id == any.replica_id {
        return Ok(any);
    }
    let transport = client.transport(&any.leader_addr)?;
    match v1::cluster_client::ClusterClient::new(transport).status(v1::StatusRequest {}).await {
        Ok(reply) => Ok(reply.into_inner()),
        Err(_) => Ok(any),
    }
}

fn print_members(members: &[v1::Member], format: output::Format) {
    let rows = members.iter().map(|member| Row {
        name: member.replica_id.to_string(),
        cells: vec![
            member.replica_id.to_string(),
            if member.voter { "voter" } else { "learner" }.to_owned(),
            member.api_addr.clone(),
            member.peer_addr.clone(),
            member.matched_index.to_string(),
        ],
        json: json::member(member),
    });
    output::rows(format, &["REPLICA", "KIND", "API", "RAFT", "MATCHED"], rows.collect());
}
