//! From the lines of a history to typed events, revision by revision. Refuses what it can't read, with line and column;
//! keys that say nothing of jobs, leases and tokens are passed over.

use std::io::{self, BufRead, Read};

use serde::{Deserialize, Serialize};

/// The version of the format that this reader knows.
pub const FORMAT: u32 = 1;
/// Bytes of one line; the largest value of the keyspace is a job of 256 KiB.
pub const LINE_LIMIT: u64 = 16 << 20;

/// The first line of an exported history.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// [`FORMAT`].
    pub ares_history: u32,
    /// Hex.
    pub cluster_id: String,
    /// Which life of the cluster; 0 until a first restore from a backup.
    pub generation: u32,
    /// The first revision that the file holds, and the last.
    pub from: u64,
    pub to: u64,
    /// Nothing happened before `from`: the cluster began there, or a restore did.
    pub from_the_beginning: bool,
}

/// Why a file can't be read as a history. Line and column count from 1; the column is of a byte.
#[derive(Debug, thiserror::Error)]
pub enum Unreadable {
    #[error("line {line}: {source}")]
    Io { line: u64, source: io::Error },
    #[error("line {line}, column {column}: {what}")]
    Text { line: u64, column: u64, what: String },
}

/// One event as the model needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Event {
    pub line: u64,
    pub what: What,
}

