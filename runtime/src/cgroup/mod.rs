//! A container's cgroup, in the unified hierarchy (cgroup v2) at /sys/fs/cgroup.
//!
//! It is made, with all its limits, before the process that is born into it. So there is
//! no moment in which that process is not held by them. See cgroups(7) and the kernel's
//! Documentation/admin-guide/cgroup-v2.rst.

pub mod dbus;
mod devices;
mod properties;
mod resources;
mod stats;
mod systemd;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use oci_spec::runtime::LinuxResources;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;

use crate::config::Config;
use crate::error::{Context, Error, Result, refuse};
use crate::log;
use systemd::{Placeholder, Scope};

pub use resources::{check_memory_above_use, complete, memory_swap, validate};
pub use stats::{oom_kills, stats};
pub use systemd::ANNOTATION;

pub const MOUNT_POINT: &str = "/sys/fs/cgroup";
const CGROUP2_SUPER_MAGIC: u64 = 0x6367_7270;
/// The most that is read of a cgroup's file; cgroup.procs of a large one is the longest.
const FILE_LIMIT: u64 = 4 << 20;
/// How long killed processes may take to leave their cgroup.
const EMPTY_WITHIN: Duration = Duration::from_secs(10);

/// A container's cgroup, open.
pub struct Cgroup {
    path: PathBuf,
    fd: OwnedFd,
    /// Until the container's own process is born: see [`systemd`].
    placeholder: Option<Placeholder>,
}

/// Where a container's cgroup will be, and who makes it.
pub struct Place {
    pub path: PathBuf,
    scope: Option<Scope>,
}

impl Place {
    /// By the cgroupfs driver, or the systemd driver if `by_systemd`.
    pub fn new(config: &Config, id: &str, by_systemd: bool) -> Result<Place> {
        let cgroups_path = &config.cgroups_path;
        if by_systemd {
            let scope = Scope::from_spec(cgroups_path, id, &config.annotations)?;
            return Ok(Place {
                path: Path::new(MOUNT_POINT).join(scope.path()?),
                scope: Some(scope),
            });
        }
        if !cgroups_path.is_absolute() && cgroups_path.to_string_lossy().contains(':') {
            // As runc and crun have it, it is a path like any other then.
            log::warning(&format!(
                "linux.cgroupsPath: {} is in the form of the systemd cgroup driver, and --systemd-cgroup is not given",
                cgroups_path.display()
            ));
        }
        Ok(Place {
            path: path_for(cgroups_path, id)?,
            scope: None,
        })
    }

    /// The unit of systemd that the cgroup is, if it is one.
    pub fn unit(&self) -> Option<&str> {
        self.scope.as_ref().map(|scope| scope.unit.as_str())
    }

    /// Makes the cgroup. [`Cgroup::apply`] has to follow.
    pub fn create(&self, id: &str, resources: &LinuxResources) -> Result<Cgroup> {
        let Some(scope) = &self.scope else {
            return Cgroup::create(&self.path);
        };
        check_unified()?;
        let mut limits = properties::from(resources, true)?;
        limits.extend(properties::at_start(resources)?);
        let placeholder = scope.start(id, limits)?;
        Ok(Cgroup {
            path: self.path.clone(),
            fd: open(&self.path)?,
            placeholder: Some(placeholder),
        })
    }
}

