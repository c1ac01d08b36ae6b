//! What clients were told, against what is so.

use std::collections::{BTreeMap, BTreeSet};

use statemachine::command::*;
use statemachine::record::*;
use statemachine::*;

/// What clients were told: a naive model of the promises.
#[derive(Default)]
pub struct Told {
    requests: BTreeMap<RequestId, JobId>,
    jobs: BTreeSet<JobId>,
    results: BTreeMap<JobId, TaskResult>,
    highest_token: Token,
    epochs: BTreeMap<NodeId, u64>,
    retained: bool,
}

impl Told {
    pub fn hear(&mut self, cmds: &[Cmd], outcomes: &[Outcome]) {
        for (cmd, outcome) in cmds.iter().zip(outcomes) {
            match (&cmd.body, outcome) {
                (Command::SubmitJob(_), Outcome::Done(Reply::Stored(StoredReply::Job(id)))) => {
                    assert!(self.jobs.insert(*id), "a job id was given twice");
                    if let Some(request) = cmd.request {
                        let old = self.requests.insert(request, *id);
                        assert!(old.is_none() || request.unix_ms().is_none(), "one request id made two jobs");
                    }
                }
                (Command::SubmitJob(_), Outcome::Replayed(reply)) => {
                    let first = self.requests[&cmd.request.expect("only a request id is replayed")];
                    assert_eq!(*reply, StoredReply::Job(first));
                }
                (_, Outcome::Done(Reply::Plan(answers))) => answers.iter().flatten().for_each(|t| self.grow(*t)),
                (_, Outcome::Done(Reply::Stored(StoredReply::Lock(Some(token))))) => {
                    self.highest_token = self.highest_token.max(*token);
                }
                (_, Outcome::Done(Reply::Registered { node, epoch })) => {
                    let old = self.epochs.insert(*node, *epoch);
                    assert!(old < Some(*epoch), "epoch_grows");
                }
                (Command::Retain { .. }, Outcome::Done(_)) => self.retained = true,
                _ => {}
            }
        }
    }

    fn grow(&mut self, token: Token) {
        assert!(token > self.highest_token, "token_grows: {token} after {}", self.highest_token);
        self.highest_token = token;
    }

    pub fn compare(&mut self, state: &State) {
        for id in &self.jobs {
            assert!(self.retained || state.job_view(*id).is_some(), "nothing_lost: job {id}");
        }
        for (key, task) in state.tasks.iter() {
            if let Some(result) = &task.value.result {
                let first = self.results.entry(key.job).or_insert_with(|| result.clone());
                assert_eq!(first, result, "result_once");
            }
        }
    }
}
