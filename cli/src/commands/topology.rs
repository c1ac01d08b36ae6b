//! `ares topology`: a machine's GPUs and how they are joined.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use gpu_agent::discovery::machine::PcieClass;
use gpu_agent::discovery::{self, Machine, Selection, matrix};
use proto::v1;
use scheduling::bandwidth::BandwidthTable;
use scheduling::choose::{Want, choose};
use scheduling::links::{Mask, slots};
use scheduling::predict::{gpu_list, predict};
use scheduling::{Class, Nic, PciClass};
use serde_json::json;

use super::show::counted;
use crate::Global;
use crate::connect::{client, runtime};
use crate::exit::{FAILURE, Failure, NOT_FOUND, Outcome, USAGE};
use crate::output::{self, Format, bandwidth};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Without arguments: this machine, as an agent here would see it (ARES_MOCK_GPU=true: the mock of 4 x V100).")]
pub struct Args {
    /// A node of the cluster
    #[arg(conflicts_with_all = ["file", "gpus"])]
    node: Option<String>,
    /// A saved `nvidia-smi topo -m` matrix; no cluster is needed
    #[arg(long, value_name = "MATRIX", conflicts_with = "gpus")]
    file: Option<PathBuf>,
    /// A simulated machine: sim:NAME or sim:FILE; no cluster is needed
    #[arg(long, value_name = "sim:NAME")]
    gpus: Option<String>,
    /// Choose so many GPUs of the machine as a job would get them, and say why
    #[arg(long, value_name = "K", conflicts_with = "node", value_parser = clap::value_parser!(u32).range(1..=128))]
    pick: Option<u32>,
    /// The GPUs to choose from, by index [default: all]
    #[arg(long, value_name = "0,1,..", value_delimiter = ',', requires = "pick")]
    free: Option<Vec<u8>>,
    /// What makes a choice good
    #[arg(long, value_enum, default_value = "bandwidth", requires = "pick")]
    policy: Policy,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Policy {
    /// The highest predicted bandwidth, then nearness, then what is left for others
    Bandwidth,
    /// +50 a pair with NVLink, -30 a pair over PCIe, +10 a pair of consecutive indices
    Points,
}

pub fn run(args: Args, global: Global) -> Outcome {
    if let Some(gpus) = args.pick {
        let machine = match &args.file {
            Some(path) => machine_of_matrix(path)?,
            None => machine(args.gpus.as_deref())?,
        };
        return pick(&machine, gpus, args.free.as_deref(), args.policy, global.output);
    }
    match (&args.file, &args.node) {
        (Some(path), _) => of_matrix(path, global.output),
        (None, Some(name)) => of_node(name, &global),
        (None, None) => of_machine(args.gpus.as_deref(), global.output),
    }
}

fn facts_of(path: &Path) -> Result<matrix::Facts, Failure> {
    matrix::read(path).map_err(|error| {
        let code = if matches!(error, matrix::FileError::Read { .. }) { NOT_FOUND } else { USAGE };
        Failure::new(code, error.to_string())
    })
}

/// The machine that a matrix stands for, with typical speeds where its comments name none.
fn machine_of_matrix(path: &Path) -> Result<Machine, Failure> {
    facts_of(path)?;
    survey(&Selection::File(path.to_owned()))
}

fn machine(gpus: Option<&str>) -> Result<Machine, Failure> {
    let mock = std::env::var("ARES_MOCK_GPU").ok();
    survey(&Selection::parse(gpus, mock.as_deref()).map_err(|error| Failure::usage(error.to_string()))?)
}

fn survey(selection: &Selection) -> Result<Machine, Failure> {
    let opened = discovery::open(selection, "here", 0).map_err(|error| Failure::usage(error.to_string()))?;
    discovery::survey(opened.backend.as_ref()).map_err(|error| Failure::new(FAILURE, error.to_string()))
}

/// What a choice of GPUs is, and why it was made.
struct Picked {
    set: Mask,
    /// In the order of the ranks.
    order: Vec<u8>,
    why: String,
    /// Under the policy `points`.
    points: Option<i32>,
}

fn pick(machine: &Machine, gpus: u32, free: Option<&[u8]>, policy: Policy, format: Format) -> Outcome {
    let table = BandwidthTable::new(&class(machine));
    let free = free_mask(&table, free)?;
    let picked = match policy {
        Policy::Bandwidth => by_bandwidth(&table, free, gpus),
        Policy::Points => by_points(&table, free, gpus),
    }?;
    let chosen: Vec<u8> = slots(picked.set).collect();
    let mbps = predict(&table, picked.set).mbps;
    match format {
        Format::Json | Format::Jsonl => {
            let policy = if policy == Policy::Points { "points" } else { "bandwidth" };
            let mut value = json!({
                "gpus": chosen,
                "ranks": picked.order,
                "busbw_mbps": mbps,
                "policy": policy,
                "why": picked.why,
            });
            if let Some(points) = picked.points {
                value["points"] = json!(points);
            }
            output::json(&value);
        }
        Format::Name => println!("{}", chosen.iter().map(u8::to_string).collect::<Vec<_>>().join(",")),
        Format::Table => println!("{}", picked.why),
    }
    Ok(ExitCode::SUCCESS)
}

fn free_mask(table: &BandwidthTable, free: Option<&[u8]>) -> Result<Mask, Failure> {
    let all = table.links().all();
    let Some(free) = free else { return Ok(all) };
    free.iter().try_fold(0, |mask, gpu| match 1u128.checked_shl(u32::from(*gpu)) {
        Some(slot) if slot & all != 0 => Ok(mask | slot),
        _ => {
            Err(Failure::usage(format!("--free {gpu}: the machine has GPUs 0 to {}", table.links().gpus() as i64 - 1)))
        }
    })
}

fn by_bandwidth(table: &BandwidthTable, free: Mask, gpus: u32) -> Result<Picked, Failure> {
    let want = Want { gpus, several_nodes: false, min_mbps: 0 };
    let choice = choose(table, free, want).map_err(|_| too_few(free, gpus))?;
    let among = among(table, free);
    Ok(Picked { set: choice.set, order: choice.order, why: predict(table, choice.set).text + &among, points: None })
}

fn by_points(table: &BandwidthTable, free: Mask, gpus: u32) -> Result<Picked, Failure> {
    use scheduling::points::{MOST_GPUS, choose_by_points};
    if table.links().gpus() > MOST_GPUS {
        let has = table.links().gpus();
        return Err(Failure::usage(format!(
            "--policy points takes machines of up to {MOST_GPUS} GPUs; this has {has}"
        )));
    }
    let (set, points) = choose_by_points(table.links(), free, gpus).ok_or_else(|| too_few(free, gpus))?;
    let why = format!("{points:+} points; {}{}", predict(table, set).text, among(table, free));
    Ok(Picked { set, order: slots(set).collect(), why, points: Some(points) })
}

/// Names the free GPUs where they are not all.
fn among(table: &BandwidthTable, free: Mask) -> String {
    if free == table.links().all() { String::new() } else { format!("; free were {}", gpu_list(free)) }
}

fn too_few(free: Mask, gpus: u32) -> Failure {
    let free = counted(free.count_ones(), "GPU");
    Failure::usage(format!("--pick {gpus}: the machine has only {free} to choose from"))
}

fn of_matrix(path: &Path, format: Format) -> Outcome {
    let facts = facts_of(path)?;
    match format {
        Format::Json | Format::Jsonl => {
            output::json(&serde_json::to_value(&facts).map_err(|error| Failure::new(FAILURE, error.to_string()))?);
        }
        _ => {
            let names: Vec<&str> = facts.gpu_names().collect();
            let cell = |row: usize, column: usize| match &facts.gpu_classes[row][column] {
                Some(class) => class.to_string(),
                None => "?".to_owned(),
            };
            let heads: Vec<&str> = std::iter::once("").chain(names.iter().copied()).collect();
            let rows = (0..facts.gpus).map(|row| {
                std::iter::once(names[row].to_owned()).chain((0..facts.gpus).map(|column| cell(row, column))).collect()
            });
            output::table(&heads, rows);
            println!("NVLink islands: {:?}{}", facts.nvlink_islands, if facts.nvswitch { ", switched" } else { "" });
            println!("Locality domains: {:?}", facts.locality_domains);
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn of_machine(gpus: Option<&str>, format: Format) -> Outcome {
    let machine = machine(gpus)?;
    let best = best_pair(&machine);
    match format {
        Format::Json | Format::Jsonl => {
            let mut value = serde_json::to_value(&machine).map_err(|error| Failure::new(FAILURE, error.to_string()))?;
            value["best_pair"] = json!(best.as_ref().map(|(gpus, _)| gpus));
            value["best_pair_why"] = json!(best.as_ref().map(|(_, why)| why));
            output::json(&value);
        }
        _ => {
            println!("{}", machine.source);
            machine.inventory.notes.iter().for_each(|note| println!("  {note}"));
            let gpus = &machine.inventory.gpus;
            if gpus.is_empty() {
                println!("No GPU was found here; --gpus sim:NAME shows a simulated machine.");
                return Ok(ExitCode::SUCCESS);
            }
            let rows = gpus.iter().map(|gpu| {
                vec![gpu.slot.to_string(), gpu.name.clone(), gpu.gpu_type.clone(), format!("{} MiB", gpu.memory_mib)]
            });
            output::table(&["GPU", "NAME", "TYPE", "MEMORY"], rows);
            let class = |a: usize, b: usize| match machine.topology.nvlinks[a][b] {
                _ if a == b => "X".to_owned(),
                0 => machine.topology.pcie[a][b].to_string(),
                links => format!("NV{links}"),
            };
            print_matrix(gpus.len(), class);
            if let Some((gpus, why)) = best {
                println!("Best pair: {gpus:?} ({why})");
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The two GPUs that a job would get on the empty machine, and why.
fn best_pair(machine: &Machine) -> Option<(Vec<u8>, String)> {
    let table = BandwidthTable::new(&class(machine));
    let all = table.links().all();
    let choice = choose(&table, all, Want { gpus: 2, several_nodes: false, min_mbps: 0 }).ok()?;
    let mut gpus = choice.order;
    gpus.sort_unstable();
    Some((gpus, predict(&table, choice.set).text))
}

/// The planner's view of what discovery found.
fn class(machine: &Machine) -> Class {
    let topology = &machine.topology;
    let gpus = machine.inventory.gpus.len();
    let pci = |class: PcieClass| match class {
        PcieClass::Own => PciClass::Same,
        PcieClass::Pix => PciClass::Pix,
        PcieClass::Pxb => PciClass::Pxb,
        PcieClass::Phb => PciClass::Phb,
        PcieClass::Node => PciClass::Node,
        PcieClass::Sys => PciClass::Sys,
    };
    Class {
        gpus: gpus as u8,
        nvlinks: topology.nvlinks.iter().flatten().map(|links| *links as u8).collect(),
        pci: topology.pcie.iter().flatten().map(|class| pci(*class)).collect(),
        nvlink_mbps_per_link: topology.nvlink_mbps,
        nvswitch: topology.switched,
        pcie_mbps: topology.pcie_mbps.iter().copied().min().unwrap_or_default(),
        inter_socket_mbps: topology.inter_socket_mbps,
        intel_cpu: topology.intel_cpu,
        p2p: topology.p2p,
        numa: topology.domains.iter().map(|domain| *domain as u8).collect(),
        nics: topology
            .nics
            .iter()
            .map(|nic| Nic {
                name: nic.name.clone(),
                mbps: nic.mbps,
                class_to_gpu: nic.classes.iter().map(|class| pci(*class)).collect(),
            })
            .collect(),
    }
}

fn of_node(name: &str, global: &Global) -> Outcome {
    let client = client(global)?;
    let nodes = runtime()?.block_on(client.list_nodes(v1::ListNodesRequest::default()))?.nodes;
    let node = nodes
        .into_iter()
        .find(|node| node.name == name)
        .ok_or_else(|| Failure::new(NOT_FOUND, format!("there is no node {name:?}")).advise("ares nodes lists them"))?;
    let links = node.links.clone().unwrap_or_default();
    if matches!(global.output, Format::Json | Format::Jsonl) {
        let mut value = crate::json::node(&node);
        value["links"] = links_json(&links);
        output::json(&value);
        return Ok(ExitCode::SUCCESS);
    }
    let state = if node.reason.is_empty() { node.state.clone() } else { format!("{} ({})", node.state, node.reason) };
    println!(
        "{} {state}: {} in {}, {} MiB{}",
        node.name,
        counted(node.cores, "core"),
        counted(node.cores_by_numa.len() as u32, "NUMA node"),
        node.mem_mib,
        if node.simulated { ", simulated" } else { "" }
    );
    let rows = node.gpus.iter().map(|gpu| {
        let holder =
            if gpu.job_id == 0 { "free".to_owned() } else { format!("job {} (token {})", gpu.job_id, gpu.token) };
        vec![
            gpu.slot.to_string(),
            gpu.r#type.clone(),
            format!("{} MiB", gpu.mem_mib),
            gpu.numa.to_string(),
            gpu.health.clone(),
            holder,
        ]
    });
    if node.gpus.is_empty() {
        println!("It has no GPU.");
        return Ok(ExitCode::SUCCESS);
    }
    output::table(&["GPU", "TYPE", "MEMORY", "NUMA", "HEALTH", "HELD BY"], rows);
    let gpus = links.gpus as usize;
    print_matrix(gpus, |a, b| link_word(&links, a, b));
    println!(
        "NVLink {} a link{}, PCIe {}, between sockets {}",
        bandwidth(links.nvlink_mbps_per_link),
        if links.nvswitch { " (switched)" } else { "" },
        bandwidth(links.pcie_mbps),
        bandwidth(links.inter_socket_mbps)
    );
    for nic in &links.nics {
        let nearest = nic.class_to_gpu.iter().enumerate().min_by_key(|(_, class)| **class).map(|(gpu, _)| gpu);
        let near = nearest.map(|gpu| format!(", nearest GPU {gpu}")).unwrap_or_default();
        println!("NIC {}: {}{near}", nic.name, bandwidth(nic.mbps));
    }
    Ok(ExitCode::SUCCESS)
}

fn print_matrix(gpus: usize, class: impl Fn(usize, usize) -> String) {
    if gpus == 0 {
        return;
    }
    let names: Vec<String> = (0..gpus).map(|gpu| format!("GPU{gpu}")).collect();
    let heads: Vec<&str> = std::iter::once("").chain(names.iter().map(String::as_str)).collect();
    let rows = (0..gpus).map(|a| std::iter::once(names[a].clone()).chain((0..gpus).map(|b| class(a, b))).collect());
    output::table(&heads, rows);
}

fn link_word(links: &v1::MachineLinks, a: usize, b: usize) -> String {
    let at = a * links.gpus as usize + b;
    let pci = links.pci.get(at).and_then(|class| v1::PciClass::try_from(*class).ok()).unwrap_or_default();
    match links.nvlinks.get(at) {
        _ if a == b => "X".to_owned(),
        Some(count) if *count > 0 => format!("NV{count}"),
        _ => pci.as_str_name().trim_start_matches("PCI_CLASS_").to_owned(),
    }
}

fn links_json(links: &v1::MachineLinks) -> serde_json::Value {
    let gpus = links.gpus as usize;
    let matrix: Vec<Vec<String>> = (0..gpus).map(|a| (0..gpus).map(|b| link_word(links, a, b)).collect()).collect();
    json!({
        "classes": matrix,
        "nvlink_mbps_per_link": links.nvlink_mbps_per_link,
        "nvswitch": links.nvswitch,
        "pcie_mbps": links.pcie_mbps,
        "inter_socket_mbps": links.inter_socket_mbps,
        "nics": links.nics.iter().map(|nic| json!({ "name": nic.name, "mbps": nic.mbps })).collect::<Vec<_>>(),
    })
}
