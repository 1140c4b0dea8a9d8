//! The cgroup directories of the unified hierarchy (cgroup v2) at /sys/fs/cgroup. The functions of
//! this module list, freeze and kill the processes of a cgroup. See cgroups(7) and the kernel's
//! Documentation/admin-guide/cgroup-v2.rst.

use std::io::{BufRead, BufReader};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;

use crate::error::{Context, Error, Kind, Reason as _, Result, refuse};
use crate::log;
use crate::sys::path::cleaned;

pub(crate) use rrun_kernel::cgroup::MOUNT_POINT;
use rrun_kernel::cgroup::{CgroupTree, Survivors};

/// The largest number of bytes that rrun reads from a cgroup's file. This limit does not apply to
/// cgroup.procs, which is longer in a cgroup with many processes.
const FILE_BYTES_MAX: u64 = 4 << 20;
/// The time limit for killed processes to leave their cgroup, and for a cgroup to freeze or thaw.
pub(super) const EMPTY_TIMEOUT: Duration = Duration::from_secs(10);
/// The maximum time for which [`kill_all_and_survivors`] waits for an empty cgroup.
const SURVIVORS_TIMEOUT: Duration = Duration::from_secs(1);

/// The interval at which [`wait_for_event`] reads cgroup.events although the kernel has reported no
/// change. The kernel does not wake the polling process when the cgroup is removed.
const LOOK_AGAIN_INTERVAL: Duration = Duration::from_millis(500);

/// The mode of a container's cgroup. The sticky bit marks the cgroup as the cgroup of a container.
/// rrun creates no second container in a marked cgroup, because the deletion of one container kills
/// all processes in its cgroup.
const MARKED_MODE: u32 = Mode::SVTX.bits() | 0o755;

/// The name of an empty cgroup that rrun creates below an existing cgroup while rrun checks and marks
/// the existing cgroup. While this name exists, no other rrun process can mark the existing cgroup.
const RESERVATION: &str = "rrun.reserved";

/// The open directory of a cgroup.
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

    /// Creates the cgroup, or opens the cgroup if it already exists and no container uses it.
    ///
    /// # Errors
    /// Fails if this host does not use cgroup v2, or if rrun has no permission to create the cgroup.
    /// The kind of these errors is [`Kind::NoCgroups`]. Also fails if an existing cgroup is frozen,
    /// contains processes or belongs to another container.
    pub(super) fn create(path: &Path) -> Result<Directory> {
        let mode = Mode::from_raw_mode(MARKED_MODE);
        let mut made = rustix::fs::mkdir(path, mode);
        if made == Err(Errno::NOENT) {
            check_unified()?;
            if let Some(parent) = path.parent() {
                std::fs::create_dir_all(parent).map_err(|error| {
                    let errno = Errno::from_io_error(&error).unwrap_or(Errno::IO);
                    not_created(path, errno)
                })?;
            }
            made = rustix::fs::mkdir(path, mode);
        }
        let existed = match made {
            Ok(()) => false,
            Err(Errno::EXIST) => true,
            Err(errno) => {
                check_unified()?;
                return Err(not_created(path, errno));
            }
        };
        let created = Directory::open_checked(path, existed);
        if created.is_err() && !existed {
            let _ = rustix::fs::rmdir(path);
        }
        created
    }

    fn open_checked(path: &Path, existed: bool) -> Result<Directory> {
        let doing = || creating(path);
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
            refuse!(
                "{}: rrun needs cgroup v2, and {MOUNT_POINT} is not a cgroup2 mount",
                doing()
            );
        }
        if existed {
            cgroup.claim()?;
        }
        Ok(cgroup)
    }

    /// Checks that no container uses the existing cgroup, and marks the cgroup as the cgroup of a
    /// container.
    fn claim(&self) -> Result<()> {
        self.check_unused()?;
        // The call can also fail because the number of cgroups is limited. rrun can use the cgroup
        // nevertheless.
        let reserved = rustix::fs::mkdirat(&self.fd, RESERVATION, Mode::from_raw_mode(0o755));
        if reserved == Err(Errno::EXIST) {
            let path = self.path.display();
            refuse!("create cgroup {path}: another process is creating a container in it");
        }
        // Between the first check and the reservation, another rrun process can have claimed the
        // cgroup.
        let checked = self.check_unused();
        if checked.is_ok() {
            // Without the right to change the mode, rrun can use the cgroup nevertheless.
            let _ = rustix::fs::fchmod(&self.fd, Mode::from_raw_mode(MARKED_MODE));
        }
        let _ = rustix::fs::unlinkat(&self.fd, RESERVATION, AtFlags::REMOVEDIR);
        checked
    }

    fn check_unused(&self) -> Result<()> {
        let path = self.path.display();
        let events =
            read(&self.path, "cgroup.events").doing(|| format!("read cgroup.events of {path}"))?;
        if rrun_kernel::cgroup::keyed(&events, "populated") == Some(1) {
            refuse!("create cgroup {path}: it already exists and contains processes");
        }
        if is_frozen(&self.path)? {
            refuse!("create cgroup {path}: it already exists and is frozen");
        }
        let stat = rustix::fs::fstat(&self.fd).doing(|| creating(&self.path))?;
        if Mode::from_raw_mode(stat.st_mode).contains(Mode::SVTX) {
            refuse!(
                "create cgroup {path}: it already exists for another container; delete that container, or remove this cgroup with rmdir"
            );
        }
        Ok(())
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Writes to a file of the cgroup.
    pub(super) fn write(&self, file: &str, value: &str) -> std::result::Result<(), Errno> {
        write(self, file, value)
    }
}

