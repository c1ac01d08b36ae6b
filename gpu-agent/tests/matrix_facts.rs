//! The reader of topology matrices: on the published matrices of the shared data, on each hazard by itself, and on damage.

use std::path::{Path, PathBuf};

use gpu_agent::discovery::matrix::{self, Facts, MatrixError};
use proptest::prelude::*;
use serde_json::Value;

/// The keys of the facts, as the shared matrices name them.
const KEYS: [&str; 15] = [
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
    "cpu_affinity_count",
    "numa_affinity",
    "numa_nodes",
    "locality_domains",
];

fn shared_matrices() -> Vec<PathBuf> {
    let Ok(data) = std::env::var("ARES_TEST_DATA") else {
        eprintln!("SKIPPED: ARES_TEST_DATA is not set, the published matrices were not read");
        return Vec::new();
    };
    let folder = Path::new(&data).join("topo");
    let entries = std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut matrices: Vec<PathBuf> =
        entries.map(|entry| entry.unwrap().path()).filter(|p| p.extension().is_some_and(|e| e == "txt")).collect();
    matrices.sort();
    assert!(!matrices.is_empty(), "{} holds no matrix", folder.display());
    matrices
}

fn facts(text: &str) -> Facts {
    matrix::parse(text).unwrap_or_else(|e| panic!("{e}\n{text}"))
}

fn refusal(text: &str) -> MatrixError {
    matrix::parse(text).expect_err(text)
}

fn json(facts: &Facts) -> Value {
    serde_json::to_value(facts).unwrap()
}

