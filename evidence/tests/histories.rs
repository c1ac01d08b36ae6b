//! Hand-made histories: a whole one that holds, one for each thing that must not be, and files that are no histories.

use evidence::{Counterexample, Counts, Judgement, Unreadable, judge};
use serde_json::{Value, json};

/// A history under construction: one revision after the other.
struct Tale {
    lines: Vec<String>,
    rev: u64,
}

impl Tale {
    /// From the beginning of a cluster.
    fn new() -> Self {
        Self { lines: Vec::new(), rev: 0 }
    }

    fn at(rev: u64) -> Self {
        Self { lines: Vec::new(), rev: rev - 1 }
    }

    fn revision(mut self, events: &[(&str, Value)]) -> Self {
        self.rev += 1;
        for (key, value) in events {
            let kind = if value.is_null() { "DELETE" } else { "PUT" };
            let event = json!({ "key": key, "type": kind, "value": value, "mod_revision": self.rev });
            self.lines.push(event.to_string());
        }
        self
    }

    fn job(self, id: u64, nodes: u64, gpus_per_rank: u64) -> Self {
        let spec =
            json!({ "job_id": id, "nodes": nodes, "ranks_per_node": 1, "gpus_per_rank": gpus_per_rank, "name": "x" });
        self.revision(&[(&format!("/jobs/{id}"), spec), (&format!("/state/{id}"), json!({ "state": "PENDING" }))])
    }

    fn grant(self, job: u64, token: u64, attempt: u64, parts: &[(&str, &[&str])]) -> Self {
        let gpus: std::collections::BTreeSet<&str> = parts.iter().flat_map(|(_, gpus)| gpus.iter().copied()).collect();
        let fences = gpus
            .into_iter()
            .map(|gpu| (format!("/fencing/gpu/{gpu}"), json!({ "gpu": gpu, "token": token.to_string() })));
        let mut events: Vec<(String, Value)> = fences.collect();
        events.push((format!("/fencing/job/{job}"), json!({ "job_id": job, "token": token.to_string() })));
        events.push((format!("/leases/{token}"), lease(job, token, attempt, parts)));
        let events: Vec<(&str, Value)> = events.iter().map(|(key, value)| (key.as_str(), value.clone())).collect();
        self.revision(&events)
    }

    fn shown(self, job: u64, token: u64, attempt: u64, parts: &[(&str, &[&str])]) -> Self {
        self.revision(&[(&format!("/leases/{token}"), lease(job, token, attempt, parts))])
    }

    fn closed(self, token: u64) -> Self {
        self.revision(&[(&format!("/leases/{token}"), Value::Null)])
    }

    fn ended(self, job: u64, token: u64, attempt: u64) -> Self {
        self.revision(&[
            (&format!("/leases/{token}"), Value::Null),
            (&format!("/results/{job}"), result(job, token, attempt)),
        ])
    }

    fn lock(self, token: u64) -> Self {
        let held = json!({ "name": "one", "holder": { "session": 1, "token": token.to_string() }, "waiters": 0 });
        self.revision(&[("/locks/one", held)])
    }

    fn text(&self, from: u64) -> String {
        let header = json!({ "ares_history": 1, "cluster_id": "ab", "generation": 0, "from": from, "to": self.rev,
            "from_the_beginning": from == 1 });
        std::iter::once(header.to_string()).chain(self.lines.iter().cloned()).map(|line| line + "\n").collect()
    }

    fn judged(&self) -> Judgement {
        judge(self.text(1).as_bytes()).expect("it can be read")
    }

    fn broken(&self) -> Counterexample {
        match self.judged() {
            Judgement::Broken(counterexample) => counterexample,
            Judgement::Holds(counts) => panic!("it was found good: {counts:?}"),
        }
    }

    fn holds(&self) -> Counts {
        match self.judged() {
            Judgement::Holds(counts) => counts,
            Judgement::Broken(counterexample) => panic!("{counterexample}"),
        }
    }
}

