//! Reservations of time as the planner keeps them: nothing is planned that may run into a window, what a window is for
//! gets its machines when it begins, and who waits is told which window keeps him waiting, and until when.

mod site;

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use scheduling::plan::{Cache, Plan};
use scheduling::{Outlook, Reason, Start, why};
use site::{Site, mock_v100, shape};
use statemachine::command::{CreateReservation, Machines};
use statemachine::spec::Shape;
use statemachine::{Code, Command, JobId, NodeId, Outcome, ReservationId, TaskKey, Token};

const MINUTE: u64 = 60_000;
/// SIGTERM to SIGKILL of the site's jobs.
const GRACE: u64 = 10_000;

/// A maintenance of these machines that begins in `from_ms`; all machines where none are named.
fn maintenance(site: &Site, name: &str, nodes: &[&str], (from_ms, duration_ms): (u64, u64)) -> CreateReservation {
    CreateReservation {
        name: name.into(),
        maintenance: true,
        machines: Machines { names: nodes.iter().map(|name| (*name).into()).collect(), ..Machines::default() },
        start_wall_ms: site.state.meta.wall_ms.saturating_add_unsigned(from_ms),
        duration_ms,
        ..CreateReservation::default()
    }
}

fn create(site: &mut Site, create: CreateReservation) -> bool {
    matches!(site.command(Command::CreateReservation(Box::new(create))), Outcome::Done(_))
}

fn site_of(machines: u8) -> Site {
    let mut site = Site::default();
    for nth in 1..=machines {
        site.join(&format!("n{nth}"), mock_v100());
    }
    site
}

fn submit(site: &mut Site, shape: Shape, limit_ms: u64) -> JobId {
    site.submit_limited("default", shape, 0, &[], limit_ms)
}

fn placed(plan: &Plan) -> Vec<JobId> {
    plan.places.iter().map(|place| place.task.job).collect()
}

/// In how many ms a waiting job starts at the latest.
fn starts_in(site: &Site, job: JobId) -> Option<u64> {
    match Outlook::new(&site.state, &mut Cache::default(), &site.unheard, 1_000_000).start(TaskKey::only(job)) {
        Start::At(at) => Some(at - site.state.meta.clock_ms),
        Start::Now | Start::Unknown => None,
    }
}

#[test]
fn who_would_run_into_a_maintenance_waits_and_is_told_what_would_help() {
    let mut site = site_of(1);
    let spring = maintenance(&site, "spring", &["n1"], (10 * MINUTE, 5 * MINUTE));
    assert!(create(&mut site, spring));
    let long = submit(&mut site, shape(1, 1, 1), 10 * MINUTE);
    let endless = submit(&mut site, shape(1, 1, 1), 0);
    let short = submit(&mut site, shape(1, 1, 1), 9 * MINUTE);
    assert_eq!(placed(&site.plan()), [short]);
    site.start();
    let now_ms = site.state.meta.clock_ms;
    for job in [long, endless] {
        let reason = site.reason(job);
        assert_eq!(reason.code(), "MAINTENANCE");
        let text = reason.to_string();
        assert!(text.contains("kept for maintenance spring, which begins in 600 s and ends in 900 s"), "{text}");
        assert!(text.contains("with a time limit of 589 s or less"), "{text}");
        let answer = why::why(&site.state, &mut Cache::default(), TaskKey::only(job), &site.unheard).unwrap();
        assert!(matches!(answer.soonest, Start::At(at) if at >= now_ms + 15 * MINUTE - 100), "{:?}", answer.soonest);
        assert!(answer.changes.iter().any(|change| change.ask == "--time-limit 580s" && change.start == Start::Now));
    }
    // The estimate steps over the window.
    let at = starts_in(&site, long).expect("it can be told");
    assert!((15 * MINUTE - 100..=15 * MINUTE).contains(&at), "{at} from {now_ms}");
    site.wait_ms(10 * MINUTE);
    let text = site.reason(long).to_string();
    assert!(text.contains("kept for maintenance spring, which ends in 3"), "{text}");
    assert!(!text.contains("time limit"), "{text}");
    site.wait_ms(5 * MINUTE);
    assert_eq!(placed(&site.plan()), [long, endless]);
}

