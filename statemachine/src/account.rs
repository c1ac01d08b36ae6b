//! Tenants and what they may use, use, and have used: records and their arithmetic. Tenants form a tree; every count of
//! a tenant includes those of the tenants below it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::id::*;
use crate::record::{Lease, Part};
use crate::state::State;

/// Tenants from a top one down to the lowest.
pub const DEPTH: usize = 8;
/// Steps in which past usage halves once.
const STEPS: u64 = 256;

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tenant {
    pub name: String,
    pub parent: Option<TenantId>,
    /// Its own jobs that have not ended.
    pub live_jobs: u64,
    /// Bytes of the bodies of all its own jobs in memory, ended ones too until they are archived.
    pub body_bytes: u64,
    /// Its own leases that are not closed.
    pub leases: u64,
    pub policy: Policy,
    /// In leases that are not closed.
    pub used: Amounts,
    /// What was used when the policy was last changed: a limit lowered under use breaks nothing.
    pub used_at_change: Amounts,
    pub usage: Usage,
    /// Gone for everybody, kept so that its old jobs have a name.
    pub removed: bool,
}

/// What the operators decided for a tenant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// Share among the tenants of one parent, at least 1.
    pub weight: u32,
    /// GPUs that it gets before anybody borrows them.
    pub guaranteed: BTreeMap<GpuTypeId, u32>,
    /// Never more than this.
    pub limit: Ceiling,
    /// May use more than what is guaranteed while nobody else needs it.
    pub may_borrow: bool,
    /// Time limit of jobs that name none, in ms; 0 = its parent's, or none.
    pub default_limit_ms: u64,
    /// Longest time limit of its jobs and of those below it, in ms, and that of jobs that have none; 0 = none.
    pub max_limit_ms: u64,
    /// Jobs that wait; 0 = no limit.
    pub max_pending: u64,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            weight: 1,
            guaranteed: BTreeMap::new(),
            limit: Ceiling::default(),
            may_borrow: true,
            default_limit_ms: 0,
            max_limit_ms: 0,
            max_pending: 0,
        }
    }
}

impl Policy {
    /// Its use has an upper bound.
    pub fn is_bounded(&self) -> bool {
        self.limit != Ceiling::default() || !self.may_borrow
    }
}

/// Upper bounds; absent = none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ceiling {
    /// Of all types together.
    pub gpus: Option<u32>,
    pub by_type: BTreeMap<GpuTypeId, u32>,
    pub cores: Option<u32>,
    pub mem_mib: Option<u64>,
}

/// An amount of each resource.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Amounts {
    /// No zeros.
    pub gpus: BTreeMap<GpuTypeId, u32>,
    pub cores: u32,
    pub mem_mib: u64,
}

impl Amounts {
    pub fn all_gpus(&self) -> u64 {
        self.gpus.values().map(|count| u64::from(*count)).sum()
    }

    pub fn of_type(&self, gpu_type: GpuTypeId) -> u32 {
        self.gpus.get(&gpu_type).copied().unwrap_or(0)
    }

    pub fn add(&mut self, other: &Amounts) {
        for (gpu_type, count) in &other.gpus {
            let sum = self.gpus.entry(*gpu_type).or_default();
            *sum = sum.saturating_add(*count);
        }
        self.cores = self.cores.saturating_add(other.cores);
        self.mem_mib = self.mem_mib.saturating_add(other.mem_mib);
    }

    pub fn take(&mut self, other: &Amounts) {
        for (gpu_type, count) in &other.gpus {
            let left = self.of_type(*gpu_type).saturating_sub(*count);
            if left == 0 {
                self.gpus.remove(gpu_type);
            } else {
                self.gpus.insert(*gpu_type, left);
            }
        }
        self.cores = self.cores.saturating_sub(other.cores);
        self.mem_mib = self.mem_mib.saturating_sub(other.mem_mib);
    }
}

/// What was used, halved once a half-life: GPU-ms and core-ms.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    pub gpu_ms: u64,
    pub core_ms: u64,
    /// Counted up to this cluster time.
    pub at_ms: u64,
    /// Halved up to this cluster time.
    pub decayed_ms: u64,
}