fn lease(job: u64, token: u64, attempt: u64, parts: &[(&str, &[&str])]) -> Value {
    let parts: Vec<Value> = (0u64..)
        .zip(parts)
        .map(|(at, (node, gpus))| json!({ "node": node, "first_rank": at, "ranks": 1, "gpus": gpus }))
        .collect();
    json!({ "token": token.to_string(), "job_id": job, "attempt": attempt, "phase": "GO", "parts": parts })
}

fn result(job: u64, token: u64, attempt: u64) -> Value {
    json!({ "job_id": job, "outcome": "SUCCEEDED", "token": token.to_string(), "attempt": attempt })
}

const ONE: &[(&str, &[&str])] = &[("n1", &["GPU-a"])];
const OTHER: &[(&str, &[&str])] = &[("n2", &["GPU-b"])];
const BOTH: &[(&str, &[&str])] = &[("n1", &["GPU-a"]), ("n2", &["GPU-b"])];

#[test]
fn a_history_that_holds_is_counted() {
    let tale = Tale::new()
        .job(1, 1, 1)
        .job(2, 2, 1)
        .grant(1, 1, 1, ONE)
        .shown(1, 1, 1, ONE)
        .closed(1)
        .grant(1, 2, 2, OTHER)
        .ended(1, 2, 2)
        .lock(3)
        .lock(3)
        .grant(2, 4, 1, BOTH)
        .ended(2, 4, 1)
        .revision(&[("/topology/n1", json!({ "name": "n1" }))]);
    let counts = tale.holds();
    assert_eq!((counts.first_revision, counts.last_revision, counts.events), (1, 12, 23));
    assert_eq!((counts.jobs, counts.grants, counts.results, counts.gpus, counts.lock_tokens), (2, 3, 2, 2, 1));
    assert!(counts.from_the_beginning);
}

#[test]
fn two_results_of_a_job_are_told_with_their_tokens_and_revisions() {
    let twice =
        Tale::new().job(1, 1, 1).grant(1, 7, 1, ONE).ended(1, 7, 1).revision(&[("/results/1", result(1, 7, 1))]);
    let story = twice.broken();
    assert_eq!(story.invariant, "result_once");
    let told = story.to_string();
    assert!(told.contains("Job 1 has two committed results"), "{told}");
    assert!(told.contains("revision 3") && told.contains("revision 4, line 9") && told.contains("token 7"), "{told}");
}

#[test]
fn a_result_of_an_older_attempt_and_a_start_behind_a_result_are_found() {
    let stale = Tale::new().job(1, 1, 1).grant(1, 1, 1, ONE).closed(1).grant(1, 2, 2, OTHER).ended(1, 1, 1);
    assert_eq!(stale.broken().invariant, "result_once");
    let again = Tale::new().job(1, 1, 1).grant(1, 1, 1, ONE).ended(1, 1, 1).grant(1, 2, 2, ONE);
    assert!(again.broken().what.contains("was started again"));
}

#[test]
fn a_gpu_in_two_leases_is_found_and_a_gang_that_lets_go_node_by_node_is_not() {
    let shared = Tale::new().job(1, 1, 1).job(2, 1, 1).grant(1, 1, 1, ONE).grant(2, 2, 1, ONE);
    let story = shared.broken();
    assert_eq!((story.invariant, story.facts.len()), ("gpu_in_one_lease", 2));
    assert!(story.what.contains("lease 1 of job 1 and in lease 2 of job 2"), "{}", story.what);
    let gang = Tale::new().job(1, 2, 1).job(2, 1, 1).grant(1, 1, 1, BOTH).grant(2, 2, 1, ONE).ended(1, 1, 1);
    assert_eq!(gang.holds().handed_on, 1);
    let twice = Tale::new().job(1, 1, 2).grant(1, 1, 1, &[("n1", &["GPU-a", "GPU-a"])]);
    assert_eq!(twice.broken().invariant, "gpu_in_one_lease");
    // The second lease holds the GPU still when the first closes.
    let third = Tale::new()
        .job(1, 2, 1)
        .job(2, 1, 1)
        .job(3, 1, 1)
        .grant(1, 1, 1, BOTH)
        .grant(2, 2, 1, ONE)
        .ended(1, 1, 1)
        .grant(3, 3, 1, ONE);
    assert!(third.broken().what.contains("lease 2 of job 2 and in lease 3 of job 3"));
}

