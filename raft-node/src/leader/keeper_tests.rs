//! The lease keeper by itself: what is due when, and what a heartbeat is answered, at the edges of the inequality.

use statemachine::command::PartReport;
use statemachine::record::{ExitCause, KillStrength, Session};

use super::*;
use crate::leader::desired::desired;

use crate::leader::world::{self, World, ended, job, machine, one_gpu, shape};

/// TTL of the stories' jobs.
const TTL_MS: u64 = 10_000;
/// The longest silence that ends nothing.
const PATIENCE_MS: u64 = TTL_MS + TTL_MS / 100 + KILL_MARGIN_MS;

/// A node with one lease, in an office that began at 0.
struct Site {
    world: World,
    node: NodeId,
    epoch: u64,
    token: Token,
    keeper: Keeper,
}

impl Site {
    fn new() -> Self {
        Self::on(machine("n1", 1, 1))
    }

    fn on(machine: statemachine::command::RegisterNode) -> Self {
        let mut world = World::new();
        let (node, epoch) = world.register(machine);
        let job = world.submit(one_gpu());
        let token = world.place(job, &[node]).unwrap();
        let keeper = Keeper::new(&world.state, 0);
        Self { world, node, epoch, token, keeper }
    }

    fn start(&mut self) {
        self.world.report(self.node, self.token, PartReport::Started { port: 1 }).unwrap();
    }

    fn hear(&mut self, now_ms: u64) -> bool {
        self.keeper.hear(&self.world.state, self.node, self.epoch, now_ms)
    }

    fn due(&mut self, now_ms: u64) -> Vec<Command> {
        self.keeper.due(&self.world.state, now_ms, 0)
    }

    fn extended(&self) -> Vec<Token> {
        match self.keeper.answer(&self.world.state, self.node, self.epoch) {
            Answer::Extend(tokens) => tokens,
            other => panic!("{other:?}"),
        }
    }

    fn silent(&self) -> Vec<Command> {
        vec![Command::NodeSilent { node: self.node, epoch: self.epoch, tokens: vec![self.token] }]
    }
}

#[test]
fn a_lease_ends_only_after_its_ttl_the_drift_and_the_kill_margin() {
    let mut site = Site::new();
    assert_eq!(site.due(PATIENCE_MS), vec![]);
    assert_eq!(site.extended(), vec![site.token]);
    assert_eq!(site.due(PATIENCE_MS + 1), site.silent());
}

#[test]
fn the_end_counts_from_the_receipt_of_the_newest_heartbeat() {
    let mut site = Site::new();
    site.hear(7_000);
    assert_eq!(site.due(7_000 + PATIENCE_MS), vec![]);
    assert_eq!(site.due(7_000 + PATIENCE_MS + 1), site.silent());
}

#[test]
fn a_new_office_gives_every_agent_and_session_a_full_ttl() {
    let mut site = Site::new();
    site.world.run(Command::OpenSession { owner: "ada".into(), ttl_ms: 5_000 });
    site.keeper = Keeper::new(&site.world.state, 50_000);
    assert_eq!(site.due(50_000 + 5_050), vec![]);
    assert_eq!(site.due(50_000 + 5_051), vec![Command::EndSession { session: SessionId(1) }]);
    assert_eq!(site.due(50_000 + PATIENCE_MS).len(), 1, "the session's end again");
    assert!(site.due(50_000 + PATIENCE_MS + 1).contains(&site.silent()[0]));
}

#[test]
fn a_lease_whose_end_was_proposed_is_never_extended_again() {
    let mut site = Site::new();
    site.due(PATIENCE_MS + 1);
    assert!(site.hear(PATIENCE_MS + 2), "it was unheard");
    assert_eq!(site.extended(), vec![]);
    // The proposal was lost, and the agent is heard all the time.
    site.hear(60_000);
    assert_eq!(site.extended(), vec![]);
    assert_eq!(site.due(60_000), site.silent());
}

#[test]
fn a_proposed_end_is_proposed_again_until_it_is_applied() {
    let mut site = Site::new();
    let first = PATIENCE_MS + 1;
    assert_eq!(site.due(first), site.silent());
    assert_eq!(site.due(first + REPROPOSE_MS - 1), vec![]);
    assert_eq!(site.due(first + REPROPOSE_MS), site.silent());
    let end = site.silent().remove(0);
    site.world.run(end);
    assert_eq!(site.due(first + 10 * REPROPOSE_MS), vec![]);
    assert!(!site.keeper.has_ending(site.node));
}