/// All events of one revision, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Revision {
    pub rev: u64,
    pub line: u64,
    pub events: Vec<Event>,
    /// Of all its lines, those that say nothing here too.
    pub lines: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum What {
    Job(Job),
    Lease(Lease),
    LeaseClosed {
        token: u64,
    },
    Result(Outcome),
    JobFence {
        job: u64,
        token: u64,
    },
    GpuFence {
        gpu: String,
        token: u64,
    },
    /// `None`: held by nobody.
    Lock {
        name: String,
        token: Option<u64>,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct Job {
    pub job_id: u64,
    pub nodes: u64,
    pub ranks_per_node: u64,
    pub gpus_per_rank: u64,
    /// Beside open nodes: so often its GPUs may be doubled.
    #[serde(default)]
    pub doublings: Option<u32>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct Lease {
    #[serde(deserialize_with = "token")]
    pub token: u64,
    pub job_id: u64,
    pub attempt: u64,
    pub parts: Vec<Part>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct Part {
    pub node: String,
    pub first_rank: u64,
    pub ranks: u64,
    pub gpus: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct Outcome {
    pub job_id: u64,
    pub outcome: String,
    #[serde(default, deserialize_with = "some_token")]
    pub token: Option<u64>,
    pub attempt: u64,
}

#[derive(Deserialize)]
struct JobFence {
    job_id: u64,
    #[serde(deserialize_with = "token")]
    token: u64,
}

#[derive(Deserialize)]
struct GpuFence {
    gpu: String,
    #[serde(deserialize_with = "token")]
    token: u64,
}

#[derive(Deserialize)]
struct Lock {
    #[serde(default)]
    holder: Option<Holder>,
}

#[derive(Deserialize)]
struct Holder {
    #[serde(deserialize_with = "token")]
    token: u64,
}

/// A line of `ares watch -o jsonl`.
#[derive(Deserialize)]
struct Line<'a> {
    key: String,
    #[serde(rename = "type")]
    kind: Kind,
    #[serde(borrow, default)]
    value: Option<&'a serde_json::value::RawValue>,
    mod_revision: u64,
}

#[derive(PartialEq, Eq, Deserialize)]
enum Kind {
    #[serde(rename = "PUT")]
    Put,
    #[serde(rename = "DELETE")]
    Delete,
}

fn token<'de, D: serde::Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
    let text = String::deserialize(from)?;
    text.parse().map_err(|_| serde::de::Error::custom(format!("{text:?} is no token: decimal digits")))
}

fn some_token<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Option<u64>, D::Error> {
    let text = Option::<String>::deserialize(from)?;
    let wrong = |text: &str| serde::de::Error::custom(format!("{text:?} is no token: decimal digits"));
    text.map(|text| text.parse().map_err(|_| wrong(&text))).transpose()
}

pub(crate) struct Lines<R> {
    input: R,
    /// Number of the line in `text`.
    line: u64,
    text: Vec<u8>,
    /// A line that was read to see that its revision is another one.
    waiting: Option<(u64, Option<Event>)>,
}

impl<R: BufRead> Lines<R> {
    pub fn new(input: R) -> Self {
        Self { input, line: 0, text: Vec::new(), waiting: None }
    }

    /// The header, if the first line is one.
    pub fn header(&mut self) -> Result<Option<Header>, Unreadable> {
        if !self.read_line()? {
            return Ok(None);
        }
        #[derive(Deserialize)]
        struct Probe {
            ares_history: Option<u32>,
        }
        let probe: Probe = self.parse()?;
        match probe.ares_history {
            None => {
                self.waiting = Some(self.event()?);
                Ok(None)
            }
            Some(FORMAT) => self.parse().map(Some),
            Some(other) => Err(self.wrong(1, format!("format {other} is unknown to this binary, it knows {FORMAT}"))),
        }
    }

    pub fn next_revision(&mut self) -> Result<Option<Revision>, Unreadable> {
        let (rev, event) = match self.waiting.take() {
            Some(waiting) => waiting,
            None if self.read_line()? => self.event()?,
            None => return Ok(None),
        };
        let mut revision = Revision { rev, line: self.line, events: event.into_iter().collect(), lines: 1 };
        while self.read_line()? {
            let (next, event) = self.event()?;
            if next != rev {
                self.waiting = Some((next, event));
                break;
            }
            revision.events.extend(event);
            revision.lines += 1;
        }
        Ok(Some(revision))
    }

    /// Reads the next line that is not empty; `false` at the end.
    fn read_line(&mut self) -> Result<bool, Unreadable> {
        loop {
            self.text.clear();
            self.line += 1;
            let line = self.line;
            let read = (&mut self.input).take(LINE_LIMIT + 1).read_until(b'\n', &mut self.text);
            let read = read.map_err(|source| Unreadable::Io { line, source })?;
            if read == 0 {
                return Ok(false);
            }
            if self.text.len() as u64 > LINE_LIMIT {
                return Err(self.wrong(LINE_LIMIT, format!("the line is longer than {LINE_LIMIT} bytes")));
            }
            if !self.text.trim_ascii().is_empty() {
                return Ok(true);
            }
        }
    }

    fn wrong(&self, column: u64, what: String) -> Unreadable {
        Unreadable::Text { line: self.line, column, what }
    }

    fn parse<'a, T: Deserialize<'a>>(&'a self) -> Result<T, Unreadable> {
        serde_json::from_slice(self.text.trim_ascii_end())
            .map_err(|error| self.wrong(error.column().max(1) as u64, plain(&error)))
    }

    fn event(&self) -> Result<(u64, Option<Event>), Unreadable> {
        let line: Line<'_> = self.parse()?;
        if line.mod_revision == 0 {
            return Err(self.wrong(1, "mod_revision is 0: revisions begin at 1".to_owned()));
        }
        let what = self.what(&line)?;
        Ok((line.mod_revision, what.map(|what| Event { line: self.line, what })))
    }

    /// What the line says; `None` for a key that says nothing here.
    fn what(&self, line: &Line<'_>) -> Result<Option<What>, Unreadable> {
        let deleted = line.kind == Kind::Delete;
        let name = |folder: &str| line.key.strip_prefix(folder);
        let number = |text: &str| {
            let wrong = || self.wrong(1, format!("key {:?} ends in no number", line.key));
            text.parse::<u64>().map_err(|_| wrong())
        };
        if let Some(id) = name("/jobs/").filter(|_| !deleted) {
            let job: Job = self.value(line)?;
            self.same(line, job.job_id == number(id)?)?;
            return Ok(Some(What::Job(job)));
        }
        if let Some(id) = name("/leases/") {
            let token = number(id)?;
            if deleted {
                return Ok(Some(What::LeaseClosed { token }));
            }
            let lease: Lease = self.value(line)?;
            self.same(line, lease.token == token)?;
            return Ok(Some(What::Lease(lease)));
        }
        if let Some(id) = name("/results/").filter(|_| !deleted) {
            let result: Outcome = self.value(line)?;
            self.same(line, result.job_id == number(id)?)?;
            return Ok(Some(What::Result(result)));
        }
        if let Some(id) = name("/fencing/job/").filter(|_| !deleted) {
            let fence: JobFence = self.value(line)?;
            self.same(line, fence.job_id == number(id)?)?;
            return Ok(Some(What::JobFence { job: fence.job_id, token: fence.token }));
        }
        if let Some(id) = name("/fencing/gpu/").filter(|_| !deleted) {
            let fence: GpuFence = self.value(line)?;
            self.same(line, fence.gpu == id)?;
            return Ok(Some(What::GpuFence { gpu: fence.gpu, token: fence.token }));
        }
        if let Some(lock) = name("/locks/") {
            let token = match deleted {
                true => None,
                false => self.value::<Lock>(line)?.holder.map(|holder| holder.token),
            };
            return Ok(Some(What::Lock { name: lock.to_owned(), token }));
        }
        Ok(None)
    }

    /// The line's value. Its own column is found where it stands in the line.
    fn value<'a, T: Deserialize<'a>>(&self, line: &Line<'a>) -> Result<T, Unreadable> {
        let Some(raw) = line.value else {
            return Err(self.wrong(1, format!("{} has no value", line.key)));
        };
        serde_json::from_str(raw.get()).map_err(|error| {
            let begins = (raw.get().as_ptr() as usize).saturating_sub(self.text.as_ptr() as usize) as u64;
            self.wrong(begins + error.column().max(1) as u64, format!("the value of {}: {}", line.key, plain(&error)))
        })
    }

    fn same(&self, line: &Line<'_>, same: bool) -> Result<(), Unreadable> {
        if same { Ok(()) } else { Err(self.wrong(1, format!("the value of {} names another one", line.key))) }
    }
}

/// Without the position, which counts from the text that was parsed and is told otherwise.
fn plain(error: &serde_json::Error) -> String {
    let text = error.to_string();
    text.rsplit_once(" at line ").map(|(what, _)| what.to_owned()).unwrap_or(text)
}
