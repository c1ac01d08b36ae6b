//! The planner's decisions as stories, each named by what must hold.

mod site;

use scheduling::links::Mask;
use scheduling::plan::{Cache, Limits, Plan, plan};
use scheduling::predict::predict;
use scheduling::{BandwidthTable, Reason};
use site::{Machine, Site, cpu_only, hgx, mock_v100, pairs, shape};
use statemachine::spec::Shape;
use statemachine::storage::codec::encode_entry;
use statemachine::{Command, Entry, TaskKey};

fn mask(slots: &[u8]) -> Mask {
    slots.iter().fold(0, |mask, slot| mask | 1 << slot)
}

#[test]
fn best_pair_on_the_mock_v100_machine_is_0_1() {
    let mut site = Site::default();
    site.join("n01", mock_v100());
    let job = site.submit(shape(1, 1, 2), 0, &[]);
    assert_eq!(site.placed(&site.plan(), job), Some(vec![("n01".into(), vec![0, 1])]));

    let table = BandwidthTable::new(&mock_v100().class);
    assert_eq!(
        predict(&table, mask(&[0, 1])).text,
        "GPUs 0,1: NV2 pair, 40 GB/s predicted; no pair of this machine is better"
    );
    assert_eq!(
        predict(&table, mask(&[1, 2])).text,
        "GPUs 1,2: SYS pair, 10 GB/s predicted; the best 2 of this machine reach 40 GB/s"
    );
    assert_eq!(predict(&table, mask(&[3])).text, "GPU 3: alone, no traffic between GPUs");
    assert_eq!(
        predict(&table, mask(&[0, 1, 2, 3])).text,
        "GPUs 0,1,2,3: ring with SYS as its worst link, 10 GB/s predicted; the whole machine"
    );
}

#[test]
fn one_gpu_does_not_break_a_free_pair() {
    let mut site = Site::default();
    site.join("n01", mock_v100());
    site.submit(shape(1, 1, 1), 0, &[]);
    let second = site.submit(shape(1, 1, 1), 0, &[]);
    let pair = site.submit(shape(1, 1, 2), 0, &[]);
    let plan = site.plan();
    assert_eq!(site.placed(&plan, second), Some(vec![("n01".into(), vec![1])]), "it goes beside the first");
    assert_eq!(site.placed(&plan, pair), Some(vec![("n01".into(), vec![2, 3])]));
}

#[test]
fn gang_of_two_nodes_takes_one_gpu_type() {
    let mut site = Site::default();
    site.join("a1", hgx("a100"));
    site.join("h1", hgx("h100"));
    site.join("h2", hgx("h100"));
    let job = site.submit(shape(2, 2, 1), 0, &[]);
    let plan = site.plan();
    let nodes: Vec<String> = site.placed(&plan, job).unwrap().into_iter().map(|(node, _)| node).collect();
    assert_eq!(nodes, ["h1", "h2"]);

    let mixed = site.submit(shape(3, 1, 1), 0, &[]);
    assert_eq!(
        site.reason(mixed).to_string(),
        "needs 3 machines with 1 GPU each; the cluster has 2 such, in service or not"
    );
    assert_eq!(site.reason(mixed).code(), "NEVER");
}

#[test]
fn a_gang_that_may_mix_types_prefers_one_and_takes_several_where_it_must() {
    let mut site = Site::default();
    site.join("a1", hgx("a100"));
    site.join("h1", hgx("h100"));
    let mixing = |nodes| Shape { mix_types: true, ..shape(nodes, 2, 1) };
    let job = site.submit(mixing(2), 0, &[]);
    let plan = site.plan();
    let nodes: Vec<String> = site.placed(&plan, job).unwrap().into_iter().map(|(node, _)| node).collect();
    assert_eq!(nodes, ["a1", "h1"]);
    assert_eq!(site.grant(&plan).len(), 1);

    site.join("h2", hgx("h100"));
    let job = site.submit(mixing(2), 0, &[]);
    let plan = site.plan();
    let nodes: Vec<String> = site.placed(&plan, job).unwrap().into_iter().map(|(node, _)| node).collect();
    assert_eq!(nodes, ["h1", "h2"]);

    let many = site.submit(mixing(4), 0, &[]);
    assert_eq!(site.reason(many).code(), "NEVER");
}

