//! The faults of a run, as a schedule: what happens at which time. A seed draws one; a shrunk failure is one that was written down.

use serde::{Deserialize, Serialize};

use super::random::Rng;
use super::setup::Setup;

/// One fault. Replicas and agents by number; times in ms.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fault {
    /// This share of messages, in thousandths, gets lost.
    Loss {
        permille: u64,
        for_ms: u64,
    },
    /// Messages take this long more, with a heavy tail.
    Delay {
        mean_ms: u64,
        for_ms: u64,
    },
    /// This share of requests arrives twice, the second time late.
    Duplicate {
        permille: u64,
        for_ms: u64,
    },
    /// The leader alone, or with the agents whose number is in `with` (modulo 4).
    IsolateLeader {
        with: u64,
        for_ms: u64,
    },
    /// What this replica sends to replicas arrives nowhere.
    Mute {
        replica: usize,
        for_ms: u64,
    },
    /// Replicas of the mask see only each other.
    Halves {
        mask: u64,
        for_ms: u64,
    },
    /// An agent sees every replica but the leader.
    FollowersOnly {
        agent: usize,
        for_ms: u64,
    },
    /// What is sent to this agent is lost; what it sends arrives.
    DeafAgent {
        agent: usize,
        for_ms: u64,
    },
    /// What this agent sends is lost; what is sent to it arrives.
    MuteAgent {
        agent: usize,
        for_ms: u64,
    },
    /// What the leader says to this agent takes so much longer; then the agent is mute, and the last words still arrive.
    SlowWords {
        agent: usize,
        by_ms: u64,
        for_ms: u64,
    },
    /// This agent, or one that is about to start something, is parted from all until the end of its leases is due, while the leader's
    /// disk gets slow; it is heard for a moment then, and parted again.
    LateWord {
        agent: usize,
        by_ms: u64,
        for_ms: u64,
    },
    /// Users reach only the replica that leads now.
    UsersSeeOne {
        for_ms: u64,
    },
    CrashReplica {
        replica: usize,
        for_ms: u64,
    },
    CrashLeader {
        for_ms: u64,
    },
    PauseReplica {
        replica: usize,
        for_ms: u64,
    },
    PauseLeader {
        for_ms: u64,
    },
    /// Away for so long that its log was purged: it comes back by a snapshot.
    Outage {
        replica: usize,
        for_ms: u64,
    },
    /// An operator moves the leadership.
    Transfer,
    /// Fsync takes so much longer on the leader.
    SlowDisk {
        by_ms: u64,
        for_ms: u64,
    },
    /// A replica's wall clock leaps.
    WallLeap {
        replica: usize,
        by_ms: i64,
    },
    CrashAgent {
        agent: usize,
        for_ms: u64,
    },
    PauseAgent {
        agent: usize,
        for_ms: u64,
    },
    /// The whole machine sleeps: nothing runs there, its boot clock goes on.
    Suspend {
        agent: usize,
        for_ms: u64,
    },
    /// The machine's power fails, and comes back.
    Reboot {
        agent: usize,
        for_ms: u64,
    },
    /// A shim of the machine is killed.
    KillShim {
        agent: usize,
        nth: u64,
    },
    /// Agent and shims of the machine are killed together.
    KillAll {
        agent: usize,
        for_ms: u64,
    },
    /// SIGKILL takes so long to work on this machine.
    Stubborn {
        agent: usize,
        by_ms: u64,
        for_ms: u64,
    },
    /// The agent finds its fence file damaged when it starts again.
    LoseFence {
        agent: usize,
    },
    /// The driver says that a GPU fell off the bus.
    LoseGpu {
        agent: usize,
        slot: u64,
    },
    /// Launches on this machine fail by its own fault.
    BadMachine {
        agent: usize,
        for_ms: u64,
    },
    /// The leaders' planner is wrong: it puts gangs on machines drawn at random.
    WrongPlanner {
        for_ms: u64,
    },
    /// An operator takes the node out, and back in after a while.
    Drain {
        agent: usize,
        evict_ms: u64,
        for_ms: u64,
    },
}

