//! This module checks that a test leaves nothing behind. The check compares the state of the
//! machine before and after the test, and reports the differences.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::support::node::is_rrun;

/// The longest time that the leak check waits for the kernel to delete namespaces and interfaces.
/// The kernel deletes a namespace only after the exit of the last process in the namespace.
const CLEANUP_TIMEOUT: Duration = Duration::from_secs(10);

/// The directory trees in which runtimes and servers store files. Each entry also contains the
/// depth down to which the check reports new files.
const TREES: &[(&str, usize)] = &[
    ("/run", 3),
    ("/tmp", 1),
    ("/var/tmp", 1),
    ("/var/lib", 2),
    ("/etc/cni", 2),
    ("/dev/shm", 1),
];

/// The directory of pinned network namespaces. The first program that pins a namespace creates this
/// directory, and no program removes it. So the check ignores the directory itself, and reports
/// only its entries.
const NETNS: &str = "/run/netns";

/// The cgroups and files of the machine's own services. The check ignores these paths, because the
/// services create and delete them at any time.
const NOT_OURS: &[&str] = &[
    "/sys/fs/cgroup/system.slice",
    "/sys/fs/cgroup/user.slice",
    "/sys/fs/cgroup/init.scope",
    "/run/systemd",
    "/run/udev",
    "/var/lib/systemd",
];

pub(crate) struct Snapshot {
    entries: BTreeSet<String>,
    /// The running processes. The key is the process id, and the value contains the parent's
    /// process id and a description of the process.
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
            entries: all,
            processes: processes(),
        }
    }

    /// Returns the entries that exist now but do not exist in this snapshot. If such entries exist,
    /// the function waits for the kernel to delete them, but at most [`CLEANUP_TIMEOUT`].
    pub(crate) fn leftovers(&self) -> Vec<String> {
        let started = Instant::now();
        loop {
            let now = Snapshot::look();
            let mut left: Vec<String> = now.entries.difference(&self.entries).cloned().collect();
            left.extend(self.new_processes(&now));
            if left.is_empty() || started.elapsed() > CLEANUP_TIMEOUT {
                return left;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Returns new processes that the test may have left behind. Other processes in this snapshot
    /// can also start children during the test. The function ignores these children, because the
    /// test did not start them. But the function reports new children of PID 1, because an orphaned
    /// process of the test becomes a child of PID 1.
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

    /// Returns the entries of this snapshot that no longer exist. A test must remove only files,
    /// cgroups and mounts that it created.
    pub(crate) fn losses(&self) -> Vec<String> {
        self.entries
            .difference(&Snapshot::look().entries)
            .cloned()
            .collect()
    }
}

/// The paths that containerd and its CNI plugins create. If the tests run against containerd
/// instead of rrun-cri, the check ignores these paths.
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

/// Adds all mounts to `all`. In a line of mountinfo, the fifth field is the mount point. The first
/// field after " - " is the file system type (proc_pid_mountinfo(5)).
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
        // Several mounts can be stacked on one mount point. The suffix ` again` distinguishes the
        // entries of these mounts.
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
        // The fields of /proc/PID/stat are: pid (name) state ppid pgrp session tty tpgid flags. A
        // process name can contain spaces and parentheses, so the code splits the line at the last
        // parenthesis.
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

/// Returns the mount points at and below `directory`. The list is in the reverse order of
/// mountinfo. A test can unmount the paths in the order of the list.
pub(crate) fn mounts_below(directory: &Path) -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let points = table.lines().rev();
    points
        .filter_map(|line| line.split(' ').nth(4))
        .map(PathBuf::from)
        .filter(|point| point.starts_with(directory))
        .collect()
}

/// Unmounts all mounts at and below `directory`, and ignores errors.
pub(crate) fn unmount_below(directory: &Path) {
    for point in mounts_below(directory) {
        let _ = nix::mount::umount2(&point, nix::mount::MntFlags::MNT_DETACH);
    }
}

/// Removes `path` and everything below it. `path` is a file, a directory, or a cgroup without
/// processes.
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
