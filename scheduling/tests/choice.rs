//! Random small machines: the prediction against a naive evaluation of the model, and the choice against all sets.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use proptest::prelude::*;
use scheduling::bandwidth::{BandwidthTable, NO_COMMUNICATION};
use scheduling::choose::{Shortage, Want, choose, subsets};
use scheduling::links::{Links, Mask, first, slots};
use scheduling::points::{choose_by_points, points};
use statemachine::record::{Class, Nic, PciClass};

const LINK: u32 = 20_000;

/// Machines of 2 to 6 GPUs with any links, on one to three sockets.
fn machines() -> impl Strategy<Value = Class> {
    (2u8..=6).prop_flat_map(|gpus| {
        let pairs = usize::from(gpus) * usize::from(gpus - 1) / 2;
        (
            prop::collection::vec(prop_oneof![3 => Just(0u8), 2 => Just(1), 1 => Just(2)], pairs),
            prop::collection::vec(0u8..6, pairs),
            prop::collection::vec(0u8..3, usize::from(gpus)),
            prop::collection::vec(0u8..6, usize::from(gpus)),
            any::<(bool, bool)>(),
            prop_oneof![Just(12_000u32), Just(24_000)],
        )
            .prop_map(move |(links, classes, numa, nic, (intel_cpu, p2p), pcie_mbps)| {
                let n = usize::from(gpus);
                let (mut nvlinks, mut pci) = (vec![0; n * n], vec![PciClass::Same; n * n]);
                let mut pair = 0;
                for a in 0..n {
                    for b in a + 1..n {
                        let class = class_of(classes[pair], numa[a] == numa[b]);
                        for (i, j) in [(a, b), (b, a)] {
                            nvlinks[i * n + j] = links[pair];
                            pci[i * n + j] = class;
                        }
                        pair += 1;
                    }
                }
                let nics = vec![Nic {
                    name: "mlx5_0".into(),
                    mbps: 24_000,
                    class_to_gpu: nic.iter().map(|class| class_of(*class, true)).collect(),
                }];
                Class {
                    gpus,
                    nvlinks,
                    pci,
                    nvlink_mbps_per_link: LINK,
                    nvswitch: false,
                    pcie_mbps,
                    inter_socket_mbps: 10_000,
                    intel_cpu,
                    p2p,
                    numa,
                    nics,
                }
            })
    })
}

fn class_of(number: u8, one_socket: bool) -> PciClass {
    match number {
        _ if !one_socket => PciClass::Sys,
        0 => PciClass::Pix,
        1 => PciClass::Pxb,
        2 => PciClass::Phb,
        3 | 4 => PciClass::Node,
        _ => PciClass::Sys,
    }
}

fn permutations(items: &[u8]) -> Vec<Vec<u8>> {
    if items.is_empty() {
        return vec![vec![]];
    }
    let mut all = Vec::new();
    for (place, item) in items.iter().enumerate() {
        let mut rest = items.to_vec();
        rest.remove(place);
        all.extend(permutations(&rest).into_iter().map(|mut tail| {
            tail.insert(0, *item);
            tail
        }));
    }
    all
}

/// Every directed cycle once, from its lowest GPU.
fn cycles(set: Mask) -> Vec<Vec<u8>> {
    let gpus: Vec<u8> = slots(set).collect();
    let with_start = |mut tail: Vec<u8>| {
        tail.insert(0, gpus[0]);
        tail
    };
    permutations(&gpus[1..]).into_iter().map(with_start).collect()
}

fn hops(cycle: &[u8]) -> Vec<(u8, u8)> {
    (0..cycle.len()).map(|i| (cycle[i], cycle[(i + 1) % cycle.len()])).collect()
}