#[test]
fn every_published_matrix_gives_the_facts_beside_it() {
    let mut wrong = Vec::new();
    for path in shared_matrices() {
        let expected: Value = serde_json::from_slice(&std::fs::read(path.with_extension("json")).unwrap()).unwrap();
        let found = match matrix::read(&path) {
            Ok(facts) => json(&facts),
            Err(error) => {
                wrong.push(error.to_string());
                continue;
            }
        };
        assert_eq!(found.as_object().unwrap().len(), KEYS.len());
        for key in KEYS {
            if found[key] != expected[key] {
                wrong.push(format!(
                    "{}: {key}\n  found    {}\n  expected {}",
                    path.display(),
                    found[key],
                    expected[key]
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// One damaged character, in each of 90 places of each published matrix: refused with a place, or read; never a panic.
#[test]
fn published_matrices_with_one_damaged_character_are_read_or_refused_with_a_place() {
    for path in shared_matrices() {
        let text = std::fs::read_to_string(&path).unwrap();
        let chars: Vec<char> = text.chars().collect();
        for index in 0..90 {
            let at = index * 7919 % chars.len();
            let mut damaged = chars.clone();
            match index % 3 {
                0 => damaged[at] = '\t',
                1 => drop(damaged.remove(at)),
                _ => damaged[at] = '7',
            }
            if let Err(error) = matrix::parse(&damaged.iter().collect::<String>()) {
                assert!(error.line >= 1 && error.column >= 1 && !error.message.is_empty());
            }
        }
    }
}

const FOUR: &str = "\tGPU0\tGPU1\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID
GPU0\t X \tNV2\tPIX\t0-3,8-11\t0\t\tN/A
GPU1\tNV2\t X \tSYS\t\t1\t\tN/A
NIC0\tPIX\tSYS\t X \t\t\t

Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes

NIC Legend:

  NIC0: mlx5_9
";

#[test]
fn an_empty_cpu_list_does_not_take_the_numa_node() {
    let facts = json(&facts(FOUR));
    assert_eq!(facts["cpu_affinity"], serde_json::json!({"GPU0": "0-3,8-11", "GPU1": ""}));
    assert_eq!(facts["cpu_affinity_count"], serde_json::json!({"GPU0": 8, "GPU1": 0}));
    assert_eq!(facts["numa_affinity"], serde_json::json!({"GPU0": "0", "GPU1": "1"}));
    assert_eq!(facts["nics"], serde_json::json!([{"column": "NIC0", "device": "mlx5_9"}]));
    assert_eq!(facts["nearest_nic"]["GPU0"], serde_json::json!({"class": "PIX", "nics": ["mlx5_9"]}));
    assert_eq!(facts["gpu_nic_classes"]["GPU1"], serde_json::json!({"mlx5_9": "SYS"}));
    assert_eq!(facts["locality_domains"], serde_json::json!([["GPU0"], ["GPU1"]]));
}

/// Each of these texts says the same as `FOUR` and must read the same.
#[test]
fn other_dresses_of_one_matrix_read_the_same() {
    let plain = facts(FOUR);
    let dresses = [
        ("windows line ends", FOUR.replace('\n', "\r\n")),
        ("old Mac line ends", FOUR.replace('\n', "\r")),
        ("byte-order mark", format!("\u{feff}{FOUR}")),
        ("trailing blanks", FOUR.replace('\n', "  \t \n")),
        (
            "escapes",
            FOUR.replace("\tGPU0\tGPU1", "\t\u{1b}[4mGPU0\u{1b}[0m\tGPU1").replace(" X ", "\u{1b}[1;32m X \u{1b}[0m"),
        ),
        ("escapes as text", FOUR.replace("\tGPU0\tGPU1", "\t^[[4mGPU0\tGPU1^[[0m")),
        ("escapes without ESC", FOUR.replace("\tGPU0\tGPU1", "\t[4mGPU0\tGPU1[0m")),
        ("comments", format!("# machine: two\n#\n{}", FOUR.replace("GPU1\tNV2", "# a note\nGPU1\tNV2"))),
        ("a prompt above", format!("user@box:~$ nvidia-smi topo -m\n\n{FOUR}")),
        ("glued cells", FOUR.replace("NV2\tPIX", "NV2PIX").replace(" X \tSYS", "XSYS")),
        ("lost leading tab of the header", FOUR.replacen('\t', "", 1)),
        ("lost tab before CPU Affinity", FOUR.replace("NIC0\tCPU", "NIC0 CPU")),
        ("title glued to the last device", FOUR.replace("NIC0\tCPU", "NIC0CPU")),
        ("glued device names", FOUR.replace("GPU1\tNIC0\tCPU", "GPU1NIC0\tCPU")),
        ("titles apart by one space", FOUR.replace("Affinity\tNUMA Affinity\tGPU", "Affinity NUMA Affinity GPU")),
        ("label glued to its first cell", FOUR.replace("GPU1\tNV2", "GPU1NV2")),
        ("lost tab between cells and CPU list", FOUR.replace("PIX\t0-3", "PIX0-3")),
        ("SOC", FOUR.replace("\tSYS", "\tSOC")),
        ("no-break spaces", FOUR.replace(" X ", "\u{a0}X\u{a0}")),
        ("no legend of classes", FOUR.replace("Legend:\n\n  X    = Self\n", "").replace("NIC NIC", "NIC")),
        ("rows in another order", {
            let mut lines: Vec<&str> = FOUR.lines().collect();
            lines.swap(1, 3);
            lines.join("\n")
        }),
        ("text after the matrix", format!("{FOUR}\nuser@box:~$ exit\n")),
    ];
    for (dress, text) in dresses {
        match matrix::parse(&text) {
            Ok(found) => assert_eq!(json(&found), json(&plain), "{dress}\n{text}"),
            Err(error) => panic!("{dress}: {error}\n{text}"),
        }
    }
    let wide: Vec<u8> = [0xfeff_u16].into_iter().chain(FOUR.encode_utf16()).flat_map(u16::to_le_bytes).collect();
    assert_eq!(matrix::parse_bytes(&wide).unwrap(), plain);
}

#[test]
fn without_a_legend_a_numbered_nic_has_no_device() {
    let text = FOUR.split("NIC Legend").next().unwrap();
    let facts = json(&facts(text));
    assert_eq!(facts["nics"], serde_json::json!([{"column": "NIC0", "device": null}]));
    assert_eq!(facts["nearest_nic"]["GPU1"]["nics"], serde_json::json!(["NIC0"]));
}

#[test]
fn odd_nic_names_are_devices() {
    for name in ["mlx5_bond_0", "rocep1s0f0", "bnxt_re1", "hfi1_0", "ibp12s0", "mana_0", "irdma-rdma1"] {
        let facts = json(&facts(&FOUR.replace("NIC0", name)));
        assert_eq!(facts["nics"], serde_json::json!([{"column": name, "device": name}]), "{name}");
    }
}

#[test]
fn names_that_begin_alike_keep_their_rows() {
    let text = "\tGPU0\tmlx5_1\tmlx5_10\tCPU Affinity\nGPU0\t X \tPIX\tSYS\t0-7\nmlx5_1\tPIX\t X \tSYS\nmlx5_10\tSYS\tSYS\t X \n";
    let facts = json(&facts(text));
    assert_eq!(facts["gpu_nic_classes"]["GPU0"], serde_json::json!({"mlx5_1": "PIX", "mlx5_10": "SYS"}));
    assert_eq!(facts["rows_missing"], serde_json::json!([]));
}

#[test]
fn one_gpu_is_a_matrix() {
    for text in [
        "\tGPU0\tCPU Affinity\tNUMA Affinity\nGPU0\t X \t0-7\t\tN/A\n",
        "        GPU0    CPU Affinity    NUMA Affinity\nGPU0     X      0-7             N/A\n",
    ] {
        let facts = json(&facts(text));
        assert_eq!(facts["gpus"], 1);
        assert_eq!(facts["gpu_classes"], serde_json::json!([["X"]]));
        assert_eq!(facts["cpu_affinity"]["GPU0"], "0-7");
        assert_eq!(facts["numa_affinity"]["GPU0"], Value::Null);
        assert_eq!(facts["nvlink_islands"], serde_json::json!([]));
        assert_eq!(facts["locality_domains"], serde_json::json!([["GPU0"]]));
    }
    assert_eq!(facts("\tGPU0\nGPU0\t X\n").gpus, 1);
}

#[test]
fn a_space_padded_row_without_cpus_is_read_by_its_place() {
    let text = "        GPU0    GPU1    CPU Affinity    NUMA Affinity   GPU NUMA ID
GPU0     X      PHB     0-23    0               N/A
GPU1    PHB      X              1               N/A
";
    let facts = json(&facts(text));
    assert_eq!(facts["cpu_affinity"], serde_json::json!({"GPU0": "0-23", "GPU1": ""}));
    assert_eq!(facts["numa_affinity"], serde_json::json!({"GPU0": "0", "GPU1": "1"}));
    // The same word under the title of the CPU list could be either: refused.
    let error = refusal(&text.replace("X              1               N/A", "X      1               N/A"));
    assert_eq!((error.line, error.column), (3, 25));
}

#[test]
fn a_lost_row_is_named_and_its_classes_come_from_the_others() {
    let without_gpu1 = FOUR.replace("GPU1\tNV2\t X \tSYS\t\t1\t\tN/A\n", "");
    let facts_one = json(&facts(&without_gpu1));
    assert_eq!(facts_one["rows_missing"], serde_json::json!(["GPU1"]));
    assert_eq!(facts_one["gpu_classes"], serde_json::json!([["X", "NV2"], ["NV2", "X"]]));
    assert_eq!(facts_one["gpu_nic_classes"]["GPU1"], serde_json::json!({"mlx5_9": "SYS"}));
    assert_eq!(facts_one["cpu_affinity"]["GPU1"], Value::Null);
    // With both rows of a pair lost nothing says its class: no guess.
    let both = json(&facts(&without_gpu1.replace("NIC0\tPIX\tSYS\t X \t\t\t\n", "")));
    assert_eq!(both["gpu_nic_classes"]["GPU1"], serde_json::json!({"mlx5_9": null}));
    assert_eq!(both["nearest_nic"].get("GPU1"), None);
}

#[test]
fn numa_ranges_share_a_domain_and_ids_are_keys() {
    let text = "\tGPU0\tGPU1\tGPU2\tCPU Affinity\tNUMA Affinity\nGPU0\t X \tSYS\tSYS\t0-3\t8\nGPU1\tSYS\t X \tNODE\t4-7\t0-1\nGPU2\tSYS\tNODE\t X \t4-7\t1\n";
    let facts = json(&facts(text));
    assert_eq!(facts["numa_nodes"], serde_json::json!([0, 1, 8]));
    assert_eq!(facts["locality_domains"], serde_json::json!([["GPU0"], ["GPU1", "GPU2"]]));
}

/// Text, line, column, and a part of the message that says what was expected.
#[test]
fn what_cannot_be_understood_is_refused_with_its_place() {
    let cases = [
        ("", 1, 1, "found no text"),
        ("No devices were found\n", 1, 1, "expected the header"),
        ("GPU0\t X \tSYS\t0-3\n", 1, 1, "expected the header"),
        ("\tGPU0\tGPU1\n\nLegend:\n", 1, 2, "expected rows below"),
        ("\tGPU0\tGPU1\nGPU0\t X \n", 2, 8, "1 of 2 cells"),
        ("\tGPU0\tGPU1\tCPU Affinity\nGPU0\t X \t0-3\nGPU1\tSYS\t X \t0-3\n", 2, 10, "expected the cell for GPU1"),
        ("\tGPU0\tGPU1\nGPU0\t X \tSYS\tSYS\n", 2, 14, "more cells"),
        ("\tGPU0\tGPU1\nGPU0\t X \tSYS\nGPU1\tPHB\t X \n", 3, 6, "line 2 says SYS"),
        ("\tGPU0\tGPU1\nGPU0\tSYS\t X \n", 2, 6, "expected X"),
        ("\tGPU0\tGPU1\nGPU0\t X \t X \n", 2, 11, "found X"),
        ("\tGPU0\tGPU1\nGPU0\t X \tNV0\n", 2, 10, "NV1 to NV99"),
        ("\tGPU0\tGPU1\nGPU0\t X \tNV180\n", 2, 10, "NV1 to NV99"),
        ("\tGPU0\tGPU1\nGPU0\t X \tnv2\n", 2, 10, "expected the cell for GPU1"),
        ("\tGPU0\tGPU1\nGPU0\t X \tQPI\n", 2, 10, "found \"QPI\""),
        ("\tGPU0\tNIC0\nGPU0\t X \tNV2\n", 2, 10, "NVLink joins GPUs"),
        ("\tGPU0\tGPU0\nGPU0\t X \t X \n", 1, 7, "twice"),
        ("\tGPU0\nGPU0\t X \nGPU0\t X \n", 3, 1, "twice"),
        ("\tGPU0\nGPU0\t X \nGPU1\tSYS\n", 3, 1, "no column in the header"),
        ("\tGPU0\tGPU1\nGPU0\t X \tSYS\nsome words\n", 3, 1, "expected the row GPU1"),
        ("\tGPU0\tCPU Affinity\nGPU0\t X \t0\n\tGPU0\tCPU Affinity\nGPU0\t X \t0\n", 3, 2, "second header"),
        ("\tGPU0\tCPU Affinity\tPower\nGPU0\t X \t0-3\t9\n", 1, 20, "expected no column but"),
        ("\tGPU0\tCPU Affinity\nGPU0\t X \tall\n", 2, 10, "CPU Affinity"),
        ("\tGPU0\tCPU Affinity\nGPU0\t X \t3-0\n", 2, 10, "backwards"),
        ("\tGPU0\tGPU1\tCPU Affinity\nGPU0\t X \tNV10-23\nGPU1\tNV1\t X \t0-23\n", 2, 14, "CPU Affinity"),
        ("\tGPU0\nGPU0\t X \t0-3\n", 2, 10, "expected the end of row GPU0"),
        // A tab lost in the tail: the CPU list and the node can't be told apart.
        ("\tGPU0\tCPU Affinity\tNUMA Affinity\nGPU0\t X \t1\n", 2, 10, "more than one column"),
        ("\tGPU0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\nGPU0\t X \t1\t\tN/A\n", 2, 10, "more than one column"),
        ("\tGPU0\tNIC0\nGPU0\t X \tSYS\nNIC0\tSYS\t X\n\nNIC Legend:\n\n  NIC0 mlx5_0\n", 7, 3, "NIC0: NAME"),
    ];
    let mut wrong = Vec::new();
    for (text, line, column, part) in cases {
        let error = refusal(text);
        if (error.line, error.column) != (line, column) || !error.message.contains(part) {
            wrong.push(format!("{text:?}\n  expected {line}:{column} {part:?}, found {error}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let twice = refusal(&format!("{FOUR}\n{FOUR}"));
    assert_eq!((twice.line, twice.column), (15, 2), "{twice}");
    let below = refusal(&format!("{FOUR}GPU1\tNV2\t X \tSYS\t\t1\t\tN/A\n"));
    assert!(below.line == 14 && below.message.contains("below the legend"), "{below}");
    let two_names = "\tGPU0\tNIC0\tNIC1\nGPU0\t X \tSYS\tSYS\nNIC Legend:\n  NIC0: mlx5_0\n  NIC1: mlx5_0\n";
    assert!(refusal(two_names).message.contains("mlx5_0 to two columns"));
}

#[test]
fn a_column_counts_what_the_terminal_hides() {
    let error = refusal("\tGPU0\tGPU1\nGPU0\t\u{1b}[4m X \u{1b}[0m\tQPI\n");
    assert_eq!((error.line, error.column), (2, 18));
}

/// A machine to print: classes above the diagonal, affinities of GPUs, number of GPUs.
#[derive(Clone, Debug)]
struct Printed {
    gpus: usize,
    names: Vec<String>,
    classes: Vec<Vec<String>>,
    cpus: Vec<String>,
    numa: Vec<u32>,
    tabs: bool,
    glue: bool,
}

fn machines() -> impl Strategy<Value = Printed> {
    (1..=16_usize, 0..=6_usize, any::<u64>(), any::<bool>(), any::<bool>()).prop_map(
        |(gpus, nics, seed, tabs, glue)| {
            let mut state = seed | 1;
            let mut draw = move |below: usize| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                (state % below as u64) as usize
            };
            let all = gpus + nics;
            let names =
                (0..all).map(|i| if i < gpus { format!("GPU{i}") } else { format!("mlx5_{}", i - gpus) }).collect();
            let mut classes = vec![vec!["X".to_owned(); all]; all];
            for (a, b) in (0..all).flat_map(|a| (a + 1..all).map(move |b| (a, b))) {
                let pcie = ["PIX", "PXB", "PHB", "NODE", "SYS"][draw(5)].to_owned();
                let class = if b < gpus && draw(2) == 0 { format!("NV{}", 1 + draw(18)) } else { pcie };
                classes[a][b].clone_from(&class);
                classes[b][a] = class;
            }
            let numa: Vec<u32> = (0..gpus).map(|_| draw(4) as u32).collect();
            // Only tabs can show an empty list.
            let cpus =
                numa.iter()
                    .map(|n| {
                        if tabs && draw(4) == 0 { String::new() } else { format!("{}-{},{}", n * 8, n * 8 + 6, 64 + n) }
                    })
                    .collect();
            Printed { gpus, names, classes, cpus, numa, tabs, glue }
        },
    )
}

impl Printed {
    fn render(&self) -> String {
        let mut text = if self.tabs { String::new() } else { " ".repeat(8) };
        for name in &self.names {
            text += &if self.tabs { format!("\t{name}") } else { format!("{name:<8}") };
        }
        text += if self.tabs {
            "\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\n"
        } else {
            "CPU Affinity    NUMA Affinity   GPU NUMA ID\n"
        };
        for (row, name) in self.names.iter().enumerate() {
            text += &if self.tabs { name.clone() } else { format!("{name:<8}") };
            for (column, class) in self.classes[row].iter().enumerate() {
                let cell = if class == "X" { " X " } else { class };
                let glued = self.glue && column % 3 == 1;
                text += &match (self.tabs, glued) {
                    (_, true) => cell.trim().to_owned(),
                    (true, false) => format!("\t{cell}"),
                    (false, false) => format!(" {cell:<7}"),
                };
            }
            if row < self.gpus {
                let (cpus, numa) = (&self.cpus[row], self.numa[row]);
                text +=
                    &if self.tabs { format!("\t{cpus}\t{numa}\t\tN/A") } else { format!(" {cpus:<16}{numa:<16}N/A") };
            }
            text.push('\n');
        }
        text
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn what_is_printed_is_read_back(machine in machines()) {
        let text = machine.render();
        let found = facts(&text);
        let value = json(&found);
        prop_assert_eq!(found.gpus, machine.gpus);
        prop_assert_eq!(&found.column_order, &machine.names);
        for a in 0..machine.gpus {
            let gpu = format!("GPU{a}");
            for b in 0..machine.gpus {
                prop_assert_eq!(&value["gpu_classes"][a][b], &machine.classes[a][b]);
            }
            for (n, nic) in machine.names.iter().enumerate().skip(machine.gpus) {
                prop_assert_eq!(&value["gpu_nic_classes"][&gpu][nic], &machine.classes[a][n]);
            }
            prop_assert_eq!(&value["cpu_affinity"][&gpu], &machine.cpus[a]);
            prop_assert_eq!(&value["numa_affinity"][&gpu], &machine.numa[a].to_string());
        }
    }

    #[test]
    fn no_text_makes_the_reader_panic(text in any::<String>()) {
        let _ = matrix::parse(&text);
    }

    #[test]
    fn no_bytes_make_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let _ = matrix::parse_bytes(&bytes);
    }

    #[test]
    fn no_mix_of_matrix_words_makes_the_reader_panic(
        words in proptest::collection::vec(
            prop::sample::select(vec![
                "GPU0", "GPU1", "GPU10", "NIC0", "mlx5_0", " X ", "X", "NV2", "NV", "NV99999999999", "SYS", "NODE", "\t", "\t\t", "\n", "\r", " ",
                "CPU Affinity", "NUMA Affinity", "GPU NUMA ID", "0-3", "N/A", "Legend:", "NIC Legend:", "NIC0:", "\u{1b}[4m", "\u{1b}", "[", "^[", "#", "é",
            ]),
            0..60,
        ),
    ) {
        let _ = matrix::parse(&words.concat());
    }

    #[test]
    fn a_damaged_matrix_is_read_or_refused(machine in machines(), cuts in proptest::collection::vec((any::<prop::sample::Index>(), any::<char>()), 1..6)) {
        let mut text: Vec<char> = machine.render().chars().collect();
        for (index, with) in cuts {
            let at = index.index(text.len());
            text[at] = with;
        }
        if let Err(error) = matrix::parse(&text.iter().collect::<String>()) {
            prop_assert!(error.line >= 1 && error.column >= 1);
        }
    }

    /// A class changed in one row only is never read: the other row of the pair says otherwise.
    #[test]
    fn a_class_changed_in_one_place_is_refused(machine in machines().prop_filter("a pair", |m| m.gpus > 1)) {
        let mut changed = machine;
        changed.glue = false;
        let other = if changed.classes[0][1] == "PHB" { "SYS" } else { "PHB" };
        changed.classes[0][1] = other.to_owned();
        let error = refusal(&changed.render());
        prop_assert_eq!(error.line, 3);
        prop_assert!(error.message.contains(other));
    }
}
