//! What commands print: data on stdout in every format, talk on stderr.

mod cluster;

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use cluster::{Cluster, run};
use serde_json::Value;

#[test]
fn every_command_prints_what_it_knows() {
    let cluster = Cluster::with_machines();
    let pair = placed_with_reasons(&cluster);
    queue_reasons(&cluster);
    why_and_when(&cluster);
    names(&cluster);
    logs_of_ranks_and_attempts(&cluster);
    followed_logs(&cluster);
    keyspace(&cluster);
    watches(&cluster);
    locks(&cluster);
    machines(&cluster);
    load_whose_jobs_end(&cluster);
    json_everywhere(&cluster, &pair);
    job_environment(&cluster);
    users(&cluster);
}

/// The load cancels what it submitted, and nothing that it was told is missing.
fn load_whose_jobs_end(cluster: &Cluster) {
    let report = cluster.json(&["bench", "submit", "--clients", "2", "--seconds", "1", "--live", "4"]);
    assert_eq!((&report["errors"], &report["first_error"]), (&0.into(), &Value::Null), "{report}");
    let (acknowledged, cancelled) = (report["acknowledged"].as_u64(), report["cancelled"].as_u64());
    assert!(acknowledged > Some(4) && cancelled >= acknowledged.map(|all| all - 4), "{report}");
}

/// A pair of GPUs with the reason of the choice; returns the job, which goes on.
fn placed_with_reasons(cluster: &Cluster) -> String {
    let options = ["--gpus", "2", "--name", "pair", "--label", "team=vision", "--time-limit", "2h"];
    let job = cluster.submit(&options, "exec sleep 600");
    cluster.until_state(&job, "RUNNING");
    let shown = cluster.ares(&["show", &job]).ok().shows(&[
        "State      RUNNING",
        "Shape      1 node x 1 rank x 2 GPUs",
        "Labels     team=vision",
        "Limit      2h00m",
        "Placement  gpus: rank 0, GPUs ",
        "because",
        "40 GB/s predicted; no pair of this machine is better",
    ]);
    assert!(shown.err.is_empty());
    let job_json = cluster.json(&["show", &job]);
    assert_eq!((&job_json["user"], &job_json["labels"]["team"]), (&cluster::USER.into(), &"vision".into()));
    assert_eq!(job_json["placement"][0]["gpus"].as_array().map(Vec::len), Some(2));
    assert!(job_json["placement_why"][0].as_str().is_some_and(|why| why.contains("NV2 pair")), "{job_json}");
    cluster.ares(&["topology", "gpus"]).ok().shows(&[&format!("job {job} (token 1)"), "NV2", "NIC mlx5_0"]);
    job
}

fn queue_reasons(cluster: &Cluster) {
    let never = cluster.submit(&["--gpus", "64"], "true");
    let later = cluster.submit(&["--gpus", "8"], "true");
    let queue = cluster.ares(&["queue"]).ok().shows(&[
        "JOB  NAME",
        "NODES / REASON",
        "needs 64 GPUs in equal parts; no machines could ever hold it so, 8 on one machine would fit",
        "needs 8 GPUs on one machine; best has 6 free on gpus",
    ]);
    assert!(queue.err.is_empty());
    let json = cluster.json(&["queue"]);
    let jobs = json.as_array().expect("a list");
    let waiting = jobs.iter().filter(|job| job["state"] == "PENDING");
    assert!(waiting.clone().count() == 2 && waiting.clone().all(|job| job["reason"].is_string()), "{json}");
    let lines = cluster.ares(&["queue", "-o", "jsonl", "--limit", "2"]).ok().out;
    assert!(lines.lines().count() == 2 && lines.lines().all(|line| serde_json::from_str::<Value>(line).is_ok()));
    cluster.ares(&["queue", "--limit", "1"]).ok().says(&["1 of 3 jobs shown"]);
    let cancelled = cluster.json(&["cancel", &never, &later]);
    assert_eq!(cancelled["cancelled"].as_array().map(Vec::len), Some(2));
    assert!(!cluster.ares(&["queue"]).ok().out.contains("64"), "an ended job is shown with --all alone");
    cluster.ares(&["queue", "--all"]).ok().shows(&["CANCELLED"]);
}

