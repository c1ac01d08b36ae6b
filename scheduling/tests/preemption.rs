//! Whose end makes room: the least loss, nobody needlessly, and no look where nobody may be ended. Then a whole cluster
//! under adversarial mixes: a bound on the preemptions of each job, and no cycle.

mod site;

use proptest::prelude::*;
use scheduling::plan::{Cache, Limits, plan};
use scheduling::{Plan, Reason};
use site::*;
use statemachine::command::{Preempt, SetPolicy, SetPriority, SetTenant};
use statemachine::record::Phase;
use statemachine::spec::Shape;
use statemachine::{Command, JobId, NodeId, Outcome, State, TaskKey, Token};

fn class(site: &mut Site, name: &str, value: i32, preempts: bool, preemptible: bool) {
    let set = SetPriority { name: name.into(), create: true, value, tenants: Vec::new(), preempts, preemptible };
    assert!(matches!(site.command(Command::SetPriority(set)), Outcome::Done(_)));
}

fn site() -> Site {
    let mut site = Site::default();
    class(&mut site, "low", 0, false, true);
    class(&mut site, "mid", 50, true, true);
    class(&mut site, "high", 100, true, true);
    site
}

fn running(site: &mut Site, class: &str, shape: Shape) -> (JobId, Token) {
    let id = site.submit_of(class, "default", shape);
    let tokens = site.start();
    tokens.iter().for_each(|token| site.started(*token));
    (id, *tokens.last().expect("it fits"))
}

fn preempt(site: &mut Site, preempt: &Preempt) -> Outcome {
    site.command(Command::Preempt(preempt.clone()))
}

fn draining(state: &State) -> Vec<Token> {
    state.leases.iter().filter(|(_, lease)| lease.value.verdict.is_some()).map(|(token, _)| *token).collect()
}

/// One plan, applied: everything in it must be accepted.
fn turn(site: &mut Site) -> Plan {
    let plan = site.plan();
    for token in site.grant(&plan) {
        site.started(token);
    }
    for made in &plan.preempts {
        let outcome = preempt(site, made);
        assert!(matches!(outcome, Outcome::Done(_)), "{made:?}: {outcome:?}");
    }
    site.state.check().expect("all invariants hold");
    plan
}

#[test]
fn who_lost_least_since_its_checkpoint_makes_room_and_the_urgent_job_starts_there() {
    let mut site = site();
    site.join("m", hgx("h100"));
    let (old, old_token) = running(&mut site, "low", shape(1, 1, 4));
    site.wait_ms(3_600_000);
    let (_, young) = running(&mut site, "low", shape(1, 1, 4));
    site.wait_ms(60_000);
    let urgent = site.submit_of("high", "default", shape(1, 1, 2));
    assert_eq!(site.plan().preempts[0].victims, vec![young], "an hour is more than a minute");
    // Saved a second ago, the old one has less to lose.
    site.command(Command::Checkpoint { token: old_token, path: "/c".into(), step: 1 });
    let plan = turn(&mut site);
    assert_eq!(plan.preempts[0].victims, vec![old_token]);
    let reason = site.reason(urgent);
    assert!(matches!(reason, Reason::Preempting { victims: 1, .. }), "{reason}");
    assert_eq!(reason.to_string(), "needs 2 GPUs on one machine; 1 job ends to make room for it");
    assert!(turn(&mut site).preempts.is_empty(), "room is made once");
    site.drain(old_token);
    // The victim stands before the urgent job in the queue's seq, and gets only what is left over.
    let plan = turn(&mut site);
    assert_eq!(plan.places.len(), 1);
    assert_eq!(plan.places[0].task.job, urgent);
    assert!(site.state.claims.is_empty());
    assert!(matches!(site.reason(old), Reason::GpusBusy { .. }));
}