impl Fault {
    /// The word of its kind, as `--only` and the report have it.
    pub fn kind(&self) -> &'static str {
        match self {
            Fault::Loss { .. } => "loss",
            Fault::Delay { .. } => "delay",
            Fault::Duplicate { .. } => "duplicate",
            Fault::IsolateLeader { .. } => "isolate_leader",
            Fault::Mute { .. } => "mute",
            Fault::Halves { .. } => "halves",
            Fault::FollowersOnly { .. } => "followers_only",
            Fault::DeafAgent { .. } => "deaf_agent",
            Fault::MuteAgent { .. } => "mute_agent",
            Fault::SlowWords { .. } => "slow_words",
            Fault::LateWord { .. } => "late_word",
            Fault::UsersSeeOne { .. } => "users_see_one",
            Fault::CrashReplica { .. } => "crash_replica",
            Fault::CrashLeader { .. } => "crash_leader",
            Fault::PauseReplica { .. } => "pause_replica",
            Fault::PauseLeader { .. } => "pause_leader",
            Fault::Outage { .. } => "outage",
            Fault::Transfer => "transfer",
            Fault::SlowDisk { .. } => "slow_disk",
            Fault::WallLeap { .. } => "wall_leap",
            Fault::CrashAgent { .. } => "crash_agent",
            Fault::PauseAgent { .. } => "pause_agent",
            Fault::Suspend { .. } => "suspend",
            Fault::Reboot { .. } => "reboot",
            Fault::KillShim { .. } => "kill_shim",
            Fault::KillAll { .. } => "kill_all",
            Fault::Stubborn { .. } => "stubborn",
            Fault::LoseFence { .. } => "lose_fence",
            Fault::LoseGpu { .. } => "lose_gpu",
            Fault::BadMachine { .. } => "bad_machine",
            Fault::WrongPlanner { .. } => "wrong_planner",
            Fault::Drain { .. } => "drain",
        }
    }

    /// How long it lasts; 0 = it is an event.
    pub fn lasts_ms(&self) -> u64 {
        match self {
            Fault::Loss { for_ms, .. }
            | Fault::Delay { for_ms, .. }
            | Fault::Duplicate { for_ms, .. }
            | Fault::IsolateLeader { for_ms, .. }
            | Fault::Mute { for_ms, .. }
            | Fault::Halves { for_ms, .. }
            | Fault::FollowersOnly { for_ms, .. }
            | Fault::DeafAgent { for_ms, .. }
            | Fault::MuteAgent { for_ms, .. }
            | Fault::SlowWords { for_ms, .. }
            | Fault::LateWord { for_ms, .. }
            | Fault::UsersSeeOne { for_ms }
            | Fault::CrashReplica { for_ms, .. }
            | Fault::CrashLeader { for_ms }
            | Fault::PauseReplica { for_ms, .. }
            | Fault::PauseLeader { for_ms }
            | Fault::Outage { for_ms, .. }
            | Fault::SlowDisk { for_ms, .. }
            | Fault::CrashAgent { for_ms, .. }
            | Fault::PauseAgent { for_ms, .. }
            | Fault::Suspend { for_ms, .. }
            | Fault::Reboot { for_ms, .. }
            | Fault::KillAll { for_ms, .. }
            | Fault::Stubborn { for_ms, .. }
            | Fault::BadMachine { for_ms, .. }
            | Fault::WrongPlanner { for_ms }
            | Fault::Drain { for_ms, .. } => *for_ms,
            Fault::Transfer
            | Fault::WallLeap { .. }
            | Fault::KillShim { .. }
            | Fault::LoseFence { .. }
            | Fault::LoseGpu { .. } => 0,
        }
    }
}

/// A fault and when it strikes, in ms from the beginning of the run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timed {
    pub at_ms: u64,
    pub fault: Fault,
}

/// Every kind, in the order in which a seed is asked for it.
pub const KINDS: &[&str] = &[
    "loss",
    "delay",
    "duplicate",
    "isolate_leader",
    "mute",
    "halves",
    "followers_only",
    "deaf_agent",
    "mute_agent",
    "slow_words",
    "late_word",
    "users_see_one",
    "crash_replica",
    "crash_leader",
    "pause_replica",
    "pause_leader",
    "outage",
    "transfer",
    "slow_disk",
    "wall_leap",
    "crash_agent",
    "pause_agent",
    "suspend",
    "reboot",
    "kill_shim",
    "kill_all",
    "stubborn",
    "lose_fence",
    "lose_gpu",
    "bad_machine",
    "wrong_planner",
    "drain",
];

