//! Jobs that say how many GPUs they want and not on how many machines: what is settled at submission, and which placements
//! are taken.

mod world;

use statemachine::command::{PartReport, SubmitJob};
use statemachine::spec::{Shape, Terms};
use statemachine::*;
use world::*;

fn stored(world: &World, job: JobId) -> (u16, u16, u16) {
    let shape = &world.state.jobs.get(&job).expect("a job").value.spec.shape;
    (shape.nodes, shape.ranks_per_node, shape.gpus_per_rank)
}

fn refusal(world: &mut World, shape: Shape) -> (Code, String) {
    match world.run(Command::SubmitJob(Box::new(job(shape)))) {
        Outcome::Rejected(refused) => (refused.code, refused.detail),
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_one_machine_holds_is_of_one_machine() {
    let mut world = World::new();
    let early = world.submit(job(shape(0, 1, 8)));
    assert_eq!(stored(&world, early), (0, 1, 8), "no machine is there");
    world.register(machine("n1", 1, 8));
    for (gpus, nodes) in [(1, 1), (2, 1), (8, 1), (9, 0), (16, 0)] {
        let job = world.submit(job(shape(0, 1, gpus)));
        assert_eq!(stored(&world, job), (nodes, 1, gpus));
    }
    let of_none = SubmitJob { gpu_types: vec!["tpu".into()], ..job(shape(0, 1, 8)) };
    let of_none = world.submit(of_none);
    assert_eq!(stored(&world, of_none), (0, 1, 8));
    let one_each = world.submit(job(shape(0, 16, 1)));
    assert_eq!(stored(&world, one_each), (1, 16, 1), "nothing can be cut");
}

#[test]
fn equal_parts_are_taken_whatever_their_number() {
    let mut world = World::new();
    let nodes: Vec<NodeId> = (1u8..=4).map(|nth| world.register(machine(&format!("n{nth}"), nth, 8)).0).collect();
    for (count, each) in [(2, 6), (3, 4), (4, 3)] {
        let job = world.submit(job(shape(0, 1, 12)));
        let token = world.place(job, &nodes[..count]).expect("equal parts");
        let lease = world.state.leases.get(&token).expect("a lease").value.clone();
        assert!(lease.parts.iter().all(|part| part.gpu_order.len() == each && part.ranks == 1));
        assert_eq!(world.state.check(), Ok(()));
        let nodes: Vec<NodeId> = lease.parts.iter().map(|part| part.node).collect();
        world.run(Command::Cancel { job });
        for node in nodes {
            world.report(node, token, PartReport::Released).expect("its part");
        }
    }
}

#[test]
fn other_parts_are_refused() {
    let mut world = World::new();
    let nodes: Vec<NodeId> = (1u8..=5).map(|nth| world.register(machine(&format!("n{nth}"), nth, 8)).0).collect();
    let twelve = world.submit(job(shape(0, 2, 6)));
    let refused = world.place(twelve, &nodes).expect_err("five parts of twelve");
    let wanted = "the placement has 40 GPUs in 5 parts, must have 12 in equal ones";
    assert_eq!((refused.code, refused.detail.as_str()), (Code::NoFit, wanted));
    // Whoever has one GPU less on one machine and one more on another has no equal parts.
    let mut place = world.placement(twelve, &nodes[..2]);
    let moved = place.parts[0].gpu_order.pop().expect("six");
    place.parts[1].gpu_order.push(7);
    let refused = world.plan(vec![place.clone()]).remove(0).expect_err("five and seven");
    assert_eq!((refused.code, refused.detail.as_str()), (Code::NoFit, "node n1: gpu_order names 5 slots, must be 6"));
    place.parts[0].gpu_order.push(moved);
    assert_eq!(world.plan(vec![place]).remove(0).expect_err("six and seven").code, Code::NoFit);
    assert!(world.place(twelve, &nodes[..3]).is_ok(), "two ranks with two GPUs on each of three");
}

#[test]
fn an_elastic_job_has_one_of_its_sizes() {
    let mut world = World::new();
    let nodes: Vec<NodeId> = (1u8..=4).map(|nth| world.register(machine(&format!("n{nth}"), nth, 8)).0).collect();
    let elastic = |each: u16, doublings: u8| {
        let mut submit = job(shape(0, 1, each));
        submit.spec.terms = Some(Box::new(Terms { doublings, ..Terms::default() }));
        submit
    };
    let job = world.submit(elastic(4, 2));
    assert_eq!(stored(&world, job), (0, 1, 4), "how many machines depends on its size");
    let mut twelve = world.grown(job, &nodes[..2], 1);
    let third = world.grown(job, &nodes[2..], 1).parts.remove(0);
    twelve.parts.push(third);
    let refused = world.plan(vec![twelve]).remove(0).expect_err("twelve");
    let wanted = "the placement has 12 GPUs in 3 parts, must have 4 or 8 or 16 in equal ones";
    assert_eq!((refused.code, refused.detail.as_str()), (Code::NoFit, wanted));
    for (times, gpus) in [(2, 16), (1, 8), (0, 4)] {
        let place = world.grown(job, &nodes[..2], times);
        let attempt = place.attempt;
        let token = world.plan(vec![place]).remove(0).expect("one of its sizes");
        let lease = world.state.leases.get(&token).expect("a lease").value.clone();
        let held: usize = lease.parts.iter().map(|part| part.gpu_order.len()).sum();
        assert_eq!((held, lease.attempt, lease.amounts.all_gpus()), (gpus, attempt, gpus as u64));
        assert_eq!(world.state.check(), Ok(()));
        world.run(Command::Requeue { job });
        for part in &lease.parts {
            world.report(part.node, token, PartReport::Released).expect("its part");
        }
    }
}

#[test]
fn sizes_are_of_open_jobs() {
    let mut world = World::new();
    let mut refused = |nodes: u16, each: u16, doublings: u8| {
        let mut submit = job(shape(nodes, 1, each));
        submit.spec.terms = Some(Box::new(Terms { doublings, ..Terms::default() }));
        match world.run(Command::SubmitJob(Box::new(submit))) {
            Outcome::Rejected(refused) => refused.detail,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(refused(2, 4, 1), "doublings is 1, must be 0 where shape.nodes is not 0, it is 2");
    assert_eq!(refused(0, 4, 14), "doublings is 14: 4 GPUs of a rank doubled as often are more than 65535");
}

#[test]
fn what_no_machines_could_hold_is_refused() {
    let mut world = World::new();
    let refused = refusal(&mut world, shape(0, 1, 4_099));
    let wanted = "shape.gpus_per_rank is 4099: 4099 GPUs can't be cut into equal parts on at most 2048 machines of at most \
                  128; 4098 as 683 x 6 or 4100 as 41 x 100 would fit";
    assert_eq!(refused, (Code::NeverFits, wanted.into()));
    assert_eq!(
        refusal(&mut world, shape(0, 1, 0)),
        (Code::InvalidSpec, "shape.nodes is 0, must be at least 1 without GPUs".into())
    );
}