impl Usage {
    /// The usage at a later time, when these amounts were in use since it was counted last.
    pub fn at(mut self, now_ms: u64, used: &Amounts, half_life_ms: u64) -> Self {
        let since = now_ms.saturating_sub(self.at_ms);
        self.gpu_ms = self.gpu_ms.saturating_add(used.all_gpus().saturating_mul(since));
        self.core_ms = self.core_ms.saturating_add(u64::from(used.cores).saturating_mul(since));
        self.at_ms = self.at_ms.max(now_ms);
        let step_ms = (half_life_ms / STEPS).max(1);
        let steps = now_ms.saturating_sub(self.decayed_ms) / step_ms;
        self.gpu_ms = decay(self.gpu_ms, steps);
        self.core_ms = decay(self.core_ms, steps);
        // What is left of a step counts towards the next one.
        self.decayed_ms = self.decayed_ms.saturating_add(steps.saturating_mul(step_ms));
        self
    }
}

/// `value` x 2^(-steps / 256), rounded down.
fn decay(value: u64, steps: u64) -> u64 {
    /// 2^(-1/2), 2^(-1/4) .. 2^(-1/256) in units of 2^-32.
    const ROOTS: [u64; 8] = [
        3_037_000_499,
        3_611_622_602,
        3_938_502_375,
        4_112_874_772,
        4_202_935_002,
        4_248_703_253,
        4_271_772_685,
        4_283_353_945,
    ];
    let Some(mut left) = u32::try_from(steps / STEPS).ok().and_then(|halves| value.checked_shr(halves)) else {
        return 0;
    };
    for (bit, root) in ROOTS.iter().enumerate() {
        if steps & (128 >> bit) != 0 {
            left = u64::try_from((u128::from(left) * u128::from(*root)) >> 32).unwrap_or(u64::MAX);
        }
    }
    left
}

/// Which bound of which tenant a grant would pass.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct QuotaHit {
    pub tenant: TenantId,
    pub what: Resource,
    pub used: u64,
    pub asks: u64,
    pub limit: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Resource {
    Gpus,
    GpusOf(GpuTypeId),
    Cores,
    MemMib,
}

impl Tenant {
    /// The bound of one type: its own, and what is guaranteed where it may not borrow.
    pub fn limit_of(&self, gpu_type: GpuTypeId) -> Option<u32> {
        let own = self.policy.limit.by_type.get(&gpu_type).copied();
        let guaranteed = self.policy.guaranteed.get(&gpu_type).copied().unwrap_or(0);
        match (own, self.policy.may_borrow) {
            (own, true) => own,
            (own, false) => Some(own.map_or(guaranteed, |own| own.min(guaranteed))),
        }
    }

    /// A bound that it is over by more than it was when the policy changed: some grant must have passed it.
    pub(crate) fn over(&self, id: TenantId) -> Option<QuotaHit> {
        let grown = |now: u32, then: u32| if now > then { now } else { 0 };
        let mut asks = Amounts {
            gpus: self.used.gpus.iter().map(|(id, now)| (*id, grown(*now, self.used_at_change.of_type(*id)))).collect(),
            cores: grown(self.used.cores, self.used_at_change.cores),
            mem_mib: if self.used.mem_mib > self.used_at_change.mem_mib { self.used.mem_mib } else { 0 },
        };
        if self.used.all_gpus() <= self.used_at_change.all_gpus() {
            // Types may have changed places: only the bound of their own counts.
            let bounded = |id: &GpuTypeId| self.limit_of(*id).is_some();
            asks.gpus.retain(|id, _| bounded(id) && self.policy.limit.gpus.is_none());
        }
        self.hit(id, &Amounts::default(), &asks)
    }

    /// The first bound that `used` and `asks` together would pass.
    pub fn hit(&self, id: TenantId, used: &Amounts, asks: &Amounts) -> Option<QuotaHit> {
        let over = |what, used: u64, asks: u64, limit: Option<u64>| {
            let limit = limit?;
            (asks > 0 && used.saturating_add(asks) > limit).then_some(QuotaHit { tenant: id, what, used, asks, limit })
        };
        let limit = &self.policy.limit;
        let of_type = asks.gpus.iter().find_map(|(gpu_type, count)| {
            let bound = self.limit_of(*gpu_type).map(u64::from);
            over(Resource::GpusOf(*gpu_type), u64::from(used.of_type(*gpu_type)), u64::from(*count), bound)
        });
        over(Resource::Gpus, used.all_gpus(), asks.all_gpus(), limit.gpus.map(u64::from))
            .or(of_type)
            .or_else(|| over(Resource::Cores, u64::from(used.cores), u64::from(asks.cores), limit.cores.map(u64::from)))
            .or_else(|| over(Resource::MemMib, used.mem_mib, asks.mem_mib, limit.mem_mib))
    }
}

