//! Simulated machines: our models, files of the user, the mock machine; and what makes them fail.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use gpu_agent::discovery::machine::PcieClass;
use gpu_agent::discovery::sim::{Verb, VerbError};
use gpu_agent::discovery::xid::Action;
use gpu_agent::discovery::{
    Fault, GpuBackend, Model, ModelError, Selection, SimBackend, control, models, open, survey,
};
use serde_json::Value;

fn sim(model: &str) -> SimBackend {
    SimBackend::new(Model::named(model).unwrap(), "n1", 7)
}

#[test]
fn flag_and_environment_select_the_machine() {
    let parse = |gpus, mock| Selection::parse(gpus, mock).map_err(|e| e.to_string());
    assert_eq!(parse(None, None), Ok(Selection::Real));
    assert_eq!(parse(Some("auto"), Some("true")), Ok(Selection::Real));
    assert_eq!(parse(None, Some("true")), Ok(Selection::Mock));
    assert_eq!(parse(None, Some("false")), Ok(Selection::Real));
    assert_eq!(parse(Some("sim:dgx1-v100"), Some("true")), Ok(Selection::Named("dgx1-v100")));
    assert_eq!(parse(Some("sim:dir/box"), None), Ok(Selection::File(PathBuf::from("dir/box"))));
    assert_eq!(parse(Some("sim:box.txt"), None), Ok(Selection::File(PathBuf::from("box.txt"))));
    let unknown = parse(Some("sim:hgx-h200"), None).unwrap_err();
    for name in models::names() {
        assert!(unknown.contains(name), "{unknown}");
    }
    assert!(unknown.contains("hgx-h200"));
    for bad in ["hgx-h100", "sim:", "", "4"] {
        assert!(parse(Some(bad), None).unwrap_err().contains("expected auto, sim:NAME or sim:FILE"), "{bad}");
    }
}

#[test]
fn every_model_of_ours_is_a_whole_machine() {
    let names: Vec<&str> = models::names().collect();
    assert_eq!(names, ["hgx-h100", "dgx1-v100", "a100-bridged", "rtx4090x8", "a100-mig"]);
    for name in &names[..4] {
        let machine = survey(&sim(name)).unwrap();
        let (gpus, topology) = (machine.inventory.gpus.len(), &machine.topology);
        assert!(machine.simulated && machine.source.contains(name));
        assert_eq!(gpus, 8, "{name}");
        assert_eq!(topology.domains, [0, 0, 0, 0, 1, 1, 1, 1], "{name}");
        for a in 0..gpus {
            assert_eq!(topology.pcie[a][a], PcieClass::Own);
            for b in 0..gpus {
                assert_eq!(topology.nvlinks[a][b], topology.nvlinks[b][a], "{name}");
                assert_eq!(topology.pcie[a][b], topology.pcie[b][a], "{name}");
                assert_eq!(topology.pcie[a][b] == PcieClass::Sys, topology.domains[a] != topology.domains[b], "{name}");
            }
        }
        assert!(machine.host.memory_mib >= 524_288 && machine.host.numa.iter().all(|node| node.cores >= 40));
        assert!(machine.topology.nics.iter().all(|nic| nic.classes.len() == gpus && nic.mbps > 0));
    }
}

#[test]
fn models_have_the_links_of_their_machines() {
    let hgx = survey(&sim("hgx-h100")).unwrap();
    assert_eq!(hgx.inventory.gpus[0].gpu_type, "h100");
    assert!(
        hgx.topology.switched
            && hgx.topology.p2p
            && hgx.topology.nvlinks[0][7] == 18
            && hgx.topology.nvlink_mbps == 20_600
    );
    assert_eq!(hgx.topology.nics[3].classes[3], PcieClass::Pix);

    let dgx1 = survey(&sim("dgx1-v100")).unwrap().topology;
    assert!(!dgx1.switched);
    assert!(dgx1.nvlinks.iter().all(|row| row.iter().sum::<u32>() == 6), "each V100 has six links");

    let bridged = survey(&sim("a100-bridged")).unwrap().topology;
    assert_eq!(bridged.nvlinks[2], [0, 0, 0, 12, 0, 0, 0, 0]);

    let geforce = survey(&sim("rtx4090x8")).unwrap();
    assert_eq!(geforce.inventory.gpus[0].gpu_type, "rtx4090");
    assert!(!geforce.topology.p2p && geforce.topology.nvlinks.iter().flatten().all(|links| *links == 0));
}

