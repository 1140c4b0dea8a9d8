//! Runs one config.json with several runtimes.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use serde_json::{Value, json};

use crate::support::bundle::Bundle;
use crate::support::inside::observation::{OBSERVED, STARTED};
use crate::support::leak_check::{mounts_below, remove, unmount_below};
use crate::support::machine::{Directory, Result, Running, command, deadline, wait_for};
use crate::support::random_config::{HOLDER, ID, SOURCE};

/// The name of the bundle's directory in an observation.
const BUNDLE: &str = "@BUNDLE@";

/// The suffix of a mount point in an observation if another mount covers the mount.
pub(crate) const COVERED: &str = " (covered)";

/// The result of a run of a configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// The program ran and exited with this code.
    Exits(i32),
    /// A signal killed the program.
    Killed(i32),
    /// The runtime reported an error, and the program did not run.
    Refused,
    /// The runtime did not exit in time.
    Hangs,
}

pub(crate) struct Outcome {
    pub(crate) class: Class,
    /// The settings that the program observed, in a form that does not depend on the runtime. Null if the program
    /// did not print it.
    pub(crate) observed: Value,
    /// The command with its output, for error messages.
    pub(crate) told: String,
    /// The error output of the runtime and of the program.
    pub(crate) stderr: String,
    /// The objects that existed after the run.
    pub(crate) left: Vec<String>,
}

/// The objects that all configurations share: sources of bind mounts, and a process with namespaces
/// that containers can join.
pub(crate) struct Surroundings {
    sources: Directory,
    holder: Running,
    namespaces: [(BTreeMap<String, String>, &'static str); 2],
    host_name: String,
}

impl Surroundings {
    pub(crate) fn new() -> Result<Self> {
        let sources = Directory::new("sources")?;
        let tree = sources.join("tree");
        fs::create_dir_all(tree.join("below"))?;
        fs::create_dir(tree.join("tree"))?;
        fs::write(tree.join("page"), "page\n")?;
        fs::write(sources.join("file"), "file\n")?;
        symlink("tree", sources.join("link"))?;
        let none: Option<&str> = None;
        let kind = Some("tmpfs");
        mount(kind, &tree.join("below"), kind, MsFlags::MS_NOSUID, none)?;
        let names = ["--net", "--uts", "--ipc", "--cgroup", "--mount"];
        let holder = command("unshare", names)
            .args(["sleep", "1000000"])
            .start()?;
        let path = format!("/proc/{}", holder.pid());
        wait_for("unshare to execute sleep", || {
            let name = fs::read_to_string(format!("{path}/comm"))?;
            Ok((name.trim() == "sleep").then_some(()))
        })?;
        let namespaces = [
            (links(Path::new("/proc/self/ns")), "host"),
            (links(&Path::new(&path).join("ns")), "holder"),
        ];
        Ok(Surroundings {
            sources,
            holder,
            namespaces,
            host_name: fs::read_to_string(HOST_NAME)?,
        })
    }

    /// Runs `config` with the runtime `program`.
    pub(crate) fn run(&self, program: &str, config: &Value) -> Result<Outcome> {
        let bundle = Bundle::new(&[])?;
        let (sources, holder) = (self.sources.path().display().to_string(), self.holder.pid());
        let text = config
            .to_string()
            .replace(ID, bundle.id())
            .replace(SOURCE, &sources)
            .replace(HOLDER, &holder.to_string());
        fs::write(bundle.join("config.json"), text)?;
        symlink("bin", bundle.rootfs().join("link"))?;
        fs::write(bundle.rootfs().join("etc/file"), "")?;
        let call = |args: &[&str]| {
            command(program, ["--root"])
                .arg(bundle.root())
                .args(args)
                .arg(bundle.id())
                .dir(bundle.path())
        };
        let output = call(&["run"]).within(deadline() * 2 / 3).end();
        let left = left(&bundle);
        if !left.is_empty() || output.is_err() {
            let _ = call(&["delete", "--force"]).end();
            for path in cgroups(Path::new("/sys/fs/cgroup"), bundle.id()) {
                remove(&path);
            }
            unmount_below(bundle.path());
        }
        let Ok(output) = output else {
            return Ok(Outcome {
                class: Class::Hangs,
                observed: Value::Null,
                told: format!("{program} did not exit in time"),
                stderr: String::new(),
                left,
            });
        };
        let observed = output.stdout.strip_prefix(STARTED);
        let parsed = observed.and_then(|text| serde_json::from_str(text).ok());
        Ok(Outcome {
            class: class(output.code, observed.is_some()),
            observed: parsed.map_or(Value::Null, |found| {
                let name = bundle.path().file_name().unwrap_or_default();
                let name = name.to_string_lossy();
                self.normal(
                    found,
                    &[(bundle.id(), ID), (&sources, SOURCE), (&name, BUNDLE)],
                )
            }),
            told: output.told(),
            stderr: output.stderr,
            left,
        })
    }

    /// Removes everything from an observation that differs between two runs of one runtime.
    fn normal(&self, mut found: Value, names: &[(&str, &str)]) -> Value {
        let cut = |text: &str| {
            names.iter().fold(text.to_owned(), |text, (name, place)| {
                text.replace(name, place)
            })
        };
        let mounts = found["mounts"].as_array().cloned().unwrap_or_default();
        let mut by_point = serde_json::Map::new();
        let mounts = mounts.iter().rev();
        for mount in mounts.filter_map(|line| mount_of(&cut(line.as_str()?))) {
            // Several mounts can be stacked on one mount point. The last one covers the others.
            let mut point = mount["point"].as_str().unwrap_or_default().to_owned();
            while by_point.contains_key(&point) {
                point.push_str(COVERED);
            }
            by_point.insert(point, mount);
        }
        found["mounts"] = Value::Object(by_point);
        found["cgroup"] = json!(cut(found["cgroup"].as_str().unwrap_or_default()));
        // The type, the owner and the group (KEYCTL_DESCRIBE(2const)). The permissions and the name
        // follow. They differ on purpose: rrun permits less than the peers, and its names end with a
        // random number.
        let keyring = found["keyring"].as_str().unwrap_or_default().split(';');
        found["keyring"] = json!(keyring.take(3).collect::<Vec<_>>());
        let links = found["namespaces"].as_object().cloned().unwrap_or_default();
        found["namespaces"] = links
            .iter()
            .map(|(kind, link)| {
                let known = self.namespaces.iter();
                let name = known
                    .filter(|(all, _)| all.get(kind).map(String::as_str) == link.as_str())
                    .map(|(_, name)| *name)
                    .next();
                (kind.clone(), json!(name.unwrap_or("new")))
            })
            .collect();
        // The path of /proc/self contains the process id.
        let cwd = found["cwd"].as_str().unwrap_or_default();
        let process = cwd.strip_prefix("/proc/").map(str::parse::<u32>);
        if process.is_some_and(|process| process.is_ok()) {
            found["cwd"] = json!("/proc/self");
        }
        let descriptors = found["fds"]
            .as_object()
            .map(|all| all.keys().cloned().collect::<Vec<_>>());
        found["fds"] = json!(descriptors);
        let status = found["status"].as_object().cloned().unwrap_or_default();
        found["status"] = status
            .into_iter()
            .filter(|(name, _)| STATUS.contains(&name.as_str()))
            .collect();
        // The priority, the nice value, the real-time priority and the policy (proc_pid_stat(5)).
        let stat = [15, 16, 37, 38].map(|at| found["stat"][at].clone());
        found["stat"] = json!(stat);
        // The paths of the observation contain the devices, too.
        for name in ["pid", "parent", "session", "exe", "devices"] {
            found[name].take();
        }
        found
    }
}

impl Drop for Surroundings {
    fn drop(&mut self) {
        unmount_below(self.sources.path());
        // The peers do not remove the parents of cgroups that they have created. Without a UTS
        // namespace, a peer sets the machine's host name.
        remove(Path::new("/sys/fs/cgroup/e2e"));
        let _ = fs::write(HOST_NAME, &self.host_name);
    }
}

const HOST_NAME: &str = "/proc/sys/kernel/hostname";

/// The lines of /proc/self/status that a runtime influences.
const STATUS: &[&str] = &[
    "Umask",
    "Uid",
    "Gid",
    "Groups",
    "NoNewPrivs",
    "Seccomp",
    "CapInh",
    "CapPrm",
    "CapEff",
    "CapBnd",
    "CapAmb",
    "SigBlk",
    "SigIgn",
    "Cpus_allowed_list",
    "Mems_allowed_list",
    "CoreDumping",
];

fn links(directory: &Path) -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if let Ok(target) = fs::read_link(entry.path()) {
            let name = entry.file_name().to_string_lossy().into_owned();
            all.insert(name, target.to_string_lossy().into_owned());
        }
    }
    all
}

