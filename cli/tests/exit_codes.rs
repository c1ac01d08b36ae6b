//! What a command exits with: the job's own end, or what kept it from knowing.

mod cluster;

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use cluster::{Cluster, Ran, Running, ares, processes, run};
use rustix::process::Signal;

#[test]
fn a_command_exits_as_its_job_does() {
    let mut cluster = Cluster::with_machines();
    own_codes_and_signals(&cluster);
    limits(&cluster);
    jobs_that_cannot_be_launched(&cluster);
    waiting(&cluster);
    interrupted_run(&cluster);
    locked_commands(&cluster);
    closed_pipe(&cluster);
    silent_agent(&mut cluster);
}

fn shell(cluster: &Cluster, options: &[&str], script: &str) -> Ran {
    cluster.ares(&[&["run"], options, &["--", "sh", "-c", script]].concat())
}

fn own_codes_and_signals(cluster: &Cluster) {
    let ran = shell(cluster, &[], "echo out; echo err >&2").ok().says(&["SUCCEEDED (attempt 1, token "]);
    assert_eq!(ran.out, "out\nerr\n");
    shell(cluster, &[], "exit 7").code(7).says(&["FAILED", "exit code 7"]);
    shell(cluster, &[], "exit 255").code(255);
    shell(cluster, &[], "kill -KILL $$").code(137).says(&["signal 9"]);
    shell(cluster, &[], "kill -TERM $$").code(143);
    let retried = shell(cluster, &["--retries", "1", "--retry-initial", "100ms"], "echo again; exit 5").code(5);
    assert_eq!(retried.out, "again\nagain\n", "both attempts are streamed: {retried:?}");
}

fn limits(cluster: &Cluster) {
    shell(cluster, &["--time-limit", "500ms"], "exec sleep 60").code(143).says(&["TIMED_OUT", "time limit"]);
    let polite = "trap 'exit 0' TERM; sleep 60 & wait";
    shell(cluster, &["--time-limit", "500ms"], polite).code(124).says(&["TIMED_OUT"]);
}

fn jobs_that_cannot_be_launched(cluster: &Cluster) {
    cluster.ares(&["run", "--", "/no/such/program"]).code(1).says(&["FAILED", "/no/such/program", "not found"]);
    cluster.ares(&["run", "-D", "/no/such/directory", "--", "true"]).code(1).says(&["/no/such/directory"]);
}

fn waiting(cluster: &Cluster) {
    let (good, bad, other) = (cluster.submit(&[], "true"), cluster.submit(&["--retries", "0"], "exit 3"), "exit 4");
    let other = cluster.submit(&["--retries", "0"], other);
    cluster.ares(&["wait", &good]).ok();
    cluster.ares(&["wait", &good, &bad, &other]).code(3).says(&["SUCCEEDED", "exit code 3", "exit code 4"]);
    let long = cluster.submit(&[], "exec sleep 60");
    let late = format!("not ended within 300 ms: job {long}. ares queue says where");
    cluster.ares(&["wait", &long, "--patience", "300ms"]).refused(7, &[&late]);
    cluster.until_state(&long, "RUNNING");
    cluster.ares(&["cancel", &long]).ok();
    cluster.ares(&["wait", &long]).code(143).says(&["CANCELLED"]);
    let never = cluster.submit(&["--gpus", "64"], "true");
    cluster.ares(&["cancel", &never]).ok();
    cluster.ares(&["wait", &never]).code(130).says(&["CANCELLED"]);
}

fn interrupted_run(cluster: &Cluster) {
    for (signal, code) in [(Signal::INT, 130), (Signal::TERM, 143)] {
        let running = Running::start(cluster.command(&["run", "--name", "long", "--", "sleep", "7321"]));
        let mut job = String::new();
        cluster.until("it runs", |cluster| {
            let queue = cluster.json(&["queue"]);
            let found =
                queue.as_array().into_iter().flatten().find(|job| job["name"] == "long" && job["state"] == "RUNNING");
            job = found.map(|job| job["id"].to_string()).unwrap_or_default();
            !job.is_empty()
        });
        running.signal(signal);
        running.ended().code(code).says(&[&format!("cancelling job {job}")]);
        let shown = cluster.json(&["show", &job]);
        assert_eq!(shown["state"], "CANCELLED", "it ended before the command did: {shown}");
    }
    assert_eq!(processes("sleep 7321").len(), 0);
}

fn locked_commands(cluster: &Cluster) {
    cluster.ares(&["lock", "run", "code", "--", "sh", "-c", "exit 4"]).code(4).says(&["held with token"]);
    cluster.ares(&["lock", "run", "code", "--", "sh", "-c", "kill -9 $$"]).code(137);
    let held = Running::start(cluster.command(&["lock", "run", "code", "--", "sleep", "7322"]));
    cluster.until("it runs", |_| processes("sleep 7322").len() == 2);
    held.signal(Signal::TERM);
    held.ended().code(143);
    cluster.ares(&["lock", "run", "code", "--wait", "2s", "--", "true"]).ok();
}

