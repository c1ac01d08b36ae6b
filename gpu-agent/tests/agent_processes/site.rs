//! A machine of a test: a directory, an agent in a process of its own, and what runs under it.

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use gpu_agent::Options;
use gpu_agent::shim::record::{Containment, Pid};
use proto::v1::{ReadLogRequest, agent_logs_client::AgentLogsClient};

/// The test binary is its own agent and shim.
pub const AGENT: &str = "agent";
pub const SHIM: &str = "shim";

pub struct Site {
    pub name: String,
    pub dir: tempfile::TempDir,
    agent: Option<Child>,
    extra: Vec<String>,
}

impl Site {
    pub fn new(name: &str) -> Self {
        Self::with(name, &["root"])
    }

    /// More words for the agent: `root` (allow root jobs), `weak`, `as=USER`, `dying=WORD`.
    pub fn with(name: &str, extra: &[&str]) -> Self {
        let extra = extra.iter().map(|word| (*word).to_owned()).collect();
        Self { name: name.to_owned(), dir: tempfile::tempdir().unwrap(), agent: None, extra }
    }

    pub fn start(&mut self, leader: &str) {
        let mut command = Command::new("/proc/self/exe");
        command.args([AGENT, leader, &self.name]).arg(self.dir.path()).args(&self.extra);
        command.stdin(Stdio::null());
        if let Some(file) = self.extra.iter().find_map(|word| word.strip_prefix("leap=")) {
            command.env(gpu_agent::clock::LEAP_FILE, file);
        }
        self.agent = Some(command.spawn().unwrap());
    }

    pub fn agent_pid(&self) -> i32 {
        self.agent.as_ref().unwrap().id() as i32
    }

    pub fn kill_agent(&mut self) {
        let mut agent = self.agent.take().unwrap();
        agent.kill().unwrap();
        agent.wait().unwrap();
    }

    /// Its exit code, once it left by itself.
    pub fn left(&mut self) -> Option<i32> {
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(20) {
            if let Some(status) = self.agent.as_mut().unwrap().try_wait().unwrap() {
                self.agent = None;
                return status.code();
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("the agent did not leave");
    }

    pub fn rank_dir(&self, token: u64, rank: u32) -> PathBuf {
        self.dir.path().join(format!("attempts/{token}/{rank}"))
    }

    pub fn shim(&self, token: u64, rank: u32) -> Pid {
        Pid::read(&self.rank_dir(token, rank)).unwrap()
    }

    pub fn log(&self, token: u64, rank: u32) -> String {
        std::fs::read_to_string(self.rank_dir(token, rank).join("log")).unwrap_or_default()
    }

    pub async fn until_log(&self, token: u64, rank: u32, wanted: impl Fn(&str) -> bool) -> String {
        let began = Instant::now();
        loop {
            let log = self.log(token, rank);
            if wanted(&log) {
                return log;
            }
            assert!(began.elapsed() < Duration::from_secs(20), "the log never said it: {log:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if let Some(agent) = &mut self.agent {
            signal(agent.id() as i32, "CONT");
            let _ = agent.kill();
            let _ = agent.wait();
        }
        // Shims outlive their agent; a test's end is theirs.
        for entry in std::fs::read_dir(self.dir.path().join("attempts")).into_iter().flatten().flatten() {
            for rank in std::fs::read_dir(entry.path()).into_iter().flatten().flatten() {
                if let Some(pid) = Pid::read(&rank.path()).ok().filter(Pid::is_alive) {
                    signal(pid.number, "KILL");
                }
            }
        }
    }
}

/// By name, as kill(1) takes it.
pub fn signal(pid: i32, name: &str) {
    Command::new("kill").args(["-s", name, &pid.to_string()]).stderr(Stdio::null()).status().unwrap();
}

pub fn is_alive(pid: i32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit(')').next().unwrap_or("").trim_start().starts_with(['Z', 'X']))
}

/// A time to sleep that no other process of this machine sleeps.
pub fn word(token: u64) -> String {
    format!("3600.{}{token}", std::process::id())
}

/// Processes of this machine with this word among their arguments.
pub fn with_argument(word: &str) -> Vec<i32> {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let has = |pid: &i32| {
        std::fs::read(format!("/proc/{pid}/cmdline"))
            .is_ok_and(|line| line.split(|byte| *byte == 0).any(|arg| arg == word.as_bytes()))
    };
    pids.filter(has).filter(|pid| is_alive(*pid)).collect()
}

pub async fn until(what: &str, is: impl Fn() -> bool) {
    let began = Instant::now();
    while !is() {
        assert!(began.elapsed() < Duration::from_secs(20), "waited in vain: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// What the log service says of a rank, from the beginning until its end.
pub async fn follow(address: &str, token: u64, rank: u32) -> String {
    read_log(address, token, rank, true).await
}

/// The same, or what there is of it now.
pub async fn read_log(address: &str, token: u64, rank: u32, follow: bool) -> String {
    let mut logs = AgentLogsClient::connect(format!("http://{address}")).await.unwrap();
    let request = ReadLogRequest { token, rank, follow, ..Default::default() };
    let mut stream = logs.read_log(request).await.unwrap().into_inner();
    let mut text = Vec::new();
    while let Some(chunk) = stream.message().await.unwrap() {
        assert_eq!(chunk.offset, text.len() as u64);
        text.extend(&chunk.data);
        if chunk.end {
            return String::from_utf8(text).unwrap();
        }
    }
    if !follow {
        return String::from_utf8(text).unwrap();
    }
    panic!("the log ended without its last chunk");
}

/// A shim that starts a process of its attempt and dies at once, with nothing on record.
fn dying_shim(word: &str) -> Vec<OsString> {
    let script = format!(
        "export ARES_ATTEMPT_DIR=\"$(dirname \"$1\")\"; setsid sleep {word} & \
         until grep -q sleep /proc/$!/comm; do :; done; echo began > \"$1/began\""
    );
    ["sh", "-c", &script, "sh"].map(OsString::from).to_vec()
}

/// The agent process: `agent LEADER NAME DIR WORDS`.
pub fn agent_main(args: &[String]) -> i32 {
    let mut options = Options::new(vec![args[0].clone()], Path::new(&args[2]).to_owned());
    options.name = Some(args[1].clone());
    options.shim = vec!["/proc/self/exe".into(), SHIM.into()];
    for word in &args[3..] {
        match word.as_str() {
            "root" => options.allow_root_jobs = true,
            "weak" => options.containment = Some(Containment::Weak),
            "cgroup" => {
                options.containment = gpu_agent::shim::contain::own_cgroup()
                    .map(|base| Containment::Cgroup(base.join(format!("ares-test-{}", std::process::id()))));
            }
            "keep2" => options.keep_attempts = 2,
            word => match word.split_once('=') {
                Some(("as", user)) => options.run_as = Some(user.to_owned()),
                // Taken from the environment.
                Some(("leap", _)) => {}
                Some(("dying", word)) => options.shim = dying_shim(word),
                Some(("gpus", gpus)) => options.gpus = Some(gpus.to_owned()),
                _ => panic!("{word}?"),
            },
        }
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let left = runtime.block_on(async {
        let mut term = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).unwrap();
        gpu_agent::run(options, async move {
            term.recv().await;
        })
        .await
    });
    let _ = writeln!(std::io::stderr(), "agent left: {left:?}");
    match left {
        Ok(_) => 0,
        Err(_) => 1,
    }
}
