//! The auditor: what must hold, judged from the outside. It follows the log with a simple model of its own, and the simulated machines
//! tell it which process really ran where and when.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use gpu_agent::shim::record::Exit;
use proto::v1::DesiredLease;
use raft_node::leader::desired::gpu_uuids;
use statemachine::command::{Code, Outcome, Reply};
use statemachine::event::Change;
use statemachine::record::{AttemptRow, Element, Part, PartState, StoredReply, TaskOutcome, VerdictKind};
use statemachine::spec::AfterKind;
use statemachine::{Command, Entry, JobId, NodeId, RequestId, Revision, SessionId, State, TaskKey, Token};

use super::agent::AGENTS_PER_RACK;
use super::event::Event;
use super::machine::Key;
use super::world::{TURN_RUN_MS, World};

/// How long a process may go on after its machine woke: until its shim's timer has fired and the kernel has killed.
const WAKING_US: u64 = 2_500_000;

/// One rank's process, as it really was.
#[derive(Clone, Debug)]
struct Rank {
    job: u64,
    number: u32,
    world: u32,
    nodes: u32,
    gpus: Vec<String>,
    began: bool,
    excused_until: u64,
}

type Id = (usize, u64, u32);

#[derive(Default)]
pub struct Audit {
    /// Entries followed.
    pub applied: u64,
    pub offices: u64,
    /// Newest epoch of each node.
    pub epochs: BTreeMap<u32, u64>,
    token: Token,
    lock_token: Token,
    /// Jobs by the log; true = it ended.
    pub jobs: BTreeMap<JobId, bool>,
    /// Which job each task of an array became.
    tasks: BTreeMap<(JobId, u32), JobId>,
    requests: BTreeMap<RequestId, (Arc<Entry>, usize, StoredReply)>,
    leases: BTreeMap<Token, u32>,
    results: BTreeMap<JobId, Token>,
    ranks: BTreeMap<Id, Rank>,
    alive: BTreeSet<Id>,
    /// Exits by token and number of the rank in its gang.
    exits: BTreeMap<(u64, u32), Exit>,
    pub started: u64,
    ended_sessions: BTreeSet<SessionId>,
    /// The run is over.
    pub over: bool,
}

impl Audit {
    /// Whether a process of this attempt is alive on this machine.
    pub fn runs(&self, agent: usize, token: u64) -> bool {
        self.alive.range((agent, token, 0)..=(agent, token, u32::MAX)).next().is_some()
    }
}

impl World {
    /// The first replica that applied this entry: what it says is compared with the model's word.
    pub fn audit_entry(&mut self, at: usize, index: u64, seen: Revision, entry: Option<&Entry>, outcomes: &[Outcome]) {
        self.audit.applied = index;
        if entry.is_some() && self.raft.log[index as usize - 1].entry.is_some() {
            let shared = self.raft.log[index as usize - 1].entry.clone().unwrap_or_else(|| unreachable!());
            for (place, outcome) in outcomes.iter().enumerate() {
                self.audit_command(&shared, place, outcome);
                self.audit_freed(at, &shared.cmds[place].body);
            }
        }
        let replica = &self.replicas[at];
        let Ok(events) = replica.state.events_since(seen) else { return };
        let events: Vec<_> = events.cloned().collect();
        for event in events {
            self.audit_change(at, &event.what);
        }
        // Only now: within an entry the events come before their commands here.
        let ended = entry.iter().flat_map(|entry| entry.cmds.iter().zip(outcomes));
        for (cmd, outcome) in ended {
            if let (Command::EndSession { session }, Outcome::Done(_)) = (&cmd.body, outcome) {
                self.audit.ended_sessions.insert(*session);
            }
        }
    }