/// Two of eight GPUs are taken for two hours.
fn why_and_when(cluster: &Cluster) {
    let whole = cluster.submit(&["--gpus", "8", "--time-limit", "1h"], "true");
    let said = [
        &format!("Job {whole} waits: GPUS_BUSY."),
        "Reason     needs 8 GPUs on one machine; best has 6 free on gpus",
        "Do         wait, or ask for fewer",
        "Held by    job 1 (pair, ",
        "2 GPUs on gpus; ends by 2",
        "Start      between now and 2",
        "Sooner     --gpus 6: starts now",
    ];
    cluster.ares(&["why", &whole]).ok().shows(&said);
    let json = cluster.json(&["why", &whole]);
    assert_eq!((&json["code"], &json["holders"][0]["job"]), (&"GPUS_BUSY".into(), &1.into()), "{json}");
    assert!(json["latest"].is_string() && json["changes"][0]["now"] == true, "{json}");
    assert_eq!(cluster.ares(&["why", &whole, "-o", "name"]).ok().out, "GPUS_BUSY\n");
    let queue = cluster.json(&["queue"]);
    let id: u64 = whole.parse().expect("a number");
    let row = queue.as_array().into_iter().flatten().find(|job| job["id"] == id).cloned();
    assert_eq!(row.map(|job| job["latest_start"].clone()), Some(json["latest"].clone()), "{queue}");

    // What is free is kept for it: a job without a limit waits, a short one would not.
    let kept = cluster.ares(&["submit", "--gpus", "1", "--dry-run", "--", "true"]).ok();
    kept.shows(&["It waits: RESERVED.", &format!("job {whole} (sh, "), "goes first", "Sooner     --time-limit "]);
    let short = ["submit", "--gpus", "1", "--time-limit", "30m", "--dry-run", "--", "true"];
    cluster.ares(&short).ok().shows(&["It would start now.", "Placement  gpus: rank 0, GPUs "]);
    let refused = ["submit", "--tenant", "nobody", "--dry-run", "--", "true"];
    cluster.ares(&refused).refused(3, &["TENANT_UNKNOWN"]);
    assert_eq!(cluster.json(&["queue"]), queue, "nothing was submitted");
    let reply = cluster.json(&["submit", "--gpus", "1", "--", "true"]);
    assert_eq!(reply["why"]["code"], "RESERVED", "{reply}");
    cluster.ares(&["cancel", &whole, &reply["id"].to_string()]).ok();
    cluster.ares(&["why", &whole]).ok().shows(&["does not wait: it is CANCELLED"]);
    cluster.ares(&["why", "1"]).ok().shows(&["Job 1 does not wait: it is RUNNING."]);
    cluster.ares(&["why", "999"]).refused(3, &["there is no job 999"]);
}

fn names(cluster: &Cluster) {
    let name = |args: &[&str]| cluster.ares(&[&["-o", "name"], args].concat()).ok().out;
    assert_eq!(name(&["nodes"]).lines().collect::<std::collections::BTreeSet<_>>(), ["cores", "gpus"].into());
    assert_eq!(name(&["queue"]), "1\n");
    assert_eq!(name(&["show", "1"]), "1\n");
    assert_eq!(name(&["cluster", "status"]).trim(), cluster.servers[0]);
    let job = name(&["submit", "--", "true"]);
    assert!(job.trim().parse::<u64>().is_ok(), "{job}");
    cluster.ares(&["wait", job.trim()]).ok();
    assert_eq!(name(&["get", "/jobs/1"]), "/jobs/1\n");
}

fn logs_of_ranks_and_attempts(cluster: &Cluster) {
    let gang = cluster.submit(&["--gpus", "2", "--ranks-per-node", "2"], "echo rank $RANK of $WORLD_SIZE");
    cluster.ares(&["wait", &gang]).ok();
    for rank in ["0", "1"] {
        let logs = cluster.ares(&["logs", &gang, "--rank", rank]).ok();
        assert_eq!(logs.out, format!("rank {rank} of 2\n"));
    }
    let none = format!("job {gang} has 2 rank(s), there is no rank 2");
    cluster.ares(&["logs", &gang, "-r", "2"]).refused(3, &[&none]);

    let twice = ["--retries", "1", "--retry-initial", "100ms"];
    let job = cluster.submit(&twice, "echo attempt $ARES_ATTEMPT; exit 3");
    cluster.ares(&["wait", &job]).code(3);
    assert_eq!(cluster.ares(&["logs", &job]).ok().out, "attempt 2\n");
    assert_eq!(cluster.ares(&["logs", &job, "--attempt", "1"]).ok().out, "attempt 1\n");
    assert_eq!(cluster.ares(&["logs", &job, "--tail", "2"]).ok().out, "2\n");
    cluster.ares(&["logs", &job, "--attempt", "7"]).refused(3, &["attempt 7 of job", "is not kept"]);
    cluster.ares(&["show", &job]).ok().shows(&[
        "Tried      attempt 1 (token ",
        "FAILED, exit code 3",
        "Result     FAILED",
    ]);

    let waiting = cluster.submit(&["--gpus", "64"], "true");
    cluster.ares(&["logs", &waiting]).refused(3, &["has no output: it is PENDING", "-f waits for it"]);
    cluster.ares(&["cancel", &waiting]).ok();
}

