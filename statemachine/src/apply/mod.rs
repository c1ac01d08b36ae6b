//! Applies entries of the replicated log: deterministic, without clock, randomness or IO. One command, one file; this
//! one owns the order of things inside an entry, and what every command shares.
//!
//! A command checks everything, then changes; a refused command has changed nothing.

mod calendar;
mod cancel;
mod checkpoint;
mod clock;
mod compact;
mod confirm_dead;
mod dependents;
mod gpu_health;
mod hold;
mod lease_due;
mod lock;
mod member;
mod node_admin;
mod node_silent;
mod owned;
mod peers;
mod plan;
mod policy;
mod preempt;
mod register;
mod report;
mod requests;
mod reservation;
pub(crate) mod restore;
mod retain;
mod session;
mod submit;
mod tenant;

use planted::{Bug, planted};

use crate::command::*;
use crate::event::Change;
use crate::id::*;
use crate::record::*;
use crate::settings::Settings;
use crate::state::{NameKind, State};

/// The feature level of this binary: commands of a higher one are unknown to it.
pub const LEVEL: u16 = 1;

/// The entry needs a newer binary. This replica must stop; it never skips an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the log needs feature level {needs}, this binary knows {LEVEL}: install a newer one")]
pub struct TooNew {
    pub needs: u16,
}

/// What surrounds one command.
pub(crate) struct Ctx<'a> {
    pub salt: u64,
    pub actor: &'a str,
    pub request: Option<RequestId>,
    /// The revision that this command gets if it changes the keyspace.
    pub rev: Revision,
    changes: Vec<Change>,
}

impl<'a> Ctx<'a> {
    fn new(state: &State, salt: u64, actor: &'a str, request: Option<RequestId>) -> Self {
        let rev = Revision(state.meta.rev.0.saturating_add(1));
        Self { salt, actor, request, rev, changes: Vec::new() }
    }

    pub(crate) fn tell(&mut self, change: Change) {
        self.changes.push(change);
    }
}

impl Rejection {
    pub fn new(code: Code, detail: impl Into<String>) -> Self {
        Self { code, detail: detail.into() }
    }
}

impl State {
    /// The state of a new cluster: one tenant, one queue, nothing else.
    pub fn new(cluster: [u8; 16], settings: Settings) -> Self {
        let meta = Meta {
            cluster,
            next_job: 1,
            next_node: 1,
            next_class: 1,
            next_user: 1,
            next_gpu_type: 1,
            next_session: 1,
            next_tenant: 1,
            next_reservation: 1,
            level: LEVEL,
            settings,
            request_horizon_wall_ms: i64::MIN,
            ..Meta::default()
        };
        let mut state = State { meta, ..State::default() };
        state.tenants.insert(TenantId(0), Tenant { name: "default".into(), ..Tenant::default() });
        state.index.tenant_by_name.insert("default".into(), TenantId(0));
        state.queues.insert(QueueId(0), Queue { name: "default".into(), tenant: TenantId(0) });
        state
    }

    /// Applies one entry: time, due timers, commands, chores. One outcome per command, in order.
    pub fn apply(&mut self, entry: &Entry) -> Result<Vec<Outcome>, TooNew> {
        if entry.level > LEVEL {
            return Err(TooNew { needs: entry.level });
        }
        self.meta.clock_ms = self.meta.clock_ms.max(entry.clock_ms);
        self.meta.wall_ms = entry.wall_ms;
        clock::fire_timers(self, entry.salt);
        let outcomes = entry.cmds.iter().map(|cmd| self.run(cmd, entry.salt)).collect();
        clock::run_chores(self, entry.salt);
        #[cfg(debug_assertions)]
        self.check_now_and_then();
        Ok(outcomes)
    }

    /// The position of the last entry applied, as the consensus layer counts.
    pub fn set_applied(&mut self, applied: LogPosition) {
        if planted(Bug::DedupInLeader) && applied.term != self.meta.applied.term {
            self.requests = Default::default();
            self.index.requests = Default::default();
        }
        self.meta.applied = applied;
    }