    fn audit_command(&mut self, entry: &Arc<Entry>, place: usize, outcome: &Outcome) {
        let cmd = &entry.cmds[place];
        if let Outcome::Done(Reply::Stored(StoredReply::Job(job))) = outcome
            && self.audit.jobs.insert(*job, false).is_some()
        {
            return self.violate("request_once", format!("job {job} was submitted twice"));
        }
        let Some(request) = cmd.request else { return };
        let known = self.audit.requests.get(&request);
        match (known, outcome) {
            (None, Outcome::Done(Reply::Stored(reply))) => {
                self.audit.requests.insert(request, (entry.clone(), place, *reply));
            }
            (None, Outcome::Replayed(reply)) => {
                self.violate("request_once", format!("a new request was answered as known: {reply:?}"));
            }
            (Some((first, at, reply)), outcome) => {
                let same = first.cmds[*at].body == cmd.body;
                let fits = match outcome {
                    Outcome::Replayed(again) => same && again == reply,
                    Outcome::Rejected(no) if same => no.code == Code::RequestExpired,
                    Outcome::Rejected(no) => matches!(no.code, Code::RequestMismatch | Code::RequestExpired),
                    Outcome::Done(_) => false,
                };
                if !fits {
                    let text = format!("a request known as {reply:?} (same body: {same}) was answered {outcome:?}");
                    return self.violate("request_once", text);
                }
                if same && matches!(outcome, Outcome::Replayed(_)) {
                    self.sometimes.hit("a repeated request was answered from the table");
                }
            }
            _ => {}
        }
    }

    /// Who reports ends may free GPUs only of ranks that are gone. Before others get them, the agent would see that they are in use: there
    /// nobody would notice.
    fn audit_freed(&mut self, at: usize, command: &Command) {
        let Command::Report(report) = command else { return };
        let state = &self.replicas[at].state;
        let name = state.nodes.get(&report.node).map(|node| node.value.name.as_str());
        let Some(agent) = self.machines.iter().position(|machine| Some(machine.name.as_str()) == name) else {
            return;
        };
        for item in &report.items {
            let held = state.leases.get(&item.token).is_some_and(|lease| {
                lease.value.parts.iter().any(|part| part.node == report.node && part.state != PartState::Released)
            });
            let ranks = (agent, item.token.0, 0)..=(agent, item.token.0, u32::MAX);
            let mut alive = self
                .audit
                .alive
                .range(ranks)
                .filter(|id| self.audit.ranks.get(id).is_some_and(|rank| self.counts(**id, rank)));
            if let Some((_, token, local)) = alive.next().filter(|_| !held) {
                let text = format!("GPUs of token {token} were freed on agent {agent} while its rank {local} runs");
                return self.violate("gpu_in_one_lease", text);
            }
        }
    }

    fn audit_change(&mut self, at: usize, change: &Change) {
        match change {
            Change::JobFenced { token, task } => {
                if *token <= self.audit.token {
                    let text = format!("job {} got token {token} after {}", task.job, self.audit.token);
                    return self.violate("token_grows", text);
                }
                self.audit.token = *token;
                self.audit_task_of_array(at, task.job);
                self.audit_windows(at, task.job, *token);
                self.audit_racks(at, task.job, *token);
                self.audit_machines(at, task.job, *token);
                let ranks = self.audit_gang(at, task.job, *token);
                self.audit.leases.insert(*token, ranks);
            }
            Change::NodeShown { node, record } => {
                let known = self.audit.epochs.insert(node.0, record.epoch).unwrap_or(0);
                if known > record.epoch {
                    self.violate("epoch_grows", format!("node {node} went from epoch {known} to {}", record.epoch));
                }
            }
            Change::ResultCommitted { task, result } => {
                let record = self.replicas[at].state.tasks.get(task);
                if result.outcome == TaskOutcome::Succeeded && record.is_some_and(|task| task.value.displaced > 0) {
                    self.sometimes.hit("a preempted job ran to its end");
                }
                let sent_away = |row: &AttemptRow| row.text.starts_with("reservation ");
                if record.is_some_and(|task| task.value.attempts.iter().any(sent_away)) {
                    self.sometimes.hit("a job that a window sent away came to its end");
                }
                self.audit.jobs.insert(task.job, true);
                let token = result.token.unwrap_or_default();
                if self.audit.results.insert(task.job, token).is_some() {
                    return self.violate("result_once", format!("job {} has two results", task.job));
                }
                self.audit_array(at, task.job);
                if result.outcome == TaskOutcome::Succeeded {
                    self.audit_success(task.job, token);
                }
                self.audit_retries(at, *task);
                self.audit_turns(at, *task);
            }
            Change::LockShown { name, holder: Some(holder), .. } => {
                if self.audit.ended_sessions.contains(&holder.session) {
                    let text = format!("{name} was given to session {}, which has ended", holder.session);
                    return self.violate("lock_held", text);
                }
                if holder.token < self.audit.lock_token {
                    self.violate("token_grows", format!("{name} went back to token {}", holder.token));
                }
                self.audit.lock_token = holder.token;
            }
            _ => {}
        }
    }

