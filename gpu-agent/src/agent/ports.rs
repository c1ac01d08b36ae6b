//! MASTER_PORT: probed from a range below the ephemeral ports, and, for a gang over several machines, kept bound from
//! Prepared until the barrier opens.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, TcpListener};
use std::ops::RangeInclusive;

/// Below Linux's default ephemeral range (32768 and up), beside the port that torchrun uses by habit.
pub const DEFAULT: RangeInclusive<u16> = 29_500..=32_499;

pub struct Ports {
    range: RangeInclusive<u16>,
    reserved: BTreeMap<u64, TcpListener>,
}

impl Ports {
    pub fn new(range: RangeInclusive<u16>) -> Self {
        Self { range, reserved: BTreeMap::new() }
    }

    /// A port that nobody listens on, and that none of `taken` has; `None` = all are busy. Where it begins to look
    /// depends on the token, so that agents sharing a machine rarely meet. `keep`: stays bound until [`Ports::free`].
    pub fn choose(&mut self, token: u64, taken: impl Fn(u16) -> bool, keep: bool) -> Option<u16> {
        let (first, count) = (*self.range.start(), self.range.len() as u64);
        let start = token.wrapping_mul(0x9e37_79b9_7f4a_7c15) % count.max(1);
        for i in 0..count {
            let port = first + ((start + i) % count) as u16;
            if taken(port) {
                continue;
            }
            if let Ok(listener) = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)) {
                if keep {
                    self.reserved.insert(token, listener);
                }
                return Some(port);
            }
        }
        None
    }

    pub fn free(&mut self, token: u64) {
        self.reserved.remove(&token);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kept_port_is_not_chosen_again_until_it_is_freed() {
        let probe = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
        let port = probe.local_addr().unwrap().port();
        let mut ports = Ports::new(port..=port);
        assert_eq!(ports.choose(1, |_| false, true), None, "somebody listens on it");
        drop(probe);
        assert_eq!(ports.choose(1, |_| false, true), Some(port));
        assert_eq!(ports.choose(2, |_| false, true), None);
        ports.free(1);
        assert_eq!(ports.choose(2, |_| true, false), None, "a live attempt has it");
        assert_eq!(ports.choose(2, |_| false, false), Some(port));
    }
}