#[test]
fn a_reserved_machine_is_left_to_its_own_jobs_and_these_to_it() {
    let mut site = site_of(2);
    let demo = maintenance(&site, "demo", &["n2"], (MINUTE, 5 * MINUTE));
    assert!(create(&mut site, CreateReservation { maintenance: false, ..demo }));
    let own = site.submit_inside("demo", shape(1, 1, 4), 3 * MINUTE);
    let other = submit(&mut site, shape(1, 1, 4), 0);
    let third = submit(&mut site, shape(1, 1, 4), 2 * MINUTE);
    let plan = site.plan();
    assert_eq!(placed(&plan), [other]);
    assert_eq!(site.placed(&plan, other).unwrap()[0].0, "n1");
    site.start();
    assert_eq!(site.reason(own).code(), "RESERVATION_AHEAD");
    assert_eq!(site.reason(third).code(), "SET_ASIDE");
    assert!((MINUTE - 10..=MINUTE).contains(&starts_in(&site, own).unwrap()));
    assert!((6 * MINUTE - 10..=6 * MINUTE).contains(&starts_in(&site, third).unwrap()));
    site.wait_ms(MINUTE);
    let plan = site.plan();
    assert_eq!(placed(&plan), [own]);
    assert_eq!(site.placed(&plan, own).unwrap()[0].0, "n2");
    site.start();
    // A second one of its own finds its machine busy, whatever else is free.
    let again = site.submit_inside("demo", shape(1, 1, 1), MINUTE);
    assert_eq!(placed(&site.plan()), []);
    assert_eq!(site.reason(again).code(), "GPUS_BUSY");
    assert!(site.reason(again).to_string().contains("best has 0 free on n2"), "{}", site.reason(again));
    site.wait_ms(5 * MINUTE);
    assert_eq!(site.reason(again).code(), "RESERVATION_GONE");
}

#[test]
fn a_gang_that_ends_before_a_window_is_not_told_to_wait_for_its_end() {
    let mut site = site_of(2);
    submit(&mut site, shape(2, 1, 2), 5 * MINUTE);
    site.start();
    let gang = submit(&mut site, shape(2, 1, 4), 5 * MINUTE);
    let spring = maintenance(&site, "spring", &[], (30 * MINUTE, 10 * MINUTE));
    assert!(create(&mut site, spring));
    let at = starts_in(&site, gang).unwrap();
    assert!((5 * MINUTE..=5 * MINUTE + GRACE).contains(&at), "{at}");
    let long = submit(&mut site, shape(2, 1, 4), 29 * MINUTE);
    let at = starts_in(&site, long).unwrap();
    assert!((40 * MINUTE - 100..=40 * MINUTE).contains(&at), "{at}");
}

// ---------------------------------------------------------------------------------------------------------- properties

#[derive(Clone, Debug)]
enum Step {
    Submit { nodes: u16, gpus: u16, limit_ms: u64, inside: usize },
    Reserve { nodes: u8, from_ms: u64, duration_ms: u64, maintenance: bool, requeue: bool },
    End(usize),
    Start,
    Wait(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let limit = prop_oneof![1 => Just(0), 4 => 1_000..20 * MINUTE];
    let submit = (1u16..=2, 0u16..=4, limit, 0usize..8).prop_map(|(nodes, gpus, limit_ms, inside)| Step::Submit {
        nodes,
        gpus,
        limit_ms,
        inside,
    });
    let reserve = (1u8..8, 0..20 * MINUTE, 1_000..20 * MINUTE, any::<bool>(), any::<bool>()).prop_map(
        |(nodes, from_ms, duration_ms, maintenance, requeue)| Step::Reserve {
            nodes,
            from_ms,
            duration_ms,
            maintenance,
            requeue,
        },
    );
    prop_oneof![
        5 => submit,
        2 => reserve,
        1 => any::<usize>().prop_map(Step::End),
        4 => Just(Step::Start),
        4 => (1_000..10 * MINUTE).prop_map(Step::Wait),
    ]
}

/// A site whose jobs end at their limits, and what had been started when each reservation was made.
struct Story {
    site: Site,
    made: BTreeMap<ReservationId, Token>,
    names: u32,
}

impl Story {
    fn play(&mut self, step: Step) -> Result<(), TestCaseError> {
        match step {
            Step::Submit { nodes, gpus, limit_ms, inside } => self.submit(shape(nodes, 1, gpus), limit_ms, inside),
            Step::Reserve { nodes, from_ms, duration_ms, maintenance, requeue } => {
                let named: Vec<String> =
                    (1..=3u8).filter(|nth| nodes & (1 << (nth - 1)) != 0).map(|nth| format!("n{nth}")).collect();
                let named: Vec<&str> = named.iter().map(String::as_str).collect();
                self.names += 1;
                let name = format!("r{}", self.names);
                let window = self::maintenance(&self.site, &name, &named, (from_ms, duration_ms));
                if create(&mut self.site, CreateReservation { maintenance, requeue, ..window }) {
                    let (id, _) = self.site.state.reservation(&name).unwrap();
                    self.made.insert(id, self.site.state.meta.token);
                }
            }
            Step::End(nth) => {
                let names: Vec<String> =
                    self.site.state.reservations.iter().map(|(_, window)| window.name.clone()).collect();
                if let Some(name) = names.get(nth % names.len().max(1)) {
                    self.site.command(Command::EndReservation { name: name.clone() });
                }
            }
            Step::Start => self.start()?,
            Step::Wait(ms) => self.wait(ms),
        }
        self.check()
    }

