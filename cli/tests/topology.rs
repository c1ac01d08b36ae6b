//! `ares topology` without a cluster, and what a job finds on a mock of GPUs.

mod cluster;

use std::path::PathBuf;

use cluster::{Ran, ares, run};
use serde_json::Value;

fn topology(args: &[&str]) -> Ran {
    run(ares(&[&["topology"], args].concat()))
}

/// Every matrix of the shared data gives each fact that stands beside it.
#[test]
fn matrices_give_the_facts_beside_them() {
    let Some(data) = std::env::var_os("ARES_TEST_DATA").map(PathBuf::from) else {
        eprintln!("SKIPPED: matrices_give_the_facts_beside_them: ARES_TEST_DATA is not set, no matrix was read");
        return;
    };
    let mut judged = 0;
    for entry in std::fs::read_dir(data.join("topo")).expect("the data has topo/") {
        let path = entry.expect("readable").path();
        let facts = path.with_extension("json");
        if path.extension().is_none_or(|kind| kind != "txt") || !facts.is_file() {
            continue;
        }
        let facts: Value = serde_json::from_str(&std::fs::read_to_string(&facts).expect("readable")).expect("JSON");
        let ours = topology(&["--file", path.to_str().expect("text"), "-o", "json"]).json();
        for (key, fact) in facts.as_object().expect("an object") {
            // What is said of the file itself, and of where it comes from, is no fact of the machine.
            if let Some(found) = ours.get(key) {
                assert_eq!(found, fact, "{key} of {}", path.display());
            } else {
                assert!(!FACTS.contains(&key.as_str()), "{key} of {} is missing", path.display());
            }
        }
        for key in FACTS {
            assert!(ours.get(key).is_some(), "{key} of {}", path.display());
        }
        judged += 1;
    }
    assert!(judged >= 30, "only {judged} matrices were found");
}

const FACTS: [&str; 14] = [
    "gpus",
    "nics",
    "column_order",
    "rows_missing",
    "gpu_classes",
    "gpu_nic_classes",
    "nearest_nic",
    "nvlink_pairs",
    "nvlink_islands",
    "nvswitch",
    "cpu_affinity",
    "numa_affinity",
    "numa_nodes",
    "locality_domains",
];

#[test]
fn what_is_no_matrix_is_refused_at_its_place() {
    let dir = tempfile::Builder::new().prefix("ares cli ").tempdir().expect("a directory");
    let refused = |text: &str, wanted: &[&str]| {
        let path = dir.path().join("matrix.txt");
        std::fs::write(&path, text).expect("written");
        topology(&["--file", path.to_str().expect("text")]).refused(2, wanted);
    };
    refused("garbage\n", &["line 1, column 1", "found \"garbage\""]);
    refused("", &["line 1"]);
    refused("\tGPU0\tGPU1\nGPU0\t X \tWAT\nGPU1\tNV2\t X\n", &["line 2, column", "found \"WAT\""]);
    topology(&["--file", "/no/such/matrix"]).refused(3, &["/no/such/matrix", "No such file"]);
}

/// On every matrix of the shared data the GPUs chosen are among the best sets that stand beside it.
#[test]
fn the_choice_on_each_matrix_is_one_of_its_best() {
    let Some(data) = std::env::var_os("ARES_TEST_DATA").map(PathBuf::from) else {
        eprintln!("SKIPPED: the_choice_on_each_matrix_is_one_of_its_best: ARES_TEST_DATA is not set");
        return;
    };
    let (mut judged, mut speeds) = (0, 0);
    for entry in std::fs::read_dir(data.join("topo")).expect("the data has topo/") {
        let path = entry.expect("readable").path();
        let facts = path.with_extension("json");
        if path.extension().is_none_or(|kind| kind != "txt") || !facts.is_file() {
            continue;
        }
        let facts: Value = serde_json::from_str(&std::fs::read_to_string(&facts).expect("readable")).expect("JSON");
        for (k, optimal) in facts["optimal"].as_object().expect("an object") {
            let file = path.to_str().expect("text");
            let picked = topology(&["--file", file, "--pick", k, "-o", "json"]).json();
            let gpus = &picked["gpus"];
            for field in ["sets", "preferred_equivalents"] {
                if let Some(sets) = optimal[field].as_array() {
                    assert!(sets.contains(gpus), "{file} k={k}: {picked} is not in {field}: {sets:?}");
                }
            }
            if let Some(any) = optimal["preferred_any_of"].as_array() {
                assert!(any.contains(&gpus[0]), "{file} k={k}: {picked}, expected one of {any:?}");
            }
            // Where nothing in the file names the GPU, the speed of its links is anybody's guess; the choice is not.
            let named = facts["model"]["gpu"].as_str().is_some_and(|gpu| !gpu.starts_with("unknown"));
            if let Some(best) = optimal["busbw_gbps"].as_f64().filter(|_| named) {
                let found = picked["busbw_mbps"].as_f64().expect("a number") / 1e3;
                // The published figures are rounded to one decimal.
                speeds += 1;
                assert!((found - best).abs() <= best * 0.01 + 0.05, "{file} k={k}: {found} GB/s, expected {best}");
            }
            judged += 1;
        }
    }
    assert!(judged >= 90 && speeds >= 50, "only {judged} choices and {speeds} speeds were judged");
}

