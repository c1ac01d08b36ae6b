//! The readers of /sys and /proc on a recorded tree: CPUs, memory, classes out of bridge chains, network cards.

use std::os::unix::fs::symlink;
use std::path::Path;

use gpu_agent::discovery::host::{self, Cpu};
use gpu_agent::discovery::machine::PcieClass::{Node, Own, Phb, Pix, Pxb, Sys};
use gpu_agent::discovery::pci::{self, Device};

const TREE: &str = include_str!("fixtures/two-socket-box.tree");

/// Lays the tree out in a directory.
fn lay(tree: &str) -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    for line in tree.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let path = |name: &str| root.path().join(name.trim().trim_end_matches('/'));
        let parent = |path: &Path| std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        if let Some((name, target)) = line.split_once(" -> ") {
            parent(&path(name));
            symlink(target, path(name)).unwrap();
        } else if let Some((name, text)) = line.split_once(" =") {
            parent(&path(name));
            std::fs::write(path(name), format!("{}\n", text.trim().replace("\\n", "\n"))).unwrap();
        } else {
            std::fs::create_dir_all(path(line)).unwrap();
        }
    }
    root
}

fn device(root: &tempfile::TempDir, bus: &str) -> Device {
    pci::device(root.path(), bus).unwrap_or_else(|| panic!("no device {bus}"))
}

#[test]
fn cores_are_what_this_process_may_use_and_memory_what_its_cgroup_may() {
    let root = lay(TREE);
    let host = host::read(root.path()).unwrap();
    let numa: Vec<(u32, u32, &str)> =
        host.numa.iter().map(|node| (node.node, node.cores, node.cpus.as_str())).collect();
    // CPU 32 is not ours; node 2 has memory only.
    assert_eq!(numa, [(0, 31, "0-15,33-47"), (1, 32, "16-31,48-63")]);
    assert_eq!(host.memory_mib, 262_144);
    assert_eq!(host::cpu(root.path()), Cpu { intel: true, inter_socket_mbps: 22_000 });
}

#[test]
fn a_machine_without_numa_nodes_has_one() {
    let root = lay(
        "proc/meminfo = MemTotal: 2097152 kB\nsys/devices/system/cpu/online = 0-3\nsys/fs/cgroup/memory.max = max\n",
    );
    let host = host::read(root.path()).unwrap();
    assert_eq!((host.numa.len(), host.numa[0].node, host.numa[0].cores, host.memory_mib), (1, 0, 4, 2_048));
    assert_eq!(host::cpu(root.path()), Cpu { intel: false, inter_socket_mbps: 6_000 });
    let empty = tempfile::tempdir().unwrap();
    assert!(host::read(empty.path()).unwrap_err().to_string().contains("online"));
}

#[test]
fn bridge_chains_give_the_classes() {
    let root = lay(TREE);
    let first = device(&root, "0000:17:00.0");
    let expected = [("17", Own), ("18", Pix), ("1b", Pxb), ("3b", Phb), ("5e", Node), ("af", Sys), ("b1", Sys)];
    for (bus, class) in expected {
        let other = device(&root, &format!("0000:{bus}:00.0"));
        assert_eq!(pci::class(&first, &other, 2), class, "{bus}");
        assert_eq!(pci::class(&other, &first, 2), class, "{bus}");
    }
    // An unknown node (-1) is no node: with one node in the machine it is that one.
    assert_eq!(device(&root, "0000:b1:00.0").numa_node, None);
    assert_eq!(pci::class(&first, &device(&root, "0000:b1:00.0"), 1), Node);
    assert_eq!(pci::device(root.path(), "0000:99:00.0"), None);
}

#[test]
fn cards_that_are_up_are_found_once() {
    let root = lay(TREE);
    let gpus = [Some(device(&root, "0000:17:00.0")), Some(device(&root, "0000:af:00.0")), None];
    let nics = pci::nics(root.path(), &gpus);
    let found: Vec<(&str, u32, Option<&str>)> =
        nics.iter().map(|nic| (nic.name.as_str(), nic.mbps, nic.bond.as_deref())).collect();
    assert_eq!(found, [("mlx5_0", 48_000, Some("bond0")), ("eth1", 3_000, None)]);
    assert_eq!(nics[0].classes, [Pix, Sys, Sys]);
    assert_eq!(nics[1].classes, [Sys, Phb, Sys]);
    assert!(pci::nics(tempfile::tempdir().unwrap().path(), &[]).is_empty());
}

#[test]
fn bus_addresses_have_one_form() {
    assert_eq!(pci::bus_id("00000000:3B:00.0").as_deref(), Some("0000:3b:00.0"));
    assert_eq!(pci::bus_id("0001:af:1f.7").as_deref(), Some("0001:af:1f.7"));
    assert_eq!(pci::bus_id("3b:00.0").as_deref(), Some("0000:3b:00.0"));
    for text in ["", "3b", "0000:3b:00", "0000:3b:00.8", "0:0:3b:00.0", "0000:3bb:00.0", "0000:+b:00.0", "pci0000:14"] {
        assert_eq!(pci::bus_id(text), None, "{text}");
    }
}

#[test]
fn this_machine_can_be_read() {
    let host = host::read(Path::new("/")).unwrap();
    assert!(host.memory_mib > 0 && host.numa.iter().all(|node| node.cores > 0));
}
