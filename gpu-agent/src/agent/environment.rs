//! The environment of a rank: a pure function of lease, body and machine. The job's own variables come first, ours win.
//!
//! Names: torchrun's (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, GROUP_RANK, MASTER_ADDR, MASTER_PORT), NODE_RANK for
//! scripts, JAX's coordinator, CUDA's devices by UUID, and ARES_*. No SLURM_*: frameworks change their mode on seeing one.

use std::collections::BTreeMap;

use proto::v1;

use crate::shim::contain::ATTEMPT_DIR;
use crate::shim::record::User;

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Taken over from the agent where the rank has the agent's rights.
const OF_THE_USER: [&str; 5] = ["HOME", "USER", "LOGNAME", "SHELL", "TMPDIR"];
/// Taken over from the agent always.
const OF_THE_MACHINE: [&str; 5] = ["PATH", "LANG", "TZ", "LD_LIBRARY_PATH", "SSL_CERT_FILE"];

/// The newest checkpoint of an earlier attempt, as `ares checkpoint done` named it; without one it is as the job has it.
const RESTORE_FROM: &str = "ARES_RESTORE_FROM";

/// What all ranks of this machine share.
pub struct Machine<'a> {
    pub name: &'a str,
    /// Where other ranks reach rank 0 when it runs here.
    pub host: &'a str,
    pub user: Option<&'a User>,
    /// Where the cluster is reached, for `ares` inside the job.
    pub servers: &'a str,
    pub cluster: &'a str,
    /// The attempt's directory here.
    pub attempt_dir: &'a str,
    /// The agent's own environment.
    pub inherited: &'a dyn Fn(&str) -> Option<String>,
}

/// `port` 0: not known before the barrier opens ([`master`] then comes on top).
pub fn of_rank(
    machine: &Machine,
    lease: &v1::DesiredLease,
    body: &v1::JobBody,
    local: u32,
    port: u32,
) -> Vec<(String, String)> {
    let mut env = inherited(machine);
    env.extend(body.env.iter().map(|(name, value)| (name.clone(), value.clone())));
    // A log is a file, and Python would keep its output back in blocks: nobody could follow it.
    env.entry("PYTHONUNBUFFERED".to_owned()).or_insert_with(|| "1".to_owned());
    // The job may reach the cluster by another way than its agent does.
    for (name, value) in [("ARES_SERVER", machine.servers), ("ARES_CLUSTER", machine.cluster)] {
        if !value.is_empty() {
            env.entry(name.to_owned()).or_insert_with(|| value.to_owned());
        }
    }
    if !lease.restore_from.is_empty() {
        env.insert(RESTORE_FROM.to_owned(), lease.restore_from.clone());
    }
    let rank = lease.first_rank + local;
    let mut ours: Vec<(&str, String)> = vec![
        ("ARES_JOB_ID", lease.job_id.to_string()),
        ("ARES_JOB_NAME", lease.job_name.clone()),
        ("ARES_TASK_INDEX", lease.task_index.to_string()),
        ("ARES_ATTEMPT", lease.attempt.to_string()),
        ("ARES_FENCING_TOKEN", lease.token.to_string()),
        ("ARES_NODE", machine.name.to_owned()),
        (ATTEMPT_DIR, machine.attempt_dir.to_owned()),
        ("ARES_LEASE_TTL_MS", lease.ttl_ms.to_string()),
        ("ARES_LIMIT_MS", lease.limit_ms.to_string()),
        ("ARES_KILL_GRACE_MS", lease.kill_grace_ms.to_string()),
        ("ARES_NODES", lease.nodes.max(1).to_string()),
        ("ARES_GPUS", (lease.world_size.max(1) * lease.gpus_per_rank).to_string()),
        ("RANK", rank.to_string()),
        ("WORLD_SIZE", lease.world_size.max(1).to_string()),
        ("LOCAL_RANK", local.to_string()),
        ("LOCAL_WORLD_SIZE", lease.ranks.to_string()),
        ("NODE_RANK", lease.node_rank.to_string()),
        ("GROUP_RANK", lease.node_rank.to_string()),
        ("CUDA_VISIBLE_DEVICES", visible(lease, body, local).join(",")),
        ("CUDA_DEVICE_ORDER", "PCI_BUS_ID".to_owned()),
    ];
    if lease.array_job_id != 0 {
        ours.push(("ARES_ARRAY_JOB_ID", lease.array_job_id.to_string()));
    }
    if port != 0 {
        let addr = if lease.master_addr.is_empty() { machine.host } else { &lease.master_addr };
        ours.extend(master(addr, port));
    }
    env.extend(ours.into_iter().map(|(name, value)| (name.to_owned(), value)));
    env.into_iter().collect()
}

