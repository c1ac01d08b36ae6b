//! A small cluster of real processes for the tests of the command line, in a directory with a space in its name. All of
//! it ends with the value, shims included. What a command printed comes back as [`Ran`].
#![allow(dead_code, reason = "each test program uses its own part")]

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

/// How long anything may take on a busy machine.
pub const SOON: Duration = Duration::from_secs(40);
/// Whose jobs these are.
pub const USER: &str = "tester";

/// The binary, with no setting from outside.
pub fn ares(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ares"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("ARES_") {
            command.env_remove(name);
        }
    }
    for name in ["WORKER_ID", "LOG_LEVEL", "LOGNAME"] {
        command.env_remove(name);
    }
    command.env("USER", USER).args(args).stdin(Stdio::null());
    command
}

pub struct Cluster {
    replicas: Vec<Child>,
    agents: BTreeMap<String, Child>,
    /// `host:port` for clients, of each replica.
    pub servers: Vec<String>,
    pub id: String,
    pub token: String,
    dir: TempDir,
}

impl Cluster {
    /// One replica.
    pub fn start() -> Self {
        let dir = tempfile::Builder::new().prefix("ares cli ").tempdir().expect("a directory");
        let mut cluster = Self {
            replicas: Vec::new(),
            agents: BTreeMap::new(),
            servers: Vec::new(),
            id: String::new(),
            token: String::new(),
            dir,
        };
        cluster.replica(&["--bootstrap"]);
        cluster
    }

    /// One replica, a machine `gpus` of 8 simulated V100 and a machine `cores` without GPUs.
    pub fn with_machines() -> Self {
        let mut cluster = Self::start();
        cluster.agent("gpus", &["--gpus", "sim:dgx1-v100"]);
        cluster.agent("cores", &[]);
        cluster.until("both machines are ready", |cluster| {
            let nodes = cluster.json(&["nodes"]);
            nodes.as_array().is_some_and(|nodes| nodes.iter().filter(|node| node["state"] == "READY").count() == 2)
        });
        cluster
    }

    /// A further replica, a voter when this returns.
    pub fn join(&mut self) {
        let (server, token) = (self.servers[0].clone(), self.token.clone());
        self.replica(&["--join", &server, "--join-token", &token]);
        let voters = self.replicas.len();
        self.until("all replicas vote", |cluster| {
            let members = cluster.json(&["cluster", "members"]);
            members.as_array().is_some_and(|all| all.iter().filter(|one| one["voter"] == true).count() == voters)
        });
    }

    fn replica(&mut self, flags: &[&str]) {
        let dir = self.path(&format!("r{}", self.replicas.len()));
        let mut command = ares(&["server", "--listen", "127.0.0.1:0", "--peer-listen", "127.0.0.1:0"]);
        command.arg("--dir").arg(&dir).args(flags);
        self.replicas.push(self.spawn(command, &dir));
        let env = dir.join("env");
        let deadline = Instant::now() + SOON;
        while !env.is_file() {
            assert!(Instant::now() < deadline, "no replica came up: {}", read(&log_of(&dir)));
            std::thread::sleep(Duration::from_millis(10));
        }
        let env = read(&env);
        let value = |name: &str| {
            let line = env.lines().find_map(|line| line.strip_prefix(&format!("export {name}=")));
            line.unwrap_or_else(|| panic!("{name} is in {env:?}")).to_owned()
        };
        self.servers.push(value("ARES_SERVER"));
        self.id = value("ARES_CLUSTER");
        self.token = value("ARES_JOIN_TOKEN");
    }

    pub fn agent(&mut self, name: &str, flags: &[&str]) {
        let dir = self.path(name);
        let mut command = ares(&["agent", "--name", name, "--allow-root-jobs", "--join-token", &self.token]);
        command.arg("--server").arg(self.servers.join(",")).arg("--dir").arg(&dir).args(flags);
        let child = self.spawn(command, &dir);
        self.agents.insert(name.to_owned(), child);
    }

    fn spawn(&self, mut command: Command, dir: &Path) -> Child {
        let log = File::options().create(true).append(true).open(log_of(dir)).expect("a log");
        command.stdout(log.try_clone().expect("the log")).stderr(log);
        command.spawn().expect("ares starts")
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn kill_replica(&mut self, at: usize) {
        end(&mut self.replicas[at]);
    }

    pub fn kill_agent(&mut self, name: &str) {
        end(self.agents.get_mut(name).expect("it was started"));
    }

    // ------------------------------------------------------------------------------------------------------ commands

    /// A command against this cluster.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = ares(args);
        command.env("ARES_SERVER", self.servers.join(",")).current_dir(self.dir.path());
        command
    }

    pub fn ares(&self, args: &[&str]) -> Ran {
        run(self.command(args))
    }

    /// What the command prints with `-o json`.
    pub fn json(&self, args: &[&str]) -> Value {
        self.ares(&[&["-o", "json"], args].concat()).json()
    }

