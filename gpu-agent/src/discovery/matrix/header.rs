//! The header of a matrix: which devices have a column, and which affinity columns follow them.

use super::text::{Line, Word};
use super::{MatrixError, rows};

/// GPUs and NICs of the largest machine, several times over.
const MAX_DEVICES: usize = 256;

/// What stands above the cells.
#[derive(Debug)]
pub(super) struct Header {
    /// Index of the header among the lines given to `find`.
    pub(super) index: usize,
    /// Names of the columns, GPUs and NICs, in the order printed.
    pub(super) devices: Vec<String>,
    pub(super) titles: Titles,
}

/// Which affinity columns exist; `cpu` holds where its title starts (a glyph index).
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Titles {
    pub(super) cpu: Option<usize>,
    pub(super) numa: bool,
    /// `GPU NUMA ID`, the node of the GPU's own memory; read and dropped.
    pub(super) gpu_numa: bool,
}

impl Titles {
    pub(super) fn count(&self) -> usize {
        usize::from(self.cpu.is_some()) + usize::from(self.numa) + usize::from(self.gpu_numa)
    }
}

/// Finds the header: the first line that names GPUs and holds no cells.
pub(super) fn find(lines: &[Line]) -> Result<Header, MatrixError> {
    for (index, line) in lines.iter().enumerate() {
        let Some((words, titles, end)) = columns(line) else {
            if rows::starts_like_row(line) {
                return Err(
                    line.refuse(0, format!("expected the header (GPU0 GPU1 ...), found the row {}", line.found(0)))
                );
            }
            continue;
        };
        if let Some(stray) = stray_after_titles(line, end) {
            return Err(line.refuse(
                stray,
                format!(
                    "expected no column but CPU Affinity, NUMA Affinity and GPU NUMA ID, found {}",
                    line.found(stray)
                ),
            ));
        }
        let devices = separate(line, words, &row_labels(&lines[index + 1..]))?;
        if devices.len() > MAX_DEVICES {
            return Err(line.refuse(0, format!("expected at most {MAX_DEVICES} columns, found {}", devices.len())));
        }
        return Ok(Header { index, devices, titles });
    }
    let first = lines.iter().find(|line| !line.is_blank());
    let expected = "expected the header of an nvidia-smi topology matrix (GPU0 GPU1 ... CPU Affinity)";
    Err(match first {
        Some(line) => line.refuse(0, format!("{expected}, found {}", line.found(0))),
        None => MatrixError { line: 1, column: 1, message: format!("{expected}, found no text") },
    })
}

/// Is this line a header? (A second one means two matrices in one text.)
pub(super) fn is_header(line: &Line) -> bool {
    columns(line).is_some()
}

pub(super) fn is_gpu(name: &str) -> bool {
    numbered(name, "GPU").is_some()
}

/// The number in `GPU7` or `NIC7` for the given prefix.
pub(super) fn numbered(name: &str, prefix: &str) -> Option<u32> {
    let digits = name.strip_prefix(prefix)?;
    (!digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit())).then(|| digits.parse().ok()).flatten()
}

type Columns = (Vec<Word>, Titles, usize);

/// The device words, titles and end of the titles, if the line is a header.
fn columns(line: &Line) -> Option<Columns> {
    let (titles, start, end) = titles(line);
    let words = line.words(0, start);
    let names_gpus =
        words.iter().any(|word| word.text.starts_with("GPU") && word.text.ends_with(|c: char| c.is_ascii_digit()));
    let no_cells = !words.iter().any(|word| rows::is_cells(&word.text));
    let all_names = words.iter().all(|word| looks_like_name(&word.text));
    (names_gpus && no_cells && all_names).then_some((words, titles, end))
}

/// Device names hold a digit: `GPU0`, `NIC3`, `mlx5_bond_0`, `rocep1s0f0`. Prose does not pass.
fn looks_like_name(word: &str) -> bool {
    word.starts_with(|c: char| c.is_ascii_alphabetic())
        && word.contains(|c: char| c.is_ascii_digit())
        && word.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | ':' | '@'))
        && !word.ends_with(':')
}

/// The titles, where the first one starts and where the last one ends.
fn titles(line: &Line) -> (Titles, usize, usize) {
    let length = line.glyphs.len();
    let mut titles = Titles::default();
    let (mut start, mut end) = (length, 0);
    let mut note = |found: Option<(usize, usize)>| {
        let (from, to) = found?;
        start = start.min(from);
        end = end.max(to);
        Some(from)
    };
    titles.cpu = note(title(line, &["CPU", "Affinity"]));
    titles.numa = note(title(line, &["NUMA", "Affinity"])).is_some();
    titles.gpu_numa = note(title(line, &["GPU", "NUMA", "ID"])).is_some();
    (titles, start, if end == 0 { length } else { end })
}

/// Finds a title of several words with any white space between them, glued to its neighbours or not.
fn title(line: &Line, words: &[&str]) -> Option<(usize, usize)> {
    (0..line.glyphs.len()).find_map(|from| {
        let mut at = from;
        for (index, word) in words.iter().enumerate() {
            let next = if index == 0 { at } else { line.skip_white(at) };
            if (index > 0 && next == at) || !line.has(next, word) {
                return None;
            }
            at = next + word.len();
        }
        Some((from, at))
    })
}

fn stray_after_titles(line: &Line, end: usize) -> Option<usize> {
    let next = line.skip_white(end);
    (next < line.glyphs.len()).then_some(next)
}

/// First words of the lines that look like rows: the second source of device names.
fn row_labels(lines: &[Line]) -> Vec<String> {
    let labels = lines
        .iter()
        .filter(|line| rows::starts_like_row(line))
        .filter_map(|line| line.words(0, line.glyphs.len()).into_iter().next());
    labels.map(|word| word.text).collect()
}

/// The device names; a word that glues several of them (a lost tab) is cut where the rows' own names allow exactly one cut.
fn separate(line: &Line, words: Vec<Word>, labels: &[String]) -> Result<Vec<String>, MatrixError> {
    let mut devices: Vec<String> = Vec::new();
    for word in words {
        let parts = if labels.contains(&word.text) { vec![] } else { cuts(&word.text, labels) };
        let names = match parts.as_slice() {
            [one] if one.len() > 1 => one.clone(),
            [_, _, ..] => {
                return Err(line
                    .refuse(word.start, format!("{:?} can be cut into device names in more than one way", word.text)));
            }
            _ => vec![word.text.clone()],
        };
        for name in names {
            if devices.contains(&name) {
                return Err(line.refuse(word.start, format!("the column {name} stands twice in the header")));
            }
            devices.push(name);
        }
    }
    Ok(devices)
}

/// The ways to write `text` as a sequence of labels; at most two, which is enough to see that it is not one.
fn cuts(text: &str, labels: &[String]) -> Vec<Vec<String>> {
    // ways[end] holds up to two ways to write the first `end` bytes.
    let mut ways: Vec<Vec<Vec<String>>> = vec![Vec::new(); text.len() + 1];
    ways[0].push(Vec::new());
    for end in 1..=text.len() {
        for label in labels {
            if label.is_empty() || end < label.len() || !text.as_bytes()[..end].ends_with(label.as_bytes()) {
                continue;
            }
            for head in ways[end - label.len()].clone() {
                let way: Vec<String> = head.into_iter().chain([label.clone()]).collect();
                if ways[end].len() < 2 && !ways[end].contains(&way) {
                    ways[end].push(way);
                }
            }
        }
    }
    ways.pop().unwrap_or_default()
}