    /// A task of an array is one job for ever.
    fn audit_task_of_array(&mut self, at: usize, job: JobId) {
        let element = self.replicas[at].state.jobs.get(&job).and_then(|job| job.value.element());
        let Some(element) = element else { return };
        let known = *self.audit.tasks.entry((element.array, element.index)).or_insert(job);
        if known != job {
            let text = format!("task {} of array {} is job {job}, it was {known}", element.index, element.array);
            return self.violate("array_counts", text);
        }
        self.audit_peers(at, job, element);
    }

    /// A task that starts behind that of the same index of another array: that one has succeeded.
    fn audit_peers(&mut self, at: usize, job: JobId, element: Element) {
        let state = &self.replicas[at].state;
        let after = state.jobs.get(&element.array).map(|array| array.value.spec.after()).unwrap_or_default();
        let peers = after.iter().filter(|after| after.kind == AfterKind::Corr);
        // Ids of tasks lie behind their array's, in both alike.
        let peers = peers.map(|parent| JobId(parent.job.0 + job.0 - element.array.0));
        let peers: Vec<_> = peers.map(|peer| (peer, outcome_of(state, peer))).collect();
        for (peer, outcome) in peers {
            if outcome != Some(TaskOutcome::Succeeded) {
                let text = format!("job {job} started behind job {peer}, which ended as {outcome:?}");
                return self.violate("peers_first", text);
            }
            self.sometimes.hit("a task started behind the one of its index");
        }
    }

    /// An array ended: each of its tasks has ended, or never started.
    fn audit_array(&mut self, at: usize, id: JobId) {
        let Some(job) = self.replicas[at].state.jobs.get(&id).map(|job| &job.value) else { return };
        if let Some(element) = job.element()
            && self.replicas[at].state.array_of(job).is_some_and(|array| array.stop().is_some())
            && self.audit.tasks.contains_key(&(element.array, element.index))
        {
            self.sometimes.hit("a cancel reached running tasks of an array");
        }
        let Some((_, progress)) = job.array() else { return };
        let state = &self.replicas[at].state;
        let begun: BTreeSet<JobId> = self.audit.tasks.range((id, 0)..=(id, u32::MAX)).map(|(_, job)| *job).collect();
        let live = |task: &&JobId| state.jobs.get(task).is_some_and(|job| job.value.ended.is_none());
        let open = begun.iter().find(live).copied();
        // The one that it followed may have failed, so that it never ran.
        let tasks = (0..progress.begun).map(|nth| id.nth_task(nth));
        let skipped = tasks.filter(|task| outcome_of(state, *task) == Some(TaskOutcome::Skipped)).count();
        if begun.len() + skipped != progress.begun as usize || open.is_some() {
            let text = format!(
                "array {id} ended with {progress:?}, {} tasks began, {skipped} were skipped, {open:?} has not ended",
                begun.len()
            );
            return self.violate("array_counts", text);
        }
        if skipped > 0 {
            self.sometimes.hit("a task was skipped, for the one of its index had failed");
        }
        if !begun.is_empty() {
            self.sometimes.hit("an array came to its end with the last of its tasks");
        }
    }

    /// Inside a window of reserved time nothing starts on its machines but what names it.
    fn audit_windows(&mut self, at: usize, job: JobId, token: Token) {
        let state = &self.replicas[at].state;
        let own = state.jobs.get(&job).map_or("", |job| job.value.spec.reservation()).to_owned();
        let Some(lease) = state.leases.get(&token) else { return };
        let windows = state.reservations.iter().filter(|(_, window)| window.begun.is_some_and(|begun| begun < token));
        let here = windows.filter(|(_, window)| lease.value.parts.iter().any(|part| window.nodes.contains(&part.node)));
        let strange: Vec<String> = here.map(|(_, window)| window.name.clone()).filter(|name| *name != own).collect();
        if !own.is_empty() {
            self.sometimes.hit("a job started inside its reservation");
        }
        if let Some(name) = strange.first() {
            self.violate("reservation_kept", format!("job {job} got token {token} inside {name}"));
        }
    }