#[test]
fn slices_are_devices_of_their_own() {
    let machine = survey(&sim("a100-mig")).unwrap();
    let (gpus, topology) = (&machine.inventory.gpus, &machine.topology);
    let count = |gpu_type: &str| gpus.iter().filter(|gpu| gpu.gpu_type == gpu_type).count();
    let counts = ["a100", "a100-1g.5gb", "a100-2g.10gb", "a100-3g.20gb"].map(count);
    assert_eq!((counts, gpus.len()), ([2, 28, 4, 2], 36));
    assert!(gpus.iter().all(|gpu| gpu.uuid.starts_with(if gpu.gpu_type == "a100" { "GPU-" } else { "MIG-" })));
    let slice = &gpus[2];
    assert_eq!((slice.name.as_str(), slice.memory_mib), ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 4_768));
    assert_eq!((topology.nvlinks[0][1], topology.nvlinks[0][2], topology.nvlinks[2][3]), (12, 0, 0));
    assert_eq!((topology.pcie[2][3], topology.pcie[2][9]), (PcieClass::Pix, PcieClass::Pxb));
    assert!(!topology.p2p && topology.pcie.len() == 36 && topology.domains[35] == 1);
}

#[test]
fn a_model_that_is_cut_wrongly_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("box.toml");
    let whole = include_str!("../machines/a100-mig.toml").split("[[mig]]").next().unwrap();
    let refusal = |tables: &str| {
        std::fs::write(&path, format!("{whole}{tables}")).unwrap();
        Model::file(&path).map(|model| model.slices.len()).map_err(|error| error.to_string())
    };
    assert_eq!(refusal("[[mig]]\ngpus = [7]\nslices = [\"7g.40gb\"]\n"), Ok(8));
    for (tables, told) in [
        ("[[mig]]\ngpus = [8]\nslices = [\"7g.40gb\"]\n", "[[mig]] gpus: expected GPUs below 8, found 8"),
        ("[[mig]]\ngpus = [1, 1]\nslices = [\"7g.40gb\"]\n", "[[mig]] gpus: GPU 1 is cut twice"),
        ("[[mig]]\ngpus = [1]\nslices = []\n", "[[mig]] slices: expected profiles such as 1g.5gb, found none"),
        ("[[mig]]\ngpus = [1]\nslices = [\"half\"]\n", "expected a profile such as 1g.5gb, found \"half\""),
    ] {
        assert!(refusal(tables).unwrap_err().contains(told), "{tables}");
    }
}

#[test]
fn the_mock_machine_is_the_originals() {
    let opened = open(&Selection::parse(None, Some("true")).unwrap(), "n1", 7).unwrap();
    let machine = survey(opened.backend.as_ref()).unwrap();
    assert!(opened.simulated.is_some());
    assert_eq!(machine.inventory.gpus.len(), 4);
    assert!(machine.inventory.gpus.iter().all(|gpu| gpu.gpu_type == "v100" && gpu.memory_mib == 32_510));
    let pairs: Vec<(usize, usize)> = (0..4)
        .flat_map(|a| (a + 1..4).map(move |b| (a, b)))
        .filter(|(a, b)| machine.topology.nvlinks[*a][*b] > 0)
        .collect();
    assert_eq!(pairs, [(0, 1), (2, 3)]);
}

