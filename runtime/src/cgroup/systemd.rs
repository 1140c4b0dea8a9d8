//! The systemd cgroup driver: a container's cgroup is that of a transient scope, a unit which
//! systemd makes, accounts for and shows, and leaves to rrun to divide ("Delegate").
//!
//! systemd makes no scope without a process in it. The container's own is to be made inside
//! (see [`crate::lifecycle::create`]), so a placeholder that does nothing holds the place until then.
//! See systemd.scope(5), systemd.resource-control(5) and org.freedesktop.systemd1(5).

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use crate::cgroup::dbus::{Body, Bus, BusValue, Property, Refusal};
use crate::error::{Context, Error, Result, refuse};
use crate::log;
use crate::sys::child::{exit_now, kill_and_reap};
use crate::sys::clone::{Cloned, clone3};

/// Annotations that begin so name a property of the unit, its value in GVariant's text form.
pub(crate) const ANNOTATION: &str = "org.systemd.property.";

/// A scope as `linux.cgroupsPath` names it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Scope {
    pub(crate) unit: String,
    slice: String,
    properties: Vec<Property>,
}

impl Scope {
    /// From `slice:prefix:name`, which means `prefix-name.scope` in that slice. The slice is
    /// system.slice (user.slice for the user's systemd) if it is not said.
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
                "linux.cgroupsPath: {text} is not of the form slice:prefix:name, which --systemd-cgroup needs"
            ),
        };
        let slice = match slice {
            "" if rustix::process::geteuid().is_root() => "system.slice",
            "" => "user.slice",
            slice => slice,
        };
        expand(slice)?;
        if name.is_empty() || name.contains('/') || prefix.contains('/') {
            refuse!("linux.cgroupsPath: {text} names no unit of systemd");
        }
        if name.ends_with(".slice") {
            refuse!("linux.cgroupsPath: {text} names a slice; a container is made a scope");
        }
        let mut properties = Vec::new();
        for (key, value) in annotations {
            if let Some(name) = key.strip_prefix(ANNOTATION) {
                properties.push(annotated(name, value).ok_or_else(|| {
                    Error::new(format!(
                        "annotations: {key}: {value} is no value that rrun understands"
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

    /// The scope's cgroup, from the root of the hierarchy.
    pub(crate) fn path(&self) -> Result<PathBuf> {
        let mut path = PathBuf::new();
        if !rustix::process::geteuid().is_root() {
            let root = Bus::connect()?.property("ControlGroup")?;
            path.push(root.trim_start_matches('/'));
        }
        path.push(expand(&self.slice)?);
        path.push(&self.unit);
        Ok(path)
    }

    /// Has systemd make the scope, with its limits.
    ///
    /// # Errors
    /// A scope of that name that has processes; what systemd refuses, in its words.
    pub(crate) fn start(&self, id: &str, limits: Vec<Property>) -> Result<Placeholder> {
        let doing = || format!("start {} in {} by systemd", self.unit, self.slice);
        let mut bus = Bus::connect()?;
        let placeholder = Placeholder::new()?;
        let mut properties = vec![
            text("Description", &format!("libcontainer container {id}")),
            text("Slice", &self.slice),
            flag("Delegate", true),
            ("PIDs".to_owned(), BusValue::U32s(vec![placeholder.pid])),
            flag("MemoryAccounting", true),
            flag("CPUAccounting", true),
            flag("IOAccounting", true),
            flag("TasksAccounting", true),
            flag("DefaultDependencies", false),
            // What ends badly is not kept for anyone to look at: it is looked at here.
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
                // One that failed before this, and is still shown.
                Err(refusal) if refusal.is("UnitExists") && !retried => {
                    retried = true;
                    reset_failed(&mut bus, &self.unit)?;
                }
                Err(refusal) => return Err(refused(doing(), &refusal)),
            }
        };
        let result = bus.finished(&job, &doing())?;
        if result != "done" {
            let _ = reset_failed(&mut bus, &self.unit);
            refuse!("{}: the job's result is {result}", doing());
        }
        Ok(placeholder)
    }
}

fn text(name: &str, value: &str) -> Property {
    (name.to_owned(), BusValue::Text(value.to_owned()))
}

fn flag(name: &str, value: bool) -> Property {
    (name.to_owned(), BusValue::Bool(value))
}

fn refused(doing: String, refusal: &Refusal) -> Error {
    let name = refusal.name.rsplit('.').next().unwrap_or_default();
    Error::new(format!("{doing}: {} ({name})", refusal.text))
}

/// Where a slice's cgroup is: `a-b.slice` is in `a.slice`, and `-.slice` is the root.
fn expand(slice: &str) -> Result<PathBuf> {
    let malformed = || Error::new(format!("linux.cgroupsPath: {slice} is no name of a slice"));
    let name = slice.strip_suffix(".slice").ok_or_else(malformed)?;
    let mut path = PathBuf::new();
    if name == "-" {
        return Ok(path);
    }
    if name.contains('/') || name.split('-').any(str::is_empty) {
        return Err(malformed());
    }
    for (end, _) in name.match_indices('-').chain([(name.len(), "")]) {
        path.push(format!("{}.slice", name.get(..end).unwrap_or_default()));
    }
    Ok(path)
}

/// A property from an annotation. Only the plain forms of GVariant's text: they are all that
/// properties of units have. `TimeoutStopSec` is for people; on the bus it counts in µs.
fn annotated(name: &str, value: &str) -> Option<Property> {
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

/// Whether systemd runs this machine; see sd_booted(3).
pub(crate) fn is_running() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

/// systemd's version, its first number.
pub(crate) fn version() -> Result<u32> {
    let text = Bus::connect()?.property("Version")?;
    let digits = text.split(|c: char| !c.is_ascii_digit()).next();
    digits
        .and_then(|digits| digits.parse().ok())
        .ok_or_else(|| Error::new(format!("systemd's version {text} is none")))
}

/// Changes limits of a running scope.
pub(crate) fn set(unit: &str, limits: &[Property]) -> Result<()> {
    if limits.is_empty() {
        return Ok(());
    }
    let body = Body::default().text(unit).flag(true).properties(limits);
    Bus::connect()?
        .call("SetUnitProperties", body)?
        .map(|_| ())
        .map_err(|refusal| refused(format!("set limits of {unit} by systemd"), &refusal))
}

/// Stops a scope, and has systemd forget it. It is no error if there is none.
pub(crate) fn stop(unit: &str) -> Result<()> {
    let doing = || format!("stop {unit} by systemd");
    let mut bus = Bus::connect()?;
    match bus.call("StopUnit", Body::default().text(unit).text("replace"))? {
        Ok(job) => {
            let result = bus.finished(&job, &doing())?;
            if result != "done" {
                log::warning(&format!("{}: the job's result is {result}", doing()));
            }
        }
        Err(refusal) if refusal.is("NoSuchUnit") => return Ok(()),
        Err(refusal) => return Err(refused(doing(), &refusal)),
    }
    reset_failed(&mut bus, unit)
}

fn reset_failed(bus: &mut Bus, unit: &str) -> Result<()> {
    match bus.call("ResetFailedUnit", Body::default().text(unit))? {
        Err(refusal) if !refusal.is("NoSuchUnit") => Err(refused(
            format!("reset {unit} by systemd, which failed"),
            &refusal,
        )),
        _ => Ok(()),
    }
}

/// A process that does nothing but be in a scope, and dies with this program.
pub(crate) struct Placeholder {
    pid: u32,
    pidfd: OwnedFd,
}

impl Placeholder {
    fn new() -> Result<Placeholder> {
        let parent = rustix::process::getpid();
        match clone3(0, None).doing(|| "make a process to hold the scope (clone3)")? {
            Cloned::Parent { pid, pidfd } => Ok(Placeholder {
                pid: pid.cast_unsigned(),
                pidfd,
            }),
            Cloned::Child => {
                use rustix::process::{Signal, getppid, set_parent_process_death_signal};
                let _ = set_parent_process_death_signal(Some(Signal::KILL));
                while getppid() == Some(parent) {
                    // Only a signal ends this, and those that do not kill mean nothing here.
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
    fn a_scope_lies_in_its_slice_and_that_in_those_its_name_tells() {
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
    fn annotations_become_properties() {
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
            assert_eq!(annotated(name, value), expected, "{value}");
        }
    }
}