#[test]
fn a_set_of_small_ones_is_not_taken_where_one_loses_less_and_none_is_spare() {
    let mut site = site();
    for name in ["a", "b"] {
        site.join(name, hgx("h100"));
    }
    let (_, whole) = running(&mut site, "low", shape(1, 1, 8));
    site.wait_ms(100_000);
    let eighths: Vec<Token> = (0..8).map(|_| running(&mut site, "low", shape(1, 1, 1)).1).collect();
    site.wait_ms(50_000);
    site.submit_of("high", "default", shape(1, 1, 3));
    let victims = site.plan().preempts[0].victims.clone();
    assert_eq!(victims.len(), 3, "three of {eighths:?}: {victims:?}");
    assert!(!victims.contains(&whole));
}

#[test]
fn a_gang_is_ended_whole_and_a_gang_takes_machines_of_the_same_victim() {
    let mut site = site();
    for name in ["a", "b", "c", "d"] {
        site.join(name, hgx("h100"));
    }
    let (_, first) = running(&mut site, "low", shape(2, 1, 8));
    let (_, second) = running(&mut site, "low", shape(2, 1, 8));
    site.wait_ms(10_000);
    site.submit_of("high", "default", shape(2, 1, 8));
    let plan = turn(&mut site);
    assert_eq!(plan.preempts[0].victims.len(), 1, "one gang frees both machines");
    assert_eq!(plan.preempts[0].parts.len(), 2);
    for token in draining(&site.state) {
        site.drain(token);
    }
    assert_eq!(turn(&mut site).places.len(), 1);
    assert_eq!([first, second].iter().filter(|token| site.state.leases.get(token).is_some()).count(), 1);
}

#[test]
fn what_drains_anyway_is_waited_for() {
    let mut site = site();
    site.join("m", hgx("h100"));
    let (ends, _) = running(&mut site, "low", shape(1, 1, 4));
    running(&mut site, "low", shape(1, 1, 4));
    site.command(Command::Cancel { job: ends });
    site.submit_of("high", "default", shape(1, 1, 4));
    assert!(site.plan().preempts.is_empty());
}

#[test]
fn nobody_is_ended_for_a_task_that_would_not_fit_even_so() {
    let mut site = site();
    site.join("m", hgx("h100"));
    running(&mut site, "low", shape(1, 1, 4));
    running(&mut site, "", shape(1, 1, 4));
    site.submit_of("high", "default", shape(1, 1, 8));
    site.submit_of("high", "default", shape(2, 1, 4));
    assert!(site.plan().preempts.is_empty());
}

#[test]
fn a_tenant_below_its_guarantee_takes_it_back_and_no_more() {
    let mut site = site();
    site.join("m", hgx("h100"));
    let guaranteed = Some([("h100".into(), 4)].into());
    site.tenant(SetTenant { name: "lab".into(), guaranteed, ..SetTenant::default() });
    for _ in 0..8 {
        running(&mut site, "", shape(1, 1, 1));
        site.wait_ms(1_000);
    }
    for _ in 0..6 {
        site.submit_of("", "lab", shape(1, 1, 1));
    }
    let victims: usize = turn(&mut site).preempts.iter().map(|made| made.victims.len()).sum();
    let more: usize = turn(&mut site).preempts.iter().map(|made| made.victims.len()).sum();
    assert_eq!((victims, more), (4, 0));
    let tokens = draining(&site.state);
    tokens.into_iter().for_each(|token| site.drain(token));
    assert_eq!(turn(&mut site).places.len(), 4);
    assert!(turn(&mut site).preempts.is_empty());
}

#[test]
fn where_nobody_may_be_ended_nothing_is_looked_at() {
    let steps = |urgent: &str, running_as: &str| {
        let mut site = site();
        for nth in 0..50 {
            site.join(&format!("n{nth}"), hgx("h100"));
        }
        for _ in 0..50 {
            site.submit_of(running_as, "default", shape(1, 1, 8));
        }
        site.start();
        for gpus in 1..=8 {
            site.submit_of(urgent, "default", shape(1, 1, gpus));
        }
        let mut cache = Cache::default();
        let unlimited = Limits { reservations: Some(0), ..Limits::default() };
        let planned = plan(&site.state, &mut cache, &unlimited, &site.unheard);
        (planned.steps, planned.preempts.len())
    };
    let (plain, none) = steps("", "");
    let (in_vain, nobody) = steps("high", "");
    assert_eq!((none, nobody), (0, 0));
    // A class that preempts costs one look at each lease a cycle, not at each for each task.
    assert!(in_vain <= plain + 50 + 8, "{in_vain} steps, {plain} without a right to end anybody");
    let (some, made) = steps("high", "low");
    assert!(made > 0 && some > in_vain);
}

