//! `ares lock`: named locks. A lock ends with its session: what only the token does is keep a late writer out.

use std::process::ExitCode;
use std::time::Duration;

use proto::{Client, v1};
use serde_json::json;

use super::spec::duration_ms;
use crate::Global;
use crate::connect::{client, runtime, user};
use crate::exit::{CONFLICT, Failure, Outcome};
use crate::output::{self, Format};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
A lock is a hint that ends with its session: a holder that is frozen or cut off loses it after the TTL and may not know.
The token is the exclusion: pass it with each write and let the storage refuse a lower one.")]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Hold the lock while a command runs; it finds the token in ARES_LOCK_TOKEN
    Run {
        name: String,
        /// The session's life without contact
        #[arg(long, default_value = "15s")]
        ttl: String,
        /// Give up waiting for the lock after this time
        #[arg(long)]
        wait: Option<String>,
        #[arg(last = true, required = true, value_name = "COMMAND")]
        command: Vec<String>,
    },
    /// Open a session and acquire; prints session and token. Keep it alive with `keep-alive`
    Acquire {
        name: String,
        #[arg(long, default_value = "60s")]
        ttl: String,
        /// Give up waiting for the lock after this time
        #[arg(long)]
        wait: Option<String>,
    },
    /// Extend a session
    KeepAlive { session: u64 },
    /// Is this token the holder's? Exit code 5 when it is not
    Validate { name: String, token: u64 },
    /// Release a lock and end its session
    Release { name: String, session: u64 },
}

pub fn run(args: Args, global: Global) -> Outcome {
    let client = client(&global)?;
    runtime()?.block_on(async {
        match args.verb {
            Verb::Run { name, ttl, wait, command } => {
                let ttl_ms = duration_ms("--ttl", &ttl)?;
                hold_and_run(&client, &name, ttl_ms, wait_ms(wait)?, &command).await
            }
            Verb::Acquire { name, ttl, wait } => {
                let session_id = open(&client, duration_ms("--ttl", &ttl)?).await?;
                let token = acquire(&client, session_id, &name, wait_ms(wait)?).await?;
                match global.output {
                    Format::Table | Format::Name => println!("session {session_id} token {token}"),
                    _ => output::json(&json!({ "session": session_id, "token": token.to_string() })),
                }
                Ok(ExitCode::SUCCESS)
            }
            Verb::KeepAlive { session } => {
                client.keep_alive(v1::KeepAliveRequest { session_id: session }).await?;
                Ok(ExitCode::SUCCESS)
            }
            Verb::Validate { name, token } => {
                let reply = client.validate(v1::ValidateRequest { name: name.clone(), token }).await?;
                match global.output {
                    Format::Table | Format::Name => println!("{}", if reply.held { "held" } else { "not held" }),
                    _ => output::json(&json!({
                        "held": reply.held,
                        "holder_token": crate::json::token(reply.holder_token),
                        "revision": reply.revision,
                    })),
                }
                Ok(if reply.held { ExitCode::SUCCESS } else { ExitCode::from(CONFLICT) })
            }
            Verb::Release { name, session } => {
                release(&client, session, &name).await?;
                Ok(ExitCode::SUCCESS)
            }
        }
    })
}

fn wait_ms(text: Option<String>) -> Result<Option<u64>, Failure> {
    text.map(|text| duration_ms("--wait", &text)).transpose()
}

async fn open(client: &Client, ttl_ms: u64) -> Result<u64, Failure> {
    let request = v1::OpenSessionRequest { request_id: proto::request_id(), owner: user(), ttl_ms };
    Ok(client.open_session(request).await?.session_id)
}

