//! The facts of a matrix, in the shapes that `ares topology -o json` prints.

use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

use super::Class;
use super::header::{Header, is_gpu, numbered};
use super::legend::Names;
use super::rows::{self, Row};
use super::tail::Affinity;
use crate::discovery::cpulist::CpuList;

/// More links than one GPU has (18 on the largest): an island that needs more between its members goes through a switch.
const MOST_LINKS_OF_A_GPU: u32 = 18;

/// A JSON object whose keys keep the order of the matrix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keyed<V>(pub Vec<(String, V)>);

impl<V> Keyed<V> {
    pub fn get(&self, key: &str) -> Option<&V> {
        self.0.iter().find(|(known, _)| known == key).map(|(_, value)| value)
    }
}

impl<V: Serialize> Serialize for Keyed<V> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (key, value) in &self.0 {
            map.serialize_entry(key, value)?;
        }
        map.end()
    }
}

/// A column that is no GPU. `device` is its name in the NIC legend, or the column itself when it is a device name; `None` for a
/// `NICn` without a legend.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NicColumn {
    pub column: String,
    pub device: Option<String>,
}

impl NicColumn {
    /// The key of this NIC in the facts.
    pub fn name(&self) -> &str {
        self.device.as_deref().unwrap_or(&self.column)
    }
}

/// The best class that a GPU has to any NIC, and every NIC that has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Nearest {
    pub class: Class,
    pub nics: Vec<String>,
}

/// What one matrix says. GPUs are in the order of their numbers; indexes are into that order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Facts {
    pub gpus: usize,
    pub nics: Vec<NicColumn>,
    /// All columns as printed.
    pub column_order: Vec<String>,
    /// Columns whose row the text lacks. Their classes come from the other rows; a pair of two of them is `null`.
    pub rows_missing: Vec<String>,
    pub gpu_classes: Vec<Vec<Option<Class>>>,
    pub gpu_nic_classes: Keyed<Keyed<Option<Class>>>,
    pub nearest_nic: Keyed<Nearest>,
    /// First index, second (greater) index, links.
    pub nvlink_pairs: Vec<(usize, usize, u32)>,
    /// Connected components of the pairs above.
    pub nvlink_islands: Vec<Vec<usize>>,
    /// An island is complete, uniform, and needs more links than a GPU has.
    pub nvswitch: bool,
    /// The text printed; empty: the column is there and empty; `null`: no such column, or not available.
    pub cpu_affinity: Keyed<Option<String>>,
    pub cpu_affinity_count: Keyed<usize>,
    /// As `cpu_affinity`; may be a range.
    pub numa_affinity: Keyed<Option<String>>,
    /// Node ids: keys, not indexes.
    pub numa_nodes: Vec<u32>,
    /// GPUs that share a NUMA node; without that column the CPU list; failing that, whatever is not SYS apart.
    pub locality_domains: Vec<Vec<String>>,
}

impl Facts {
    /// The names of the GPUs, by index.
    pub fn gpu_names(&self) -> impl Iterator<Item = &str> {
        self.cpu_affinity.0.iter().map(|(name, _)| name.as_str())
    }
}

