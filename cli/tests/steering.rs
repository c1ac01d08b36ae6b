//! What a person and an operator do to jobs and machines of a real cluster, and what comes of it.

mod cluster;

use cluster::Cluster;

#[test]
fn jobs_and_machines_do_as_they_are_told() {
    let cluster = Cluster::with_machines();
    holds(&cluster);
    requeue(&cluster);
    drain(&cluster);
    times(&cluster);
    parents(&cluster);
    tenants(&cluster);
    priorities(&cluster);
    order(&cluster);
    policy(&cluster);
}

fn tenants(cluster: &Cluster) {
    cluster.ares(&["tenant", "create", "lab", "--weight", "3", "--limit-gpus", "1"]).ok().says(&["Tenant lab exists"]);
    cluster.ares(&["tenant", "create", "vision", "--parent", "lab", "--default-limit", "2h"]).ok();
    cluster.ares(&["tenant", "create", "vision"]).refused(5, &["CONFLICT", "exists already"]);
    cluster.ares(&["tenant", "set", "nobody", "--weight", "2"]).refused(3, &["TENANT_UNKNOWN", "lab"]);
    cluster.ares(&["tenant", "set", "lab", "--guarantee", "h100"]).refused(2, &["h100:8,a100:4"]);

    cluster.ares(&["tenant", "set", "lab", "--max-limit", "3h"]).ok();
    cluster.ares(&["tenant", "show", "lab"]).ok().shows(&["none, at most 3h00m"]);
    let long = ["submit", "--tenant", "vision", "--time-limit", "4h", "--", "true"];
    cluster.ares(&long).refused(2, &["limit_ms is 14400000, the limit of tenant \"lab\" is 10800000"]);

    let first = cluster.submit(&["--tenant", "vision", "--gpus", "1"], "exec sleep 600");
    cluster.until_state(&first, "RUNNING");
    assert_eq!(cluster.json(&["show", &first])["limit_ms"], 7_200_000);
    let second = cluster.submit(&["--tenant", "vision", "--gpus", "1"], "true");
    let wanted = "tenant \"lab\" uses 1 of its 1 GPUs, 1 more would pass the limit";
    assert_eq!(cluster.json(&["show", &second])["reason"], wanted);
    assert_eq!(cluster.json(&["tenant", "show", "lab"])["used_gpus"]["v100"], 1);
    cluster.ares(&["tenant", "list"]).ok().shows(&["default", "lab", "  vision", "1 v100", "1 GPUs"]);
    cluster.ares(&["tenant", "remove", "vision"]).refused(5, &["NOT_EMPTY", "2 jobs"]);
    cluster.ares(&["tenant", "set", "lab", "--limit-gpus", "none"]).ok();
    cluster.ares(&["wait", &second]).ok();
    cluster.ares(&["cancel", &first]).ok();
    cluster.ares(&["wait", &first]).code(143);
    let shares = cluster.json(&["share"]);
    let lab = shares.as_array().and_then(|all| all.iter().find(|tenant| tenant["name"] == "lab")).expect("lab");
    assert!(lab["usage_gpu_ms"].as_u64() > Some(0) && lab["fair_ppm"] == 750_000, "{lab}");
    cluster.ares(&["share"]).ok().shows(&["75.0 %"]).says(&["half after 7d00h"]);
    cluster.ares(&["tenant", "remove", "vision"]).ok();
    cluster.ares(&["submit", "--tenant", "vision", "--", "true"]).refused(3, &["TENANT_UNKNOWN"]);
}

fn priorities(cluster: &Cluster) {
    cluster.ares(&["priority", "create", "urgent", "--value", "100", "--tenants", "lab", "--preempts"]).ok();
    let job = cluster.submit(&["--tenant", "lab", "--priority-class", "urgent"], "true");
    let shown = cluster.json(&["show", &job]);
    assert_eq!((&shown["priority"], &shown["priority_class"]), (&100.into(), &"urgent".into()));
    cluster.ares(&["submit", "--priority-class", "urgent", "--", "true"]).refused(4, &["PRIORITY_DENIED", "default"]);
    cluster.ares(&["submit", "--priority-class", "none", "--", "true"]).refused(3, &["PRIORITY_UNKNOWN"]);
    cluster.ares(&["priority", "list"]).ok().shows(&["urgent", "100", "lab"]);
    cluster.ares(&["priority", "remove", "urgent"]).ok();
}

