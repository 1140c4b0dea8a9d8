//! A list of everything that a CRI server and its pods have created on the machine: files, mounts,
//! cgroups, interfaces, addresses, firewall rules, sysctls, processes with their attributes, and
//! the records of the store. Ids, addresses and numbers are replaced, so that the lists of two runs
//! can be compared.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};
use rrun_store::{Store, Table};
use serde_json::Value;

use crate::support::machine::{Result, command, wait_for};
use crate::support::node::Node;
use crate::support::supervisor::without_numbers;

/// The time for which [`Inventory::becomes`] waits. Interfaces, namespaces and writable layers are
/// deleted in the background.
const CLEANUP_TIMEOUT: Duration = Duration::from_secs(10);

/// The beginning of no line.
const NOTHING: &str = "no line";

/// The beginning of the lines for the runtime's state directories of containers. If the runtime's
/// `delete` fails after the exit of a container, the monitor repeats it at the container's removal.
const RUNTIME_STATE: &str = "file NODE/state/runtime/rrun/ID";

/// The beginning of the description of a pod's pause process.
const PAUSE: &str = "process rrun-pod";

/// The beginning of the lines for all files of pods.
const STATE: &str = "file NODE/state/";

/// Files with at most this number of bytes appear with their content, and larger files with a hash
/// of their content.
const SHOWN_BYTES: usize = 300;

/// The lines of the list, and how often each line occurs.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Inventory(BTreeMap<String, usize>);

impl Inventory {
    /// Lists everything on the machine. `pods` are the network namespaces of pods.
    pub(crate) fn of(node: &Node) -> Result<Self> {
        let mut all = Inventory::default();
        let replaced = [(node.join("").display().to_string(), "NODE/")];
        let mut add = |line: &str| {
            let line = without_numbers(line, &replaced);
            *all.0.entry(line).or_default() += 1;
        };
        files(&node.join("state"), &mut add);
        files(&node.join("root"), &mut add);
        mounts("self", "node", &mut add);
        cgroups(Path::new("/sys/fs/cgroup"), &mut add);
        processes(&mut add);
        let namespaces = node.join("state/netns");
        for pod in names(&namespaces) {
            network_of(&namespaces.join(pod), &mut add)?;
        }
        network("node", &mut add);
        store(
            &node.join("root/meta.redb"),
            &node.join("copy.redb"),
            &mut add,
        )?;
        Ok(all)
    }

    /// Lists everything, when two lists in a row are equal.
    pub(crate) fn settled(node: &Node) -> Result<Self> {
        let mut last = Inventory::of(node)?;
        wait_for("the node to settle", || {
            std::thread::sleep(Duration::from_millis(100));
            let now = Inventory::of(node)?;
            let before = std::mem::replace(&mut last, now);
            Ok((before == last).then_some(()))
        })?;
        Ok(last)
    }