#[test]
fn a_choice_keeps_to_what_is_free_and_says_why() {
    let mock = |args: &[&str]| {
        let mut command = ares(&[&["topology", "-o", "json"], args].concat());
        command.env("ARES_MOCK_GPU", "true");
        run(command)
    };
    for policy in ["bandwidth", "points"] {
        let picked = mock(&["--pick", "2", "--policy", policy]).json();
        assert_eq!(picked["gpus"], serde_json::json!([0, 1]), "{policy}");
        let picked = mock(&["--pick", "2", "--policy", policy, "--free", "1,3,2"]).json();
        assert_eq!(picked["gpus"], serde_json::json!([2, 3]), "{policy}");
        assert_eq!(picked["busbw_mbps"], 40_000, "{policy}");
        assert!(picked["why"].as_str().is_some_and(|why| why.contains("free were GPUs 1,2,3")), "{picked}");
    }
    assert_eq!(mock(&["--pick", "2", "--policy", "points"]).json()["points"], 60);
    let one = mock(&["--pick", "1", "--free", "3"]).json();
    assert_eq!((&one["gpus"], &one["busbw_mbps"]), (&serde_json::json!([3]), &Value::Null));
    mock(&["--pick", "3", "--free", "0,1"]).refused(2, &["--pick 3", "only 2 GPUs"]);
    mock(&["--pick", "1", "--free", "4"]).refused(2, &["--free 4", "GPUs 0 to 3"]);
    mock(&["--pick", "0"]).misused(&["--pick"]);
    mock(&["--free", "0"]).misused(&["--pick"]);
    topology(&["--file", "/no/such/matrix", "--pick", "2"]).refused(3, &["/no/such/matrix"]);
}

#[test]
fn models_are_machines_by_name() {
    let models = [("hgx-h100", "h100", "NV18"), ("dgx1-v100", "v100", "NV2"), ("a100-bridged", "a100", "NV12")];
    for (name, kind, link) in models.into_iter().chain([("rtx4090x8", "rtx4090", "NODE")]) {
        let machine = format!("sim:{name}");
        topology(&["--gpus", &machine]).ok().shows(&[&format!("simulated: model {name}"), kind, link, "Best pair: ["]);
        let found = topology(&["--gpus", &machine, "-o", "json"]).json();
        assert_eq!(found["best_pair"].as_array().map(Vec::len), Some(2), "{found}");
    }
    topology(&["--gpus", "sim:nothing"]).refused(2, &["known: hgx-h100, dgx1-v100, a100-bridged, rtx4090x8"]);
    topology(&["--gpus", "nothing"]).refused(2, &["expected auto, sim:NAME or sim:FILE"]);
}

#[test]
fn the_mock_has_two_linked_pairs() {
    let mock = |args: &[&str]| {
        let mut command = ares(args);
        command.env("ARES_MOCK_GPU", "true");
        run(command)
    };
    let found = mock(&["topology", "-o", "json"]).json();
    assert_eq!(found["best_pair"], serde_json::json!([0, 1]));
    assert!(found["best_pair_why"].as_str().is_some_and(|why| why.contains("NV2 pair")), "{found}");
    let gpus = found["inventory"]["gpus"].as_array().expect("a list");
    assert_eq!(gpus.len(), 4);
    assert!(gpus.iter().all(|gpu| gpu["memory_mib"] == 32_510), "{gpus:?}");

    // The two of a linked pair, of the four that any job sees when it asks for all.
    let visible = |gpus: &str| {
        let ran = mock(&["dev", "--gpus", gpus, "--", "sh", "-c", "echo $CUDA_VISIBLE_DEVICES"]).ok();
        ran.out.trim().split(',').map(str::to_owned).collect::<Vec<_>>()
    };
    let ran = mock(&["dev", "--gpus", "2", "--", "env"]).ok().says(&["GPUs 0,1"]);
    let two = ran.out.lines().find_map(|line| line.strip_prefix("CUDA_VISIBLE_DEVICES=")).expect("it is set");
    let (two, four): (Vec<&str>, _) = (two.split(',').collect(), visible("4"));
    assert!(two.len() == 2 && four.len() == 4 && two.iter().all(|gpu| gpu.starts_with("GPU-")), "{two:?} {four:?}");
}
