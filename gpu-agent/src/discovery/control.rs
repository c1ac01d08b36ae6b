//! The control socket of a simulated machine: one JSON a line, answered with `ok` or the error.
//!
//! ```text
//! {"do":"xid","gpu":3,"code":79}
//! ok
//! {"do":"lost","gpu":9}
//! gpu: expected a slot below 8, found 9
//! ```
//! Only the agent's own user may connect. What a command does is `sim`'s matter.

use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;

use super::sim::{SimBackend, Verb};

/// Name of the socket in the agent's directory.
pub const SOCKET: &str = "sim.sock";

/// A command is far shorter.
const MAX_LINE: u64 = 4_096;

/// People and scripts at once; more wait to be accepted.
const MAX_CONNECTIONS: usize = 16;

/// Listens in the agent's directory. A socket left by an earlier agent is replaced; any other file there is an error.
pub fn bind(directory: &Path) -> io::Result<UnixListener> {
    let path: PathBuf = directory.join(SOCKET);
    let named = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", path.display()));
    match std::fs::symlink_metadata(&path) {
        Ok(file) if file.file_type().is_socket() => std::fs::remove_file(&path).map_err(named)?,
        _ => {}
    }
    let listener = UnixListener::bind(&path).map_err(named)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).map_err(named)?;
    Ok(listener)
}

/// Serves commands for as long as the task lives.
pub async fn serve(listener: UnixListener, sim: Arc<SimBackend>) -> io::Result<()> {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let place = Arc::clone(&places).acquire_owned().await.map_err(io::Error::other)?;
        let (stream, _) = listener.accept().await?;
        let sim = Arc::clone(&sim);
        tokio::spawn(async move {
            if let Err(error) = converse(stream, &sim).await {
                tracing::debug!(%error, "a control connection broke");
            }
            drop(place);
        });
    }
}

async fn converse(stream: UnixStream, sim: &SimBackend) -> io::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut reader = BufReader::new(read);
    loop {
        let mut line = String::new();
        let length = (&mut reader).take(MAX_LINE).read_line(&mut line).await?;
        if length == 0 {
            return Ok(());
        }
        let too_long = length as u64 == MAX_LINE && !line.ends_with('\n');
        let answer = if too_long { format!("expected at most {MAX_LINE} bytes in a line") } else { answer(&line, sim) };
        write.write_all(format!("{answer}\n").as_bytes()).await?;
        if too_long {
            return Ok(());
        }
    }
}

/// Carries out one line and says how it went, in one line.
pub fn answer(line: &str, sim: &SimBackend) -> String {
    let verb: Verb = match serde_json::from_str(line.trim()) {
        Ok(verb) => verb,
        Err(error) => {
            return format!(
                "expected {{\"do\":\"xid\",\"gpu\":SLOT,\"code\":N}} or {{\"do\":\"lost\",\"gpu\":SLOT}}: {error}"
            );
        }
    };
    match sim.act(&verb) {
        Ok(()) => {
            tracing::info!(?verb, "the simulated machine was told to fail");
            "ok".to_owned()
        }
        Err(error) => error.to_string(),
    }
}
