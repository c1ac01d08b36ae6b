//! Real machines: the predicted bandwidth and the choice of GPUs against the expected answers of the published
//! topology matrices.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::PathBuf;

use scheduling::bandwidth::BandwidthTable;
use scheduling::choose::{Want, choose, subsets};
use scheduling::links::{Mask, first, slots};
use serde_json::Value;
use statemachine::record::{Class, Nic, PciClass};

/// The shared matrices, or `None` after saying loudly that they are not at hand.
fn matrices() -> Option<Vec<(String, Value)>> {
    let Some(root) = std::env::var_os("ARES_TEST_DATA") else {
        // Not eprintln: the harness would swallow it with the output of a test that passes.
        let _ =
            writeln!(std::io::stderr(), "SKIPPED: ARES_TEST_DATA is not set; the topology matrices were not tested");
        return None;
    };
    let mut paths: Vec<PathBuf> = std::fs::read_dir(PathBuf::from(root).join("topo"))
        .expect("ARES_TEST_DATA has a folder topo")
        .map(|entry| entry.expect("readable folder").path())
        .filter(|path| path.extension().is_some_and(|ext| ext == "json"))
        .collect();
    paths.sort();
    assert!(paths.len() >= 33, "33 matrices are published, {} found", paths.len());
    Some(
        paths
            .into_iter()
            .map(|path| {
                let text = std::fs::read_to_string(&path).expect("readable matrix");
                (path.file_stem().unwrap().to_string_lossy().into_owned(), serde_json::from_str(&text).expect("JSON"))
            })
            .collect(),
    )
}

fn class_of(facts: &Value) -> Class {
    let gpus = facts["gpus"].as_u64().unwrap() as usize;
    let model = &facts["model"];
    let mbps = |field: &str| (model[field].as_f64().unwrap() * 1_000.0).round() as u32;
    let numa = domains(facts, gpus);
    let mut class = Class {
        gpus: gpus as u8,
        nvlink_mbps_per_link: mbps("nvlink_gbps_per_link_per_direction"),
        nvswitch: facts["nvswitch"].as_bool().unwrap(),
        pcie_mbps: mbps("pcie_gbps"),
        inter_socket_mbps: mbps("inter_socket_gbps"),
        intel_cpu: model["intel_cpu"].as_bool().unwrap(),
        p2p: model["p2p"].as_bool().unwrap(),
        ..Class::default()
    };
    for row in 0..gpus {
        for column in 0..gpus {
            let name = facts["gpu_classes"][row][column].as_str().unwrap();
            let links = name.strip_prefix("NV").map_or(0, |count| count.parse().unwrap());
            class.nvlinks.push(links);
            class.pci.push(match name {
                "X" => PciClass::Same,
                // A bare matrix hides the PCIe class behind NVLink.
                _ if links > 0 && numa[row] == numa[column] => PciClass::Node,
                _ if links > 0 => PciClass::Sys,
                name => pci_class(name),
            });
        }
    }
    class.nics = nics(facts, gpus);
    class.numa = numa;
    class
}

fn domains(facts: &Value, gpus: usize) -> Vec<u8> {
    let mut numa = vec![0; gpus];
    for (index, domain) in facts["locality_domains"].as_array().unwrap().iter().enumerate() {
        for name in domain.as_array().unwrap() {
            let gpu: usize = name.as_str().unwrap().strip_prefix("GPU").unwrap().parse().unwrap();
            numa[gpu] = index as u8;
        }
    }
    numa
}

fn nics(facts: &Value, gpus: usize) -> Vec<Nic> {
    let rows = facts["gpu_nic_classes"].as_object().unwrap();
    let names: BTreeSet<&String> = rows.values().flat_map(|row| row.as_object().unwrap().keys()).collect();
    let class_to = |gpu: usize, name: &str| {
        rows.get(&format!("GPU{gpu}"))
            .and_then(|row| row.get(name))
            .map_or(PciClass::Sys, |c| pci_class(c.as_str().unwrap()))
    };
    names
        .into_iter()
        .map(|name| Nic {
            name: name.clone(),
            mbps: 24_000,
            class_to_gpu: (0..gpus).map(|gpu| class_to(gpu, name)).collect(),
        })
        .collect()
}

