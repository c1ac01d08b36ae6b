//! What a choice of GPUs is worth, in words: for `ares topology` and for the "why" of a placement. No decisions here.

use std::fmt::Write;

use statemachine::record::PciClass;

use crate::bandwidth::{BandwidthTable, NO_COMMUNICATION};
use crate::choose::best_mbps;
use crate::links::{Mask, slots};

/// A link between two neighbours of a ring, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum LinkKind {
    Switch,
    /// Direct NVLinks, that many; fewer is worse.
    NvLink(std::cmp::Reverse<u8>),
    Pci(PciClass),
}

impl std::fmt::Display for LinkKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            LinkKind::Switch => f.write_str("NVSwitch"),
            LinkKind::NvLink(links) => write!(f, "NV{}", links.0),
            LinkKind::Pci(class) => f.write_str(pci_name(*class)),
        }
    }
}

/// The name that `nvidia-smi topo -m` gives a PCIe class.
pub fn pci_name(class: PciClass) -> &'static str {
    match class {
        PciClass::Same => "PSB",
        PciClass::Pix => "PIX",
        PciClass::Pxb => "PXB",
        PciClass::Phb => "PHB",
        PciClass::Node => "NODE",
        PciClass::Sys => "SYS",
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prediction {
    /// Predicted all-reduce bus bandwidth in MB/s; `None` for less than two GPUs, which have no traffic between them.
    pub mbps: Option<u32>,
    /// The worst link of the ring; `None` for less than two GPUs.
    pub worst: Option<LinkKind>,
    pub numa_domains: u32,
    /// One line: the GPUs, their worst link, the bandwidth, and how it compares with the machine's best.
    pub text: String,
}

/// Describes a set of GPUs of one machine.
pub fn predict(table: &BandwidthTable, set: Mask) -> Prediction {
    let links = table.links();
    let set = set & links.all();
    let mbps = Some(table.mbps(set)).filter(|mbps| *mbps != NO_COMMUNICATION && set != 0);
    let worst = worst_link(table, set);
    let numa_domains = links.domains(set);
    let text = match (mbps, worst) {
        (Some(mbps), Some(worst)) => describe(table, set, mbps, worst),
        _ if set == 0 => "no GPUs".to_owned(),
        _ => format!("{}: alone, no traffic between GPUs", gpu_list(set)),
    };
    Prediction { mbps, worst, numa_domains, text }
}

fn describe(table: &BandwidthTable, set: Mask, mbps: u32, worst: LinkKind) -> String {
    let gpus = set.count_ones();
    let form = match (worst, gpus) {
        (LinkKind::Switch, _) => "through NVSwitch".to_owned(),
        (_, 2) => format!("{worst} pair"),
        _ => format!("ring with {worst} as its worst link"),
    };
    let best = best_mbps(table, table.links().all(), gpus).unwrap_or(mbps);
    let compared = match gpus {
        _ if gpus as usize == table.links().gpus() => "the whole machine".to_owned(),
        2 if best / 1_000 <= mbps / 1_000 => "no pair of this machine is better".to_owned(),
        _ if best / 1_000 <= mbps / 1_000 => format!("no {gpus} GPUs of this machine are better"),
        _ => format!("the best {gpus} of this machine reach {}", gbps(best)),
    };
    format!("{}: {form}, {} predicted; {compared}", gpu_list(set), gbps(mbps))
}

/// The worst link between neighbours of the ring.
fn worst_link(table: &BandwidthTable, set: Mask) -> Option<LinkKind> {
    let links = table.links();
    let ring = table.ring(set);
    if ring.len() < 2 {
        return None;
    }
    if links.inside_one_switch(set) {
        return Some(LinkKind::Switch);
    }
    let kinds = ring.iter().enumerate().map(|(position, &from)| {
        let to = ring[(position + 1) % ring.len()];
        match links.nvlinks(from, to) {
            0 => LinkKind::Pci(links.pci(from, to)),
            count => LinkKind::NvLink(std::cmp::Reverse(count)),
        }
    });
    kinds.max()
}

/// What a job's GPUs on one of several machines can send to the others: the sum over the distinct NICs nearest to the
/// set of what each gets across its PCIe path, in MB/s. 0 without NICs.
pub fn network_mbps(table: &BandwidthTable, set: Mask) -> u32 {
    let nics = &table.links().facts().nics;
    let reached = table.links().nearest_nics(set).into_iter().map(|(index, class)| {
        let tenths = match class {
            PciClass::Same | PciClass::Pix | PciClass::Pxb => 10,
            PciClass::Phb | PciClass::Node => 8,
            PciClass::Sys => 5,
        };
        nics[index].mbps / 10 * tenths
    });
    reached.fold(0, u32::saturating_add)
}

/// "GPU 2" or "GPUs 0,1,4".
pub fn gpu_list(set: Mask) -> String {
    let mut text = String::from(if set.count_ones() == 1 { "GPU " } else { "GPUs " });
    for (position, slot) in slots(set).enumerate() {
        let comma = if position > 0 { "," } else { "" };
        let _ = write!(text, "{comma}{slot}");
    }
    text
}

/// MB/s as GB/s: whole where it is whole or at least 100, else with one decimal.
pub fn gbps(mbps: u32) -> String {
    let tenths = (u64::from(mbps) + 50) / 100;
    if tenths % 10 == 0 || tenths >= 1_000 {
        format!("{} GB/s", (tenths + 5) / 10)
    } else {
        format!("{}.{} GB/s", tenths / 10, tenths % 10)
    }
}
