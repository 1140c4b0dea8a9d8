//! The systemd cgroup driver. systemd creates the container's cgroup as a transient scope, accounts
//! for the scope's resource usage, and lists the scope among the units. The property "Delegate"
//! lets rrun write limits and create child cgroups in the scope's cgroup.
//!
//! systemd creates a scope only around an existing process. But rrun creates the container's first
//! process later, inside the scope's cgroup (see [`crate::lifecycle::create`]). Until the
//! container's first process exists, an idle placeholder process keeps the scope alive. See
//! systemd.scope(5), systemd.resource-control(5) and org.freedesktop.systemd1(5).

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::cgroup::dbus::{Body, Bus, BusValue, Property, Refusal};
use crate::cgroup::directory::of_process;
use crate::error::{Context, Error, Kind, Result, refuse};
use crate::log;
use crate::sys::child::{exit_now, kill_and_reap};
use crate::sys::clone::{Cloned, clone3};

/// The prefix of the annotations that set properties of the systemd unit. The value of such an
/// annotation is in GVariant text format.
pub(crate) const ANNOTATION: &str = "org.systemd.property.";

/// The prefixes of the files of a cgroup to which systemd adds a `_`: `cgroup`, and the names of the
/// controllers that systemd knows. See cgroup_controller_table in systemd's source.
const FILE_PREFIXES: &[&str] = &[
    "cgroup",
    "cpu",
    "cpuacct",
    "cpuset",
    "io",
    "blkio",
    "memory",
    "devices",
    "pids",
    "bpf-firewall",
    "bpf-devices",
    "bpf-foreign",
    "bpf-socket-bind",
    "bpf-restrict-network-interfaces",
    "bpf-bind-network-interface",
];

/// The time in which systemd processes a request whose answer rrun could not read.
const ABANDON_TIMEOUT: Duration = Duration::from_secs(2);
const ABANDON_INTERVAL: Duration = Duration::from_millis(10);

/// The systemd scope that `linux.cgroupsPath` specifies.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Scope {
    pub(crate) unit: String,
    slice: String,
    properties: Vec<Property>,
}

impl Scope {
    /// Parses a path of the form `slice:prefix:name`, which specifies the unit `prefix-name.scope`
    /// in the slice `slice`. An empty slice means system.slice, or user.slice if the user's own
    /// systemd creates the unit.
    pub(crate) fn from_spec(
        cgroups_path: &Path,
        id: &str,
        annotations: &HashMap<String, String>,
    ) -> Result<Scope> {
        let text = cgroups_path.to_string_lossy();
        let (slice, prefix, name) = match text.split(':').collect::<Vec<_>>().as_slice() {
            [""] => ("", "rrun", id),
            [slice, prefix, name] => (*slice, *prefix, *name),
            _ => refuse!(
                "linux.cgroupsPath: {text} does not have the form slice:prefix:name, which --systemd-cgroup requires"
            ),
        };
        let slice = match slice {
            "" if rustix::process::geteuid().is_root() => "system.slice",
            "" => "user.slice",
            slice => slice,
        };
        expand(slice)?;
        if name.is_empty() || name.contains('/') || prefix.contains('/') {
            refuse!("linux.cgroupsPath: {text} is not a valid name of a systemd unit");
        }
        if name.ends_with(".slice") {
            refuse!("linux.cgroupsPath: {text} names a slice, but a container needs a scope");
        }
        let mut properties = Vec::new();
        for (key, value) in annotations {
            if let Some(name) = key.strip_prefix(ANNOTATION) {
                properties.push(parse_annotation(name, value).ok_or_else(|| {
                    Error::new(format!(
                        "annotations: {key}: {value} is not a value that rrun can parse"
                    ))
                })?);
            }
        }
        Ok(Scope {
            unit: format!("{prefix}-{name}.scope"),
            slice: slice.to_owned(),
            properties,
        })
    }

    /// Returns the path of the scope's cgroup, relative to the root of the hierarchy.
    pub(crate) fn path(&self) -> Result<PathBuf> {
        let mut path = PathBuf::new();
        if !rustix::process::geteuid().is_root() {
            let root = Bus::connect()?.property("ControlGroup")?;
            path.push(root.trim_start_matches('/'));
        }
        path.push(expand(&self.slice)?);
        path.push(directory_name(&self.unit));
        Ok(path)
    }

    /// Requests the scope with its limits from systemd, and waits until systemd has created the
    /// scope.
    ///
    /// # Errors
    /// Fails if a scope with the same name already contains processes, or if systemd refuses the
    /// request. If systemd refuses the request, the error contains systemd's message.
    pub(crate) fn start(&self, id: &str, limits: Vec<Property>) -> Result<Placeholder> {
        let mut bus = Bus::connect()?;
        let placeholder = Placeholder::new()?;
        match self.request(&mut bus, id, limits, placeholder.pid) {
            Ok(answer) => answer.map(|()| placeholder),
            Err(error) => {
                self.abandon(placeholder);
                Err(error)
            }
        }
    }