#[test]
fn a_job_at_its_tenants_limit_ends_a_lower_one_of_that_tenant() {
    let mut site = site();
    for name in ["a", "b"] {
        site.join(name, hgx("h100"));
    }
    site.tenant(SetTenant { name: "lab".into(), limit_gpus: Some(Some(8)), ..SetTenant::default() });
    for tenant in ["lab", "default"] {
        site.submit_of("low", tenant, shape(1, 1, 6));
        site.start().into_iter().for_each(|token| site.started(token));
    }
    site.wait_ms(1_000);
    let urgent = site.submit_of("high", "lab", shape(1, 1, 4));
    let plan = site.plan();
    assert!(plan.places.is_empty());
    let made = plan.preempts.first().expect("room is made under the limit").clone();
    let victim = site.state.leases.get(&made.victims[0]).unwrap().value.task.job;
    assert_eq!(made.victims.len(), 1);
    let tenant = site.state.jobs.get(&victim).unwrap().value.tenant;
    assert_eq!(site.state.tenants.get(&tenant).unwrap().name, "lab");
    assert!(matches!(preempt(&mut site, &made), Outcome::Done(_)));
    assert_eq!(site.reason(urgent).code(), "PREEMPTING");
    site.drain(made.victims[0]);
    assert_eq!(turn(&mut site).places[0].task.job, urgent);
    // Nobody of lower priority is left there: the next one waits for its tenant.
    let next = site.submit_of("high", "lab", shape(1, 1, 5));
    assert!(site.plan().preempts.is_empty());
    assert_eq!(site.reason(next).code(), "QUOTA");
}

#[test]
fn a_machine_full_of_leases_loses_one_and_the_place_is_kept() {
    let mut site = site();
    site.state.meta.settings.leases_per_node = 2;
    site.join("a", hgx("h100"));
    for _ in 0..2 {
        running(&mut site, "low", shape(1, 1, 1));
    }
    let urgent = site.submit_of("high", "default", shape(1, 1, 1));
    let made = site.plan().preempts.first().expect("room is made").clone();
    assert_eq!(made.victims.len(), 1);
    assert!(matches!(preempt(&mut site, &made), Outcome::Done(_)));
    site.drain(made.victims[0]);
    // Those who were ended and those who come get GPUs that are free, but no lease.
    let late = site.submit_of("", "default", shape(1, 1, 1));
    let places = turn(&mut site).places;
    assert_eq!(places.iter().map(|place| place.task.job).collect::<Vec<_>>(), [urgent]);
    assert_eq!(site.reason(late).code(), "LEASES_FULL");
}

