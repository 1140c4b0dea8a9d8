//! Random configurations, which the runtime under test, runc and crun must treat in the same way.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::bundle::Bundle;
use crate::support::machine::{Dice, Result, fixed_seed, full, note};
use crate::support::needs::{Need, Test};
use crate::support::peers::{COVERED, Class, Outcome, Surroundings};
use crate::support::random_config::{self, Choices};
use crate::{ensure, test};

const RUNC: Need = Need::Program("runc");
const CRUN: Need = Need::Program("crun");

pub(crate) const TESTS: &[Test] = &[
    test!(
        a_random_configuration_has_the_same_outcome_as_with_runc_or_crun,
        Need::Rrun,
        Need::NativeOrLong,
        RUNC,
        CRUN
    ),
    test!(
        random_limits_have_the_same_outcome_as_with_runc_or_crun,
        Need::Rrun,
        Need::Controller("memory"),
        Need::Controller("cpu"),
        Need::Controller("pids"),
        RUNC,
        CRUN
    ),
];

const RUNTIMES: [&str; 3] = ["rrun", "runc", "crun"];

fn a_random_configuration_has_the_same_outcome_as_with_runc_or_crun() -> Result {
    compare(if full() { 600 } else { 60 }, false)
}

fn random_limits_have_the_same_outcome_as_with_runc_or_crun() -> Result {
    compare(if full() { 100 } else { 12 }, true)
}

/// A difference between rrun and both peers. Two differences are of the same kind if their names
/// are equal.
struct Difference {
    name: String,
    /// The values of rrun, runc and crun.
    values: [Value; 3],
}

/// Runs `count` configurations, and fails if rrun differs from both peers without a known reason.
/// Also fails if the runtimes start too few of the configurations.
fn compare(count: u64, limits: bool) -> Result {
    let seed = fixed_seed();
    let surroundings = Surroundings::new()?;
    let mut found: Vec<(String, String)> = Vec::new();
    let (mut valid, mut compared, mut known) = (0, 0, 0);
    for number in 0..count {
        let mut dice = Choices::new(Dice::from_seed(seed << 20 | number));
        let mut config = Bundle::new(&["observe"])?.config.clone();
        config["linux"]["cgroupsPath"] = json!(format!("/{}", random_config::ID));
        random_config::change(&mut dice, &mut config, limits);
        let (differences, outcomes) = differences(&surroundings, &config)?;
        valid += u64::from(!dice.mistakes);
        let started = outcomes.iter().all(|outcome| !outcome.observed.is_null());
        compared += u64::from(started);
        for difference in differences {
            if reason(&difference, &config).is_some() {
                known += 1;
                continue;
            }
            if found.iter().any(|(name, _)| *name == difference.name) {
                continue;
            }
            // The search for a small configuration takes time.
            let text = if found.len() < 2 {
                shrunk(&surroundings, config.clone(), &difference.name)?
            } else {
                format!("{config}\n{}", told(&difference))
            };
            let name = difference.name;
            let text = format!("number {number}, {name}\n{text}");
            found.push((name, text));
        }
    }
    let text = format!(
        "{count} configurations, drawn with RRUN_TEST_SEED={seed}: {valid} have no mistakes, {compared} started with all runtimes, {known} differences have a reason"
    );
    note(text.clone());
    let all: Vec<String> = found.into_iter().map(|(_, text)| text).collect();
    ensure!(
        all.is_empty(),
        "{text}, and these differences from runc and crun have none:\n\n{}",
        all.join("\n\n")
    );
    ensure!(
        compared * 3 >= count,
        "{text}, but at least a third must start with all runtimes"
    );
    Ok(())
}

/// Runs a configuration with each runtime.
fn differences(
    surroundings: &Surroundings,
    config: &Value,
) -> Result<(Vec<Difference>, [Outcome; 3])> {
    let [rrun, runc, crun] = RUNTIMES.map(|program| surroundings.run(program, config));
    let outcomes = [rrun?, runc?, crun?];
    let mut all = Vec::new();
    if let Some(difference) = outcome_difference(&outcomes) {
        all.push(difference);
    }
    all.extend(complaints(&outcomes[0]));
    let observed = outcomes.each_ref().map(|outcome| &outcome.observed);
    if observed.iter().all(|value| !value.is_null()) {
        compare_values(String::new(), observed, &mut all);
    }
    Ok((all, outcomes))
}

