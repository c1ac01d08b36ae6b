//! Machines set aside for a window of time, on a cluster of real processes.

mod cluster;

use cluster::{Cluster, USER};
use jiff::Timestamp;

fn time(value: &serde_json::Value) -> Timestamp {
    value.as_str().expect("a time").parse().expect("RFC 3339")
}

#[test]
fn machines_are_set_aside_for_a_window_of_time() {
    let cluster = Cluster::with_machines();
    maintenance(&cluster);
    own_jobs(&cluster);
    requeue(&cluster);
    refusals(&cluster);
}

/// A maintenance in some seconds: who would run into it waits with the reason, who ends before runs, and the estimate
/// steps over it.
fn maintenance(cluster: &Cluster) {
    let create = ["reservation", "create", "spring", "--maintenance", "--nodes", "gpus", "--start", "now+7s"];
    let made = cluster.ares(&[&create[..], &["--duration", "3s", "--reason", "new fans"]].concat()).ok();
    made.says(&["Reservation spring sets aside gpus from"]);
    let window = cluster.json(&["reservation", "show", "spring"]);
    assert_eq!((&window["state"], &window["maintenance"]), (&"AHEAD".into(), &true.into()));
    let end = time(&window["end"]);

    let long = cluster.submit(&["--gpus", "1", "--time-limit", "10m"], "true");
    let short = cluster.submit(&["--gpus", "1", "--time-limit", "1s", "--kill-grace", "500ms"], "true");
    cluster.until("the long one says why it waits", |cluster| {
        cluster.json(&["show", &long])["reason_code"] == "MAINTENANCE"
    });
    let why = cluster.json(&["why", &long]);
    let text = why["reason"].as_str().expect("a reason");
    assert!(text.contains("kept for maintenance spring, which begins in"), "{text}");
    assert!(text.contains("with a time limit of"), "{text}");
    let latest = time(&why["latest"]);
    assert!(latest.as_millisecond() >= end.as_millisecond() - 50, "{latest} steps over {end}");
    cluster.ares(&["queue"]).ok().shows(&["maintenance spring"]);
    cluster.ares(&["nodes"]).ok().shows(&["maintenance spring from"]);
    let ended = cluster.json(&["wait", &short]);
    assert_eq!(ended["state"].as_str().or(ended[0]["state"].as_str()), Some("SUCCEEDED"), "{ended}");
    assert!(Timestamp::now() < end, "it did not wait for the maintenance");
    assert_eq!(cluster.json(&["show", &long])["state"], "PENDING");

    cluster.until("it has begun", |cluster| {
        let list = cluster.json(&["reservation", "list"]);
        list[0]["state"] == "ACTIVE" || list.as_array().is_some_and(Vec::is_empty)
    });
    cluster.ares(&["wait", &long]).ok();
    assert!(Timestamp::now() >= end, "it waited for the end");
    assert_eq!(cluster.json(&["reservation", "list"]), serde_json::json!([]));
}

/// In a reservation its own jobs start, and others wait until it is deleted.
fn own_jobs(cluster: &Cluster) {
    let create = ["reservation", "create", "demo", "--users", USER, "--count", "1", "--gpu-type", "v100"];
    let made = cluster.json(&[&create[..], &["--duration", "1h"]].concat());
    assert_eq!((&made["state"], &made["nodes"]), (&"ACTIVE".into(), &serde_json::json!(["gpus"])));
    let own = cluster.submit(&["--reservation", "demo", "--gpus", "1"], "true");
    cluster.ares(&["wait", &own]).ok();
    assert_eq!(cluster.json(&["show", &own])["reservation"], "demo");
    let other = cluster.submit(&["--gpus", "1"], "true");
    cluster.until("it says why it waits", |cluster| cluster.json(&["show", &other])["reason_code"] == "SET_ASIDE");
    cluster.ares(&["reservation", "list"]).ok().shows(&["demo", "ACTIVE", &format!("user {USER}"), "gpus"]);
    let late = cluster.submit(&["--reservation", "demo", "--hold", "--gpus", "1"], "true");
    cluster.ares(&["reservation", "delete", "demo"]).ok().says(&["demo is deleted"]);
    cluster.ares(&["wait", &other]).ok();
    cluster.ares(&["release", &late]).ok();
    cluster.until("its reservation is gone", |cluster| {
        cluster.json(&["show", &late])["reason_code"] == "RESERVATION_GONE"
    });
    cluster.ares(&["cancel", &late]).ok();
}

/// What runs when a window begins goes back to the queue if the reservation says so, and comes back.
fn requeue(cluster: &Cluster) {
    let job = cluster.submit(&["--gpus", "1", "--kill-grace", "1s"], "exec sleep 600");
    cluster.until_state(&job, "RUNNING");
    let create = ["reservation", "create", "fans", "--maintenance", "--requeue", "--all", "--duration", "1h"];
    cluster.ares(&create).ok();
    cluster.until_state(&job, "PENDING");
    let shown = cluster.json(&["show", &job]);
    assert_eq!(shown["attempts"][0]["verdict"], "PREEMPTED", "{shown}");
    cluster.ares(&["reservation", "delete", "fans"]).ok();
    cluster.until_state(&job, "RUNNING");
    cluster.ares(&["cancel", &job]).ok();
    cluster.ares(&["wait", &job]).code(143);
}

fn refusals(cluster: &Cluster) {
    let create = |more: &[&str]| cluster.ares(&[&["reservation", "create"], more].concat());
    create(&["x", "--maintenance", "--duration", "1h"]).refused(2, &["no machines are named", "--nodes"]);
    create(&["x", "--nodes", "gpus", "--duration", "soon"]).refused(2, &["--duration \"soon\""]);
    create(&["x", "--nodes", "nobody", "--duration", "1h"]).refused(3, &["no node \"nobody\""]);
    create(&["X!", "--nodes", "gpus", "--duration", "1h"]).refused(2, &["name is \"X!\""]);
    create(&["x", "--count", "3", "--duration", "1h"])
        .refused(5, &["NO_FIT", "2 machines match, the reservation needs 3"]);
    create(&["x", "--nodes", "gpus", "--start", "now+1h", "--duration", "1h"]).ok();
    create(&["y", "--all", "--start", "now+90m", "--duration", "1h"]).refused(5, &["CONFLICT", "set aside by \"x\""]);
    cluster.ares(&["submit", "--reservation", "y", "--", "true"]).refused(3, &["RESERVATION_UNKNOWN"]);
    cluster.ares(&["reservation", "delete", "y"]).refused(3, &["RESERVATION_UNKNOWN"]);
    cluster.ares(&["reservation", "show", "y"]).refused(3, &["no reservation \"y\""]);
    cluster.ares(&["reservation", "delete", "x"]).ok();
    create(&["z", "--maintenance", "--nodes", "gpus", "--start", "now+1h", "--duration", "1h"]).ok();
    cluster.ares(&["submit", "--reservation", "z", "--", "true"]).refused(4, &["RESERVATION_DENIED", "maintenance"]);
}
