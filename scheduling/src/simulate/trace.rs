//! Reads job and machine lists: comma-separated text with a head line, an empty field is unknown. Errors name the file,
//! the line and the column. Decompression and the file system are the caller's.

use std::collections::BTreeMap;

use crate::world::{Machine, Request, UNBOUNDED, WHOLE};

/// A job of a trace. `duration_s` is for the simulator alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceJob {
    pub id: String,
    pub submit_s: u64,
    pub duration_s: u64,
    pub request: Request,
    /// Number of the tenant in `Trace::tenants`.
    pub tenant: u32,
    pub requested_s: Option<u64>,
}

#[derive(Clone, Debug)]
pub struct Trace {
    pub jobs: Vec<TraceJob>,
    pub tenants: Vec<String>,
    pub machines: Vec<Machine>,
    pub types: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceError {
    pub file: String,
    /// From 1, the head line included.
    pub line: usize,
    pub column: String,
    pub what: String,
}

impl std::fmt::Display for TraceError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}, line {}, column {}: {}", self.file, self.line, self.column, self.what)
    }
}

/// One line, by the names of the head line.
struct Row<'a> {
    file: &'a str,
    line: usize,
    columns: &'a BTreeMap<&'a str, usize>,
    cells: Vec<&'a str>,
}

impl<'a> Row<'a> {
    fn text(&self, column: &str) -> &'a str {
        self.columns.get(column).and_then(|at| self.cells.get(*at)).map_or("", |cell| cell.trim())
    }

    fn error(&self, column: &str, what: String) -> TraceError {
        TraceError { file: self.file.to_owned(), line: self.line, column: column.to_owned(), what }
    }

    /// A decimal number in thousandths; `None` when unknown.
    fn thousandths(&self, column: &str) -> Result<Option<u64>, TraceError> {
        let text = self.text(column);
        if text.is_empty() {
            return Ok(None);
        }
        let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
        let digits =
            |text: &str| text.len() <= 12 && !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        if !digits(whole) || !digits(fraction) {
            return Err(self.error(column, format!("{text:?} is not a number of at least 0, such as 4 or 2.5")));
        }
        let fraction: u64 = format!("{fraction:0<3}")[..3].parse().unwrap_or(0);
        Ok(Some(whole.parse::<u64>().unwrap_or(0) * 1_000 + fraction))
    }

    fn number(&self, column: &str) -> Result<Option<u64>, TraceError> {
        Ok(self.thousandths(column)?.map(|thousandths| thousandths / 1_000))
    }

    fn bounded(&self, column: &str, value: u64, most: u64) -> Result<u32, TraceError> {
        match u32::try_from(value) {
            Ok(value) if u64::from(value) <= most => Ok(value),
            _ => Err(self.error(column, format!("{value} is more than {most}, the most a job or machine may have"))),
        }
    }
}