/// Returns a difference if rrun did something else than each peer. A peer that refused the
/// configuration because of a known limitation does not count.
fn outcome_difference(outcomes: &[Outcome; 3]) -> Option<Difference> {
    let [rrun, peers @ ..] = outcomes;
    let counts = |peer: &&Outcome| {
        let is_limited = |(text, _): &(&str, &str)| peer.stderr.contains(text);
        peer.class != Class::Refused || !LIMITATIONS.iter().any(is_limited)
    };
    let peers: Vec<&Outcome> = peers.iter().filter(counts).collect();
    let agrees = outcomes[1..].iter().any(|peer| peer.class == rrun.class);
    if agrees || peers.is_empty() {
        return None;
    }
    let classes = outcomes.each_ref().map(|outcome| outcome.class);
    Some(Difference {
        name: format!("outcome {classes:?} {}", complaint(outcomes)),
        values: outcomes.each_ref().map(|outcome| json!(outcome.told)),
    })
}

/// Returns the last line of the first error output, without numbers and without the names of
/// temporary directories.
fn complaint(outcomes: &[Outcome; 3]) -> String {
    let mut texts = outcomes.iter().map(|outcome| outcome.stderr.trim_end());
    let text = texts.find(|text| !text.is_empty()).unwrap_or_default();
    let line = text.lines().last().unwrap_or_default();
    let line = line.split_once("msg=").map_or(line, |(_, message)| message);
    let words = line
        .split(' ')
        .filter(|word| !word.contains("/tmp/") && !word.contains("e2e-"));
    let line = words.collect::<Vec<_>>().join(" ");
    line.chars()
        .filter(|letter| !letter.is_ascii_digit())
        .take(160)
        .collect()
}

/// Checks the error message, and that rrun leaves nothing behind after its exit.
fn complaints(rrun: &Outcome) -> Vec<Difference> {
    let lines = rrun.stderr.lines();
    let errors = lines.filter(|line| !line.contains("level=warning"));
    let bad = errors.count() != 1 || rrun.stderr.contains("panicked");
    let mut all = Vec::new();
    if rrun.class == Class::Refused && bad {
        all.push("error message");
    }
    if rrun.class != Class::Hangs && !rrun.left.is_empty() {
        all.push("left behind");
    }
    all.into_iter()
        .map(|name| Difference {
            name: name.to_owned(),
            values: [json!(rrun.told), json!(rrun.left), Value::Null],
        })
        .collect()
}

/// Adds the differences between three observations. A peer whose program did not run has no
/// observation.
fn compare_values(name: String, values: [&Value; 3], all: &mut Vec<Difference>) {
    let [rrun, runc, crun] = values;
    if rrun == runc || rrun == crun {
        return;
    }
    let objects = values.into_iter().filter_map(Value::as_object);
    let keys: BTreeSet<&String> = objects.flat_map(|object| object.keys()).collect();
    if !keys.is_empty() {
        for key in keys {
            let inner = values.map(|value| &value[key]);
            compare_values(format!("{name}/{key}"), inner, all);
        }
        return;
    }
    all.push(Difference {
        name,
        values: values.map(Value::clone),
    });
}

/// The time in which a failing test looks for a smaller configuration.
const SHRINKING_TIME: Duration = Duration::from_secs(15);

/// Removes members from the configuration as long as the difference `name` remains. Returns the
/// smallest configuration, and the difference.
fn shrunk(surroundings: &Surroundings, mut config: Value, name: &str) -> Result<String> {
    let mut text = String::new();
    let mut pointers = Vec::new();
    members(&config, String::new(), &mut pointers);
    let end = Instant::now() + SHRINKING_TIME;
    for pointer in &pointers {
        let mut smaller = config.clone();
        take(&mut smaller, pointer);
        if smaller == config || Instant::now() > end {
            continue;
        }
        let (all, _) = differences(surroundings, &smaller)?;
        let is_same = |other: &Difference| other.name == name && reason(other, &smaller).is_none();
        if let Some(difference) = all.into_iter().find(is_same) {
            config = smaller;
            text = told(&difference);
        }
    }
    if text.is_empty() {
        let (all, _) = differences(surroundings, &config)?;
        let same = all.iter().find(|other| other.name == name);
        text = same.map_or("(not reproduced)".to_owned(), told);
    }
    Ok(format!("{config}\n{text}"))
}

