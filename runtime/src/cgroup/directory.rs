//! The directories of the unified hierarchy (cgroup v2) at /sys/fs/cgroup, and what their own
//! files do: list, freeze and kill processes. See cgroups(7) and the kernel's
//! Documentation/admin-guide/cgroup-v2.rst.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;

use crate::error::{Context, Error, Result, refuse};
use crate::log;
use crate::sys::path::cleaned;

pub(crate) use rrun_kernel::cgroup::MOUNT_POINT;

/// The most that is read of a cgroup's file; cgroup.procs of a large one is the longest.
const FILE_BYTES_MAX: u64 = 4 << 20;
/// How long killed processes may take to leave their cgroup.
pub(super) const EMPTY_TIMEOUT: Duration = Duration::from_secs(10);

/// A cgroup's directory, open.
pub(super) struct Directory {
    path: PathBuf,
    fd: OwnedFd,
}

impl Directory {
    pub(super) fn open(path: &Path) -> Result<Directory> {
        Ok(Directory {
            path: path.to_owned(),
            fd: open(path)?,
        })
    }

    /// Makes the cgroup, or takes one that is there and empty.
    ///
    /// # Errors
    /// No cgroup v2 on this host; a cgroup that has processes or is frozen.
    pub(super) fn create(path: &Path) -> Result<Directory> {
        let doing = || format!("make cgroup {}", path.display());
        let existed = match rustix::fs::mkdir(path, Mode::from_raw_mode(0o755)) {
            Ok(()) => false,
            Err(Errno::EXIST) => true,
            Err(Errno::NOENT) => {
                check_unified()?;
                std::fs::create_dir_all(path).doing(doing)?;
                false
            }
            Err(errno) => {
                check_unified()?;
                return Err(errno).doing(doing);
            }
        };
        let fd = rustix::fs::open(
            path,
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .doing(doing)?;
        let cgroup = Directory {
            path: path.to_owned(),
            fd,
        };
        if !rrun_kernel::cgroup::is_cgroup(&cgroup.fd).doing(doing)? {
            if !existed {
                let _ = rustix::fs::rmdir(path);
            }
            refuse!(
                "{}: rrun needs cgroup v2, and {MOUNT_POINT} is not a cgroup2 mount",
                doing()
            );
        }
        if existed {
            cgroup.check_unused()?;
        }
        Ok(cgroup)
    }

    fn check_unused(&self) -> Result<()> {
        let path = self.path.display();
        let events =
            read(&self.path, "cgroup.events").doing(|| format!("read cgroup.events of {path}"))?;
        if rrun_kernel::cgroup::keyed(&events, "populated") == Some(1) {
            refuse!("make cgroup {path}: it exists, and there are processes in it");
        }
        if is_frozen(&self.path) {
            refuse!("make cgroup {path}: it exists, and is frozen");
        }
        Ok(())
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Writes one of its files.
    pub(super) fn write(&self, file: &str, value: &str) -> std::result::Result<(), Errno> {
        write(self, file, value)
    }
}

impl AsFd for Directory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Reads one file of a cgroup, without the last newline.
pub(crate) fn read(cgroup: &Path, file: &str) -> std::result::Result<String, std::io::Error> {
    use std::io::Read as _;
    let mut text = String::new();
    std::fs::File::open(cgroup.join(file))?
        .take(FILE_BYTES_MAX)
        .read_to_string(&mut text)?;
    text.truncate(text.trim_end().len());
    Ok(text)
}

fn write(directory: impl AsFd, file: &str, value: &str) -> std::result::Result<(), Errno> {
    let file = rustix::fs::openat(
        directory,
        file,
        OFlags::WRONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    rustix::io::write(&file, value.as_bytes())?;
    Ok(())
}

/// One sentence for a host that rrun can not work on.
pub(super) fn check_unified() -> Result<()> {
    if !rrun_kernel::cgroup::is_mounted().unwrap_or(false) {
        refuse!("rrun needs cgroup v2, and {MOUNT_POINT} is not a cgroup2 mount");
    }
    Ok(())
}

/// Opens the cgroup of an existing container, for a process to be made in.
pub(crate) fn open(path: &Path) -> Result<OwnedFd> {
    rustix::fs::open(
        path,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .doing(|| format!("open cgroup {}", path.display()))
}

pub(crate) fn is_frozen(path: &Path) -> bool {
    let mut state = [0u8; 1];
    rustix::fs::open(
        path.join("cgroup.freeze"),
        OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .and_then(|file| rustix::io::read(&file, &mut state))
    .is_ok()
        && state == *b"1"
}

/// Freezes or thaws all processes of a cgroup, and waits until it is so.
pub(crate) fn freeze(path: &Path, frozen: bool) -> Result<()> {
    let doing = || {
        let verb = if frozen { "freeze" } else { "thaw" };
        format!("{verb} cgroup {}", path.display())
    };
    let directory = open(path)?;
    let value = if frozen { "1" } else { "0" };
    write(&directory, "cgroup.freeze", value).doing(doing)?;
    let wanted = format!("frozen {value}");
    if !wait_for_event(path, &wanted, EMPTY_TIMEOUT)? {
        if frozen {
            let _ = write(&directory, "cgroup.freeze", "0");
        }
        refuse!(
            "{}: it was not done within {} s",
            doing(),
            EMPTY_TIMEOUT.as_secs()
        );
    }
    Ok(())
}

/// All processes in a cgroup and those below it.
pub(crate) fn all_pids(path: &Path) -> Result<Vec<i32>> {
    let mut pids = Vec::new();
    for directory in rrun_kernel::cgroup::tree(path) {
        match read(&directory, "cgroup.procs") {
            Ok(text) => pids.extend(text.lines().filter_map(|line| line.parse::<i32>().ok())),
            // EOPNOTSUPP: a threaded cgroup, whose processes are listed further up.
            Err(error) if is_gone(&error) => {}
            Err(error) => {
                return Err(error).doing(|| format!("list processes of {}", directory.display()));
            }
        }
    }
    Ok(pids)
}

fn is_gone(error: &std::io::Error) -> bool {
    matches!(
        error.raw_os_error().map(Errno::from_raw_os_error),
        Some(Errno::NOENT | Errno::NODEV | Errno::OPNOTSUPP)
    )
}

/// Kills every process in a cgroup and below it, and does not wait for it.
pub(crate) fn kill_all(path: &Path) -> Result<()> {
    rrun_kernel::cgroup::kill(path)
        .doing(|| format!("kill all processes in cgroup {}", path.display()))
}

/// Waits until cgroup.events has a line; the kernel wakes who polls it at every change.
pub(super) fn wait_for_event(path: &Path, wanted: &str, within: Duration) -> Result<bool> {
    let doing = || format!("watch cgroup.events of {}", path.display());
    let file = match rustix::fs::open(
        path.join("cgroup.events"),
        OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    ) {
        Err(Errno::NOENT) => return Ok(true),
        result => result.doing(doing)?,
    };
    let deadline = Instant::now() + within;
    let mut buffer = [0u8; 256];
    loop {
        match rustix::io::pread(&file, &mut buffer, 0) {
            Ok(length) => {
                let text = buffer.get(..length).unwrap_or_default();
                if text
                    .split(|byte| *byte == b'\n')
                    .any(|line| line == wanted.as_bytes())
                {
                    return Ok(true);
                }
            }
            Err(Errno::NODEV) => return Ok(true),
            Err(errno) => return Err(errno).doing(doing),
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            log::warning(&format!("gave up: {} shows no \"{wanted}\"", doing()));
            return Ok(false);
        }
        let timeout = Timespec {
            tv_sec: left.as_secs() as _,
            tv_nsec: left.subsec_nanos() as _,
        };
        match poll(&mut [PollFd::new(&file, PollFlags::PRI)], Some(&timeout)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno).doing(doing),
        }
    }
}

/// The cgroup that a process is in, for when the container's own can take no processes
/// because the container has divided it.
pub(crate) fn of_process(pid: i32) -> Result<PathBuf> {
    let path = format!("/proc/{pid}/cgroup");
    let text = std::fs::read_to_string(&path).doing(|| format!("read {path}"))?;
    let own = text
        .lines()
        .find_map(|line| line.strip_prefix("0::/"))
        .ok_or_else(|| Error::new(format!("{path} names no cgroup v2")))?;
    Ok(Path::new(MOUNT_POINT).join(own))
}

/// Whether a path below a container's cgroup exists there, for `exec --cgroup`.
pub(crate) fn existing_below(path: &Path, inner: &str) -> Result<PathBuf> {
    let inner = cleaned(Path::new(inner));
    let relative = inner.strip_prefix("/").unwrap_or(&inner);
    let full = path.join(relative);
    rustix::fs::statat(rustix::fs::CWD, &full, AtFlags::SYMLINK_NOFOLLOW)
        .doing(|| format!("open cgroup {}", full.display()))?;
    Ok(full)
}
