//! The pause process. If the pod's containers share a PID namespace, the pause process is the first
//! process of this namespace. If the pod has a user namespace, the pause process keeps all of the
//! pod's namespaces alive. The pod's user namespace must own the pod's other namespaces. A user
//! namespace owns only namespaces that were created inside the user namespace (user_namespaces(7)).
//! The monitor is outside the pod's user namespace, so the monitor itself cannot create the pod's
//! other namespaces.
//!
//! The pause process only waits, and the kernel kills it when the monitor exits. Orphaned processes
//! of the containers become children of the pause process, and the kernel reaps them. The
//! containers see the pause process in /proc, and a container with CAP_SYS_PTRACE can take control
//! of it. For this reason, the pause process has a seccomp filter that allows it only to wait. It
//! has no descriptors, no capabilities, an empty environment, an empty root directory and an empty
//! network namespace. Its executable is the monitor's binary on a read-only mount. The containers
//! can see this executable as /proc/1/exe. The pause process is in a separate cgroup below the
//! pod's cgroup, so the pod's limits apply to it.

use std::ffi::CStr;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::fcntl::AtFlags;
use nix::sys::signal::{SigHandler, Signal};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::DumpableBehavior;
use rustix::thread::{CapabilitySet, CapabilitySets};

use super::descriptors::close_from;
use super::pause_filter;
use super::readonly_exec;
use rrun_kernel::clone3::{Cloned, clone3};
use rrun_kernel::errno::describe;
use rrun_kernel::readonly_exec::open_on_readonly_mount;
use rrun_protocol::{IdMaps, Pause, Pod};

/// The name of the pause process, which `ps` shows in a container.
const PROCESS_NAME: &CStr = c"rrun-pod";

/// The argument with which the monitor's binary becomes the pause process.
pub(crate) const ARGUMENT: &str = "--pod-init";
const ARGUMENT_C: &CStr = c"--pod-init";

/// The message that the pause process sends to the monitor as soon as it has isolated itself from
/// the node.
const READY: &[u8] = b"ready";

/// The message that the monitor sends after it has written the ID maps. The pause process then
/// continues.
const GO: &[u8] = b"!";

/// The time within which the pause process must send [`READY`] after its start.
const START_TIMEOUT: Timespec = Timespec {
    tv_sec: 10,
    tv_nsec: 0,
};

/// The directory on which the empty root file system is mounted before pivot_root(2). Any directory
/// works.
const ROOT_MOUNT_POINT: &str = "/proc";

/// Starts the pause process in new namespaces, which it keeps alive. Waits until the process is
/// ready, and returns its pid in the monitor's PID namespace.
pub(crate) fn start(pod: &Pod) -> std::io::Result<i32> {
    // The monitor must open the binary before it creates the child. The child will be in a new
    // mount namespace, and cannot copy a mount from the monitor's mount namespace (open_tree(2)).
    let binary = read_only_binary()?;
    let (from_child, to_us) = pipe_with(PipeFlags::CLOEXEC)?;
    let (from_us, to_child) = pipe_with(PipeFlags::CLOEXEC)?;
    let mut flags = libc::CLONE_NEWNS | libc::CLONE_NEWNET;
    if pod.shared_pid {
        flags |= libc::CLONE_NEWPID;
    }
    if pod.users.is_some() {
        flags |= libc::CLONE_NEWUSER;
        if pod.new_ipc {
            flags |= libc::CLONE_NEWIPC;
        }
        if pod.hostname.is_some() {
            flags |= libc::CLONE_NEWUTS;
        }
    }
    let flags = u64::try_from(flags).unwrap_or_default();
    let cgroup = pod.pause.as_ref().map(open_cgroup).transpose()?;
    // SAFETY: the monitor has only one thread, so the child's copy of the memory is consistent.
    match unsafe { clone3(flags, cgroup.as_ref().map(AsFd::as_fd)) }? {
        Cloned::Child => {
            drop(to_child);
            become_pause(pod, &binary, &from_us, &to_us)
        }
        Cloned::Parent { pid, .. } => {
            drop((to_us, from_us));
            if let Some(pause) = &pod.pause {
                set_oom_score_adj(pid, pause.oom_score_adj)?;
            }
            if let Some(users) = &pod.users {
                map_ids(pid, users)?;
            }
            rustix::io::write(&to_child, GO)?;
            await_ready(&from_child)?;
            Ok(pid)
        }
    }
}

