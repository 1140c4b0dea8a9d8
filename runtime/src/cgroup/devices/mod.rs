//! `linux.resources.devices`: the rules for opening and creating device nodes. A small BPF program
//! (BPF_PROG_TYPE_CGROUP_DEVICE) enforces the rules. The kernel runs the program at every attempt
//! to open or create a device node.
//!
//! The rules have the semantics of cgroup v1: everything is denied at first, and each rule
//! overrides the rules before it. So the program checks the rules from the last to the first. The
//! program obeys the first rule that applies to the device and to the requested rights. An attempt
//! can need several rights at once, for example to open a device for reading and writing. Such an
//! attempt is allowed only if a single rule allows all these rights.

use std::collections::{BTreeMap, BTreeSet};

use oci_spec::runtime::LinuxDeviceCgroup;
use rustix::io::Errno;

mod bpf;
mod program;
mod rule;

use super::directory::Directory;
use crate::cgroup::dbus::{BusValue, Property};
use crate::error::{Context, Result, refuse};
#[cfg(test)]
use rule::parsed;
use rule::{BLOCK, DEFAULTS, DeviceRule, MKNOD, READ, WRITE, rules};

pub(crate) fn validate(spec: &[LinuxDeviceCgroup]) -> Result<()> {
    rules(spec).map(|_| ())
}

/// Returns whether the rules allow every access. The cgroup then does not need a program.
fn allows_everything(rules: &[DeviceRule]) -> bool {
    for rule in rules.iter().rev() {
        if !rule.allow {
            return false;
        }
        if rule.kind.is_none() {
            return true;
        }
    }
    false
}

/// Converts the rules to systemd's properties DevicePolicy and DeviceAllow. These properties cannot
/// express an exception to an allow rule. So they can allow more than the BPF program, but never
/// less.
pub(crate) fn properties(spec: &[LinuxDeviceCgroup]) -> Result<[Property; 2]> {
    let mut rules = rules(spec)?;
    rules.extend(DEFAULTS);
    let (policy, allowed) = allowed(&rules);
    let needs_names = |rule: &DeviceRule| rule.major.is_some() && rule.minor.is_none();
    let drivers = if allowed.iter().any(needs_names) {
        std::fs::read_to_string("/proc/devices").doing(|| "read /proc/devices")?
    } else {
        String::new()
    };
    let entries = allowed
        .iter()
        .filter_map(|rule| Some((rule.node(&drivers)?, rule.letters())))
        .collect();
    Ok([
        ("DevicePolicy".to_owned(), BusValue::Text(policy.to_owned())),
        ("DeviceAllow".to_owned(), BusValue::Pairs(entries)),
    ])
}

/// Returns the value of DevicePolicy, and the allow rules for DeviceAllow.
fn allowed(rules: &[DeviceRule]) -> (&'static str, Vec<DeviceRule>) {
    // The last rule for all devices overrides all earlier rules.
    let all = rules.iter().rposition(|rule| rule.kind.is_none());
    if all
        .and_then(|at| rules.get(at))
        .is_some_and(|rule| rule.allow)
    {
        return ("auto", Vec::new());
    }
    let rules = rules.get(all.map_or(0, |at| at + 1)..).unwrap_or_default();
    // A deny rule removes each earlier allow rule for the same devices that allows no further
    // rights. This loop visits later rules first, and collects the deny rules for each device.
    let mut denied: BTreeMap<_, BTreeSet<i32>> = BTreeMap::new();
    let mut allowed = Vec::new();
    for rule in rules.iter().rev() {
        let denied = denied
            .entry((rule.kind, rule.major, rule.minor))
            .or_default();
        if !rule.allow {
            denied.insert(rule.access);
        } else if !denied.iter().any(|access| rule.access & !access == 0) {
            allowed.push(*rule);
        }
    }
    allowed.reverse();
    ("strict", allowed)
}

impl DeviceRule {
    /// Returns the device in the syntax of systemd's DeviceAllow, or `None` if no driver has the
    /// rule's major number.
    fn node(&self, drivers: &str) -> Option<String> {
        let kind = if self.kind == Some(BLOCK) {
            "block"
        } else {
            "char"
        };
        Some(match (self.major, self.minor) {
            (Some(major), Some(minor)) => format!("/dev/{kind}/{major}:{minor}"),
            (Some(major), None) => format!("{kind}-{}", driver(drivers, kind, major)?),
            (None, _) => format!("{kind}-*"),
        })
    }