impl AsFd for Directory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn not_created(path: &Path, errno: Errno) -> Error {
    let mut reason = errno.reason();
    if errno == Errno::AGAIN {
        reason += ": a cgroup above it has reached its cgroup.max.descendants or cgroup.max.depth";
    }
    let error = Error::new(reason).while_doing(creating(path));
    match errno {
        Errno::ACCESS | Errno::PERM | Errno::ROFS => error.with_kind(Kind::NoCgroups),
        _ => error,
    }
}

fn creating(path: &Path) -> String {
    format!("create cgroup {}", path.display())
}

/// Returns the content of a cgroup's file, without the final newline.
pub(crate) fn read(cgroup: &Path, file: &str) -> std::result::Result<String, std::io::Error> {
    content(std::fs::File::open(cgroup.join(file))?)
}

fn content(file: std::fs::File) -> std::result::Result<String, std::io::Error> {
    use std::io::Read as _;
    let mut text = String::new();
    file.take(FILE_BYTES_MAX).read_to_string(&mut text)?;
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

/// Checks that cgroup v2 is mounted, because rrun cannot work without cgroup v2.
pub(super) fn check_unified() -> Result<()> {
    let mounted = match rrun_kernel::cgroup::is_mounted() {
        Err(Errno::NOENT) => false,
        mounted => mounted.doing(|| format!("check that {MOUNT_POINT} is a cgroup2 mount"))?,
    };
    if !mounted {
        let sentence = format!("rrun needs cgroup v2, and {MOUNT_POINT} is not a cgroup2 mount");
        return Err(Error::new(sentence).with_kind(Kind::NoCgroups));
    }
    Ok(())
}

/// Returns whether `path` is the path of a cgroup below the root cgroup. The cgroup does not have to
/// exist.
pub(crate) fn is_path_of_cgroup(path: &Path) -> bool {
    let plain = path
        .components()
        .all(|part| !matches!(part, Component::ParentDir));
    let parent = path.parent();
    plain && parent.is_some_and(|parent| parent.starts_with(MOUNT_POINT))
}

/// Opens the cgroup of an existing container, so that a process can be created in the cgroup.
pub(crate) fn open(path: &Path) -> Result<OwnedFd> {
    rustix::fs::open(
        path,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .doing(|| format!("open cgroup {}", path.display()))
}

/// Returns whether the cgroup is frozen. A cgroup that does not exist is not frozen. The path can be
/// from the state of another user's container, and lead to another file, such as a FIFO.
pub(crate) fn is_frozen(path: &Path) -> Result<bool> {
    if !is_path_of_cgroup(path) {
        return Ok(false);
    }
    let mut state = [0u8; 1];
    let read = rustix::fs::open(
        path.join("cgroup.freeze"),
        OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .and_then(|file| rustix::io::retry_on_intr(|| rustix::io::read(&file, &mut state)));
    match read {
        Ok(_) => Ok(state == *b"1"),
        // ENODEV means that the cgroup was removed after its file was opened.
        Err(Errno::NOENT | Errno::NODEV) => Ok(false),
        Err(errno) => Err(errno).doing(|| format!("read cgroup.freeze of {}", path.display())),
    }
}

/// Freezes or thaws all processes of a cgroup, and waits until the kernel has frozen or thawed all
/// of them.
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
            "{}: the kernel did not finish within {} s",
            doing(),
            EMPTY_TIMEOUT.as_secs()
        );
    }
    Ok(())
}