#[test]
fn a_gang_starts_whole_or_not_at_all() {
    let mut site = Site::default();
    site.join("n01", mock_v100());
    site.join("n02", mock_v100());
    site.submit(shape(1, 1, 3), 0, &[]);
    let gang = site.submit(shape(2, 1, 2), 0, &[]);
    let plan = site.plan();
    assert_eq!(plan.places.len(), 1);
    assert_eq!(plan.reasons[0].0, TaskKey::only(gang));
    assert_eq!(
        plan.reasons[0].1.to_string(),
        "needs 2 machines with 2 GPUs each; 1 machine has room now, best of the others has 1 free on n01"
    );
}

#[test]
fn larger_job_first_by_priority() {
    let mut site = Site::default();
    site.join("n01", mock_v100());
    let small = site.submit(shape(1, 1, 1), 0, &[]);
    let large = site.submit(shape(1, 1, 4), 5, &[]);
    let plan = site.plan();
    assert!(site.placed(&plan, large).is_some());
    assert!(site.placed(&plan, small).is_none());
    assert_eq!(plan.reasons.len(), 1);
    assert_eq!(plan.reasons[0].1.to_string(), "needs 1 GPU on one machine; best has 0 free on n01");
}

#[test]
fn jobs_of_one_priority_start_in_the_order_of_submission() {
    let mut site = Site::default();
    site.join("n01", mock_v100());
    let jobs: Vec<_> = (0..6).map(|_| site.submit(shape(1, 1, 1), 0, &[])).collect();
    let placed: Vec<_> = site.plan().places.iter().map(|place| place.task.job).collect();
    assert_eq!(placed, jobs[..4]);
}

#[test]
fn a_job_that_does_not_fit_does_not_block_those_behind_it() {
    let mut site = Site::default();
    site.join("n01", mock_v100());
    let first = site.submit(shape(1, 1, 3), 0, &[]);
    let blocked = site.submit(shape(1, 1, 2), 0, &[]);
    let behind = site.submit(shape(1, 1, 1), 0, &[]);
    let plan = site.plan();
    let placed: Vec<_> = plan.places.iter().map(|place| place.task.job).collect();
    assert_eq!(placed, [first, behind]);
    assert_eq!(plan.reasons[0].0.job, blocked);
}

#[test]
fn the_fullest_machine_that_still_fits_is_taken() {
    let mut site = Site::default();
    site.join("n01", hgx("h100"));
    site.join("n02", hgx("h100"));
    site.submit(shape(1, 1, 5), 0, &[]);
    site.start();
    let small = site.submit(shape(1, 1, 2), 0, &[]);
    let whole = site.submit(shape(1, 1, 8), 0, &[]);
    let plan = site.plan();
    assert_eq!(site.placed(&plan, small).unwrap()[0].0, "n01");
    assert_eq!(site.placed(&plan, whole).unwrap()[0].0, "n02");
}

#[test]
fn gpu_types_are_tried_in_the_order_of_preference() {
    let mut site = Site::default();
    site.join("a1", hgx("a100"));
    site.join("h1", hgx("h100"));
    let first = site.submit(shape(1, 1, 8), 0, &["h100", "a100"]);
    let second = site.submit(shape(1, 1, 8), 0, &["h100", "a100"]);
    let plan = site.plan();
    assert_eq!(site.placed(&plan, first).unwrap()[0].0, "h1");
    assert_eq!(site.placed(&plan, second).unwrap()[0].0, "a1");
}

#[test]
fn jobs_without_gpus_leave_the_gpu_machines_alone() {
    let mut site = Site::default();
    site.join("g1", hgx("h100"));
    site.join("c1", cpu_only());
    let job = site.submit(shape(1, 2, 0), 0, &[]);
    let plan = site.plan();
    assert_eq!(site.placed(&plan, job), Some(vec![("c1".into(), vec![])]));
    assert_eq!((plan.places[0].parts[0].cores_by_numa.clone(), plan.places[0].parts[0].mem_mib), (vec![2, 0], 2_048));
}