fn pci_class(name: &str) -> PciClass {
    match name {
        "PIX" => PciClass::Pix,
        "PXB" => PciClass::Pxb,
        "PHB" => PciClass::Phb,
        "NODE" => PciClass::Node,
        "SYS" => PciClass::Sys,
        other => panic!("class {other}"),
    }
}

fn sets(value: &Value) -> Option<BTreeSet<Mask>> {
    let sets = value.as_array()?.iter();
    Some(sets.map(|set| set.as_array().unwrap().iter().map(|gpu| 1 << gpu.as_u64().unwrap()).sum()).collect())
}

fn near(predicted: f64, expected: f64) -> bool {
    // The expected figures are rounded to one decimal.
    (predicted - expected).abs() <= expected * 0.01 + 0.05
}

#[test]
fn every_published_matrix_gets_its_best_sets_and_bandwidths() {
    let Some(matrices) = matrices() else { return };
    let mut answers = 0;
    for (name, facts) in &matrices {
        let table = BandwidthTable::new(&class_of(facts));
        let all = first(table.links().gpus());
        for (k, optimal) in facts["optimal"].as_object().unwrap() {
            let want = Want { gpus: k.parse().unwrap(), several_nodes: false, min_mbps: 0 };
            let choice = choose(&table, all, want).unwrap();
            if want.gpus == 1 {
                let any = optimal["preferred_any_of"].as_array().unwrap();
                assert!(any.contains(&choice.order[0].into()), "{name}: one GPU: {choice:?}, expected one of {any:?}");
                answers += 1;
                continue;
            }
            let expected = optimal["busbw_gbps"].as_f64().unwrap();
            assert!(near(f64::from(choice.mbps) / 1e3, expected), "{name} k={k}: {choice:?}, expected {expected} GB/s");
            for field in ["sets", "preferred_equivalents"] {
                if let Some(sets) = sets(&optimal[field]) {
                    assert!(
                        sets.contains(&choice.set),
                        "{name} k={k}: {choice:?} is not in {field}: {:?}",
                        optimal[field]
                    );
                }
            }
            let order: Mask = choice.order.iter().map(|slot| 1u128 << slot).sum();
            assert_eq!(order, choice.set, "{name} k={k}: the ring holds each GPU once");
            if let Some(sets) = sets(&optimal["nearest_to_nic"]) {
                let choice = choose(&table, all, Want { several_nodes: true, ..want }).unwrap();
                assert!(
                    sets.contains(&choice.set),
                    "{name} k={k} over machines: {choice:?}, {:?}",
                    optimal["nearest_to_nic"]
                );
            }
            answers += 1;
        }
    }
    assert!(answers > 80, "{answers} answers were compared");
}

/// Not only the best set: the model's worst and mean over all sets of a size, and exactly which sets reach the best.
#[test]
fn every_published_matrix_gets_its_worst_and_mean_bandwidth() {
    let Some(matrices) = matrices() else { return };
    for (name, facts) in &matrices {
        let table = BandwidthTable::new(&class_of(facts));
        for (k, optimal) in facts["optimal"].as_object().unwrap() {
            let Some(worst) = optimal["worst_gbps"].as_f64() else { continue };
            let all = subsets(first(table.links().gpus()), k.parse().unwrap());
            let mbps: Vec<f64> = all.iter().map(|set| f64::from(table.mbps(*set)) / 1e3).collect();
            let least = mbps.iter().copied().fold(f64::INFINITY, f64::min);
            assert!(near(least, worst), "{name} k={k}: worst {least}, expected {worst}");
            let mean = mbps.iter().sum::<f64>() / mbps.len() as f64;
            let expected = optimal["mean_gbps"].as_f64().unwrap();
            assert!(near(mean, expected), "{name} k={k}: mean {mean}, expected {expected}");
            if let Some(expected) = sets(&optimal["sets"]) {
                let best = optimal["busbw_gbps"].as_f64().unwrap();
                let reached: BTreeSet<Mask> =
                    all.iter().zip(&mbps).filter(|(_, mbps)| near(**mbps, best)).map(|(set, _)| *set).collect();
                assert_eq!(
                    reached,
                    expected,
                    "{name} k={k}: {:?}",
                    reached.iter().map(|s| slots(*s).collect::<Vec<_>>()).collect::<Vec<_>>()
                );
            }
        }
    }
}
