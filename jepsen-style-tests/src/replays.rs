//! Each request id is sent many times at once, through every replica, while leaders are killed: an id is one job, whoever answers, and
//! a job is one id.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use proto::{Client, v1};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use tokio::task::JoinSet;

use crate::checks;
use crate::cluster::{Cluster, SOON, Setup};
use crate::load::submission;
use crate::verdict::Verdict;

const CLIENTS: usize = 64;
/// Ids whose repetitions are shuffled together: so many are under way at once that those of one id meet each other.
const SHUFFLED: usize = 16;
/// From one killed leader to the next, at most: less than it takes a client to give up.
const BETWEEN_KILLS_MS: u64 = 2_500;

#[derive(Clone, Debug)]
pub struct Plan {
    pub ids: usize,
    /// How often each is sent.
    pub times: usize,
    pub seed: u64,
    /// A planted bug, for a binary that was built with them.
    pub planted: Option<String>,
}

/// What one sending of an id was answered.
struct Answer {
    id: usize,
    job: u64,
    replayed: bool,
}

pub async fn run(plan: &Plan) -> Verdict {
    let mut verdict = Verdict::default();
    let began = Instant::now();
    let env = plan.planted.iter().map(|bug| ("ARES_PLANTED".to_owned(), bug.clone())).collect();
    let mut cluster = match Cluster::with(Setup { env, ..Setup::of(3) }).await {
        Ok(cluster) => cluster,
        Err(error) => {
            verdict.empty.push(format!("the cluster did not start: {error}"));
            return verdict;
        }
    };
    let mut rng = StdRng::seed_from_u64(plan.seed);
    let (sendings, requests) = (sendings(plan, &mut rng), (0..plan.ids).map(|_| submission()).collect::<Vec<_>>());
    let mut load = Senders::start(&cluster, sendings, requests);
    let kills = kill_leaders(&mut cluster, &load, &mut rng).await;
    let answers = load.finish().await;
    match kills {
        Ok(kills) => {
            verdict.figure("leaders killed", kills);
            if kills < 3 {
                verdict.empty.push(format!("{kills} leaders were killed meanwhile: send more"));
            }
        }
        Err(error) => verdict.empty.push(error),
    }
    let expected = plan.ids * plan.times;
    if answers.len() < expected {
        verdict.empty.push(format!("{} of {expected} submissions were answered", answers.len()));
    }
    verdict.check(one_job_an_id(plan, &answers));
    verdict.check(as_many_jobs_as_ids(&cluster, plan).await);
    verdict.figure("request ids", plan.ids);
    verdict.figure("submissions answered", answers.len());
    verdict.figure("answered as a repetition", answers.iter().filter(|answer| answer.replayed).count());
    verdict.figure("jobs", answers.iter().map(|answer| answer.job).collect::<BTreeSet<_>>().len());
    verdict.figure("seconds", began.elapsed().as_secs());
    verdict
}

/// The ids in the order in which they are sent.
fn sendings(plan: &Plan, rng: &mut StdRng) -> Vec<usize> {
    let ids: Vec<usize> = (0..plan.ids).collect();
    let mut all = Vec::with_capacity(plan.ids * plan.times);
    for some in ids.chunks(SHUFFLED) {
        let from = all.len();
        all.extend(some.iter().flat_map(|id| std::iter::repeat_n(*id, plan.times)));
        all[from..].shuffle(rng);
    }
    all
}

/// Clients that take the next sending each, until none is left.
struct Senders {
    next: Arc<AtomicUsize>,
    count: usize,
    clients: JoinSet<Vec<Answer>>,
}

impl Senders {
    fn start(cluster: &Cluster, sendings: Vec<usize>, requests: Vec<v1::SubmitJobRequest>) -> Self {
        let (next, count) = (Arc::new(AtomicUsize::new(0)), sendings.len());
        let (sendings, requests) = (Arc::new(sendings), Arc::new(requests));
        let mut clients = JoinSet::new();
        for at in 0..CLIENTS {
            let (next, sendings, requests) = (next.clone(), sendings.clone(), requests.clone());
            let client = cluster.client_from(at % cluster.addresses.len());
            clients.spawn(async move {
                let mut answers = Vec::new();
                while let Some(id) = sendings.get(next.fetch_add(1, Ordering::Relaxed)) {
                    answers.extend(send(&client, *id, &requests[*id]).await);
                }
                answers
            });
        }
        Self { next, count, clients }
    }

