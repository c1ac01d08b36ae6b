//! The affinities behind the cells of a row: CPU list, NUMA nodes, and the GPU's own node, which is read and dropped.
//!
//! In tab layout `GPU NUMA ID` stands behind *two* tabs, and an empty CPU list is an empty field: position decides. In space
//! layout the words are counted; when one is lacking, only its place in the line may tell which. What stays open is refused.

use super::MatrixError;
use super::header::Titles;
use super::text::{Line, Word};
use crate::discovery::cpulist::CpuList;

/// Texts as printed. `Some("")`: the column is there and empty; `None`: no such column, or `N/A`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Affinity {
    pub(super) cpu: Option<String>,
    pub(super) numa: Option<String>,
}

/// Columns that the terminal's tab moves on.
const TAB_STOP: usize = 8;

/// Reads the tail of a row from glyph `at`. The rows of NICs have none; text there must still be an affinity.
pub(super) fn read(line: &Line, at: usize, titles: &Titles, row: &str, is_gpu: bool) -> Result<Affinity, MatrixError> {
    let words = line.words(at, line.glyphs.len());
    if !is_gpu || titles.count() == 0 {
        return no_affinity(line, &words, titles, row);
    }
    let tabs = line.glyphs.iter().skip(at).any(|glyph| glyph.what == '\t');
    let values = if tabs && !words.is_empty() { by_tabs(line, at, titles) } else { by_place(&words, titles) };
    let values = values.or_else(|| (words.len() == titles.count()).then(|| words.clone())).ok_or_else(|| {
        let message = format!(
            "row {row}: expected {} after the cells, found {} value{} that fit more than one column or none",
            named(titles),
            words.len(),
            if words.len() == 1 { "" } else { "s" }
        );
        line.refuse(words.first().map_or(line.glyphs.len(), |word| word.start), message)
    })?;
    assign(line, values, titles, row)
}

fn named(titles: &Titles) -> String {
    let names =
        [(titles.cpu.is_some(), "CPU Affinity"), (titles.numa, "NUMA Affinity"), (titles.gpu_numa, "GPU NUMA ID")];
    names.iter().filter(|(there, _)| *there).map(|(_, name)| *name).collect::<Vec<_>>().join(", ")
}

fn no_affinity(line: &Line, words: &[Word], titles: &Titles, row: &str) -> Result<Affinity, MatrixError> {
    match words.iter().find(|word| titles.count() == 0 || value(&word.text).is_err()) {
        Some(word) => {
            Err(line
                .refuse(word.start, format!("expected the end of row {row} after its cells, found {:?}", word.text)))
        }
        None => Ok(Affinity::default()),
    }
}

/// The values by their place between the tabs; `None` if the number of tabs is none that nvidia-smi prints.
fn by_tabs(line: &Line, at: usize, titles: &Titles) -> Option<Vec<Word>> {
    let mut fields = fields(line, at);
    // The tab between the last cell and the tail; lost when the first field has text.
    if fields.first().is_some_and(|field| field.text.is_empty()) {
        fields.remove(0);
    }
    let count = titles.count();
    let blank = |index: usize, fields: &[Word]| fields.get(index).is_some_and(|field| field.text.is_empty());
    let doubled = titles.gpu_numa && count == 3;
    if doubled && fields.len() >= 4 && blank(2, &fields) {
        fields.remove(2);
    } else if titles.numa && count == 2 && fields.len() == 3 && blank(1, &fields) && !blank(2, &fields) {
        // Some drivers double the tab before the NUMA column already.
        fields.remove(1);
    } else if doubled && fields.len() == 3 && blank(1, &fields) {
        // One tab short of the doubled layout: either value may be the one that moved.
        return None;
    }
    while fields.len() > count && blank(fields.len() - 1, &fields) {
        fields.pop();
    }
    (fields.len() == count && fields.iter().all(|field| value(&field.text).is_ok())).then_some(fields)
}

fn fields(line: &Line, at: usize) -> Vec<Word> {
    let mut fields = Vec::new();
    let mut start = at;
    for end in at..=line.glyphs.len() {
        if line.glyphs.get(end).is_none_or(|glyph| glyph.what == '\t') {
            let from = line.skip_white(start).min(end);
            let text: String = line.glyphs[from..end].iter().map(|glyph| glyph.what).collect();
            fields.push(Word { text: text.trim_end().to_owned(), start: from, column: line.column(from) });
            start = end + 1;
        }
    }
    fields
}

/// The values of a space-padded row with fewer words than columns: none at all, or all but the CPU list, which shows by the
/// first word standing a tab stop or more to the right of its title.
fn by_place(words: &[Word], titles: &Titles) -> Option<Vec<Word>> {
    let count = titles.count();
    let empty = Word { text: String::new(), start: 0, column: 1 };
    if words.is_empty() {
        return Some(vec![empty; count]);
    }
    let title = titles.cpu?;
    let without_cpu = words.len() + 1 == count && words[0].start >= title + TAB_STOP;
    without_cpu.then(|| std::iter::once(empty).chain(words.iter().cloned()).collect())
}

fn assign(line: &Line, values: Vec<Word>, titles: &Titles, row: &str) -> Result<Affinity, MatrixError> {
    let mut values = values.into_iter();
    let mut next = |there: bool, title: &str| -> Result<Option<String>, MatrixError> {
        let Some(word) = there.then(|| values.next()).flatten() else { return Ok(None) };
        value(&word.text).map_err(|why| line.refuse(word.start, format!("row {row}, {title}: {why}")))
    };
    let cpu = next(titles.cpu.is_some(), "CPU Affinity")?;
    let numa = next(titles.numa, "NUMA Affinity")?;
    next(titles.gpu_numa, "GPU NUMA ID")?;
    Ok(Affinity { cpu, numa })
}

/// A value of an affinity column: a list, nothing, or `N/A` (which is `None`).
fn value(text: &str) -> Result<Option<String>, String> {
    if text.eq_ignore_ascii_case("N/A") {
        return Ok(None);
    }
    CpuList::parse(text).map(|_| Some(text.to_owned()))
}
