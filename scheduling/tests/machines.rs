//! Which machines a job may be on: the planner keeps to it wherever it looks at machines, against brute force over random
//! clusters, and who waits for it is told.

mod site;

use std::collections::BTreeSet;

use proptest::prelude::*;
use scheduling::plan::{Cache, Limits, plan};
use scheduling::why::why;
use scheduling::{Outlook, Start};
use site::{Site, hgx, shape};
use statemachine::command::Preempt;
use statemachine::selector::Selector;
use statemachine::spec::Shape;
use statemachine::{Command, JobId, Outcome, TaskKey};

/// Machines n0, n1 ... of these racks; some have an SSD.
fn cluster(machines: &[(u8, bool)]) -> Site {
    let mut site = Site::default();
    for (nth, (rack, ssd)) in machines.iter().enumerate() {
        let rack = format!("r{rack}");
        let labels = [("rack", rack.as_str()), ("ssd", "2TB")];
        site.join_with(&format!("n{nth}"), hgx("h100"), &labels[..1 + usize::from(*ssd)]);
    }
    site
}

fn named(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

fn by_labels(text: &str) -> Selector {
    Selector { constraint: text.parse().unwrap(), ..Selector::default() }
}

fn on(machines: Selector, shape: Shape) -> Shape {
    Shape { machines: Some(Box::new(machines)), ..shape }
}

/// A machine's name, its rack and whether it has an SSD: the job may be on it.
type Is = fn(&str, u8, bool) -> bool;

/// What a job says, and a word on each machine by the test's own reading.
fn selector() -> impl Strategy<Value = (Selector, Is)> {
    let only = Selector { only: named(&["n0", "n1", "n2"]), ..Selector::default() };
    let both = Selector { without: named(&["n0"]), ..by_labels("rack=r0|rack=r1") };
    let all: [(Selector, Is); 7] = [
        (by_labels("rack=r0"), |_, rack, _| rack == 0),
        (by_labels("rack!=r0&ssd"), |_, rack, ssd| rack != 0 && ssd),
        (by_labels("rack=r1|ssd=2TB"), |_, rack, ssd| rack == 1 || ssd),
        (by_labels("ssd!=2TB"), |_, _, ssd| !ssd),
        (only, |name, _, _| ["n0", "n1", "n2"].contains(&name)),
        (both, |name, rack, _| name != "n0" && rack < 2),
        (Selector::default(), |_, _, _| true),
    ];
    prop::sample::select(all.to_vec())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whole machines: each job that starts is where it may be, apply takes it, and one that does not start has too few
    /// machines left of its own. Urgent ones then end others on machines of their own alone.
    #[test]
    fn the_planner_keeps_to_it(
        machines in prop::collection::vec((0u8..3, any::<bool>()), 3..9),
        jobs in prop::collection::vec((selector(), 1u16..4), 1..8),
        urgent in (selector(), 1u16..4),
    ) {
        let mut site = cluster(&machines);
        site.urgent_and_low();
        let may = |is: Is, name: &str| {
            let (rack, ssd) = machines[name[1..].parse::<usize>().unwrap()];
            is(name, rack, ssd)
        };
        let submit = |site: &mut Site, class: &str, (selector, nodes): (&Selector, u16)| {
            let own = (*selector != Selector::default()).then(|| Box::new(selector.clone()));
            if own.as_ref().is_some_and(|it| !it.only.is_empty() && it.only.len() < usize::from(nodes)) {
                return None;
            }
            Some(site.submit_of(class, "default", Shape { machines: own, ..shape(nodes, 1, 8) }))
        };
        let ids: Vec<Option<JobId>> =
            jobs.iter().map(|((selector, _), nodes)| submit(&mut site, "low", (selector, *nodes))).collect();
        // Without what is kept for those in front, whoever fits starts.
        let limits = Limits { reservations: Some(0), ..Limits::default() };
        let plan = plan(&site.state, &mut Cache::default(), &limits, &site.unheard);
        let tokens = site.grant(&plan);
        let placed = |id: JobId| site.placed(&plan, id).map(|parts| parts.into_iter().map(|(name, _)| name).collect::<Vec<_>>());
        let taken: BTreeSet<String> = ids.iter().flatten().filter_map(|id| placed(*id)).flatten().collect();
        for (id, ((_, is), nodes)) in ids.iter().zip(&jobs) {
            let Some(id) = id else { continue };
            match placed(*id) {
                Some(names) => prop_assert!(names.iter().all(|name| may(*is, name)), "{names:?}"),
                None => {
                    let all = (0..machines.len()).map(|nth| format!("n{nth}"));
                    let own: Vec<String> = all.filter(|name| may(*is, name)).collect();
                    let left = own.iter().filter(|name| !taken.contains(*name)).count();
                    prop_assert!(left < usize::from(*nodes), "{left} of {own:?} are free");
                    let told = site.reason(*id);
                    let too_few = own.len() < usize::from(*nodes) && own.len() < machines.len();
                    prop_assert_eq!(told.code() == "CONSTRAINT", too_few, "{}", told);
                }
            }
        }
        for token in tokens {
            site.started(token);
        }
        site.wait_ms(3_600_000);
        let ((selector, is), nodes) = &urgent;
        let high = submit(&mut site, "high", (selector, *nodes));
        let plan = site.plan();
        for made in &plan.preempts {
            prop_assert_eq!(Some(made.task.job), high);
            prop_assert!(made.parts.iter().all(|part| may(*is, &site.name(part.node))));
            let outcome = site.command(Command::Preempt(made.clone()));
            prop_assert!(matches!(outcome, Outcome::Done(_)), "{:?}", outcome);
        }
        site.state.check().unwrap();
    }
}

#[test]
fn who_keeps_too_many_machines_out_is_told_and_what_would_help() {
    let mut site = cluster(&[(0, false), (0, true), (1, false)]);
    let job = site.submit(on(by_labels("rack=r7"), shape(1, 1, 8)), 0, &[]);
    let reason = site.reason(job);
    assert_eq!(reason.code(), "CONSTRAINT");
    let text = "needs 8 GPUs on one machine among 0 of 3 machines by --constraint rack=r7; \
                0 of these could run it, 3 of the others";
    assert_eq!(reason.to_string(), text);
    let told = why(&site.state, &mut Cache::default(), TaskKey::only(job), &site.unheard).unwrap();
    let asks: Vec<(&str, Start)> = told.changes.iter().map(|change| (&*change.ask, change.start)).collect();
    assert_eq!(asks, [("no --constraint rack=r7", Start::Now)]);

    // The first of two that starts it is told; without either it starts too.
    let both = Selector { without: named(&["n1"]), ..by_labels("ssd") };
    let job = site.submit(on(both, shape(1, 1, 8)), 0, &[]);
    let told = why(&site.state, &mut Cache::default(), TaskKey::only(job), &site.unheard).unwrap();
    assert_eq!(told.reason.code(), "CONSTRAINT");
    assert_eq!((told.changes[0].ask.as_str(), told.changes[0].start), ("no --constraint", Start::Now));

    // Nobody could run it, wherever.
    let large = site.submit(on(by_labels("rack=r0"), shape(1, 1, 9)), 0, &[]);
    let reason = site.reason(large);
    assert_eq!(reason.code(), "NEVER");
    let text =
        "needs 9 GPUs on one machine among 2 of 3 machines; no machine could ever run it; the largest, n0, has 8";
    assert_eq!(reason.to_string(), text);
}

#[test]
fn who_waits_for_machines_of_its_own_has_its_start_kept_there() {
    let mut site = cluster(&[(0, false), (1, false), (1, false)]);
    for minutes in [1, 20, 30] {
        site.submit_limited("default", shape(1, 1, 8), 0, &[], minutes * 60_000);
        site.start();
    }
    let job = site.submit_limited("default", on(by_labels("rack=r1"), shape(1, 1, 8)), 0, &[], 60_000);
    let reason = site.reason(job);
    assert_eq!(reason.to_string(), "needs 8 GPUs on one machine among 2 of 3 machines; best has 0 free on n1");
    let plan = site.plan();
    assert_eq!(site.name(plan.reservations[0].parts[0].node), "n1");
    let start = Outlook::new(&site.state, &mut Cache::default(), &site.unheard, 100_000).start(TaskKey::only(job));
    assert!(matches!(start, Start::At(at) if at > site.state.meta.clock_ms + 19 * 60_000), "{start:?}");
}

/// The one that loses least is on a machine that the urgent job keeps out, and apply would refuse it there.
#[test]
fn room_is_made_on_machines_of_its_own() {
    let mut site = cluster(&[(0, false), (1, false)]);
    site.urgent_and_low();
    for _ in 0..2 {
        site.submit_of("low", "default", shape(1, 1, 8));
        let token = site.start()[0];
        site.started(token);
        site.wait_ms(600_000);
    }
    let free = site.submit_of("high", "default", shape(1, 1, 8));
    let cheapest = site.plan().preempts[0].clone();
    assert_eq!((cheapest.task.job, site.name(cheapest.parts[0].node)), (free, "n1".to_owned()));
    site.command(Command::Cancel { job: free });
    let without = Selector { without: named(&["n1"]), ..Selector::default() };
    let job = site.submit_of("high", "default", on(without, shape(1, 1, 8)));
    let plan = site.plan();
    assert_eq!(site.name(plan.preempts[0].parts[0].node), "n0");
    let wrong = Preempt { task: TaskKey::only(job), ..cheapest };
    assert!(matches!(site.command(Command::Preempt(wrong)), Outcome::Rejected(_)));
    assert!(matches!(site.command(Command::Preempt(plan.preempts[0].clone())), Outcome::Done(_)));
}
