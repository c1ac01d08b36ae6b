//! Which machines a job may be on: what is refused at its submission and at its placement.

mod world;

use std::collections::BTreeSet;

use statemachine::command::*;
use statemachine::selector::Selector;
use statemachine::spec::Shape;
use statemachine::*;
use world::*;

fn refusal(world: &mut World, nodes: u16, machines: Selector) -> String {
    let submit = job(Shape { machines: Some(Box::new(machines)), ..shape(nodes, 1, 1) });
    match world.run(Command::SubmitJob(Box::new(submit))) {
        Outcome::Rejected(refused) => refused.detail,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_job_is_refused_where_it_may_not_be() {
    let mut world = World::new();
    let label = |rack: &str| [("rack".to_owned(), rack.to_owned())].into();
    let nodes: Vec<NodeId> = (1u8..)
        .zip(["r1", "r1", "r2"])
        .map(|(nth, rack)| {
            world.register(RegisterNode { labels: label(rack), ..machine(&format!("n{nth}"), nth, 8) }).0
        })
        .collect();
    let named = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    let by_labels = |text: &str| Selector { constraint: text.parse().expect("a constraint"), ..Selector::default() };
    let wants =
        |nodes: u16, machines: Selector| job(Shape { machines: Some(Box::new(machines)), ..shape(nodes, 1, 1) });
    let only = Selector { only: named(&["n1", "n2"]), ..Selector::default() };
    let without = Selector { without: named(&["n1"]), ..Selector::default() };
    // Each with a machine that it may not have, the reason, and one that it may.
    let stories = [
        (by_labels("rack=r2"), 0, "node n1: the job's constraint does not hold", 2),
        (by_labels("rack!=r1"), 1, "node n2: the job's constraint does not hold", 2),
        (by_labels("ssd|rack&rack!=r2"), 2, "node n3: the job's constraint does not hold", 1),
        (without, 0, "node n1: the job excludes it", 1),
        (only.clone(), 2, "node n3: it is none of those that the job names", 0),
    ];
    for (selector, wrong, reason, right) in stories {
        let job = world.submit(wants(1, selector));
        let refused = world.place(job, &[nodes[wrong]]).unwrap_err();
        assert_eq!((refused.code, refused.detail.as_str()), (Code::NoFit, reason));
        world.place(job, &[nodes[right]]).expect("a machine that it may have");
    }
    let both = world.submit(wants(2, only));
    assert_eq!(world.place(both, &[nodes[1], nodes[2]]).unwrap_err().code, Code::NoFit);
    assert!(world.place(both, &[nodes[1], nodes[0]]).is_ok());

    // It runs on where the label changes; what starts next knows.
    let job = world.submit(wants(1, by_labels("rack=r2")));
    world.wait(1_000);
    let token = world.place(job, &[nodes[2]]).expect("a machine in r2");
    let third = machine("n3", 3, 8);
    let running = vec![RunningPart { token, job, gpus: vec![third.gpus[6].uuid], started: false }];
    world.wait(1_000);
    world.register(RegisterNode { labels: label("r9"), running, ..third });
    assert!(world.state.leases.contains(&token));
    world.state.check().expect("what counts is the label of that time");
}

#[test]
fn machines_are_named_within_limits() {
    let mut world = World::new();
    world.register(machine("n1", 1, 1));
    let many: BTreeSet<String> = (0..129).map(|nth| format!("m{nth}")).collect();
    let named = |name: &str| BTreeSet::from([name.to_owned()]);
    let refusals = [
        (Selector { only: named("n9"), ..Selector::default() }, "shape.nodelist names \"n9\", there is no such node"),
        (Selector { without: named("n9"), ..Selector::default() }, "shape.exclude names \"n9\", there is no such node"),
        (
            Selector { without: many, ..Selector::default() },
            "shape.nodelist and shape.exclude have 129 names, the limit is 128",
        ),
        (
            Selector { only: named("n1"), without: named("n1"), ..Selector::default() },
            "shape.nodelist and shape.exclude both name \"n1\"",
        ),
    ];
    for (selector, wanted) in refusals {
        assert_eq!(refusal(&mut world, 1, selector), wanted);
    }
    let two = Selector { only: named("n1"), ..Selector::default() };
    let wanted = "shape.nodelist has 1 names, shape.nodes is 2: it must name as many or more";
    assert_eq!(refusal(&mut world, 2, two), wanted);
}

/// Two whole GPUs, and one in two slices.
fn sliced() -> RegisterNode {
    let mut node = machine("n1", 1, 4);
    node.gpus[2..].iter_mut().for_each(|gpu| gpu.gpu_type = "a100-1g.5gb".into());
    node
}

fn of_type(gpu_type: &str, ranks: u16, gpus: u16) -> SubmitJob {
    SubmitJob { gpu_types: vec![gpu_type.into()], ..job(shape(1, ranks, gpus)) }
}

#[test]
fn slices_are_for_who_names_them_and_one_for_each_rank() {
    let mut world = World::new();
    let (node, _) = world.register(sliced());
    let any = world.submit(job(shape(1, 1, 1)));
    let mut place = world.placement(any, &[node]);
    place.parts[0].gpu_order = vec![2];
    let refused = world.plan(vec![place.clone()]).remove(0).expect_err("a slice");
    assert!(refused.detail.contains("of a type that the job does not accept"), "{}", refused.detail);
    place.parts[0].gpu_order = vec![0];
    world.plan(vec![place]).remove(0).expect("a whole one");

    let two = world.submit(of_type("a100-1g.5gb", 2, 1));
    let token = world.place(two, &[node]).expect("both slices");
    assert_eq!(world.state.leases.get(&token).unwrap().value.parts[0].gpu_order, [2, 3]);

    let refused = world.run(Command::SubmitJob(Box::new(of_type("a100-1g.5gb", 1, 2))));
    let Outcome::Rejected(refused) = refused else { panic!("{refused:?}") };
    assert_eq!(refused.code, Code::InvalidSpec);
    assert!(
        refused.detail.contains("shape.gpus_per_rank is 2, must be 1 with gpu_types a100-1g.5gb"),
        "{}",
        refused.detail
    );
}
