//! Submission load that remembers what was acknowledged, and when. What must be true of it later is `checks`'.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use proto::{Client, v1};
use tokio::task::JoinSet;

/// One acknowledged submission.
#[derive(Clone, Debug)]
pub struct Ack {
    pub job_id: u64,
    pub request: v1::SubmitJobRequest,
    /// When the answer was here.
    pub at: Instant,
}

/// Clients that submit jobs for a GPU type that no machine has, until they are stopped.
pub struct Load {
    stop: Arc<AtomicBool>,
    acknowledged: Arc<Mutex<Vec<Ack>>>,
    clients: JoinSet<()>,
}

impl Load {
    /// `clients` closed loops: one outstanding submission each.
    pub fn start(client: &Client, clients: usize) -> Self {
        let mut load = Self { stop: Arc::default(), acknowledged: Arc::default(), clients: JoinSet::new() };
        for _ in 0..clients {
            let (client, stop, acknowledged) = (client.clone(), load.stop.clone(), load.acknowledged.clone());
            load.clients.spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    let request = submission();
                    // An error is an unknown outcome: neither found nor missing is wrong then.
                    if let Ok(reply) = client.submit_job(request.clone()).await {
                        let ack = Ack { job_id: reply.job_id, request, at: Instant::now() };
                        acknowledged.lock().expect("no client panics").push(ack);
                    }
                }
            });
        }
        load
    }

    /// Acknowledged so far.
    pub fn count(&self) -> usize {
        self.acknowledged.lock().expect("no client panics").len()
    }

    /// Waits for so many acknowledgements more.
    pub async fn more(&self, acks: usize, within: Duration) -> Result<(), String> {
        let (before, deadline) = (self.count(), Instant::now() + within);
        while self.count() < before + acks {
            if Instant::now() >= deadline {
                return Err(format!("{} acknowledgements in {within:?}, not {acks}", self.count() - before));
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        Ok(())
    }

    /// Lets the clients end their calls; all that was acknowledged.
    pub async fn finish(mut self) -> Vec<Ack> {
        self.stop.store(true, Ordering::Relaxed);
        while self.clients.join_next().await.is_some() {}
        self.acknowledgements()
    }

    /// Stops the clients in the middle of their calls; all that was acknowledged.
    pub async fn abandon(mut self) -> Vec<Ack> {
        self.clients.shutdown().await;
        self.acknowledgements()
    }

    fn acknowledgements(&self) -> Vec<Ack> {
        let acks = std::mem::take(&mut *self.acknowledged.lock().expect("no client panics"));
        let distinct: BTreeSet<u64> = acks.iter().map(|ack| ack.job_id).collect();
        assert_eq!(distinct.len(), acks.len(), "two acknowledgements name the same job");
        acks
    }
}

pub fn submission() -> v1::SubmitJobRequest {
    let job = v1::JobSpec {
        shape: Some(v1::Shape { gpus_per_rank: 1, gpu_types: vec!["none".into()], ..Default::default() }),
        body: Some(v1::Body { argv: vec!["true".into()], ..Default::default() }),
        ..Default::default()
    };
    v1::SubmitJobRequest { request_id: proto::request_id(), job: Some(job), user: "load".into() }
}