fn told(difference: &Difference) -> String {
    let values = RUNTIMES.iter().zip(&difference.values);
    values
        .map(|(runtime, value)| {
            let text = value
                .as_str()
                .map_or_else(|| value.to_string(), str::to_owned);
            format!("{runtime}: {text}\n")
        })
        .collect()
}

/// Adds the JSON pointers of the members that a configuration does not need.
fn members(value: &Value, pointer: String, all: &mut Vec<String>) {
    const NEEDED: &[&str] = &[
        "/root",
        "/root/path",
        "/process",
        "/process/args",
        "/process/cwd",
        "/linux",
        "/mounts",
        "/mounts/0",
    ];
    if !pointer.is_empty() && !NEEDED.contains(&pointer.as_str()) {
        all.push(pointer.clone());
    }
    // A removal moves the later elements of a list, so the last element is the first one here.
    match value {
        Value::Object(object) => object.iter().for_each(|(key, inner)| {
            members(inner, format!("{pointer}/{}", key.replace('/', "~1")), all)
        }),
        Value::Array(list) => list
            .iter()
            .enumerate()
            .rev()
            .for_each(|(at, inner)| members(inner, format!("{pointer}/{at}"), all)),
        _ => {}
    }
}

/// Removes the member at a JSON pointer, if it exists.
fn take(config: &mut Value, pointer: &str) {
    let Some((parent, key)) = pointer.rsplit_once('/') else {
        return;
    };
    match config.pointer_mut(parent) {
        Some(Value::Object(object)) => {
            object.remove(&key.replace("~1", "/"));
        }
        Some(Value::Array(list)) => {
            if let Ok(at) = key.parse::<usize>()
                && at < list.len()
            {
                list.remove(at);
            }
        }
        _ => {}
    }
}

/// Parts of the messages with which a peer refuses a valid configuration, and what the peer lacks.
const LIMITATIONS: &[(&str, &str)] = &[
    (
        "error mounting \\\"cgroup\\\" to rootfs",
        "runc passes the options of other file systems to a cgroup",
    ),
    (
        "cap_last_cap: no such file",
        "runc reads a file of /proc/sys after it has masked /proc/sys",
    ),
    (
        "` to `link/",
        "crun mounts nothing on a path through a link",
    ),
    (
        "bind mounts cannot have any filesystem-specific options",
        "runc knows no option `sync` of a bind mount; crun and rrun ignore it",
    ),
    (
        "cannot be mounted because it is inside /proc",
        "runc mounts nothing below /proc, not even another procfs",
    ),
    (
        "defaults: invalid argument",
        "runc passes the option `defaults` to the file system",
    ),
    (
        "it must be mounted at the root",
        "crun mounts procfs and sysfs only at their usual places",
    ),
    (
        "mount `cgroup` to ",
        "crun mounts a cgroup only at /sys/fs/cgroup",
    ),
    (
        "seccomp get action ``",
        "crun refuses an empty defaultAction, which the schema allows as a string",
    ),
    (
        "attr/keycreate`: Invalid argument",
        "crun uses an empty SELinux label without SELinux",
    ),
    (
        "mount_setattr `",
        "crun applies recursive options with different values than the kernel accepts",
    ),
    (
        "reopening /dev/null inside container",
        "runc opens the container's /dev/null, which the configuration has replaced",
    ),
    ("open `/dev/null`: ", "the same with crun"),
    (
        "two checks on same syscall argument",
        "libseccomp accepts neither two conditions for one argument nor the errno 4095",
    ),
    ("seccomp_rule_add `", "the same with crun"),
    (
        "seccomp_rule_add_array: Invalid argument",
        "the same with crun",
    ),
];

/// A difference in an attribute of a mount.
struct MountDifference<'a> {
    config: &'a Value,
    /// The mount point.
    point: &'a str,
    /// True if another mount on the same path covers the mount.
    is_covered: bool,
    attribute: &'a str,
    rrun: &'a Value,
    peers: [&'a Value; 2],
}