fn open_cgroup(pause: &Pause) -> std::io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(&pause.cgroup, flags, Mode::empty()).map_err(|errno| {
        let path = pause.cgroup.display();
        let reason = describe(&errno.into());
        std::io::Error::other(format!("open the cgroup {path}: {reason}"))
    })
}

/// Sets the OOM score adjustment of the pause process. Without CAP_SYS_RESOURCE, the monitor cannot
/// lower the adjustment. The pause process then keeps the monitor's adjustment.
fn set_oom_score_adj(pid: i32, adj: i64) -> std::io::Result<()> {
    match std::fs::write(format!("/proc/{pid}/oom_score_adj"), adj.to_string()) {
        Err(error) if error.kind() != std::io::ErrorKind::PermissionDenied => {
            let reason = describe(&error);
            Err(std::io::Error::other(format!(
                "set the oom_score_adj of the pause process to {adj}: {reason}"
            )))
        }
        _ => Ok(()),
    }
}

/// Writes the user and group ID maps of the pause process. Each map is written with one write(2),
/// because the kernel refuses a second write to the same map. After a failure, the monitor exits,
/// and the kernel kills the pause process.
fn map_ids(pid: i32, users: &IdMaps) -> std::io::Result<()> {
    for (name, map) in [("uid_map", &users.uid_map), ("gid_map", &users.gid_map)] {
        std::fs::write(format!("/proc/{pid}/{name}"), map).map_err(|error| {
            let (map, reason) = (map.trim_end(), describe(&error));
            std::io::Error::other(format!(
                "write {map:?} to the {name} of the pause process: {reason}"
            ))
        })?;
    }
    Ok(())
}

/// Opens the monitor's own executable on a read-only mount, so that no process can write to it. The
/// function prefers an overlay. An attempt to open the overlay's file for writing fails, and does
/// not affect the original file ([`rrun_kernel::readonly_exec`]).
fn read_only_binary() -> std::io::Result<OwnedFd> {
    if let Ok(binary) = readonly_exec::overlaid(Path::new("/proc/self/exe")) {
        return Ok(binary);
    }
    Ok(open_on_readonly_mount(c"/proc/self/exe")?)
}

