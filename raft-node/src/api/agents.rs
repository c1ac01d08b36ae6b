//! The agents' service: registration, the stream of heartbeats and desired sets, reports, bodies.

use std::collections::BTreeSet;
use std::pin::Pin;
use std::sync::Arc;

use futures::Stream;
use proto::{error, v1};
use statemachine::command::{Code, Command};
use statemachine::{JobId, NodeId, Outcome, Reply};
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::{Api, requests, status};
use crate::leader::{Beat, Desk, Link, LinkEnd};

/// Messages that a stream's transport may hold back.
const STREAM_BUFFER: usize = 4;

#[tonic::async_trait]
impl v1::agents_server::Agents for Api {
    async fn register(&self, request: Request<v1::RegisterRequest>) -> Result<Response<v1::RegisterReply>, Status> {
        self.admit_join(&request)?;
        let register = requests::register(request.into_inner())?;
        self.desk()?;
        if let Some(overtaken) = requests::overtaken(&self.replica.state(), &register) {
            return Ok(Response::new(overtaken));
        }
        let (name, actor) = (register.name.clone(), format!("agent {}", register.name));
        let body = Command::RegisterNode(Box::new(register));
        let proposed = self.replica.propose(statemachine::Cmd { request: None, actor, body }).await;
        let (outcome, _) = proposed.map_err(|error| status::not_proposed(self, error))?;
        let state = self.replica.state();
        match outcome {
            Outcome::Done(Reply::Registered { node, epoch }) => {
                Ok(Response::new(requests::registered(&state, node, epoch)))
            }
            Outcome::Rejected(no) if no.code == Code::EpochStale => {
                Ok(Response::new(requests::registered(&state, NodeId(0), state.node_epoch(&name))))
            }
            Outcome::Rejected(no) => Err(status::rejected(&no)),
            other => Err(Status::internal(format!("a registration was answered with {other:?}"))),
        }
    }

    type SessionStream = Pin<Box<dyn Stream<Item = Result<v1::LeaderMessage, Status>> + Send>>;

    async fn session(
        &self,
        request: Request<Streaming<v1::AgentMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        self.admit_join(&request)?;
        let desk = self.desk()?;
        let (out, stream) = mpsc::channel(STREAM_BUFFER);
        let (link, end) = Link::new();
        tokio::spawn(listen(desk.clone(), request.into_inner(), link, out.clone()));
        tokio::spawn(speak(self.clone(), desk, end, out));
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn report(&self, request: Request<v1::ReportRequest>) -> Result<Response<v1::ReportReply>, Status> {
        self.admit(&request)?;
        let report = requests::report(request.into_inner())?;
        let items = report.items.len();
        let actor = format!("node {}", report.node);
        let (outcome, _) = self
            .replica
            .propose(statemachine::Cmd { request: None, actor, body: Command::Report(report) })
            .await
            .map_err(|error| status::not_proposed(self, error))?;
        let refusals = match outcome {
            Outcome::Done(Reply::Report(answers)) => answers
                .into_iter()
                .map(|answer| answer.err().map(|no| no.code.name().to_owned()).unwrap_or_default())
                .collect(),
            // The whole report is refused, for example by its epoch: each item is answered.
            Outcome::Rejected(no) => vec![no.code.name().to_owned(); items],
            other => return Err(Status::internal(format!("a report was answered with {other:?}"))),
        };
        Ok(Response::new(v1::ReportReply { refusals }))
    }

    async fn report_health(
        &self,
        request: Request<v1::ReportHealthRequest>,
    ) -> Result<Response<v1::ReportHealthReply>, Status> {
        self.admit(&request)?;
        let actor = format!("node {}", request.get_ref().node_id);
        for command in requests::health_facts(request.into_inner())? {
            self.commit(None, actor.clone(), command).await?;
        }
        Ok(Response::new(v1::ReportHealthReply {}))
    }

    async fn fetch_bodies(
        &self,
        request: Request<v1::FetchBodiesRequest>,
    ) -> Result<Response<v1::FetchBodiesReply>, Status> {
        self.admit(&request)?;
        self.desk()?;
        let state = self.replica.state();
        let body = |id: u64| {
            let job = &state.jobs.get(&JobId(id))?.value;
            let body = state.body(JobId(id))?;
            Some(v1::JobBody {
                job_id: id,
                argv: body.argv.clone(),
                env: body.env.clone().into_iter().collect(),
                cwd: body.cwd.clone(),
                user: super::view::user_name(&state, job.user),
            })
        };
        // A job that is gone has no lease either: the next desired set says so.
        let bodies = request.into_inner().job_ids.into_iter().filter_map(body).collect();
        Ok(Response::new(v1::FetchBodiesReply { bodies }))
    }
}

/// Reads heartbeats until the stream or the term of office ends.
async fn listen(
    desk: Arc<Desk>,
    mut beats: Streaming<v1::AgentMessage>,
    link: Link,
    out: mpsc::Sender<Result<v1::LeaderMessage, Status>>,
) {
    let mut node = None;
    loop {
        let message = tokio::select! {
            message = beats.next() => message,
            () = desk.over() => break,
            () = out.closed() => break,
        };
        let Some(Ok(message)) = message else { break };
        let from = NodeId(message.node_id);
        // The stream that was heard last has the node's place: a late old one may have taken it, and hang there unread.
        if !desk.links.are(from, &link) {
            node = Some(from);
            desk.links.connect(from, link.clone());
            desk.offer(Some(&BTreeSet::from([from])));
        }
        desk.receive(Beat { node: from, epoch: message.epoch, number: message.heartbeat, link: link.clone() });
    }
    if let Some(node) = node {
        desk.links.disconnect(node, &link);
    }
}

/// Writes acknowledgements and the newest desired set; at the end of the term it says who leads now.
async fn speak(api: Api, desk: Arc<Desk>, mut end: LinkEnd, out: mpsc::Sender<Result<v1::LeaderMessage, Status>>) {
    loop {
        let what = tokio::select! {
            // The end of the term is looked for first.
            biased;
            () = desk.over() => {
                let _ = out.send(Err(error::not_leader(api.leader_addr().as_deref()))).await;
                return;
            }
            what = end.next() => match what {
                Some(what) => what,
                None => return,
            },
        };
        if out.send(Ok(v1::LeaderMessage { what: Some(what) })).await.is_err() {
            return;
        }
    }
}
