//! What a history must not show. The model keeps per job its last attempt and its result, per GPU who holds it, and the
//! highest token; it takes one revision after the other and stops at the first contradiction.
//!
//! A lease is *granted* in the revision that also writes the job's fence with its token. One that shows up without is
//! older than the history, which only a history that does not begin with the cluster may have.

use std::collections::{BTreeMap, BTreeSet};

use crate::read::{Event, Header, Job, Lease, Outcome, Revision, What};
use crate::{Counterexample, Counts, Fact};

/// Where something was said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct At {
    line: u64,
    rev: u64,
}

impl At {
    fn fact(self, text: impl Into<String>) -> Fact {
        Fact { line: self.line, revision: self.rev, text: text.into() }
    }
}

/// A lease that is open.
#[derive(Clone, Debug)]
struct Held {
    at: At,
    lease: Lease,
}

impl Held {
    fn told(&self) -> Fact {
        let (lease, nodes) = (&self.lease, self.lease.parts.iter().map(|part| part.node.as_str()));
        let nodes: Vec<&str> = nodes.collect();
        self.at.fact(format!(
            "lease {} of job {}, attempt {}, on {}",
            lease.token,
            lease.job_id,
            lease.attempt,
            nodes.join(", ")
        ))
    }
}

/// The last attempt of a job.
#[derive(Clone, Copy, Debug)]
struct Attempt {
    at: At,
    number: u64,
    token: u64,
}

impl Attempt {
    fn told(&self) -> Fact {
        self.at.fact(format!("attempt {} with token {}", self.number, self.token))
    }
}

type Verdict = Result<(), Box<Counterexample>>;

fn broken(invariant: &'static str, what: String, facts: Vec<Fact>, meaning: &'static str) -> Verdict {
    Err(Box::new(Counterexample { invariant, what, facts, meaning }))
}

const TWO_RESULTS: &str = "A result is committed once, by the holder of the job's last token. Whoever read the first result acted on \
                           something that was taken back.";
const RAN_TWICE: &str = "Two attempts of one job could run at the same time: what the job writes without checking its token may have \
                         been written twice.";
const GPU_SHARED: &str = "Two attempts had the same GPU at the same time: they may have failed, slowed each other, or read each \
                          other's memory.";
const TOKEN_BACK: &str =
    "Storage that checks fencing tokens takes the higher token for the newer attempt: here an older one would pass.";
const ATTEMPT_BACK: &str =
    "Attempts are counted up, one by one, so that a late report of an older one is known as such.";
const TORN_GANG: &str = "A gang starts whole or not at all: with a rank missing, the others wait for it without end.";
const HOLE: &str =
    "What happened in between is not in the file: such a history proves nothing. Export it again, in one piece.";

pub(crate) struct Model {
    header: Option<Header>,
    counts: Counts,
    last: Option<At>,
    /// The highest token granted, to a job or to a lock.
    highest: Option<(u64, At)>,
    jobs: BTreeMap<u64, Job>,
    attempts: BTreeMap<u64, Attempt>,
    results: BTreeMap<u64, (At, Outcome)>,
    open: BTreeMap<u64, Held>,
    open_of_job: BTreeMap<u64, u64>,
    /// Tokens that were closed are never seen again.
    closed: BTreeMap<u64, At>,
    holder: BTreeMap<String, u64>,
    gpu_fence: BTreeMap<String, (u64, At)>,
    job_fence: BTreeMap<u64, (u64, At)>,
    lock_token: BTreeMap<String, u64>,
}

impl Model {
    pub fn new(header: Option<Header>) -> Self {
        let from_the_beginning = header.as_ref().is_some_and(|header| header.from_the_beginning);
        Self {
            header,
            counts: Counts { from_the_beginning, ..Counts::default() },
            last: None,
            highest: None,
            jobs: BTreeMap::new(),
            attempts: BTreeMap::new(),
            results: BTreeMap::new(),
            open: BTreeMap::new(),
            open_of_job: BTreeMap::new(),
            closed: BTreeMap::new(),
            holder: BTreeMap::new(),
            gpu_fence: BTreeMap::new(),
            job_fence: BTreeMap::new(),
            lock_token: BTreeMap::new(),
        }
    }

