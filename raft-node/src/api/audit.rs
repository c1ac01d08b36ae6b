//! What lets a user judge a cluster and keep a copy of it: the state of every replica at one entry, and snapshots.

use std::time::Duration;

use futures::StreamExt;
use futures::stream::BoxStream;
use proto::{error, reason, v1};
use statemachine::State;
use statemachine::command::Command;
use statemachine::record::LogPosition;
use tonic::{Request, Response, Status};

use super::{Api, requests, status};

/// A replica that has not applied the mark by then lags, or was asked too late.
const MARK_COMES: Duration = Duration::from_secs(20);

#[tonic::async_trait]
impl v1::audit_server::Audit for Api {
    async fn mark_state(&self, request: Request<v1::MarkStateRequest>) -> Result<Response<v1::MarkStateReply>, Status> {
        self.admit(&request)?;
        let id = requests::request_id(&request.into_inner().request_id)?;
        let marked = self.commit(Some(id), "operator".to_owned(), Command::Mark).await?;
        Ok(Response::new(v1::MarkStateReply { revision: marked.revision }))
    }

    async fn verify_state(
        &self,
        request: Request<v1::VerifyStateRequest>,
    ) -> Result<Response<v1::VerifyStateReply>, Status> {
        self.admit(&request)?;
        let id = requests::request_id(&request.into_inner().request_id)?;
        let marked = self.replica.marked(id, MARK_COMES).await.ok_or_else(|| {
            let what =
                format!("this replica did not come to the mark in {} s, or came too long ago", MARK_COMES.as_secs());
            error::refusal(reason::NO_QUORUM, what)
        })?;
        let (replica, one) = (self.replica.id(), self.judging.clone().lock_owned().await);
        let judged = tokio::task::spawn_blocking(move || {
            let _one = one;
            judge(&marked.state, replica)
        })
        .await;
        judged.map(Response::new).map_err(|err| Status::internal(err.to_string()))
    }

    type SaveSnapshotStream = BoxStream<'static, Result<v1::SnapshotPart, Status>>;

    async fn save_snapshot(
        &self,
        request: Request<v1::SaveSnapshotRequest>,
    ) -> Result<Response<Self::SaveSnapshotStream>, Status> {
        self.admit_join(&request)?;
        let index = self.replica.read_index().await.map_err(|error| status::not_read(self, error))?;
        let parts = self.replica.snapshot_parts(index).await?;
        Ok(Response::new(parts.map(Ok).boxed()))
    }
}

/// Takes a while: every record is encoded and looked at.
fn judge(state: &State, replica_id: u64) -> v1::VerifyStateReply {
    let broken = state.check().err();
    let hex = |digest: u128| format!("{digest:032x}");
    let LogPosition { index, .. } = state.meta.applied;
    v1::VerifyStateReply {
        replica_id,
        index,
        revision: state.meta.rev.0,
        digest: hex(state.digest_from_scratch()),
        running_digest: hex(state.clone().digest()),
        broken: broken.as_ref().map(|broken| broken.invariant.to_owned()).unwrap_or_default(),
        detail: broken.map(|broken| broken.detail).unwrap_or_default(),
        jobs: state.jobs.len() as u64,
        leases: state.leases.len() as u64,
        nodes: state.nodes.len() as u64,
        history_jobs: state.buckets.iter().map(|(_, bucket)| bucket.rows).sum(),
    }
}