/// The seed's swarm: a random subset of the kinds, each with its own rate. At least five kinds and ten faults, if `only` names no
/// fewer.
pub fn draw(setup: &Setup, only: &[String]) -> Vec<Timed> {
    let mut rng = Rng::new(setup.seed, 2);
    let allowed: Vec<&'static str> =
        KINDS.iter().copied().filter(|kind| only.is_empty() || only.iter().any(|word| word == kind)).collect();
    let mut kinds: Vec<&'static str> = allowed.iter().copied().filter(|_| rng.chance(350)).collect();
    while kinds.len() < allowed.len().min(6) {
        let more = rng.pick(&allowed);
        if !kinds.contains(&more) {
            kinds.push(more);
        }
    }
    let mut faults = Vec::new();
    for kind in kinds {
        let often = rng.range(3, 7);
        faults.extend((0..often).map(|_| {
            // Long runs are long for the clocks' sake: their faults come in one stretch.
            let at_ms = rng.range(1_500, setup.busy_ms.saturating_sub(4_000).max(2_000));
            Timed { at_ms, fault: one(kind, setup, &mut rng) }
        }));
    }
    faults.sort_by_key(|timed| timed.at_ms);
    faults
}

fn one(kind: &str, setup: &Setup, rng: &mut Rng) -> Fault {
    let replica = rng.below(setup.replicas as u64) as usize;
    let agent = rng.below(setup.agents as u64) as usize;
    let short = rng.range(100, 4_000);
    let long = rng.range(1_000, 25_000);
    match kind {
        "loss" => Fault::Loss { permille: rng.range(10, 300), for_ms: long },
        "delay" => Fault::Delay { mean_ms: rng.range(5, 400), for_ms: long },
        "duplicate" => Fault::Duplicate { permille: rng.range(50, 400), for_ms: long },
        "isolate_leader" => Fault::IsolateLeader { with: rng.below(16), for_ms: long },
        "mute" => Fault::Mute { replica, for_ms: short },
        "halves" => Fault::Halves { mask: rng.range(1, (1 << setup.replicas) - 2), for_ms: long / 2 },
        "followers_only" => Fault::FollowersOnly { agent, for_ms: long },
        "deaf_agent" => Fault::DeafAgent { agent, for_ms: long },
        "mute_agent" => Fault::MuteAgent { agent, for_ms: long },
        "slow_words" => Fault::SlowWords { agent, by_ms: rng.range(2_200, 5_800), for_ms: long / 2 },
        // The shortest lease, its drift bound and the margin after the last heartbeat, which was up to one interval ago.
        "late_word" => Fault::LateWord { agent, by_ms: rng.range(2_500, 4_500), for_ms: rng.range(10_500, 14_500) },
        "users_see_one" => Fault::UsersSeeOne { for_ms: long },
        "crash_replica" => Fault::CrashReplica { replica, for_ms: short },
        "crash_leader" => Fault::CrashLeader { for_ms: short },
        "pause_replica" => Fault::PauseReplica { replica, for_ms: long / 2 },
        "pause_leader" => Fault::PauseLeader { for_ms: long },
        "outage" => Fault::Outage { replica, for_ms: rng.range(10_000, 25_000) },
        "transfer" => Fault::Transfer,
        "slow_disk" => Fault::SlowDisk { by_ms: rng.range(50, 2_000), for_ms: long / 2 },
        "wall_leap" => Fault::WallLeap { replica, by_ms: rng.range(0, 7_200_000) as i64 - 3_600_000 },
        "crash_agent" => Fault::CrashAgent { agent, for_ms: rng.pick(&[200, 1_000, 5_000, 16_000, 30_000]) },
        "pause_agent" => Fault::PauseAgent { agent, for_ms: rng.pick(&[500, 4_000, 12_000, 20_000]) },
        "suspend" => Fault::Suspend { agent, for_ms: rng.pick(&[3_000, 12_000, 16_000, 25_000]) },
        "reboot" => Fault::Reboot { agent, for_ms: rng.range(2_000, 20_000) },
        "kill_shim" => Fault::KillShim { agent, nth: rng.below(4) },
        "kill_all" => Fault::KillAll { agent, for_ms: rng.range(500, 20_000) },
        "stubborn" => {
            let in_bounds = rng.chance(700);
            let by_ms = if in_bounds { rng.range(200, 1_500) } else { rng.range(5_000, 30_000) };
            Fault::Stubborn { agent, by_ms, for_ms: long }
        }
        "lose_fence" => Fault::LoseFence { agent },
        "lose_gpu" => Fault::LoseGpu { agent, slot: rng.below(8) },
        "bad_machine" => Fault::BadMachine { agent, for_ms: long },
        "wrong_planner" => Fault::WrongPlanner { for_ms: long },
        _ => Fault::Drain { agent, evict_ms: rng.pick(&[0, 2_000, 60_000]), for_ms: long },
    }
}