#[test]
fn cores_come_from_the_sockets_of_the_gpus() {
    let mut site = Site::default();
    site.join("n01", mock_v100());
    let low = site.submit(shape(1, 1, 2), 0, &[]);
    let high = site.submit(shape(1, 1, 2), 0, &[]);
    let plan = site.plan();
    let cores = |job| {
        let place = plan.places.iter().find(|place| place.task.job == job).unwrap();
        (place.parts[0].cores_by_numa.clone(), place.parts[0].mem_mib)
    };
    assert_eq!(cores(low), (vec![16, 0], 65_536), "half of the machine's cores and memory, beside GPUs 0 and 1");
    assert_eq!(cores(high), (vec![0, 16], 65_536));

    let mut site = Site::default();
    site.join("n01", mock_v100());
    site.submit(Shape { cores_per_rank: 6, ..shape(1, 1, 4) }, 0, &[]);
    assert_eq!(site.plan().places[0].parts[0].cores_by_numa, [3, 3], "split like the GPUs");
    site.submit(Shape { cores_per_rank: 20, ..shape(1, 1, 2) }, 9, &[]);
    assert_eq!(site.plan().places[0].parts[0].cores_by_numa, [16, 4], "the rest from the other socket");
}

#[test]
fn a_node_on_the_list_to_avoid_is_the_last_choice_but_a_choice() {
    let mut site = Site::default();
    site.join("n01", mock_v100());
    let job = site.submit(shape(1, 1, 2), 0, &[]);
    let token = site.start()[0];
    site.fail_launch(token);
    assert!(matches!(site.reason(job), Reason::Backoff { attempt: 2, .. }), "{}", site.reason(job));
    site.wait_ms(600_000);
    assert_eq!(site.placed(&site.plan(), job).unwrap()[0].0, "n01", "there is no other");
    assert_eq!(site.plan().places[0].attempt, 2);
    site.join("n02", mock_v100());
    assert_eq!(site.placed(&site.plan(), job).unwrap()[0].0, "n02");
}

#[test]
fn a_silent_node_gets_nothing_new() {
    let mut site = Site::default();
    let silent = site.join("n01", mock_v100());
    let job = site.submit(shape(1, 1, 1), 0, &[]);
    site.unheard.insert(silent);
    assert!(site.plan().places.is_empty());
    assert_eq!(
        site.reason(job).to_string(),
        "needs 1 GPU on one machine; 1 could run it, 0 of them out of service, 1 silent"
    );
}

#[test]
fn a_node_out_of_service_and_a_sick_gpu_get_nothing_new() {
    let mut site = Site::default();
    let out = site.join("n01", mock_v100());
    let sick = site.join("n02", mock_v100());
    site.out(out);
    site.sick(sick, 1);
    let pair = site.submit(shape(1, 1, 2), 0, &[]);
    let four = site.submit(shape(1, 1, 4), 0, &[]);
    let plan = site.plan();
    assert_eq!(site.placed(&plan, pair), Some(vec![("n02".into(), vec![2, 3])]));
    assert_eq!(
        site.reason(four).to_string(),
        "needs 4 GPUs on one machine; best has 3 free on n02; 1 GPU is unhealthy; 1 machine out or silent"
    );
    assert_eq!(site.reason(four).code(), "GPUS_BUSY");
}

#[test]
fn least_bandwidth_is_a_hard_filter() {
    let mut site = Site::default();
    site.join("n01", mock_v100());
    let fast = Shape { min_bandwidth_mbps: 100_000, ..shape(1, 1, 2) };
    let never = site.submit(fast.clone(), 0, &[]);
    assert_eq!(
        site.reason(never).to_string(),
        "needs 2 GPUs on one machine; no machine links them fast enough, the best, n01, reaches 40 GB/s"
    );
    let mut bridged = pairs(4, 12, 20_000);
    bridged.pcie_mbps = 24_000;
    site.join("n02", Machine { class: bridged, ..mock_v100() });
    assert_eq!(site.placed(&site.plan(), never), Some(vec![("n02".into(), vec![0, 1])]));
}

