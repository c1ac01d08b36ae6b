//! Which bound of a tenant keeps a gang from starting, before and after its machines are chosen. The bounds themselves
//! are the state's, and apply checks them again.

use std::collections::BTreeMap;

use statemachine::account::{Amounts, QuotaHit};
use statemachine::command::PlacePart;
use statemachine::spec::Shape;
use statemachine::{GpuTypeId, State, TenantId};

use crate::reason::Reason;

/// What the placements of one cycle take, by tenant, on top of the state.
#[derive(Clone, Debug, Default)]
pub(crate) struct Planned(BTreeMap<TenantId, Amounts>);

impl Planned {
    pub fn by_tenant(&self) -> &BTreeMap<TenantId, Amounts> {
        &self.0
    }

    /// Counts a placement for its tenant and those above it: what it takes.
    pub fn add(&mut self, state: &State, tenant: TenantId, parts: &[PlacePart]) -> Amounts {
        let amounts = state.amounts_of(parts.iter().map(PlacePart::takes));
        for (id, _) in state.tenant_chain(tenant) {
            self.0.entry(id).or_default().add(&amounts);
        }
        amounts
    }

    /// The bound that these parts would pass.
    pub fn hit_by(&self, state: &State, tenant: TenantId, parts: &[PlacePart]) -> Option<Reason> {
        if !is_bounded(state, tenant) {
            return None;
        }
        let asks = state.amounts_of(parts.iter().map(PlacePart::takes));
        state.quota_hit(tenant, &asks, &self.0).map(|hit| reason(state, hit))
    }

    /// The bound that the gang would pass on whatever machines it got: `None` while one acceptable type is left.
    pub fn hit_by_shape(&self, state: &State, tenant: TenantId, shape: &Shape) -> Option<Reason> {
        if !is_bounded(state, tenant) {
            return None;
        }
        let gpus = shape.gpus();
        let cores = shape.ranks() * u32::from(shape.cores_per_rank);
        let mem_mib = u64::from(shape.ranks()).saturating_mul(shape.mem_mib_per_rank);
        let hit = |of_type: Option<GpuTypeId>| {
            let gpus = of_type.map(|gpu_type| (gpu_type, gpus)).into_iter().collect();
            state.quota_hit(tenant, &Amounts { gpus, cores, mem_mib }, &self.0)
        };
        let hit = match (gpus, &*shape.gpu_types) {
            (0, _) => hit(None),
            // Of any type: the bounds of single types can't be told yet.
            (_, []) => hit(Some(GpuTypeId(u16::MAX))).filter(|hit| !of_unknown_type(hit)),
            (_, types) => {
                let mut hits = types.iter().map(|gpu_type| hit(Some(*gpu_type)));
                let first = hits.next().flatten();
                first.filter(|_| hits.all(|hit| hit.is_some()))
            }
        };
        hit.map(|hit| reason(state, hit))
    }
}

/// The tenant or one above it may not use all that there is.
fn is_bounded(state: &State, tenant: TenantId) -> bool {
    state.tenant_chain(tenant).any(|(_, tenant)| tenant.policy.is_bounded())
}

fn of_unknown_type(hit: &QuotaHit) -> bool {
    matches!(hit.what, statemachine::account::Resource::GpusOf(_))
}

fn reason(state: &State, hit: QuotaHit) -> Reason {
    Reason::Quota { text: state.quota_text(&hit), hit }
}