/// Where rank 0 is reached.
pub fn master(addr: &str, port: u32) -> Vec<(&'static str, String)> {
    vec![
        ("MASTER_ADDR", addr.to_owned()),
        ("MASTER_PORT", port.to_string()),
        ("JAX_COORDINATOR_ADDRESS", format!("{addr}:{port}")),
    ]
}

/// The variable of a job that says what its ranks see, `all` or `rank`; any other value is as if it were absent.
pub const GPU_BIND: &str = "ARES_GPU_BIND";

/// What a rank may open. Launchers of the torchrun kind start one process a GPU, show all of them to each, and scripts
/// take the LOCAL_RANK-th: so ranks with one GPU each see the whole part, in rank order. A rank with more GPUs, or of a
/// job that asks for `rank`, sees its own alone, from device 0 on; so does one with a slice, for CUDA shows a process the
/// first slice and no other.
fn visible(lease: &v1::DesiredLease, body: &v1::JobBody, local: u32) -> Vec<String> {
    let asked = body.env.get(GPU_BIND).map(String::as_str);
    match asked {
        Some("rank") => gpus(lease, local),
        Some("all") => lease.gpu_uuids.clone(),
        _ if lease.gpu_uuids.iter().any(|uuid| uuid.starts_with("MIG-")) => gpus(lease, local),
        _ if lease.gpus_per_rank == 1 => lease.gpu_uuids.clone(),
        _ => gpus(lease, local),
    }
}

/// UUIDs of one local rank, in the lease's order.
pub fn gpus(lease: &v1::DesiredLease, local: u32) -> Vec<String> {
    let each = lease.gpus_per_rank as usize;
    lease.gpu_uuids.iter().skip(local as usize * each).take(each).cloned().collect()
}

fn inherited(machine: &Machine) -> BTreeMap<String, String> {
    let mut env = BTreeMap::from([("PATH".to_owned(), PATH.to_owned())]);
    let take = |env: &mut BTreeMap<String, String>, names: &[&str]| {
        env.extend(names.iter().filter_map(|name| Some(((*name).to_owned(), (machine.inherited)(name)?))));
    };
    take(&mut env, &OF_THE_MACHINE);
    match machine.user {
        None => take(&mut env, &OF_THE_USER),
        Some(user) => {
            env.insert("HOME".into(), user.home.to_string_lossy().into_owned());
            env.insert("SHELL".into(), user.shell.to_string_lossy().into_owned());
            env.insert("USER".into(), user.name.clone());
            env.insert("LOGNAME".into(), user.name.clone());
        }
    }
    env
}