fn closed_pipe(cluster: &Cluster) {
    for _ in 0..40 {
        cluster.submit(&["--gpus", "64"], "true");
    }
    for args in [&["queue"] as &[&str], &["-o", "jsonl", "queue"], &["get", "/", "--prefix"], &["-o", "json", "queue"]]
    {
        let mut child = cluster.command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("starts");
        drop(child.stdout.take());
        let output = child.wait_with_output().expect("it ends");
        assert!(output.stderr.is_empty(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        assert!(output.status.code().is_some_and(|code| code == 0), "{args:?}: {:?}", output.status);
    }
}

/// `run` outlasts an agent that goes away and comes back, and loses none of the output.
fn silent_agent(cluster: &mut Cluster) {
    let script = "echo first; sleep 4; echo last; exit 9";
    let mut command = cluster.command(&["run", "--gpus", "1", "--", "sh", "-c", script]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("starts");
    let mut out = BufReader::new(child.stdout.take().expect("piped"));
    let mut first = String::new();
    out.read_line(&mut first).expect("a line");
    assert_eq!(first, "first\n");
    cluster.kill_agent("gpus");
    std::thread::sleep(Duration::from_secs(2));
    cluster.agent("gpus", &["--gpus", "sim:dgx1-v100"]);
    let rest: Vec<String> = out.lines().map(|line| line.expect("text")).collect();
    let ended = child.wait_with_output().expect("it ends");
    let err = String::from_utf8_lossy(&ended.stderr);
    assert_eq!((rest, ended.status.code()), (vec!["last".to_owned()], Some(9)), "{err}");
    assert!(err.contains("The agent of gpus does not answer; its output follows when it is back."), "{err}");
}

/// One replica, one agent, one job; nothing of it stays.
#[test]
fn dev_runs_one_job_and_leaves_nothing() {
    dev(&["--", "true"]).ok();
    dev(&["--", "false"]).code(1).says(&["FAILED"]);
    dev(&["--", "sh", "-c", "kill -9 $$"]).code(137);
    dev(&["--gpus", "sim:nothing", "--", "true"]).refused_by_agent();
    dev(&["run"]).misused(&["goes behind --"]);

    for (signal, code) in [(Signal::INT, 130), (Signal::TERM, 143)] {
        let temporary = tempfile::tempdir().expect("a directory");
        let running = Running::start(dev_in(temporary.path(), &["--", "sleep", "7323"]));
        until("the job runs", || processes("sleep 7323").len() >= 2);
        running.signal(signal);
        running.ended().code(code);
        assert_eq!(processes("sleep 7323").len(), 0, "the job ended with it");
        assert_eq!(std::fs::read_dir(temporary.path()).expect("there").count(), 0, "and its directory");
    }
}

/// Without a command it stays; what others submitted ends with it.
#[test]
fn dev_that_stays_ends_its_jobs() {
    let temporary = tempfile::tempdir().expect("a directory");
    let mut command = dev_in(temporary.path(), &["--gpus", "sim:hgx-h100"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("starts");
    let mut out = BufReader::new(child.stdout.take().expect("piped"));
    let (mut greeting, mut source) = (String::new(), String::new());
    out.read_line(&mut greeting).expect("a line");
    out.read_line(&mut source).expect("a line");
    assert!(greeting.contains("with 8 GPU(s)"), "{greeting}");
    let script = format!("{source}\n\"$0\" submit --gpus 2 -- sleep 7324");
    let submitted = Command::new("sh").args(["-c", &script, env!("CARGO_BIN_EXE_ares")]).output().expect("sh starts");
    assert_eq!(submitted.stdout, b"1\n", "{submitted:?}");
    until("the job runs", || !processes("sleep 7324").is_empty());
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), Signal::INT).expect("it runs");
    assert!(child.wait().expect("it ends").success());
    assert_eq!(processes("sleep 7324").len(), 0, "the job ended with it");
    assert_eq!(std::fs::read_dir(temporary.path()).expect("there").count(), 0, "and its directory");
}

fn dev_in(temporary: &std::path::Path, args: &[&str]) -> Command {
    let mut command = ares(&[&["dev"], args].concat());
    command.env("TMPDIR", temporary);
    command
}

fn dev(args: &[&str]) -> Ran {
    run(ares(&[&["dev"], args].concat()))
}

impl Ran {
    /// As root, a line about it comes first.
    fn refused_by_agent(self) {
        self.code(2).says(&["known: hgx-h100"]);
    }
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + cluster::SOON;
    while !holds() {
        assert!(Instant::now() < deadline, "not within {:?}: {what}", cluster::SOON);
        std::thread::sleep(Duration::from_millis(20));
    }
}
