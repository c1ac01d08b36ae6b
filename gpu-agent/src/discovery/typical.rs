//! Constants that no driver and no matrix gives: effective bandwidth of a link by generation, and what a GPU of a known name has.
//!
//! Figures are NCCL's per-link constants (src/graph/topo.h) in MB/s, one direction. GPU memory is what `nvidia-smi` shows in MiB.

/// What a GPU model has, for machines known from a matrix only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GpuModel {
    pub name: &'static str,
    pub memory_mib: u64,
    pub compute_capability: &'static str,
    /// Of one NVLink; 0: the model has none.
    pub nvlink_mbps: u32,
    pub pcie_mbps: u32,
    /// GPUs of this model reach each other over PCIe.
    pub p2p: bool,
}

/// A model and the words that name it in free text. More special words stand first.
const MODELS: [(&str, GpuModel); 21] = [
    ("GB200", model("NVIDIA GB200", 189_471, "10.0", 40_100, 48_000, true)),
    ("B200", model("NVIDIA B200", 183_359, "10.0", 40_100, 48_000, true)),
    ("H200", model("NVIDIA H200", 143_771, "9.0", 20_600, 48_000, true)),
    ("H100", model("NVIDIA H100 80GB HBM3", 81_559, "9.0", 20_600, 48_000, true)),
    ("A100 PCIE", model("NVIDIA A100 80GB PCIe", 81_920, "8.0", 20_000, 24_000, true)),
    ("A100 80GB", model("NVIDIA A100-SXM4-80GB", 81_920, "8.0", 20_000, 24_000, true)),
    ("A100", model("NVIDIA A100-SXM4-40GB", 40_960, "8.0", 20_000, 24_000, true)),
    ("V100-SXM2-16GB", model("Tesla V100-SXM2-16GB", 16_160, "7.0", 20_000, 12_000, true)),
    ("V100 SXM3", model("Tesla V100-SXM3-32GB", 32_510, "7.0", 20_000, 12_000, true)),
    ("V100", model("Tesla V100-SXM2-32GB", 32_510, "7.0", 20_000, 12_000, true)),
    ("K80", model("Tesla K80", 11_441, "3.7", 0, 12_000, true)),
    ("RTX PRO 6000", model("NVIDIA RTX PRO 6000 Blackwell Server Edition", 97_887, "12.0", 0, 48_000, true)),
    ("RTX 6000 ADA", model("NVIDIA RTX 6000 Ada Generation", 49_140, "8.9", 0, 24_000, true)),
    ("RTX A6000", model("NVIDIA RTX A6000", 49_140, "8.6", 12_000, 24_000, true)),
    ("RTX 3090", model("NVIDIA GeForce RTX 3090", 24_576, "8.6", 12_000, 24_000, false)),
    ("RTX 4090", model("NVIDIA GeForce RTX 4090", 24_564, "8.9", 0, 24_000, false)),
    ("RTX 5090", model("NVIDIA GeForce RTX 5090", 32_607, "12.0", 0, 48_000, false)),
    ("RTX 5060 TI", model("NVIDIA GeForce RTX 5060 Ti", 16_311, "12.0", 0, 24_000, true)),
    ("L40S", model("NVIDIA L40S", 46_068, "8.9", 0, 24_000, true)),
    ("L4", model("NVIDIA L4", 23_034, "8.9", 0, 24_000, false)),
    ("T4", model("Tesla T4", 15_360, "7.5", 0, 12_000, false)),
];

const fn model(
    name: &'static str,
    memory_mib: u64,
    cc: &'static str,
    nvlink_mbps: u32,
    pcie_mbps: u32,
    p2p: bool,
) -> GpuModel {
    GpuModel { name, memory_mib, compute_capability: cc, nvlink_mbps, pcie_mbps, p2p }
}

/// The GPU model that a text names first, if it names one.
pub fn gpu_in(text: &str) -> Option<GpuModel> {
    let text = text.to_uppercase();
    let named = |words: &str| {
        let found = text.match_indices(words).map(|(at, _)| at);
        found.into_iter().find(|at| stands_alone(&text, *at, at + words.len()))
    };
    let found = MODELS.iter().filter_map(|(words, model)| Some((named(words)?, model)));
    // Of models named at one place the first of the table, which is the most special.
    found.min_by_key(|(at, _)| *at).map(|(_, model)| *model)
}