    pub fn take(&mut self, revision: &Revision) -> Verdict {
        self.follow(revision)?;
        let granted: BTreeSet<u64> = revision
            .events
            .iter()
            .filter_map(|event| match event.what {
                What::JobFence { token, .. } => Some(token),
                _ => None,
            })
            .collect();
        for event in &revision.events {
            self.event(At { line: event.line, rev: revision.rev }, event, &granted)?;
        }
        for event in &revision.events {
            self.settled(At { line: event.line, rev: revision.rev }, event)?;
        }
        self.counts.events += revision.lines;
        Ok(())
    }

    pub fn finish(mut self) -> Result<Counts, Box<Counterexample>> {
        if let Some(header) = &self.header {
            let last = self.last.map_or(header.from.saturating_sub(1), |at| at.rev);
            if last != header.to {
                let facts = vec![At { line: 1, rev: header.to }.fact("the last revision that the header promises")];
                let what = format!("The history ends at revision {last}, its header says {}", header.to);
                broken("history_whole", what, facts, HOLE)?;
            }
        }
        self.counts.jobs = self.jobs.len() as u64;
        self.counts.results = self.results.len() as u64;
        self.counts.gpus = self.gpu_fence.len() as u64;
        Ok(self.counts)
    }

    /// Each revision comes once, and none is left out: each changed a key.
    fn follow(&mut self, revision: &Revision) -> Verdict {
        let at = At { line: revision.line, rev: revision.rev };
        let begins = self.header.as_ref().map(|header| header.from);
        let expected = self.last.map(|last| last.rev.saturating_add(1)).or(begins);
        if let Some(expected) = expected.filter(|expected| *expected != at.rev) {
            let before = self.last.map(|last| last.fact("the revision before")).into_iter();
            let facts = before.chain([at.fact("the revision that follows it in the file")]).collect();
            let what = format!("Revision {expected} should come here, {} does", at.rev);
            return broken("history_whole", what, facts, HOLE);
        }
        if self.last.is_none() {
            self.counts.first_revision = at.rev;
        }
        self.counts.last_revision = at.rev;
        self.last = Some(at);
        Ok(())
    }

    fn event(&mut self, at: At, event: &Event, granted: &BTreeSet<u64>) -> Verdict {
        match &event.what {
            What::Job(job) => {
                self.jobs.insert(job.job_id, job.clone());
                Ok(())
            }
            What::Lease(lease) if self.open.contains_key(&lease.token) => self.shown_again(at, lease),
            What::Lease(lease) => self.granted(at, lease, granted.contains(&lease.token)),
            What::LeaseClosed { token } => self.closed(at, *token),
            What::Result(result) => self.result(at, result),
            What::JobFence { job, token } => self.job_fence(at, *job, *token),
            What::GpuFence { gpu, token } => self.gpu_fence(at, gpu, *token),
            What::Lock { name, token } => self.lock(at, name, *token),
        }
    }

    fn granted(&mut self, at: At, lease: &Lease, is_grant: bool) -> Verdict {
        let held = Held { at, lease: lease.clone() };
        if let Some(closed) = self.closed.get(&lease.token) {
            let what = format!("Lease {} of job {} was closed, and is there again", lease.token, lease.job_id);
            return broken("token_grows", what, vec![closed.fact("it was closed"), held.told()], TOKEN_BACK);
        }
        if is_grant {
            self.counts.grants += 1;
            self.new_token(at, lease.token, &format!("job {}, attempt {}", lease.job_id, lease.attempt))?;
        } else if self.counts.from_the_beginning {
            let what =
                format!("Lease {} of job {} is there without ever having been granted", lease.token, lease.job_id);
            return broken("token_grows", what, vec![held.told()], TOKEN_BACK);
        } else {
            self.counts.leases_before += 1;
        }
        self.whole_gang(&held)?;
        self.one_attempt(&held)?;
        self.next_attempt(&held, is_grant)?;
        self.gpus_free(&held)?;
        for gpu in lease.parts.iter().flat_map(|part| &part.gpus) {
            self.holder.insert(gpu.clone(), lease.token);
        }
        self.open_of_job.insert(lease.job_id, lease.token);
        let attempt = Attempt { at, number: lease.attempt, token: lease.token };
        self.attempts.insert(lease.job_id, attempt);
        self.open.insert(lease.token, held);
        Ok(())
    }

    /// A phase or a verdict of an open lease: what it holds stays the same.
    fn shown_again(&mut self, at: At, lease: &Lease) -> Verdict {
        let Some(held) = self.open.get(&lease.token) else { return Ok(()) };
        let was = &held.lease;
        if (was.job_id, was.attempt, &was.parts) == (lease.job_id, lease.attempt, &lease.parts) {
            return Ok(());
        }
        let what = format!("Lease {} became another one while it was open", lease.token);
        let now = Held { at, lease: lease.clone() };
        broken("gang_whole", what, vec![held.told(), now.told()], TORN_GANG)
    }