    /// A gang that requires a rack is where its machines really stand in one.
    fn audit_racks(&mut self, at: usize, job: JobId, token: Token) {
        let state = &self.replicas[at].state;
        let topology = state.jobs.get(&job).and_then(|job| job.value.spec.shape.topology);
        let Some(lease) = state.leases.get(&token).filter(|lease| lease.value.parts.len() > 1) else { return };
        let stands = |part: &Part| {
            let name = &state.nodes.get(&part.node)?.value.name;
            self.machines.iter().position(|machine| machine.name == *name).map(|agent| agent / AGENTS_PER_RACK)
        };
        let racks: BTreeSet<Option<usize>> = lease.value.parts.iter().map(stands).collect();
        if topology.is_none_or(|topology| !topology.required) {
            return;
        }
        self.sometimes.hit("a gang started in the rack that it requires");
        if racks.len() > 1 {
            self.violate("gang_together", format!("job {job} got token {token} in racks {racks:?}, and requires one"));
        }
    }

    /// A job is on no machine that it keeps out: by the machines' names, and by where they really stand.
    fn audit_machines(&mut self, at: usize, job: JobId, token: Token) {
        let state = &self.replicas[at].state;
        let selector = state.jobs.get(&job).and_then(|job| job.value.spec.shape.machines.as_ref());
        let Some((selector, lease)) = selector.zip(state.leases.get(&token)) else { return };
        let constraint = selector.constraint.to_string();
        let may = |name: &str| {
            let agent = self.machines.iter().position(|machine| machine.name == name);
            let rack = agent.map_or_else(String::new, |agent| format!("r{}", agent / AGENTS_PER_RACK));
            let holds = |term: &str| match term.split_once("!=") {
                Some((_, other)) => other != rack,
                None => term.strip_prefix("rack=") == Some(rack.as_str()),
            };
            let in_rack = constraint.is_empty() || constraint.split('|').any(holds);
            in_rack && (selector.only.is_empty() || selector.only.contains(name)) && !selector.without.contains(name)
        };
        let names = lease.value.parts.iter().map(|part| state.node_name(part.node));
        let wrong = names.filter(|name| !may(name)).map(str::to_owned).next();
        let text = wrong.map(|name| format!("job {job} got token {token} on {name}, in spite of {selector}"));
        self.sometimes.hit("a job started on machines that it chose");
        if let Some(text) = text {
            self.violate("machine_allowed", text);
        }
    }

    /// All that the job asked for is granted at once: as many machines, or where it leaves these open as many GPUs, or twice as
    /// many, in equal parts. Its ranks.
    fn audit_gang(&mut self, at: usize, id: JobId, token: Token) -> u32 {
        let state = &self.replicas[at].state;
        let job = state.jobs.get(&id).map(|job| &job.value.spec);
        let Some((spec, lease)) = job.zip(state.leases.get(&token)) else { return 0 };
        let (shape, doublings) = (&spec.shape, spec.terms.as_ref().map_or(0, |terms| terms.doublings));
        let (parts, each) = (&lease.value.parts, u32::from(shape.ranks_per_node));
        let gpus: Vec<u32> = parts.iter().map(|part| part.gpus.count_ones()).collect();
        let machines: BTreeSet<NodeId> = parts.iter().map(|part| part.node).collect();
        let asked = u32::from(shape.nodes.max(1)) * each * u32::from(shape.gpus_per_rank);
        let apart = machines.len() == parts.len() && (shape.nodes == 0 || machines.len() == usize::from(shape.nodes));
        let equal = gpus.iter().all(|count| *count == gpus[0] && count.is_multiple_of(each));
        let has = gpus.iter().sum::<u32>();
        let whole = apart && equal && (0..=doublings).any(|times| has == asked << times);
        let (wish, ranks) = (shape.clone(), parts.len() as u32 * each);
        let uuids = parts.iter().filter_map(|part| Some((part, &state.nodes.get(&part.node)?.value)));
        let uuids = uuids.flat_map(|(part, node)| gpu_uuids(node, part));
        let kinds: BTreeSet<bool> = uuids.map(|uuid| uuid.starts_with("MIG-")).collect();
        if shape.nodes == 0 && parts.len() > 1 {
            self.sometimes.hit("a job was cut over several machines");
        }
        if doublings > 0 {
            let grown = has > asked;
            self.sometimes.hit(if grown {
                "an elastic job had more than its least"
            } else {
                "an elastic job had its least"
            });
        }
        self.audit_slices(id, token, &kinds, wish.gpu_types.is_empty());
        if !whole {
            self.violate("gang_whole", format!("job {id} asked for {wish:?}, token {token} has {gpus:?} GPUs"));
        }
        ranks
    }

