//! Submission load that remembers what was acknowledged, and the check that it is still there.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use proto::{Client, v1};
use tokio::task::JoinSet;

/// Clients that submit jobs for a GPU type that no machine has, until they are stopped.
pub struct Load {
    stop: Arc<AtomicBool>,
    acknowledged: Arc<Mutex<Vec<u64>>>,
    count: Arc<AtomicU64>,
    clients: JoinSet<()>,
}

impl Load {
    pub fn start(client: &Client, clients: usize) -> Self {
        let mut load = Self {
            stop: Arc::default(),
            acknowledged: Arc::default(),
            count: Arc::default(),
            clients: JoinSet::new(),
        };
        for _ in 0..clients {
            let (client, stop) = (client.clone(), load.stop.clone());
            let (acknowledged, count) = (load.acknowledged.clone(), load.count.clone());
            load.clients.spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    // An error is an unknown outcome: neither found nor missing is wrong then.
                    if let Ok(reply) = client.submit_job(submission()).await {
                        acknowledged.lock().expect("no client panics").push(reply.job_id);
                        count.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
        load
    }

    /// Acknowledged so far.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// Stops the clients; all ids that were acknowledged.
    pub async fn finish(mut self) -> Vec<u64> {
        self.stop.store(true, Ordering::Relaxed);
        while self.clients.join_next().await.is_some() {}
        let acknowledged = std::mem::take(&mut *self.acknowledged.lock().expect("no client panics"));
        let distinct: BTreeSet<u64> = acknowledged.iter().copied().collect();
        assert_eq!(distinct.len(), acknowledged.len(), "two acknowledgements name the same job");
        acknowledged
    }
}

fn submission() -> v1::SubmitJobRequest {
    let job = v1::JobSpec {
        shape: Some(v1::Shape { gpus_per_rank: 1, gpu_types: vec!["none".into()], ..Default::default() }),
        body: Some(v1::Body { argv: vec!["true".into()], ..Default::default() }),
        ..Default::default()
    };
    v1::SubmitJobRequest { request_id: proto::request_id(), job: Some(job), user: "load".into() }
}

/// Ids of all jobs that the replica behind the client has.
pub async fn all_jobs(client: &Client) -> BTreeSet<u64> {
    let mut found = BTreeSet::new();
    let mut after = String::new();
    loop {
        let request = v1::GetRequest {
            key: "/jobs/".into(),
            prefix: true,
            keys_only: true,
            limit: 10_000,
            after: after.clone(),
            ..Default::default()
        };
        let reply = client.get(request).await.expect("the replica answers");
        found.extend(reply.kvs.iter().filter_map(|kv| kv.key.strip_prefix("/jobs/")?.parse::<u64>().ok()));
        match reply.kvs.last() {
            Some(last) if reply.more => after = last.key.clone(),
            _ => return found,
        }
    }
}