fn rows<T>(
    file: &str,
    text: &str,
    needed: &[&str],
    mut read: impl FnMut(&Row<'_>) -> Result<T, TraceError>,
) -> Result<Vec<T>, TraceError> {
    let mut lines = text.lines().enumerate();
    let head = lines.next().map_or("", |(_, head)| head);
    let columns: BTreeMap<&str, usize> = head.split(',').enumerate().map(|(at, name)| (name.trim(), at)).collect();
    if let Some(missing) = needed.iter().find(|name| !columns.contains_key(*name)) {
        let what = format!("the head line does not have it; it needs {}", needed.join(", "));
        return Err(TraceError { file: file.to_owned(), line: 1, column: (*missing).to_owned(), what });
    }
    let filled = lines.filter(|(_, line)| !line.trim().is_empty());
    filled
        .map(|(at, line)| {
            let cells: Vec<&str> = line.split(',').collect();
            let row = Row { file, line: at + 1, columns: &columns, cells };
            if row.cells.len() > columns.len() {
                let what = format!("{} fields, the head line names {}", row.cells.len(), columns.len());
                return Err(row.error(head.split(',').next_back().unwrap_or("1"), what));
            }
            read(&row)
        })
        .collect()
}

/// Reads both lists; the first string of each pair names the file in errors.
pub fn read(jobs: (&str, &str), nodes: (&str, &str)) -> Result<Trace, TraceError> {
    lists(jobs, nodes, true)
}

/// As `read`, for experiments in which no time passes: submissions and durations may be unknown, and are 0 then.
pub fn read_untimed(jobs: (&str, &str), nodes: (&str, &str)) -> Result<Trace, TraceError> {
    lists(jobs, nodes, false)
}

fn lists(jobs: (&str, &str), nodes: (&str, &str), timed: bool) -> Result<Trace, TraceError> {
    let mut types: Vec<String> = Vec::new();
    let machines = rows(nodes.0, nodes.1, &["name", "gpus"], |row| read_machine(row, &mut types))?;
    if machines.is_empty() {
        let what = "there is no machine below the head line; write one a line".to_owned();
        return Err(TraceError { file: nodes.0.to_owned(), line: 2, column: "name".to_owned(), what });
    }
    let mut tenants = Numbers::default();
    let jobs = rows(jobs.0, jobs.1, &["id", "submit_s", "duration_s", "gpus"], |row| {
        let job = read_job(row, &types, timed)?;
        Ok(TraceJob { tenant: tenants.of(row.text("tenant")), ..job })
    })?;
    let tenants = tenants.names;
    Ok(Trace { jobs, tenants, machines, types })
}

#[derive(Default)]
struct Numbers {
    of: BTreeMap<String, u32>,
    names: Vec<String>,
}

impl Numbers {
    fn of(&mut self, name: &str) -> u32 {
        if let Some(known) = self.of.get(name) {
            return *known;
        }
        let number = self.names.len() as u32;
        self.names.push(name.to_owned());
        self.of.insert(name.to_owned(), number);
        number
    }
}

fn read_machine(row: &Row<'_>, types: &mut Vec<String>) -> Result<Machine, TraceError> {
    let name = row.text("gpu_type");
    let at = types.iter().position(|known| known == name).unwrap_or_else(|| {
        types.push(name.to_owned());
        types.len() - 1
    });
    if at >= 64 {
        return Err(row.error("gpu_type", format!("{name:?} is the 65th type; at most 64 are told apart")));
    }
    let gpus = row.number("gpus")?.ok_or_else(|| row.error("gpus", "it is empty; write 0 for none".to_owned()))?;
    Ok(Machine {
        gpus: row.bounded("gpus", gpus, 1 << 20)?,
        gpu_type: at as u8,
        cpus: bounded_or_unknown(row, "cpus", row.thousandths("cpus")?)?,
        mem_mib: bounded_or_unknown(row, "mem_mib", row.number("mem_mib")?)?,
    })
}

fn bounded_or_unknown(row: &Row<'_>, column: &str, value: Option<u64>) -> Result<u32, TraceError> {
    value.map_or(Ok(UNBOUNDED), |value| row.bounded(column, value, u64::from(UNBOUNDED)))
}

fn read_job(row: &Row<'_>, types: &[String], timed: bool) -> Result<TraceJob, TraceError> {
    if row.text("id").is_empty() {
        return Err(row.error("id", "it is empty; write a name for the job".to_owned()));
    }
    let seconds = |column: &str| match row.number(column)? {
        None if timed => Err(row.error(column, "it is empty; write whole seconds".to_owned())),
        known => Ok(known.unwrap_or(0)),
    };
    let gpus = row.number("gpus")?.ok_or_else(|| row.error("gpus", "it is empty; write 0 for none".to_owned()))?;
    let milli = row.number("gpu_milli")?.unwrap_or(u64::from(WHOLE));
    if milli > u64::from(WHOLE) {
        return Err(row.error("gpu_milli", format!("{milli} is more than the {WHOLE} thousandths of a GPU")));
    }
    let milli = if gpus == 0 || milli == 0 { WHOLE } else { milli as u32 };
    let mask = row.text("gpu_type").split('|').filter(|name| !name.is_empty()).fold(0u64, |mask, name| {
        // A type that no machine has is a type that never fits: the highest bit stands for all of those.
        mask | types.iter().position(|known| known == name).map_or(1 << 63, |at| 1 << at)
    });
    let requested = row.number("requested_s")?;
    let request = Request {
        gpus: row.bounded("gpus", gpus, 1 << 20)?,
        milli,
        cpus: row.bounded("cpus", row.thousandths("cpus")?.unwrap_or(0), u64::from(UNBOUNDED))?,
        mem_mib: row.bounded("mem_mib", row.number("mem_mib")?.unwrap_or(0), u64::from(UNBOUNDED))?,
        types: mask,
    };
    Ok(TraceJob {
        id: row.text("id").to_owned(),
        submit_s: seconds("submit_s")?,
        duration_s: seconds("duration_s")?,
        request,
        tenant: 0,
        requested_s: requested,
    })
}