    /// Returns systemd's answer, which is an error if systemd has refused the request. Fails if rrun
    /// cannot read the answer.
    fn request(
        &self,
        bus: &mut Bus,
        id: &str,
        limits: Vec<Property>,
        pid: u32,
    ) -> Result<Result<()>> {
        let doing = || format!("start {} in {} through systemd", self.unit, self.slice);
        let mut properties = vec![
            text("Description", &format!("libcontainer container {id}")),
            text("Slice", &self.slice),
            flag("Delegate", true),
            ("PIDs".to_owned(), BusValue::U32s(vec![pid])),
            flag("MemoryAccounting", true),
            flag("CPUAccounting", true),
            flag("IOAccounting", true),
            flag("TasksAccounting", true),
            flag("DefaultDependencies", false),
            // rrun reads the job's result immediately, so systemd does not need to keep a failed
            // scope for later inspection.
            text("CollectMode", "inactive-or-failed"),
        ];
        properties.extend(limits);
        properties.extend(self.properties.iter().cloned());
        let mut retried = false;
        let job = loop {
            let body = Body::default()
                .text(&self.unit)
                .text("replace")
                .properties(&properties)
                .no_units();
            match bus.call("StartTransientUnit", body)? {
                Ok(job) => break job,
                // An earlier scope with the same name failed, and systemd still keeps the failed
                // unit. rrun resets this unit and tries again.
                Err(refusal) if refusal.is("UnitExists") && !retried => {
                    retried = true;
                    reset_failed(bus, &self.unit)?;
                }
                Err(refusal) => {
                    let kind = if refusal.is("UnitExists") {
                        Kind::UnitExists
                    } else {
                        Kind::General
                    };
                    return Ok(Err(refusal_error(doing(), &refusal).with_kind(kind)));
                }
            }
        };
        let result = bus.await_job(&job, &doing())?;
        if result == "done" {
            return Ok(Ok(()));
        }
        let _ = reset_failed(bus, &self.unit);
        let sentence = format!(
            "{}: systemd finished the job with the result {result}",
            doing()
        );
        Ok(Err(Error::new(sentence)))
    }

    /// Stops the scope after a failure. If rrun could not read systemd's answer, the scope exists,
    /// will exist soon or does not exist. The scope is rrun's own only if it contains the
    /// placeholder. Another container can have a scope with the same name.
    pub(crate) fn abandon(&self, placeholder: Placeholder) {
        let started = Instant::now();
        let is_own = || {
            let directory = directory_name(&self.unit);
            of_process(placeholder.pid.cast_signed()).is_ok_and(|path| path.ends_with(directory))
        };
        let is_known = || -> Result<bool> {
            let body = Body::default().text(&self.unit);
            Ok(Bus::connect()?.call("GetUnit", body)?.is_ok())
        };
        while !is_own() && started.elapsed() < ABANDON_TIMEOUT && is_known().unwrap_or(true) {
            std::thread::sleep(ABANDON_INTERVAL);
        }
        let is_own = is_own();
        drop(placeholder);
        if is_own && let Err(error) = stop(&self.unit) {
            log::warning(&error.to_string());
        }
    }
}

fn text(name: &str, value: &str) -> Property {
    (name.to_owned(), BusValue::Text(value.to_owned()))
}

fn flag(name: &str, value: bool) -> Property {
    (name.to_owned(), BusValue::Bool(value))
}

fn refusal_error(doing: String, refusal: &Refusal) -> Error {
    let name = refusal.name.rsplit('.').next().unwrap_or_default();
    Error::new(format!("{doing}: {} ({name})", refusal.text))
}

/// Returns the path of a slice's cgroup. The cgroup of `a-b.slice` is inside the cgroup of
/// `a.slice`, and the cgroup of `-.slice` is the root of the hierarchy.
fn expand(slice: &str) -> Result<PathBuf> {
    let malformed = || {
        Error::new(format!(
            "linux.cgroupsPath: {slice} is not a valid name of a slice"
        ))
    };
    let name = slice.strip_suffix(".slice").ok_or_else(malformed)?;
    let mut path = PathBuf::new();
    if name == "-" {
        return Ok(path);
    }
    if name.contains('/') || name.split('-').any(str::is_empty) {
        return Err(malformed());
    }
    for (end, _) in name.match_indices('-').chain([(name.len(), "")]) {
        let slice = format!("{}.slice", name.get(..end).unwrap_or_default());
        path.push(directory_name(&slice));
    }
    Ok(path)
}

