//! The one clock of leases on a machine: CLOCK_BOOTTIME in milliseconds, which counts the time a machine was suspended.
//! The pure steps take `now` as an argument; only the shells around them read it here.

use planted::{Bug, planted};
use rustix::time::{ClockId, clock_gettime};

/// Milliseconds since boot, suspended time included.
pub fn boot_ms() -> u64 {
    let ms = |clock| {
        let now = clock_gettime(clock);
        now.tv_sec as u64 * 1_000 + now.tv_nsec as u64 / 1_000_000
    };
    of_deadlines(|| ms(ClockId::Boottime), || ms(ClockId::Monotonic))
}

/// Which of a machine's clocks deadlines are counted by: the one that counts the time in suspension.
pub fn of_deadlines(boot_ms: impl FnOnce() -> u64, monotonic_ms: impl FnOnce() -> u64) -> u64 {
    if planted(Bug::MonotonicClock) { monotonic_ms() } else { boot_ms() }
}

/// Milliseconds since 1970, for display only.
pub fn wall_ms() -> u64 {
    let now = clock_gettime(ClockId::Realtime);
    now.tv_sec as u64 * 1_000 + now.tv_nsec as u64 / 1_000_000
}
