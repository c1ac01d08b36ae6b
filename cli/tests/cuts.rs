//! Jobs that say how many GPUs they want and not on how many machines, and jobs on slices of GPUs, on a cluster of real processes.

mod cluster;

use cluster::Cluster;
use serde_json::{Value, json};

/// Two machines of eight GPUs.
#[test]
fn gpus_beyond_a_machine_are_cut_over_several() {
    let mut cluster = Cluster::start();
    for name in ["v", "w"] {
        cluster.agent(name, &["--gpus", "sim:dgx1-v100"]);
    }
    cluster.until("both are ready", |cluster| {
        let nodes = cluster.json(&["nodes"]);
        nodes.as_array().is_some_and(|nodes| nodes.iter().filter(|node| node["state"] == "READY").count() == 2)
    });
    let gpus_of = |placement: &Value| -> Vec<usize> {
        let parts = placement.as_array().expect("a placement").iter();
        parts.map(|part| part["gpus"].as_array().map_or(0, Vec::len)).collect()
    };

    let told = cluster.json(&["submit", "--gpus", "16", "--dry-run", "--", "true"]);
    assert_eq!(gpus_of(&told["placement"]), [8, 8], "{told}");
    let twelve = cluster.submit(&["--gpus", "12"], "echo $RANK of $WORLD_SIZE on $ARES_NODES nodes; sleep 300");
    cluster.until_state(&twelve, "RUNNING");
    let shown = cluster.json(&["show", &twelve]);
    assert_eq!((gpus_of(&shown["placement"]), &shown["nodes"]), (vec![6, 6], &Value::Null), "{shown}");
    cluster.ares(&["show", &twelve]).ok().shows(&["Shape", "12 GPUs on as few nodes as hold them x 1 rank"]);
    cluster.until("the last rank has spoken", |cluster| {
        cluster.ares(&["logs", &twelve, "--rank", "1"]).out.contains("1 of 2 on 2 nodes")
    });
    // What one machine holds is of one, and waits for it.
    let eight = cluster.submit(&["--gpus", "8"], "true");
    let shown = cluster.json(&["show", &eight]);
    assert_eq!((&shown["nodes"], &shown["reason_code"]), (&json!(1), &"GPUS_BUSY".into()), "{shown}");
    cluster.ares(&["cancel", &twelve]).ok();
    cluster.ares(&["wait", &eight]).ok();

    // As many as there is room for: eight would be on one machine.
    let print = "echo $ARES_GPUS GPUs, $WORLD_SIZE ranks on $ARES_NODES nodes";
    let elastic = cluster.submit(&["--gpus", "4..32"], print);
    cluster.ares(&["wait", &elastic]).ok();
    cluster.ares(&["logs", &elastic]).ok().shows(&["16 GPUs, 2 ranks on 2 nodes"]);
    cluster.ares(&["show", &elastic]).ok().shows(&["Shape", "4 to 32 GPUs on as few nodes as hold them x 1 rank"]);
    let half = cluster.submit(&["--nodes", "2", "--gpus-per-node", "3"], "sleep 300");
    cluster.until_state(&half, "RUNNING");
    let elastic = cluster.submit(&["--gpus", "4..32"], &format!("{print}; sleep 300"));
    cluster.until_state(&elastic, "RUNNING");
    let shown = cluster.json(&["show", &elastic]);
    assert_eq!((gpus_of(&shown["placement"]), &shown["most_gpus_per_rank"]), (vec![4], &json!(32)), "{shown}");
    for job in [&half, &elastic] {
        cluster.ares(&["cancel", job]).ok();
        cluster.until_state(job, "CANCELLED");
    }

    let thirteen = cluster.submit(&["--gpus", "13"], "true");
    let why = cluster.json(&["why", &thirteen]);
    let wanted =
        "needs 13 GPUs in equal parts; no machines could ever hold it so, 12 as 2 x 6 or 14 as 2 x 7 would fit";
    assert_eq!((&why["code"], &why["reason"]), (&"NEVER".into(), &wanted.into()), "{why}");
    assert_eq!((&why["changes"][0]["ask"], &why["changes"][0]["now"]), (&"--gpus 12".into(), &json!(true)), "{why}");
    cluster.ares(&["cancel", &thirteen]).ok();
    let refused = cluster.ares(&["submit", "--gpus", "4099", "--", "true"]);
    refused.refused(2, &["4099 GPUs can't be cut into equal parts", "4098 as 683 x 6 or 4100 as 41 x 100 would fit"]);
}

/// A machine of which two GPUs are whole and the others cut.
#[test]
fn slices_are_for_jobs_that_name_them_and_each_rank_sees_its_own() {
    let mut cluster = Cluster::start();
    cluster.agent("s", &["--gpus", "sim:a100-mig"]);
    cluster.until("it is ready", |cluster| cluster.json(&["nodes"])[0]["state"] == "READY");
    cluster.ares(&["nodes"]).ok().shows(&["36/36", "a100,a100-1g.5gb,a100-3g.20gb,a100-2g.10gb"]);

    let print = "echo rank $RANK has $CUDA_VISIBLE_DEVICES";
    let slices = ["--nodes", "1", "--ranks-per-node", "2", "--gpus-per-node", "2", "--gpu-type", "a100-3g.20gb"];
    let two = cluster.submit(&slices, print);
    cluster.ares(&["wait", &two]).ok();
    let seen = ["0", "1"].map(|rank| cluster.ares(&["logs", &two, "--rank", rank]).ok().out);
    assert!(seen.iter().all(|seen| seen.contains("has MIG-") && !seen.contains(',')) && seen[0] != seen[1], "{seen:?}");
    let whole = cluster.submit(&["--gpus", "2"], print);
    cluster.ares(&["wait", &whole]).ok();
    let seen = cluster.ares(&["logs", &whole]).ok().out;
    assert!(seen.matches("GPU-").count() == 2 && !seen.contains("MIG-"), "{seen}");

    let three = cluster.submit(&["--nodes", "1", "--gpus-per-node", "3"], "true");
    let shown = cluster.json(&["show", &three]);
    assert_eq!(shown["reason_code"], "NEVER", "no slice stands in for a GPU: {shown}");
    let refused = ["submit", "--gpus", "2", "--gpu-type", "a100-1g.5gb", "--", "true"];
    cluster.ares(&refused).refused(2, &["gpus_per_rank is 2, must be 1", "a process sees one slice of a GPU"]);
}