#[test]
fn the_bandwidth_reason_names_the_best_free_set() {
    let mut site = Site::default();
    site.join("n01", mock_v100());
    let busy = Shape { cores_per_rank: 1, mem_mib_per_rank: 1, ..shape(1, 1, 1) };
    let jobs: Vec<_> = (0..4).map(|_| site.submit(busy.clone(), 0, &[])).collect();
    let tokens = site.start();
    assert_eq!(jobs.len(), tokens.len());
    // One GPU of each pair falls free.
    for token in tokens {
        let lease = &site.state.leases.get(&token).unwrap().value;
        if [1, 2].contains(&lease.parts[0].gpu_order[0]) {
            site.finish(token);
        }
    }
    let fast = Shape { min_bandwidth_mbps: 30_000, cores_per_rank: 1, mem_mib_per_rank: 1, ..shape(1, 1, 2) };
    let job = site.submit(fast, 0, &[]);
    assert!(site.plan().places.is_empty());
    assert_eq!(
        site.reason(job).to_string(),
        "needs 2 GPUs on one machine at 30 GB/s or more; best has 10 GB/s among the free GPUs of n01"
    );
    assert_eq!(site.reason(job).code(), "BANDWIDTH");
}

#[test]
fn reasons_name_what_is_short() {
    let mut site = Site::default();
    let early = site.submit(shape(1, 1, 1), 0, &[]);
    assert_eq!(site.reason(early).to_string(), "no machine has joined the cluster");
    site.join("c1", cpu_only());
    assert_eq!(site.reason(early).to_string(), "needs GPUs; no machine has any");
    assert_eq!(site.reason(early).code(), "NO_SUCH_GPU_TYPE");
    site.join("n01", mock_v100());
    assert_eq!(site.reason(early), Reason::Soon);

    let typed = site.submit(shape(1, 1, 1), 0, &["h100", "a100"]);
    assert_eq!(site.reason(typed).to_string(), "needs h100 or a100 GPUs; the cluster has v100");
    let huge = site.submit(shape(1, 4, 4), 0, &["v100"]);
    assert_eq!(
        site.reason(huge).to_string(),
        "needs 16 v100 on one machine; no machine could ever run it; the largest, n01, has 4"
    );
    let cores = site.submit(Shape { cores_per_rank: 64, ..shape(1, 1, 0) }, 0, &[]);
    assert_eq!(
        site.reason(cores).to_string(),
        "needs 64 cores on each of one machine; no machine could ever run it; the largest, n01, has 32"
    );

    site.submit(Shape { cores_per_rank: 30, ..shape(1, 1, 1) }, 9, &[]);
    site.start();
    let cores = site.submit(Shape { cores_per_rank: 4, ..shape(1, 1, 1) }, 0, &[]);
    assert_eq!(site.reason(cores).code(), "CORES_BUSY");
    let memory = site.submit(Shape { cores_per_rank: 1, mem_mib_per_rank: 120_000, ..shape(1, 1, 1) }, 0, &[]);
    assert_eq!(site.reason(memory).code(), "MEM_BUSY");
}

#[test]
fn a_running_job_has_no_reason_to_wait() {
    let mut site = Site::default();
    site.join("n01", mock_v100());
    site.join("n02", mock_v100());
    let job = site.submit(shape(2, 1, 2), 0, &[]);
    let token = site.start()[0];
    assert_eq!(scheduling::reason_for(&site.state, TaskKey::only(job), &site.unheard), None);
    assert_eq!(site.state.leases.get(&token).unwrap().value.parts.len(), 2);
}

#[test]
fn ten_thousand_jobs_of_equal_shape_on_a_hundred_machines_are_one_look() {
    let mut site = Site::default();
    for n in 0..100 {
        site.join(&format!("n{n:03}"), mock_v100());
    }
    for _ in 0..10_000 {
        site.submit(shape(1, 1, 2), 0, &[]);
    }
    let limits = Limits::default();
    let plan = plan(&site.state, &mut Cache::default(), &limits, &site.unheard);
    assert_eq!(plan.places.len(), 200);
    assert_eq!(plan.reasons.len(), 9_800);
    assert!(!plan.unfinished);
    // Each task once, each machine once for the shape and once for the reason, and again after each placement on it; for
    // the one reservation each machine, now and when its first job will have ended.
    let looks = 10_000 + 100 + 100 + 200 + 3 * 100;
    assert!(is_whole(&site, &plan, looks + 1), "it took more than {looks} looks");
}