/// Returns the name of the cgroup of a unit. A name that the kernel could use for a file of a cgroup,
/// such as `memory.x-1.scope`, begins with an additional `_`, as does a name that begins with `_` or
/// `.`. See "Cgroup Names" in systemd's CONTROL_GROUP_INTERFACE, and cg_escape() in its source.
fn directory_name(unit: &str) -> String {
    let first = unit.split('.').next().unwrap_or_default();
    if first.is_empty() || first.starts_with('_') || FILE_PREFIXES.contains(&first) {
        format!("_{unit}")
    } else {
        unit.to_owned()
    }
}

/// Returns the unit whose cgroup has the name `directory`.
pub(super) fn unit_name(directory: &str) -> &str {
    let unescaped = directory.strip_prefix('_').unwrap_or(directory);
    if directory_name(unescaped) == directory {
        unescaped
    } else {
        directory
    }
}

/// Converts an annotation to a property. This function parses only the simple types of the GVariant
/// text format, because unit properties have no other types. A property in seconds, such as
/// `TimeoutStopSec`, becomes a property in microseconds (`TimeoutStopUSec`), because systemd's
/// D-Bus interface has only properties in microseconds.
fn parse_annotation(name: &str, value: &str) -> Option<Property> {
    let parsed = gvariant(value.trim())?;
    let seconds = name.strip_suffix("Sec");
    let Some(seconds) = seconds.filter(|rest| !rest.ends_with('U')) else {
        return Some((name.to_owned(), parsed));
    };
    let number = match parsed {
        BusValue::I32(number) => u64::try_from(number).ok()?,
        BusValue::I64(number) => u64::try_from(number).ok()?,
        BusValue::U32(number) => u64::from(number),
        BusValue::U64(number) => number,
        _ => return None,
    };
    Some((
        format!("{seconds}USec"),
        BusValue::U64(number.checked_mul(1_000_000)?),
    ))
}

fn gvariant(text: &str) -> Option<BusValue> {
    let quoted = |text: &str| {
        let mark = text.chars().next().filter(|c| matches!(c, '\'' | '"'))?;
        let inner = text.get(1..)?.strip_suffix(mark)?;
        (!inner.contains([mark, '\\'])).then(|| inner.to_owned())
    };
    if let Some(text) = quoted(text) {
        return Some(BusValue::Text(text));
    }
    if let Some(items) = text
        .strip_prefix('[')
        .and_then(|text| text.strip_suffix(']'))
    {
        return items
            .split(',')
            .map(|item| quoted(item.trim()))
            .collect::<Option<_>>()
            .map(BusValue::Texts);
    }
    match text.split_once(' ') {
        Some(("uint64", number)) => number.trim().parse().ok().map(BusValue::U64),
        Some(("int64", number)) => number.trim().parse().ok().map(BusValue::I64),
        Some(("uint32", number)) => number.trim().parse().ok().map(BusValue::U32),
        Some(("int32", number)) => number.trim().parse().ok().map(BusValue::I32),
        Some(_) => None,
        None if text == "true" => Some(BusValue::Bool(true)),
        None if text == "false" => Some(BusValue::Bool(false)),
        None => text.parse().ok().map(BusValue::I32),
    }
}

/// Returns whether this machine was booted with systemd. See sd_booted(3).
pub(crate) fn is_running() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

/// Returns the major version of systemd.
pub(crate) fn version() -> Result<u32> {
    let text = Bus::connect()?.property("Version")?;
    let digits = text.split(|c: char| !c.is_ascii_digit()).next();
    digits
        .and_then(|digits| digits.parse().ok())
        .ok_or_else(|| {
            Error::new(format!(
                "systemd reports the version {text}, which does not begin with a number"
            ))
        })
}

/// Changes the limits of a running scope.
pub(crate) fn set(unit: &str, limits: &[Property]) -> Result<()> {
    if limits.is_empty() {
        return Ok(());
    }
    let body = Body::default().text(unit).flag(true).properties(limits);
    Bus::connect()?
        .call("SetUnitProperties", body)?
        .map(|_| ())
        .map_err(|refusal| {
            refusal_error(
                format!("set the limits of {unit} through systemd"),
                &refusal,
            )
        })
}

