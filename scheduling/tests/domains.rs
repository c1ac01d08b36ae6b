//! Gangs over racks: the domain that a gang goes to is the smallest that holds it, by brute force over random networks,
//! and its ranks go along the domains.

mod site;

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use scheduling::plan::Cache;
use scheduling::why::why;
use scheduling::{Outlook, Start};
use site::{Site, hgx, shape};
use statemachine::command::{CreateReservation, Machines, Preempt};
use statemachine::domain::{Level, Topology};
use statemachine::spec::Shape;
use statemachine::{Command, JobId, Outcome, TaskKey};

/// A machine's labels, outermost first; empty = none.
type Path = [String; 3];

fn path() -> impl Strategy<Value = Path> {
    let name = |few: u8| prop_oneof![1 => Just(String::new()), 6 => (0..few).prop_map(|n| format!("d{n}"))];
    (name(2), name(3), name(2)).prop_map(|(block, rack, switch)| [block, rack, switch])
}

fn join(site: &mut Site, n: usize, path: &Path) {
    let labels: Vec<(&str, &str)> = Level::ALL
        .map(Level::name)
        .into_iter()
        .zip(path)
        .filter(|(_, name)| !name.is_empty())
        .map(|(level, name)| (level, &**name))
        .collect();
    site.join_with(&format!("n{n}"), hgx("h100"), &labels);
}

fn racks(sizes: &[usize]) -> Site {
    let mut site = Site::default();
    let of = sizes.iter().enumerate().flat_map(|(rack, size)| (0..*size).map(move |_| rack));
    for (n, rack) in of.enumerate() {
        join(&mut site, n, &[String::new(), format!("r{rack}"), String::new()]);
    }
    site
}

/// Machines of a job by their number of joining, in the order of its ranks.
fn numbers(site: &Site, plan: &scheduling::Plan, job: JobId) -> Option<Vec<usize>> {
    let parts = site.placed(plan, job)?;
    Some(parts.iter().map(|(name, _)| name[1..].parse().unwrap()).collect())
}

fn domain(path: &Path, level: usize) -> Option<&[String]> {
    (!path[level].is_empty()).then(|| &path[..=level])
}

fn topology() -> impl Strategy<Value = Option<Topology>> {
    let some = (0..3usize, any::<bool>()).prop_map(|(at, required)| Topology { level: Level::ALL[at], required });
    prop_oneof![1 => Just(None), 3 => some.prop_map(Some)]
}

fn gang(nodes: u16, topology: Option<Topology>) -> Shape {
    Shape { topology, ..shape(nodes, 1, 8) }
}

fn in_one(level: Level) -> Option<Topology> {
    Some(Topology { level, required: true })
}

/// The levels at which a domain will do, the best first.
fn levels(topology: Option<Topology>) -> Vec<usize> {
    match topology.map(|topology| (topology.level as usize, topology.required)) {
        None => vec![2, 1, 0],
        Some((level, true)) => (level..3).rev().collect(),
        Some((level, false)) => {
            [level].into_iter().chain([2, 1, 0].into_iter().filter(|other| *other != level)).collect()
        }
    }
}

/// The first of the levels at which a domain holds so many of the free machines, and how many the smallest such has free.
fn smallest(
    paths: &[Path],
    free: &BTreeSet<usize>,
    needed: usize,
    topology: Option<Topology>,
) -> Option<(usize, usize)> {
    levels(topology).into_iter().find_map(|level| {
        let mut room: BTreeMap<&[String], usize> = BTreeMap::new();
        let required = topology.filter(|topology| topology.required).map_or(level, |topology| topology.level as usize);
        let inside = free.iter().filter(|n| !paths[**n][required].is_empty());
        inside.filter_map(|n| domain(&paths[*n], level)).for_each(|at| *room.entry(at).or_default() += 1);
        room.into_values().filter(|count| *count >= needed).min().map(|count| (level, count))
    })
}

