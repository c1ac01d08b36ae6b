//! One process of the cluster: started in a directory, its output in a file, ended by signals.

use std::fs::{File, OpenOptions};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// The `ares` binary that was built beside this test.
pub fn ares() -> PathBuf {
    if let Some(named) = std::env::var_os("ARES_BIN") {
        return named.into();
    }
    let test = std::env::current_exe().expect("a test knows its own path");
    let profile = test.ancestors().find(|dir| dir.join("ares").is_file());
    profile
        .map(|dir| dir.join("ares"))
        .unwrap_or_else(|| panic!("no ares binary beside {}: run `cargo build -p cli` first, or set ARES_BIN", test.display()))
}

/// A running `ares` process; killed when dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `ares` with the arguments; what it prints is appended to `log`.
    pub fn start(args: &[&str], env: &[(&str, &str)], log: &Path) -> Self {
        let open = || -> File { OpenOptions::new().create(true).append(true).open(log).expect("the log opens") };
        let child = Command::new(ares())
            .args(args)
            .envs(env.iter().copied())
            .stdin(Stdio::null())
            .stdout(open())
            .stderr(open())
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}", ares().display()));
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

    /// SIGTERM, and its exit code when it ends in time.
    pub fn terminate(mut self, within: Duration) -> i32 {
        self.signal(Signal::TERM);
        let deadline = Instant::now() + within;
        loop {
            if let Some(status) = self.child.try_wait().expect("its status can be read") {
                return status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default());
            }
            assert!(Instant::now() < deadline, "it did not end within {within:?}; its log:\n{}", self.log_text());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
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
