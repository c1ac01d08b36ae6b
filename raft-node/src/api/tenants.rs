//! Tenants, priorities and shares, for operators.

use std::collections::{BTreeMap, HashMap};

use proto::v1;
use statemachine::account::{Share, Tenant};
use statemachine::command::{Command, SetPolicy, SetPriority, SetTenant};
use statemachine::settings::OrderBy;
use statemachine::{GpuTypeId, State, TenantId};
use tonic::{Request, Response, Status};

use super::requests::{Fields, request_id};
use super::{Api, view};

/// Whose word these commands are, until people are known.
const ACTOR: &str = "operator";

#[tonic::async_trait]
impl v1::tenants_server::Tenants for Api {
    async fn set_tenant(&self, request: Request<v1::SetTenantRequest>) -> Result<Response<v1::SetTenantReply>, Status> {
        self.admit(&request)?;
        let request = request.into_inner();
        let id = request_id(&request.request_id)?;
        let set = set_tenant(request)?;
        self.commit(Some(id), ACTOR.to_owned(), Command::SetTenant(Box::new(set))).await?;
        Ok(Response::new(v1::SetTenantReply {}))
    }

    async fn remove_tenant(
        &self,
        request: Request<v1::RemoveTenantRequest>,
    ) -> Result<Response<v1::RemoveTenantReply>, Status> {
        self.admit(&request)?;
        let request = request.into_inner();
        let id = request_id(&request.request_id)?;
        self.commit(Some(id), ACTOR.to_owned(), Command::RemoveTenant { name: request.name }).await?;
        Ok(Response::new(v1::RemoveTenantReply {}))
    }

    async fn list_tenants(
        &self,
        request: Request<v1::ListTenantsRequest>,
    ) -> Result<Response<v1::ListTenantsReply>, Status> {
        self.admit(&request)?;
        let state = self.read(request.get_ref().read).await?;
        let half_life_ms = state.meta.settings.usage_half_life_ms;
        Ok(Response::new(v1::ListTenantsReply { tenants: tree(&state), half_life_ms }))
    }

    async fn set_priority(
        &self,
        request: Request<v1::SetPriorityRequest>,
    ) -> Result<Response<v1::SetPriorityReply>, Status> {
        self.admit(&request)?;
        let request = request.into_inner();
        let id = request_id(&request.request_id)?;
        let class = request.priority.unwrap_or_default();
        let set = SetPriority {
            name: class.name,
            create: request.create,
            value: class.value,
            tenants: class.tenants,
            preempts: class.preempts,
            preemptible: class.preemptible,
        };
        self.commit(Some(id), ACTOR.to_owned(), Command::SetPriority(set)).await?;
        Ok(Response::new(v1::SetPriorityReply {}))
    }

    async fn remove_priority(
        &self,
        request: Request<v1::RemovePriorityRequest>,
    ) -> Result<Response<v1::RemovePriorityReply>, Status> {
        self.admit(&request)?;
        let request = request.into_inner();
        let id = request_id(&request.request_id)?;
        self.commit(Some(id), ACTOR.to_owned(), Command::RemovePriority { name: request.name }).await?;
        Ok(Response::new(v1::RemovePriorityReply {}))
    }

    async fn list_priorities(
        &self,
        request: Request<v1::ListPrioritiesRequest>,
    ) -> Result<Response<v1::ListPrioritiesReply>, Status> {
        self.admit(&request)?;
        let state = self.read(request.get_ref().read).await?;
        let shown = |(name, class): (&String, &statemachine::record::Priority)| v1::Priority {
            name: name.clone(),
            value: class.value,
            tenants: class.tenants.iter().filter_map(|id| Some(state.tenants.get(id)?.name.clone())).collect(),
            preempts: class.preempts,
            preemptible: class.preemptible,
        };
        let mut priorities: Vec<_> = state.priorities.iter().map(shown).collect();
        priorities.sort_by_key(|class| std::cmp::Reverse(class.value));
        Ok(Response::new(v1::ListPrioritiesReply { priorities }))
    }

    async fn set_policy(&self, request: Request<v1::SetPolicyRequest>) -> Result<Response<v1::SetPolicyReply>, Status> {
        self.admit(&request)?;
        let request = request.into_inner();
        let id = request_id(&request.request_id)?;
        let order = request.order.as_deref().map(order_by).transpose()?;
        let set = SetPolicy {
            order,
            reservations: request.reservations,
            aged_after_ms: request.aged_after_ms,
            min_run_ms: request.min_run_ms,
            preemptions: request.preemptions,
            claim_ms: request.claim_ms,
            turn_gpu_ms: request.turn_gpu_ms,
            turn_run_ms: request.turn_run_ms,
            turn_wait_ms: request.turn_wait_ms,
        };
        self.commit(Some(id), ACTOR.to_owned(), Command::SetPolicy(set)).await?;
        Ok(Response::new(v1::SetPolicyReply {}))
    }