#[test]
fn jobs_that_no_machine_could_run_cost_one_look_each_and_no_reservation() {
    let mut site = Site::default();
    for n in 0..100 {
        site.join(&format!("n{n:03}"), mock_v100());
        site.submit(shape(1, 1, 3), 9, &[]);
    }
    site.start();
    for _ in 0..10_000 {
        site.submit(shape(1, 1, 1), 0, &["h100"]);
    }
    let plan = site.plan();
    assert_eq!((plan.places.len(), plan.reasons.len(), plan.reservations.len()), (0, 10_000, 0));
    let looks = 10_000 + 100 + 100;
    assert!(is_whole(&site, &plan, looks + 1), "it took more than {looks} looks");
}

/// So many steps suffice for this plan.
fn is_whole(site: &Site, expected: &Plan, steps: u64) -> bool {
    let limits = Limits { steps, ..Limits::default() };
    let plan = plan(&site.state, &mut Cache::default(), &limits, &site.unheard);
    !plan.unfinished && plan == *expected
}

#[test]
fn a_cycle_that_runs_out_of_steps_goes_on_where_it_stopped() {
    let mut site = Site::default();
    site.join("n01", mock_v100());
    for gpus in 5..15 {
        site.submit(shape(1, 1, gpus), 0, &[]);
    }
    let last = site.submit(shape(1, 1, 1), 0, &[]);
    let mut limits = Limits { steps: 4, ..Limits::default() };
    let mut cycles = 0;
    let plan = loop {
        let plan = plan(&site.state, &mut Cache::default(), &limits, &site.unheard);
        cycles += 1;
        if !plan.unfinished {
            break plan;
        }
        assert!(plan.places.is_empty());
        limits.after = plan.reached;
    };
    assert!(cycles > 3, "{cycles} cycles");
    assert_eq!(plan.places[0].task.job, last);
}

#[test]
fn a_long_plan_is_cut_between_placements() {
    let mut site = Site::default();
    for n in 0..100 {
        site.join(&format!("c{n:03}"), Machine { cores_by_numa: vec![512, 512], mem_mib: 1 << 24, ..cpu_only() });
    }
    for _ in 0..40 {
        site.submit(shape(100, 1, 0), 0, &[]);
    }
    let plan = site.plan();
    assert_eq!(plan.places.len(), 40);
    let commands = plan.commands();
    assert!(commands.len() > 1);
    let joined: Vec<_> = commands.iter().flat_map(|command| command.places.clone()).collect();
    assert_eq!(joined, plan.places);
    for command in &commands {
        let cmd = statemachine::Cmd { request: None, actor: String::new(), body: Command::Plan(command.clone()) };
        let entry = Entry { level: 1, clock_ms: 0, wall_ms: 0, salt: 0, cmds: vec![cmd] };
        let bytes = encode_entry(&entry).len();
        assert!(bytes <= 121 << 10, "{bytes} bytes");
    }
    site.grant(&plan);
}

/// Slices of GPUs are no GPUs of any type: who names them gets them, and who does not waits for a whole one.
#[test]
fn slices_go_to_who_names_them() {
    let mut site = Site::default();
    let slices = Machine { gpu_type: "a100-1g.5gb", class: pairs(4, 0, 0), ..mock_v100() };
    site.join("n01", slices);
    let any = site.submit(shape(1, 1, 1), 0, &[]);
    let two = site.submit(shape(1, 2, 1), 0, &["a100-1g.5gb"]);
    let plan = site.plan();
    assert_eq!(site.placed(&plan, any), None);
    assert_eq!(site.placed(&plan, two).map(|parts| parts[0].1.len()), Some(2));
    assert_eq!(
        site.reason(any).to_string(),
        "needs whole GPUs; the cluster has slices, a100-1g.5gb: --gpu-type takes one"
    );
    site.join("n02", mock_v100());
    let plan = site.plan();
    assert_eq!(site.placed(&plan, any).map(|parts| parts[0].0.clone()), Some("n02".into()));
}
