//! Whose rights jobs have on this machine, and what holds their processes together: found out once, at start.

use std::ffi::{CString, OsString};
use std::process::{Command, Stdio};

use nix::unistd::{Uid, geteuid, getgrouplist};

use super::identity::{Identity, hex};
use super::{Error, Options};
use crate::shim::PROBE;
use crate::shim::contain::own_cgroup;
use crate::shim::record::{Containment, User};

/// The user of the jobs (`None` = the agent's own), and why none may start (`None` = they may).
pub fn of_jobs(options: &Options) -> Result<(Option<User>, Option<String>), Error> {
    let root = geteuid().is_root();
    let user = match &options.run_as {
        None => None,
        Some(name) => {
            let user = find(name)?;
            if !root && Uid::from_raw(user.uid) != geteuid() {
                return Err(Error::Rights(format!(
                    "--run-as {name}: only an agent that is root can take another user's rights"
                )));
            }
            root.then_some(user)
        }
    };
    let uid = user.as_ref().map_or(geteuid().as_raw(), |user| user.uid);
    let refusal = (uid == 0 && !options.allow_root_jobs).then(|| {
        "jobs would run as root on this machine: start its agent with --run-as USER, or with --allow-root-jobs"
            .to_owned()
    });
    Ok((user, refusal))
}

fn find(name: &str) -> Result<User, Error> {
    let found =
        nix::unistd::User::from_name(name).map_err(|error| Error::Rights(format!("--run-as {name}: {error}")))?;
    let user = found.ok_or_else(|| Error::Rights(format!("--run-as {name}: no such user on this machine")))?;
    let c_name = CString::new(name).map_err(|_| Error::Rights(format!("--run-as {name:?}: holds a NUL character")))?;
    let groups = getgrouplist(&c_name, user.gid).map_err(|error| Error::Rights(format!("--run-as {name}: {error}")))?;
    Ok(User {
        name: user.name,
        uid: user.uid.as_raw(),
        gid: user.gid.as_raw(),
        groups: groups.into_iter().map(nix::unistd::Gid::as_raw).collect(),
        home: user.dir,
        shell: user.shell,
    })
}

/// The strongest containment that works here, tried by the shim itself.
pub fn containment(options: &Options, identity: &Identity) -> Containment {
    if let Some(chosen) = &options.containment {
        return chosen.clone();
    }
    let user_namespace = !geteuid().is_root();
    if probe(&options.shim, if user_namespace { "userns" } else { "pidns" }) {
        return Containment::PidNamespace { user_namespace };
    }
    match own_cgroup() {
        Some(base) => Containment::Cgroup(base.join(format!("ares-{}", hex(&identity.machine)))),
        None => Containment::Weak,
    }
}

fn probe(shim: &[OsString], kind: &str) -> bool {
    let mut command = Command::new(&shim[0]);
    command.args(&shim[1..]).args([PROBE, kind]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}