    /// Waits until the inventory of the node equals this inventory. Returns the differences if the
    /// wait fails.
    pub(crate) fn becomes(&self, node: &Node, differences: Differences) -> Result<Vec<String>> {
        let started = Instant::now();
        loop {
            let left = self.compared(&Inventory::of(node)?, differences);
            if left.is_empty() || started.elapsed() > CLEANUP_TIMEOUT {
                return Ok(left);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn compared(&self, now: &Inventory, differences: Differences) -> Vec<String> {
        let mut all = Vec::new();
        let ignored = match differences {
            Differences::Added => NOTHING,
            Differences::All => RUNTIME_STATE,
            Differences::AllButState => STATE,
        };
        for (line, &count) in &now.0 {
            let should = self.0.get(line).copied().unwrap_or_default();
            if count > should && !line.starts_with(ignored) {
                all.push(format!("+{} {line}", count - should));
            }
        }
        if differences == Differences::Added {
            return all;
        }
        for (line, &should) in &self.0 {
            let count = now.0.get(line).copied().unwrap_or_default();
            // A server that was started again, or a monitor that could not prepare its copy of the
            // runtime, has fewer descriptors.
            if count < should && !line.starts_with("descriptor") && !line.starts_with(ignored) {
                all.push(format!("-{} {line}", should - count));
            }
        }
        all
    }
}

/// The differences that a comparison reports.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Differences {
    /// Entries that were added.
    Added,
    All,
    /// All differences, except files of pods. A call that ends a pod or a container can leave files
    /// that the removal of the pod then deletes.
    AllButState,
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

/// Adds the files below `dir`. The content of layers and of the writable layers' roots belongs to
/// images, so only their directories are added. Some files of a pod can remain until the pod's
/// removal after a kill or an error, and are not added: the monitor's log, incomplete records, and
/// files with process ids.
fn files(dir: &Path, add: &mut impl FnMut(&str)) {
    for name in names(dir) {
        let path = dir.join(&name);
        let Ok(found) = fs::symlink_metadata(&path) else {
            continue;
        };
        let kind = found.file_type();
        let unimportant = [".pid", ".json.new", "monitor.log"];
        if unimportant.iter().any(|end| name.ends_with(end)) {
            continue;
        }
        let mut line = format!(
            "file {} mode={:o} owner={}:{}",
            path.display(),
            found.mode(),
            found.uid(),
            found.gid()
        );
        // container.json contains the start time, unless the server was killed during the start.
        let hidden = ["meta.redb", "lock", "container.json"].contains(&name.as_str());
        if kind.is_symlink() {
            let target = fs::read_link(&path).unwrap_or_default();
            let _ = write!(line, " -> {}", target.display());
        } else if kind.is_file() && !hidden {
            let content = without_numbers(&fs::read_to_string(&path).unwrap_or_default(), &[]);
            if content.len() <= SHOWN_BYTES {
                let _ = write!(line, " content={content:?}");
            } else {
                let mut hasher = DefaultHasher::new();
                content.hash(&mut hasher);
                let _ = write!(line, " hash={}", letters(hasher.finish()));
            }
        } else if kind.is_socket() {
            line += " socket";
        }
        add(&line);
        if kind.is_dir() && !["fs", "rootfs", "shm", "upper", "work"].contains(&name.as_str()) {
            files(&path, add);
        }
    }
}

/// Returns the number in letters, because numbers are replaced in the inventory.
fn letters(mut number: u64) -> String {
    let mut text = String::new();
    while number > 0 {
        text.push(char::from(
            b'g' + u8::try_from(number % 16).unwrap_or_default(),
        ));
        number /= 16;
    }
    text
}

/// Adds the mounts in the mount namespace of a process (proc_pid_mountinfo(5)).
fn mounts(pid: &str, whose: &str, add: &mut impl FnMut(&str)) {
    let table = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap_or_default();
    for line in table.lines() {
        let fields: Vec<&str> = line.split(' ').skip(3).collect();
        add(&format!("mount of {whose}: {}", fields.join(" ")));
    }
}

/// Adds the cgroups below `dir`, with the limits that are set in them.
fn cgroups(dir: &Path, add: &mut impl FnMut(&str)) {
    for name in names(dir) {
        let path = dir.join(&name);
        if path.is_dir() {
            add(&format!("cgroup {}", path.display()));
            for limit in [
                "cgroup.max.descendants",
                "memory.max",
                "pids.max",
                "cpu.max",
            ] {
                let value = fs::read_to_string(path.join(limit)).unwrap_or_default();
                add(&format!(
                    "cgroup {} {limit} {}",
                    path.display(),
                    letters_of(&value)
                ));
            }
            cgroups(&path, add);
        }
    }
}

/// Returns a number as it is, with letters for its digits.
fn letters_of(text: &str) -> String {
    let letter = |c: char| {
        c.to_digit(10)
            .map_or(c, |digit| char::from(b'g' + digit as u8))
    };
    text.trim().chars().map(letter).collect()
}

fn processes(add: &mut impl FnMut(&str)) {
    let own = std::process::id().to_string();
    for pid in names(Path::new("/proc")) {
        if pid == own || !pid.bytes().all(|byte| byte.is_ascii_digit()) {
            continue;
        }
        let of = |file: &str| fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
        let text = |file: &str| String::from_utf8_lossy(&of(file)).replace('\0', " ");
        let Ok(exe) = fs::read_link(format!("/proc/{pid}/exe")) else {
            continue;
        };
        let who = format!("process {}", text("cmdline"));
        add(&who);
        if !["rrun-cri", "rrun-monitor"]
            .iter()
            .any(|name| exe.ends_with(name))
            && !text("cgroup").contains("/rrun/")
            && !text("cgroup").contains("/faults")
        {
            continue;
        }
        for fd in names(Path::new(&format!("/proc/{pid}/fd"))) {
            let target = fs::read_link(format!("/proc/{pid}/fd/{fd}")).unwrap_or_default();
            add(&format!("descriptor of {who}: {}", target.display()));
        }
        if exe.ends_with("rrun-cri") {
            continue;
        }
        let status = text("status");
        for line in status.lines() {
            let kept = [
                "Uid",
                "Gid",
                "Groups",
                "NoNewPrivs",
                "Seccomp",
                "Cap",
                "SigBlk",
                "Umask",
            ];
            if kept.iter().any(|name| line.starts_with(name)) {
                add(&format!("status of {who}: {}", letters_of(line)));
            }
        }
        for line in text("limits").lines() {
            add(&format!("limits of {who}: {}", letters_of(line)));
        }
        for file in [
            "oom_score_adj",
            "cgroup",
            "environ",
            "uid_map",
            "gid_map",
            "attr/current",
        ] {
            add(&format!("{file} of {who}: {}", text(file)));
        }
        for kind in names(Path::new("/proc/self/ns")) {
            let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}")).ok();
            let shared = of(&pid) == of("self");
            add(&format!(
                "namespace {kind} of {who} is the node's: {shared}"
            ));
        }
        // The pause process of a pod has the monitor's executable.
        if !exe.ends_with("rrun-monitor") || who.starts_with(PAUSE) {
            mounts(&pid, &who, add);
        }
    }
}

/// Adds the network of a pod, whose namespace is pinned at `path`.
fn network_of(path: &Path, add: &mut impl FnMut(&str)) -> Result {
    let path: PathBuf = path.to_owned();
    let work = move || {
        let mut lines = Vec::new();
        match fs::File::open(&path).map(|file| setns(file, CloneFlags::CLONE_NEWNET)) {
            Ok(Ok(())) => network("the pod", &mut |line: &str| lines.push(line.to_owned())),
            _ => lines.push(format!("{} is not a network namespace", path.display())),
        }
        lines
    };
    // setns(2) changes only the thread that calls it.
    let lines = std::thread::spawn(work).join();
    for line in lines.map_err(|_| "the thread in the pod's network namespace panicked")? {
        add(&line);
    }
    Ok(())
}

/// Adds the interfaces, addresses, routes, firewall rules and sysctls of this thread's network
/// namespace.
fn network(whose: &str, add: &mut impl FnMut(&str)) {
    for args in ["-o -d link", "-o address", "route", "-6 route"] {
        let listed = command("ip", args.split(' ')).end();
        for line in listed.iter().flat_map(|listed| listed.stdout.lines()) {
            // The kernel gives the test's own interfaces an address some time after their creation.
            if line.contains(": uplink") {
                continue;
            }
            add(&format!("ip {args} of {whose}: {}", without_carrier(line)));
        }
    }
    traffic_control(whose, add);
    let rules = command("nft", ["list", "ruleset"]).end();
    for line in rules.iter().flat_map(|rules| rules.stdout.lines()) {
        add(&format!("rule of {whose}: {line}"));
    }
    for dir in ["ipv4/conf", "ipv6/conf"] {
        sysctls(&Path::new("/proc/sys/net").join(dir), whose, add);
    }
    for file in [
        "ip_forward",
        "ip_unprivileged_port_start",
        "ping_group_range",
    ] {
        sysctl(&Path::new("/proc/sys/net/ipv4").join(file), whose, add);
    }
}

/// Adds the filters for incoming packets.
fn traffic_control(whose: &str, add: &mut impl FnMut(&str)) {
    let disciplines = command("tc", ["qdisc"]).end();
    let lines = disciplines.iter().flat_map(|listed| listed.stdout.lines());
    for line in lines.filter(|line| line.contains("clsact")) {
        add(&format!("traffic control of {whose}: {line}"));
        let name = line.split(' ').skip_while(|word| *word != "dev").nth(1);
        let filters = ["filter", "show", "dev", name.unwrap_or_default(), "ingress"];
        let filters = command("tc", filters).end();
        for line in filters.iter().flat_map(|filters| filters.stdout.lines()) {
            add(&format!("filter of {whose}: {line}"));
        }
    }
}

/// Returns a line without the words that depend on whether the interface has a carrier. The bridge
/// has no carrier while no pod exists.
fn without_carrier(line: &str) -> String {
    let words = line.split_whitespace().filter(|word| {
        let state = ["UP", "DOWN", "UNKNOWN", "LOWERLAYERDOWN", "linkdown"].contains(word);
        !state && !word.starts_with('<')
    });
    words.collect::<Vec<_>>().join(" ")
}

fn sysctls(dir: &Path, whose: &str, add: &mut impl FnMut(&str)) {
    for name in names(dir) {
        let path = dir.join(name);
        if path.is_dir() {
            sysctls(&path, whose, add);
        } else {
            sysctl(&path, whose, add);
        }
    }
}

fn sysctl(path: &Path, whose: &str, add: &mut impl FnMut(&str)) {
    if path.ends_with("stable_secret") {
        return;
    }
    let value = fs::read_to_string(path).unwrap_or_default();
    add(&format!(
        "sysctl of {whose}: {} = {}",
        path.display(),
        letters_of(&value)
    ));
}

/// Adds the records of the store. The server has locked its file, so this function reads a copy.
fn store(path: &Path, copy: &Path, add: &mut impl FnMut(&str)) -> Result {
    const TABLES: [(&str, Table); 10] = [
        ("sandboxes", Table::SANDBOXES),
        ("containers", Table::CONTAINERS),
        ("images", Table::IMAGES),
        ("layers", Table::LAYERS),
        ("configurations", Table::CONFIGURATIONS),
        ("preloads", Table::PRELOADS),
        ("leases", Table::LEASES),
        ("addresses", Table::ADDRESSES),
        ("attachments", Table::ATTACHMENTS),
        ("network", Table::NETWORK),
    ];
    static NEXT: AtomicU32 = AtomicU32::new(0);
    // The previous copy is closed by a thread, so it can still be locked.
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let copy = copy.with_extension(number.to_string());
    fs::copy(path, &copy)?;
    let opened = Store::open(&copy).map_err(|error| error.to_string())?;
    fs::remove_file(&copy)?;
    for (name, table) in TABLES {
        let records: Vec<(String, Value)> =
            opened.load(table).map_err(|error| error.to_string())?;
        for (key, mut value) in records {
            // A server that was killed during a start may not know the start time. The store
            // contains `in_runtime` only if the container was changed after its deletion from the
            // runtime.
            if let Some(state) = value.get_mut("state").and_then(Value::as_object_mut) {
                state.remove("started_at");
                state.remove("in_runtime");
            }
            if name != "addresses" || !key.starts_with("last") {
                add(&format!("record {name} {key} {value}"));
            }
        }
    }
    Ok(())
}