    fn letters(&self) -> String {
        [(READ, 'r'), (WRITE, 'w'), (MKNOD, 'm')]
            .into_iter()
            .filter(|(right, _)| self.access & right != 0)
            .map(|(_, letter)| letter)
            .collect()
    }
}

/// Returns the name of the driver that has the major number `major`. `drivers` is the content of
/// /proc/devices.
fn driver<'a>(drivers: &'a str, kind: &str, major: i32) -> Option<&'a str> {
    let heading = match kind {
        "block" => "Block devices:",
        _ => "Character devices:",
    };
    drivers
        .lines()
        .skip_while(|line| *line != heading)
        .skip(1)
        .take_while(|line| !line.is_empty())
        .find_map(|line| {
            let (number, name) = line.trim().split_once(' ')?;
            (number.parse() == Ok(major)).then_some(name)
        })
}

/// Enforces the rules on a cgroup and all cgroups below it. If `replace` is true, the new rules
/// replace the rules that rrun applied earlier.
///
/// # Errors
/// Fails if the kernel refuses the program.
pub(crate) fn apply(cgroup: &Directory, spec: &[LinuxDeviceCgroup], replace: bool) -> Result<()> {
    let mut rules = rules(spec)?;
    rules.extend(DEFAULTS);
    let doing = || {
        format!(
            "enforce linux.resources.devices on cgroup {} (BPF)",
            cgroup.path().display()
        )
    };
    let old = if replace {
        bpf::attached(cgroup).doing(doing)?
    } else {
        None
    };
    if allows_everything(&rules) {
        return match old {
            Some(old) => bpf::detach(cgroup, &old).doing(doing),
            None => Ok(()),
        };
    }
    let program = match bpf::load(&program::compile(&rules)?) {
        // The errors E2BIG and EFAULT mean that the kernel's verifier gave up.
        Err(Errno::TOOBIG | Errno::FAULT) => refuse!(
            "{}: the program for the {} rules is too complex for the kernel",
            doing(),
            rules.len()
        ),
        program => program.doing(doing)?,
    };
    bpf::attach(cgroup, &program, old.as_ref()).doing(doing)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_rules_become_systemd_properties() {
        let device_properties = |json: &str| {
            let [(_, policy), (_, BusValue::Pairs(allowed))] =
                properties(&serde_json::from_str::<Vec<_>>(json).unwrap()).unwrap()
            else {
                panic!("DeviceAllow is not a list of pairs");
            };
            (policy, allowed)
        };
        let entry = |node: &str, access: &str| (node.to_owned(), access.to_owned());
        let (policy, allowed) = device_properties(
            r#"[{"allow":true,"type":"c","major":10,"minor":1,"access":"rw"},
                {"allow":false},
                {"allow":true,"type":"b","major":8,"minor":0,"access":"r"}]"#,
        );
        assert_eq!(policy, BusValue::Text("strict".to_owned()));
        assert_eq!(
            allowed.get(..3).unwrap(),
            [
                entry("/dev/block/8:0", "r"),
                entry("char-*", "m"),
                entry("block-*", "m")
            ]
        );
        assert!(allowed.contains(&entry("/dev/char/1:3", "rwm")));
        assert_eq!(
            device_properties(r#"[{"allow":true,"type":"a"}]"#).0,
            BusValue::Text("auto".to_owned())
        );
        let drivers = "Character devices:\n  1 mem\n136 pts\n\nBlock devices:\n  1 ramdisk\n";
        assert_eq!(driver(drivers, "char", 136), Some("pts"));
        assert_eq!(driver(drivers, "block", 1), Some("ramdisk"));
        assert_eq!(driver(drivers, "block", 136), None);
    }

    #[test]
    fn the_last_rule_for_all_devices_decides_whether_a_program_is_needed() {
        assert!(allows_everything(&parsed(r#"[{"allow":true,"type":"a"}]"#)));
        let mut rules = parsed(r#"[{"allow":false,"access":"rwm"}]"#);
        rules.extend(DEFAULTS);
        assert!(!allows_everything(&rules));
        assert!(!allows_everything(&[]));
    }
}