fn stands_alone(text: &str, start: usize, end: usize) -> bool {
    let joins = |c: char| c.is_ascii_alphanumeric();
    !text[..start].ends_with(joins) && !text[end..].starts_with(joins)
}

/// Whether a CPU is Intel's, and MB/s between two sockets of it, where a text names it.
pub fn cpu_in(text: &str, gpu: &GpuModel) -> Option<(bool, u32)> {
    let has = |words: &[&str]| words.iter().any(|word| text.contains(word));
    if has(&["EPYC", "Threadripper", "Ryzen", "AMD"]) {
        return Some(AMD);
    }
    if has(&["Grace"]) {
        return Some((false, 40_000));
    }
    // Broadwell and older: E5 and E7, and the machine that came with nothing else.
    if has(&["E5-2", "E7-", "NVIDIA DGX-1,"]) {
        return Some((true, 6_000));
    }
    has(&["Xeon", "Intel"]).then(|| (true, scalable_mbps(text).unwrap_or_else(|| contemporary_mbps(gpu))))
}

/// CPUs that nobody named: a board of two NUMA domains is most often Intel's; one domain (desktops, workstations) or more than two
/// (sockets that are split) AMD's.
pub fn cpu_of(domains: usize, gpu: &GpuModel) -> (bool, u32) {
    if domains == 2 { (true, contemporary_mbps(gpu)) } else { AMD }
}

const AMD: (bool, u32) = (false, 16_000);

/// Xeon Scalable by the second digit of its number: `Platinum 8470` is of the fourth generation.
fn scalable_mbps(text: &str) -> Option<u32> {
    let number = ["Platinum ", "Gold ", "Silver "].iter().find_map(|tier| text.split(tier).nth(1))?;
    match number.as_bytes().get(1)? {
        b'1'..=b'3' => Some(10_000),
        b'4' => Some(22_000),
        b'5'..=b'9' => Some(40_000),
        _ => None,
    }
}

/// Intel's CPUs of the time of a GPU: Emerald Rapids beside NVLink 5, Sapphire Rapids beside PCIe gen 5, Skylake and Ice Lake before.
fn contemporary_mbps(gpu: &GpuModel) -> u32 {
    match (gpu.nvlink_mbps, gpu.pcie_mbps) {
        (40_000.., _) => 40_000,
        (_, 48_000..) => 22_000,
        _ => 10_000,
    }
}

/// One NVLink by the GPU's compute capability: NVLink 1 (6.0), 2 (7.0), 3 (8.0), 4 (9.0), 5 (10.x); bridges of 7.5 and 8.6 are slower.
pub fn nvlink_mbps(compute_capability: &str) -> u32 {
    match compute_capability {
        "6.0" => 18_000,
        "7.0" | "8.0" => 20_000,
        "7.5" | "8.6" => 12_000,
        "9.0" => 20_600,
        newer
            if newer.split('.').next().and_then(|major| major.parse::<u32>().ok()).is_some_and(|major| major >= 10) =>
        {
            40_100
        }
        _ => 12_000,
    }
}

/// A PCIe link by generation and width: 12 GB/s for gen 3 x16, twice that for each generation later.
pub fn pcie_mbps(generation: u32, width: u32) -> u32 {
    let full = match generation {
        0 | 1 => 3_000,
        2 => 6_000,
        later => 12_000_u32 << (later - 3).min(4),
    };
    full * width.min(16) / 16
}

/// A network port by its signalling rate: what NCCL reaches of it (24 GB/s of 200 Gb/s).
pub fn nic_mbps(gbit: u32) -> u32 {
    gbit.saturating_mul(120)
}

/// The short type that jobs ask for: `h100` for `NVIDIA H100 80GB HBM3`, `rtx4090` for `NVIDIA GeForce RTX 4090`, `a100-1g.5gb` for the slice
/// `NVIDIA A100-SXM4-40GB MIG 1g.5gb`.
pub fn type_slug(name: &str) -> String {
    match name.split_once(" MIG ") {
        Some((gpu, profile)) => format!("{}-{}", gpu_slug(gpu), profile.trim().to_lowercase().replace('+', ".")),
        None => gpu_slug(name),
    }
}