impl<'a> MountDifference<'a> {
    /// Returns the difference with the name `name`, without the prefix `/mounts/`.
    fn new(config: &'a Value, name: &'a str, values: &'a [Value; 3]) -> Option<Self> {
        let (place, attribute) = name.rsplit_once('/')?;
        let [rrun, runc, crun] = values;
        let point = place.trim_end_matches(COVERED);
        Some(MountDifference {
            config,
            point,
            is_covered: place != point,
            attribute,
            rrun,
            peers: [runc, crun],
        })
    }

    fn reason(&self) -> Option<&'static str> {
        if self.is_covered && self.is_protected() {
            return Some("runtimes protect a path with different numbers of mounts");
        }
        let exists = [self.rrun, self.peers[0], self.peers[1]].map(|value| !value.is_null());
        if exists != [true; 3] {
            return self.reason_of_number(exists);
        }
        match self.attribute {
            "options" => self.reason_of_options(),
            "propagation" => self.reason_of_propagation(),
            "source" if self.is_protected() && self.rrun == "none" => Some(MASK),
            "of the file system" if self.is_protected() && is_mask(self.rrun) => Some(MASK),
            "of the file system" if self.is_protected() && self.is_writable_only_in_rrun() => Some(
                "rrun makes a mount read-only, and runc the file system; crun protects a path in another order",
            ),
            "of the file system" => {
                let is_mode = |word: &&str| word.starts_with("mode=");
                let same = |peer: &&Value| {
                    let without_mode = words(peer).filter(|word| !is_mode(word));
                    without_mode.eq(words(self.rrun))
                };
                let same = self.peers.iter().any(same);
                same.then_some("rrun sets the mode of a tmpfs without an option of the mount")
            }
            "root" if !has_cgroup_namespace(self.config) && is_cgroup(self.rrun) => Some(
                "without a cgroup namespace, rrun binds the container's cgroup (CVE-2023-25809)",
            ),
            _ => None,
        }
    }

    /// Returns true if the options of the file systems differ only in `rw` and `ro`.
    fn is_writable_only_in_rrun(&self) -> bool {
        let without = |value: &'a Value, word| value.as_str()?.strip_prefix(word);
        let rrun = without(self.rrun, "rw");
        let mut peers = self.peers.iter();
        rrun.is_some() && peers.any(|peer| without(peer, "ro") == rrun)
    }

    /// Returns the reason why not all runtimes mount something at the path. `exists` contains a
    /// value for each runtime.
    fn reason_of_number(&self, exists: [bool; 3]) -> Option<&'static str> {
        let point = self.point;
        if point.starts_with("/proc/") && point.contains(|letter: char| letter.is_ascii_digit()) {
            return Some("the directory of a process in /proc has another name in each run");
        }
        (self.is_protected() && exists == [true, false, false])
            .then_some("rrun also protects a path that the peers skip, such as an empty one")
    }

    fn reason_of_options(&self) -> Option<&'static str> {
        let restricts = |word: &&str| ["ro", "nosuid", "nodev", "noexec"].contains(word);
        let is_time = |word: &&str| word.ends_with("atime") || word.ends_with("diratime");
        let same_but_times = |peer: &&Value| {
            let restrictions = words(self.rrun).filter(|word| !is_time(word));
            restrictions.eq(words(peer).filter(|word| !is_time(word)))
        };
        // The options of the peer, and perhaps more restrictions.
        let more = |peer: &&Value| {
            let rrun: Vec<&str> = words(self.rrun).filter(|word| !is_time(word)).collect();
            let mut all = words(peer).filter(|word| !is_time(word) && *word != "rw");
            all.all(|word| rrun.contains(&word))
                && rrun.iter().all(|word| {
                    restricts(word) || *word == "rw" || words(peer).any(|other| other == *word)
                })
        };
        let options = self.configured_options();
        let times = options.iter().filter(|option| is_time(option)).count();
        if times > 1 && self.peers.iter().any(same_but_times) {
            return Some("of several options for access times, rrun applies the last one");
        }
        let is_recursive = |option: &&str| option.starts_with("rn") || option.starts_with("rr");
        let [_, crun] = self.peers;
        let crun = words(crun).filter(|word| !is_time(word) && *word != "nosymfollow");
        let rrun = words(self.rrun).filter(|word| !is_time(word));
        if options.iter().any(is_recursive) && rrun.eq(crun) {
            return Some(
                "with a recursive option, crun takes dirsync for nodiratime, and relatime for nosymfollow",
            );
        }
        let binds = is_bind(&options);
        if (binds || self.is_protected()) && self.peers.iter().any(more) {
            return Some(
                "a bind mount keeps the restrictions of its source, and a read-only path makes the mounts below it read-only",
            );
        }
        None
    }

    fn reason_of_propagation(&self) -> Option<&'static str> {
        let mut without_master = self.rrun.clone();
        if let Value::Array(all) = &mut without_master {
            all.retain(|kind| kind != "master");
        }
        let propagation = self.config["linux"]["rootfsPropagation"].as_str();
        let is_shared = propagation.is_some_and(|kind| kind.ends_with("shared"));
        let is_slave = !is_shared && *self.rrun == json!(["master"]);
        let options = self.configured_options();
        let makes_shared = options.contains(&"shared") || options.contains(&"rshared");
        if propagation.is_some() && makes_shared && *self.rrun == json!(["shared"]) {
            return Some(
                "rrun does not let rootfsPropagation replace the propagation of a single mount",
            );
        }
        let is_bind = is_bind(&options);
        if is_shared && is_bind && *self.rrun == json!(["shared"]) {
            return Some(
                "the peers make the mount private that contains both the bundle and the bind mount's source",
            );
        }
        (is_slave || self.peers.contains(&&without_master)).then_some(
            "a mount of the host remains a slave of the host's mount, also in a bind mount",
        )
    }

    /// Returns the options of the configuration's mounts at the path.
    fn configured_options(&self) -> Vec<&str> {
        let is_here = |mount: &&Value| at(mount["destination"].as_str(), self.point);
        let mounts = self.config["mounts"].as_array().into_iter().flatten();
        let options = mounts
            .filter(is_here)
            .flat_map(|mount| mount["options"].as_array());
        options.flatten().filter_map(Value::as_str).collect()
    }

    /// Returns true if the configuration masks the path or makes the path read-only, perhaps with a
    /// directory that contains the path.
    fn is_protected(&self) -> bool {
        let linux = &self.config["linux"];
        let lists = [&linux["maskedPaths"], &linux["readonlyPaths"]];
        let paths = lists.iter().filter_map(|list| list.as_array()).flatten();
        let mut paths = paths.filter_map(Value::as_str);
        let above = |path| {
            let all = Path::new(self.point).ancestors().filter_map(Path::to_str);
            all.into_iter().any(|point| at(Some(path), point))
        };
        paths.any(|path| ["", "/"].contains(&path) || above(path))
    }
}