/// Reads one file of a cgroup, without the last newline.
pub fn read(cgroup: &Path, file: &str) -> std::result::Result<String, std::io::Error> {
    use std::io::Read as _;
    let mut text = String::new();
    std::fs::File::open(cgroup.join(file))?
        .take(FILE_LIMIT)
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

/// Where a container's cgroup lies on the host.
///
/// `linux.cgroupsPath` counts from the mount point if it is absolute. Otherwise, and if it
/// is missing (then the container's id takes its place), it counts from the parent of the
/// cgroup that rrun itself is in, as with runc: its own has processes, and could therefore
/// not have controllers for children.
pub fn path_for(cgroups_path: &Path, id: &str) -> Result<PathBuf> {
    if cgroups_path.is_absolute() {
        let relative = cgroups_path.strip_prefix("/").unwrap_or(cgroups_path);
        return Ok(Path::new(MOUNT_POINT).join(relative));
    }
    let inner = if cgroups_path.as_os_str().is_empty() {
        Path::new(id)
    } else {
        cgroups_path
    };
    let own = std::fs::read_to_string("/proc/self/cgroup").doing(|| "read /proc/self/cgroup")?;
    Ok(Path::new(MOUNT_POINT).join(parent_of_own(&own)).join(inner))
}

/// From the content of /proc/self/cgroup, the path of the parent, relative.
fn parent_of_own(text: &str) -> &Path {
    text.lines()
        .find_map(|line| line.strip_prefix("0::/"))
        .and_then(|own| Path::new(own).parent())
        .unwrap_or_else(|| Path::new(""))
}

impl Cgroup {
    /// Makes the cgroup, or takes one that is there and empty.
    ///
    /// # Errors
    /// No cgroup v2 on this host; a cgroup that has processes or is frozen.
    pub fn create(path: &Path) -> Result<Cgroup> {
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
        let cgroup = Cgroup {
            path: path.to_owned(),
            fd,
            placeholder: None,
        };
        let magic = rustix::fs::fstatfs(&cgroup.fd).doing(doing)?.f_type as u64;
        if magic != CGROUP2_SUPER_MAGIC {
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
        let populated =
            read(&self.path, "cgroup.events").doing(|| format!("read cgroup.events of {path}"))?;
        if populated.lines().any(|line| line == "populated 1") {
            refuse!("make cgroup {path}: it exists, and there are processes in it");
        }
        if is_frozen(&self.path) {
            refuse!("make cgroup {path}: it exists, and is frozen");
        }
        Ok(())
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Puts all limits in place. [`Cgroup::apply_devices`] has to follow.
    pub fn apply(&self, resources: &LinuxResources) -> Result<()> {
        resources::apply(self, resources)?;
        if self.placeholder.is_some() && resources::takes_one_process(resources) {
            self.set_pids_max("2")?;
        }
        Ok(())
    }

    /// Puts the device rules in place.
    pub fn apply_devices(&self, resources: &LinuxResources) -> Result<()> {
        // A user namespace is what keeps an unprivileged caller's container from devices; the
        // kernel takes no programs from him.
        if !rustix::process::geteuid().is_root() {
            return Ok(());
        }
        let rules = resources.devices().as_deref().unwrap_or_default();
        devices::apply(self, rules, false)
    }

    /// For a copy of the process that made it: closes what that has open of it, and unmakes
    /// nothing.
    pub fn leave_to_parent(self) {
        std::mem::forget(self.placeholder);
    }

    /// To be called when the first process is in the cgroup, which then keeps it alive.
    pub fn inhabited(&mut self, resources: &LinuxResources) -> Result<()> {
        if self.placeholder.take().is_some() && resources::takes_one_process(resources) {
            self.set_pids_max("1")?;
        }
        Ok(())
    }

    fn set_pids_max(&self, limit: &str) -> Result<()> {
        write(self, "pids.max", limit)
            .doing(|| format!("set pids.max of cgroup {}", self.path.display()))
    }
}

impl AsFd for Cgroup {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// One sentence for a host that rrun can not work on.
fn check_unified() -> Result<()> {
    let is_unified = rustix::fs::statfs(MOUNT_POINT)
        .is_ok_and(|statfs| statfs.f_type as u64 == CGROUP2_SUPER_MAGIC);
    if !is_unified {
        refuse!("rrun needs cgroup v2, and {MOUNT_POINT} is not a cgroup2 mount");
    }
    Ok(())
}

/// Opens the cgroup of an existing container, for a process to be born into.
pub fn open(path: &Path) -> Result<OwnedFd> {
    rustix::fs::open(
        path,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .doing(|| format!("open cgroup {}", path.display()))
}

/// Changes limits of an existing container, whose cgroup may be a unit of systemd. Device
/// rules are changed if there are any.
pub fn update(path: &Path, unit: Option<&str>, resources: &LinuxResources) -> Result<()> {
    let cgroup = Cgroup {
        path: path.to_owned(),
        fd: open(path)?,
        placeholder: None,
    };
    let with_devices = resources.devices().is_some();
    if let Some(unit) = unit {
        systemd::set(unit, &properties::from(resources, with_devices)?)?;
    }
    resources::apply(&cgroup, resources)?;
    if with_devices {
        devices::apply(
            &cgroup,
            resources.devices().as_deref().unwrap_or_default(),
            true,
        )?;
    }
    Ok(())
}

pub fn is_frozen(path: &Path) -> bool {
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
pub fn freeze(path: &Path, frozen: bool) -> Result<()> {
    let doing = || {
        let verb = if frozen { "freeze" } else { "thaw" };
        format!("{verb} cgroup {}", path.display())
    };
    let directory = open(path)?;
    let value = if frozen { "1" } else { "0" };
    write(&directory, "cgroup.freeze", value).doing(doing)?;
    let wanted = format!("frozen {value}");
    if !wait_for_event(path, &wanted, EMPTY_WITHIN)? {
        if frozen {
            let _ = write(&directory, "cgroup.freeze", "0");
        }
        refuse!(
            "{}: it was not done within {} s",
            doing(),
            EMPTY_WITHIN.as_secs()
        );
    }
    Ok(())
}

/// All processes in a cgroup and those below it.
pub fn all_pids(path: &Path) -> Result<Vec<i32>> {
    let mut pids = Vec::new();
    for directory in tree(path) {
        match read(&directory, "cgroup.procs") {
            Ok(text) => pids.extend(text.lines().filter_map(|line| line.parse::<i32>().ok())),
            // EOPNOTSUPP: a threaded cgroup, whose processes are listed further up.
            Err(error) if gone(&error) => {}
            Err(error) => {
                return Err(error).doing(|| format!("list processes of {}", directory.display()));
            }
        }
    }
    Ok(pids)
}

fn gone(error: &std::io::Error) -> bool {
    matches!(
        error.raw_os_error().map(Errno::from_raw_os_error),
        Some(Errno::NOENT | Errno::NODEV | Errno::OPNOTSUPP)
    )
}

/// Kills every process in a cgroup and below it, and does not wait for it.
pub fn kill_all(path: &Path) -> Result<()> {
    let directory = match open(path) {
        Ok(directory) => directory,
        Err(_) if !path.exists() => return Ok(()),
        Err(error) => return Err(error),
    };
    match write(&directory, "cgroup.kill", "1") {
        Err(Errno::NODEV) => Ok(()),
        result => result.doing(|| format!("kill all processes in cgroup {}", path.display())),
    }
}

/// The unit of systemd that a cgroup is, by its place alone: a scope in a slice, on a
/// machine that systemd runs.
pub fn unit_at(path: &Path) -> Option<String> {
    let unit = path.file_name()?.to_str()?;
    let slice = path.parent()?;
    let in_slice =
        slice == Path::new(MOUNT_POINT) || slice.file_name()?.to_str()?.ends_with(".slice");
    let by_systemd = in_slice && unit.ends_with(".scope") && systemd::is_running();
    by_systemd.then(|| unit.to_owned())
}

/// Removes a cgroup and those below it, killing what is still in them, and the unit of
/// systemd that it may be.
///
/// # Errors
/// If a process does not die within some seconds.
pub fn remove(path: &Path, unit: Option<&str>) -> Result<()> {
    if let Some(unit) = unit {
        // systemd would first ask politely, and wait.
        kill_all(path)?;
        wait_for_event(path, "populated 0", EMPTY_WITHIN)?;
        systemd::stop(unit)?;
    }
    match rustix::fs::rmdir(path) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        // An unprivileged caller's container can have none.
        Err(_) if !path.exists() => return Ok(()),
        // Processes, or cgroups below.
        Err(_) => kill_all(path)?,
    }
    let deadline = Instant::now() + EMPTY_WITHIN;
    loop {
        let emptied = wait_for_event(
            path,
            "populated 0",
            deadline.saturating_duration_since(Instant::now()),
        )?;
        let mut refused = None;
        for directory in tree(path).iter().rev() {
            match rustix::fs::rmdir(directory) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(errno) => refused = Some((directory.clone(), errno)),
            }
        }
        let Some((directory, errno)) = refused else {
            return Ok(());
        };
        if errno != Errno::BUSY || !emptied || Instant::now() >= deadline {
            return Err(errno).doing(|| format!("remove cgroup {}", directory.display()));
        }
        // Emptied, and busy all the same: someone is just looking into it, or a process is
        // being born in there, which the next round kills.
        std::thread::sleep(Duration::from_millis(2));
        kill_all(path)?;
    }
}

/// A cgroup and all below it, parents before children.
fn tree(path: &Path) -> Vec<PathBuf> {
    let mut found = vec![path.to_owned()];
    let mut next = 0;
    while let Some(directory) = found.get(next).cloned() {
        next += 1;
        let below = std::fs::read_dir(&directory)
            .into_iter()
            .flatten()
            .flatten();
        found.extend(
            below
                .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
                .map(|entry| entry.path()),
        );
    }
    found
}

/// Waits until cgroup.events has a line; the kernel wakes who polls it at every change.
fn wait_for_event(path: &Path, wanted: &str, within: Duration) -> Result<bool> {
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
pub fn of_process(pid: i32) -> Result<PathBuf> {
    let path = format!("/proc/{pid}/cgroup");
    let text = std::fs::read_to_string(&path).doing(|| format!("read {path}"))?;
    let own = text
        .lines()
        .find_map(|line| line.strip_prefix("0::/"))
        .ok_or_else(|| Error::new(format!("{path} names no cgroup v2")))?;
    Ok(Path::new(MOUNT_POINT).join(own))
}

/// Whether a path below a container's cgroup exists there, for `exec --cgroup`.
pub fn below(path: &Path, inner: &str) -> Result<PathBuf> {
    let inner = crate::mounts::rootfs::cleaned(Path::new(inner));
    let relative = inner.strip_prefix("/").unwrap_or(&inner);
    let full = path.join(relative);
    rustix::fs::statat(rustix::fs::CWD, &full, AtFlags::SYMLINK_NOFOLLOW)
        .doing(|| format!("open cgroup {}", full.display()))?;
    Ok(full)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_count_from_the_mount_point_or_from_beside_ones_own() {
        assert_eq!(
            path_for(Path::new("/kubepods/pod1/c1"), "c1").unwrap(),
            Path::new("/sys/fs/cgroup/kubepods/pod1/c1")
        );
        assert_eq!(
            parent_of_own("1:name=systemd:/x\n0::/user.slice/s1\n"),
            Path::new("user.slice")
        );
        assert_eq!(parent_of_own("0::/\n"), Path::new(""));
    }
}