    /// Who names the type of slices has slices alone, and nobody else has any: by the words that the agent gets.
    fn audit_slices(&mut self, job: JobId, token: Token, kinds: &BTreeSet<bool>, any_type: bool) {
        if kinds.contains(&true) {
            self.sometimes.hit("a job started on slices of GPUs");
        }
        if kinds.contains(&any_type) {
            let text = format!("job {job} got token {token} on GPUs of the wrong kind, slices: {kinds:?}");
            self.violate("machine_allowed", text);
        }
    }

    /// A success was committed: every rank of that attempt must really have ended with 0.
    fn audit_success(&mut self, job: JobId, token: Token) {
        let ranks = self.audit.leases.get(&token).copied().unwrap_or(0);
        for rank in 0..ranks {
            let exit = self.audit.exits.get(&(token.0, rank)).copied();
            if exit != Some(Exit { code: 0, signal: 0 }) {
                let text = format!("job {job} succeeded by token {token}, its rank {rank} ended as {exit:?}");
                return self.violate("result_once", text);
            }
        }
    }

    /// Only an attempt that failed by its own doing burns one of the job's retries.
    fn audit_retries(&mut self, at: usize, key: TaskKey) {
        let Some(task) = self.replicas[at].state.tasks.get(&key).map(|task| &task.value) else { return };
        // Older rows are dropped: a job with more attempts can't be recounted here.
        if u64::from(task.attempt) > task.attempts.len() as u64 {
            return;
        }
        let own = |row: &&AttemptRow| !matches!(row.verdict, VerdictKind::Lost | VerdictKind::Preempted);
        let failed = task.attempts.iter().filter(own).count();
        if usize::from(task.used.retries) > failed {
            let text = format!("{} retries of job {} are burnt, {failed} attempts failed", task.used.retries, key.job);
            self.violate("retries_bounded", text);
        }
    }

    /// Each time that it gave its place for another one's turn it had run for longer than before.
    fn audit_turns(&mut self, at: usize, key: TaskKey) {
        let Some(had) = self.replicas[at].state.tasks.get(&key).map(|task| task.value.had) else { return };
        let given = u64::from(had.given);
        if given > 0 {
            self.sometimes.hit("a job that gave its place for another's turn came to its end");
        }
        if had.gpu_ms < TURN_RUN_MS * given * (given + 1) / 2 {
            let text = format!("job {} gave its place {given} times and had {} GPU-ms", key.job, had.gpu_ms);
            self.violate("turns_bounded", text);
        }
    }

    // -------------------------------------------------------------------------------------- what really happened

    pub fn rank_taken_up(&mut self, agent: usize, key: Key, lease: &DesiredLease) {
        let each = lease.gpus_per_rank as usize;
        let from = key.1 as usize * each;
        let gpus = lease.gpu_uuids.get(from..from + each).unwrap_or_default().to_vec();
        let rank = Rank {
            job: lease.job_id,
            number: lease.first_rank + key.1,
            world: lease.world_size,
            nodes: lease.nodes,
            gpus,
            began: false,
            excused_until: 0,
        };
        if self.audit.ranks.insert((agent, key.0, key.1), rank).is_some() {
            self.violate("one_attempt_alive", format!("rank {} of token {} was taken up twice", key.1, key.0));
        }
    }

    pub fn rank_began(&mut self, agent: usize, key: Key) {
        let id = (agent, key.0, key.1);
        let Some(rank) = self.audit.ranks.get_mut(&id) else { return };
        if std::mem::replace(&mut rank.began, true) {
            return self.violate("one_attempt_alive", format!("rank {} of token {} was started twice", key.1, key.0));
        }
        let (world, nodes) = (rank.world, rank.nodes);
        self.audit.started += 1;
        self.audit.alive.insert(id);
        self.judge(id);
        if nodes > 1 {
            let taken = self.audit.ranks.keys().filter(|(_, token, _)| *token == key.0).count();
            if taken < world as usize {
                let text = format!("a rank of token {} began when {taken} of {world} were taken up", key.0);
                self.violate("gang_whole", text);
            }
        }
    }