/// What no process can be given: the job's fault.
pub fn fault(body: &v1::JobBody) -> Option<String> {
    if body.argv.first().is_none_or(String::is_empty) {
        return Some("argv: the command is empty".into());
    }
    if let Some(at) = body.argv.iter().position(|arg| arg.contains('\0')) {
        return Some(format!("argv[{at}]: holds a NUL character"));
    }
    if !body.cwd.is_empty() && !body.cwd.starts_with('/') {
        return Some(format!("cwd: {:?} is not an absolute path", body.cwd));
    }
    let bad =
        |(name, value): &(&String, &String)| name.is_empty() || name.contains(['=', '\0']) || value.contains('\0');
    let names = body.env.iter().find(bad);
    names.map(|(name, _)| format!("env: {name:?} is no name for a variable, or its value holds a NUL character"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease() -> v1::DesiredLease {
        v1::DesiredLease {
            token: 77,
            job_id: 5,
            attempt: 2,
            first_rank: 2,
            ranks: 2,
            world_size: 4,
            node_rank: 1,
            nodes: 2,
            gpu_uuids: vec!["GPU-a".into(), "GPU-b".into()],
            gpus_per_rank: 1,
            ..Default::default()
        }
    }

    fn body(env: &[(&str, &str)]) -> v1::JobBody {
        let env = env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        v1::JobBody { argv: vec!["true".into()], env, ..Default::default() }
    }

    fn env(local: u32, job: &[(&str, &str)], user: Option<&User>, port: u32) -> BTreeMap<String, String> {
        let inherited = |name: &str| (name == "HOME" || name == "LANG").then(|| format!("agent's {name}"));
        let machine = Machine {
            name: "n1",
            host: "10.0.0.1",
            user,
            servers: "h:1",
            cluster: "",
            attempt_dir: "/d",
            inherited: &inherited,
        };
        of_rank(&machine, &lease(), &body(job), local, port).into_iter().collect()
    }

    #[test]
    fn a_gang_rank_has_the_names_of_torchrun_and_its_gpu_at_its_local_rank() {
        let env = env(1, &[], None, 29_500);
        for (name, value) in [
            ("RANK", "3"),
            ("WORLD_SIZE", "4"),
            ("LOCAL_RANK", "1"),
            ("LOCAL_WORLD_SIZE", "2"),
            ("GROUP_RANK", "1"),
            ("NODE_RANK", "1"),
            ("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b"),
            ("MASTER_ADDR", "10.0.0.1"),
            ("MASTER_PORT", "29500"),
            ("JAX_COORDINATOR_ADDRESS", "10.0.0.1:29500"),
            ("ARES_FENCING_TOKEN", "77"),
            ("ARES_ATTEMPT", "2"),
            ("ARES_GPUS", "4"),
        ] {
            assert_eq!(env[name], value, "{name}");
        }
        assert!(!env.keys().any(|name| name.starts_with("SLURM")));
        assert_eq!((env["ARES_SERVER"].as_str(), env.get(RESTORE_FROM)), ("h:1", None));
    }

    #[test]
    fn what_a_rank_sees_is_the_part_by_local_rank_or_its_own_gpus() {
        let seen = |lease: &v1::DesiredLease, bind: &str, local| {
            let job: &[(&str, &str)] = &[(GPU_BIND, bind)];
            visible(lease, &body(if bind.is_empty() { &[] } else { job }), local).join(",")
        };
        let one = lease();
        for local in 0..2 {
            let all: Vec<String> = seen(&one, "", local).split(',').map(str::to_owned).collect();
            assert_eq!(all[local as usize], gpus(&one, local)[0], "LOCAL_RANK selects");
        }
        assert_eq!((seen(&one, "rank", 1).as_str(), seen(&one, "all", 1).as_str()), ("GPU-b", "GPU-a,GPU-b"));
        let four = ["GPU-a", "GPU-b", "GPU-c", "GPU-d"].map(str::to_owned).to_vec();
        let two = v1::DesiredLease { gpus_per_rank: 2, gpu_uuids: four, ..lease() };
        assert_eq!(seen(&two, "", 1), "GPU-c,GPU-d");
        assert_eq!(seen(&two, "all", 1), "GPU-a,GPU-b,GPU-c,GPU-d");
        let slices = v1::DesiredLease { gpu_uuids: ["MIG-a", "MIG-b"].map(str::to_owned).to_vec(), ..lease() };
        assert_eq!((seen(&slices, "", 0).as_str(), seen(&slices, "", 1).as_str()), ("MIG-a", "MIG-b"));
    }

    #[test]
    fn the_jobs_variables_are_there_and_ours_win() {
        let env = env(0, &[("LR", "0.1"), ("RANK", "99"), ("PATH", "/job/bin")], None, 0);
        assert_eq!((env["LR"].as_str(), env["RANK"].as_str(), env["PATH"].as_str()), ("0.1", "2", "/job/bin"));
        assert_eq!(env["LANG"], "agent's LANG");
        assert!(!env.contains_key("MASTER_PORT"));
    }

    #[test]
    fn a_job_without_gpus_sees_none() {
        let machine = Machine {
            name: "n",
            host: "h",
            user: None,
            servers: "",
            cluster: "",
            attempt_dir: "/d",
            inherited: &|_| None,
        };
        let lease = v1::DesiredLease { ranks: 1, ..Default::default() };
        let env: BTreeMap<_, _> = of_rank(&machine, &lease, &body(&[]), 0, 1).into_iter().collect();
        assert_eq!(env["CUDA_VISIBLE_DEVICES"], "");
        assert_eq!(env["PATH"], PATH);
        assert_eq!(env["WORLD_SIZE"], "1");
    }

    #[test]
    fn another_user_gets_its_own_home() {
        let user = User {
            name: "ada".into(),
            uid: 7,
            gid: 7,
            groups: vec![],
            home: "/home/ada".into(),
            shell: "/bin/sh".into(),
        };
        let env = env(0, &[], Some(&user), 0);
        assert_eq!((env["HOME"].as_str(), env["USER"].as_str()), ("/home/ada", "ada"));
    }

    #[test]
    fn what_no_process_can_be_given_is_named() {
        assert_eq!(fault(&body(&[("A", "b")])), None);
        assert!(fault(&body(&[("A=B", "c")])).unwrap().contains("A=B"));
        assert!(fault(&body(&[("A", "b\0")])).unwrap().contains("NUL"));
        assert!(fault(&v1::JobBody::default()).unwrap().contains("argv"));
        let relative = v1::JobBody { cwd: "x".into(), ..body(&[]) };
        assert!(fault(&relative).unwrap().contains("absolute"));
    }
}