fn gpu_slug(name: &str) -> String {
    const VENDOR: [&str; 5] = ["nvidia", "tesla", "geforce", "quadro", "corporation"];
    const TRIM: [&str; 12] = [
        "pcie",
        "nvl",
        "gpu",
        "generation",
        "edition",
        "server",
        "workstation",
        "blackwell",
        "laptop",
        "max",
        "q",
        "oam",
    ];
    let lower = name.to_lowercase();
    let words: Vec<&str> = lower.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty()).collect();
    let is_size = |word: &str| word.strip_suffix("gb").is_some_and(|digits| digits.bytes().all(|b| b.is_ascii_digit()));
    let is_form = |word: &str| word.starts_with("sxm") || word.starts_with("hbm") || is_size(word);
    let kept: Vec<&str> =
        words.iter().copied().filter(|w| !VENDOR.contains(w) && !TRIM.contains(w) && !is_form(w)).collect();
    // `RTX A6000` is asked for as a6000.
    let skip = usize::from(kept.len() > 1 && kept[0] == "rtx" && kept[1].starts_with('a'));
    let slug = kept[skip..].concat();
    if slug.is_empty() { "gpu".to_owned() } else { slug }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_are_short() {
        let names = [
            ("NVIDIA H100 80GB HBM3", "h100"),
            ("NVIDIA H100 PCIe", "h100"),
            ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", "h100-3g.40gb"),
            ("NVIDIA A100-SXM4-40GB MIG 1g.5gb+me", "a100-1g.5gb.me"),
            ("Tesla V100-SXM2-32GB", "v100"),
            ("NVIDIA A100-SXM4-80GB", "a100"),
            ("NVIDIA GeForce RTX 4090", "rtx4090"),
            ("NVIDIA GeForce RTX 5060 Ti", "rtx5060ti"),
            ("NVIDIA RTX A6000", "a6000"),
            ("NVIDIA RTX 6000 Ada Generation", "rtx6000ada"),
            ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "rtxpro6000"),
            ("NVIDIA GH200 480GB", "gh200"),
            ("NVIDIA L40S", "l40s"),
            ("NVIDIA", "gpu"),
        ];
        for (name, slug) in names {
            assert_eq!(type_slug(name), slug, "{name}");
        }
    }

    #[test]
    fn a_text_names_a_gpu_only_as_a_whole_word() {
        assert_eq!(gpu_in("8x NVIDIA B200, 16x mlx5").unwrap().name, "NVIDIA B200");
        assert_eq!(gpu_in("GB200 compute tray").unwrap().name, "NVIDIA GB200");
        assert_eq!(gpu_in("8x Tesla V100-SXM2-16GB").unwrap().memory_mib, 16_160);
        assert_eq!(gpu_in("8x NVLink4 GPUs"), None);
        assert_eq!(gpu_in("8x H100/H200 SXM node").unwrap().name, "NVIDIA H100 80GB HBM3");
        assert_eq!(gpu_in("4x L40S").unwrap().name, "NVIDIA L40S");
    }

    #[test]
    fn a_cpu_is_known_by_name_or_by_its_time() {
        let gpu = |name: &str| gpu_in(name).unwrap();
        assert_eq!(cpu_in("2x EPYC", &gpu("A100")), Some((false, 16_000)));
        assert_eq!(cpu_in("2x Xeon Platinum 8470", &gpu("A100")), Some((true, 22_000)));
        assert_eq!(cpu_in("Xeon Gold 5118", &gpu("V100")), Some((true, 10_000)));
        assert_eq!(cpu_in("Xeon E5-2698 v4", &gpu("V100")), Some((true, 6_000)));
        assert_eq!(cpu_in("2x56-core Xeon", &gpu("B200")), Some((true, 40_000)));
        assert_eq!(cpu_in("two sockets", &gpu("B200")), None);
        assert_eq!(cpu_of(2, &gpu("H100")), (true, 22_000));
        assert_eq!(cpu_of(1, &gpu("RTX 5090")), (false, 16_000));
    }

    #[test]
    fn links_scale_with_generation_and_width() {
        assert_eq!(
            [pcie_mbps(3, 16), pcie_mbps(4, 16), pcie_mbps(5, 16), pcie_mbps(5, 8), pcie_mbps(4, 4)],
            [12_000, 24_000, 48_000, 24_000, 6_000]
        );
        assert_eq!(pcie_mbps(4_000_000_000, 16), 192_000);
        assert_eq!(
            [nvlink_mbps("7.0"), nvlink_mbps("8.6"), nvlink_mbps("9.0"), nvlink_mbps("12.0"), nvlink_mbps("")],
            [20_000, 12_000, 20_600, 40_100, 12_000]
        );
        assert_eq!([nic_mbps(100), nic_mbps(400)], [12_000, 48_000]);
    }
}
