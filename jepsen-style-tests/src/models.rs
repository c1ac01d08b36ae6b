//! The objects that clients saw in a run, and their histories in the form that the search takes: each job is a cell that a submission
//! fills, each lock is a queue whose first has it. Built from the history's lines alone.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::linear::{Model, Order, Timed, order};

/// A job by its id: not there until its submission.
struct Job;

#[derive(Clone, Debug)]
enum JobCall {
    Submit,
    Read { found: bool },
}

impl Model for Job {
    type State = bool;
    type Call = JobCall;

    fn step(there: &bool, call: &JobCall) -> Option<bool> {
        match call {
            JobCall::Submit => (!there).then_some(true),
            JobCall::Read { found } => (found == there).then_some(*there),
        }
    }
}

/// A lock whose sessions do not end by themselves.
struct Lock;

/// Who has it and who waits; the token that its holder has, once it was seen; the highest that was seen.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Queue {
    sessions: Vec<u64>,
    token: Option<u64>,
    highest: u64,
}

#[derive(Clone, Debug)]
enum LockCall {
    /// The token, if it was granted at once; of an unknown outcome nothing is known.
    Acquire {
        session: u64,
        answer: Option<Option<u64>>,
    },
    /// The holder's token, 0 for none.
    Validate {
        holder: u64,
    },
    Release {
        session: u64,
    },
}

impl Queue {
    /// The holder's token is this: it is the known one, or higher than any before.
    fn with_token(mut self, token: u64) -> Option<Self> {
        match self.token {
            Some(known) if known != token => return None,
            None if token <= self.highest => return None,
            _ => {}
        }
        self.token = Some(token);
        self.highest = self.highest.max(token);
        Some(self)
    }
}

impl Model for Lock {
    type State = Queue;
    type Call = LockCall;

    fn step(queue: &Queue, call: &LockCall) -> Option<Queue> {
        let mut after = queue.clone();
        match call {
            LockCall::Acquire { session, answer } => {
                if !after.sessions.contains(session) {
                    after.sessions.push(*session);
                }
                match answer {
                    None => Some(after),
                    Some(None) => (after.sessions.first() != Some(session)).then_some(after),
                    Some(Some(token)) if after.sessions.first() == Some(session) => after.with_token(*token),
                    Some(Some(_)) => None,
                }
            }
            LockCall::Validate { holder: 0 } => after.sessions.is_empty().then_some(after),
            LockCall::Validate { holder } => {
                if after.sessions.is_empty() {
                    None
                } else {
                    after.with_token(*holder)
                }
            }
            LockCall::Release { session } => {
                let held = after.sessions.first() == Some(session);
                after.sessions.retain(|other| other != session);
                if held {
                    after.token = None;
                }
                Some(after)
            }
        }
    }
}

/// What the search came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Searched {
    pub objects: usize,
    pub calls: usize,
    /// Objects without a verdict: the run is no evidence then.
    pub given_up: usize,
}

/// `clients_linearizable`, by a search for an order of all calls on each job and each lock.
pub fn linearizable(events: &[Value]) -> Result<Searched, String> {
    let mut searched = Searched::default();
    searched.search::<Job>("job", &jobs(events)?)?;
    searched.search::<Lock>("lock", &locks(events)?)?;
    Ok(searched)
}

type Histories<C> = BTreeMap<String, Vec<Timed<C>>>;

impl Searched {
    fn search<M: Model>(&mut self, what: &str, histories: &Histories<M::Call>) -> Result<(), String>
    where
        M::Call: std::fmt::Debug,
    {
        for (name, calls) in histories {
            self.objects += 1;
            self.calls += calls.len();
            match order::<M>(calls) {
                Order::Found => {}
                Order::GivenUp => self.given_up += 1,
                Order::None { explained } => {
                    let mut by_begin: Vec<_> = calls.iter().collect();
                    by_begin.sort_by_key(|call| call.from);
                    let near: Vec<String> = by_begin
                        .iter()
                        .skip(explained.saturating_sub(3))
                        .take(8)
                        .map(|call| {
                            format!(
                                "{:?} in events {} to {}",
                                call.call,
                                call.from,
                                call.to.map_or("?".to_owned(), |to| to.to_string())
                            )
                        })
                        .collect();
                    return Err(format!(
                        "clients_linearizable: no order explains the {} calls on {what} {name}; at most {explained} are explained, near: {}",
                        calls.len(),
                        near.join("; ")
                    ));
                }
            }
        }
        Ok(())
    }
}

/// A call from its first line to its last: event numbers are times, for lines are written in the order of time.
struct Spoken<'a> {
    begin: &'a Value,
    end: Option<&'a Value>,
}

impl Spoken<'_> {
    fn from(&self) -> u64 {
        number(self.begin, "i")
    }

    /// `None`: unknown, or never answered.
    fn answer(&self) -> Option<(&Value, u64)> {
        let end = self.end.filter(|end| end["type"] == "ok")?;
        Some((&end["value"], number(end, "i")))
    }

    /// It was refused: nothing happened.
    fn failed(&self) -> bool {
        self.end.is_some_and(|end| end["type"] == "fail")
    }
}

fn number(event: &Value, field: &str) -> u64 {
    event[field].as_u64().unwrap_or_default()
}