    pub fn rank_ended(&mut self, agent: usize, key: Key, exit: Exit) {
        let Some(rank) = self.audit.ranks.get(&(agent, key.0, key.1)) else { return };
        self.audit.exits.insert((key.0, rank.number), exit);
    }

    pub fn rank_gone(&mut self, agent: usize, key: Key) {
        self.audit.alive.remove(&(agent, key.0, key.1));
    }

    /// The machine slept with this process: what it does until its shim has looked at the clock nobody can prevent.
    pub fn rank_woke(&mut self, agent: usize, key: Key) {
        if !self.audit.alive.contains(&(agent, key.0, key.1)) {
            return;
        }
        let until = self.now + WAKING_US;
        self.excuse(agent, key, until);
        self.after(WAKING_US + 1, Event::Judge { agent, key });
    }

    pub fn excuse(&mut self, agent: usize, key: Key, until: u64) {
        if let Some(rank) = self.audit.ranks.get_mut(&(agent, key.0, key.1)) {
            rank.excused_until = rank.excused_until.max(until);
        }
    }

    pub fn judge_again(&mut self, agent: usize, key: Key) {
        let id = (agent, key.0, key.1);
        if self.audit.alive.contains(&id) {
            self.judge(id);
        }
    }

    /// Does this process run beside one that it must not meet?
    fn judge(&mut self, id: Id) {
        let Some(rank) = self.audit.ranks.get(&id) else { return };
        if !self.counts(id, rank) {
            return;
        }
        let mut found = None;
        for other_id in &self.audit.alive {
            let Some(other) = self.audit.ranks.get(other_id) else { continue };
            if other_id.1 == id.1 || !self.counts(*other_id, other) {
                continue;
            }
            if other.job == rank.job {
                let text = format!("job {}: tokens {} and {} run at once", rank.job, other_id.1, id.1);
                found = Some(("one_attempt_alive", text));
            } else if let Some(gpu) = rank.gpus.iter().find(|gpu| other.gpus.contains(gpu)) {
                let text = format!("{gpu} runs tokens {} and {} at once", other_id.1, id.1);
                found = Some(("gpu_in_one_lease", text));
            }
        }
        if let Some((invariant, text)) = found {
            self.violate(invariant, text);
        }
    }

    fn counts(&self, id: Id, rank: &Rank) -> bool {
        rank.excused_until <= self.now && self.machines[id.0].asleep_until <= self.now
    }

    /// At the end: nothing that was acknowledged is missing anywhere, and every state is whole.
    pub fn audit_end(&mut self) {
        for at in 0..self.replicas.len() {
            if !self.replicas[at].up {
                continue;
            }
            let state = &self.replicas[at].state;
            if let Err(violation) = state.check() {
                return self.violate(violation.invariant, violation.detail);
            }
            let found = |job: &JobId| state.jobs.contains(job) || state.ended_job(*job).is_some();
            let lost = self.users.jobs.iter().filter_map(|job| job.job).find(|job| !found(job));
            if let Some(job) = lost {
                return self.violate("nothing_lost", format!("job {job} was acknowledged, replica {at} lacks it"));
            }
        }
        self.replay();
    }

    /// A snapshot and the rest of the log are the whole log.
    fn replay(&mut self) {
        let at =
            (0..self.replicas.len()).filter(|at| self.replicas[*at].up).max_by_key(|at| self.replicas[*at].applied);
        let Some(at) = at else { return };
        let (mut state, from) = self.replicas[at].snapshot.clone();
        let upto = self.replicas[at].applied;
        for logged in &self.raft.log[from as usize..upto as usize] {
            if let Some(entry) = &logged.entry {
                let _ = state.apply(entry);
            }
            state.set_applied(logged.position);
        }
        let (own, again) = (self.replicas[at].state.digest(), state.digest_from_scratch());
        if own != again {
            self.violate(
                "replay_equal",
                format!("replica {at}: its snapshot at {from} and the log give another state"),
            );
        }
        self.trace.note("end", upto, own as u64);
    }
}

/// How a job ended, as far as the state knows.
fn outcome_of(state: &State, job: JobId) -> Option<TaskOutcome> {
    match state.jobs.get(&job) {
        Some(job) => job.value.ended.as_ref().map(|end| end.outcome),
        None => state.ended_job(job).map(|(outcome, _)| outcome),
    }
}
