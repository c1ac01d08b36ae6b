//! Gangs by the racks of their machines, on a cluster of real processes.

mod cluster;

use cluster::Cluster;

/// Four machines in two racks, joined crosswise: a gang of two is in one rack, and one of four goes rack by rack.
#[test]
fn a_gang_is_kept_in_a_rack_and_its_ranks_go_along() {
    let mut cluster = Cluster::start();
    let machines = [("a", "r2"), ("b", "r1"), ("c", "r2"), ("d", "r1")];
    for (at, (name, rack)) in machines.into_iter().enumerate() {
        cluster.agent(name, &["--gpus", "sim:dgx1-v100", "--label", &format!("rack={rack}")]);
        cluster.until("it is ready", |cluster| {
            let nodes = cluster.json(&["nodes"]);
            nodes.as_array().is_some_and(|nodes| nodes.iter().filter(|node| node["state"] == "READY").count() == at + 1)
        });
    }
    assert_eq!(cluster.json(&["nodes"])[0]["labels"]["rack"], "r2");

    // It leaves one machine of r2: the smallest rack with room for two is the other one, then.
    let single = cluster.submit(&["--gpus", "8"], "sleep 300");
    cluster.until_state(&single, "RUNNING");
    let taken = nodes_of(&cluster, &single);
    let pair = cluster.submit(&["--nodes", "2", "--gpus-per-node", "8"], "sleep 300");
    cluster.until_state(&pair, "RUNNING");
    let rack = |name: &str| machines.into_iter().find(|(known, _)| *known == name).map(|(_, rack)| rack);
    let racks: Vec<_> = nodes_of(&cluster, &pair).iter().map(|name| rack(name)).collect();
    assert_eq!(racks[0], racks[1]);
    assert_ne!(racks[0], rack(&taken[0]));
    // The other machine of r2 is the only one left.
    let two = ["--nodes", "2", "--gpus-per-node", "4", "--topology", "rack:require"];
    let wider = cluster.submit(&["--nodes", "3", "--gpus-per-node", "8", "--topology", "rack:require"], "true");
    let waiting = cluster.json(&["show", &wider]);
    assert_eq!((&waiting["topology"], &waiting["reason_code"]), (&"rack:require".into(), &"NEVER".into()), "{waiting}");
    cluster.ares(&["cancel", &wider]).ok();
    let apart = cluster.submit(&two, "true");
    let why = cluster.json(&["why", &apart]);
    assert_eq!(why["code"], "GPUS_BUSY", "{why}");
    let reason = why["reason"].as_str().expect("a text");
    assert!(reason.starts_with("needs 2 machines with 4 GPUs each in one rack; 1 machine has room now"), "{why}");
    cluster.ares(&["show", &apart]).ok().shows(&["Topology", "rack:require"]);
    for job in [&single, &pair] {
        cluster.ares(&["cancel", job]).ok();
        cluster.until_state(job, "CANCELLED");
    }

    // Both racks are free.
    cluster.ares(&["wait", &apart]).ok();
    let placed = cluster.json(&["show", &apart])["attempts"][0]["nodes"].clone();
    let placed: Vec<_> = placed.as_array().expect("its nodes").iter().filter_map(|name| rack(name.as_str()?)).collect();
    assert_eq!((placed.len(), placed[0]), (2, placed[1]));

    let four = cluster.submit(&["--nodes", "4", "--gpus-per-node", "8"], "true");
    cluster.ares(&["wait", &four]).ok();
    assert_eq!(cluster.json(&["show", &four])["attempts"][0]["nodes"], serde_json::json!(["b", "d", "a", "c"]));
}

/// By labels, by names, and by GPU types with one to fall back to.
#[test]
fn a_job_is_on_machines_of_its_own_choice() {
    let mut cluster = Cluster::start();
    let machines = [("v", "sim:dgx1-v100", "r1"), ("w", "sim:hgx-h100", "r2")];
    for (name, gpus, rack) in machines {
        cluster.agent(name, &["--gpus", gpus, "--label", &format!("rack={rack}")]);
    }
    cluster.until("both are ready", |cluster| {
        let nodes = cluster.json(&["nodes"]);
        nodes.as_array().is_some_and(|nodes| nodes.iter().filter(|node| node["state"] == "READY").count() == 2)
    });
    let where_it_ran = |options: &[&str]| {
        let job = cluster.submit(options, "true");
        cluster.ares(&["wait", &job]).ok();
        cluster.json(&["show", &job])["attempts"][0]["nodes"][0].as_str().expect("a name").to_owned()
    };
    for (options, name) in [
        (["--constraint", "rack=r2"], "w"),
        (["--constraint", "rack!=r2|no-such-label"], "v"),
        (["--nodelist", "w"], "w"),
        (["--exclude", "w"], "v"),
        (["--gpus", "b200:8|h100:8|v100:8"], "w"),
    ] {
        assert_eq!(where_it_ran(&options), name, "{options:?}");
    }
    // The types behind the first are for when that is taken.
    let first = cluster.submit(&["--gpus", "h100:8"], "sleep 300");
    cluster.until_state(&first, "RUNNING");
    assert_eq!(where_it_ran(&["--gpus", "h100:8|v100:8"]), "v");

    let options = ["--constraint", "rack=r7 & ssd", "--exclude", "v,w"];
    let waits = cluster.submit(&options, "true");
    let shown = cluster.json(&["show", &waits]);
    assert_eq!((&shown["constraint"], &shown["reason_code"]), (&"rack=r7&ssd".into(), &"CONSTRAINT".into()), "{shown}");
    assert_eq!((&shown["exclude"], &shown["nodelist"]), (&serde_json::json!(["v", "w"]), &serde_json::json!([])));
    cluster.ares(&["show", &waits]).ok().shows(&["Constraint", "rack=r7&ssd", "Not on", "v, w"]);
    let why = cluster.json(&["why", &waits]);
    let wanted = "needs one machine among 0 of 2 machines by --constraint rack=r7&ssd --exclude v,w; \
                  0 of these could run it, 2 of the others";
    assert_eq!(why["reason"], wanted, "{why}");
    assert_eq!(why["changes"][0]["ask"], "no --constraint rack=r7&ssd --exclude v,w", "{why}");
    // A machine with the labels comes: it starts there.
    cluster.agent("x", &["--label", "rack=r7", "--label", "ssd=2TB"]);
    cluster.ares(&["wait", &waits]).ok();
    assert_eq!(cluster.json(&["show", &waits])["attempts"][0]["nodes"], serde_json::json!(["x"]));
}

/// In the order of its ranks.
fn nodes_of(cluster: &Cluster, job: &str) -> Vec<String> {
    let placement = cluster.json(&["show", job])["placement"].clone();
    let parts = placement.as_array().expect("a placement").iter();
    parts.map(|part| part["node"].as_str().expect("a name").to_owned()).collect()
}
