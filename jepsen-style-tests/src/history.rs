//! The history of a run: JSON lines in the form that Knossos and Elle read, one event a line, clients and nemesis alike.
//! A timeout is `info`: the outcome is unknown.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::Mutex;
use std::time::Instant;

use serde_json::{Value, json};

/// What is added to the number of a process whose call has an unknown outcome: what it asked for may still happen, so it is another
/// process from then on.
pub const RETIRED: usize = 1_000;

/// Appends events; shared by all clients of a run.
#[derive(Debug)]
pub struct History {
    began: Instant,
    out: Mutex<(u64, BufWriter<File>)>,
}

impl History {
    pub fn create(path: &Path) -> Result<Self, String> {
        let file = File::create(path).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(Self { began: Instant::now(), out: Mutex::new((0, BufWriter::new(file))) })
    }

    /// `process`: a client's number, or "nemesis"; `kind`: invoke, ok, fail or info; `f`: what it does, to `key`.
    pub fn add(&self, process: impl Into<Value>, kind: &str, f: &str, key: &str, value: Value) {
        let mut out = self.out.lock().expect("no writer panics");
        let (count, file) = &mut *out;
        let event = json!({
            "i": *count, "t": self.began.elapsed().as_nanos() as u64, "p": process.into(),
            "type": kind, "f": f, "key": key, "value": value,
        });
        *count += 1;
        // A full disk shows when the run ends: `close` tells.
        let _ = writeln!(file, "{event}");
    }

    /// Events, once all are on disk.
    pub fn close(&self) -> Result<u64, String> {
        let mut out = self.out.lock().expect("no writer panics");
        out.1.flush().map_err(|error| format!("the history could not be written: {error}"))?;
        Ok(out.0)
    }
}