    fn new_token(&mut self, at: At, token: u64, whose: &str) -> Verdict {
        if let Some((highest, then)) = self.highest.filter(|(highest, _)| *highest >= token) {
            let what = format!("Token {token} was granted to {whose} after token {highest}");
            let facts = vec![then.fact(format!("token {highest}")), at.fact(format!("token {token}, to {whose}"))];
            return broken("token_grows", what, facts, TOKEN_BACK);
        }
        self.highest = Some((token, at));
        Ok(())
    }

    fn whole_gang(&self, held: &Held) -> Verdict {
        let lease = &held.lease;
        let mut rank = 0u64;
        for part in &lease.parts {
            if part.first_rank != rank {
                let what = format!("Lease {} of job {} has no rank {rank}", lease.token, lease.job_id);
                return broken("gang_whole", what, vec![held.told()], TORN_GANG);
            }
            rank = part.ranks.saturating_add(rank);
        }
        let nodes: BTreeSet<&str> = lease.parts.iter().map(|part| part.node.as_str()).collect();
        let Some(job) = self.jobs.get(&lease.job_id) else { return Ok(()) };
        let granted = lease.parts.len() as u64;
        // One that leaves its machines open has its GPUs in equal parts on as many as it was given.
        let gpus = lease.parts.iter().map(|part| part.gpus.len() as u64).sum::<u64>();
        let sizes = (0..=job.doublings.unwrap_or(0)).filter_map(|times| job.gpus_per_rank.checked_shl(times));
        let size = sizes.filter(|size| size.saturating_mul(job.ranks_per_node) <= gpus).max();
        let size = size.unwrap_or(job.gpus_per_rank);
        let (machines, each) = match job.nodes {
            0 if granted > 0 && size.is_multiple_of(granted) => (granted, size / granted),
            0 => (1, size),
            named => (named, job.gpus_per_rank),
        };
        let gpus_fit = lease.parts.iter().all(|part| part.gpus.len() as u64 == part.ranks.saturating_mul(each));
        let wanted = machines.saturating_mul(job.ranks_per_node);
        if rank == wanted && nodes.len() as u64 == machines && gpus_fit {
            return Ok(());
        }
        let what = format!(
            "Job {} asked for {wanted} ranks on {} nodes with {} GPUs each; lease {} has {rank} ranks on {}, and {} GPUs",
            job.job_id,
            machines,
            each,
            lease.token,
            nodes.len(),
            lease.parts.iter().map(|part| part.gpus.len()).sum::<usize>()
        );
        broken("gang_whole", what, vec![held.told()], TORN_GANG)
    }

    fn one_attempt(&self, held: &Held) -> Verdict {
        let job = held.lease.job_id;
        if let Some(other) = self.open_of_job.get(&job).and_then(|token| self.open.get(token)) {
            let what = format!("Job {job} has two leases at once, {} and {}", other.lease.token, held.lease.token);
            return broken("lease_iff_running", what, vec![other.told(), held.told()], RAN_TWICE);
        }
        if let Some((at, result)) = self.results.get(&job) {
            let what = format!("Job {job} ended as {}, and was started again", result.outcome);
            return broken("result_once", what, vec![at.fact(told(result)), held.told()], TWO_RESULTS);
        }
        Ok(())
    }

    fn next_attempt(&self, held: &Held, is_grant: bool) -> Verdict {
        let (job, number) = (held.lease.job_id, held.lease.attempt);
        match self.attempts.get(&job) {
            Some(last) if is_grant && number != last.number.saturating_add(1) => {
                let what = format!("Job {job} had attempt {}, the next one is {number}", last.number);
                broken("retries_bounded", what, vec![last.told(), held.told()], ATTEMPT_BACK)
            }
            None if is_grant && self.counts.from_the_beginning && self.jobs.contains_key(&job) && number != 1 => {
                let what = format!("The first attempt of job {job} is number {number}");
                broken("retries_bounded", what, vec![held.told()], ATTEMPT_BACK)
            }
            _ => Ok(()),
        }
    }