impl State {
    /// The tenant and those above it, lowest first.
    pub fn tenant_chain(&self, id: TenantId) -> impl Iterator<Item = (TenantId, &Tenant)> + '_ {
        let mut next = Some(id);
        std::iter::from_fn(move || {
            let id = next?;
            let tenant = self.tenants.get(&id)?;
            next = tenant.parent;
            Some((id, tenant))
        })
        .take(DEPTH)
    }

    /// Would these amounts more take the tenant, or one above it, over a bound? `planned` was granted in thought.
    pub fn quota_hit(
        &self,
        tenant: TenantId,
        asks: &Amounts,
        planned: &BTreeMap<TenantId, Amounts>,
    ) -> Option<QuotaHit> {
        self.tenant_chain(tenant).find_map(|(id, tenant)| match planned.get(&id) {
            None => tenant.hit(id, &tenant.used, asks),
            Some(planned) => {
                let mut used = tenant.used.clone();
                used.add(planned);
                tenant.hit(id, &used, asks)
            }
        })
    }

    /// `tenant "a" uses 6 of 8 GPUs, 4 more would pass the limit`.
    pub fn quota_text(&self, hit: &QuotaHit) -> String {
        let name = self.tenants.get(&hit.tenant).map_or("", |tenant| tenant.name.as_str());
        let unit = match hit.what {
            Resource::Gpus => "GPUs".to_owned(),
            Resource::GpusOf(gpu_type) => format!("{} GPUs", self.gpu_type_name(gpu_type)),
            Resource::Cores => "cores".to_owned(),
            Resource::MemMib => "MiB".to_owned(),
        };
        let QuotaHit { used, asks, limit, .. } = hit;
        format!("tenant {name:?} uses {used} of its {limit} {unit}, {asks} more would pass the limit")
    }

    /// What a placement takes of each resource.
    pub fn amounts_of<'a>(&self, parts: impl Iterator<Item = (NodeId, &'a [u8], &'a [u16], u64)>) -> Amounts {
        let mut sum = Amounts::default();
        for (node, slots, cores, mem_mib) in parts {
            let gpus = self.nodes.get(&node).map(|node| node.value.gpus.as_slice()).unwrap_or_default();
            for gpu in slots.iter().filter_map(|slot| gpus.get(usize::from(*slot))) {
                *sum.gpus.entry(gpu.gpu_type).or_default() += 1;
            }
            sum.cores = sum.cores.saturating_add(crate::fit::cores_of(cores));
            sum.mem_mib = sum.mem_mib.saturating_add(mem_mib);
        }
        sum
    }

    /// Counts a new lease for its tenant and those above it.
    pub(crate) fn charge(&mut self, tenant: TenantId, lease: &Lease) {
        self.account(tenant, |own, used| {
            own.leases = own.leases.saturating_add(used);
            own.used.add(&lease.amounts);
        });
    }

    /// The lease is closed.
    pub(crate) fn discharge(&mut self, tenant: TenantId, lease: &Lease) {
        self.account(tenant, |own, used| {
            own.leases = own.leases.saturating_sub(used);
            own.used.take(&lease.amounts);
        });
    }

    /// Counts usage up to now at each level, then changes what is in use; 1 for the tenant itself, 0 above it.
    fn account(&mut self, tenant: TenantId, change: impl Fn(&mut Tenant, u64)) {
        let (now_ms, half_life_ms) = (self.meta.clock_ms, self.meta.settings.usage_half_life_ms);
        let chain: Vec<TenantId> = self.tenant_chain(tenant).map(|(id, _)| id).collect();
        for id in chain {
            self.tenants.update(&id, |account| {
                account.usage = account.usage.at(now_ms, &account.used, half_life_ms);
                change(account, u64::from(id == tenant));
            });
        }
    }
}

/// What a tenant had of what the tenants of its parent used together, and what its weight would have given it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Share {
    pub usage: Usage,
    /// Parts per million of the weights.
    pub fair_ppm: u32,
    /// Parts per million of the GPU-ms used.
    pub used_ppm: u32,
    /// GPU-ms below (or, negative, above) its fair part.
    pub owed_gpu_ms: i64,
}

