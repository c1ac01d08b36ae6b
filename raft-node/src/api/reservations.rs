//! Reservations of time, for operators.

use std::collections::BTreeSet;

use proto::v1;
use statemachine::command::{Command, CreateReservation, Machines};
use statemachine::record::{Reservation, Whom};
use statemachine::{State, Token};
use tonic::{Request, Response, Status};

use super::Api;
use super::requests::request_id;

/// Whose word these commands are, until people are known.
const ACTOR: &str = "operator";

#[tonic::async_trait]
impl v1::reservations_server::Reservations for Api {
    async fn create_reservation(
        &self,
        request: Request<v1::CreateReservationRequest>,
    ) -> Result<Response<v1::CreateReservationReply>, Status> {
        self.admit(&request)?;
        let request = request.into_inner();
        let id = request_id(&request.request_id)?;
        let name = request.name.clone();
        let create = CreateReservation {
            name: request.name,
            maintenance: request.maintenance,
            tenants: request.tenants,
            users: request.users,
            machines: Machines {
                names: request.nodes,
                gpu_type: request.gpu_type,
                labels: request.labels.into_iter().collect(),
                count: request.count,
            },
            start_wall_ms: request.start_unix_ms,
            duration_ms: request.duration_ms,
            requeue: request.requeue,
            reason: request.reason,
        };
        self.commit(Some(id), ACTOR.to_owned(), Command::CreateReservation(Box::new(create))).await?;
        let state = self.replica.state();
        let reservation = state.reservation(&name).map(|(_, window)| shown(&state, window));
        Ok(Response::new(v1::CreateReservationReply { reservation }))
    }

    async fn delete_reservation(
        &self,
        request: Request<v1::DeleteReservationRequest>,
    ) -> Result<Response<v1::DeleteReservationReply>, Status> {
        self.admit(&request)?;
        let request = request.into_inner();
        let id = request_id(&request.request_id)?;
        self.commit(Some(id), ACTOR.to_owned(), Command::EndReservation { name: request.name }).await?;
        Ok(Response::new(v1::DeleteReservationReply {}))
    }

    async fn list_reservations(
        &self,
        request: Request<v1::ListReservationsRequest>,
    ) -> Result<Response<v1::ListReservationsReply>, Status> {
        self.admit(&request)?;
        let state = self.read(request.get_ref().read).await?;
        let mut windows: Vec<&Reservation> = state.reservations.iter().map(|(_, window)| window).collect();
        windows.sort_by_key(|window| window.start_wall_ms);
        let reservations = windows.into_iter().map(|window| shown(&state, window)).collect();
        Ok(Response::new(v1::ListReservationsReply { reservations }))
    }
}

fn shown(state: &State, window: &Reservation) -> v1::Reservation {
    let (tenants, users) = match &window.whom {
        Whom::Maintenance => (Vec::new(), Vec::new()),
        Whom::Jobs { tenants, users } => (
            tenants.iter().filter_map(|id| Some(state.tenants.get(id)?.name.clone())).collect(),
            users.iter().map(|id| state.user_name(*id).to_owned()).collect(),
        ),
    };
    let allocs = window.nodes.iter().filter_map(|id| state.allocs.get(id));
    let leases: BTreeSet<Token> = allocs.flat_map(|alloc| alloc.leases.iter().copied()).collect();
    let is_stranger = |token: &&Token| {
        let job = state.leases.get(token).and_then(|lease| state.jobs.get(&lease.value.task.job));
        job.is_none_or(|job| job.value.spec.reservation() != window.name)
    };
    v1::Reservation {
        name: window.name.clone(),
        maintenance: window.is_maintenance(),
        tenants,
        users,
        nodes: window.nodes.iter().map(|id| state.node_name(*id).to_owned()).collect(),
        start_unix_ms: window.start_wall_ms,
        end_unix_ms: window.end_wall_ms,
        requeue: window.requeue,
        reason: window.reason.clone(),
        begun: window.begun.is_some(),
        strangers: leases.iter().filter(is_stranger).count() as u32,
    }
}