/// Waits in line while the session is kept alive.
async fn acquire(client: &Client, session_id: u64, name: &str, wait_ms: Option<u64>) -> Result<u64, Failure> {
    let request = v1::AcquireRequest { request_id: proto::request_id(), session_id, name: name.to_owned() };
    let waiting = async {
        let mut said = false;
        loop {
            let reply = client.acquire(request.clone()).await?;
            if reply.granted {
                return Ok(reply.token);
            }
            // The same id was answered with "in line"; who holds it now is a read.
            let holder = client.get(v1::GetRequest { key: format!("/locks/{name}"), ..Default::default() }).await?;
            if let Some(token) = holder.kvs.first().and_then(|kv| granted_to(&kv.value, session_id)) {
                return Ok(token);
            }
            if !said {
                eprintln!("Waiting for lock {name:?}.");
                said = true;
            }
            client.keep_alive(v1::KeepAliveRequest { session_id }).await?;
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    let Some(ms) = wait_ms else { return waiting.await };
    match tokio::time::timeout(Duration::from_millis(ms), waiting).await {
        Ok(answer) => answer,
        Err(_) => {
            let request = v1::EndSessionRequest { request_id: proto::request_id(), session_id };
            client.end_session(request).await?;
            Err(Failure::new(crate::exit::TIMED_OUT, format!("lock {name:?} was not granted within {ms} ms")))
        }
    }
}

/// The token when the rendered lock says that this session holds it.
fn granted_to(value: &str, session_id: u64) -> Option<u64> {
    let lock: serde_json::Value = serde_json::from_str(value).ok()?;
    let holder = lock.get("holder")?;
    let session = holder.get("session")?;
    let ours = session.as_u64() == Some(session_id) || session.as_str() == Some(&session_id.to_string());
    ours.then(|| holder.get("token")?.as_str()?.parse().ok()).flatten()
}

async fn release(client: &Client, session_id: u64, name: &str) -> Result<(), Failure> {
    let release = v1::ReleaseRequest { request_id: proto::request_id(), session_id, name: name.to_owned() };
    client.release(release).await?;
    client.end_session(v1::EndSessionRequest { request_id: proto::request_id(), session_id }).await?;
    Ok(())
}

/// Runs the command under the lock; kills it when the session can no longer be kept.
async fn hold_and_run(
    client: &Client,
    name: &str,
    ttl_ms: u64,
    wait_ms: Option<u64>,
    command: &[String],
) -> Outcome {
    let session_id = open(client, ttl_ms).await?;
    let token = acquire(client, session_id, name, wait_ms).await?;
    eprintln!("Lock {name:?} held with token {token}.");
    let mut child = tokio::process::Command::new(&command[0])
        .args(&command[1..])
        .env("ARES_LOCK_NAME", name)
        .env("ARES_LOCK_TOKEN", token.to_string())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| Failure::new(crate::exit::NOT_FOUND, format!("{}: {error}", command[0])))?;
    let status = tokio::select! {
        status = child.wait() => status?,
        failure = keep(client, session_id, ttl_ms) => {
            child.kill().await?;
            return Err(failure.advise("the command was killed, since the lock can no longer be assumed held"));
        }
    };
    release(client, session_id, name).await?;
    use std::os::unix::process::ExitStatusExt;
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default());
    Ok(ExitCode::from((code & 0xff) as u8))
}

/// Keeps the session alive; returns when it can't be any more: refused, or unheard for a TTL since the last success.
async fn keep(client: &Client, session_id: u64, ttl_ms: u64) -> Failure {
    let ttl = Duration::from_millis(ttl_ms);
    let mut good = tokio::time::Instant::now();
    loop {
        tokio::time::sleep_until(good + ttl / 3).await;
        let sent = tokio::time::Instant::now();
        match tokio::time::timeout_at(good + ttl, client.keep_alive(v1::KeepAliveRequest { session_id })).await {
            Ok(Ok(_)) => good = sent,
            Ok(Err(error @ proto::Error::Refused { .. })) => return error.into(),
            Ok(Err(_)) if tokio::time::Instant::now() < good + ttl => continue,
            _ => return Failure::new(crate::exit::UNAVAILABLE, format!("session {session_id} could not be kept alive")),
        }
    }
}
