//! The one clock of leases on a machine: CLOCK_BOOTTIME in milliseconds, which counts the time a machine was suspended.
//! The pure steps take `now` as an argument; only the shells around them read it here.

use rustix::time::{ClockId, clock_gettime};

/// Milliseconds since boot, suspended time included.
pub fn boot_ms() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    now.tv_sec as u64 * 1_000 + now.tv_nsec as u64 / 1_000_000
}

/// Milliseconds since 1970, for display only.
pub fn wall_ms() -> u64 {
    let now = clock_gettime(ClockId::Realtime);
    now.tv_sec as u64 * 1_000 + now.tv_nsec as u64 / 1_000_000
}