    /// The consensus layer's membership, opaque here.
    pub fn set_membership(&mut self, membership: Vec<u8>) {
        self.meta.membership = membership;
    }

    /// The cluster time at which a timer or chore is due: from then on the leader proposes a `Tick`.
    pub fn next_due_ms(&self) -> Option<u64> {
        clock::next_due_ms(self)
    }

    /// The wall time at which a begin or a deadline is due: from then on the leader proposes a `Tick`.
    pub fn next_due_wall_ms(&self) -> Option<i64> {
        self.index.calendar.get_min().map(|rule| rule.due_wall_ms)
    }

    fn run(&mut self, cmd: &Cmd, salt: u64) -> Outcome {
        let digest = match requests::admit(self, cmd) {
            requests::Admitted::Fresh(digest) => digest,
            requests::Admitted::Known(reply) => return Outcome::Replayed(reply),
            requests::Admitted::Refused(rejection) => return Outcome::Rejected(rejection),
        };
        let mut ctx = Ctx::new(self, salt, &cmd.actor, cmd.request);
        match self.dispatch(&mut ctx, &cmd.body) {
            Ok(reply) => {
                if let (Some(id), Some(digest), Reply::Stored(reply)) = (cmd.request, digest, &reply) {
                    requests::remember(self, id, digest, *reply);
                }
                self.finish(ctx);
                Outcome::Done(reply)
            }
            Err(rejection) => {
                debug_assert!(ctx.changes.is_empty(), "{rejection:?} was refused after it had changed something");
                Outcome::Rejected(rejection)
            }
        }
    }

    fn dispatch(&mut self, ctx: &mut Ctx<'_>, command: &Command) -> Result<Reply, Rejection> {
        match command {
            Command::SubmitJob(submit) => submit::apply(self, ctx, submit),
            Command::Cancel { job } => cancel::apply(self, ctx, *job),
            Command::Plan(plan) => plan::apply(self, ctx, plan),
            Command::RegisterNode(register) => register::apply(self, ctx, register),
            Command::GpuHealth(change) => gpu_health::apply(self, ctx, change),
            Command::Report(report) => report::apply(self, ctx, report),
            Command::NodeSilent { node, epoch, tokens } => node_silent::apply(self, ctx, *node, *epoch, tokens),
            Command::LeaseDue { token, cause } => lease_due::apply(self, ctx, *token, *cause),
            Command::ConfirmDead { node, token } => confirm_dead::apply(self, ctx, *node, *token),
            Command::OpenSession { owner, ttl_ms } => session::open(self, owner, *ttl_ms),
            Command::EndSession { session } => session::end(self, ctx, *session),
            Command::Acquire { session, name } => lock::acquire(self, ctx, *session, name),
            Command::Unlock { session, name } => lock::unlock(self, ctx, *session, name),
            Command::Member { replica, level } => member::apply(self, *replica, *level),
            Command::Compact { rev } => compact::apply(self, *rev),
            Command::Retain { bucket } => retain::apply(self, *bucket),
            Command::Mark | Command::Tick => Ok(Reply::Stored(StoredReply::Done)),
            Command::NodeAdmin { node, out } => node_admin::apply(self, ctx, *node, out.as_ref()),
            Command::Hold { job } => hold::hold(self, ctx, *job),
            Command::Release { job } => hold::release(self, ctx, *job),
            Command::Requeue { job } => hold::requeue(self, ctx, *job),
            Command::SetTenant(set) => tenant::set(self, set),
            Command::RemoveTenant { name } => tenant::remove(self, name),
            Command::SetPriority(set) => tenant::set_priority(self, set),
            Command::RemovePriority { name } => tenant::remove_priority(self, name),
            Command::Restore { generation } => restore::apply(self, ctx, *generation),
            Command::SetPolicy(set) => policy::set(self, set),
            Command::Preempt(preempt) => preempt::apply(self, ctx, preempt),
            Command::Checkpoint { token, path, step } => checkpoint::apply(self, *token, path, *step),
            Command::CreateReservation(create) => reservation::create(self, ctx, create),
            Command::EndReservation { name } => reservation::end(self, name),
        }
    }