    async fn get_policy(&self, request: Request<v1::GetPolicyRequest>) -> Result<Response<v1::Policy>, Status> {
        self.admit(&request)?;
        let planning = self.read(request.get_ref().read).await?.meta.settings.planning;
        Ok(Response::new(v1::Policy {
            order: planning.order.name().to_owned(),
            reservations: planning.reservations,
            aged_after_ms: planning.aged_after_ms,
            min_run_ms: planning.min_run_ms,
            preemptions: planning.preemptions,
            claim_ms: planning.claim_ms,
            turn_gpu_ms: planning.turn_gpu_ms,
            turn_run_ms: planning.turn_run_ms,
            turn_wait_ms: planning.turn_wait_ms,
        }))
    }
}

fn order_by(name: &str) -> Result<OrderBy, Status> {
    let known = OrderBy::ALL.into_iter().find(|order| order.name() == name);
    known.ok_or_else(|| {
        let names = OrderBy::ALL.map(OrderBy::name).join(" or ");
        proto::error::invalid_fields(&[("order".to_owned(), format!("{name:?}; {names}"))])
    })
}

fn set_tenant(request: v1::SetTenantRequest) -> Result<SetTenant, Status> {
    let mut fields = Fields::default();
    let counts = |counts: Option<v1::TypeCounts>| {
        counts.map(|counts| counts.counts.into_iter().map(|(slug, n)| (slug.to_ascii_lowercase(), n)).collect())
    };
    let mut narrow = |field: &str, bound: Option<v1::Bound>| {
        bound.map(|bound| {
            bound.value.map(|value| {
                u32::try_from(value).unwrap_or_else(|_| {
                    fields.refuse(field, format!("{value} is above the limit of {}", u32::MAX));
                    0
                })
            })
        })
    };
    let limit_gpus = narrow("limit_gpus", request.limit_gpus);
    let limit_cores = narrow("limit_cores", request.limit_cores);
    fields.done(SetTenant {
        name: request.name,
        create: request.create,
        parent: request.parent,
        weight: request.weight,
        guaranteed: counts(request.guaranteed),
        limit_by_type: counts(request.limit_by_type),
        limit_gpus,
        limit_cores,
        limit_mem_mib: request.limit_mem_mib.map(|bound| bound.value),
        may_borrow: request.may_borrow,
        default_limit_ms: request.default_limit_ms,
        max_limit_ms: request.max_limit_ms,
        max_pending: request.max_pending,
    })
}

/// Parents before their children, tenants of one parent by name.
fn tree(state: &State) -> Vec<v1::Tenant> {
    let shares = state.shares();
    let mut below: BTreeMap<Option<TenantId>, Vec<(&str, TenantId)>> = BTreeMap::new();
    for (id, tenant) in state.tenants.iter().filter(|(_, tenant)| !tenant.removed) {
        below.entry(tenant.parent).or_default().push((&tenant.name, *id));
    }
    for tenants in below.values_mut() {
        tenants.sort_unstable_by(|left, right| right.cmp(left));
    }
    let mut shown = Vec::new();
    let mut open: Vec<(TenantId, u32)> = Vec::new();
    let push = |open: &mut Vec<(TenantId, u32)>, parent: Option<TenantId>, depth: u32| {
        open.extend(below.get(&parent).into_iter().flatten().map(|(_, id)| (*id, depth)));
    };
    push(&mut open, None, 0);
    while let Some((id, depth)) = open.pop() {
        if let Some(tenant) = state.tenants.get(&id) {
            shown.push(show(state, tenant, depth, shares.get(&id).copied().unwrap_or_default()));
        }
        push(&mut open, Some(id), depth + 1);
    }
    shown
}

fn show(state: &State, tenant: &Tenant, depth: u32, share: Share) -> v1::Tenant {
    let by_type = |counts: &BTreeMap<GpuTypeId, u32>| -> HashMap<String, u32> {
        counts.iter().map(|(gpu_type, count)| (view::gpu_type(state, *gpu_type), *count)).collect()
    };
    let policy = &tenant.policy;
    v1::Tenant {
        name: tenant.name.clone(),
        parent: tenant.parent.and_then(|id| state.tenants.get(&id)).map(|up| up.name.clone()).unwrap_or_default(),
        depth,
        weight: policy.weight,
        guaranteed: by_type(&policy.guaranteed),
        limit_by_type: by_type(&policy.limit.by_type),
        limit_gpus: policy.limit.gpus,
        limit_cores: policy.limit.cores,
        limit_mem_mib: policy.limit.mem_mib,
        may_borrow: policy.may_borrow,
        default_limit_ms: policy.default_limit_ms,
        max_limit_ms: policy.max_limit_ms,
        max_pending: policy.max_pending,
        used_gpus: by_type(&tenant.used.gpus),
        used_cores: tenant.used.cores,
        used_mem_mib: tenant.used.mem_mib,
        live_jobs: tenant.live_jobs,
        running_jobs: tenant.leases,
        usage_gpu_ms: share.usage.gpu_ms,
        usage_core_ms: share.usage.core_ms,
        fair_ppm: share.fair_ppm,
        used_ppm: share.used_ppm,
        owed_gpu_ms: share.owed_gpu_ms,
    }
}