/// The mixed ring as the model's text says it, resource by resource, over all directed cycles.
fn naive_ring(links: &Links, set: Mask) -> f64 {
    let facts = links.facts();
    let one = |cycle: &Vec<u8>| {
        let mut load: BTreeMap<String, f64> = BTreeMap::new();
        let mut cross = |name: String, capacity: f64| *load.entry(name).or_default() += 1.0 / capacity;
        for (from, to) in hops(cycle) {
            let nv = links.nvlinks(from, to);
            if nv > 0 {
                cross(format!("nv {from}->{to}"), f64::from(nv) * f64::from(LINK));
                continue;
            }
            let class = links.pci(from, to);
            let factor = match class {
                _ if !facts.p2p => 0.7,
                PciClass::Phb | PciClass::Node | PciClass::Sys if facts.intel_cpu => 1.0 / 1.2,
                _ => 1.0,
            };
            let capacity = f64::from(facts.pcie_mbps) * factor;
            cross(format!("out {from}"), capacity);
            cross(format!("in {to}"), capacity);
            for (level, groups) in [
                ("pix", [links.pix_group(from), links.pix_group(to)]),
                ("pxb", [links.pxb_group(from), links.pxb_group(to)]),
            ] {
                if groups[0] != groups[1] {
                    if groups[0].count_ones() > 1 {
                        cross(format!("up {level} {}", groups[0]), capacity);
                    }
                    if groups[1].count_ones() > 1 {
                        cross(format!("down {level} {}", groups[1]), capacity);
                    }
                }
            }
            let (here, there) = (links.numa(from), links.numa(to));
            if class == PciClass::Sys && here != there {
                let staged = if facts.p2p { 1.0 } else { 0.7 };
                cross(format!("sock {here}->{there}"), f64::from(facts.inter_socket_mbps) * staged);
            }
        }
        load.values().map(|load| 1.0 / load).fold(f64::INFINITY, f64::min)
    };
    cycles(set).iter().map(one).fold(0.0, f64::max)
}

/// The best packing of whole half-links into directed NVLink cycles, by trying everything: up to four GPUs the optimum
/// is a multiple of half a link.
fn naive_packing(links: &Links, set: Mask) -> f64 {
    let mut cycles = cycles(set);
    cycles.retain(|cycle| hops(cycle).iter().all(|(a, b)| links.nvlinks(*a, *b) > 0));
    let mut room: BTreeMap<(u8, u8), u32> = BTreeMap::new();
    for a in slots(set) {
        for b in slots(set).filter(|b| *b != a) {
            room.insert((a, b), 2 * u32::from(links.nvlinks(a, b)));
        }
    }
    f64::from(pack(&cycles, &mut room)) * f64::from(LINK) / 2.0
}

fn pack(cycles: &[Vec<u8>], room: &mut BTreeMap<(u8, u8), u32>) -> u32 {
    let Some((cycle, rest)) = cycles.split_first() else { return 0 };
    let mut best = pack(rest, room);
    let most = hops(cycle).iter().map(|hop| room[hop]).min().unwrap_or(0);
    for taken in 1..=most {
        for hop in hops(cycle) {
            *room.get_mut(&hop).unwrap() -= taken;
        }
        best = best.max(taken + pack(rest, room));
        for hop in hops(cycle) {
            *room.get_mut(&hop).unwrap() += taken;
        }
    }
    best
}