fn class(code: i32, started: bool) -> Class {
    match code {
        OBSERVED => Class::Exits(code),
        129..=192 => Class::Killed(code - 128),
        _ if started => Class::Exits(code),
        _ => Class::Refused,
    }
}

/// Returns the fields of a line of mountinfo (proc_pid_mountinfo(5)) without the numbers.
fn mount_of(line: &str) -> Option<Value> {
    let (left, right) = line.split_once(" - ")?;
    let left: Vec<&str> = left.split(' ').collect();
    let propagation: Vec<&str> = left[6..]
        .iter()
        .map(|field| field.split(':').next().unwrap_or_default())
        .collect();
    let right: Vec<&str> = right.split(' ').collect();
    Some(json!({
        "root": left[3], "point": left[4], "options": left[5], "propagation": propagation,
        "type": right[0], "source": if right[1].is_empty() { "none" } else { right[1] }, "of the file system": right[2],
    }))
}

/// Returns the state directory, the cgroups and the mounts of a container that should not exist.
fn left(bundle: &Bundle) -> Vec<String> {
    let state = bundle.root().join(bundle.id());
    let mut all: Vec<PathBuf> = Some(state)
        .filter(|path| path.exists())
        .into_iter()
        .collect();
    all.extend(cgroups(Path::new("/sys/fs/cgroup"), bundle.id()));
    all.extend(mounts_below(bundle.path()));
    all.iter().map(|path| path.display().to_string()).collect()
}

/// Returns the cgroups whose names contain `id`.
fn cgroups(directory: &Path, id: &str) -> Vec<PathBuf> {
    let mut all = Vec::new();
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        if entry.file_name().to_string_lossy().contains(id) {
            all.push(path);
        } else {
            all.extend(cgroups(&path, id));
        }
    }
    all
}