    fn gpus_free(&mut self, held: &Held) -> Verdict {
        let mut seen = BTreeSet::new();
        for part in &held.lease.parts {
            for gpu in &part.gpus {
                if !seen.insert(gpu) {
                    let what = format!("Lease {} has GPU {gpu} twice", held.lease.token);
                    return broken("gpu_in_one_lease", what, vec![held.told()], GPU_SHARED);
                }
                let other = self.holder.get(gpu).and_then(|token| self.open.get(token));
                let Some(other) = other else { continue };
                // A node of a gang lets go before the last one does; of one node the lease's end is the release.
                if other.lease.parts.len() > 1 {
                    self.counts.handed_on += 1;
                    continue;
                }
                let what = format!(
                    "GPU {gpu} of {} is in lease {} of job {} and in lease {} of job {}",
                    part.node, other.lease.token, other.lease.job_id, held.lease.token, held.lease.job_id
                );
                return broken("gpu_in_one_lease", what, vec![other.told(), held.told()], GPU_SHARED);
            }
        }
        Ok(())
    }

    fn closed(&mut self, at: At, token: u64) -> Verdict {
        self.closed.insert(token, at);
        let Some(held) = self.open.remove(&token) else { return Ok(()) };
        self.open_of_job.remove(&held.lease.job_id);
        for gpu in held.lease.parts.iter().flat_map(|part| &part.gpus) {
            if self.holder.get(gpu) == Some(&token) {
                self.holder.remove(gpu);
            }
        }
        Ok(())
    }

    fn result(&mut self, at: At, result: &Outcome) -> Verdict {
        let job = result.job_id;
        if let Some((first, before)) = self.results.get(&job) {
            let what = format!("Job {job} has two committed results, {} and {}", before.outcome, result.outcome);
            let facts = vec![first.fact(told(before)), at.fact(told(result))];
            return broken("result_once", what, facts, TWO_RESULTS);
        }
        if let Some(last) = self.attempts.get(&job) {
            let stale = result.token.is_some_and(|token| token != last.token) || result.attempt != last.number;
            if stale {
                let token = result.token.map_or("no token".to_owned(), |token| format!("token {token}"));
                let what = format!(
                    "The result of job {job} is of attempt {} with {token}; its last attempt was {} with token {}",
                    result.attempt, last.number, last.token
                );
                return broken("result_once", what, vec![last.told(), at.fact(told(result))], TWO_RESULTS);
            }
        }
        self.results.insert(job, (at, result.clone()));
        Ok(())
    }

    /// What holds once all events of the revision are taken: a job with a result has no open lease.
    fn settled(&self, at: At, event: &Event) -> Verdict {
        let What::Result(result) = &event.what else { return Ok(()) };
        let open = self.open_of_job.get(&result.job_id).and_then(|token| self.open.get(token));
        let Some(held) = open else { return Ok(()) };
        let what = format!("Job {} has a result while its lease {} is open", result.job_id, held.lease.token);
        broken("lease_iff_running", what, vec![held.told(), at.fact(told(result))], RAN_TWICE)
    }

    fn job_fence(&mut self, at: At, job: u64, token: u64) -> Verdict {
        let fence = self.job_fence.insert(job, (token, at));
        fence_grows(fence, at, token, &format!("job {job}"))
    }

    fn gpu_fence(&mut self, at: At, gpu: &str, token: u64) -> Verdict {
        let fence = self.gpu_fence.insert(gpu.to_owned(), (token, at));
        fence_grows(fence, at, token, &format!("GPU {gpu}"))
    }

    /// A lock is also shown when only its waiters change.
    fn lock(&mut self, at: At, name: &str, token: Option<u64>) -> Verdict {
        let Some(token) = token else { return Ok(()) };
        let before = self.lock_token.insert(name.to_owned(), token);
        match before {
            Some(before) if before == token => return Ok(()),
            // It may have been granted before the history began.
            None if !self.counts.from_the_beginning => return Ok(()),
            _ => {}
        }
        self.counts.lock_tokens += 1;
        self.new_token(at, token, &format!("lock {name:?}"))
    }
}

fn told(result: &Outcome) -> String {
    let token = result.token.map_or(String::new(), |token| format!(", token {token}"));
    format!("result {} of attempt {}{token}", result.outcome, result.attempt)
}

fn fence_grows(before: Option<(u64, At)>, at: At, token: u64, of: &str) -> Verdict {
    let Some((before, then)) = before.filter(|(before, _)| *before >= token) else { return Ok(()) };
    let what = format!("The fence of {of} went from {before} to {token}");
    let facts = vec![then.fact(format!("token {before}")), at.fact(format!("token {token}"))];
    broken("token_grows", what, facts, TOKEN_BACK)
}
