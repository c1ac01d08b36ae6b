//! Those who use the group: clients that open sessions, repeat what they heard nothing of, and read; and one operator, who changes the
//! membership as the driver orders. They speak to the replicas' doors, whoever of them is running.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

use raft_node::door::ProposeError;
use statemachine::command::{Code, Outcome, Reply};
use statemachine::record::StoredReply;
use statemachine::{Cmd, Command, RequestId, SessionId};
use tokio::time::{sleep, timeout};

use super::group::{Running, peer};
use super::ledger::Ledger;
use super::stand_in;
use crate::sim::random::Rng;

/// A client hears nothing of a request for so long, then repeats it elsewhere.
const PATIENCE: Duration = Duration::from_millis(800);
const OPERATOR_RETRY: Duration = Duration::from_millis(100);
/// A session outlives every run: nobody ends one.
const TTL_MS: u64 = 3_600_000;

/// What the operator is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Until it is a voter.
    Add(u64),
    /// Until it is no member.
    Remove(u64),
    /// To anyone.
    Transfer,
    Snapshot,
}

/// What all of them share.
#[derive(Clone)]
pub struct Users {
    pub running: Running,
    pub ledger: Rc<RefCell<Ledger>>,
    pub orders: Rc<RefCell<VecDeque<Order>>>,
    /// Orders that were carried out.
    pub done: Rc<RefCell<Vec<Order>>>,
    /// No new request is made.
    pub rest: Rc<Cell<bool>>,
}

impl Users {
    pub fn new(running: Running) -> Self {
        Self { running, ledger: Rc::default(), orders: Rc::default(), done: Rc::default(), rest: Rc::default() }
    }

    /// All clients and the operator; never ends.
    pub async fn run(self, seed: u64) -> turmoil::Result {
        let mut rng = Rng::new(seed, 3);
        let pause = rng.range(8, 80);
        for nth in 0..rng.range(3, 6) {
            tokio::task::spawn_local(self.clone().client(nth, Rng::new(seed, 100 + nth), pause));
        }
        tokio::task::spawn_local(self.operator());
        std::future::pending().await
    }

    async fn client(self, nth: u64, mut rng: Rng, pause: u64) {
        let mut leader = None;
        for count in 0.. {
            sleep(Duration::from_millis(rng.range(pause / 2, pause * 2))).await;
            if self.rest.get() {
                continue;
            }
            if rng.chance(300) {
                self.read(&mut rng).await;
                continue;
            }
            // Some ask again for what was answered.
            let repeats = count > 0 && rng.chance(60);
            let request = nth << 32 | if repeats { rng.below(count) } else { count };
            self.open(request, &mut leader, &mut rng).await;
        }
    }

    /// Asks for a session until it is answered.
    async fn open(&self, request: u64, leader: &mut Option<u64>, rng: &mut Rng) {
        let id = request_id(request);
        let mut tries = 0;
        while !self.rest.get() {
            tries += 1;
            let to = leader.take().or_else(|| self.anyone(rng));
            let door = to.and_then(|to| Some(self.running.borrow().get(&to)?.door().clone()));
            let (Some(door), Some(to)) = (door, to) else {
                sleep(Duration::from_millis(rng.range(10, 100))).await;
                continue;
            };
            let body = Command::OpenSession { owner: format!("owner-{request}"), ttl_ms: TTL_MS };
            let cmd = Cmd { request: Some(id), actor: "client".to_owned(), body };
            match timeout(PATIENCE, door.propose(cmd)).await {
                // The leader's wall clock has leapt back behind the id's time: not for ever.
                Ok(Ok((Outcome::Rejected(why), _))) if why.code == Code::RequestFromFuture => {
                    self.ledger.borrow_mut().hit("a request was refused as one from the future");
                    sleep(Duration::from_millis(rng.range(20, 100))).await;
                }
                Ok(Ok((outcome, _))) => {
                    *leader = Some(to);
                    let index = self.running.borrow().get(&to).map_or(0, |replica| replica.applied().borrow().index);
                    if let Some(session) = self.session_in(outcome) {
                        if tries > 1 {
                            self.ledger.borrow_mut().hit("a request was answered after it was repeated");
                        }
                        self.ledger.borrow_mut().answered(request, session, index);
                    }
                    return;
                }
                Ok(Err(ProposeError::NotLeader(hint))) => {
                    *leader = hint.map(|(id, _)| id);
                    sleep(Duration::from_millis(rng.range(5, 60))).await;
                }
                Ok(Err(ProposeError::DiskFull)) => {
                    self.ledger.borrow_mut().hit("a command was refused for a full disk");
                    sleep(Duration::from_millis(rng.range(20, 100))).await;
                }
                Ok(Err(ProposeError::Unknown)) | Err(_) => {
                    let mut ledger = self.ledger.borrow_mut();
                    ledger.unknown += 1;
                    ledger.hit("the outcome of a request was unknown");
                }
                Ok(Err(_)) => sleep(Duration::from_millis(rng.range(20, 100))).await,
            }
        }
    }