/// Gathers the facts of a header, its rows and its legend.
pub(super) fn collect(header: &Header, rows: &[Row<'_>], names: &Names) -> Facts {
    let table = Table { header, rows };
    let gpus = table.gpus();
    let nics = nic_columns(header, names);
    let gpu_classes: Vec<Vec<Option<Class>>> =
        gpus.iter().map(|a| gpus.iter().map(|b| table.class(*a, *b)).collect()).collect();
    let gpu_nic_classes = table.nic_classes(&gpus, &nics);
    let nvlink_pairs = nvlink_pairs(&gpu_classes);
    let islands = components(gpus.len(), |a, b| links(&gpu_classes, a, b) > 0);
    let nvlink_islands: Vec<Vec<usize>> = islands.into_iter().filter(|island| island.len() > 1).collect();
    let cpu: Vec<Option<String>> = gpus.iter().map(|gpu| table.affinity(*gpu, |affinity| &affinity.cpu)).collect();
    let numa: Vec<Option<String>> = gpus.iter().map(|gpu| table.affinity(*gpu, |affinity| &affinity.numa)).collect();
    let name = |index: usize| header.devices[gpus[index]].clone();
    let keyed =
        |values: &[Option<String>]| Keyed(values.iter().enumerate().map(|(i, v)| (name(i), v.clone())).collect());
    let domains = domains(&gpu_classes, &sets(&numa), &sets(&cpu));

    Facts {
        gpus: gpus.len(),
        column_order: header.devices.clone(),
        rows_missing: rows::missing(rows, header).map(str::to_owned).collect(),
        nearest_nic: nearest(&gpu_nic_classes),
        nvswitch: nvlink_islands.iter().any(|island| is_switched(island, &gpu_classes)),
        cpu_affinity: keyed(&cpu),
        cpu_affinity_count: Keyed(sets(&cpu).iter().enumerate().map(|(i, set)| (name(i), set.count())).collect()),
        numa_affinity: keyed(&numa),
        numa_nodes: sets(&numa).iter().fold(CpuList::default(), |all, set| all.union(set)).ids().collect(),
        locality_domains: domains.into_iter().map(|domain| domain.into_iter().map(name).collect()).collect(),
        nics,
        gpu_classes,
        gpu_nic_classes,
        nvlink_pairs,
        nvlink_islands,
    }
}

/// Header and rows, asked by device.
struct Table<'a> {
    header: &'a Header,
    rows: &'a [Row<'a>],
}

impl Table<'_> {
    /// Device indexes of the GPUs, by their number.
    fn gpus(&self) -> Vec<usize> {
        let devices = &self.header.devices;
        let mut gpus: Vec<usize> = (0..devices.len()).filter(|device| is_gpu(&devices[*device])).collect();
        gpus.sort_by_key(|device| numbered(&devices[*device], "GPU"));
        gpus
    }

    fn row(&self, device: usize) -> Option<&Row<'_>> {
        self.rows.iter().find(|row| row.device == device)
    }

    /// The class of a pair from either row; rows agree, that was checked.
    fn class(&self, a: usize, b: usize) -> Option<Class> {
        if a == b {
            return Some(Class::Own);
        }
        let cell = |from: usize, to: usize| self.row(from).map(|row| row.cells[to].0);
        cell(a, b).or_else(|| cell(b, a))
    }

    fn affinity(&self, device: usize, of: impl Fn(&Affinity) -> &Option<String>) -> Option<String> {
        self.row(device).and_then(|row| of(&row.affinity).clone())
    }

    fn nic_classes(&self, gpus: &[usize], nics: &[NicColumn]) -> Keyed<Keyed<Option<Class>>> {
        if nics.is_empty() {
            return Keyed(Vec::new());
        }
        let devices = &self.header.devices;
        let column = |nic: &NicColumn| devices.iter().position(|device| *device == nic.column);
        let of_gpu = |gpu: usize| {
            let class = |nic: &NicColumn| column(nic).and_then(|nic| self.class(gpu, nic));
            Keyed(nics.iter().map(|nic| (nic.name().to_owned(), class(nic))).collect())
        };
        Keyed(gpus.iter().map(|gpu| (devices[*gpu].clone(), of_gpu(*gpu))).collect())
    }
}

fn nic_columns(header: &Header, names: &Names) -> Vec<NicColumn> {
    let nics = header.devices.iter().filter(|device| !is_gpu(device));
    let device = |column: &String| match numbered(column, "NIC") {
        Some(_) => names.iter().find(|(known, _)| known == column).map(|(_, device)| device.clone()),
        None => Some(column.clone()),
    };
    nics.map(|column| NicColumn { column: column.clone(), device: device(column) }).collect()
}

