//! The scripts of a cluster on one machine that break links and replace programs, tried by the commands that a person would give.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use jepsen_style_tests::process::ares;

struct Scripts {
    dir: tempfile::TempDir,
}

impl Scripts {
    /// A cluster of three.
    fn up() -> Self {
        let scripts = Self { dir: tempfile::Builder::new().prefix("ares scripts ").tempdir().expect("a directory") };
        scripts.done("up", &[]);
        scripts
    }

    fn run(&self, script: &str, args: &[&str]) -> Output {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../cluster-scripts").join(script);
        let mut command = Command::new(path);
        command.args(args).env("ARES_DIR", self.place()).env("ARES_BIN", ares());
        command.output().expect("the script starts")
    }

    fn place(&self) -> PathBuf {
        self.dir.path().join("cluster")
    }

    /// What a script that succeeds prints.
    fn done(&self, script: &str, args: &[&str]) -> String {
        let output = self.run(script, args);
        assert!(output.status.success(), "{script} {args:?}: {output:?}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// What a script that fails says.
    fn refused(&self, script: &str, args: &[&str]) -> String {
        let output = self.run(script, args);
        assert!(!output.status.success(), "{script} {args:?}: {output:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    /// A command of the command line in the cluster's environment.
    fn ares(&self, line: &str) -> (bool, String) {
        let script = format!("source '{}/env' && ares {line}", self.place().display());
        let output = Command::new("bash").args(["-c", &script]).output().expect("bash starts");
        (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Terms and addresses of the replicas that say they lead, the newest last.
    fn leaders(&self) -> Vec<(u64, String)> {
        let (_, text) = self.ares("cluster status -o json");
        let all: Vec<serde_json::Value> = serde_json::from_str(&text).unwrap_or_default();
        let leads = all.iter().filter(|one| one["role"] == "LEADER");
        let mut leaders: Vec<_> =
            leads.map(|one| (one["term"].as_u64().unwrap_or(0), one["address"].to_string())).collect();
        leaders.sort();
        leaders
    }

    fn until(&self, what: &str, holds: impl Fn(&Self) -> bool) {
        for _ in 0..200 {
            if holds(self) {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(200));
        }
        panic!("not in time: {what}; {:?}", self.leaders());
    }
}

impl Drop for Scripts {
    fn drop(&mut self) {
        let output = self.run("down", &["--purge"]);
        if !output.status.success() {
            eprintln!("the cluster is not down: {output:?}");
        }
    }
}

fn links_can_be_cut() -> Result<(), String> {
    if !rustix::process::geteuid().is_root() {
        return Err("links can be cut by root alone".to_owned());
    }
    let asked = Command::new("iptables").args(["-w", "-S", "OUTPUT"]).output().map_err(|error| error.to_string())?;
    if asked.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&asked.stderr).into_owned()) }
}

#[test]
fn a_parted_leader_is_replaced_until_its_links_are_whole() {
    if let Err(why) = links_can_be_cut() {
        eprintln!("SKIPPED: no link was cut, that needs root and iptables: {why}");
        return;
    }
    let scripts = Scripts::up();
    let first = scripts.leaders().pop().expect("one leads");
    let said = scripts.done("partition", &["leader"]);
    assert!(said.contains("which led, and r"), "{said}");
    scripts.until("another leads", |scripts| {
        scripts.leaders().last().is_some_and(|last| last.0 > first.0 && last.1 != first.1)
    });
    assert!(scripts.ares("submit -- true").0, "the others take jobs");
    assert!(scripts.done("partition", &["--heal"]).starts_with("4 broken links"));
    scripts.until("one leads", |scripts| scripts.leaders().len() == 1);

    let said = scripts.done("partition", &["r1", "--from", "r2", "--one-way"]);
    assert_eq!(said, "r1 reaches r2 no more; they reach it.\n");
    assert!(scripts.refused("partition", &["r1", "--from", "r1"]).contains("it is another replica: r2 r3"));
    assert!(scripts.refused("partition", &["r9"]).contains("there is no 'r9'"));
    scripts.done("down", &[]);
    let rules = Command::new("iptables").args(["-w", "-S", "OUTPUT"]).output().expect("it was there");
    assert!(!String::from_utf8_lossy(&rules.stdout).contains("ares:"), "down makes links whole: {rules:?}");
}

#[test]
fn an_upgrade_goes_over_one_by_one_and_a_job_goes_on() {
    let scripts = Scripts::up();
    let (_, servers) = scripts.ares("cluster status -o name");
    let server = servers.lines().next().expect("an address").to_owned();
    let rights = if rustix::process::geteuid().is_root() { &["--allow-root-jobs"][..] } else { &[] };
    scripts.done("join", &[&[&*server, "--name", "m1", "--gpus", "sim:rtx4090x8"], rights].concat());
    let (submitted, job) = scripts.ares("submit -- sleep 25");
    assert!(submitted);
    scripts.until("the job runs", |scripts| scripts.ares(&format!("show {}", job.trim())).1.contains("RUNNING"));
    let wrong = scripts.refused("upgrade", &["/bin/false"]);
    assert!(wrong.contains("does not tell its version"), "{wrong}");

    let said = scripts.done("upgrade", &[ares().to_str().expect("a plain path")]);
    let order: Vec<&str> =
        said.lines().filter_map(|line| line.split_once(" runs ares ").map(|(name, _)| name)).collect();
    assert_eq!(order.len(), 4, "{said}");
    assert_eq!(order[3], "Agent m1", "agents come last: {said}");
    assert!(scripts.ares(&format!("wait {}", job.trim())).0, "it succeeds");
    assert!(scripts.ares(&format!("show {}", job.trim())).1.contains("by attempt 1 "), "in its first attempt");
}