const MASK: &str = "rrun masks a directory with a tmpfs that has no room for files";

/// Returns true for the file system options of rrun's mask. In a user namespace, more options follow.
fn is_mask(options: &Value) -> bool {
    words(options).take(3).eq(["rw", "size=4k", "nr_inodes=1"])
}

fn is_bind(options: &[&str]) -> bool {
    let mut options = options.iter();
    options.any(|option| ["bind", "rbind"].contains(option))
}

/// Returns the words of a list with commas.
fn words(list: &Value) -> impl Iterator<Item = &str> {
    list.as_str().unwrap_or_default().split(',')
}

/// Returns true if a path of the configuration leads to the mount point. The path can also be
/// relative, contain `..` or end with a slash.
fn at(path: Option<&str>, point: &str) -> bool {
    point != "/"
        && path.is_some_and(|path| format!("/{path}").trim_end_matches('/').ends_with(point))
}

/// Returns true if the root of a mount is the container's cgroup.
fn is_cgroup(root: &Value) -> bool {
    root.as_str()
        .is_some_and(|root| root.ends_with(random_config::ID))
}

fn has_cgroup_namespace(config: &Value) -> bool {
    let all = config["linux"]["namespaces"].as_array();
    let is_own = |namespace: &Value| {
        namespace["type"] == "cgroup" && namespace["path"] != "/proc/self/ns/cgroup"
    };
    all.is_some_and(|all| all.iter().any(is_own))
}

