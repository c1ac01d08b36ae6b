//! SetPolicy: in which order what waits is looked at, and what is protected from whom.
//!
//! Refuses INVALID_SPEC with all that is wrong at once. Changes no key.

use super::{DONE, submit};
use crate::command::{Code, Rejection, Reply, SetPolicy};
use crate::settings::Planning;
use crate::state::State;

/// Reservations of a pool: each costs the planner a look at every machine.
pub(crate) const RESERVATIONS: u32 = 64;
/// The shortest age that raises a task, in ms.
pub(crate) const LEAST_AGE_MS: u64 = 60_000;
/// The longest time in which an attempt makes room for nobody: a month.
const MIN_RUN_MS: u64 = 31 * 24 * 3_600_000;
/// As often as a job can be preempted at all.
const PREEMPTIONS: u32 = 1_000;
/// GPU time of a turn: a year of a thousand GPUs.
const TURN_GPU_MS: u64 = 1_000 * 366 * 24 * 3_600_000;
/// A turn shorter than a second would be spent on starts.
const TURN_RUN_MS: std::ops::RangeInclusive<u64> = 1_000..=MIN_RUN_MS;
/// A claim takes GPUs from everybody: at least as long as a start takes, at most an hour.
const CLAIM_MS: std::ops::RangeInclusive<u64> = 1_000..=3_600_000;

pub(super) fn set(state: &mut State, set: &SetPolicy) -> Result<Reply, Rejection> {
    let now = &state.meta.settings.planning;
    let planning = Planning {
        order: set.order.unwrap_or(now.order),
        reservations: set.reservations.unwrap_or(now.reservations),
        aged_after_ms: set.aged_after_ms.unwrap_or(now.aged_after_ms),
        min_run_ms: set.min_run_ms.unwrap_or(now.min_run_ms),
        preemptions: set.preemptions.unwrap_or(now.preemptions),
        claim_ms: set.claim_ms.unwrap_or(now.claim_ms),
        turn_gpu_ms: set.turn_gpu_ms.unwrap_or(now.turn_gpu_ms),
        turn_run_ms: set.turn_run_ms.unwrap_or(now.turn_run_ms),
        turn_wait_ms: set.turn_wait_ms.unwrap_or(now.turn_wait_ms),
    };
    let wrong = planning.wrong();
    if !wrong.is_empty() {
        return Err(Rejection::new(Code::InvalidSpec, wrong.join("; ")));
    }
    state.meta.settings.planning = planning;
    state.meta.policy = state.meta.policy.saturating_add(1);
    DONE
}

impl Planning {
    /// What is out of bounds, and the bounds.
    pub(crate) fn wrong(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        if self.reservations > RESERVATIONS {
            wrong.push(format!("reservations is {}, the limit is {RESERVATIONS}", self.reservations));
        }
        let most = submit::MAX_LIMIT_MS;
        for (name, age) in [("aged_after_ms", self.aged_after_ms), ("turn_wait_ms", self.turn_wait_ms)] {
            if age != 0 && !(LEAST_AGE_MS..=most).contains(&age) {
                wrong.push(format!("{name} is {age}, must be {LEAST_AGE_MS} to {most}, or 0 for never"));
            }
        }
        if self.min_run_ms > MIN_RUN_MS {
            wrong.push(format!("min_run_ms is {}, the limit is {MIN_RUN_MS}", self.min_run_ms));
        }
        if self.preemptions > PREEMPTIONS {
            wrong.push(format!("preemptions is {}, the limit is {PREEMPTIONS}", self.preemptions));
        }
        if !CLAIM_MS.contains(&self.claim_ms) {
            let (least, most) = (CLAIM_MS.start(), CLAIM_MS.end());
            wrong.push(format!("claim_ms is {}, must be {least} to {most}", self.claim_ms));
        }
        if self.turn_gpu_ms > TURN_GPU_MS {
            wrong.push(format!("turn_gpu_ms is {}, the limit is {TURN_GPU_MS}", self.turn_gpu_ms));
        }
        if !TURN_RUN_MS.contains(&self.turn_run_ms) {
            let (least, most) = (TURN_RUN_MS.start(), TURN_RUN_MS.end());
            wrong.push(format!("turn_run_ms is {}, must be {least} to {most}", self.turn_run_ms));
        }
        wrong
    }
}