/// Sum of pair bandwidths over the best disjoint pairs, by trying everything.
fn naive_matching(table: &BandwidthTable, rest: Mask) -> u64 {
    let pairs = subsets(rest, 2);
    pairs
        .iter()
        .map(|pair| u64::from(table.mbps(*pair) / 1_000) + naive_matching(table, rest & !pair))
        .max()
        .unwrap_or(0)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn prediction_is_the_better_of_the_packing_and_the_ring(class in machines()) {
        let table = BandwidthTable::new(&class);
        for size in 2..=u32::from(class.gpus).min(5) {
            for set in subsets(table.links().all(), size) {
                let ring = naive_ring(table.links(), set);
                let predicted = f64::from(table.mbps(set));
                if size <= 4 {
                    let expected = ring.max(naive_packing(table.links(), set));
                    prop_assert!((predicted - expected).abs() <= 1.0, "{:?}: {predicted}, expected {expected}", slots(set).collect::<Vec<_>>());
                } else {
                    // Five GPUs: at least one cycle both ways, at most what leaves the poorest GPU.
                    let weakest = |cycle: &Vec<u8>| hops(cycle).iter().map(|(a, b)| table.links().nvlinks(*a, *b)).min().unwrap();
                    let cycle = cycles(set).iter().map(weakest).max().unwrap();
                    let poorest = slots(set).map(|a| slots(set).map(|b| u32::from(table.links().nvlinks(a, b))).sum::<u32>()).min().unwrap();
                    prop_assert!(predicted + 1.0 >= ring.max(2.0 * f64::from(cycle) * f64::from(LINK)));
                    prop_assert!(predicted <= ring.max(f64::from(poorest * LINK)) + 1.0);
                }
            }
        }
    }

    #[test]
    fn choice_is_optimal_for_any_free_set(class in machines(), free in any::<u8>(), several_nodes in any::<bool>()) {
        let table = BandwidthTable::new(&class);
        let links = table.links();
        let free = Mask::from(free) & links.all();
        for gpus in 1..=u32::from(class.gpus) {
            let want = Want { gpus, several_nodes, min_mbps: 0 };
            let all = subsets(free, gpus);
            let choice = match choose(&table, free, want) {
                Err(shortage) => {
                    prop_assert!(all.is_empty());
                    prop_assert_eq!(shortage, Shortage::Gpus { free: free.count_ones() });
                    continue;
                }
                Ok(choice) => choice,
            };
            let score = |set: Mask| {
                let nic = if several_nodes { links.nic_distance(set) } else { 0 };
                let left = if gpus <= 2 { naive_matching(&table, free & !set) } else { 0 };
                (Reverse(table.mbps(set) / 1_000), nic, links.domains(set), links.distance(set), Reverse(left))
            };
            let best = all.iter().map(|set| score(*set)).min().unwrap();
            prop_assert_eq!(score(choice.set), best, "chose {:?}", choice);
            prop_assert_eq!(choice.set & !free, 0);
            if gpus <= 2 {
                let in_pci_order = all.iter().copied().find(|set| score(*set) == best);
                prop_assert_eq!(Some(choice.set), in_pci_order);
            }
            let mut order = choice.order.clone();
            order.sort();
            prop_assert_eq!(order, slots(choice.set).collect::<Vec<_>>());
            prop_assert_eq!(choice.mbps == NO_COMMUNICATION, gpus == 1);

            // One more than the best there is can't be had; the best there is, can.
            let most = all.iter().map(|set| table.mbps(*set)).max().unwrap();
            let exactly = choose(&table, free, Want { min_mbps: most, ..want });
            prop_assert_eq!(exactly.map(|choice| choice.mbps), Ok(most));
            if gpus > 1 {
                let more = choose(&table, free, Want { min_mbps: most + 1, ..want });
                prop_assert_eq!(more, Err(Shortage::Bandwidth { best_mbps: most }));
            }
        }
    }
}

/// Four V100 in two linked pairs, as the first Ares had them.
#[test]
fn points_take_the_first_linked_pair_of_four() {
    let links = BandwidthTable::new(&pairs_of_four()).links().clone();
    let pair = |a: u8, b: u8| points(&links, (1 << a) | (1 << b));
    assert_eq!([pair(0, 1), pair(0, 2), pair(0, 3), pair(1, 2), pair(2, 3)], [60, -30, -30, -20, 60]);
    assert_eq!(choose_by_points(&links, links.all(), 2), Some((0b11, 60)));
    assert_eq!(choose_by_points(&links, 0b1110, 2), Some((0b1100, 60)));
    assert_eq!(choose_by_points(&links, 0b0111, 3), Some((0b0111, 10)));
    assert_eq!(choose_by_points(&links, links.all(), 1), Some((0b1, 0)));
    assert_eq!(choose_by_points(&links, 0b1, 2), None);
    assert_eq!(choose_by_points(&links, links.all(), 0), None);
    assert_eq!(choose_by_points(BandwidthTable::new(&Class { gpus: 17, ..Class::default() }).links(), 1, 1), None);
}

fn pairs_of_four() -> Class {
    let near = |a: usize, b: usize| a / 2 == b / 2;
    let cells = || (0..4).flat_map(|a| (0..4).map(move |b| (a, b)));
    Class {
        gpus: 4,
        nvlinks: cells().map(|(a, b)| if a != b && near(a, b) { 2 } else { 0 }).collect(),
        pci: cells().map(|(a, b)| if near(a, b) { PciClass::Pix } else { PciClass::Sys }).collect(),
        nvlink_mbps_per_link: 20_000,
        pcie_mbps: 12_000,
        inter_socket_mbps: 6_000,
        p2p: true,
        numa: vec![0, 0, 1, 1],
        ..Class::default()
    }
}

