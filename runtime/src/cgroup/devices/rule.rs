//! The parsed and checked rules of `linux.resources.devices`.

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use crate::error::{Error, Result, refuse};

// linux/bpf.h, struct bpf_cgroup_dev_ctx
pub(super) const BLOCK: i32 = 1;
pub(super) const CHAR: i32 = 2;
pub(super) const MKNOD: i32 = 1;
pub(super) const READ: i32 = 2;
pub(super) const WRITE: i32 = 4;
pub(super) const ALL: i32 = MKNOD | READ | WRITE;

/// A device rule. If a field is `None`, the rule concerns devices with every value of that field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DeviceRule {
    pub(super) allow: bool,
    pub(super) kind: Option<i32>,
    pub(super) major: Option<i32>,
    pub(super) minor: Option<i32>,
    pub(super) access: i32,
}

const fn allow(kind: i32, major: Option<i32>, minor: Option<i32>, access: i32) -> DeviceRule {
    DeviceRule {
        allow: true,
        kind: Some(kind),
        major,
        minor,
        access,
    }
}

/// The rules that apply to every container, as with runc. These rules allow a container to create
/// any device node (but not to open it), and to use the default devices and terminals. rrun appends
/// these rules to the rules of the configuration.
pub(super) const DEFAULTS: [DeviceRule; 10] = [
    allow(CHAR, None, None, MKNOD),
    allow(BLOCK, None, None, MKNOD),
    allow(CHAR, Some(1), Some(3), ALL),
    allow(CHAR, Some(1), Some(5), ALL),
    allow(CHAR, Some(1), Some(7), ALL),
    allow(CHAR, Some(1), Some(8), ALL),
    allow(CHAR, Some(1), Some(9), ALL),
    allow(CHAR, Some(5), Some(0), ALL),
    allow(CHAR, Some(5), Some(2), ALL),
    allow(CHAR, Some(136), None, ALL),
];

pub(super) fn rules(spec: &[LinuxDeviceCgroup]) -> Result<Vec<DeviceRule>> {
    let number = |index: usize, field: &str, value: Option<i64>| match value {
        None | Some(-1) => Ok(None),
        Some(value) => i32::try_from(value)
            .ok()
            .filter(|value| *value >= 0)
            .map(Some)
            .ok_or_else(|| {
                Error::new(format!(
                    "linux.resources.devices[{index}].{field}: {value} is not a device number"
                ))
            }),
    };
    spec.iter()
        .enumerate()
        .map(|(index, rule)| {
            let kind = match rule.typ() {
                None | Some(LinuxDeviceType::A) => None,
                Some(LinuxDeviceType::B) => Some(BLOCK),
                Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(CHAR),
                Some(LinuxDeviceType::P) => {
                    refuse!("linux.resources.devices[{index}].type: type p (a FIFO) has no device number")
                }
            };
            let mut access = 0;
            for letter in rule.access().as_deref().unwrap_or("").chars() {
                access |= match letter {
                    'm' => MKNOD,
                    'r' => READ,
                    'w' => WRITE,
                    _ => refuse!(
                        "linux.resources.devices[{index}].access: {letter} is not one of r, w, m"
                    ),
                };
            }
            // As in cgroup v1, a rule for all types applies to all devices and all rights, and the
            // fields `major`, `minor` and `access` are ignored.
            let every = kind.is_none();
            Ok(DeviceRule {
                allow: rule.allow(),
                kind,
                major: if every {
                    None
                } else {
                    number(index, "major", rule.major())?
                },
                minor: if every {
                    None
                } else {
                    number(index, "minor", rule.minor())?
                },
                access: if every || access == 0 { ALL } else { access },
            })
        })
        .collect()
}

#[cfg(test)]
pub(super) fn parsed(json: &str) -> Vec<DeviceRule> {
    rules(&serde_json::from_str::<Vec<LinuxDeviceCgroup>>(json).unwrap()).unwrap()
}