#[test]
fn the_end_of_one_part_keeps_the_whole_gang_from_being_extended() {
    let mut world = World::new();
    let (one, _) = world.register(machine("n1", 1, 1));
    let (two, epoch) = world.register(machine("n2", 2, 1));
    let gang = world.submit(job(shape(2, 1, 1)));
    world.place(gang, &[one, two]).unwrap();
    let mut keeper = Keeper::new(&world.state, 0);
    keeper.hear(&world.state, two, epoch, 10_000);
    assert_eq!(keeper.due(&world.state, PATIENCE_MS + 1, 0).len(), 1, "of the first node alone");
    assert_eq!(keeper.answer(&world.state, two, epoch), Answer::Extend(vec![]));
}

#[test]
fn an_acknowledgement_names_only_what_lives_on_the_node() {
    let mut site = Site::new();
    let (other, epoch) = site.world.register(machine("n2", 2, 1));
    assert_eq!(site.keeper.answer(&site.world.state, other, epoch), Answer::Extend(vec![]));
    assert_eq!(site.extended(), vec![site.token]);
    site.start();
    site.world.report(site.node, site.token, ended(0, 1, 0)).unwrap();
    assert_eq!(site.extended(), vec![]);
}

#[test]
fn a_cancelled_attempt_is_extended_while_it_drains_and_a_lost_one_is_not() {
    let mut site = Site::new();
    site.start();
    site.world.run(Command::Cancel { job: statemachine::JobId(1) });
    assert_eq!(site.extended(), vec![site.token]);
    let mut site = Site::new();
    site.start();
    let exit = world::exits(0, 1, 9, ExitCause::LeaseEnd);
    site.world.report(site.node, site.token, PartReport::Exited { exits: exit, released: false }).unwrap();
    assert_eq!(site.extended(), vec![]);
}

#[test]
fn a_heartbeat_of_another_epoch_is_not_heard_and_is_sent_to_register() {
    let mut site = Site::new();
    for (epoch, superseded) in [(site.epoch - 1, true), (site.epoch + 1, false)] {
        assert!(!site.keeper.hear(&site.world.state, site.node, epoch, 9_000));
        let answer = site.keeper.answer(&site.world.state, site.node, epoch);
        assert!(matches!(answer, Answer::Reregister { superseded: is, .. } if is == superseded), "{answer:?}");
    }
    assert!(!site.keeper.hear(&site.world.state, NodeId(77), 1, 9_000));
    assert_eq!(site.due(PATIENCE_MS + 1), site.silent());
}

#[test]
fn after_a_restore_an_agent_is_sent_to_register_until_another_one_has() {
    let mut site = Site::new();
    site.world.run(Command::Restore { generation: 9 });
    let answer = |site: &Site| site.keeper.answer(&site.world.state, site.node, site.epoch);
    // No agent is newer than it: its epoch is of the life before.
    assert!(matches!(answer(&site), Answer::Reregister { superseded: false, .. }), "{:?}", answer(&site));
    let machine = world::machine("n1", 1, 4);
    let (node, _) = site.world.register(machine);
    assert_eq!(node, site.node);
    assert!(matches!(answer(&site), Answer::Reregister { superseded: true, .. }), "{:?}", answer(&site));
}

#[test]
fn a_part_that_a_registration_did_not_name_ends_a_ttl_after_it_was_seen_so() {
    let mut site = Site::new();
    site.start();
    let (_, epoch) = site.world.register(machine("n1", 1, 1));
    site.epoch = epoch;
    assert_eq!(site.due(20_000), vec![]);
    for now_ms in [20_001, 30_000, 20_000 + PATIENCE_MS] {
        site.hear(now_ms);
        assert_eq!(site.extended(), vec![]);
        assert_eq!(site.due(now_ms), vec![]);
    }
    assert_eq!(site.due(20_000 + PATIENCE_MS + 1), site.silent());
}

#[test]
fn a_stuck_part_is_neither_extended_nor_proposed_again() {
    let mut weak = machine("n1", 1, 1);
    weak.kill = KillStrength::Weak;
    let mut site = Site::on(weak);
    site.start();
    let end = site.due(PATIENCE_MS + 1).remove(0);
    site.world.run(end);
    assert_eq!(site.due(10 * PATIENCE_MS), vec![]);
    assert_eq!(site.extended(), vec![]);
}