/// Stops a scope and removes its failed state from systemd. A scope that does not exist is not an
/// error.
pub(crate) fn stop(unit: &str) -> Result<()> {
    let doing = || format!("stop {unit} through systemd");
    let mut bus = Bus::connect()?;
    match bus.call("StopUnit", Body::default().text(unit).text("replace"))? {
        Ok(job) => {
            let result = bus.await_job(&job, &doing())?;
            if result != "done" {
                log::warning(&format!(
                    "{}: systemd finished the job with the result {result}",
                    doing()
                ));
            }
        }
        Err(refusal) if refusal.is("NoSuchUnit") => return Ok(()),
        Err(refusal) => return Err(refusal_error(doing(), &refusal)),
    }
    reset_failed(&mut bus, unit)
}

fn reset_failed(bus: &mut Bus, unit: &str) -> Result<()> {
    match bus.call("ResetFailedUnit", Body::default().text(unit))? {
        Err(refusal) if !refusal.is("NoSuchUnit") => Err(refusal_error(
            format!("reset the failed unit {unit} through systemd"),
            &refusal,
        )),
        _ => Ok(()),
    }
}

/// An idle process that keeps a scope alive. The kernel kills this process when rrun dies.
pub(crate) struct Placeholder {
    pid: u32,
    pidfd: OwnedFd,
}

impl Placeholder {
    fn new() -> Result<Placeholder> {
        let parent = rustix::process::getpid();
        match clone3(0, None).doing(|| "create a placeholder process for the scope (clone3)")? {
            Cloned::Parent { pid, pidfd } => Ok(Placeholder {
                pid: pid.cast_unsigned(),
                pidfd,
            }),
            Cloned::Child => {
                use rustix::process::{Signal, getppid, set_parent_process_death_signal};
                let _ = set_parent_process_death_signal(Some(Signal::KILL));
                while getppid() == Some(parent) {
                    // Only a signal ends this call of poll(2). If the signal does not kill the
                    // process, the process waits again.
                    let _ = rustix::event::poll(&mut [], None);
                }
                exit_now()
            }
        }
    }
}

impl Drop for Placeholder {
    fn drop(&mut self) {
        kill_and_reap(&self.pidfd);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scope_is_inside_its_slice_and_the_slice_is_inside_its_parent_slices() {
        let none = HashMap::new();
        let scope = Scope::from_spec(
            Path::new("kubepods-burstable-pod1.slice:cri:c1"),
            "id",
            &none,
        )
        .unwrap();
        assert_eq!(scope.unit, "cri-c1.scope");
        assert_eq!(
            expand(&scope.slice).unwrap(),
            Path::new("kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice")
        );
        assert_eq!(expand("-.slice").unwrap(), Path::new(""));
        assert_eq!(
            expand("memory-x.slice").unwrap(),
            Path::new("_memory.slice/memory-x.slice")
        );
        assert_eq!(directory_name("_x-1.scope"), "__x-1.scope");
        assert_eq!(directory_name("-x.scope"), "-x.scope");
        for unit in [
            "memory.max-1.scope",
            "_x-1.scope",
            "__x.scope",
            "-x.scope",
            "x.scope",
        ] {
            assert_eq!(unit_name(&directory_name(unit)), unit);
        }
        let own = Scope::from_spec(Path::new(""), "id", &none).unwrap();
        assert_eq!(own.unit, "rrun-id.scope");
        for bad in [
            "/a/b",
            "a:b",
            "a.slice:b:",
            "a:b:c",
            "a--b.slice:p:n",
            "../x.slice:p:n",
            "a.slice:p:../n",
            "a.slice:p:n.slice",
        ] {
            let error = Scope::from_spec(Path::new(bad), "id", &none).unwrap_err();
            assert!(
                error.to_string().starts_with("linux.cgroupsPath"),
                "{error}"
            );
        }
    }

    #[test]
    fn annotations_become_properties_of_the_unit() {
        for (name, value, property) in [
            (
                "CollectMode",
                "'inactive'",
                Some(("CollectMode", BusValue::Text("inactive".to_owned()))),
            ),
            (
                "TimeoutStopUSec",
                "uint64 30000000",
                Some(("TimeoutStopUSec", BusValue::U64(30_000_000))),
            ),
            (
                "TimeoutStopSec",
                "30",
                Some(("TimeoutStopUSec", BusValue::U64(30_000_000))),
            ),
            (
                "After",
                "['a.service', \"b.service\"]",
                Some((
                    "After",
                    BusValue::Texts(vec!["a.service".to_owned(), "b.service".to_owned()]),
                )),
            ),
            (
                "SendSIGKILL",
                "false",
                Some(("SendSIGKILL", BusValue::Bool(false))),
            ),
            ("X", "'a", None),
            ("X", "(1, 2)", None),
            ("XSec", "'soon'", None),
        ] {
            let expected = property.map(|(name, value)| (name.to_owned(), value));
            assert_eq!(parse_annotation(name, value), expected, "{value}");
        }
    }
}