#[test]
fn a_job_whose_turn_it_is_starts_in_the_place_of_the_one_that_loses_least() {
    let mut site = site();
    for name in ["a", "b"] {
        site.join(name, hgx("h100"));
    }
    site.policy(SetPolicy { turn_gpu_ms: Some(80_000), turn_run_ms: Some(1_000), ..SetPolicy::default() });
    let (first, _) = running(&mut site, "low", shape(1, 1, 8));
    site.wait_ms(30_000);
    let (_, second) = running(&mut site, "low", shape(1, 1, 8));
    let young = site.submit_of("low", "default", shape(1, 1, 8));
    let limited = site.submit_of_limited("low", shape(1, 1, 8), 60_000);
    let plan = site.plan();
    assert_eq!(plan.preempts.len(), 1, "the first has had its turn, the second has not");
    assert_eq!(site.state.leases.get(&plan.preempts[0].victims[0]).unwrap().value.task.job, first);
    let later = site.state.turn_ends_ms(&site.state.leases.get(&second).unwrap().value);
    assert_eq!(plan.preempts_from, later, "then the second one has");
    site.wait_ms(10_000);
    let plan = turn(&mut site);
    assert_eq!((plan.preempts.len(), plan.preempts[0].task.job, &plan.preempts[0].victims), (1, young, &vec![second]));
    assert_eq!(site.reason(young).code(), "PREEMPTING");
    assert_eq!(site.reason(limited).code(), "GPUS_BUSY", "who has a limit takes no turn");
    site.drain(second);
    assert_eq!(turn(&mut site).places[0].task.job, young);
    // Of those who wait, who has had a turn stands behind who has not, until it has waited for long.
    let third = site.submit_of("low", "default", shape(1, 1, 8));
    let victim = site
        .state
        .jobs
        .iter()
        .map(|(id, _)| *id)
        .find(|id| site.state.leases.iter().all(|(_, lease)| lease.value.task.job != *id));
    let victim = victim.expect("it waits");
    let line = |site: &Site| -> Vec<JobId> {
        scheduling::order::queue(&site.state)
            .map(|key| key.task.job)
            .filter(|id| [victim, third].contains(id))
            .collect()
    };
    assert_eq!(line(&site), [third, victim]);
    // It has run for ten seconds since its submission, and waited for the rest.
    site.policy(SetPolicy { turn_wait_ms: Some(60_000), ..SetPolicy::default() });
    site.wait_ms(59_900);
    assert_eq!(line(&site), [third, victim]);
    site.wait_ms(100);
    assert_eq!(line(&site), [victim, third]);
}

