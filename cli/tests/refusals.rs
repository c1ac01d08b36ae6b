//! What can go wrong, as a person meets it: the exit code, and one paragraph that says what to do.

mod cluster;

use cluster::{Cluster, ares, run};

#[test]
fn every_refusal_says_what_to_do() {
    let cluster = Cluster::with_machines();
    unreachable(&cluster);
    wrong_addresses_and_clusters(&cluster);
    unknown_names(&cluster);
    bad_values(&cluster);
    fields_that_the_cluster_refuses(&cluster);
    too_large_a_request(&cluster);
    used_request_ids(&cluster);
    ended_and_foreign_jobs(&cluster);
    revisions(&cluster);
    locks(&cluster);
    members(&cluster);
    joins(&cluster);
    directories(&cluster);
}

fn unreachable(cluster: &Cluster) {
    let what = ["no replica answered", "Connection refused", "ARES_SERVER"];
    for command in [&["queue"] as &[&str], &["submit", "--", "true"], &["show", "1"]] {
        cluster.ares(&[&["-s", "127.0.0.1:1", "--timeout", "1"], command].concat()).refused(6, &what);
    }
    let nowhere = ["-s", "no-such-host.invalid:7401", "--timeout", "1", "submit", "--", "true"];
    cluster.ares(&nowhere).refused(6, &["no-such-host.invalid:7401", "ARES_SERVER"]);
    cluster.ares(&["-s", "127.0.0.1:1", "cluster", "status"]).code(6).shows(&["DOWN"]).says(&["no replica answered"]);
}

fn wrong_addresses_and_clusters(cluster: &Cluster) {
    for address in ["nonsense", "127.0.0.1", "http://127.0.0.1:7401", "a b:1", "127.0.0.1:99999"] {
        cluster.ares(&["-s", address, "queue"]).refused(2, &[address, "is no address. Write host:port"]);
    }
    let other = "0".repeat(32);
    cluster
        .ares(&["--cluster-id", &other, "queue"])
        .refused(5, &["CLUSTER_MISMATCH", &other, &cluster.id, "ARES_CLUSTER"]);
    cluster.ares(&["--cluster-id", "zz", "queue"]).refused(2, &["\"zz\" is no cluster id", "32 hex digits"]);
    cluster.ares(&["--cluster-id", &cluster.id, "queue"]).ok();
}

fn unknown_names(cluster: &Cluster) {
    for verb in ["show", "cancel", "wait", "logs"] {
        cluster.ares(&[verb, "999"]).refused(3, &["there is no job 999. ares queue --all lists them."]);
    }
    cluster.ares(&["show", "abc"]).misused(&["'abc'"]);
    cluster.ares(&["topology", "nobody"]).refused(3, &["there is no node \"nobody\". ares nodes lists them."]);
    cluster.ares(&["node", "out", "nobody"]).refused(3, &["\"nobody\"", "NOT_FOUND", "ares nodes"]);
    cluster.ares(&["get", "/nothing"]).refused(3, &["there is no key \"/nothing\"", "--prefix"]);
}

