//! Data goes to stdout in the format that was asked for; all else goes to stderr.

use std::io::{IsTerminal, Write};

use comfy_table::{ContentArrangement, Table, presets};
use serde_json::Value;

/// How data is printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
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
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    if std::io::stdout().is_terminal() {
        table.set_content_arrangement(ContentArrangement::Dynamic);
    } else {
        table.set_content_arrangement(ContentArrangement::Disabled);
    }
    table.set_header(heads.to_vec());
    for row in rows {
        table.add_row(row);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    for line in table.to_string().lines() {
        println!("{}", line.trim_end());
    }
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
