//! The rows of a matrix: a label, then exactly as many cells as the header has devices, glued or not, then the affinities.
//!
//! Cells are a closed alphabet, so a row that lost a tab still has one reading; a row with fewer, more or other cells is refused.

use super::header::{Header, is_gpu};
use super::tail::{self, Affinity};
use super::text::Line;
use super::{Class, MatrixError};

/// A bonded set never has more links than this; a longer number is a cell glued to the CPU list.
const MAX_LINKS: u32 = 99;

/// One row: its device (index into the header's devices), its cells with their place in the line, its affinities.
#[derive(Debug)]
pub(super) struct Row<'a> {
    pub(super) device: usize,
    pub(super) line: &'a Line,
    /// Class and glyph index of each cell.
    pub(super) cells: Vec<(Class, usize)>,
    pub(super) affinity: Affinity,
}

/// Reads the rows below the header. Returns them with the index of the first line that is not one (the legend).
pub(super) fn read<'a>(lines: &'a [Line], header: &Header) -> Result<(Vec<Row<'a>>, usize), MatrixError> {
    let mut rows: Vec<Row<'a>> = Vec::new();
    let first = header.index + 1;
    for (offset, line) in lines[first..].iter().enumerate() {
        refuse_header(line)?;
        let Some(device) = label(line, &header.devices) else {
            match other_line(line, &rows, header)? {
                Other::Skip => continue,
                Other::Legend => return Ok((rows, first + offset)),
            }
        };
        if rows.iter().any(|row| row.device == device) {
            return Err(line.refuse(0, format!("the row {} stands twice", header.devices[device])));
        }
        rows.push(row(line, device, header)?);
    }
    Ok((rows, lines.len()))
}

/// Nothing of a matrix may follow its legend: of two matrices in one text neither is the machine's.
pub(super) fn check_end(after: &[Line]) -> Result<(), MatrixError> {
    for line in after {
        refuse_header(line)?;
        if starts_like_row(line) {
            return Err(line.refuse(0, format!("expected no row below the legend, found {}", line.found(0))));
        }
    }
    Ok(())
}

fn refuse_header(line: &Line) -> Result<(), MatrixError> {
    // A lone name may be a row that lost its cells.
    if super::header::is_header(line) && line.words(0, line.glyphs.len()).len() > 1 {
        return Err(line.refuse(0, "expected one matrix, found a second header"));
    }
    Ok(())
}

/// Does the line begin with a name and a cell?
pub(super) fn starts_like_row(line: &Line) -> bool {
    let words = line.words(0, line.glyphs.len());
    matches!(words.as_slice(), [name, cell, ..] if !is_cells(&name.text) && is_cells(&cell.text))
}

/// Is this word one cell, or several glued ones?
pub(super) fn is_cells(word: &str) -> bool {
    let mut rest = word;
    while !rest.is_empty() {
        let Some((_, length)) = cell(rest) else { return false };
        rest = &rest[length..];
    }
    !word.is_empty()
}

enum Other {
    Skip,
    Legend,
}

/// What a line below the header is that is no row: nothing, the legend, or an error.
fn other_line(line: &Line, rows: &[Row<'_>], header: &Header) -> Result<Other, MatrixError> {
    let text = line.text_from(0);
    let text = text.trim();
    if !text.contains(char::is_alphanumeric) {
        return Ok(Other::Skip);
    }
    if text.starts_with("Legend") || text.starts_with("NIC Legend") || is_legend_entry(text) {
        return Ok(Other::Legend);
    }
    if starts_like_row(line) {
        return Err(line.refuse(0, format!("the row {} has no column in the header", line.found(0))));
    }
    let missing: Vec<&str> = missing(rows, header).collect();
    if missing.is_empty() {
        return Ok(Other::Skip);
    }
    Err(line.refuse(0, format!("expected the row {} or the legend, found {}", missing.join(", "), line.found(0))))
}

/// Devices of the header that have no row.
pub(super) fn missing<'a>(rows: &'a [Row<'_>], header: &'a Header) -> impl Iterator<Item = &'a str> {
    let seen = |device: usize| rows.iter().any(|row| row.device == device);
    header.devices.iter().enumerate().filter(move |(device, _)| !seen(*device)).map(|(_, name)| name.as_str())
}

/// `SYS  = Connection traversing ...`, when the title of the legend was lost.
fn is_legend_entry(text: &str) -> bool {
    let key = text.split_once('=').map(|(key, _)| key.trim());
    key.is_some_and(|key| key == "NV#" || key == "PSB" || cell(key).is_some_and(|(_, length)| length == key.len()))
}