#[test]
fn tokens_that_do_not_grow_are_found() {
    let back = Tale::new().job(1, 1, 1).job(2, 1, 1).grant(1, 5, 1, ONE).grant(2, 4, 1, OTHER);
    assert_eq!(back.broken().invariant, "token_grows");
    let lock = Tale::new().job(1, 1, 1).lock(5).grant(1, 5, 1, ONE);
    assert_eq!(lock.broken().invariant, "token_grows");
    let job = Tale::new().job(1, 1, 1).grant(1, 5, 1, ONE).closed(5).grant(1, 5, 2, OTHER);
    assert_eq!(job.broken().invariant, "token_grows");
    let nobody = Tale::new().job(1, 1, 1).shown(1, 1, 1, ONE);
    assert!(nobody.broken().what.contains("without ever having been granted"));
    let closed = Tale::new().job(1, 1, 1).grant(1, 1, 1, ONE).closed(1).shown(1, 1, 1, ONE);
    assert!(closed.broken().what.contains("was closed, and is there again"));
}

#[test]
fn attempts_that_do_not_grow_by_one_are_found() {
    let same = Tale::new().job(1, 1, 1).grant(1, 1, 1, ONE).closed(1).grant(1, 2, 1, ONE);
    assert_eq!(same.broken().invariant, "retries_bounded");
    let skipped = Tale::new().job(1, 1, 1).grant(1, 1, 2, ONE);
    assert_eq!(skipped.broken().invariant, "retries_bounded");
}

#[test]
fn two_attempts_at_once_and_a_result_beside_an_open_lease_are_found() {
    let two = Tale::new().job(1, 1, 1).grant(1, 1, 1, ONE).grant(1, 2, 2, OTHER);
    assert_eq!(two.broken().invariant, "lease_iff_running");
    let open = Tale::new().job(1, 1, 1).grant(1, 1, 1, ONE).revision(&[("/results/1", result(1, 1, 1))]);
    assert_eq!(open.broken().invariant, "lease_iff_running");
}

#[test]
fn a_torn_gang_is_found() {
    let half = Tale::new().job(1, 2, 1).grant(1, 1, 1, ONE);
    assert_eq!(half.broken().invariant, "gang_whole");
    let fewer_gpus = Tale::new().job(1, 1, 2).grant(1, 1, 1, ONE);
    assert_eq!(fewer_gpus.broken().invariant, "gang_whole");
    let one_node = Tale::new().job(1, 2, 1).grant(1, 1, 1, &[("n1", &["GPU-a"]), ("n1", &["GPU-b"])]);
    assert_eq!(one_node.broken().invariant, "gang_whole");
    // Open on how many nodes, but not how many GPUs each has.
    Tale::new().job(1, 0, 2).grant(1, 1, 1, BOTH).ended(1, 1, 1).holds();
    let open = Tale::new().job(1, 0, 3).grant(1, 1, 1, BOTH);
    assert_eq!(open.broken().invariant, "gang_whole");
    let moved = Tale::new().job(1, 1, 1).grant(1, 1, 1, ONE).shown(1, 1, 1, OTHER);
    assert_eq!(moved.broken().invariant, "gang_whole");
}