#[test]
fn what_has_not_begun_does_not_begin_once_its_end_was_proposed() {
    let mut site = Site::new();
    let held = |site: &Site| {
        let set = desired(&site.world.state, site.node, |token| site.keeper.is_ending(token, site.node)).unwrap();
        set.leases.iter().map(|lease| lease.token).collect::<Vec<_>>()
    };
    assert_eq!(held(&site), vec![site.token.0]);
    site.due(PATIENCE_MS + 1);
    assert_eq!(held(&site), Vec::<u64>::new());
    // What runs is left to its deadline: told to end it would count as failed.
    site.start();
    assert_eq!(held(&site), vec![site.token.0]);
}

#[test]
fn a_lease_that_does_not_start_in_time_is_due_by_the_clusters_clock() {
    let mut site = Site::new();
    let lease = &site.world.state.leases.get(&site.token).unwrap().value;
    let at = lease.granted_ms + site.world.state.meta.settings.start_timeout_ms;
    let due = |site: &mut Site, cluster_ms| site.keeper.due(&site.world.state, 1, cluster_ms);
    assert_eq!(due(&mut site, at), vec![]);
    let timeout = Command::LeaseDue { token: site.token, cause: DueCause::StartTimeout };
    assert_eq!(due(&mut site, at + 1), vec![timeout]);
    assert_eq!(due(&mut site, at + 2), vec![], "it is on its way");
    site.start();
    assert_eq!(site.keeper.due(&site.world.state, REPROPOSE_MS + 1, at + 9_999), vec![]);
}

#[test]
fn a_time_limit_is_the_leaders_business_only_when_the_shim_is_late() {
    let mut world = World::new();
    let (node, _) = world.register(machine("n1", 1, 1));
    let mut limited = one_gpu();
    limited.spec.limit_ms = 30_000;
    let grace_ms = limited.spec.kill_grace_ms;
    let id = world.submit(limited);
    let token = world.place(id, &[node]).unwrap();
    world.report(node, token, PartReport::Started { port: 1 }).unwrap();
    let started = world.state.leases.get(&token).unwrap().value.started_ms.unwrap();
    let mut keeper = Keeper::new(&world.state, 0);
    let at = started + 30_000 + grace_ms + LIMIT_SLACK_MS;
    assert_eq!(keeper.due(&world.state, 1, at), vec![]);
    assert_eq!(keeper.due(&world.state, 1, at + 1), vec![Command::LeaseDue { token, cause: DueCause::TimeLimit }]);
}

#[test]
fn a_session_whose_end_was_proposed_is_not_kept_alive_and_a_late_note_takes_nothing_back() {
    let mut world = World::new();
    world.run(Command::OpenSession { owner: "ada".into(), ttl_ms: 5_000 });
    let id = SessionId(1);
    let ttl_ms = world.state.sessions.get(&id).map(|session: &Session| session.ttl_ms).unwrap();
    let mut keeper = Keeper::new(&world.state, 0);
    keeper.hear_session(id, 4_000);
    keeper.hear_session(id, 3_000);
    let last = 4_000 + ttl_ms + ttl_ms / 100;
    assert_eq!(keeper.due(&world.state, last, 0), vec![]);
    assert!(keeper.session_alive(&world.state, id));
    assert_eq!(keeper.due(&world.state, last + 1, 0), vec![Command::EndSession { session: id }]);
    assert!(!keeper.session_alive(&world.state, id));
}

#[test]
fn a_node_is_planned_on_only_while_it_is_heard() {
    let mut site = Site::new();
    let (idle, epoch) = site.world.register(machine("n2", 2, 1));
    let unheard = |site: &Site, now_ms| site.keeper.unheard(&site.world.state, now_ms);
    assert_eq!(unheard(&site, UNHEARD_MS), BTreeSet::from([idle]), "never heard in this term");
    assert_eq!(unheard(&site, UNHEARD_MS + 1), BTreeSet::from([site.node, idle]));
    assert!(site.keeper.hear(&site.world.state, idle, epoch, UNHEARD_MS + 1));
    assert!(!site.keeper.hear(&site.world.state, idle, epoch, UNHEARD_MS + 2));
    assert_eq!(unheard(&site, UNHEARD_MS + 2), BTreeSet::from([site.node]));
}
