//! One process of the cluster: started in a directory, its output in a file, ended by signals. Builds the binary first.

use std::fs::{File, OpenOptions};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::disk;
use crate::network::Network;

/// The `ares` binary: what ARES_BIN names, or built as the sources are now, in the profile and directory of this
/// program. Cargo builds no binary of another package for a test, so the test asks for it.
pub fn ares() -> &'static Path {
    static ARES: LazyLock<PathBuf> = LazyLock::new(|| match std::env::var_os("ARES_BIN") {
        Some(named) => named.into(),
        None => build(),
    });
    &ARES
}

fn build() -> PathBuf {
    let me = std::env::current_exe().expect("a program knows its own path");
    // target/PROFILE/deps/NAME of a test, target/PROFILE/NAME of a program.
    let profile = me.ancestors().skip(1).find(|dir| !dir.ends_with("deps")).expect("it lies in a directory");
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // Both packages, as in `run`: with the features of libraries that the tests were built with.
    cargo
        .args(["build", "--quiet", "--package", "cli", "--package", "jepsen-style-tests", "--bin", "ares"])
        .current_dir(env!("CARGO_MANIFEST_DIR"));
    cargo.arg("--target-dir").arg(profile.parent().expect("a target directory"));
    if profile.ends_with("release") {
        cargo.arg("--release");
    }
    let built = cargo.status().expect("cargo starts");
    assert!(built.success(), "the ares binary could not be built");
    profile.join("ares")
}

/// Where a process runs.
#[derive(Clone, Debug, Default)]
pub struct Place<'a> {
    /// A machine of a network; `None`: this one.
    pub network: Option<(&'a Network, &'a str)>,
    /// Mounted here, and not there: other machines' disks.
    pub hidden: Vec<&'a Path>,
}

/// A running `ares` process; killed when dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `ares` with the arguments; what it prints is appended to `log`.
    pub fn start(place: &Place<'_>, args: &[&str], env: &[(String, String)], log: &Path) -> Self {
        let open = || -> File { OpenOptions::new().create(true).append(true).open(log).expect("the log opens") };
        let mut command = Command::new(ares());
        command.args(args).envs(env.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::null()).stdout(open()).stderr(open());
        let spawn = || match place.network {
            Some((network, name)) => network.spawn(name, &mut command),
            None => command.spawn(),
        };
        let child = disk::without(&place.hidden, spawn);
        let child = child.unwrap_or_else(|error| panic!("{}: {error}", ares().display()));
        Self { child, log: log.to_owned() }
    }

    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    pub fn signal(&self, signal: Signal) {
        // A process that is gone already is fine: the caller looks at what follows.
        let _ = kill_process(self.pid(), signal);
    }

    /// SIGKILL, and gone when it returns.
    pub fn kill(mut self) {
        self.signal(Signal::KILL);
        let _ = self.child.wait();
    }

    /// SIGTERM, and its exit code (128 + signal if one ended it) when it ends in time.
    pub fn terminate(mut self, within: Duration) -> Result<i32, String> {
        self.signal(Signal::TERM);
        self.ended(within)
    }

    /// Its exit code once it ends by itself.
    pub fn ended(&mut self, within: Duration) -> Result<i32, String> {
        let deadline = Instant::now() + within;
        loop {
            if let Some(status) = self.child.try_wait().expect("its status can be read") {
                return Ok(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default()));
            }
            if Instant::now() >= deadline {
                return Err(format!("it did not end within {within:?}; its log:\n{}", self.log_text()));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// State letter in /proc: `T` is stopped.
    pub fn state(&self) -> Option<char> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).ok()?;
        stat.rsplit_once(") ")?.1.chars().next()
    }

    pub fn log_text(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs `ares` to its end, at most `within`, and returns what it printed.
pub fn run(args: &[&str], within: Duration) -> Output {
    let mut child = Command::new(ares())
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{}: {error}", ares().display()));
    let deadline = Instant::now() + within;
    // What these commands print fits the pipes.
    while child.try_wait().expect("its status can be read").is_none() {
        if Instant::now() >= deadline {
            let _ = child.kill();
            let output = child.wait_with_output().expect("its output");
            panic!("ares {args:?} did not end within {within:?}: {output:?}");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    child.wait_with_output().expect("its output")
}