#[test]
fn uuids_follow_from_seed_machine_and_slot() {
    let uuids = |machine: &str, seed: u64| -> Vec<String> {
        let model = Model::named("hgx-h100").unwrap();
        SimBackend::new(model, machine, seed).inventory().unwrap().gpus.into_iter().map(|gpu| gpu.uuid).collect()
    };
    assert_eq!(uuids("n1", 7), uuids("n1", 7));
    let all: std::collections::BTreeSet<String> =
        [uuids("n1", 7), uuids("n1", 8), uuids("n2", 7)].into_iter().flatten().collect();
    assert_eq!(all.len(), 24);
    for uuid in &all {
        assert!(uuid::Uuid::parse_str(uuid.strip_prefix("GPU-").unwrap()).is_ok(), "{uuid}");
    }
}

#[test]
fn a_matrix_file_is_a_machine() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("box.txt");
    let matrix = "# machine: 2x RTX A6000, 2x EPYC\n\tGPU0\tGPU1\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\n\
                  GPU0\t X \tNV4\tPIX\t0-31\t0\t\tN/A\nGPU1\tNV4\t X \tSYS\t32-63\t2\t\tN/A\nNIC0\tPIX\tSYS\t X\n";
    std::fs::write(&path, matrix).unwrap();
    let selection = Selection::parse(Some(&format!("sim:{}", path.display())), None).unwrap();
    let machine = survey(open(&selection, "n1", 1).unwrap().backend.as_ref()).unwrap();
    let gpus = &machine.inventory.gpus;
    assert_eq!((gpus[0].gpu_type.as_str(), gpus[0].memory_mib, gpus[1].numa_node), ("a6000", 49_140, Some(2)));
    let topology = &machine.topology;
    assert_eq!((topology.nvlinks[0][1], topology.nvlink_mbps, topology.intel_cpu), (4, 12_000, false));
    // NVLink hides the class: SYS, because the NUMA nodes differ.
    assert_eq!(topology.pcie[0][1], PcieClass::Sys);
    assert_eq!(topology.nics[0].classes, [PcieClass::Pix, PcieClass::Sys]);
    assert_eq!(machine.host.numa.iter().map(|node| (node.node, node.cores)).collect::<Vec<_>>(), [(0, 32), (2, 32)]);

    assert_eq!(gpus.iter().map(|gpu| machine.numa_index(gpu)).collect::<Vec<_>>(), [0, 1]);

    // A model file states what the matrix can't.
    let stated = directory.path().join("box.toml");
    let text = "topo_file = \"box.txt\"\n[gpu]\nname = \"NVIDIA H100 PCIe\"\nmemory_mib = 81559\ncompute_capability = \"9.0\"\n[pcie]\nmbps = 48000\np2p = false\n";
    std::fs::write(&stated, text).unwrap();
    let model = Model::file(&stated).unwrap();
    assert_eq!(
        (model.gpu.name.as_str(), model.topology.pcie_mbps[0], model.topology.p2p),
        ("NVIDIA H100 PCIe", 48_000, false)
    );
    assert_eq!(model.topology.nvlinks[0][1], 4);
}