fn followed_logs(cluster: &Cluster) {
    let gate = cluster.path("gate");
    let script = format!("echo one; while [ ! -e '{}' ]; do sleep 0.05; done; echo two", gate.display());
    let job = cluster.submit(&[], &script);
    let mut child = cluster.command(&["logs", "-f", &job]).stdout(Stdio::piped()).spawn().expect("starts");
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    let mut next = || lines.next().map(|line| line.expect("text"));
    assert_eq!(next().as_deref(), Some("one"), "at once, while the job runs");
    std::fs::write(gate, "").expect("written");
    assert_eq!((next().as_deref(), next()), (Some("two"), None));
    assert!(child.wait().expect("it ends").success());
}

fn keyspace(cluster: &Cluster) {
    let one = cluster.ares(&["get", "/state/1"]).ok();
    let (key, value) = one.out.split_once('\n').expect("two lines");
    let value: Value = serde_json::from_str(value).expect("JSON");
    assert_eq!((key, value["state"].as_str()), ("/state/1", Some("RUNNING")));
    let keys = cluster.ares(&["get", "/state/", "--prefix", "--keys-only"]).ok().out;
    assert!(keys.lines().count() > 3 && keys.lines().all(|key| key.starts_with("/state/")), "{keys}");
    assert_eq!(
        cluster.ares(&["get", "/state/", "--prefix", "--keys-only", "--limit", "2"]).ok().out.lines().count(),
        2
    );
    let listed = cluster.json(&["get", "/leases/", "--prefix"]);
    assert_eq!(listed[0]["value"]["job_id"], 1, "the value is JSON, not text: {listed}");
    assert!(listed[0]["mod_revision"].is_u64() && listed[0]["version"].is_u64());
    for prefix in ["/jobs/", "/fencing/", "/topology/", "/results/"] {
        assert!(!cluster.json(&["get", prefix, "--prefix"]).as_array().expect("a list").is_empty(), "{prefix}");
    }
    assert_eq!(cluster.ares(&["get", "/nothing/", "--prefix"]).ok().out, "");
}

fn watches(cluster: &Cluster) {
    let seen = cluster.ares(&["watch", "/state/1", "--from", "1", "--count", "2"]).ok().out;
    assert!(seen.contains("PUT /state/1\n") && seen.contains("PENDING") && seen.contains("STARTING"), "{seen}");
    let lines = cluster.ares(&["watch", "/jobs/", "--prefix", "--from", "1", "--count", "2", "-o", "json"]).ok().out;
    let events: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let revisions: Vec<u64> = events.iter().map(|event| event["mod_revision"].as_u64().expect("a number")).collect();
    assert!(events[0]["key"] == "/jobs/1" && revisions[0] < revisions[1], "{events:?}");
    // From the revision behind the first: the second again, without a gap.
    let from = (revisions[0] + 1).to_string();
    let next = cluster.ares(&["watch", "/jobs/", "--prefix", "--from", &from, "--count", "1", "-o", "name"]).ok().out;
    assert_eq!(next.trim(), events[1]["key"].as_str().expect("text"));
}

