//! The policy `points`: the scoring of the first Ares, kept to compare with. It counts links by kind and knows neither
//! their speed nor where the sockets are; what is predicted of a set is `bandwidth`, the default choice is `choose`.

use crate::choose::subsets;
use crate::links::{Links, Mask, slots};

/// Machines up to this size are compared set by set (12,870 sets at most).
pub const MOST_GPUS: usize = 16;

/// For a pair that is joined by NVLink.
const NVLINK: i32 = 50;
/// For a pair that is joined by PCIe alone.
const PCIE: i32 = -30;
/// For a pair with consecutive indices.
const CONSECUTIVE: i32 = 10;

/// The points of a set: the sum over its pairs.
pub fn points(links: &Links, set: Mask) -> i32 {
    let pairs = slots(set).flat_map(|a| slots(set).filter(move |b| a < *b).map(move |b| (a, b)));
    pairs.map(|(a, b)| of_pair(links, a, b)).sum()
}

fn of_pair(links: &Links, a: u8, b: u8) -> i32 {
    let joined = if links.nvlinks(a, b) > 0 { NVLINK } else { PCIE };
    joined + if a.abs_diff(b) == 1 { CONSECUTIVE } else { 0 }
}

/// The set of `gpus` free slots with the most points, the first in PCI order of equals, and its points. `None` where
/// fewer are free, and on machines of more than `MOST_GPUS`.
pub fn choose_by_points(links: &Links, free: Mask, gpus: u32) -> Option<(Mask, i32)> {
    if links.gpus() > MOST_GPUS || gpus == 0 {
        return None;
    }
    let scored = subsets(free & links.all(), gpus).into_iter().map(|set| (set, points(links, set)));
    scored.reduce(|best, next| if next.1 > best.1 { next } else { best })
}