/// No domain is left and entered again.
fn go_along(paths: &[Path], ranks: &[usize]) -> bool {
    (0..Level::ALL.len()).all(|level| {
        let mut seen: Vec<&[String]> = ranks.iter().map(|n| &paths[*n][..=level]).collect();
        seen.dedup();
        seen.len() == seen.iter().collect::<BTreeSet<_>>().len()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn a_gang_goes_to_the_smallest_domain_that_holds_it(
        paths in prop::collection::vec(path(), 2..16),
        single in 0usize..6,
        gangs in prop::collection::vec((2u16..6, topology()), 1..6),
    ) {
        let mut site = Site::default();
        paths.iter().enumerate().for_each(|(n, path)| join(&mut site, n, path));
        for _ in 0..single {
            site.submit(shape(1, 1, 8), 0, &[]);
        }
        site.start();
        let held = |n: &usize| {
            let node = site.state.nodes.iter().find(|(_, node)| node.value.name == format!("n{n}")).unwrap().0;
            !site.state.allocs.get(node).unwrap().leases.is_empty()
        };
        let mut free: BTreeSet<usize> = (0..paths.len()).filter(|n| !held(n)).collect();
        let jobs: Vec<(JobId, usize, Option<Topology>)> = gangs
            .iter()
            .map(|(nodes, wants)| (site.submit(gang(*nodes, *wants), 0, &[]), usize::from(*nodes), *wants))
            .collect();
        let plan = site.plan();
        for (job, needed, wants) in jobs {
            let required = wants.filter(|wants| wants.required).map(|wants| wants.level);
            let Some(ranks) = numbers(&site, &plan, job) else {
                prop_assert!(smallest(&paths, &free, needed, wants).is_none());
                prop_assert!(required.is_some() || free.len() < needed);
                // What is kept for it is not there for those behind it.
                for part in plan.reservations.iter().filter(|kept| kept.task.job == job).flat_map(|kept| &kept.parts) {
                    free.remove(&site.name(part.node)[1..].parse::<usize>().unwrap());
                }
                continue;
            };
            prop_assert!(go_along(&paths, &ranks), "{ranks:?}");
            prop_assert!(required.is_none() || smallest(&paths, &free, needed, wants).is_some());
            if let Some((level, room)) = smallest(&paths, &free, needed, wants) {
                let at = domain(&paths[ranks[0]], level);
                prop_assert!(at.is_some() && ranks.iter().all(|n| domain(&paths[*n], level) == at), "{ranks:?}");
                prop_assert_eq!(free.iter().filter(|n| domain(&paths[**n], level) == at).count(), room);
            }
            for n in ranks {
                prop_assert!(free.remove(&n), "machine {n} is not free");
            }
        }
        for kept in &plan.reservations {
            let shape = &site.state.jobs.get(&kept.task.job).unwrap().value.spec.shape;
            prop_assert!(site.state.are_near_enough(shape, kept.parts.iter().map(|part| part.node)));
        }
        // Apply finds nothing to refuse.
        site.grant(&plan);
        site.state.check().unwrap();
    }

    /// Whose end makes room for an urgent gang is in one domain where it requires one: apply takes each of the plan's
    /// preemptions, and the gang starts if a domain is large enough at all.
    #[test]
    fn room_is_made_where_the_gang_must_be(
        paths in prop::collection::vec(path(), 3..12),
        waits in prop::collection::vec(1u64..200, 12),
        nodes in 2u16..5,
        wants in topology(),
    ) {
        let mut site = Site::default();
        site.urgent_and_low();
        paths.iter().enumerate().for_each(|(n, path)| join(&mut site, n, path));
        for (_, wait) in paths.iter().zip(waits) {
            site.submit_of("low", "default", shape(1, 1, 8));
            let token = site.start()[0];
            site.started(token);
            site.wait_ms(wait * 1_000);
        }
        let job = site.submit_of("high", "default", gang(nodes, wants));
        let plan = site.plan();
        for made in &plan.preempts {
            let outcome = site.command(Command::Preempt(made.clone()));
            prop_assert!(matches!(outcome, Outcome::Done(_)), "{:?}", outcome);
            prop_assert_eq!(made.victims.len(), usize::from(nodes));
            made.victims.iter().for_each(|token| site.finish(*token));
        }
        site.start();
        site.state.check().unwrap();
        let all: BTreeSet<usize> = (0..paths.len()).collect();
        let required = wants.is_some_and(|wants| wants.required);
        let can = if required { smallest(&paths, &all, nodes.into(), wants).is_some() } else { paths.len() >= nodes.into() };
        prop_assert_eq!(site.state.leases.iter().any(|(_, lease)| lease.value.task.job == job), can);
    }

    /// As few racks as any choice of machines could do with.
    #[test]
    fn a_gang_that_no_rack_holds_is_in_as_few_as_can_be(sizes in prop::collection::vec(1usize..5, 1..6), needed in 2u16..12) {
        let mut site = racks(&sizes);
        let job = site.submit(shape(needed, 1, 8), 0, &[]);
        let Some(ranks) = numbers(&site, &site.plan(), job) else {
            prop_assert!(sizes.iter().sum::<usize>() < usize::from(needed));
            return Ok(());
        };
        let rack_of: Vec<usize> = sizes.iter().enumerate().flat_map(|(rack, size)| vec![rack; *size]).collect();
        let used = ranks.iter().map(|n| rack_of[*n]).collect::<BTreeSet<_>>().len();
        let room = |set: u32| sizes.iter().enumerate().filter(|(n, _)| set >> n & 1 == 1).map(|(_, size)| size).sum::<usize>();
        let fewest = (0u32..1 << sizes.len()).filter(|set| room(*set) >= usize::from(needed)).map(u32::count_ones).min();
        prop_assert_eq!(u32::try_from(used).ok(), fewest);
    }
}

#[test]
fn a_large_rack_stays_whole_while_a_smaller_one_holds_the_gang() {
    let mut site = racks(&[4, 2, 3]);
    let small = site.submit(shape(2, 1, 8), 0, &[]);
    let large = site.submit(shape(4, 1, 8), 0, &[]);
    let plan = site.plan();
    assert_eq!(numbers(&site, &plan, small), Some(vec![4, 5]));
    assert_eq!(numbers(&site, &plan, large), Some(vec![0, 1, 2, 3]));
}

#[test]
fn ranks_go_rack_by_rack_however_the_machines_joined() {
    let mut site = Site::default();
    for n in 0..6 {
        join(&mut site, n, &[String::new(), format!("r{}", n % 2), String::new()]);
    }
    let job = site.submit(shape(6, 1, 8), 0, &[]);
    assert_eq!(numbers(&site, &site.plan(), job), Some(vec![0, 2, 4, 1, 3, 5]));
}

/// A type whose machines stand in one rack is nearer than one that fits its machines better.
#[test]
fn of_two_types_the_one_in_a_rack_is_taken() {
    let mut site = Site::default();
    site.join_with("n0", site::mock_v100(), &[("rack", "r0")]);
    site.join_with("n1", site::mock_v100(), &[("rack", "r1")]);
    site.join_with("n2", hgx("h100"), &[("rack", "r2")]);
    site.join_with("n3", hgx("h100"), &[("rack", "r2")]);
    let job = site.submit(shape(2, 1, 4), 0, &[]);
    assert_eq!(numbers(&site, &site.plan(), job), Some(vec![2, 3]));
}

#[test]
fn without_labels_the_machines_lie_side_by_side() {
    let mut site = Site::default();
    for n in 0..4 {
        join(&mut site, n, &Default::default());
    }
    site.submit(shape(1, 1, 4), 0, &[]);
    site.start();
    let job = site.submit(shape(2, 1, 4), 0, &[]);
    assert_eq!(numbers(&site, &site.plan(), job), Some(vec![0, 1]), "the fullest machine first");
}

/// The machine on which the launch failed is in the only rack: another one does, further away.
#[test]
fn a_machine_to_avoid_is_avoided_before_a_domain_is_kept() {
    let mut site = racks(&[2, 1]);
    let job = site.submit(shape(2, 1, 8), 0, &[]);
    let token = site.start()[0];
    let blamed = site.state.leases.get(&token).unwrap().value.parts[0].node;
    site.fail_launch(token);
    site.wait_ms(60_000);
    let ranks = numbers(&site, &site.plan(), job).expect("starts again");
    assert!(
        site.name(blamed) != format!("n{}", ranks[0]) && site.name(blamed) != format!("n{}", ranks[1]),
        "{ranks:?}"
    );
    assert!(ranks.contains(&2));
}

#[test]
fn a_rack_that_is_preferred_goes_before_a_switch() {
    let mut site = Site::default();
    let paths = [("r0", "s0"), ("r0", "s0"), ("r0", "s1"), ("r0", "s1"), ("r1", ""), ("r1", "")];
    for (n, (rack, switch)) in paths.into_iter().enumerate() {
        join(&mut site, n, &[String::new(), rack.into(), switch.into()]);
    }
    let plain = site.submit(gang(2, None), 0, &[]);
    assert_eq!(numbers(&site, &site.plan(), plain), Some(vec![0, 1]), "in one switch");
    site.command(Command::Cancel { job: plain });
    let prefers = site.submit(gang(2, Some(Topology { level: Level::Rack, required: false })), 0, &[]);
    assert_eq!(numbers(&site, &site.plan(), prefers), Some(vec![4, 5]), "in the rack that it fits best");
}

/// Jobs of one machine take those of the rack in which the fewest are idle, and leave a whole one to the gang.
#[test]
fn single_machines_are_taken_where_the_fewest_are_idle() {
    let mut site = racks(&[3, 3]);
    for _ in 0..3 {
        site.submit(shape(1, 1, 8), 0, &[]);
    }
    site.start();
    let gang = site.submit(gang(3, None), 0, &[]);
    let ranks = numbers(&site, &site.plan(), gang).expect("it starts");
    assert!(ranks == [0, 1, 2] || ranks == [3, 4, 5], "{ranks:?}");
    // Of the machines that fit a part of one best, too.
    let mut site = racks(&[3, 2]);
    let half = |site: &mut Site| site.submit(shape(1, 1, 4), 0, &[]);
    let first = half(&mut site);
    assert_eq!(numbers(&site, &site.plan(), first), Some(vec![3]));
    site.start();
    let second = half(&mut site);
    assert_eq!(numbers(&site, &site.plan(), second), Some(vec![3]), "where it fits best, first of all");
}

#[test]
fn who_requires_a_rack_waits_for_one_and_is_told_how_far_each_is() {
    let mut site = racks(&[3, 2]);
    let single = |site: &mut Site| site.submit_limited("default", shape(1, 1, 8), 0, &[], 600_000);
    for _ in 0..2 {
        single(&mut site);
    }
    // They would take the smaller rack.
    let small = ["n3", "n4"].map(|name| *site.state.index.node_by_name.get(name).unwrap());
    small.iter().for_each(|node| site.out(*node));
    site.start();
    for node in small {
        site.command(Command::NodeAdmin { node, out: None });
    }
    let held = |site: &Site, n: usize| {
        let node = site.state.nodes.iter().find(|(_, node)| node.value.name == format!("n{n}")).unwrap().0;
        !site.state.allocs.get(node).unwrap().leases.is_empty()
    };
    assert_eq!([0, 1, 2, 3, 4].map(|n| held(&site, n)), [true, true, false, false, false]);
    let job = site.submit_limited("default", gang(3, in_one(Level::Rack)), 0, &[], 60_000);
    let reason = site.reason(job);
    assert_eq!(reason.code(), "TOPOLOGY");
    assert_eq!(reason.to_string(), "needs 3 machines with 8 GPUs each in one rack; r1 has 2, r0 has 1 now");
    let why = why(&site.state, &mut Cache::default(), TaskKey::only(job), &site.unheard).unwrap();
    let asks: Vec<(&str, Start)> = why.changes.iter().map(|change| (&*change.ask, change.start)).collect();
    assert_eq!(asks[0], ("--topology rack:prefer", Start::Now));
    assert!(asks.contains(&("--nodes 2 --gpus-per-node 8", Start::Now)), "{asks:?}");
    assert!(matches!(why.latest, Start::At(at) if at > site.state.meta.clock_ms + 590_000), "{:?}", why.latest);
    // r0 is the only rack that is large enough, and a machine of it is out.
    let third = *site.state.index.node_by_name.get("n2").unwrap();
    site.out(third);
    let reason = site.reason(job);
    assert_eq!(
        reason.to_string(),
        "needs 3 machines with 8 GPUs each in one rack; 3 of r0 could run it, 1 of them out of service, 0 silent"
    );
    let large = site.submit(gang(4, in_one(Level::Rack)), 0, &[]);
    let never = site.reason(large);
    assert_eq!(never.code(), "NEVER");
    assert_eq!(
        never.to_string(),
        "needs 4 machines with 8 GPUs each in one rack; the largest, r0, has 3, in service or not"
    );
    let blocks = site.submit(gang(2, in_one(Level::Block)), 0, &[]);
    assert_eq!(
        site.reason(blocks).to_string(),
        "needs 2 machines with 8 GPUs each in one block; no such machine names its block: ares agent --label block=NAME"
    );
}

/// One machine of each rack is free sooner than two of one.
#[test]
fn a_start_to_come_is_when_one_rack_has_room() {
    let mut site = racks(&[2, 2]);
    for minutes in [1, 5, 3, 3] {
        site.submit_limited("default", shape(1, 1, 8), 0, &[], minutes * 60_000);
        site.start();
    }
    let job = site.submit_limited("default", gang(2, in_one(Level::Rack)), 0, &[], 60_000);
    let plan = site.plan();
    let kept = plan.reservations.iter().find(|kept| kept.task.job == job).expect("a reservation");
    let names: Vec<String> = kept.parts.iter().map(|part| site.name(part.node)).collect();
    assert_eq!(names, ["n2", "n3"]);
    let start = Outlook::new(&site.state, &mut Cache::default(), &site.unheard, 100_000).start(TaskKey::only(job));
    let in_s = |start: Start| match start {
        Start::At(at) => (at - site.state.meta.clock_ms) / 1_000,
        _ => 0,
    };
    assert_eq!(in_s(start), 189);
}

/// The two that lose least are in two racks.
#[test]
fn room_is_made_in_one_rack() {
    let mut site = racks(&[2, 2]);
    site.urgent_and_low();
    let mut tokens = Vec::new();
    // n0 and n2 are young, n1 old, n3 a little older than they.
    for _ in 0..4 {
        site.submit_of("low", "default", shape(1, 1, 8));
        tokens.extend(site.start());
    }
    let on = |site: &Site, n: usize| {
        let node = *site.state.index.node_by_name.get(&format!("n{n}")).unwrap();
        site.state.allocs.get(&node).unwrap().leases[0]
    };
    for n in [1, 3, 0, 2] {
        let token = on(&site, n);
        site.started(token);
        site.wait_ms(if n == 1 { 3_600_000 } else { 60_000 });
    }
    site.submit_of("high", "default", gang(2, in_one(Level::Rack)));
    let plan = site.plan();
    let victims: BTreeSet<_> = plan.preempts[0].victims.iter().copied().collect();
    assert_eq!(victims, BTreeSet::from([on(&site, 2), on(&site, 3)]));
    // A planner that chose otherwise is refused.
    let parts = [plan.preempts[0].parts[0].clone(), {
        let node = *site.state.index.node_by_name.get("n0").unwrap();
        let epoch = site.state.nodes.get(&node).unwrap().value.epoch;
        statemachine::command::PlacePart { node, epoch, ..plan.preempts[0].parts[1].clone() }
    }];
    let apart =
        Preempt { parts: parts.to_vec(), victims: vec![on(&site, 0), on(&site, 2)], ..plan.preempts[0].clone() };
    assert!(matches!(site.command(Command::Preempt(apart)), Outcome::Rejected(_)));
    assert!(matches!(site.command(Command::Preempt(plan.preempts[0].clone())), Outcome::Done(_)));
    site.state.check().unwrap();
}

/// A window of reserved time in the only rack with room: the gang waits for its end, though another rack has a machine.
#[test]
fn a_window_keeps_a_rack_from_a_gang() {
    let mut site = racks(&[2, 1]);
    let window = CreateReservation {
        name: "spring".into(),
        maintenance: true,
        machines: Machines { names: vec!["n0".into()], ..Machines::default() },
        start_wall_ms: site.state.meta.wall_ms + 600_000,
        duration_ms: 300_000,
        ..CreateReservation::default()
    };
    assert!(matches!(site.command(Command::CreateReservation(Box::new(window))), Outcome::Done(_)));
    let job = site.submit_limited("default", gang(2, in_one(Level::Rack)), 0, &[], 3_600_000);
    assert!(site.plan().places.is_empty());
    assert_eq!(site.reason(job).code(), "MAINTENANCE");
    let start = Outlook::new(&site.state, &mut Cache::default(), &site.unheard, 100_000).start(TaskKey::only(job));
    assert!(matches!(start, Start::At(at) if at >= site.state.meta.clock_ms + 899_000), "{start:?}");
}

/// Both machines of the only rack that is large enough failed the gang's launch: it starts there again.
#[test]
fn machines_to_avoid_are_taken_where_the_rack_is_required() {
    let mut site = racks(&[2, 1]);
    let job = site.submit(gang(2, in_one(Level::Rack)), 0, &[]);
    let token = site.start()[0];
    site.fail_launch(token);
    site.wait_ms(60_000);
    assert_eq!(numbers(&site, &site.plan(), job), Some(vec![0, 1]));
}