#[test]
fn a_file_that_is_no_machine_is_refused_with_its_place() {
    let directory = tempfile::tempdir().unwrap();
    let refusal = |name: &str, text: &str| -> String {
        let path = directory.path().join(name);
        std::fs::write(&path, text).unwrap();
        Model::file(&path).unwrap_err().to_string()
    };
    let matrix = refusal("m.txt", "\tGPU0\tGPU1\nGPU0\t X \tQPI\n");
    assert!(matrix.contains("m.txt: line 2, column 10: "), "{matrix}");
    let lost = refusal("l.txt", "\tGPU0\tGPU1\tGPU2\nGPU0\t X \tSYS\tSYS\n");
    assert!(lost.contains("GPU 1 and GPU 2"), "{lost}");
    let gpu = "[gpu]\nname = \"x\"\nmemory_mib = 1\ncompute_capability = \"9.0\"\ncount = 2\n";
    let rest =
        "[cpu]\nintel = true\ninter_socket_mbps = 1\nmemory_mib = 1\n[[numa]]\nnode = 0\ncores = 1\ngpus = [0, 1]\n";
    let pcie = "[pcie]\nmbps = 1\np2p = true\nclasses = [\"X SYS\", \"SYS X\"]\n";
    let whole = format!("{gpu}{pcie}{rest}");
    std::fs::write(directory.path().join("ok.toml"), &whole).unwrap();
    assert_eq!(Model::file(&directory.path().join("ok.toml")).unwrap().topology.pcie_mbps, [1, 1]);
    let cases = [
        (whole.replace("count = 2", "count = 0"), "[gpu] count: expected 1 to 128, found 0"),
        (whole.replace("\"SYS X\"", "\"PIX X\""), "symmetric"),
        (whole.replace("\"X SYS\"", "\"X NV4\""), "NV4"),
        (whole.replace(", \"SYS X\"", ""), "expected 2 rows, found 1"),
        (whole.replace("gpus = [0, 1]", "gpus = [0]"), "GPU 1 is in no node"),
        (whole.replace("gpus = [0, 1]", "gpus = [0, 2]"), "found 2"),
        (whole.replace("mbps = 1\np2p", "p2p"), "[pcie] mbps: is missing"),
        (format!("{whole}[nvlink]\npairs = [[0, 1, 2]]\n"), "[nvlink] mbps: is missing"),
        (format!("{whole}[nvlink]\nmbps = 1\npairs = [[0, 5, 2]]\n"), "found 0 and 5"),
        (format!("{whole}[power]\nwatt = 1\n"), "power"),
        (format!("topo_file = \"ok.toml\"\n{whole}"), "expected a matrix"),
        ("gpu".to_owned(), "line 1"),
    ];
    for (text, part) in cases {
        let error = refusal("bad.toml", &text);
        assert!(error.contains("bad.toml: ") && error.contains(part), "{part}: {error}");
    }
    let missing = Model::file(&directory.path().join("none.txt")).unwrap_err();
    assert!(matches!(missing, ModelError::Read { .. }) && missing.to_string().contains("none.txt"));
}

/// Each published matrix can be simulated, and what it says survives.
#[test]
fn every_published_matrix_is_a_machine() {
    let Ok(data) = std::env::var("ARES_TEST_DATA") else {
        eprintln!("SKIPPED: ARES_TEST_DATA is not set, the published matrices were not simulated");
        return;
    };
    let mut read = 0;
    for entry in std::fs::read_dir(Path::new(&data).join("topo")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|suffix| suffix != "txt") {
            continue;
        }
        let facts: Value = serde_json::from_slice(&std::fs::read(path.with_extension("json")).unwrap()).unwrap();
        let machine = survey(&SimBackend::new(Model::file(&path).unwrap(), "n1", 7)).unwrap();
        let links = machine.topology.nvlinks.iter().flatten().filter(|links| **links > 0).count();
        assert_eq!(machine.inventory.gpus.len() as u64, facts["gpus"].as_u64().unwrap());
        assert_eq!(links, facts["nvlink_pairs"].as_array().unwrap().len() * 2, "{}", path.display());
        assert_eq!(machine.topology.switched, facts["nvswitch"].as_bool().unwrap());
        assert_eq!(machine.topology.nics.len(), facts["nics"].as_array().unwrap().len());
        let domains = machine.topology.domains.iter().max().unwrap() + 1;
        assert_eq!(domains as usize, facts["locality_domains"].as_array().unwrap().len(), "{}", path.display());
        assert!(
            machine.host.numa.iter().map(|node| node.cores as usize).sum::<usize>() >= machine.inventory.gpus.len()
        );
        read += 1;
    }
    assert!(read > 0, "no matrix in {data}");
}