fn policy(cluster: &Cluster) {
    cluster.ares(&["policy", "show"]).ok().shows(&["Order         fair", "Reservations  1 ", "Aged after    7d00h"]);
    let set = ["policy", "set", "--order", "fifo", "--reservations", "2", "--aged-after", "never"];
    cluster.ares(&set).ok().says(&["The policy is changed."]).shows(&["fifo", "2 of each pool", "never"]);
    let json = cluster.json(&["policy", "show"]);
    assert_eq!((&json["order"], &json["aged_after_ms"]), (&"fifo".into(), &0.into()));
    cluster.ares(&["policy", "set"]).refused(2, &["nothing to change", "--aged-after"]);
    cluster.ares(&["policy", "set", "--order", "lifo"]).refused(2, &["order", "\"lifo\"; fair or fifo"]);
    cluster.ares(&["policy", "set", "--reservations", "65"]).refused(2, &["reservations is 65, the limit is 64"]);
    cluster.ares(&["policy", "set", "--order", "fair", "--reservations", "1", "--aged-after", "7d"]).ok();
}

/// Tenants take turns by their shares, and a guarantee goes before every borrower. No machine has 64 GPUs.
fn order(cluster: &Cluster) {
    let wait = |tenant: &str| cluster.submit(&["--tenant", tenant, "--gpus", "64"], "true");
    let lab = [wait("lab"), wait("lab"), wait("lab")];
    let other = wait("default");
    let queue = || -> Vec<String> {
        let names = cluster.ares(&["queue", "-o", "name"]).ok().out;
        names.lines().filter(|id| *id == other || lab.iter().any(|job| job == id)).map(str::to_owned).collect()
    };
    let place = |queue: &[String]| queue.iter().position(|id| *id == other).expect("it waits");
    let fair = queue();
    assert!(place(&fair) < 2, "{other} came last, and its tenant is owed the next turn: {fair:?}");
    cluster.ares(&["tenant", "set", "lab", "--guarantee", "v100:200"]).ok();
    let guaranteed = queue();
    assert_eq!(guaranteed, [&lab[..], std::slice::from_ref(&other)].concat());
    lab.iter().chain([&other]).for_each(|job| {
        cluster.ares(&["cancel", job]).ok();
    });
    cluster.ares(&["tenant", "set", "lab", "--guarantee", ""]).ok();
}

fn times(cluster: &Cluster) {
    let job = cluster.submit(&["--begin", "now+1500ms"], "true");
    let shown = cluster.json(&["show", &job]);
    assert!(shown["reason"].as_str().is_some_and(|reason| reason.starts_with("begins in ")), "{shown}");
    assert!(shown["begin"].is_string() && shown["state"] == "PENDING");
    cluster.ares(&["wait", &job]).ok();

    let late = cluster.submit(&["--gpus", "64", "--deadline", "now+1s"], "true");
    cluster.ares(&["wait", &late]).code(130).says(&["CANCELLED: it could not keep its deadline any more"]);
    let submit = |options: &[&str]| cluster.ares(&[&["submit"], options, &["--", "true"]].concat());
    submit(&["--deadline", "now+1h", "--time-limit", "2h"])
        .refused(2, &["DEADLINE_TOO_SOON", "7200000 ms", "--deadline"]);
    submit(&["--begin", "soon"]).refused(2, &["--begin \"soon\" is no time", "now+1h"]);
}

