//! Named limits. They are part of the replicated state, so that every replica refuses the same command.

use serde::{Deserialize, Serialize};

/// In which order what waits is looked at, and what is protected: the operators' choice.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Planning {
    pub order: OrderBy,
    /// Reservations of each pool of GPUs, at most `RESERVATIONS`; 0 = none.
    pub reservations: u32,
    /// A task that was submitted so long ago goes before younger ones of its tenant; 0 = never.
    pub aged_after_ms: u64,
    /// An attempt makes room for no other task before it has run so long.
    pub min_run_ms: u64,
    /// How often a job may have to make room for another one; 0 = nobody has to.
    pub preemptions: u32,
    /// How long what was taken for a task is kept for it, beyond its victims' grace.
    pub claim_ms: u64,
    /// GPU time after which a job without a limit has had its turn; 0 = no turns.
    pub turn_gpu_ms: u64,
    /// An attempt gives its place to another one's turn no sooner than after so long, and so long again for each time its job did.
    pub turn_run_ms: u64,
    /// Who takes turns and has waited so long, all of it together, goes first and gives its place to no turn; 0 = never.
    pub turn_wait_ms: u64,
}

/// A named order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum OrderBy {
    /// Tenants by guarantee and share; inside one by priority, then by the time waited over the likely run time.
    Fair,
    /// By priority, then by submission, whoever pays.
    Fifo,
}

impl OrderBy {
    pub const ALL: [OrderBy; 2] = [OrderBy::Fair, OrderBy::Fifo];

    pub fn name(self) -> &'static str {
        match self {
            OrderBy::Fair => "fair",
            OrderBy::Fifo => "fifo",
        }
    }
}

impl Default for Planning {
    fn default() -> Self {
        // EASY's one reservation; a week, after which nobody finds waiting for others' priorities fair.
        Self {
            order: OrderBy::Fair,
            reservations: 1,
            aged_after_ms: 7 * 24 * 3_600_000,
            // The planner chooses by what is lost, and what has just begun loses least: the budget alone ends a thrash.
            min_run_ms: 0,
            preemptions: 3,
            // A start takes milliseconds; a leader change in between takes seconds.
            claim_ms: 60_000,
            // Of the jobs of one large log nine in ten need less; half an hour makes up for a start of a minute.
            turn_gpu_ms: 12_000_000,
            turn_run_ms: 1_800_000,
            turn_wait_ms: 64 * 3_600_000,
        }
    }
}

/// Limits and waits that apply reads from the state; the defaults are design choices, explained beside each.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// Jobs that have not ended (memory: ~1 KiB each beyond their own bytes).
    pub live_jobs: u64,
    /// Tasks of one array that have started and not ended.
    pub array_open: u32,
    /// Bytes of one body; the wire's message limit is 4 MiB, an entry's 320 KiB.
    pub body_bytes: u64,
    /// Bytes of all live bodies together.
    pub bodies_bytes: u64,
    pub labels: u32,
    pub label_bytes: u32,
    pub name_bytes: u32,
    pub nodes: u32,
    pub leases_per_node: u32,
    pub parts_per_lease: u32,
    pub ranks_per_lease: u32,
    pub classes: u32,
    pub sessions: u32,
    pub locks: u32,
    pub lock_name_bytes: u32,
    pub lock_waiters: u32,
    /// Request ids in memory; above it the oldest buckets go early.
    pub requests: u64,
    /// How long a request id is remembered, in ms of cluster time.
    pub request_keep_ms: u64,
    /// ... and how long at least, whatever the load.
    pub request_keep_least_ms: u64,
    /// How far a request id's own time may lie in the future, in ms.
    pub request_future_ms: u64,
    /// A finished job stays in memory this long, in ms.
    pub linger_ms: u64,
    /// Finished jobs leave history after this long, in ms of cluster time.
    pub history_keep_ms: u64,
    pub lease_ttl_min_ms: u64,
    pub lease_ttl_max_ms: u64,
    /// From the grant until every part must have started, in ms.
    pub start_timeout_ms: u64,
    /// Excused attempts (lost node, launch by the node's fault, GPU fault) in a row before the job is held.
    pub excused_in_row: u16,
    pub excused_in_sum: u16,
    /// Launches of that many different jobs failing by a node's fault take the node out.
    pub node_launch_fails: u8,
    /// Events kept in memory for watches.
    pub event_ring: u32,
    /// Removed ones included.
    pub tenants: u32,
    /// Past usage counts half after this long, in ms of cluster time.
    pub usage_half_life_ms: u64,
    pub chore_steps: u32,
    pub timers_per_entry: u32,
    pub planning: Planning,
}

impl Default for Settings {
    fn default() -> Self {
        const MIN: u64 = 60_000;
        const HOUR: u64 = 60 * MIN;
        Self {
            live_jobs: 1_000_000,
            array_open: 100_000,
            body_bytes: 256 << 10,
            bodies_bytes: 1 << 30,
            labels: 32,
            label_bytes: 128,
            name_bytes: 128,
            nodes: 20_000,
            leases_per_node: 512,
            parts_per_lease: 2_048,
            ranks_per_lease: 65_536,
            classes: 1_024,
            sessions: 100_000,
            locks: 100_000,
            lock_name_bytes: 256,
            lock_waiters: 1_024,
            requests: 4_000_000,
            request_keep_ms: 24 * HOUR,
            request_keep_least_ms: 15 * MIN,
            request_future_ms: 15 * MIN,
            linger_ms: 5 * MIN,
            history_keep_ms: 90 * 24 * HOUR,
            lease_ttl_min_ms: 10_000,
            lease_ttl_max_ms: 24 * HOUR,
            start_timeout_ms: MIN,
            excused_in_row: 20,
            excused_in_sum: 100,
            node_launch_fails: 3,
            event_ring: 65_536,
            tenants: 10_000,
            usage_half_life_ms: 7 * 24 * HOUR,
            chore_steps: 1_000,
            timers_per_entry: 1_000,
            planning: Planning::default(),
        }
    }
}
