//! What holds a rank's processes together, so that all of them can be killed: entering it, killing all, and finding out
//! whether it is permitted here.

use std::fs;
use std::io;
use std::path::Path;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::{Pid, getegid, geteuid};

use super::record::Containment;

/// Before the fork of the process that will watch: its child is init of the new namespace.
pub fn separate(containment: &Containment) -> io::Result<()> {
    match containment {
        Containment::PidNamespace { user_namespace } => {
            let (uid, gid) = (geteuid(), getegid());
            let mut flags = CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWNS;
            if *user_namespace {
                flags |= CloneFlags::CLONE_NEWUSER;
            }
            unshare(flags)?;
            if *user_namespace {
                fs::write("/proc/self/setgroups", "deny")?;
                fs::write("/proc/self/uid_map", format!("{uid} {uid} 1"))?;
                fs::write("/proc/self/gid_map", format!("{gid} {gid} 1"))?;
            }
            Ok(())
        }
        Containment::Cgroup(path) => fs::create_dir(path).or_else(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => Ok(()),
            _ => Err(error),
        }),
        Containment::Weak => Ok(()),
    }
}

/// In the process that watches, before the rank starts: orphaned descendants come to it, and /proc shows its namespace.
pub fn settle(containment: &Containment) -> io::Result<()> {
    match containment {
        Containment::PidNamespace { .. } => {
            let none: Option<&str> = None;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none)?;
            let plain = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
            mount(Some("proc"), "/proc", Some("proc"), plain, none)?;
        }
        Containment::Cgroup(_) | Containment::Weak => prctl::set_child_subreaper(true)?,
    }
    Ok(())
}

/// SIGKILL to every process of the rank that can be found; the caller repeats it until it has no child left.
pub fn kill_all(containment: &Containment, group: Option<Pid>) {
    let me = Pid::this();
    if matches!(containment, Containment::PidNamespace { .. }) && me.as_raw() == 1 {
        // Init of the namespace: -1 is everything else in it, and nothing outside.
        let _ = kill(Pid::from_raw(-1), Signal::SIGKILL);
        return;
    }
    if let Containment::Cgroup(path) = containment {
        let _ = fs::write(path.join("cgroup.kill"), "1");
    }
    if let Some(group) = group {
        let _ = killpg(group, Signal::SIGKILL);
    }
    for pid in descendants(me.as_raw()) {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
}

/// After the last process is gone.
pub fn dissolve(containment: &Containment) {
    if let Containment::Cgroup(path) = containment {
        let _ = fs::remove_dir(path);
    }
}

fn descendants(of: i32) -> Vec<i32> {
    let parents: Vec<(i32, i32)> = processes().filter_map(|pid| Some((pid, parent(pid)?))).collect();
    let mut found = vec![of];
    let mut at = 0;
    while at < found.len() {
        let above = found[at];
        found.extend(parents.iter().filter(|(_, parent)| *parent == above).map(|(pid, _)| *pid));
        at += 1;
    }
    found.split_off(1)
}

fn processes() -> impl Iterator<Item = i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

fn parent(pid: i32) -> Option<i32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit(')').next()?.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// Kills what a shim that is gone left behind of the attempt with this directory; true = nothing was found. The kernel
/// has done it in a PID namespace.
pub fn sweep(containment: &Containment, attempt: &Path) -> bool {
    match containment {
        Containment::PidNamespace { .. } => true,
        Containment::Cgroup(path) => match fs::read_to_string(path.join("cgroup.procs")) {
            Ok(procs) if !procs.is_empty() => {
                let _ = fs::write(path.join("cgroup.kill"), "1");
                false
            }
            _ => {
                dissolve(containment);
                true
            }
        },
        Containment::Weak => {
            let left = processes_of(attempt);
            for pid in &left {
                let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
            }
            left.is_empty()
        }
    }
}

/// The variable that names an attempt's directory: unlike a token, it is unique among all agents of a machine.
pub const ATTEMPT_DIR: &str = "ARES_ATTEMPT_DIR";

/// Processes of this machine whose environment names the attempt: what a killed shim without a namespace left behind. A
/// job that clears its environment is not found; such a node says `weak`.
fn processes_of(attempt: &Path) -> Vec<i32> {
    let wanted = format!("{ATTEMPT_DIR}={}", attempt.display());
    let names_it = |pid: &i32| {
        fs::read(format!("/proc/{pid}/environ"))
            .is_ok_and(|environ| environ.split(|byte| *byte == 0).any(|entry| entry == wanted.as_bytes()))
    };
    processes().filter(names_it).collect()
}

/// The control group of this process in the v2 hierarchy, where it may make groups in it.
pub fn own_cgroup() -> Option<std::path::PathBuf> {
    let text = fs::read_to_string("/proc/self/cgroup").ok()?;
    let inside = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let roots = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];
    let base = roots.iter().map(Path::new).find(|root| root.join("cgroup.procs").exists())?.join(inside);
    let probe = base.join(format!("ares-probe-{}", std::process::id()));
    fs::create_dir(&probe).ok()?;
    let usable = probe.join("cgroup.kill").exists();
    fs::remove_dir(&probe).ok()?;
    usable.then_some(base)
}