    /// Submits a shell command with these options; its id.
    pub fn submit(&self, options: &[&str], script: &str) -> String {
        let ran = self.ares(&[&["submit"], options, &["--", "sh", "-c", script]].concat()).ok();
        let id = ran.out.trim_end().to_owned();
        assert!(id.parse::<u64>().is_ok() && ran.err.is_empty(), "the id alone on stdout: {ran:?}");
        id
    }

    pub fn until(&self, what: &str, mut holds: impl FnMut(&Self) -> bool) {
        let deadline = Instant::now() + SOON;
        while !holds(self) {
            assert!(Instant::now() < deadline, "not within {SOON:?}: {what}");
            std::thread::sleep(Duration::from_millis(30));
        }
    }

    pub fn until_state(&self, job: &str, state: &str) {
        self.until(&format!("job {job} is {state}"), |cluster| cluster.json(&["show", job])["state"] == state);
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.agents.values_mut().for_each(end);
        self.replicas.iter_mut().for_each(end);
        // Shims outlive their agents by design.
        for pid in processes(&self.dir.path().display().to_string()) {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

fn end(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}

/// Live processes, but zombies, with this text in their arguments.
pub fn processes(text: &str) -> Vec<Pid> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").expect("/proc is there").flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw) else {
            continue;
        };
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if String::from_utf8_lossy(&line).replace('\0', " ").contains(text) {
            found.push(pid);
        }
    }
    found
}

fn log_of(dir: &Path) -> PathBuf {
    dir.with_extension("log")
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

// ------------------------------------------------------------------------------------------------------------ results

/// A command that has ended.
#[derive(Debug)]
pub struct Ran {
    args: Vec<String>,
    /// 128 + signal when one ended it.
    pub code: i32,
    pub out: String,
    pub err: String,
}

pub fn run(command: Command) -> Ran {
    Running::start(command).ended()
}

/// A command that runs.
pub struct Running {
    args: Vec<String>,
    child: Child,
    readers: Vec<std::thread::JoinHandle<String>>,
}

impl Running {
    pub fn start(mut command: Command) -> Self {
        let args = command.get_args().map(|arg| arg.to_string_lossy().into_owned()).collect();
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("ares starts");
        let readers = vec![drain(child.stdout.take().expect("piped")), drain(child.stderr.take().expect("piped"))];
        Self { args, child, readers }
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("it runs");
    }

    pub fn ended(mut self) -> Ran {
        let status = wait(&mut self.child, &self.args);
        let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default());
        let mut texts = self.readers.into_iter().map(|reader| reader.join().expect("it was read"));
        let (out, err) = (texts.next().expect("stdout"), texts.next().expect("stderr"));
        Ran { args: self.args, code, out, err }
    }
}

fn wait(child: &mut Child, args: &[String]) -> ExitStatus {
    let deadline = Instant::now() + SOON;
    loop {
        if let Some(status) = child.try_wait().expect("its status") {
            return status;
        }
        if Instant::now() >= deadline {
            end(child);
            panic!("ares {args:?} did not end within {SOON:?}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn drain(mut from: impl Read + Send + 'static) -> std::thread::JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = from.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

impl Ran {
    pub fn ok(self) -> Self {
        assert_eq!(self.code, 0, "{self:#?}");
        self
    }

    pub fn code(self, code: i32) -> Self {
        assert_eq!(self.code, code, "{self:#?}");
        self
    }

    pub fn json(self) -> Value {
        let ran = self.ok();
        serde_json::from_str(&ran.out).unwrap_or_else(|error| panic!("{error}: {ran:#?}"))
    }

    /// Stdout holds each of these.
    pub fn shows(self, wanted: &[&str]) -> Self {
        wanted.iter().for_each(|text| assert!(self.out.contains(text), "no {text:?} in {self:#?}"));
        self
    }

    /// Stderr holds each of these.
    pub fn says(self, wanted: &[&str]) -> Self {
        wanted.iter().for_each(|text| assert!(self.err.contains(text), "no {text:?} in {self:#?}"));
        self
    }

    /// A refusal: this code, nothing on stdout, and one paragraph with these words that begins with the program's name.
    pub fn refused(self, code: i32, wanted: &[&str]) {
        let ran = self.code(code).says(wanted);
        // The log of a server or agent is JSON; the paragraph is not.
        let paragraph: Vec<&str> = ran.err.lines().filter(|line| !line.starts_with('{')).collect();
        assert!(ran.out.is_empty() && paragraph.len() == 1 && paragraph[0].starts_with("ares: "), "{ran:#?}");
        assert!(paragraph[0].ends_with('.') && !paragraph[0].ends_with(".."), "{ran:#?}");
    }

    /// A command line that is wrong in itself: code 2, and these words.
    pub fn misused(self, wanted: &[&str]) {
        let ran = self.code(2).says(wanted);
        assert!(ran.out.is_empty(), "{ran:#?}");
    }
}