/// The differences that are intended, or that the peers cause: a part of the difference's name, a
/// part of the configuration, and the reason.
const REASONS: &[(&str, &str, &str)] = &[
    (
        "is listed twice",
        "rlimits",
        "the specification requires an error for duplicate limits (config.md, \"rlimits\")",
    ),
    (
        "process.user.umask: ",
        "umask",
        "the kernel ignores bits of the umask above 0777; rrun reports them",
    ),
    (
        "/memory_policy",
        "memoryPolicy",
        "runc ignores memoryPolicy, which is new in version 1.3 of the specification",
    ),
    (
        "/paths//dev/mqueue/owner",
        "\"user\"",
        "the kernel gives the root of mqueue to the creator of the IPC namespace; rrun creates all namespaces at once",
    ),
    (
        "/reads",
        "\"major\":10,\"minor\":200",
        "the peers allow /dev/net/tun by default; rrun allows only the default devices of the specification",
    ),
    (
        "/writes",
        "\"major\":10,\"minor\":200",
        "the peers allow /dev/net/tun by default; rrun allows only the default devices of the specification",
    ),
    (
        "linux.cgroupsPath: the path must not contain",
        "/../",
        "rrun refuses a cgroup outside the given parent",
    ),
    (
        "ociVersion: ",
        "ociVersion",
        "the specification requires a version in the format of SemVer 2.0.0",
    ),
    (
        "/status/Cap",
        "\"CHOWN\"",
        "rrun accepts names of capabilities without CAP_",
    ),
    (
        "/status/Cap",
        "\"cap_chown\"",
        "rrun accepts names of capabilities in lower case",
    ),
    (
        "run hooks.poststart",
        "poststart",
        "rrun logs a warning if a poststart hook fails, as the specification requires up to version 1.2.0",
    ),
    (
        "error mounting \\\"mqueue",
        "\"user\"",
        "in a user namespace without its own IPC namespace, rrun binds the host's mqueue, as crun binds a sysfs",
    ),
    (
        "error mounting \\\"sysfs",
        "\"user\"",
        "in a user namespace without its own network namespace, rrun binds the host's sysfs",
    ),
    (
        "effective: CAP_CHOWN is not in",
        "\"CHOWN\"",
        "rrun accepts names of capabilities without CAP_; the peers ignore them",
    ),
    (
        "].timeout: must be more than",
        "\"timeout\":",
        "the specification requires a timeout of more than 0",
    ),
    (
        "error mounting to rootfs at",
        "\"user\"",
        "in a user namespace, the peers cannot change the options of a mount that the kernel locks",
    ),
    (
        "leads to another mount than the root directory and /dev",
        "\"devices\"",
        "rrun creates no device files in volumes, because it could change files of the host",
    ),
    (
        "/paths//dev/core/",
        "",
        "the specification does not list the link /dev/core, which the peers create if the host has /proc/kcore",
    ),
    (
        "kernel.hostname",
        "kernel.hostname",
        "rrun allows this sysctl in the container's own UTS namespace",
    ),
    (
        "is not an absolute path",
        "\"path\":\"relative\"",
        "the specification requires an absolute path; the peers refuse it only when the hook runs",
    ),
    (
        "net.ipv.conf.lo/forwarding",
        "lo/forwarding",
        "as in sysctl(8), the first separator decides what the others mean; the peers exchange every dot",
    ),
    (
        "Exits(42), Refused, Refused] ",
        "unbindable\"",
        "the peers make the root unbindable before they bind its masked and read-only paths, which the kernel refuses",
    ),
];

/// Returns the reason of a difference, if the difference is known.
fn reason(difference: &Difference, config: &Value) -> Option<&'static str> {
    if let Some(name) = difference.name.strip_prefix("/mounts/") {
        return MountDifference::new(config, name, &difference.values)?.reason();
    }
    if difference.name == "/paths//sys/fs/cgroup/mode" && difference.values[0] == "41755" {
        return Some("rrun marks the cgroup of a container with the sticky bit");
    }
    let text = config.to_string();
    let is_known = |(name, part, _): &&(&str, &str, &str)| {
        difference.name.contains(name) && text.contains(part)
    };
    REASONS.iter().find(is_known).map(|(.., reason)| *reason)
}
