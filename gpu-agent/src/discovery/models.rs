//! Machine models: what a simulated machine has.
//!
//! A model is a small TOML file of facts with sources, ours (`machines/*.toml`, in the binary) or the user's, or an `nvidia-smi`
//! matrix. `Selection` reads what `--gpus` says; `Model` is the checked result. Nothing runs here: `sim` does that.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::machine::{Host, Nic, NumaNode, PcieClass, Topology};
use super::{from_matrix, matrix};

/// Our models by the name that `--gpus sim:NAME` takes.
const NAMED: [(&str, &str); 5] = [
    ("hgx-h100", include_str!("../../machines/hgx-h100.toml")),
    ("dgx1-v100", include_str!("../../machines/dgx1-v100.toml")),
    ("a100-bridged", include_str!("../../machines/a100-bridged.toml")),
    ("rtx4090x8", include_str!("../../machines/rtx4090x8.toml")),
    ("a100-mig", include_str!("../../machines/a100-mig.toml")),
];

/// What `ARES_MOCK_GPU=true` stands for.
const MOCK: (&str, &str) = ("mock-v100", include_str!("../../machines/mock-v100.toml"));

/// The scheduler keeps a machine's free GPUs as bits of one word.
const MAX_GPUS: usize = 128;

/// Names of our models, in the order they are shown.
pub fn names() -> impl Iterator<Item = &'static str> {
    NAMED.iter().map(|(name, _)| *name)
}

/// Which GPUs an agent is to have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Selection {
    /// The machine's own, through NVML.
    Real,
    /// One of our models.
    Named(&'static str),
    /// A matrix or a model file.
    File(PathBuf),
    /// The original's mock machine.
    Mock,
}

/// Why there is no simulated machine.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    #[error("--gpus {0:?}: expected auto, sim:NAME or sim:FILE (a value with a / or a suffix is a file); names: {known}", known = known())]
    Form(String),
    #[error("--gpus sim:{0}: no such machine model; known: {known}; a value with a / or a suffix is a file", known = known())]
    Unknown(String),
    #[error("{path}: {source}")]
    Read { path: String, source: std::io::Error },
    #[error("{path}: {source}")]
    Matrix { path: String, source: matrix::MatrixError },
    #[error("{path}: {message}")]
    Invalid { path: String, message: String },
}

fn known() -> String {
    names().collect::<Vec<_>>().join(", ")
}

impl Selection {
    /// From the value of `--gpus` and of `ARES_MOCK_GPU`; the flag wins.
    pub fn parse(gpus: Option<&str>, mock: Option<&str>) -> Result<Selection, ModelError> {
        let mocked = mock.is_some_and(|value| value.eq_ignore_ascii_case("true") || value == "1");
        match gpus {
            None if mocked => Ok(Selection::Mock),
            None | Some("auto") => Ok(Selection::Real),
            Some(value) => match value.strip_prefix("sim:") {
                Some(model) if !model.is_empty() => simulated(model),
                _ => Err(ModelError::Form(value.to_owned())),
            },
        }
    }
}

fn simulated(value: &str) -> Result<Selection, ModelError> {
    if value.contains(['/', '.']) {
        return Ok(Selection::File(PathBuf::from(value)));
    }
    match names().find(|name| *name == value) {
        Some(name) => Ok(Selection::Named(name)),
        None => Err(ModelError::Unknown(value.to_owned())),
    }
}

/// A machine to simulate, checked: every matrix is square and symmetric, every index in range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Model {
    /// The model's name, or the file's without its suffix.
    pub name: String,
    /// Where the facts come from, for people.
    pub source: String,
    pub gpu: GpuFacts,
    pub topology: Topology,
    /// NUMA node id of each GPU.
    pub numa_nodes: Vec<u32>,
    /// Of each GPU that is a slice of one (a MIG instance): what it is.
    pub slices: Vec<Option<Slice>>,
    pub host: Host,
}

/// A slice of a GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    /// NVIDIA's name of it, such as `1g.5gb`.
    pub profile: String,
    /// As the profile says, in GB of 10^9 bytes.
    pub memory_mib: u64,
}

/// What each whole GPU of a model is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuFacts {
    pub name: String,
    pub memory_mib: u64,
    pub compute_capability: String,
}

impl Model {
    /// One of our models by name.
    pub fn named(name: &str) -> Result<Model, ModelError> {
        let (name, text) =
            NAMED.iter().find(|(known, _)| *known == name).ok_or_else(|| ModelError::Unknown(name.to_owned()))?;
        embedded(name, text)
    }

    /// The original's mock machine.
    pub fn mock() -> Result<Model, ModelError> {
        embedded(MOCK.0, MOCK.1)
    }

