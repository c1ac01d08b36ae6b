//! The NIC legend: which device stands behind a column `NICn`. The other legend explains the classes and is left out.

use super::MatrixError;
use super::header::{Header, numbered};
use super::text::Line;

/// Device names by column, in the order of the legend.
pub(super) type Names = Vec<(String, String)>;

/// Reads the map below `NIC Legend:`; without that title there is none.
pub(super) fn read(lines: &[Line], header: &Header) -> Result<Names, MatrixError> {
    let mut names = Names::new();
    let Some(title) = lines.iter().position(|line| line.text_from(0).trim().starts_with("NIC Legend")) else {
        return Ok(names);
    };
    for line in &lines[title + 1..] {
        let Some((column, device)) = entry(line, header)? else { continue };
        if names.iter().any(|(known, _)| *known == column) {
            return Err(line.refuse(0, format!("{column} stands twice in the NIC legend")));
        }
        // Names are keys of the facts: no two columns may share one.
        let taken =
            names.iter().any(|(_, known)| *known == device) || (device != column && header.devices.contains(&device));
        if taken {
            return Err(
                line.refuse(line.skip_white(0), format!("the NIC legend gives the name {device} to two columns"))
            );
        }
        names.push((column, device));
    }
    Ok(names)
}

/// `  NIC0: mlx5_0`. Lines about no column of the matrix are left out.
fn entry(line: &Line, header: &Header) -> Result<Option<(String, String)>, MatrixError> {
    let words = line.words(0, line.glyphs.len());
    let Some(first) = words.first() else { return Ok(None) };
    let (column, glued) = first.text.split_once(':').unwrap_or((&first.text, ""));
    if numbered(column, "NIC").is_none() || !header.devices.iter().any(|device| device == column) {
        return Ok(None);
    }
    let rest: Vec<&str> = Some(glued)
        .filter(|text| !text.is_empty())
        .into_iter()
        .chain(words[1..].iter().map(|word| word.text.as_str()))
        .collect();
    match (rest.as_slice(), first.text.contains(':')) {
        ([device], true) => Ok(Some((column.to_owned(), (*device).to_owned()))),
        ([":", device], false) => Ok(Some((column.to_owned(), (*device).to_owned()))),
        _ => Err(line.refuse(
            first.start,
            format!("expected \"{column}: NAME\" in the NIC legend, found {:?}", line.text_from(first.start)),
        )),
    }
}