/// The least (loss, leases) of any set of leases on any machine, by brute force.
fn least(site: &Site, urgent: JobId, tokens: &[Token]) -> Option<(u64, u64, usize)> {
    let state = &site.state;
    let shape = &state.jobs.get(&urgent).unwrap().value.spec.shape;
    let mut best = None;
    for set in 1u32..1 << tokens.len() {
        let chosen: Vec<Token> = (0..tokens.len()).filter(|nth| set & 1 << nth != 0).map(|nth| tokens[nth]).collect();
        let fits = |node: &NodeId| {
            let alloc = state.free_after(*node, &chosen, TaskKey::only(urgent)).unwrap();
            statemachine::fit::room_for(&state.nodes.get(node).unwrap().value, &alloc, shape).is_ok()
        };
        if state.nodes.iter().any(|(node, _)| fits(node)) {
            let losses = chosen.iter().map(|token| state.loss(&state.leases.get(token).unwrap().value));
            let (gpu_ms, core_ms) = losses.fold((0, 0), |sum, loss| (sum.0 + loss.gpu_ms, sum.1 + loss.core_ms));
            let cost = (gpu_ms, core_ms, chosen.len());
            best = Some(best.map_or(cost, |least: (u64, u64, usize)| least.min(cost)));
        }
    }
    best
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, max_shrink_iters: 64, ..ProptestConfig::default() })]

    #[test]
    fn one_machine_is_freed_at_the_least_loss(
        jobs in proptest::collection::vec((1..5u16, any::<bool>(), 1..5_000u64), 2..11),
        wants in 1..9u16,
    ) {
        let mut site = site();
        for name in ["a", "b"] {
            site.join(name, hgx("h100"));
        }
        let mut tokens = Vec::new();
        for (gpus, low, ms) in jobs {
            let class = if low { "low" } else { "" };
            site.submit_of(class, "default", shape(1, 1, gpus));
            for token in site.start() {
                site.started(token);
                tokens.extend(low.then_some(token));
            }
            site.wait_ms(ms);
        }
        tokens.retain(|token| site.state.leases.get(token).is_some());
        let waiting: Vec<JobId> = site.state.index.queue.keys().map(|key| key.task.job).collect();
        waiting.into_iter().for_each(|job| drop(site.command(Command::Cancel { job })));
        let urgent = site.submit_of("high", "default", shape(1, 1, wants));
        let plan = site.plan();
        if !plan.places.is_empty() {
            return Ok(());
        }
        let told = plan.preempts.first().map(|made| {
            let losses = made.victims.iter().map(|token| site.state.loss(&site.state.leases.get(token).unwrap().value));
            let (gpu_ms, core_ms) = losses.fold((0, 0), |sum, loss| (sum.0 + loss.gpu_ms, sum.1 + loss.core_ms));
            (gpu_ms, core_ms, made.victims.len())
        });
        prop_assert_eq!(told, least(&site, urgent, &tokens));
        if let Some(made) = plan.preempts.first() {
            let outcome = preempt(&mut site, made);
            prop_assert!(matches!(outcome, Outcome::Done(_)), "{:?}", outcome);
        }
    }

    /// Jobs of all classes and two tenants come, run for random times and are preempted: every plan is accepted whole
    /// (none of its victims can be spared), nobody makes room or gives his turn more often than the policy lets him, and all come to an end.
    #[test]
    fn no_mix_thrashes(
        mix in proptest::collection::vec((0..4u8, 0..3u8, 0..4u8, any::<u8>()), 30..80),
    ) {
        let mut site = site();
        site.join("a", hgx("h100"));
        site.join("b", mock_v100());
        let guaranteed = Some([("h100".into(), 3), ("v100".into(), 2)].into());
        // In some mixes its own limit binds too.
        let limit_gpus = (mix.len() % 2 == 0).then_some(Some(8));
        site.tenant(SetTenant { name: "lab".into(), guaranteed, limit_gpus, ..SetTenant::default() });
        let (turn_gpu_ms, turn_run_ms) = (Some(3_000), Some(1_000));
        site.policy(SetPolicy { preemptions: Some(2), turn_gpu_ms, turn_run_ms, ..SetPolicy::default() });
        let mut jobs = Vec::new();
        for (class, tenant, gpus, what) in mix {
            let class = ["", "low", "mid", "high"][usize::from(class)];
            let tenant = if tenant == 0 { "lab" } else { "default" };
            let wide = if what % 5 == 0 { 2 } else { 1 };
            let gpus = [1, 2, 4, 3][usize::from(gpus)];
            jobs.push(site.submit_of(class, tenant, Shape { mix_types: wide == 2, ..shape(wide, 1, gpus) }));
            turn(&mut site);
            site.wait_ms(u64::from(what) * 40);
            let tokens = draining(&site.state);
            for token in tokens.into_iter().filter(|token| (token.0 ^ u64::from(what)) % 3 != 0) {
                site.drain(token);
            }
            let done = site.state.leases.iter().find(|(token, lease)| {
                lease.value.verdict.is_none() && (token.0 ^ u64::from(what)) % 4 == 0
            }).map(|(token, _)| *token);
            done.into_iter().for_each(|token| site.finish(token));
        }
        // Nothing new comes: each round something ends, so all do.
        for round in 0..jobs.len() * 6 {
            turn(&mut site);
            site.wait_ms(5_000);
            draining(&site.state).into_iter().for_each(|token| site.drain(token));
            let oldest = site.state.leases.iter().find(|(_, lease)| lease.value.verdict.is_none());
            let oldest = oldest.map(|(token, _)| *token);
            oldest.into_iter().for_each(|token| site.finish(token));
            prop_assert!(round + 1 < jobs.len() * 6 || site.state.index.queue.is_empty(), "some wait for ever");
        }
        for job in jobs {
            let task = site.state.tasks.get(&TaskKey::only(job)).map(|task| task.value.clone());
            if let Some(task) = task {
                prop_assert!(task.displaced <= 2, "job {job} made room {} times", task.displaced);
                let given = u64::from(task.had.given);
                prop_assert!(given * (given + 1) / 2 * 1_000 <= task.had.gpu_ms, "job {job}: {:?}", task.had);
                prop_assert!(matches!(task.phase, Phase::Ended { .. }), "job {job} is {:?}", task.phase);
            }
        }
    }
}