    fn submit(&mut self, shape: Shape, limit_ms: u64, inside: usize) {
        let open = self.site.state.reservations.iter().filter(|(_, window)| !window.is_maintenance());
        let open: Vec<String> = open.map(|(_, window)| window.name.clone()).collect();
        // Half of the jobs name none.
        match open.get(inside / 2).filter(|_| inside % 2 == 1) {
            Some(name) => drop(self.site.try_submit_inside(name, shape, limit_ms)),
            None => drop(submit(&mut self.site, shape, limit_ms)),
        }
    }

    /// Everything that is planned is granted, but for what a millisecond pushed into a window; who waits knows why.
    fn start(&mut self) -> Result<(), TestCaseError> {
        for _ in 0..20 {
            let plan = self.site.plan();
            for (task, reason) in &plan.reasons {
                prop_assert_ne!(&**reason, &Reason::Soon, "job {}", task.job);
            }
            if plan.places.is_empty() {
                return Ok(());
            }
            for command in plan.commands() {
                let Outcome::Done(statemachine::Reply::Plan(answers)) = self.site.command(Command::Plan(command))
                else {
                    return Err(TestCaseError::fail("the plan was refused"));
                };
                for answer in answers {
                    let code = answer.err().map(|no| no.code);
                    prop_assert!(matches!(code, None | Some(Code::Reserved)), "{:?}", code);
                }
            }
        }
        Err(TestCaseError::fail("it plans again and again what is refused"))
    }

    /// Time passes, and each job ends at its limit and grace, or at once where it has been decided.
    fn wait(&mut self, ms: u64) {
        let until_ms = self.site.state.meta.clock_ms + ms;
        loop {
            let end = |(token, lease): (&Token, &statemachine::record::Versioned<statemachine::record::Lease>)| {
                let spec = &self.site.state.jobs.get(&lease.value.task.job)?.value.spec;
                let length_ms = if lease.value.verdict.is_some() { Some(0) } else { spec.length_ms() };
                Some((lease.value.granted_ms + length_ms?, *token))
            };
            let next = self.site.state.leases.iter().filter_map(end).min();
            let Some((end_ms, token)) = next.filter(|(end, _)| *end <= until_ms) else { break };
            let now_ms = self.site.state.meta.clock_ms;
            // The report comes a few commands later: these take milliseconds.
            self.site.state.meta.clock_ms = now_ms.max(end_ms.saturating_sub(10));
            self.site.finish(token);
        }
        self.site.wait_ms(until_ms.saturating_sub(self.site.state.meta.clock_ms));
    }

    /// No job without right is inside a window on its machines, unless it was there before the window was made.
    fn check(&self) -> Result<(), TestCaseError> {
        let state = &self.site.state;
        state.check().map_err(|broken| TestCaseError::fail(broken.to_string()))?;
        for (id, window) in state.reservations.iter().filter(|(_, window)| window.begun.is_some()) {
            for (token, lease) in state.leases.iter() {
                let nodes: BTreeSet<NodeId> = lease.value.parts.iter().map(|part| part.node).collect();
                let spec = &state.jobs.get(&lease.value.task.job).unwrap().value.spec;
                let stranger = spec.reservation() != window.name && !nodes.is_disjoint(&window.nodes);
                let decided = lease.value.verdict.is_some();
                // One that started by the right of a window before this one may outlast that.
                let before = *token <= self.made[id];
                prop_assert!(!stranger || decided || before, "{:?} is inside {:?}", spec, window);
            }
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn nobody_is_inside_a_window_that_he_knew_of(steps in prop::collection::vec(step(), 1..60)) {
        let mut story = Story { site: site_of(3), made: BTreeMap::new(), names: 0 };
        for step in steps {
            story.play(step)?;
        }
    }
}