fn bad_values(cluster: &Cluster) {
    let refused = |options: &[&str], wanted: &[&str]| {
        cluster.ares(&[&["submit"], options, &["--", "true"]].concat()).refused(2, wanted);
    };
    refused(&["--time-limit", "soon"], &["--time-limit \"soon\" is no duration", "30m"]);
    refused(&["--time-limit", "0"], &["--time-limit \"0\" is not above zero"]);
    refused(&["--mem", "lots"], &["--mem \"lots\" is no memory size", "16GiB"]);
    refused(&["--min-bandwidth", "fast"], &["--min-bandwidth \"fast\" is no rate", "100GB/s"]);
    refused(&["--env", "NO_SUCH_VARIABLE"], &["NO_SUCH_VARIABLE=VALUE"]);
    refused(&["--env", "=x"], &["--env \"=x\" has no name; write NAME=VALUE"]);
    refused(&["--label", "x"], &["--label \"x\" has no value; write NAME=VALUE"]);
    refused(&["--gpus", "3", "--ranks-per-node", "2"], &["3 GPUs", "evenly by 2 processes", "multiple"]);
    refused(&["--retry-multiplier", "0"], &["--retry-multiplier 0 is not from 1 to 1000"]);
    refused(&["--gpus", "h100:2", "--gpu-type", "a100"], &["both name GPU types", "Leave --gpu-type out"]);
    refused(&["--gpus", "sim:hgx-h100"], &["no number of GPUs", "ares agent --gpus"]);
    refused(&["--request-id", ""], &["--request-id has 0 bytes; 1 to 200"]);

    let misused = |options: &[&str], wanted: &[&str]| {
        cluster.ares(&[&["submit"], options, &["--", "true"]].concat()).misused(wanted);
    };
    misused(&["--retries", "-1"], &["'-1' for '--retries <N>'", "0.."]);
    misused(&["--gpus", "-1"], &["'-1' for '--gpus <N>'", "a number of GPUs is expected"]);
    misused(&["--gpus", "h100:8|a100:16"], &["h100:8 and a100:16 differ", "submit a job for each"]);
    misused(&["--gpus", "8..24"], &["24 is not 8 doubled some times over", "write 8..16 or 8..32"]);
    misused(&["--gpus", "h100:0..8"], &["0..8 begins with no number from 1 up to its second"]);
    misused(&["--gpus", "h100:8|a100"], &["\"a100\" is no TYPE:N", "'h100:8|a100:8'"]);
    misused(&["--gpus", "2", "--nodes", "2"], &["--gpus", "--nodes"]);
    misused(&["--nodes", "0"], &["'0' for '--nodes <N>'", "1.."]);
    misused(&["--timeout", "0"], &["'0' for '--timeout <SECONDS>'", "1.."]);
    cluster.ares(&["submit"]).refused(2, &["no command is given", "-- python3 train.py"]);
    cluster.ares(&["run", "python3", "train.py"]).misused(&["goes behind --"]);
    cluster.ares(&["get", "/", "--prefix", "--limit", "0"]).misused(&["'0' for '--limit <N>'"]);
    cluster.ares(&["watch", "/", "--prefix", "--count", "0"]).misused(&["'0' for '--count <N>'"]);
    cluster.ares(&["node", "out", "cores", "--reason", ""]).misused(&["--reason"]);
    cluster.ares(&["help", "nothing"]).refused(2, &["\"nothing\"", "ares help"]);
}

fn fields_that_the_cluster_refuses(cluster: &Cluster) {
    let refused = |options: &[&str], wanted: &[&str]| {
        cluster.ares(&[&["submit"], options, &["--", "true"]].concat()).refused(2, wanted);
    };
    refused(&["--image", "debian"], &["\"debian\"", "NOT_IMPLEMENTED_YET", "Leave --image out"]);
    refused(&["--retries", "5000"], &["5000 is above the limit of 1000", "Correct --retries."]);
    refused(&["--retry-on", "900"], &["900 is above the limit of 255", "Correct --retry-on."]);
    refused(&["--lease-ttl", "1s"], &["1000", "10000 to 86400000", "Correct --lease-ttl."]);
    refused(&["--kill-grace", "1000s"], &["a quarter of lease_ttl_ms", "--kill-grace"]);
    refused(
        &["--topology", "row:require"],
        &["shape.topology", "\"row:require\"", "block, rack, switch", "Correct --topology."],
    );
    refused(&["--constraint", "rack="], &["shape.constraint", "\"rack=\"", "KEY!=VALUE", "Correct --constraint."]);
    refused(&["--constraint", &["x"; 17].join("&")], &["shape.constraint", "17 terms, the limit is 16"]);
    refused(
        &["--nodelist", "cores", "--nodes", "2"],
        &["shape.nodelist has 1 names, shape.nodes is 2", "Correct --nodes, --nodelist."],
    );
    let absent = ["submit", "--exclude", "elsewhere", "--", "true"];
    cluster.ares(&absent).refused(3, &["shape.exclude names \"elsewhere\", there is no such node", "NOT_FOUND"]);
    refused(&["--gpu-type", "h100"], &["set without GPUs", "Correct --gpu-type."]);
    refused(&["--name", &"x".repeat(300)], &["name has 300 bytes, must have 1 to 128"]);
    // All that is wrong comes at once.
    refused(&["--retries", "5000", "--retry-on", "900"], &["Correct --retries, --retry-on."]);
}

fn too_large_a_request(cluster: &Cluster) {
    let part = "x".repeat(100_000);
    let three = ["submit", "--", "true", &part, &part, &part];
    cluster.ares(&three).refused(2, &["300004 bytes, the limit is 262144"]);
    let ten = [&["submit", "--", "true"] as &[&str], &[part.as_str(); 10]].concat();
    cluster.ares(&ten).refused(2, &["TOO_LARGE", "the limit is", "smaller"]);
}

