//! A file system of a replica's own: an ext4 in a file, whose power can be cut and which can be filled. Needs root, loop
//! devices and mkfs.ext4.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, fallocate, statvfs};

/// A mounted file system; unmounted when dropped.
#[derive(Debug)]
pub struct Disk {
    image: PathBuf,
    mounted_at: PathBuf,
}

impl Disk {
    /// Makes one of `mib` MiB in the file `image`, mounted at `at`, or says why that can't be done here.
    pub fn make(image: &Path, at: &Path, mib: u64) -> Result<Self, String> {
        if !rustix::process::geteuid().is_root() {
            return Err("file systems can be mounted by root alone".to_owned());
        }
        let size = |error: std::io::Error| format!("{}: {error}", image.display());
        File::create(image).and_then(|file| file.set_len(mib << 20)).map_err(size)?;
        std::fs::create_dir_all(at).map_err(|error| format!("{}: {error}", at.display()))?;
        run(Command::new("mkfs.ext4").args(["-q", "-F", "-m", "0"]).arg(image))?;
        let disk = Self { image: image.to_owned(), mounted_at: at.to_owned() };
        disk.mount()?;
        Ok(disk)
    }

    /// Whether [`Disk::make`] works on this machine, and why not.
    pub fn available() -> Result<(), String> {
        let dir = tempfile::tempdir().map_err(|error| error.to_string())?;
        Self::make(&dir.path().join("image"), &dir.path().join("mounted"), 8).map(|_| ())
    }

    fn mount(&self) -> Result<(), String> {
        run(Command::new("mount").args(["-o", "loop"]).arg(&self.image).arg(&self.mounted_at))
    }

    fn unmount(&self) -> Result<(), String> {
        let mut tried = Err("never tried".to_owned());
        for _ in 0..100 {
            tried = run(Command::new("umount").arg(&self.mounted_at));
            if tried.is_ok() {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        tried
    }

    /// Everything that was not synced is gone from now on, the journal's own buffer too. Returns a time just before: an
    /// acknowledgement counts if it came earlier.
    pub fn cut_power(&self) -> Result<Instant, String> {
        /// `EXT4_IOC_SHUTDOWN`, and its flag that the journal is not flushed either.
        const SHUTDOWN: rustix::ioctl::Opcode = 0x8004_587d;
        const NO_LOG_FLUSH: u32 = 2;
        let root = File::open(&self.mounted_at).map_err(|error| error.to_string())?;
        let before = Instant::now();
        // SAFETY: the request reads one u32.
        let done = unsafe { rustix::ioctl::ioctl(&root, rustix::ioctl::Setter::<SHUTDOWN, u32>::new(NO_LOG_FLUSH)) };
        done.map_err(|error| format!("{} could not be shut down: {error}", self.mounted_at.display()))?;
        Ok(before)
    }

    /// Power is back: what was synced is there. Nobody may use the file system.
    pub fn power_on(&self) -> Result<(), String> {
        self.unmount()?;
        self.mount()
    }

    /// Takes all free space but about `left` bytes, until [`Disk::empty`].
    pub fn fill(&self, left: u64) -> Result<(), String> {
        let ballast = File::create(self.ballast()).map_err(|error| error.to_string())?;
        let disk = statvfs(&self.mounted_at).map_err(|error| error.to_string())?;
        let bytes = (disk.f_bavail * disk.f_frsize).saturating_sub(left);
        fallocate(&ballast, FallocateFlags::empty(), 0, bytes).map_err(|error| error.to_string())
    }

    pub fn empty(&self) -> Result<(), String> {
        std::fs::remove_file(self.ballast()).map_err(|error| error.to_string())
    }

    fn ballast(&self) -> PathBuf {
        self.mounted_at.join("ballast")
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if self.unmount().is_err() {
            let _ = run(Command::new("umount").arg("-l").arg(&self.mounted_at));
        }
    }
}

fn run(command: &mut Command) -> Result<(), String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|error| format!("{program}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{program}: {}", String::from_utf8_lossy(&output.stderr).trim()))
}