#[test]
fn a_lost_gpu_leaves_the_enumeration_and_the_others_keep_their_slots() {
    let sim = sim("a100-bridged");
    let before = survey(&sim).unwrap();
    sim.act(&Verb::Lost { gpu: 2 }).unwrap();
    let after = survey(&sim).unwrap();
    assert_eq!(after.inventory.gpus.iter().map(|gpu| gpu.slot).collect::<Vec<_>>(), [0, 1, 3, 4, 5, 6, 7]);
    assert_eq!(after.inventory.gpus[2], before.inventory.gpus[3]);
    // GPU 3 has lost its bridge; the pair behind it moved one place up.
    assert!(after.topology.nvlinks[2].iter().all(|links| *links == 0));
    assert_eq!(after.topology.nvlinks[3][4], 12);
    let events = sim.drain_health();
    assert_eq!(events.len(), 1);
    assert_eq!((events[0].slot, &events[0].what), (2, &Fault::Lost));
    assert_eq!(events[0].gpu_uuid, before.inventory.gpus[2].uuid);
    assert!(events[0].judgement.actions.contains(Action::DrainNode));
    assert_eq!(sim.act(&Verb::Lost { gpu: 2 }), Err(VerbError::AlreadyLost { gpu: 2 }));
    assert_eq!(sim.act(&Verb::Xid { gpu: 8, code: 79, pid: None }), Err(VerbError::NoSuchGpu { gpu: 8, slots: 8 }));
    assert!(sim.drain_health().is_empty());
}

#[test]
fn events_that_nobody_reads_are_bounded() {
    let sim = sim("rtx4090x8");
    let refused = (0..2_000).find_map(|code| sim.act(&Verb::Xid { gpu: 0, code, pid: None }).err());
    assert_eq!(refused, Some(VerbError::Full));
    assert_eq!(sim.drain_health().len(), 1_024);
    assert_eq!(sim.act(&Verb::Xid { gpu: 0, code: 13, pid: Some(4) }), Ok(()));
}

#[tokio::test]
async fn the_control_socket_answers_each_line() {
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};

    let directory = tempfile::tempdir().unwrap();
    let sim = Arc::new(sim("hgx-h100"));
    // A socket left by an earlier agent is in nobody's way; another kind of file is not removed.
    drop(control::bind(directory.path()).unwrap());
    let listener = control::bind(directory.path()).unwrap();
    let server = tokio::spawn(control::serve(listener, Arc::clone(&sim)));
    let stream = tokio::net::UnixStream::connect(directory.path().join(control::SOCKET)).await.unwrap();
    let (read, mut write) = stream.into_split();
    let mut answers = BufReader::new(read).lines();
    let talk = [
        (r#"{"do":"xid","gpu":3,"code":79,"pid":12}"#, "ok"),
        (r#"{"do":"lost","gpu":3}"#, "ok"),
        (r#"{"do":"lost","gpu":3}"#, "gpu: 3 is already lost"),
        (r#"{"do":"lost","gpu":9}"#, "gpu: expected a slot below 8, found 9"),
        (r#"{"do":"melt","gpu":1}"#, "expected {\"do\":\"xid\""),
        (r#"{"do":"lost","gpu":1,"hard":true}"#, "expected {\"do\":\"xid\""),
        ("", "expected {\"do\":\"xid\""),
    ];
    for (line, answer) in talk {
        write.write_all(format!("{line}\n").as_bytes()).await.unwrap();
        let found = answers.next_line().await.unwrap().unwrap();
        assert!(found.starts_with(answer), "{line}: {found}");
    }
    sim.health_signal().notified().await;
    let events = sim.drain_health();
    assert_eq!(
        events.iter().map(|event| event.what.clone()).collect::<Vec<_>>(),
        [Fault::Xid { code: 79, pid: Some(12) }, Fault::Lost]
    );
    assert_eq!(serde_json::to_value(&events[0]).unwrap()["what"]["fault"], "xid");

    // A line without end is answered and the connection closed; others go on.
    write.write_all(&[b'x'; 5_000]).await.unwrap();
    assert!(answers.next_line().await.unwrap().unwrap().contains("at most 4096 bytes"));
    server.abort();

    let taken = tempfile::tempdir().unwrap();
    std::fs::write(taken.path().join(control::SOCKET), "mine").unwrap();
    assert!(control::bind(taken.path()).is_err());
    assert_eq!(std::fs::read_to_string(taken.path().join(control::SOCKET)).unwrap(), "mine");
}
