//! A file system of a replica's own: an ext4 in a file, whose power can be cut and which can be filled. Needs root, loop
//! devices and mkfs.ext4.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, fallocate, statvfs};
use rustix::mount::{MountPropagationFlags, UnmountFlags, mount_change, unmount};
use rustix::thread::{UnshareFlags, unshare_unsafe};

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

    pub fn mounted_at(&self) -> &Path {
        &self.mounted_at
    }

    fn mount(&self) -> Result<(), String> {
        run(Command::new("mount").args(["-o", "loop"]).arg(&self.image).arg(&self.mounted_at)).map(|_| ())
    }

    fn unmount(&self) -> Result<(), String> {
        let mut tried = Err("never tried".to_owned());
        for _ in 0..100 {
            tried = run(Command::new("umount").arg(&self.mounted_at)).map(|_| ());
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

    /// Power is back: what was synced is there. Nobody may use the file system. An error when it can't be had without
    /// what was lost: another mount namespace, of a container or a job, that was made meanwhile holds the old one.
    pub fn power_on(&self) -> Result<(), String> {
        self.unmount()?;
        for _ in 0..100 {
            if self.loop_devices()?.is_empty() {
                return self.mount();
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Err(format!("{} is mounted in another mount namespace too: {}", self.image.display(), self.loop_devices()?))
    }

    /// Devices that still stand for the image.
    fn loop_devices(&self) -> Result<String, String> {
        run(Command::new("losetup").arg("--associated").arg(&self.image))
    }

    /// Takes all free space, as a disk fills: most of it, the rest a moment later, then what others give back. Returns when
    /// there was none for a while; [`Disk::empty`] gives it back.
    pub fn fill(&self) -> Result<(), String> {
        const NEARLY: u64 = 10 << 20;
        let ballast = File::create(self.ballast()).map_err(|error| error.to_string())?;
        let disk = statvfs(&self.mounted_at).map_err(|error| error.to_string())?;
        let mut taken = (disk.f_bavail * disk.f_frsize).saturating_sub(NEARLY);
        fallocate(&ballast, FallocateFlags::empty(), 0, taken.max(1)).map_err(|error| error.to_string())?;
        std::thread::sleep(Duration::from_secs(2));
        let mut full_since = Instant::now();
        while full_since.elapsed() < Duration::from_secs(1) {
            let disk = statvfs(&self.mounted_at).map_err(|error| error.to_string())?;
            let free = disk.f_bavail * disk.f_frsize;
            // Space for the file's own extents is needed beside it: the last kilobytes go block by block.
            let bytes = if free > 1 << 20 { free - (1 << 19) } else { 4096 };
            match fallocate(&ballast, FallocateFlags::empty(), taken, bytes) {
                Ok(()) => {
                    taken += bytes;
                    full_since = Instant::now();
                }
                Err(rustix::io::Errno::NOSPC) => std::thread::sleep(Duration::from_millis(10)),
                Err(error) => return Err(error.to_string()),
            }
        }
        Ok(())
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

/// Does something, such as to start a process, where these are not mounted: a mount namespace that it makes later would hold on to them.
pub fn without<T: Send>(hidden: &[&Path], start: impl FnOnce() -> std::io::Result<T> + Send) -> std::io::Result<T> {
    if hidden.is_empty() {
        return start();
    }
    let apart = || {
        // SAFETY: of what this thread shares, its view of file systems alone is parted.
        unsafe { unshare_unsafe(UnshareFlags::NEWNS) }?;
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
        for mounted_at in hidden {
            unmount(*mounted_at, UnmountFlags::DETACH)?;
        }
        start()
    };
    std::thread::scope(|scope| scope.spawn(apart).join().expect("it does not panic"))
}

/// What it printed, if it succeeded.
fn run(command: &mut Command) -> Result<String, String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|error| format!("{program}: {error}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(format!("{program}: {}", String::from_utf8_lossy(&output.stderr).trim()))
}