/// Sixteen GPUs without a switch: pairs over NVLink, four a PCIe tree, two sockets.
fn sixteen() -> Class {
    let cells = || (0..16u8).flat_map(|a| (0..16u8).map(move |b| (a, b)));
    Class {
        gpus: 16,
        nvlinks: cells().map(|(a, b)| if a != b && a / 2 == b / 2 { 4 } else { 0 }).collect(),
        pci: cells()
            .map(|(a, b)| match () {
                () if a == b => PciClass::Same,
                () if a / 4 == b / 4 => PciClass::Pxb,
                () if a / 8 == b / 8 => PciClass::Node,
                () => PciClass::Sys,
            })
            .collect(),
        nvlink_mbps_per_link: 12_000,
        nvswitch: false,
        pcie_mbps: 24_000,
        inter_socket_mbps: 16_000,
        intel_cpu: false,
        p2p: true,
        numa: (0..16).map(|gpu| gpu / 8).collect(),
        nics: Vec::new(),
    }
}

#[test]
fn sixteen_gpus_without_a_switch_are_grown_from_the_best_pair() {
    let table = BandwidthTable::new(&sixteen());
    let pick = |free: Mask, gpus: u32| {
        let choice = choose(&table, free, Want { gpus, several_nodes: false, min_mbps: 0 }).unwrap();
        (slots(choice.set).collect::<Vec<_>>(), choice.mbps)
    };
    assert_eq!(pick(first(16), 2), (vec![0, 1], 48_000));
    assert_eq!(pick(first(16), 4), (vec![0, 1, 2, 3], 24_000));
    assert_eq!(pick(first(16), 8), ((0..8).collect(), 24_000));
    assert_eq!(pick(first(16), 16), ((0..16).collect(), 16_000));
    // A pair is broken already: the next single GPU is its rest.
    assert_eq!(pick(first(16) & !(1 << 5), 1).0, [4]);
    assert_eq!(pick(first(16) & !0b1011, 4).0, [4, 5, 6, 7]);
}

#[test]
fn a_switched_machine_is_flat_and_only_sockets_decide() {
    let mut class = sixteen();
    class.nvlinks = (0..256).map(|cell| if cell / 16 == cell % 16 { 0 } else { 6 }).collect();
    class.nvlink_mbps_per_link = 20_000;
    let table = BandwidthTable::new(&class);
    let free = first(16) & !0b111;
    let choice = choose(&table, free, Want { gpus: 6, several_nodes: false, min_mbps: 0 }).unwrap();
    assert_eq!((slots(choice.set).collect::<Vec<_>>(), choice.mbps), ((8..14).collect(), 120_000));
}

#[test]
fn fewer_sockets_go_before_shorter_distances() {
    // 0, 1, 2 on one socket, each on its own root complex; 3, 4 behind one PCIe switch of the other. All as fast.
    let cells = || (0..5u8).flat_map(|a| (0..5u8).map(move |b| (a, b)));
    let class = Class {
        gpus: 5,
        nvlinks: vec![0; 25],
        pci: cells()
            .map(|(a, b)| match () {
                () if a == b => PciClass::Same,
                () if a.min(b) == 3 => PciClass::Pix,
                () => PciClass::Sys,
            })
            .collect(),
        pcie_mbps: 10_000,
        inter_socket_mbps: 10_000,
        p2p: true,
        numa: vec![0, 0, 0, 1, 1],
        ..Class::default()
    };
    let table = BandwidthTable::new(&class);
    let (one_socket, switch) = (0b00111, 0b11001);
    assert_eq!(table.mbps(one_socket), table.mbps(switch));
    assert!(table.links().distance(one_socket) > table.links().distance(switch));
    let choice = choose(&table, first(5), Want { gpus: 3, several_nodes: false, min_mbps: 0 }).unwrap();
    assert_eq!(choice.set, one_socket);
}