    fn finish(&mut self, ctx: Ctx<'_>) {
        #[cfg(debug_assertions)]
        let touched = crate::check::Touched::by(&ctx.changes);
        self.publish(ctx.changes);
        #[cfg(debug_assertions)]
        self.assert_touched(&touched);
    }

    /// A token above all earlier ones. Only a command that keeps the token may draw one.
    pub(crate) fn mint(&mut self) -> Option<Token> {
        self.meta.token = self.meta.token.next()?;
        if planted(Bug::TokenFromMemory) {
            self.meta.token = Token(planted::process_memory());
        }
        Some(self.meta.token)
    }

    /// The id of a user name, a new one if it is new. Ids are never reused; 2^32 names do not fit in memory.
    pub(crate) fn intern_user(&mut self, name: &str) -> UserId {
        if let Some(id) = self.index.names.get(&(NameKind::User, name.to_owned())) {
            return UserId(*id);
        }
        let id = UserId(self.meta.next_user);
        self.meta.next_user = self.meta.next_user.saturating_add(1);
        self.names.insert(NameKey::User(id), name.to_owned());
        self.index.names.insert((NameKind::User, name.to_owned()), id.0);
        id
    }

    pub(crate) fn gpu_type(&self, name: &str) -> Option<GpuTypeId> {
        let id = self.index.names.get(&(NameKind::GpuType, name.to_owned()))?;
        u16::try_from(*id).ok().map(GpuTypeId)
    }

    /// The id of a GPU type, a new one if it is new. The caller made sure with [`State::gpu_types_left`] that there is
    /// room.
    pub(crate) fn intern_gpu_type(&mut self, name: &str) -> GpuTypeId {
        if let Some(id) = self.gpu_type(name) {
            return id;
        }
        let id = GpuTypeId::named(name, self.meta.next_gpu_type);
        self.meta.next_gpu_type = self.meta.next_gpu_type.saturating_add(1);
        self.names.insert(NameKey::GpuType(id), name.to_owned());
        self.index.names.insert((NameKind::GpuType, name.to_owned()), u32::from(id.0));
        id
    }

    /// Refuses names that would go over the GPU types that ids can name.
    pub(crate) fn gpu_types_left<'a>(&self, names: impl Iterator<Item = &'a str>) -> Result<(), Rejection> {
        let fresh: std::collections::BTreeSet<&str> = names.filter(|name| self.gpu_type(name).is_none()).collect();
        let left = usize::from(GpuTypeId::MOST.saturating_sub(self.meta.next_gpu_type));
        if fresh.len() > left {
            let detail = format!("{} new GPU types, {left} can still be named", fresh.len());
            return Err(Rejection::new(Code::Limit, detail));
        }
        Ok(())
    }

    /// The node, refused when unknown or when it has registered since.
    pub(crate) fn node_of_epoch(&self, node: NodeId, epoch: u64) -> Result<&Node, Rejection> {
        let found = self.nodes.get(&node).ok_or_else(|| unknown_node(node))?;
        if found.value.epoch != epoch {
            let detail = format!("epoch is {epoch}, node {} is in epoch {}", found.value.name, found.value.epoch);
            return Err(Rejection::new(Code::EpochStale, detail));
        }
        Ok(&found.value)
    }

    /// Counts a shown change of the node, and tells it.
    pub(crate) fn show_node(&mut self, ctx: &mut Ctx<'_>, node: NodeId) {
        self.nodes.update(&node, |record| record.bump(ctx.rev));
        if let Some(record) = self.nodes.get(&node) {
            ctx.tell(Change::NodeShown { node, record: Box::new(record.value.clone()) });
        }
    }
}

pub(crate) fn unknown_node(node: NodeId) -> Rejection {
    Rejection::new(Code::NotFound, format!("there is no node {node}"))
}

const DONE: Result<Reply, Rejection> = Ok(Reply::Stored(StoredReply::Done));