/// The device whose row this is: the longest name that the line begins with, with a space or a cell behind it.
fn label(line: &Line, devices: &[String]) -> Option<usize> {
    let start = line.skip_white(0);
    let follows = |name: &str| {
        let end = start + name.chars().count();
        line.glyphs.get(end).is_none_or(|glyph| glyph.what.is_whitespace()) || cell(&line.ahead(end)).is_some()
    };
    let named = devices.iter().enumerate().filter(|(_, name)| line.has(start, name) && follows(name));
    named.max_by_key(|(_, name)| name.len()).map(|(device, _)| device)
}

fn row<'a>(line: &'a Line, device: usize, header: &Header) -> Result<Row<'a>, MatrixError> {
    let name = &header.devices[device];
    let mut at = line.skip_white(0) + name.chars().count();
    let mut cells = Vec::with_capacity(header.devices.len());
    for column in &header.devices {
        at = line.skip_white(at);
        let (class, length) = next_cell(line, at, name, column, cells.len(), header.devices.len())?;
        check_diagonal(line, at, class, name, column)?;
        cells.push((class, at));
        at += length;
    }
    let next = line.skip_white(at);
    if cell(&line.ahead(next)).is_some() {
        let message = format!("row {name} has more cells than the {} columns of the header", header.devices.len());
        return Err(line.refuse(next, message));
    }
    let affinity = tail::read(line, at, &header.titles, name, is_gpu(name))?;
    Ok(Row { device, line, cells, affinity })
}

fn next_cell(
    line: &Line,
    at: usize,
    row: &str,
    column: &str,
    read: usize,
    all: usize,
) -> Result<(Class, usize), MatrixError> {
    let text = line.ahead(at);
    let Some((class, length)) = cell(&text) else {
        let message = format!(
            "row {row} has {read} of {all} cells; expected the cell for {column} (X, NV<links>, PIX, PXB, PHB, NODE, SYS or SOC), found {}",
            line.found(at)
        );
        return Err(line.refuse(at, message));
    };
    match class {
        Class::NvLink(links) if links == 0 || links > MAX_LINKS => {
            Err(line.refuse(at, format!("expected NV1 to NV{MAX_LINKS} for {column}, found {}", line.found(at))))
        }
        Class::NvLink(_) if !(is_gpu(row) && is_gpu(column)) => Err(line.refuse(
            at,
            format!("NVLink joins GPUs; expected a PCIe class between {row} and {column}, found {}", line.found(at)),
        )),
        _ => Ok((class, length)),
    }
}

/// `X` stands on the diagonal and nowhere else: what shows a row whose cells moved.
fn check_diagonal(line: &Line, at: usize, class: Class, row: &str, column: &str) -> Result<(), MatrixError> {
    match (class == Class::Own, row == column) {
        (true, false) => {
            Err(line.refuse(at, format!("expected the class between {row} and {column}, found X (itself)")))
        }
        (false, true) => {
            Err(line.refuse(at, format!("expected X where the row {row} meets its own column, found {class}")))
        }
        _ => Ok(()),
    }
}

/// The cell at the start of `text` and its length in characters (and bytes: cells are ASCII).
fn cell(text: &str) -> Option<(Class, usize)> {
    const WORDS: [(&str, Class); 7] = [
        ("NODE", Class::Node),
        ("PIX", Class::Pix),
        ("PXB", Class::Pxb),
        ("PHB", Class::Phb),
        ("SYS", Class::Sys),
        ("SOC", Class::Sys),
        ("X", Class::Own),
    ];
    if let Some(rest) = text.strip_prefix("NV") {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        // Too long for a number is still one cell; the caller refuses the count.
        return (digits > 0).then(|| (Class::NvLink(rest[..digits].parse().unwrap_or(u32::MAX)), 2 + digits));
    }
    WORDS.iter().find(|(word, _)| text.starts_with(word)).map(|(word, class)| (*class, word.len()))
}

/// A pair has one class, whichever of its rows says it.
pub(super) fn check_symmetry(rows: &[Row<'_>], header: &Header) -> Result<(), MatrixError> {
    for (index, row) in rows.iter().enumerate() {
        for earlier in &rows[..index] {
            let (here, at) = row.cells[earlier.device];
            let (there, _) = earlier.cells[row.device];
            if here != there {
                let (a, b) = (&header.devices[row.device], &header.devices[earlier.device]);
                let message =
                    format!("{a} to {b} is {here}, but line {} says {there} for {b} to {a}", earlier.line.number);
                return Err(row.line.refuse(at, message));
            }
        }
    }
    Ok(())
}
