//! What a test may leave behind: nothing. The machine is looked at before and after, and the
//! difference of the two sets is the complaint.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

/// The kernel lets go of namespaces and interfaces a little after their last user.
const GRACE: Duration = Duration::from_secs(10);

/// Trees in which runtimes and servers keep things, and how deep a new entry is worth a line.
const TREES: &[(&str, usize)] = &[
    ("/run", 3),
    ("/tmp", 1),
    ("/var/tmp", 1),
    ("/var/lib", 2),
    ("/etc/cni", 2),
    ("/dev/shm", 1),
];

/// Services of the machine itself, whose groups and files come and go by themselves.
const NOT_OURS: &[&str] = &[
    "/sys/fs/cgroup/system.slice",
    "/sys/fs/cgroup/user.slice",
    "/sys/fs/cgroup/init.scope",
    "/run/systemd",
    "/run/udev",
    "/var/lib/systemd",
];

pub struct Machine(BTreeSet<String>);

impl Machine {
    pub fn look() -> Self {
        let mut all = BTreeSet::new();
        cgroups(Path::new("/sys/fs/cgroup"), &mut all);
        mounts(&mut all);
        processes(&mut all);
        for (tree, depth) in TREES {
            files(Path::new(tree), *depth, &mut all);
        }
        for name in names(Path::new("/sys/class/net")) {
            all.insert(format!("interface {name}"));
        }
        Machine(all)
    }

    /// What is there now and was not when this was looked at; waits a little for it to go.
    pub fn leavings(&self) -> Vec<String> {
        let started = Instant::now();
        loop {
            let now = Machine::look();
            let left: Vec<String> = now.0.difference(&self.0).cloned().collect();
            if left.is_empty() || started.elapsed() > GRACE {
                return left;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// What was there when this was looked at and is there no more. (A test must not tidy away
    /// what was not its own either.)
    pub fn losses(&self) -> Vec<String> {
        let now = Machine::look();
        self.0
            .difference(&now.0)
            .filter(|line| !line.starts_with("process"))
            .cloned()
            .collect()
    }
}

fn ours(path: &Path) -> bool {
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

fn processes(all: &mut BTreeSet<String>) {
    const KERNEL_THREAD: u64 = 0x0020_0000;
    let own = std::process::id().to_string();
    for pid in names(Path::new("/proc")) {
        if pid == own || !pid.bytes().all(|byte| byte.is_ascii_digit()) {
            continue;
        }
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
        let flags: u64 = fields
            .nth(5)
            .and_then(|flags| flags.parse().ok())
            .unwrap_or_default();
        let group = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        let group = group.trim_end().trim_start_matches("0::");
        if flags & KERNEL_THREAD != 0 || !ours(Path::new(&format!("/sys/fs/cgroup{group}"))) {
            continue;
        }
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        let dead = if state == "Z" { ", a zombie" } else { "" };
        all.insert(format!("process {pid} ({name}{dead}) {line}"));
    }
}

fn files(dir: &Path, depth: usize, all: &mut BTreeSet<String>) {
    let Ok(entries) = fs::read_dir(dir) else {
        return;
    };
    for entry in entries.flatten() {
        let path = entry.path();
        if !ours(&path) {
            continue;
        }
        if depth > 1 && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            files(&path, depth - 1, all);
        }
        all.insert(format!("file {}", path.display()));
    }
}