    fn session_in(&self, outcome: Outcome) -> Option<SessionId> {
        match outcome {
            Outcome::Done(Reply::Stored(StoredReply::Session(session))) => Some(session),
            Outcome::Replayed(StoredReply::Session(session)) => {
                self.ledger.borrow_mut().hit("a repeated request was answered from the table");
                Some(session)
            }
            other => {
                let detail = format!("a request for a session was answered with {other:?}");
                self.ledger.borrow_mut().judge(super::checks::broken_if(true, "request_once", || detail));
                None
            }
        }
    }

    async fn read(&self, rng: &mut Rng) {
        let Some(at) = self.anyone(rng) else { return };
        let reads = self.running.borrow().get(&at).map(|replica| (replica.reads().clone(), replica.leads().is_some()));
        let Some((reads, leads)) = reads else { return };
        let before = self.ledger.borrow().now();
        match reads.read_index().await {
            Ok(_) => {
                // The state that the answer is taken from, as the API does it.
                if let Some(replica) = self.running.borrow().get(&at) {
                    replica.look(|state| self.ledger.borrow_mut().read(before, at, state));
                }
            }
            Err(_) if leads => self.ledger.borrow_mut().hit("a leader without a quorum refused a read"),
            Err(_) => {}
        }
    }

    fn anyone(&self, rng: &mut Rng) -> Option<u64> {
        let ids: Vec<u64> = self.running.borrow().keys().copied().collect();
        if ids.is_empty() { None } else { Some(rng.pick(&ids)) }
    }

    async fn operator(self) {
        loop {
            sleep(OPERATOR_RETRY).await;
            // It stays the first until it is done.
            let order = self.orders.borrow().front().copied();
            if let Some(order) = order
                && self.carry_out(order).await
            {
                self.orders.borrow_mut().pop_front();
                self.done.borrow_mut().push(order);
            }
        }
    }

    /// One try, at whoever is in office; whether it is done. The handle is kept as long as the call lasts: if the replica ends meanwhile,
    /// the call ends with it.
    async fn carry_out(&self, order: Order) -> bool {
        let leader = self.running.borrow().values().find(|replica| replica.is_leader()).cloned();
        let Some(leader) = leader else { return false };
        let members = leader.members();
        let voter = |id| members.iter().any(|member| member.id == id && member.voter);
        match order {
            Order::Add(id) if voter(id) => true,
            Order::Remove(id) if !members.iter().any(|member| member.id == id) => true,
            Order::Add(id) => {
                let _ = leader.add_learner(id, peer(id)).await;
                false
            }
            Order::Remove(id) => {
                let _ = leader.remove(id).await;
                false
            }
            // Tried once: there may be nobody to take it.
            Order::Transfer => {
                let moved = leader.transfer(None).await.is_ok();
                if moved {
                    self.ledger.borrow_mut().hit("leadership was handed over");
                }
                true
            }
            Order::Snapshot => {
                drop(leader);
                let all: Vec<u64> = self.running.borrow().keys().copied().collect();
                for id in all {
                    let replica = self.running.borrow().get(&id).cloned();
                    if let Some(replica) = replica
                        && replica.has_snapshot_of_now().await
                    {
                        self.ledger.borrow_mut().hit("a snapshot was made on order");
                    }
                }
                true
            }
        }
    }
}

/// A UUIDv7 of its own for each request, the same whenever it is repeated.
fn request_id(request: u64) -> RequestId {
    let mut id = [0; 16];
    id[..8].copy_from_slice(&((stand_in::WALL.as_millis() as u64) << 16 | 0x7000).to_be_bytes());
    id[8..].copy_from_slice(&request.to_be_bytes());
    id[8] |= 0x80;
    RequestId(id)
}