#[test]
fn a_hole_and_a_missing_end_are_no_evidence() {
    let mut tale = Tale::new().job(1, 1, 1).grant(1, 1, 1, ONE).ended(1, 1, 1);
    let whole = tale.lines.clone();
    tale.lines.drain(2..5);
    assert_eq!(tale.broken().invariant, "history_whole");
    tale.lines = whole[..5].to_vec();
    assert!(tale.broken().what.contains("ends at revision 2, its header says 3"));
    // Out of order.
    tale.lines = whole;
    tale.lines.rotate_left(2);
    assert_eq!(tale.broken().invariant, "history_whole");
}

#[test]
fn a_part_of_a_history_is_judged_by_what_it_shows() {
    let part = Tale::at(50).shown(1, 7, 3, ONE).closed(7).grant(1, 9, 4, OTHER).ended(1, 9, 4);
    let Judgement::Holds(counts) = judge(part.text(50).as_bytes()).expect("readable") else { panic!("it holds") };
    assert_eq!((counts.grants, counts.leases_before, counts.from_the_beginning), (1, 1, false));
    // Without a header, as a watch prints it.
    let bare: String = part.lines.iter().map(|line| format!("{line}\n")).collect();
    assert!(matches!(judge(bare.as_bytes()), Ok(Judgement::Holds(_))));
    let shared = Tale::at(50).shown(1, 7, 3, ONE).grant(2, 9, 1, ONE);
    assert!(matches!(judge(shared.text(50).as_bytes()), Ok(Judgement::Broken(_))));
}

#[test]
fn an_empty_file_shows_nothing_and_breaks_nothing() {
    assert_eq!(judge(&b""[..]).expect("readable"), Judgement::Holds(Counts::default()));
}

#[test]
fn what_is_no_history_is_refused_with_line_and_column() {
    let good = r#"{"key":"/state/1","type":"PUT","value":{},"mod_revision":1}"#;
    let refused = |text: &[u8]| match judge(text) {
        Err(Unreadable::Text { line, column, what }) => (line, column, what),
        other => panic!("{other:?}"),
    };
    let at = |text: &str| {
        let (line, column, _) = refused(format!("{good}\n{text}\n").as_bytes());
        (line, column)
    };
    assert_eq!(at("{"), (2, 1));
    assert_eq!(at("[1,2]").0, 2);
    assert_eq!(at(r#"{"key":"/state/1","type":"WIPE","mod_revision":2}"#), (2, 31));
    assert_eq!(at(r#"{"key":"/state/1","type":"PUT","mod_revision":-2}"#).0, 2);
    assert_eq!(at(r#"{"key":"/state/1","type":"PUT","mod_revision":0}"#), (2, 1));
    assert_eq!(at(r#"{"key":"/leases/x","type":"DELETE","mod_revision":2}"#), (2, 1));
    assert_eq!(at(r#"{"key":"/leases/1","type":"PUT","mod_revision":2}"#), (2, 1));
    let (line, column, what) = refused(
        format!(
            "{good}\n{}\n",
            r#"{"key":"/results/1","type":"PUT","value":{"job_id":1,"outcome":"FAILED","token":9},"mod_revision":2}"#
        )
        .as_bytes(),
    );
    assert_eq!((line, column), (2, 81), "{what}");
    let (_, _, what) = refused(
        br#"{"key":"/results/1","type":"PUT","value":{"job_id":2,"outcome":"FAILED","attempt":1},"mod_revision":2}"#,
    );
    assert!(what.contains("names another one"), "{what}");
    let (line, _, what) = refused(b"{\"ares_history\":2}\n");
    assert!(line == 1 && what.contains("format 2"), "{what}");
    let (line, _, _) = refused(b"\n\n\xff\xfe\n");
    assert_eq!(line, 3);
    let deep = "[".repeat(100_000);
    assert_eq!(at(&format!(r#"{{"key":"/state/1","type":"PUT","value":{deep}"#)).0, 2);
    let long = vec![b' '; 17 << 20];
    assert!(refused(&long).2.contains("longer than"));
}