fn used_request_ids(cluster: &Cluster) {
    let first = cluster.ares(&["submit", "--request-id", "nightly", "--", "true"]).ok();
    let again = cluster.ares(&["submit", "--request-id", "nightly", "--", "true"]).ok().says(&["the same job"]);
    assert_eq!(first.out, again.out);
    let other = ["submit", "--request-id", "nightly", "--", "false"];
    cluster.ares(&other).refused(2, &["REQUEST_MISMATCH", "new request id"]);
}

fn ended_and_foreign_jobs(cluster: &Cluster) {
    let job = cluster.submit(&[], "true");
    cluster.ares(&["wait", &job]).ok();
    cluster.ares(&["cancel", &job]).refused(5, &["has ended: SUCCEEDED", "ALREADY_ENDED"]);
    let waiting = cluster.submit(&["--gpus", "64"], "true");
    let mut other = cluster.command(&["cancel", &waiting]);
    other.env("USER", "somebody");
    run(other).refused(4, &[cluster::USER, "somebody", "NOT_OWNER"]);
    // One that can't be cancelled doesn't keep the next from it.
    let both = cluster.ares(&["cancel", &job, &waiting]).code(5).says(&["ALREADY_ENDED"]);
    assert!(both.err.contains(&format!("Job {waiting} is being cancelled.")), "{both:?}");
    cluster.until_state(&waiting, "CANCELLED");
}

fn revisions(cluster: &Cluster) {
    cluster.ares(&["watch", "/", "--prefix", "--from", "999999"]).refused(5, &["999999", "FUTURE_REVISION"]);
}

fn locks(cluster: &Cluster) {
    let held = cluster.json(&["lock", "acquire", "data"]);
    let session = held["session"].to_string();
    let token: u64 = held["token"].as_str().expect("decimal text").parse().expect("a number");
    let older = (token - 1).to_string();
    let judged = cluster.ares(&["lock", "validate", "data", &older]).code(5);
    assert_eq!(judged.out, "not held\n");
    cluster.ares(&["lock", "acquire", "data", "--wait", "300ms"]).code(7).says(&["300 ms. ares get /locks/data shows"]);
    cluster.ares(&["lock", "release", "other", &session]).refused(5, &["LOCK_NOT_HELD", "ares get /locks/NAME"]);
    cluster.ares(&["lock", "release", "data", &session]).ok();
    cluster.ares(&["lock", "keep-alive", &session]).refused(3, &["SESSION_UNKNOWN", "new session"]);
    cluster.ares(&["lock", "acquire", "data", "--ttl", "1ms"]).refused(2, &["1000 to 86400000 ms"]);
    cluster.ares(&["lock", "acquire", ""]).refused(2, &["name has 0 bytes, must have 1 to 256"]);
    // A command that can't start holds nothing: the next one has the lock at once.
    cluster.ares(&["lock", "run", "data", "--", "/no/such/program"]).code(3).says(&["/no/such/program", "is released"]);
    cluster.ares(&["lock", "run", "data", "--wait", "2s", "--", "true"]).ok();
}

fn members(cluster: &Cluster) {
    let only = cluster.ares(&["-o", "name", "cluster", "members"]).ok().out;
    cluster.ares(&["cluster", "remove", only.trim()]).refused(5, &["the only voter", "MEMBERSHIP_REFUSED"]);
    cluster.ares(&["cluster", "remove", "5"]).refused(5, &["replica 5 is no member", "ares cluster members"]);
    cluster.ares(&["cluster", "transfer"]).refused(5, &["no other voter is alive"]);
    let add = ["cluster", "add", "5", "--peer", "127.0.0.1:1", "--api", "127.0.0.1:1"];
    cluster.ares(&add).refused(4, &["no join token was sent", "JOIN_TOKEN_REFUSED", "DIR/env"]);
}

