//! What a test may leave behind: nothing. The machine is looked at before and after, and the
//! difference of the two sets is the complaint.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::support::node::is_rrun;

/// The kernel lets go of namespaces and interfaces a little after their last user.
const CLEANUP_TIMEOUT: Duration = Duration::from_secs(10);

/// Trees in which runtimes and servers keep things, and how deep a new entry is worth a line.
const TREES: &[(&str, usize)] = &[
    ("/run", 3),
    ("/tmp", 1),
    ("/var/tmp", 1),
    ("/var/lib", 2),
    ("/etc/cni", 2),
    ("/dev/shm", 1),
];

/// Made by whoever pins a network namespace first, and by nobody removed; what is in there counts.
const NETNS: &str = "/run/netns";

/// Services of the machine itself, whose groups and files come and go by themselves.
const NOT_OURS: &[&str] = &[
    "/sys/fs/cgroup/system.slice",
    "/sys/fs/cgroup/user.slice",
    "/sys/fs/cgroup/init.scope",
    "/run/systemd",
    "/run/udev",
    "/var/lib/systemd",
];

pub(crate) struct Snapshot {
    things: BTreeSet<String>,
    /// By their number: the parent's number, and what they are.
    processes: BTreeMap<u32, (u32, String)>,
}

impl Snapshot {
    pub(crate) fn look() -> Self {
        let mut all = BTreeSet::new();
        cgroups(Path::new("/sys/fs/cgroup"), &mut all);
        mounts(&mut all);
        for (tree, depth) in TREES {
            files(Path::new(tree), *depth, &mut all);
        }
        for name in names(Path::new("/sys/class/net")) {
            all.insert(format!("interface {name}"));
        }
        Snapshot {
            things: all,
            processes: processes(),
        }
    }

    /// What is there now and was not when this was looked at; waits a little for it to go.
    pub(crate) fn leavings(&self) -> Vec<String> {
        let started = Instant::now();
        loop {
            let now = Snapshot::look();
            let mut left: Vec<String> = now.things.difference(&self.things).cloned().collect();
            left.extend(self.new_processes(&now));
            if left.is_empty() || started.elapsed() > CLEANUP_TIMEOUT {
                return left;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// A child of what was there before is its parent's affair (the guest's init has a loop with
    /// a sleep in it); children of PID 1 are whoever was orphaned.
    fn new_processes(&self, now: &Snapshot) -> Vec<String> {
        let own = std::process::id();
        now.processes
            .iter()
            .filter(|(pid, _)| !self.processes.contains_key(pid))
            .filter(|(_, (parent, _))| {
                *parent <= 1 || *parent == own || !self.processes.contains_key(parent)
            })
            .map(|(pid, (_, what))| format!("process {pid} {what}"))
            .collect()
    }

    /// What was there when this was looked at and is there no more. (A test must not tidy away
    /// what was not its own either.)
    pub(crate) fn losses(&self) -> Vec<String> {
        self.things
            .difference(&Snapshot::look().things)
            .cloned()
            .collect()
    }
}

/// What the peer that can be tested in rrun-cri's place keeps, and its plugins.
pub(crate) const PEERS: &[&str] = &[
    "/run/containerd",
    "/run/e2e-cni",
    "/run/netns",
    "/run/xtables.lock",
    "/var/lib/cni",
    "/var/lib/containerd",
    "/sys/fs/cgroup/k8s.io",
];

fn ours(path: &Path) -> bool {
    if !is_rrun() && PEERS.iter().any(|prefix| path.starts_with(prefix)) {
        return false;
    }
    !NOT_OURS.iter().any(|prefix| path.starts_with(prefix))
}

fn names(dir: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(dir) else {
        return Vec::new();
    };
    entries
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

fn cgroups(dir: &Path, all: &mut BTreeSet<String>) {
    let Ok(entries) = fs::read_dir(dir) else {
        return;
    };
    for entry in entries.flatten() {
        let path = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) && ours(&path) {
            cgroups(&path, all);
            all.insert(format!("cgroup {}", path.display()));
        }
    }
}

/// proc_pid_mountinfo(5): the fifth field is the mount point, the first after " - " the type.
fn mounts(all: &mut BTreeSet<String>) {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    for line in table.lines() {
        let Some((left, right)) = line.split_once(" - ") else {
            continue;
        };
        let point = left.split(' ').nth(4).unwrap_or_default();
        let kind = right.split(' ').next().unwrap_or_default();
        if !ours(Path::new(point)) {
            continue;
        }
        // The same point can be covered several times: each is worth a line.
        let mut text = format!("mount of {kind} on {point}");
        while !all.insert(text.clone()) {
            text.push_str(" again");
        }
    }
}

fn processes() -> BTreeMap<u32, (u32, String)> {
    const KERNEL_THREAD: u64 = 0x0020_0000;
    let mut all = BTreeMap::new();
    let own = std::process::id();
    for pid in names(Path::new("/proc"))
        .iter()
        .filter_map(|name| name.parse().ok())
    {
        let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else {
            continue;
        };
        // pid (name) state ppid pgrp session tty tpgid flags: a name can hold blanks and brackets.
        let Some((head, rest)) = stat.rsplit_once(')') else {
            continue;
        };
        let name = head.split_once('(').map_or("", |(_, name)| name);
        let mut fields = rest.split_whitespace();
        let state = fields.next().unwrap_or_default();
        let parent = fields
            .next()
            .and_then(|parent| parent.parse().ok())
            .unwrap_or_default();
        let flags: u64 = fields
            .nth(4)
            .and_then(|flags| flags.parse().ok())
            .unwrap_or_default();
        let group = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        let group = group.trim_end().trim_start_matches("0::");
        let of_the_machine = !ours(Path::new(&format!("/sys/fs/cgroup{group}")));
        if pid == own || flags & KERNEL_THREAD != 0 || of_the_machine {
            continue;
        }
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        let dead = if state == "Z" { ", a zombie" } else { "" };
        all.insert(pid, (parent, format!("({name}{dead}) {line}")));
    }
    all
}

fn files(dir: &Path, depth: usize, all: &mut BTreeSet<String>) {
    let Ok(entries) = fs::read_dir(dir) else {
        return;
    };
    for entry in entries.flatten() {
        let path = entry.path();
        let is_netns = path == Path::new(NETNS);
        if !ours(&path) {
            continue;
        }
        if depth > 1 && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            files(&path, depth - 1, all);
        }
        if !is_netns {
            all.insert(format!("file {}", path.display()));
        }
    }
}

/// Mount points below this directory, the last first.
pub(crate) fn mounts_below(directory: &Path) -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let points = table.lines().rev();
    points
        .filter_map(|line| line.split(' ').nth(4))
        .map(PathBuf::from)
        .filter(|point| point.starts_with(directory))
        .collect()
}

/// Unmounts all below a directory, as far as it can be.
pub(crate) fn unmount_below(directory: &Path) {
    for point in mounts_below(directory) {
        let _ = nix::mount::umount2(&point, nix::mount::MntFlags::MNT_DETACH);
    }
}

/// Removes a tree of empty cgroups, or of files.
pub(crate) fn remove(path: &Path) {
    if !path.starts_with("/sys/fs/cgroup") {
        unmount_below(path);
        let _ = fs::remove_dir_all(path).or_else(|_| fs::remove_file(path));
        return;
    }
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove(&entry.path());
        }
    }
    let _ = fs::remove_dir(path);
}