    /// A file: `.toml` is a model, anything else a matrix.
    pub fn file(path: &Path) -> Result<Model, ModelError> {
        let shown = path.display().to_string();
        let bytes = std::fs::read(path).map_err(|source| ModelError::Read { path: shown.clone(), source })?;
        let name = path.file_stem().map_or_else(|| shown.clone(), |stem| stem.to_string_lossy().into_owned());
        if is_toml(path) {
            return from_toml(&name, &shown, &matrix::decode(&bytes), path.parent());
        }
        let facts = matrix::parse_bytes(&bytes).map_err(|source| ModelError::Matrix { path: shown.clone(), source })?;
        if facts.gpus > MAX_GPUS {
            let message = format!("expected at most {MAX_GPUS} GPUs, found {}", facts.gpus);
            return Err(ModelError::Invalid { path: shown, message });
        }
        let comments = matrix::comments(&matrix::decode(&bytes)).collect::<Vec<_>>().join("\n");
        from_matrix::model(&name, &shown, &facts, &comments)
            .map_err(|message| ModelError::Invalid { path: shown, message })
    }
}

fn is_toml(path: &Path) -> bool {
    path.extension().is_some_and(|suffix| suffix.eq_ignore_ascii_case("toml"))
}

fn embedded(name: &str, text: &str) -> Result<Model, ModelError> {
    let mut model = from_toml(name, name, text, None)?;
    model.source = format!("simulated: model {name}");
    Ok(model)
}