/// Returns the ids of all processes in a cgroup and in the cgroups below it.
pub(crate) fn all_pids(path: &Path) -> Result<Vec<i32>> {
    let unlisted = |(path, errno): (PathBuf, Errno)| {
        let doing = format!("list the cgroups below {}", path.display());
        Error::new(errno.reason()).while_doing(doing)
    };
    let mut pids = Vec::new();
    let Some(mut tree) = CgroupTree::open(path).map_err(unlisted)? else {
        return Ok(pids);
    };
    loop {
        match add_pids(&mut pids, tree.directory()) {
            Ok(()) => {}
            // EOPNOTSUPP means that the cgroup is threaded. The kernel lists the processes of a
            // threaded cgroup in the cgroup.procs file of an ancestor. So this function skips the
            // threaded cgroup.
            Err(error) if cannot_be_listed(&error) => {}
            Err(error) => {
                return Err(error)
                    .doing(|| format!("list the processes of cgroup {}", tree.path().display()));
            }
        }
        if !tree.advance().map_err(unlisted)? {
            return Ok(pids);
        }
    }
}

/// Adds the ids of the processes in a cgroup to `pids`. The list has no limit, because its end can
/// contain the ids of processes that must be killed. The kernel limits the number of processes.
fn add_pids(pids: &mut Vec<i32>, cgroup: BorrowedFd<'_>) -> std::io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let file = rustix::fs::openat(cgroup, "cgroup.procs", flags, Mode::empty())?;
    for line in BufReader::new(std::fs::File::from(file)).lines() {
        pids.extend(line?.parse::<i32>().ok());
    }
    Ok(())
}

fn cannot_be_listed(error: &std::io::Error) -> bool {
    matches!(
        error.raw_os_error().map(Errno::from_raw_os_error),
        Some(Errno::NOENT | Errno::NODEV | Errno::OPNOTSUPP)
    )
}

/// Kills every process in a cgroup and in the cgroups below it, without waiting for their exit. If a
/// process holds a lease on cgroup.kill, waits until the kernel breaks the lease.
pub(crate) fn kill_all(path: &Path) -> Result<()> {
    let doing = || format!("kill all processes in cgroup {}", path.display());
    match rrun_kernel::cgroup::kill(path) {
        Err(Errno::AGAIN) => {
            log::warning(&format!(
                "{}: wait until the kernel breaks a lease on cgroup.kill",
                doing()
            ));
            rrun_kernel::cgroup::kill_after_leases(path).doing(doing)
        }
        killed => killed.doing(doing),
    }
}

/// Kills every process in a cgroup and in the cgroups below it, also a process that cgroup.kill does
/// not kill (see [`Survivors`]). Returns when the processes have exited, but at the latest after
/// [`SURVIVORS_TIMEOUT`].
pub(crate) fn kill_all_and_survivors(path: &Path) -> Result<()> {
    kill_all(path)?;
    let mut survivors = Survivors::new();
    wait_until_empty(path, &mut survivors, Instant::now() + SURVIVORS_TIMEOUT)?;
    survivors.thaw(path);
    Ok(())
}