fn parents(cluster: &Cluster) {
    let parent = cluster.submit(&["--hold", "--retries", "0"], "exit 3");
    let good = cluster.submit(&["--after", &format!("afternotok:{parent}")], "true");
    let never = cluster.submit(&["--after", &format!("afterok:{parent},afterany:{good}")], "true");
    let shown = cluster.json(&["show", &never]);
    assert_eq!(shown["reason"], format!("waits for job {parent} (afterok) and 1 more"));
    cluster.ares(&["release", &parent]).ok();
    cluster.ares(&["wait", &good]).ok();
    cluster.ares(&["wait", &never]).code(1).says(&[&format!("SKIPPED: job {parent} did not end as it needs")]);
    assert_eq!(cluster.json(&["show", &never])["result"]["parent"].to_string(), parent);
    cluster.ares(&["submit", "--after", "afterok:999", "--", "true"]).refused(3, &["DEPENDENCY_UNKNOWN", "job 999"]);
    cluster.ares(&["submit", "--after", "999", "--", "true"]).refused(2, &["--after \"999\"", "afterok:12"]);
}

fn holds(cluster: &Cluster) {
    let job = cluster.submit(&["--hold"], "true");
    assert_eq!(cluster.json(&["show", &job])["reason"], "on hold until it is released");
    cluster.ares(&["release", &job]).ok().says(&[&format!("Job {job} may start.")]);
    cluster.ares(&["wait", &job]).ok();
    cluster.ares(&["hold", &job]).refused(5, &["ALREADY_ENDED", "SUCCEEDED"]);
    cluster.ares(&["hold", "999"]).refused(3, &["there is no job 999"]);

    let running = cluster.submit(&["--retries", "0"], "exec sleep 600");
    cluster.until_state(&running, "RUNNING");
    assert_eq!(cluster.json(&["hold", &running])["held"][0].to_string(), running);
    assert_eq!(cluster.json(&["show", &running])["state"], "RUNNING");
    cluster.ares(&["requeue", &running]).ok();
    cluster.until_state(&running, "PENDING");
    assert_eq!(cluster.json(&["get", &format!("/state/{running}")])[0]["value"]["holds"][0], "USER");
    cluster.ares(&["cancel", &running]).ok();
}

/// The same job, under a new token, without a burnt retry.
fn requeue(cluster: &Cluster) {
    let job = cluster.submit(&["--gpus", "1", "--retries", "0"], "exec sleep 600");
    cluster.until_state(&job, "RUNNING");
    let first = cluster.json(&["show", &job]);
    cluster.ares(&["requeue", &job]).ok().says(&["goes back to its place in the queue"]);
    cluster.until("the second attempt runs", |cluster| {
        let job = cluster.json(&["show", &job]);
        job["state"] == "RUNNING" && job["attempt"] == 2
    });
    let second = cluster.json(&["show", &job]);
    assert_eq!((&second["retries_used"], &second["attempts"][0]["verdict"]), (&0.into(), &"PREEMPTED".into()));
    assert_ne!(first["token"], second["token"]);
    cluster.ares(&["cancel", &job]).ok();
    cluster.ares(&["wait", &job]).code(143);
}

fn drain(cluster: &Cluster) {
    let job = cluster.submit(&["--gpus", "1"], "exec sleep 600");
    cluster.until_state(&job, "RUNNING");
    cluster.ares(&["node", "drain", "gpus", "--evict-after", "soon"]).refused(2, &["--evict-after \"soon\""]);
    cluster.ares(&["node", "drain", "gpus", "--reason", "new fans", "--evict-after", "0"]).ok();
    cluster.until_state(&job, "PENDING");
    let shown = cluster.json(&["show", &job]);
    let text = shown["attempts"][0]["text"].as_str().unwrap_or_default().to_owned();
    assert!(text.contains("gpus is out of service: new fans"), "{shown}");
    assert!(shown["reason"].as_str().is_some_and(|reason| reason.contains("out of service")), "{shown}");
    cluster.ares(&["node", "resume", "gpus"]).ok().says(&["takes work again"]);
    cluster.until_state(&job, "RUNNING");
    cluster.ares(&["cancel", &job]).ok();
}
