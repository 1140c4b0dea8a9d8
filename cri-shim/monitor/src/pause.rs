//! The pause process: the first process of a pod's PID namespace, when the pod's containers share
//! one; with a user namespace the process that holds all of the pod's namespaces, since only those
//! that are made inside of it belong to it, user_namespaces(7).
//!
//! It does nothing, and dies with the monitor. Its children, the orphans of the containers, are
//! reaped by the kernel. The containers see it in /proc, and one with CAP_SYS_PTRACE could take
//! it over: so it has no descriptors, no capabilities, an empty root and an empty network, and
//! /proc/1/exe is our binary on a mount that can't be written.

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
use super::readonly_exec;
use rrun_kernel::clone3::{Cloned, clone3};
use rrun_kernel::errno::describe;
use rrun_kernel::readonly_exec::open_on_readonly_mount;
use rrun_protocol::{IdMaps, Pod};

/// What `ps` in a container shows.
const PROCESS_NAME: &CStr = c"rrun-pod";

/// The argument that makes a monitor's binary this process.
pub(crate) const ARGUMENT: &str = "--pod-init";
const ARGUMENT_C: &CStr = c"--pod-init";

/// What it reports when nothing of the node is left within its reach.
const READY: &[u8] = b"ready";

/// What it waits for from the monitor.
const GO: &[u8] = b"!";

/// How long it may take to get there.
const START_TIMEOUT: Timespec = Timespec {
    tv_sec: 10,
    tv_nsec: 0,
};

/// Where its empty root is mounted for a moment; any directory does.
const ROOT_MOUNT_POINT: &str = "/proc";

/// Starts it, in the namespaces that it is to hold, and returns its pid here when it is ready.
pub(crate) fn start(pod: &Pod) -> std::io::Result<i32> {
    // The binary's mount is in our mount namespace, not in the one that the child will be in.
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
    // SAFETY: the monitor has one thread.
    match unsafe { clone3(flags, None) }? {
        Cloned::Child => {
            drop(to_child);
            become_pause(pod, &binary, &from_us, &to_us)
        }
        Cloned::Parent { pid, .. } => {
            drop((to_us, from_us));
            if let Some(users) = &pod.users {
                map_ids(pid, users)?;
            }
            rustix::io::write(&to_child, GO)?;
            await_ready(&from_child)?;
            Ok(pid)
        }
    }
}

/// Each map in one write, which is all that the kernel takes. A failure ends us, and the child
/// with us.
fn map_ids(pid: i32, users: &IdMaps) -> std::io::Result<()> {
    for (name, map) in [("uid_map", &users.uid_map), ("gid_map", &users.gid_map)] {
        std::fs::write(format!("/proc/{pid}/{name}"), map).map_err(|error| {
            let (map, reason) = (map.trim_end(), describe(&error));
            std::io::Error::other(format!("write {map:?} to its {name}: {reason}"))
        })?;
    }
    Ok(())
}

/// Our own executable, so that nobody can write to it or, where an overlay can be had, try to.
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
            let reported = String::from_utf8_lossy(other).into_owned();
            Err(std::io::Error::other(reported))
        }
    }
}

/// In the child: a new program, so that nothing of the monitor's memory is in it.
fn become_pause(pod: &Pod, binary: &OwnedFd, from_monitor: &OwnedFd, to_monitor: &OwnedFd) -> ! {
    if nix::unistd::dup2_stdout(to_monitor.as_fd()).is_ok() {
        let failed = match await_go(from_monitor).and_then(|()| be_root_inside(pod)) {
            Err(errno) => format!("become root of its namespaces: {}", describe(&errno.into())),
            Ok(()) => {
                // After the change of user, which clears the parent-death signal, prctl(2).
                let death = rustix::process::Signal::KILL;
                let _ = rustix::process::set_parent_process_death_signal(Some(death));
                let arguments = [PROCESS_NAME, ARGUMENT_C];
                let environment: [&CStr; 0] = [];
                let flags = AtFlags::AT_EMPTY_PATH;
                let Err(errno) =
                    nix::unistd::execveat(binary, c"", &arguments, &environment, flags);
                format!("execute it: {}", describe(&errno.into()))
            }
        };
        report(failed.as_bytes());
    }
    // SAFETY: the process is a copy of the monitor, whose destructors are not to run here.
    unsafe { libc::_exit(1) }
}

/// Waits for the monitor to report that the maps are written; it may have died instead.
fn await_go(from_monitor: &OwnedFd) -> Result<(), Errno> {
    loop {
        match rustix::io::read(from_monitor, &mut [0_u8; 1]) {
            Ok(0) => return Err(Errno::PIPE),
            Err(Errno::INTR) => {}
            other => return other.map(drop),
        }
    }
}

/// In a user namespace nobody is root before a call says so.
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

/// The whole life of the new program. Returns only if it could not isolate itself.
pub(crate) fn run() {
    match isolate() {
        Ok(()) => report(READY),
        Err((step, error)) => return report(format!("{step}: {}", describe(&error)).as_bytes()),
    }
    close_from(0);
    loop {
        nix::unistd::pause();
    }
}

fn isolate() -> Result<(), (&'static str, std::io::Error)> {
    let at = |step| move |errno: Errno| (step, std::io::Error::from(errno));
    rustix::thread::set_name(PROCESS_NAME).map_err(at("set its name"))?;
    // SAFETY: no handler is installed. With SIGCHLD ignored the kernel reaps for us (wait(2)).
    unsafe { nix::sys::signal::signal(Signal::SIGCHLD, SigHandler::SigIgn) }
        .map_err(|errno| ("ignore SIGCHLD", errno.into()))?;
    empty_root().map_err(at("make an empty root"))?;
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    rustix::thread::set_capabilities(None, none).map_err(at("drop its capabilities"))?;
    rustix::thread::set_no_new_privs(true).map_err(at("set no_new_privs"))?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(at("be closed to ptrace"))
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
    // The old root is on top of the new one now, and the working directory below it.
    rustix::mount::unmount(".", UnmountFlags::DETACH)?;
    rustix::process::chdir("/")
}