/// The TOML form of a model.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    /// A matrix beside this file that gives GPUs, links, NUMA nodes and NICs; the tables below then override its typical values.
    topo_file: Option<PathBuf>,
    gpu: GpuTable,
    #[serde(default)]
    nvlink: NvlinkTable,
    #[serde(default)]
    pcie: PcieTable,
    #[serde(default)]
    cpu: CpuTable,
    #[serde(default)]
    numa: Vec<NumaTable>,
    #[serde(default)]
    nic: Vec<NicTable>,
    #[serde(default)]
    mig: Vec<MigTable>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct GpuTable {
    name: String,
    count: Option<usize>,
    memory_mib: u64,
    compute_capability: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct NvlinkTable {
    mbps: Option<u32>,
    /// Links of every pair.
    links: Option<u32>,
    /// Or pair by pair: first GPU, second GPU, links.
    pairs: Option<Vec<(usize, usize, u32)>>,
    switched: Option<bool>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct PcieTable {
    mbps: Option<u32>,
    p2p: Option<bool>,
    classes: Option<Vec<String>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct CpuTable {
    intel: Option<bool>,
    inter_socket_mbps: Option<u32>,
    memory_mib: Option<u64>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct NumaTable {
    node: u32,
    cores: u32,
    gpus: Vec<usize>,
}

/// GPUs that are cut, each in the same slices, by the names of their profiles.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct MigTable {
    gpus: Vec<usize>,
    slices: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct NicTable {
    name: String,
    mbps: u32,
    classes: String,
}

fn from_toml(name: &str, shown: &str, text: &str, folder: Option<&Path>) -> Result<Model, ModelError> {
    let invalid = |message: String| ModelError::Invalid { path: shown.to_owned(), message };
    let file: File = toml::from_str(text).map_err(|e| invalid(e.to_string().trim_end().to_owned()))?;
    let mut model = match &file.topo_file {
        Some(topo) if is_toml(topo) => {
            return Err(invalid("topo_file: expected a matrix, found another model".to_owned()));
        }
        Some(topo) => Model::file(&folder.unwrap_or_else(|| Path::new("")).join(topo))?,
        None => bare(&file).map_err(invalid)?,
    };
    model.name = name.to_owned();
    model.source = format!("simulated: file {shown}");
    apply(&file, &mut model).and_then(|()| apply_mig(&file.mig, &mut model)).map_err(invalid)?;
    Ok(model)
}

/// The machine of a file without a matrix, before its tables are applied.
fn bare(file: &File) -> Result<Model, String> {
    let count = file.gpu.count.ok_or("[gpu] count: expected the number of GPUs (or a topo_file)")?;
    if !(1..=MAX_GPUS).contains(&count) {
        return Err(format!("[gpu] count: expected 1 to {MAX_GPUS}, found {count}"));
    }
    for (there, field) in [
        (file.pcie.mbps.is_some(), "[pcie] mbps"),
        (file.pcie.p2p.is_some(), "[pcie] p2p"),
        (file.pcie.classes.is_some(), "[pcie] classes"),
        (file.cpu.intel.is_some(), "[cpu] intel"),
        (file.cpu.inter_socket_mbps.is_some(), "[cpu] inter_socket_mbps"),
        (file.cpu.memory_mib.is_some(), "[cpu] memory_mib"),
        (!file.numa.is_empty(), "[[numa]]"),
    ] {
        if !there {
            return Err(format!("{field}: is missing (a model without a topo_file gives all of its facts)"));
        }
    }
    let topology = Topology {
        nvlinks: vec![vec![0; count]; count],
        pcie_mbps: vec![0; count],
        pcie: vec![vec![PcieClass::Own; count]; count],
        domains: vec![0; count],
        ..Topology::default()
    };
    let gpu = GpuFacts { name: String::new(), memory_mib: 0, compute_capability: String::new() };
    let (name, source) = (String::new(), String::new());
    Ok(Model {
        name,
        source,
        gpu,
        topology,
        numa_nodes: vec![0; count],
        slices: vec![None; count],
        host: Host::default(),
    })
}

/// Puts each table of the file over what the model has.
fn apply(file: &File, model: &mut Model) -> Result<(), String> {
    let count = model.topology.nvlinks.len();
    if file.gpu.count.is_some_and(|stated| stated != count) {
        return Err(format!("[gpu] count: is {}, but the matrix has {count} GPUs", file.gpu.count.unwrap_or(0)));
    }
    let GpuTable { name, memory_mib, compute_capability, .. } = &file.gpu;
    model.gpu =
        GpuFacts { name: name.clone(), memory_mib: *memory_mib, compute_capability: compute_capability.clone() };
    apply_nvlink(&file.nvlink, &mut model.topology)?;
    apply_pcie(&file.pcie, &mut model.topology)?;
    model.topology.intel_cpu = file.cpu.intel.unwrap_or(model.topology.intel_cpu);
    model.topology.inter_socket_mbps = file.cpu.inter_socket_mbps.unwrap_or(model.topology.inter_socket_mbps);
    model.host.memory_mib = file.cpu.memory_mib.unwrap_or(model.host.memory_mib);
    if !file.numa.is_empty() {
        apply_numa(&file.numa, model)?;
    }
    if !file.nic.is_empty() {
        model.topology.nics = file.nic.iter().map(|nic| nic_of(nic, count)).collect::<Result<_, _>>()?;
    }
    Ok(())
}

fn apply_nvlink(table: &NvlinkTable, topology: &mut Topology) -> Result<(), String> {
    let count = topology.nvlinks.len();
    topology.nvlink_mbps = table.mbps.unwrap_or(topology.nvlink_mbps);
    topology.switched = table.switched.unwrap_or(topology.switched);
    if table.links.is_some() && table.pairs.is_some() {
        return Err("[nvlink]: expected links or pairs, found both".to_owned());
    }
    if let Some(links) = table.links {
        topology.nvlinks = (0..count).map(|a| (0..count).map(|b| if a == b { 0 } else { links }).collect()).collect();
    }
    if let Some(pairs) = &table.pairs {
        topology.nvlinks = vec![vec![0; count]; count];
        for &(a, b, links) in pairs {
            if a >= count || b >= count || a == b {
                return Err(format!("[nvlink] pairs: expected two different GPUs below {count}, found {a} and {b}"));
            }
            topology.nvlinks[a][b] = links;
            topology.nvlinks[b][a] = links;
        }
    }
    let linked = topology.nvlinks.iter().flatten().any(|links| *links > 0);
    if linked && topology.nvlink_mbps == 0 {
        return Err("[nvlink] mbps: is missing, but GPUs have NVLinks".to_owned());
    }
    Ok(())
}

fn apply_pcie(table: &PcieTable, topology: &mut Topology) -> Result<(), String> {
    let count = topology.nvlinks.len();
    topology.p2p = table.p2p.unwrap_or(topology.p2p);
    if let Some(mbps) = table.mbps {
        topology.pcie_mbps = vec![mbps; count];
    }
    let Some(rows) = &table.classes else { return Ok(()) };
    if rows.len() != count {
        return Err(format!("[pcie] classes: expected {count} rows, found {}", rows.len()));
    }
    let rows: Vec<Vec<PcieClass>> =
        rows.iter().map(|row| class_row(row, count, "[pcie] classes")).collect::<Result<_, _>>()?;
    let pairs = (0..count).flat_map(|a| (0..count).map(move |b| (a, b)));
    let wrong = |&(a, b): &(usize, usize)| rows[a][b] != rows[b][a] || (a == b) != (rows[a][b] == PcieClass::Own);
    if let Some((a, b)) = pairs.into_iter().find(wrong) {
        return Err(format!(
            "[pcie] classes: row {a}, column {b}: expected a symmetric matrix with X on its diagonal, found {}",
            rows[a][b]
        ));
    }
    topology.pcie = rows;
    Ok(())
}

fn class_row(row: &str, count: usize, field: &str) -> Result<Vec<PcieClass>, String> {
    let classes: Vec<PcieClass> = row
        .split_whitespace()
        .map(str::parse)
        .collect::<Result<_, String>>()
        .map_err(|why| format!("{field}: {why}"))?;
    if classes.len() != count {
        return Err(format!("{field}: expected {count} classes in a row, found {}", classes.len()));
    }
    Ok(classes)
}

fn apply_numa(tables: &[NumaTable], model: &mut Model) -> Result<(), String> {
    let mut nodes: Vec<Option<u32>> = vec![None; model.numa_nodes.len()];
    for (index, table) in tables.iter().enumerate() {
        if tables[..index].iter().any(|earlier| earlier.node == table.node) {
            return Err(format!("[[numa]] node: {} stands twice", table.node));
        }
        for gpu in &table.gpus {
            match nodes.get_mut(*gpu) {
                Some(free @ None) => *free = Some(table.node),
                Some(Some(_)) => return Err(format!("[[numa]] gpus: GPU {gpu} is in two nodes")),
                None => return Err(format!("[[numa]] gpus: expected GPUs below {}, found {gpu}", nodes.len())),
            }
        }
    }
    let lacking = nodes.iter().position(Option::is_none);
    if let Some(gpu) = lacking {
        return Err(format!("[[numa]] gpus: GPU {gpu} is in no node"));
    }
    model.numa_nodes = nodes.into_iter().flatten().collect();
    model.topology.domains = super::machine::renumber(&model.numa_nodes);
    model.host.numa =
        tables.iter().map(|table| NumaNode { node: table.node, cores: table.cores, cpus: String::new() }).collect();
    Ok(())
}

/// Puts the slices of GPUs that are cut in their place. All indexes before are those of whole GPUs.
fn apply_mig(tables: &[MigTable], model: &mut Model) -> Result<(), String> {
    let count = model.numa_nodes.len();
    let mut cuts: Vec<&[String]> = vec![&[]; count];
    for table in tables {
        if table.slices.is_empty() {
            return Err("[[mig]] slices: expected profiles such as 1g.5gb, found none".to_owned());
        }
        for gpu in &table.gpus {
            match cuts.get_mut(*gpu) {
                Some(cut) if cut.is_empty() => *cut = &table.slices,
                Some(_) => return Err(format!("[[mig]] gpus: GPU {gpu} is cut twice")),
                None => return Err(format!("[[mig]] gpus: expected GPUs below {count}, found {gpu}")),
            }
        }
    }
    let mut devices: Vec<(usize, Option<Slice>)> = Vec::new();
    for (gpu, cut) in cuts.into_iter().enumerate() {
        if cut.is_empty() {
            devices.push((gpu, None));
        }
        for profile in cut {
            devices.push((gpu, Some(slice_of(profile)?)));
        }
    }
    if devices.len() > MAX_GPUS {
        return Err(format!("[[mig]]: expected at most {MAX_GPUS} GPUs and slices, found {}", devices.len()));
    }
    let cut: Vec<(usize, bool)> = devices.iter().map(|(gpu, slice)| (*gpu, slice.is_some())).collect();
    model.topology = model.topology.cut(&cut);
    model.numa_nodes = cut.iter().map(|(gpu, _)| model.numa_nodes[*gpu]).collect();
    model.slices = devices.into_iter().map(|(_, slice)| slice).collect();
    Ok(())
}

fn slice_of(profile: &str) -> Result<Slice, String> {
    let number = |text: &str| text.parse::<u64>().ok();
    let sizes = profile.split_once("g.").and_then(|(compute, rest)| number(compute).zip(rest.split_once("gb")));
    let gb = sizes.and_then(|(_, (gb, _))| number(gb));
    let gb = gb.ok_or_else(|| format!("[[mig]] slices: expected a profile such as 1g.5gb, found {profile:?}"))?;
    Ok(Slice { profile: profile.to_owned(), memory_mib: gb.saturating_mul(1_000_000_000) >> 20 })
}

fn nic_of(table: &NicTable, count: usize) -> Result<Nic, String> {
    let classes = class_row(&table.classes, count, "[[nic]] classes")?;
    if classes.contains(&PcieClass::Own) {
        return Err(format!("[[nic]] classes: {} is no GPU, found X", table.name));
    }
    Ok(Nic { name: table.name.clone(), mbps: table.mbps, bond: None, classes })
}
