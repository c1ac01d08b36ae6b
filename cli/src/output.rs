//! Data goes to stdout in the format that was asked for; all else goes to stderr.

use std::io::{IsTerminal, Write};

use comfy_table::{ContentArrangement, Table, presets};
use serde_json::Value;

/// What `-o` names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Asked {
    #[default]
    Table,
    Json,
    Jsonl,
    Name,
    /// A page of plots
    Html,
}

/// What to ask for in place of a page.
pub const FORMATS: &str = "write table, json, jsonl or name";

impl Asked {
    /// `None` for a page, which few commands draw.
    pub fn format(self) -> Option<Format> {
        match self {
            Asked::Table => Some(Format::Table),
            Asked::Json => Some(Format::Json),
            Asked::Jsonl => Some(Format::Jsonl),
            Asked::Name => Some(Format::Name),
            Asked::Html => None,
        }
    }
}

/// How data is printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// Columns for people
    #[default]
    Table,
    /// One JSON document
    Json,
    /// One JSON document a line
    Jsonl,
    /// Ids or keys alone, one a line
    Name,
}

/// Rust ignores SIGPIPE, so `ares queue | head` would end in a panic; a closed pipe ends us quietly instead.
pub fn quiet_broken_pipe() {
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let broken = info.payload().downcast_ref::<String>().is_some_and(|text| text.contains("Broken pipe"));
        if broken {
            std::process::exit(0);
        }
        default(info);
    }));
}

/// One JSON document, pretty on a terminal.
pub fn json(value: &Value) {
    let text = if std::io::stdout().is_terminal() {
        serde_json::to_string_pretty(value)
    } else {
        serde_json::to_string(value)
    };
    println!("{}", text.unwrap_or_default());
}

/// Rows in the chosen format: the table's cells, the JSON of each row, or its name.
pub fn rows(format: Format, heads: &[&str], rows: Vec<Row>) {
    match format {
        Format::Json => json(&Value::Array(rows.into_iter().map(|row| row.json).collect())),
        Format::Jsonl => rows.iter().for_each(|row| println!("{}", row.json)),
        Format::Name => rows.iter().for_each(|row| println!("{}", row.name)),
        Format::Table => table(heads, rows.into_iter().map(|row| row.cells)),
    }
}

/// One row in all its forms.
pub struct Row {
    pub name: String,
    pub cells: Vec<String>,
    pub json: Value,
}

pub fn table(heads: &[&str], rows: impl Iterator<Item = Vec<String>>) {
    let width = if std::io::stdout().is_terminal() { Table::new().width().map(usize::from) } else { None };
    let heads = heads.iter().map(|head| (*head).to_owned()).collect();
    fitted(std::iter::once(heads).chain(rows).collect(), width).iter().for_each(|line| println!("{line}"));
}

/// Lines of a table, its head first. What is too wide for a terminal has the last column below its row, where its text
/// has room.
fn fitted(mut rows: Vec<Vec<String>>, width: Option<usize>) -> Vec<String> {
    const INDENT: &str = "    ";
    let lines = aligned(&rows);
    let wide = |line: &String| width.is_some_and(|width| line.chars().count() > width);
    if !lines.iter().any(wide) {
        return lines;
    }
    let last: Vec<String> = rows.iter_mut().map(|row| row.pop().unwrap_or_default()).collect();
    let below = |text: String| {
        let room = width.unwrap_or(usize::MAX).saturating_sub(INDENT.len()).max(1);
        wrapped(&text, room).into_iter().map(|line| format!("{INDENT}{line}"))
    };
    aligned(&rows).into_iter().zip(last).flat_map(|(line, text)| std::iter::once(line).chain(below(text))).collect()
}

/// One line a row, whatever its width.
fn aligned(rows: &[Vec<String>]) -> Vec<String> {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    rows.iter().for_each(|row| {
        // A line break in a cell would break the row.
        table.add_row(row.iter().map(|cell| cell.replace('\n', " ")));
    });
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.to_string().lines().map(|line| line.trim_end().to_owned()).collect()
}

/// Lines of at most `room` characters, broken between words where they allow it.
fn wrapped(text: &str, room: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= room => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

/// To stdout at once; a closed pipe ends the program quietly.
pub fn raw(bytes: &[u8]) {
    let mut out = std::io::stdout().lock();
    if out.write_all(bytes).and_then(|()| out.flush()).is_err() {
        std::process::exit(0);
    }
}

/// `3m12s`, for people.
pub fn age(ms: i64) -> String {
    let seconds = ms.max(0) / 1_000;
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3_600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        3_600..86_400 => format!("{}h{:02}m", seconds / 3_600, seconds % 3_600 / 60),
        _ => format!("{}d{:02}h", seconds / 86_400, seconds % 86_400 / 3_600),
    }
}

/// RFC 3339 in UTC; empty for zero.
pub fn time(unix_ms: i64) -> String {
    if unix_ms == 0 {
        return String::new();
    }
    jiff::Timestamp::from_millisecond(unix_ms).map(|at| at.to_string()).unwrap_or_default()
}

/// `40 GB/s` from MB/s.
pub fn bandwidth(mbps: u32) -> String {
    match mbps {
        0..10_000 => format!("{:.1} GB/s", f64::from(mbps) / 1_000.0),
        _ => format!("{:.0} GB/s", f64::from(mbps) / 1_000.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows() -> Vec<Vec<String>> {
        let rows = [["JOB", "NAME", "REASON"], ["1", "train", "needs 64 GPUs on one machine"], ["2", "eval", ""]];
        rows.iter().map(|row| row.map(str::to_owned).to_vec()).collect()
    }

    #[test]
    fn a_table_that_fits_is_a_line_a_row() {
        let wanted = ["JOB  NAME   REASON", "1    train  needs 64 GPUs on one machine", "2    eval"];
        assert_eq!(fitted(rows(), None), wanted);
        assert_eq!(fitted(rows(), Some(41)), wanted);
    }

    #[test]
    fn the_last_column_goes_below_where_it_is_too_wide() {
        let wanted = ["JOB  NAME", "    REASON", "1    train", "    needs 64 GPUs on", "    one machine", "2    eval"];
        assert_eq!(fitted(rows(), Some(20)), wanted);
    }

    #[test]
    fn a_line_break_in_a_cell_breaks_no_row() {
        assert_eq!(fitted(vec![vec!["a\nb".to_owned(), "c".to_owned()]], None), ["a b  c"]);
    }
}
