//! When the next attempt may start: backoff with jitter, in integers.

use planted::{Bug, planted};

use crate::id::TaskKey;
use crate::spec::Retry;

/// The wait before the `nth` retry (from 1), in ms: min(initial x multiplier^(n-1), max), then +-25 % drawn from
/// `(salt, task, attempt)`. The same on every replica.
pub(crate) fn backoff_ms(retry: &Retry, nth: u32, salt: u64, task: TaskKey, attempt: u32) -> u64 {
    let base = base_ms(retry, nth);
    base - base / 4 + jitter(salt, task, attempt) % (base / 2 + 1)
}

fn base_ms(retry: &Retry, nth: u32) -> u64 {
    let mut wait = retry.initial_ms.min(retry.max_ms);
    for _ in 1..nth {
        let next = u128::from(wait) * u128::from(retry.mult_milli) / 1_000;
        let next = u64::try_from(next).unwrap_or(u64::MAX).min(retry.max_ms);
        if next == wait {
            break;
        }
        wait = next;
    }
    wait
}

fn jitter(salt: u64, task: TaskKey, attempt: u32) -> u64 {
    let mut bytes = [0u8; 24];
    let salt = if planted(Bug::RandomInApply) { planted::process_memory() } else { salt };
    bytes[..8].copy_from_slice(&salt.to_le_bytes());
    bytes[8..16].copy_from_slice(&task.job.0.to_le_bytes());
    bytes[16..20].copy_from_slice(&task.index.to_le_bytes());
    bytes[20..].copy_from_slice(&attempt.to_le_bytes());
    xxhash_rust::xxh3::xxh3_64(&bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::default_retry;
    use crate::id::JobId;

    #[test]
    fn backoff_doubles_up_to_its_maximum() {
        let retry = default_retry();
        let bases: Vec<u64> = [1, 2, 3, 9, 10, 65_535].iter().map(|nth| base_ms(&retry, *nth)).collect();
        assert_eq!(bases, [1_000, 2_000, 4_000, 256_000, 300_000, 300_000]);
    }

    #[test]
    fn jitter_stays_within_a_quarter_and_differs_by_salt() {
        let retry = default_retry();
        let waits: Vec<u64> = (0..500).map(|salt| backoff_ms(&retry, 3, salt, TaskKey::only(JobId(7)), 3)).collect();
        assert!(waits.iter().all(|wait| (3_000..=5_000).contains(wait)));
        assert!(waits.iter().any(|wait| *wait < 3_500) && waits.iter().any(|wait| *wait > 4_500));
    }

    #[test]
    fn extreme_settings_do_not_overflow() {
        let retry = Retry { max: 9, initial_ms: u64::MAX, mult_milli: u32::MAX, max_ms: u64::MAX, on_exit: [].into() };
        assert!(backoff_ms(&retry, u32::MAX, 1, TaskKey::only(JobId(u64::MAX)), u32::MAX) > u64::MAX / 2);
    }
}
