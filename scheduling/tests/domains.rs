//! Gangs over racks: the domain that a gang goes to is the smallest that holds it, by brute force over random networks,
//! and its ranks go along the domains.

mod site;

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use scheduling::LEVELS;
use site::{Site, hgx, shape};
use statemachine::JobId;

/// A machine's labels, outermost first; empty = none.
type Path = [String; 3];

fn path() -> impl Strategy<Value = Path> {
    let name = |few: u8| prop_oneof![1 => Just(String::new()), 6 => (0..few).prop_map(|n| format!("d{n}"))];
    (name(2), name(3), name(2)).prop_map(|(block, rack, switch)| [block, rack, switch])
}

fn join(site: &mut Site, n: usize, path: &Path) {
    let labels: Vec<(&str, &str)> = LEVELS
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

/// The innermost level at which a domain holds so many of the free machines, and how many the smallest such has free.
fn smallest(paths: &[Path], free: &BTreeSet<usize>, needed: usize) -> Option<(usize, usize)> {
    (0..LEVELS.len()).rev().find_map(|level| {
        let mut room: BTreeMap<&[String], usize> = BTreeMap::new();
        free.iter().filter_map(|n| domain(&paths[*n], level)).for_each(|at| *room.entry(at).or_default() += 1);
        room.into_values().filter(|count| *count >= needed).min().map(|count| (level, count))
    })
}

/// No domain is left and entered again.
fn go_along(paths: &[Path], ranks: &[usize]) -> bool {
    (0..LEVELS.len()).all(|level| {
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
        gangs in prop::collection::vec(2u16..6, 1..5),
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
        let jobs: Vec<(JobId, usize)> =
            gangs.iter().map(|nodes| (site.submit(shape(*nodes, 1, 8), 0, &[]), usize::from(*nodes))).collect();
        let plan = site.plan();
        for (job, needed) in jobs {
            let Some(ranks) = numbers(&site, &plan, job) else { continue };
            prop_assert!(go_along(&paths, &ranks), "{ranks:?}");
            if let Some((level, room)) = smallest(&paths, &free, needed) {
                let at = domain(&paths[ranks[0]], level);
                prop_assert!(at.is_some() && ranks.iter().all(|n| domain(&paths[*n], level) == at), "{ranks:?}");
                prop_assert_eq!(free.iter().filter(|n| domain(&paths[**n], level) == at).count(), room);
            }
            for n in ranks {
                prop_assert!(free.remove(&n), "machine {n} is not free");
            }
        }
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