/// All calls of clients by what they do, in the order of their beginnings. A process does one thing at a time.
fn spoken(events: &[Value]) -> Result<Vec<(&str, Spoken<'_>)>, String> {
    let mut open: BTreeMap<u64, usize> = BTreeMap::new();
    let mut all: Vec<(&str, Spoken<'_>)> = Vec::new();
    for event in events {
        let (Some(process), Some(f)) = (event["p"].as_u64(), event["f"].as_str()) else { continue };
        if event["type"] == "invoke" {
            open.insert(process, all.len());
            all.push((f, Spoken { begin: event, end: None }));
            continue;
        }
        let began = open.remove(&process).filter(|at| all[*at].0 == f);
        let at = began.ok_or_else(|| format!("event {} ends a {f} that never began", event["i"]))?;
        all[at].1.end = Some(event);
    }
    Ok(all)
}

fn jobs(events: &[Value]) -> Result<Histories<JobCall>, String> {
    let mut histories = Histories::new();
    for (f, call) in spoken(events)? {
        let Some((value, to)) = call.answer() else { continue };
        let (key, made) = match f {
            "submit" => (value.to_string(), JobCall::Submit),
            "read" => {
                let key = call.begin["key"].as_str().unwrap_or_default().trim_start_matches("/jobs/").to_owned();
                (key, JobCall::Read { found: value["found"] == true })
            }
            _ => continue,
        };
        histories.entry(key).or_insert_with(Vec::new).push(Timed { call: made, from: call.from(), to: Some(to) });
    }
    // A job whose submission nobody heard of may be one of those with an unknown outcome.
    for calls in histories.values_mut() {
        if !calls.iter().any(|call| matches!(call.call, JobCall::Submit)) {
            calls.push(Timed { call: JobCall::Submit, from: 0, to: None });
        }
    }
    Ok(histories)
}

fn locks(events: &[Value]) -> Result<Histories<LockCall>, String> {
    let mut histories = Histories::new();
    for (f, call) in spoken(events)? {
        if call.failed() {
            continue;
        }
        let session = number(&call.begin["value"], "session");
        let answer = call.answer();
        let made = match (f, answer) {
            ("acquire", _) => {
                let token = |value: &Value| value["token"].as_u64().filter(|token| *token > 0);
                LockCall::Acquire { session, answer: answer.map(|(value, _)| token(value)) }
            }
            ("validate", Some((value, _))) => LockCall::Validate { holder: number(value, "holder") },
            ("release", _) => LockCall::Release { session },
            // A look without an answer tells nothing.
            _ => continue,
        };
        let key = call.begin["key"].as_str().unwrap_or_default().to_owned();
        let timed = Timed { call: made, from: call.from(), to: answer.map(|(_, to)| to) };
        histories.entry(key).or_insert_with(Vec::new).push(timed);
    }
    Ok(histories)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Lines `(process, type, f, key, value)`, numbered in their order.
    fn history(lines: &[(u64, &str, &str, &str, Value)]) -> Vec<Value> {
        let numbered = lines.iter().enumerate();
        numbered.map(|(i, (p, kind, f, key, value))| json!({ "i": i + 1, "p": p, "type": kind, "f": f, "key": key, "value": value })).collect()
    }

    fn locked() -> Vec<(u64, &'static str, &'static str, &'static str, Value)> {
        vec![
            (1, "invoke", "acquire", "a", json!({ "session": 1 })),
            (1, "ok", "acquire", "a", json!({ "token": 5 })),
            (2, "invoke", "acquire", "a", json!({ "session": 2 })),
            (2, "ok", "acquire", "a", json!({ "token": 0 })),
            (2, "invoke", "validate", "a", json!({ "session": 2 })),
            (1, "invoke", "release", "a", json!({ "session": 1 })),
            (2, "ok", "validate", "a", json!({ "holder": 5 })),
            (1, "ok", "release", "a", json!(null)),
            (2, "invoke", "validate", "a", json!({ "session": 2 })),
            (2, "ok", "validate", "a", json!({ "holder": 9 })),
            (2, "invoke", "release", "a", json!({ "session": 2 })),
            (2, "info", "release", "a", json!("timeout")),
            (1, "invoke", "validate", "a", json!({ "session": 1 })),
            (1, "ok", "validate", "a", json!({ "holder": 9 })),
            (1, "invoke", "validate", "a", json!({ "session": 1 })),
            (1, "ok", "validate", "a", json!({ "holder": 0 })),
        ]
    }

    #[test]
    fn a_lock_that_is_right_has_an_order() {
        let searched = linearizable(&history(&locked())).expect("it has");
        assert_eq!(searched, Searched { objects: 1, calls: 8, given_up: 0 });
    }

    #[test]
    fn two_holders_an_old_token_and_a_lock_that_is_taken_from_its_holder_have_none() {
        let with = |at: usize, value: Value| {
            let mut lines = locked();
            lines[at].4 = value;
            linearizable(&history(&lines)).expect_err("no order")
        };
        assert!(with(3, json!({ "token": 6 })).contains("lock a"), "granted while it is held");
        with(9, json!({ "holder": 5 }));
        with(9, json!({ "holder": 4 }));
        with(13, json!({ "holder": 10 }));
    }

    #[test]
    fn a_job_that_was_acknowledged_and_is_not_found_has_no_order() {
        let lines = |found: bool| {
            history(&[
                (1, "invoke", "submit", "aa", json!(null)),
                (2, "invoke", "read", "/jobs/7", json!(null)),
                (2, "ok", "read", "/jobs/7", json!({ "found": true })),
                (1, "ok", "submit", "aa", json!(7)),
                (2, "invoke", "read", "/jobs/7", json!(null)),
                (2, "ok", "read", "/jobs/7", json!({ "found": found })),
                (2, "invoke", "read", "/jobs/8", json!(null)),
                (2, "ok", "read", "/jobs/8", json!({ "found": false })),
            ])
        };
        assert_eq!(linearizable(&lines(true)).expect("right").calls, 5);
        assert!(linearizable(&lines(false)).expect_err("gone").contains("job 7"));
    }
}
