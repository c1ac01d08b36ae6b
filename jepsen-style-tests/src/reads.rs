//! The checks of a history's reads, from the history alone: a linearizable read sees every write that was acknowledged
//! before the read began, and revisions never go back in real time, whichever replicas answered. Also the other forms of
//! a history: EDN, as Knossos and Elle read it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::Path;

use serde_json::Value;

/// What the reads of a history add up to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sums {
    /// Events of clients that ended well.
    pub ok: u64,
    /// Events of clients whose outcome is unknown.
    pub unknown: u64,
    /// Linearizable reads that were answered.
    pub reads: u64,
}

/// A read that is under way: what it may not miss.
struct Open {
    /// The highest revision that any read had returned when this one began.
    floor: u64,
    /// The job that is looked for was acknowledged before it began.
    acknowledged: bool,
    line: u64,
}

/// The events of a run's history, in the order in which they happened.
pub fn load(history: &Path) -> Result<Vec<Value>, String> {
    let text = std::fs::read_to_string(history).map_err(|error| format!("{}: {error}", history.display()))?;
    let parse =
        |(at, line)| serde_json::from_str(line).map_err(|error| format!("{}:{}: {error}", history.display(), at + 1));
    text.lines().enumerate().map(parse).collect()
}

/// `clients_linearizable`, as far as reads go: submissions that were acknowledged before a read began are seen by it, and
/// no read returns a lower revision than another that had ended before it began. Also `request_once`: no two submissions
/// are acknowledged as one job.
pub fn in_real_time(events: &[Value]) -> Result<Sums, String> {
    let mut sums = Sums::default();
    let mut open: BTreeMap<u64, Open> = BTreeMap::new();
    let (mut revision, mut jobs) = (0, BTreeSet::new());
    for event in events {
        let kind = event["type"].as_str().unwrap_or_default();
        let Some(process) = event["p"].as_u64() else { continue };
        sums.ok += u64::from(kind == "ok");
        sums.unknown += u64::from(kind == "info");
        let line = event["i"].as_u64().unwrap_or_default();
        match (event["f"].as_str().unwrap_or_default(), kind) {
            ("submit", "ok") => {
                let job = event["value"].as_u64().ok_or_else(|| format!("event {line} names no job"))?;
                if !jobs.insert(job) {
                    return Err(format!("request_once: event {line}: job {job} was acknowledged to two requests"));
                }
            }
            ("read", "invoke") => {
                let job = job_of(event);
                let acknowledged = job.is_some_and(|job| jobs.contains(&job));
                open.insert(process, Open { floor: revision, acknowledged, line });
            }
            ("read", "ok") => {
                let read = open.remove(&process).ok_or_else(|| format!("event {line} ends a read that never began"))?;
                let seen = event["value"]["revision"].as_u64();
                let seen = seen.ok_or_else(|| format!("event {line} has no revision"))?;
                let node = event["value"]["replica"].as_str().unwrap_or("a replica");
                let of = format!("events {} to {line}: {node}", read.line);
                if seen < read.floor {
                    return Err(format!(
                        "clients_linearizable: {of} answered with revision {seen}; {} had been read before the read began",
                        read.floor
                    ));
                }
                if read.acknowledged && event["value"]["found"] != Value::Bool(true) {
                    return Err(format!(
                        "clients_linearizable: {of} does not know {} at revision {seen}, which was acknowledged before the read began",
                        event["key"]
                    ));
                }
                revision = revision.max(seen);
                sums.reads += 1;
            }
            ("read", _) => {
                open.remove(&process);
            }
            _ => {}
        }
    }
    Ok(sums)
}

fn job_of(event: &Value) -> Option<u64> {
    event["key"].as_str()?.strip_prefix("/jobs/")?.parse().ok()
}

/// One map a line, with the keywords of Knossos.
pub fn edn(events: &[Value]) -> String {
    let mut out = String::new();
    for event in events {
        let word = |field: &str| format!(":{}", event[field].as_str().unwrap_or("nil"));
        let process = event["p"].as_str().map_or_else(|| event["p"].to_string(), |name| format!(":{name}"));
        let _ = writeln!(
            out,
            "{{:index {}, :time {}, :process {process}, :type {}, :f {}, :key {}, :value {}}}",
            event["i"],
            event["t"],
            word("type"),
            word("f"),
            event["key"],
            edn_value(&event["value"])
        );
    }
    out
}

fn edn_value(value: &Value) -> String {
    match value {
        Value::Null => "nil".to_owned(),
        Value::Array(all) => format!("[{}]", all.iter().map(edn_value).collect::<Vec<_>>().join(" ")),
        Value::Object(all) => {
            let pairs = all.iter().map(|(name, value)| format!(":{name} {}", edn_value(value)));
            format!("{{{}}}", pairs.collect::<Vec<_>>().join(", "))
        }
        // JSON's numbers, strings and truths are EDN's.
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn event(process: u64, kind: &str, f: &str, key: &str, value: Value) -> Value {
        json!({ "i": 0, "t": 0, "p": process, "type": kind, "f": f, "key": key, "value": value })
    }

    fn read(kind: &str, process: u64, revision: u64, found: bool) -> Value {
        let value = json!({ "revision": revision, "found": found, "replica": "r1" });
        event(process, kind, "read", "/jobs/7", if kind == "ok" { value } else { json!(null) })
    }

    fn good() -> Vec<Value> {
        vec![
            event(0, "invoke", "submit", "aa", json!(null)),
            read("invoke", 1, 0, false),
            // The submission is not acknowledged yet: either answer is right.
            read("ok", 1, 10, false),
            event(0, "ok", "submit", "aa", json!(7)),
            read("invoke", 1, 0, false),
            read("invoke", 2, 0, false),
            read("ok", 2, 14, true),
            // It began before the other ended.
            read("ok", 1, 12, true),
            read("invoke", 1, 0, false),
            read("info", 1, 0, false),
        ]
    }

    #[test]
    fn a_good_history_passes() {
        assert_eq!(in_real_time(&good()), Ok(Sums { ok: 4, unknown: 1, reads: 3 }));
    }

    #[test]
    fn a_read_that_misses_an_acknowledged_job_is_found() {
        let mut events = good();
        events[7] = read("ok", 1, 12, false);
        let found = in_real_time(&events).expect_err("job 7 was acknowledged");
        assert!(found.contains("does not know \"/jobs/7\""), "{found}");
    }

    #[test]
    fn a_read_behind_one_that_had_ended_is_found() {
        let mut events = good();
        events.extend([read("invoke", 3, 0, false), read("ok", 3, 13, true)]);
        let found = in_real_time(&events).expect_err("14 was read before");
        assert!(found.contains("revision 13; 14 had been read"), "{found}");
    }

    #[test]
    fn a_job_of_two_requests_is_found() {
        let mut events = good();
        events.push(event(4, "ok", "submit", "bb", json!(7)));
        in_real_time(&events).expect_err("job 7 was aa's");
    }

    #[test]
    fn edn_is_what_knossos_reads() {
        let event = event(3, "ok", "read", "/jobs/7", json!({ "found": true, "all": [1, null] }));
        let wanted = "{:index 0, :time 0, :process 3, :type :ok, :f :read, :key \"/jobs/7\", \
                      :value {:all [1 nil], :found true}}\n";
        assert_eq!(edn(&[event]), wanted);
        let nemesis =
            json!({ "i": 1, "t": 5, "p": "nemesis", "type": "info", "f": "Halves", "key": "", "value": null });
        assert!(edn(&[nemesis]).contains(":process :nemesis, :type :info, :f :Halves"));
    }
}
