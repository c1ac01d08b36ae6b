//! Sessions and named locks. Keep-alives stay in the leader's memory, behind the same quorum check as heartbeats.

use proto::{error, reason, v1};
use statemachine::command::Command;
use statemachine::record::StoredReply;
use statemachine::{SessionId, Token};
use tonic::{Request, Response, Status};

use super::{Api, requests, status};

/// Session TTL: shorter can't be kept over a leader change, longer holds locks of dead clients for a day.
const TTL_MS: std::ops::RangeInclusive<u64> = 1_000..=86_400_000;

#[tonic::async_trait]
impl v1::locks_server::Locks for Api {
    async fn open_session(
        &self,
        request: Request<v1::OpenSessionRequest>,
    ) -> Result<Response<v1::OpenSessionReply>, Status> {
        self.admit(&request)?;
        let request = request.into_inner();
        let id = requests::request_id(&request.request_id)?;
        let owner = requests::user(&request.owner)?;
        if !TTL_MS.contains(&request.ttl_ms) {
            let what = format!("{}; {} to {} ms", request.ttl_ms, TTL_MS.start(), TTL_MS.end());
            return Err(error::invalid_fields(&[("ttl_ms".to_owned(), what)]));
        }
        let command = Command::OpenSession { owner: owner.clone(), ttl_ms: request.ttl_ms };
        match self.commit(Some(id), owner, command).await?.stored()? {
            StoredReply::Session(session) => {
                if let Some(desk) = self.board.desk() {
                    desk.keeper().hear_session(session, desk.now_ms());
                }
                Ok(Response::new(v1::OpenSessionReply { session_id: session.0 }))
            }
            other => Err(unexpected(other)),
        }
    }

    async fn keep_alive(&self, request: Request<v1::KeepAliveRequest>) -> Result<Response<v1::KeepAliveReply>, Status> {
        self.admit(&request)?;
        let desk = self.desk()?;
        let session = SessionId(request.into_inner().session_id);
        let received_ms = desk.now_ms();
        desk.check_quorum().await.map_err(|error| status::not_read(self, error))?;
        let state = self.replica.state();
        let mut keeper = desk.keeper();
        if !keeper.session_alive(&state, session) {
            return Err(error::refusal(reason::SESSION_UNKNOWN, format!("session {session} has ended")));
        }
        keeper.hear_session(session, received_ms);
        let ttl_ms = state.sessions.get(&session).map(|session| session.ttl_ms).unwrap_or_default();
        Ok(Response::new(v1::KeepAliveReply { ttl_ms }))
    }

    async fn end_session(
        &self,
        request: Request<v1::EndSessionRequest>,
    ) -> Result<Response<v1::EndSessionReply>, Status> {
        self.admit(&request)?;
        let request = request.into_inner();
        let id = requests::request_id(&request.request_id)?;
        let command = Command::EndSession { session: SessionId(request.session_id) };
        self.commit(Some(id), session_actor(request.session_id), command).await?;
        Ok(Response::new(v1::EndSessionReply {}))
    }

    async fn acquire(&self, request: Request<v1::AcquireRequest>) -> Result<Response<v1::AcquireReply>, Status> {
        self.admit(&request)?;
        let request = request.into_inner();
        let id = requests::request_id(&request.request_id)?;
        let command = Command::Acquire { session: SessionId(request.session_id), name: request.name };
        match self.commit(Some(id), session_actor(request.session_id), command).await?.stored()? {
            StoredReply::Lock(token) => Ok(Response::new(v1::AcquireReply {
                granted: token.is_some(),
                token: token.map(|token| token.0).unwrap_or_default(),
            })),
            other => Err(unexpected(other)),
        }
    }

    async fn validate(&self, request: Request<v1::ValidateRequest>) -> Result<Response<v1::ValidateReply>, Status> {
        self.admit(&request)?;
        let request = request.into_inner();
        let state = self.read(v1::ReadMode::Linearizable as i32).await?;
        let holder = state.locks.get(&request.name).and_then(|lock| lock.value.holder);
        let holder_token = holder.map(|holder| holder.token).unwrap_or_default();
        Ok(Response::new(v1::ValidateReply {
            held: holder.is_some() && holder_token == Token(request.token),
            holder_token: holder_token.0,
            revision: state.meta.rev.0,
        }))
    }

    async fn release(&self, request: Request<v1::ReleaseRequest>) -> Result<Response<v1::ReleaseReply>, Status> {
        self.admit(&request)?;
        let request = request.into_inner();
        let id = requests::request_id(&request.request_id)?;
        let command = Command::Unlock { session: SessionId(request.session_id), name: request.name };
        self.commit(Some(id), session_actor(request.session_id), command).await?;
        Ok(Response::new(v1::ReleaseReply {}))
    }
}

fn session_actor(session: u64) -> String {
    format!("session {session}")
}

fn unexpected(reply: StoredReply) -> Status {
    Status::internal(format!("the state machine answered {reply:?}"))
}