fn joins(cluster: &Cluster) {
    let server = cluster.servers[0].clone();
    let ports = ["--listen", "127.0.0.1:0", "--peer-listen", "127.0.0.1:0"];
    let join = |rest: &[&str]| {
        run({
            let mut command = ares(&["server"]);
            command.arg("--dir").arg(cluster.path("joining")).args(ports).args(rest);
            command
        })
    };
    join(&["--join", &server]).refused(4, &["takes its join token", "DIR/env"]);
    join(&["--join", &server, "--join-token", "wrong"])
        .refused(4, &["the join token is not this cluster's", "DIR/env"]);
    join(&["--join", "127.0.0.1:1", "--join-token", "x"]).refused(6, &["127.0.0.1:1", "--join is up"]);
    join(&["--join", "somewhere", "--join-token", "x"]).refused(2, &["\"somewhere\" is no address"]);

    let agent = |rest: &[&str]| cluster.ares(&[&["agent", "--dir", "machine", "--allow-root-jobs"], rest].concat());
    agent(&[]).refused(4, &["no join token was sent", "DIR/env"]);
    agent(&["--join-token", "wrong"]).refused(4, &["the join token is not this cluster's", "DIR/env"]);
    agent(&["--join-token", &cluster.token, "--gpus", "sim:nothing"]).refused(2, &["known: hgx-h100"]);
    agent(&["--join-token", &cluster.token, "--listen", "here"]).refused(2, &["\"here\"", "127.0.0.1:0"]);
    let other = "0".repeat(32);
    agent(&["--join-token", &cluster.token, "--cluster-id", &other]).refused(5, &["CLUSTER_MISMATCH"]);
    let mut twice = cluster.command(&["agent", "--join-token", &cluster.token, "--allow-root-jobs"]);
    twice.arg("--dir").arg(cluster.path("cores"));
    run(twice).refused(5, &["another agent uses", "--dir"]);
}

fn directories(cluster: &Cluster) {
    let server = |dir: &str, rest: &[&str]| {
        let mut command = ares(&["server"]);
        command.arg("--dir").arg(cluster.path(dir)).args(rest);
        run(command)
    };
    let ports = ["--listen", "127.0.0.1:0", "--peer-listen", "127.0.0.1:0"];
    let bootstrap = [&["--bootstrap"] as &[&str], &ports].concat();
    server("r0", &["--bootstrap"]).refused(5, &["in use by another process"]);
    server("empty", &ports).refused(5, &["--bootstrap", "--join"]);
    std::fs::create_dir_all(cluster.path("foreign").join("log")).expect("made");
    server("foreign", &bootstrap).refused(5, &["no IDENTITY", "another directory"]);
    let mut second = Cluster::start();
    second.kill_replica(0);
    let mut command = ares(&["server"]);
    command.arg("--dir").arg(second.path("r0")).args(&bootstrap);
    run(command).refused(5, &["a group is founded once", "without --bootstrap"]);
    let mut command = ares(&["server", "--join", &cluster.servers[0], "--join-token", &cluster.token]);
    command.arg("--dir").arg(second.path("r0")).args(ports);
    run(command).refused(5, &[&second.id, "give another directory"]);

    server("new", &["--bootstrap", "--listen", &cluster.servers[0]]).refused(1, &["another process has the port"]);
    server("new", &["--bootstrap", "--listen", "0.0.0.0:0"]).refused(1, &["beyond loopback", "--insecure"]);
    server("new", &["--bootstrap", "--listen", "nonsense"]).refused(2, &["\"nonsense\" is no address"]);
}

/// Two replicas, one of them gone: nothing is decided, and everything says so.
#[test]
fn without_a_quorum_every_call_says_so() {
    let mut cluster = Cluster::start();
    cluster.join();
    let members = cluster.json(&["cluster", "members"]);
    cluster.kill_replica(1);
    let ask = |args: &[&str]| cluster.ares(&[&["--timeout", "3"], args].concat());
    ask(&["queue"]).refused(6, &["NO_QUORUM", "ares cluster status"]);
    // What a leader took in just before it noticed may have happened: code 7. From then on it is sure that nothing did.
    let mut submitted = ask(&["submit", "--", "true"]);
    for _ in 0..5 {
        if submitted.code == 7 {
            submitted.says(&["takes effect once"]);
            submitted = ask(&["submit", "--", "true"]);
        }
    }
    submitted.refused(6, &["NO_QUORUM", "majority"]);
    ask(&["get", "/jobs/1"]).refused(6, &["NO_QUORUM"]);
    ask(&["lock", "acquire", "x"]).refused(6, &["NO_QUORUM"]);
    ask(&["queue", "--stale"]).ok();
    ask(&["cluster", "status"]).ok().shows(&["DOWN"]);
    // Whichever of the two led: the one that is left keeps its group.
    let dead = members.as_array().expect("a list").iter().find(|member| member["api"] == cluster.servers[1].as_str());
    let dead = dead.expect("it was a member")["replica_id"].as_str().expect("text").to_owned();
    let removal = ask(&["cluster", "remove", &dead]);
    assert!(removal.code == 5 || removal.code == 6, "{removal:?}");
    removal.says(&["quorum"]);
}