fn await_ready(from_child: &OwnedFd) -> std::io::Result<()> {
    let mut reported = Vec::new();
    let mut file = File::from(from_child.try_clone()?);
    let mut chunk = [0; 256];
    while reported.len() < 4096 {
        let mut ready = [PollFd::new(from_child, PollFlags::IN)];
        match poll(&mut ready, Some(&START_TIMEOUT)) {
            Ok(0) => return Err(Errno::TIMEDOUT.into()),
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        match file.read(&mut chunk)? {
            0 => break,
            count => reported.extend_from_slice(chunk.get(..count).unwrap_or_default()),
        }
    }
    match reported.as_slice() {
        READY => Ok(()),
        other => {
            // The pause process sends the message before it loads its filter, because the filter
            // forbids write(2). An error of the loading can therefore follow the message.
            let error = other.strip_prefix(READY).unwrap_or(other);
            let error = String::from_utf8_lossy(error).into_owned();
            Err(std::io::Error::other(error))
        }
    }
}

/// Executes the pause process's program in the child. The child then no longer contains any of the
/// monitor's memory.
fn become_pause(pod: &Pod, binary: &OwnedFd, from_monitor: &OwnedFd, to_monitor: &OwnedFd) -> ! {
    if nix::unistd::dup2_stdout(to_monitor.as_fd()).is_ok() {
        let failed = match await_go(from_monitor).and_then(|()| be_root_inside(pod)) {
            Err(errno) => format!(
                "become root in the pod's namespaces: {}",
                describe(&errno.into())
            ),
            Ok(()) => {
                // The parent-death signal must be set after the change of user, because a change of
                // user clears the signal (prctl(2)).
                let death = rustix::process::Signal::KILL;
                let _ = rustix::process::set_parent_process_death_signal(Some(death));
                let arguments = [PROCESS_NAME, ARGUMENT_C];
                let environment: [&CStr; 0] = [];
                let flags = AtFlags::AT_EMPTY_PATH;
                let Err(errno) =
                    nix::unistd::execveat(binary, c"", &arguments, &environment, flags);
                format!("execute the pause process: {}", describe(&errno.into()))
            }
        };
        report(failed.as_bytes());
    }
    // SAFETY: _exit(2) ends the child without running the monitor's destructors, which must not run
    // in this copy of the monitor.
    unsafe { libc::_exit(1) }
}

/// Waits for the message [`GO`] from the monitor. Fails if the monitor dies before it sends the
/// message.
fn await_go(from_monitor: &OwnedFd) -> Result<(), Errno> {
    loop {
        match rustix::io::read(from_monitor, &mut [0_u8; 1]) {
            Ok(0) => return Err(Errno::PIPE),
            Err(Errno::INTR) => {}
            other => return other.map(drop),
        }
    }
}

/// Makes this process root in the pod's user namespace, and sets the pod's host name. Does nothing
/// if the pod has no user namespace. A process in a new user namespace is not root until it calls
/// setresuid(2).
fn be_root_inside(pod: &Pod) -> Result<(), Errno> {
    if pod.users.is_none() {
        return Ok(());
    }
    let from_nix = |errno: nix::Error| Errno::from_raw_os_error(errno as i32);
    nix::unistd::setgroups(&[]).map_err(from_nix)?;
    let (user, group) = (nix::unistd::Uid::from_raw(0), nix::unistd::Gid::from_raw(0));
    nix::unistd::setresgid(group, group, group).map_err(from_nix)?;
    nix::unistd::setresuid(user, user, user).map_err(from_nix)?;
    match &pod.hostname {
        Some(name) => rustix::system::sethostname(name.as_bytes()),
        None => Ok(()),
    }
}

fn report(what: &[u8]) {
    let mut stdout = std::io::stdout();
    let _ = stdout.write_all(what).and_then(|()| stdout.flush());
}

/// Runs the pause process. Returns only if the process could not isolate itself.
pub(crate) fn run() {
    let failed = |step, error| report(format!("{step}: {}", describe(&error)).as_bytes());
    if let Err((step, error)) = isolate() {
        return failed(step, error);
    }
    report(READY);
    if let Err(errno) = pause_filter::load() {
        return failed("load the seccomp filter of the pause process", errno.into());
    }
    if keep_capabilities(CapabilitySet::empty()).is_err() {
        return;
    }
    close_from(0);
    loop {
        nix::unistd::pause();
    }
}

fn isolate() -> Result<(), (&'static str, std::io::Error)> {
    let at = |step| move |errno: Errno| (step, std::io::Error::from(errno));
    rustix::thread::set_name(PROCESS_NAME).map_err(at("set its name"))?;
    // SAFETY: this call installs no signal handler. While the pause process ignores SIGCHLD, the
    // kernel reaps its children (wait(2)).
    unsafe { nix::sys::signal::signal(Signal::SIGCHLD, SigHandler::SigIgn) }
        .map_err(|errno| ("ignore SIGCHLD", errno.into()))?;
    empty_root().map_err(at("create an empty root directory"))?;
    // With CAP_SYS_ADMIN in the node's user namespace, the kernel loads the filter even if containers
    // have used up the memory for BPF programs. The capability must be in the permitted set.
    keep_capabilities(CapabilitySet::SYS_ADMIN)
        .or_else(|_| keep_capabilities(CapabilitySet::empty()))
        .map_err(at("drop its capabilities"))?;
    rustix::thread::set_no_new_privs(true).map_err(at("set no_new_privs"))?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(at("clear the dumpable flag of the pause process"))
}

/// Drops all capabilities of this process except `kept`.
fn keep_capabilities(kept: CapabilitySet) -> Result<(), Errno> {
    let sets = CapabilitySets {
        effective: kept,
        permitted: kept,
        inheritable: CapabilitySet::empty(),
    };
    rustix::thread::set_capabilities(None, sets)
}

fn empty_root() -> Result<(), Errno> {
    let private = MountPropagationFlags::REC | MountPropagationFlags::PRIVATE;
    rustix::mount::mount_change("/", private)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::RDONLY;
    rustix::mount::mount(
        "tmpfs",
        ROOT_MOUNT_POINT,
        "tmpfs",
        flags,
        c"mode=0555,nr_inodes=2",
    )?;
    let root = rustix::fs::open(
        ROOT_MOUNT_POINT,
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    rustix::process::fchdir(&root)?;
    rustix::process::pivot_root(".", ".")?;
    // pivot_root(".", ".") has stacked the old root on top of the new root. For umount2(2), "." is
    // the topmost of the stacked mounts, so this call unmounts the old root (pivot_root(2)).
    rustix::mount::unmount(".", UnmountFlags::DETACH)?;
    rustix::process::chdir("/")
}