    fn are_done(&self) -> bool {
        self.next.load(Ordering::Relaxed) >= self.count
    }

    async fn finish(&mut self) -> Vec<Answer> {
        let mut answers = Vec::new();
        while let Some(some) = self.clients.join_next().await {
            answers.extend(some.expect("no client panics"));
        }
        answers
    }
}

/// Sends until there is an answer, as a user's script would; none within the patience of several calls shows nothing.
async fn send(client: &Client, id: usize, request: &v1::SubmitJobRequest) -> Option<Answer> {
    for _ in 0..5 {
        if let Ok(reply) = client.submit_job(request.clone()).await {
            return Some(Answer { id, job: reply.job_id, replayed: reply.replayed });
        }
    }
    None
}

/// Kills and restarts who leads, until everything was sent; how many.
async fn kill_leaders(cluster: &mut Cluster, load: &Senders, rng: &mut StdRng) -> Result<usize, String> {
    let mut kills = 0;
    let mut above = 0;
    while !load.are_done() {
        let (leader, term) = cluster.find_leader(above, SOON).await?;
        tokio::time::sleep(Duration::from_millis(rng.random_range(500..BETWEEN_KILLS_MS))).await;
        if load.are_done() {
            break;
        }
        cluster.kill_replica(leader);
        kills += 1;
        above = term;
        tokio::time::sleep(Duration::from_millis(rng.random_range(0..500))).await;
        cluster.restart_replica(leader);
    }
    cluster.find_leader(0, SOON).await?;
    Ok(kills)
}

/// `request_once`: all answers to an id name one job, no two ids name the same, and all answers but one say that they repeat.
fn one_job_an_id(plan: &Plan, answers: &[Answer]) -> Result<(), String> {
    let (mut jobs, mut ids) = (BTreeMap::new(), BTreeMap::new());
    for answer in answers {
        let job = *jobs.entry(answer.id).or_insert(answer.job);
        if job != answer.job {
            return Err(format!("request_once: request {} is job {job} and job {}", answer.id, answer.job));
        }
        let id = *ids.entry(answer.job).or_insert(answer.id);
        if id != answer.id {
            return Err(format!("request_once: job {} is of request {id} and of request {}", answer.job, answer.id));
        }
    }
    let fresh = answers.iter().filter(|answer| !answer.replayed).count();
    // A fresh answer that was lost with its leader is a repetition when it is asked for again.
    if fresh > plan.ids {
        return Err(format!("request_once: {fresh} answers say that they are the first, of {} ids", plan.ids));
    }
    Ok(())
}

/// No job that no answer named, on any replica.
async fn as_many_jobs_as_ids(cluster: &Cluster, plan: &Plan) -> Result<(), String> {
    for at in cluster.running_replicas() {
        let jobs = checks::count_jobs(&cluster.client_at(at)).await?;
        if jobs != plan.ids {
            return Err(format!("request_once: replica {at} has {jobs} jobs of {} requests", plan.ids));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_are_told() {
        let plan = Plan { ids: 2, times: 2, seed: 1, planted: None };
        let answers = |all: &[(usize, u64, bool)]| -> Vec<Answer> {
            all.iter().map(|&(id, job, replayed)| Answer { id, job, replayed }).collect()
        };
        let judge = |all: &[(usize, u64, bool)]| one_job_an_id(&plan, &answers(all));
        assert_eq!(judge(&[(0, 5, false), (0, 5, true), (1, 6, true), (1, 6, true)]), Ok(()));
        assert!(judge(&[(0, 5, false), (0, 7, true)]).unwrap_err().contains("job 5 and job 7"));
        assert!(judge(&[(0, 5, false), (1, 5, true)]).unwrap_err().contains("request 0 and of request 1"));
        assert!(judge(&[(0, 5, false), (0, 5, false), (1, 6, false)]).unwrap_err().contains("3 answers"));
    }

    #[test]
    fn each_id_is_sent_as_often_as_planned_and_meets_itself() {
        let plan = Plan { ids: 40, times: 3, seed: 1, planted: None };
        let mut sent = sendings(&plan, &mut StdRng::seed_from_u64(1));
        assert_ne!(sent[..3], [0, 0, 0], "in another order than by id");
        sent.sort_unstable();
        assert_eq!(sent, (0..40).flat_map(|id| [id; 3]).collect::<Vec<_>>());
    }
}