fn locks(cluster: &Cluster) {
    let text = cluster.ares(&["lock", "acquire", "checkpoint"]).ok().out;
    let words: Vec<&str> = text.split_whitespace().collect();
    let ["session", session, "token", token] = words[..] else { panic!("{text}") };
    assert_eq!(cluster.ares(&["lock", "validate", "checkpoint", token]).ok().out, "held\n");
    let judged = cluster.json(&["lock", "validate", "checkpoint", token]);
    assert!(judged["held"] == true && judged["holder_token"] == token, "{judged}");
    assert_eq!(cluster.json(&["lock", "keep-alive", session])["ttl_ms"], 60_000);
    assert_eq!(cluster.json(&["lock", "release", "checkpoint", session])["released"], "checkpoint");
    cluster.ares(&["lock", "validate", "checkpoint", token]).code(5);
    let ran =
        cluster.ares(&["lock", "run", "checkpoint", "--", "sh", "-c", "echo $ARES_LOCK_NAME $ARES_LOCK_TOKEN"]).ok();
    let newer: u64 = ran.out.trim().strip_prefix("checkpoint ").expect("name and token").parse().expect("a number");
    assert!(newer > token.parse().expect("a number"), "tokens only grow");
}

fn machines(cluster: &Cluster) {
    cluster.ares(&["nodes"]).ok().shows(&["NODE", "6/8", "v100 (simulated)", "78/80"].map(|word| match word {
        "78/80" => "/80",
        word => word,
    }));
    cluster.ares(&["node", "out", "cores", "--reason", "new disk"]).ok().says(&["Node cores gets nothing new"]);
    cluster.ares(&["nodes"]).ok().shows(&["OUT", "new disk"]);
    assert_eq!(cluster.json(&["node", "ready", "cores"])["node"], "cores");
    let nodes = cluster.json(&["nodes"]);
    assert!(nodes.as_array().expect("a list").iter().all(|node| node["state"] == "READY"), "{nodes}");
    cluster.ares(&["node", "confirm-dead", "cores"]).refused(5, &["NOT_STUCK"]);
    cluster.ares(&["topology", "cores"]).ok().shows(&["It has no GPU."]);
}

fn json_everywhere(cluster: &Cluster, job: &str) {
    let submitted = cluster.json(&["submit", "--", "true"]);
    let id = submitted["id"].to_string();
    assert!(submitted["replayed"] == false && submitted["request_id"].as_str().is_some_and(|id| id.len() == 36));
    let ended = cluster.json(&["wait", &id]);
    assert_eq!((&ended[0]["state"], &ended[0]["result"]["attempt"]), (&"SUCCEEDED".into(), &1.into()));
    assert!(ended[0]["token"].is_null() && ended[0]["result"]["token"].is_string(), "tokens are decimal text: {ended}");
    let lists: [&[&str]; 4] = [&["queue", "--all"], &["nodes"], &["cluster", "status"], &["cluster", "members"]];
    for args in lists {
        let value = cluster.json(args);
        assert!(value.as_array().is_some_and(|rows| !rows.is_empty()), "{args:?}: {value}");
    }
    for args in [&["show", job] as &[&str], &["topology", "gpus"], &["version", "--replica"]] {
        assert!(cluster.json(args).is_object(), "{args:?}");
    }
    let status = cluster.json(&["cluster", "status"]);
    assert_eq!((&status[0]["role"], &status[0]["cluster_id"]), (&"LEADER".into(), &cluster.id.as_str().into()));
    let mut by_environment = cluster.command(&["queue"]);
    by_environment.env("ARES_OUTPUT", "json");
    assert!(run(by_environment).json().is_array());
}

fn job_environment(cluster: &Cluster) {
    let script = "echo $RANK/$WORLD_SIZE $LOCAL_RANK $CUDA_DEVICE_ORDER [$CUDA_VISIBLE_DEVICES] $MINE";
    let job = cluster.submit(&["--gpus", "2", "--ranks-per-node", "2", "-e", "MINE=a b"], script);
    cluster.ares(&["wait", &job]).ok();
    let logs = cluster.ares(&["logs", &job, "-r", "1"]).ok();
    assert!(logs.out.starts_with("1/2 1 PCI_BUS_ID [GPU-") && logs.out.ends_with("] a b\n"), "{logs:?}");
}

/// Without USER the name is the password file's, and never empty.
fn users(cluster: &Cluster) {
    let mut command = cluster.command(&["submit", "--", "true"]);
    command.env_remove("USER");
    let job = run(command).ok().out;
    let shown = cluster.json(&["show", job.trim()]);
    let name = std::process::Command::new("id").arg("-un").output().expect("id starts").stdout;
    assert_eq!(shown["user"].as_str(), Some(String::from_utf8_lossy(&name).trim()));
}