impl State {
    /// The shares of all tenants that were not removed, as of the state's clock.
    pub fn shares(&self) -> BTreeMap<TenantId, Share> {
        let (now_ms, half_life_ms) = (self.meta.clock_ms, self.meta.settings.usage_half_life_ms);
        let live = || self.tenants.iter().filter(|(_, tenant)| !tenant.removed);
        let usage = |tenant: &Tenant| tenant.usage.at(now_ms, &tenant.used, half_life_ms);
        let mut sums: BTreeMap<Option<TenantId>, (u64, u64)> = BTreeMap::new();
        for (_, tenant) in live() {
            let (weights, used) = sums.entry(tenant.parent).or_default();
            *weights = weights.saturating_add(u64::from(tenant.policy.weight));
            *used = used.saturating_add(usage(tenant).gpu_ms);
        }
        let share = |tenant: &Tenant| {
            let (weights, used) = sums.get(&tenant.parent).copied().unwrap_or_default();
            let (usage, weight) = (usage(tenant), u64::from(tenant.policy.weight));
            let fair_ms = part(used, weight, weights);
            Share {
                usage,
                fair_ppm: u32::try_from(part(1_000_000, weight, weights)).unwrap_or(u32::MAX),
                used_ppm: u32::try_from(part(1_000_000, usage.gpu_ms, used)).unwrap_or(u32::MAX),
                owed_gpu_ms: i64::try_from(fair_ms).unwrap_or(i64::MAX).saturating_sub_unsigned(usage.gpu_ms),
            }
        };
        live().map(|(id, tenant)| (*id, share(tenant))).collect()
    }
}

/// `whole` x `of` / `all`, 0 of nothing.
fn part(whole: u64, of: u64, all: u64) -> u64 {
    if all == 0 { 0 } else { u64::try_from(u128::from(whole) * u128::from(of) / u128::from(all)).unwrap_or(u64::MAX) }
}

impl Part {
    /// What `State::amounts_of` asks of a part.
    pub fn takes(&self) -> (NodeId, &[u8], &[u16], u64) {
        (self.node, &self.gpu_order, &self.cores_by_numa, self.mem_mib)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpus(count: u32) -> Amounts {
        Amounts { gpus: [(GpuTypeId(1), count)].into(), cores: count, mem_mib: 0 }
    }

    #[test]
    fn usage_halves_once_a_half_life_and_short_jobs_count() {
        const HALF: u64 = 7 * 24 * 3_600_000;
        let start = Usage::default();
        let short = start.at(600_000, &gpus(8), HALF);
        assert_eq!((short.gpu_ms, short.core_ms), (4_800_000, 4_800_000));
        let idle = short.at(600_000 + HALF, &Amounts::default(), HALF);
        assert!((2_399_000..=2_400_000).contains(&idle.gpu_ms), "{idle:?}");
        assert_eq!(short.at(600_000 + 80 * HALF, &Amounts::default(), HALF).gpu_ms, 0);
    }

    #[test]
    fn many_small_looks_decay_as_one_does() {
        const HALF: u64 = 256_000;
        let begin = Usage { gpu_ms: 1 << 40, ..Usage::default() };
        let one = begin.at(256_000, &Amounts::default(), HALF);
        let many = (1..=512).fold(begin, |usage, nth| usage.at(nth * 500, &Amounts::default(), HALF));
        assert!(one.gpu_ms.abs_diff(1 << 39) < 1 << 20, "{one:?}");
        assert!(one.gpu_ms.abs_diff(many.gpu_ms) < 1 << 20, "{one:?} {many:?}");
    }

    #[test]
    fn a_tenant_that_may_not_borrow_is_bound_by_its_guarantee() {
        let mut tenant = Tenant { used: gpus(3), ..Tenant::default() };
        assert_eq!(tenant.hit(TenantId(1), &tenant.used, &gpus(9)), None);
        tenant.policy.guaranteed = [(GpuTypeId(1), 4)].into();
        tenant.policy.may_borrow = false;
        assert_eq!(tenant.hit(TenantId(1), &tenant.used, &gpus(1)), None);
        let hit = tenant.hit(TenantId(1), &tenant.used, &gpus(2)).expect("over its guarantee");
        assert_eq!((hit.what, hit.used, hit.asks, hit.limit), (Resource::GpusOf(GpuTypeId(1)), 3, 2, 4));
        tenant.policy.limit.cores = Some(3);
        assert_eq!(tenant.hit(TenantId(1), &tenant.used, &gpus(1)).map(|hit| hit.what), Some(Resource::Cores));
    }

    #[test]
    fn amounts_given_back_leave_no_zeros() {
        let mut sum = gpus(2);
        sum.add(&gpus(3));
        sum.take(&gpus(5));
        assert_eq!(sum, Amounts::default());
    }
}