fn nearest(classes: &Keyed<Keyed<Option<Class>>>) -> Keyed<Nearest> {
    let of_gpu = |nics: &Keyed<Option<Class>>| {
        let class = nics.0.iter().filter_map(|(_, class)| *class).min_by_key(|class| distance(*class))?;
        let near = nics.0.iter().filter(|(_, other)| *other == Some(class)).map(|(name, _)| name.clone());
        Some(Nearest { class, nics: near.collect() })
    };
    Keyed(classes.0.iter().filter_map(|(gpu, nics)| Some((gpu.clone(), of_gpu(nics)?))).collect())
}

fn distance(class: Class) -> u32 {
    match class {
        Class::Own => 0,
        Class::NvLink(_) => 1,
        Class::Pix => 2,
        Class::Pxb => 3,
        Class::Phb => 4,
        Class::Node => 5,
        Class::Sys => 6,
    }
}

fn links(classes: &[Vec<Option<Class>>], a: usize, b: usize) -> u32 {
    match classes[a][b] {
        Some(Class::NvLink(links)) => links,
        _ => 0,
    }
}

fn nvlink_pairs(classes: &[Vec<Option<Class>>]) -> Vec<(usize, usize, u32)> {
    let pairs = (0..classes.len()).flat_map(|a| (a + 1..classes.len()).map(move |b| (a, b)));
    pairs.map(|(a, b)| (a, b, links(classes, a, b))).filter(|(_, _, links)| *links > 0).collect()
}

/// Groups of indexes joined by `joined`, transitively; each ascending, ordered by their first member.
pub(crate) fn components(count: usize, joined: impl Fn(usize, usize) -> bool) -> Vec<Vec<usize>> {
    let mut group: Vec<usize> = (0..count).collect();
    for a in 0..count {
        for b in a + 1..count {
            if joined(a, b) && group[a] != group[b] {
                let (keep, drop) = (group[a].min(group[b]), group[a].max(group[b]));
                group.iter_mut().filter(|g| **g == drop).for_each(|g| *g = keep);
            }
        }
    }
    let members = |first: usize| (0..count).filter(|index| group[*index] == first).collect::<Vec<_>>();
    (0..count).map(members).filter(|members| !members.is_empty()).collect()
}

fn is_switched(island: &[usize], classes: &[Vec<Option<Class>>]) -> bool {
    let first = links(classes, island[0], island[1]);
    let uniform = island.iter().all(|a| island.iter().all(|b| a == b || links(classes, *a, *b) == first));
    uniform && u64::from(first) * (island.len() as u64 - 1) > u64::from(MOST_LINKS_OF_A_GPU)
}

fn sets(texts: &[Option<String>]) -> Vec<CpuList> {
    // Texts were checked when their rows were read.
    texts.iter().map(|text| text.as_deref().and_then(|text| CpuList::parse(text).ok()).unwrap_or_default()).collect()
}

/// Domains by the best evidence there is. A GPU without it in a matrix that has it joins the GPUs that a class within one node
/// (PIX, PXB, PHB, NODE) ties it to.
fn domains(classes: &[Vec<Option<Class>>], numa: &[CpuList], cpus: &[CpuList]) -> Vec<Vec<usize>> {
    let inside = |a: usize, b: usize| matches!(classes[a][b], Some(Class::Pix | Class::Pxb | Class::Phb | Class::Node));
    let known = |sets: &[CpuList]| sets.iter().any(|set| !set.is_empty());
    let share = |sets: &[CpuList], same: &dyn Fn(&CpuList, &CpuList) -> bool| {
        components(classes.len(), |a, b| {
            let (one, other) = (&sets[a], &sets[b]);
            if one.is_empty() || other.is_empty() { inside(a, b) } else { same(one, other) }
        })
    };
    if known(numa) {
        return share(numa, &|a, b| !a.intersection(b).is_empty());
    }
    if known(cpus) {
        return share(cpus, &|a, b| a == b);
    }
    components(classes.len(), |a, b| classes[a][b].is_some_and(|class| class != Class::Sys))
}