/// Waits until the killed cgroup is empty, and kills the survivors. Returns false if the cgroup is
/// not empty at `deadline`.
pub(super) fn wait_until_empty(
    path: &Path,
    survivors: &mut Survivors,
    deadline: Instant,
) -> Result<bool> {
    wait_for_event_meanwhile(path, "populated 0", deadline, || {
        survivors.kill_if_due(path);
        survivors.next
    })
}

/// Waits until cgroup.events contains the line `wanted`, or the cgroup no longer exists. Returns
/// false if the time limit `within` expires first. This function calls poll(2) on cgroup.events.
/// The kernel wakes the polling process at every change of this file.
fn wait_for_event(path: &Path, wanted: &str, within: Duration) -> Result<bool> {
    let deadline = Instant::now() + within;
    let look_again = || Instant::now() + LOOK_AGAIN_INTERVAL;
    let found = wait_for_event_meanwhile(path, wanted, deadline, look_again)?;
    if !found {
        log::warning(&format!(
            "watch cgroup.events of {}: the line \"{wanted}\" did not appear within the time limit",
            path.display()
        ));
    }
    Ok(found)
}

/// Does the same as [`wait_for_event`], but without a warning. Also calls `meanwhile` each time
/// before it waits. `meanwhile` returns the time at which it must be called again.
fn wait_for_event_meanwhile(
    path: &Path,
    wanted: &str,
    deadline: Instant,
    mut meanwhile: impl FnMut() -> Instant,
) -> Result<bool> {
    let doing = || format!("watch cgroup.events of {}", path.display());
    let file = match rustix::fs::open(
        path.join("cgroup.events"),
        OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    ) {
        Err(Errno::NOENT) => return Ok(true),
        result => result.doing(doing)?,
    };
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
        let again = meanwhile().min(deadline);
        let now = Instant::now();
        if now >= deadline {
            return Ok(false);
        }
        let left = again.saturating_duration_since(now);
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

/// Returns the path of the cgroup that contains process `pid`. If a container has enabled
/// controllers for child cgroups, the kernel does not allow processes in the container's own
/// cgroup. `exec` then uses the cgroup of the container's first process.
pub(crate) fn of_process(pid: i32) -> Result<PathBuf> {
    let path = format!("/proc/{pid}/cgroup");
    let text = std::fs::read_to_string(&path).doing(|| format!("read {path}"))?;
    let own = text
        .lines()
        .find_map(|line| line.strip_prefix("0::/"))
        .ok_or_else(|| Error::new(format!("{path} does not contain a cgroup v2 entry")))?;
    Ok(Path::new(MOUNT_POINT).join(own))
}

/// Returns the path of the cgroup `inner`, which is relative to the container's cgroup at `path`
/// (`exec --cgroup`). Fails if the cgroup does not exist.
pub(crate) fn existing_below(path: &Path, inner: &str) -> Result<PathBuf> {
    let inner = cleaned(Path::new(inner));
    let relative = inner.strip_prefix("/").unwrap_or(&inner);
    let full = path.join(relative);
    rustix::fs::statat(rustix::fs::CWD, &full, AtFlags::SYMLINK_NOFOLLOW)
        .doing(|| format!("open cgroup {}", full.display()))?;
    Ok(full)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The test uses an ordinary directory instead of a cgroup, because the kernel does not always
    /// allow so many processes.
    #[test]
    fn all_processes_of_a_cgroup_are_listed_even_if_the_list_is_long() {
        let path = std::env::temp_dir().join(format!("rrun-all-pids-{}", std::process::id()));
        let below = path.join("below");
        std::fs::create_dir_all(&below).unwrap();
        let pids: Vec<i32> = (1_000_000..1_700_000).collect();
        let text: String = pids.iter().map(|pid| format!("{pid}\n")).collect();
        std::fs::write(path.join("cgroup.procs"), text).unwrap();
        std::fs::write(below.join("cgroup.procs"), "7\n").unwrap();
        let listed = all_pids(&path).unwrap();
        std::fs::remove_dir_all(&path).unwrap();
        assert!(listed == [&pids[..], &[7]].concat());
    }
}
