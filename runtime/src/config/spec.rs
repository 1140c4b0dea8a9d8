//! The parts of config.json whose types are rrun's own.
//!
//! The others are `oci-spec`'s. These are not, because to read a process its types bring a
//! regular expression engine along, and types for every other platform: together half of
//! the program. Unsupported fields are parsed only so that they can be refused by name.
//!
//! Unknown properties are passed over, as the specification wants ("Extensibility").

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use oci_spec::runtime::{
    Hooks, LinuxDevice, LinuxIdMapping, LinuxNamespace, LinuxResources, Mount,
};
use serde::de::{IgnoredAny, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use crate::seccomp::table::Syscall;

/// The version of the runtime specification that `state` and `spec` speak.
pub(crate) const OCI_VERSION: &str = "1.3.0";

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Spec {
    #[serde(default)]
    pub(crate) oci_version: String,
    pub(crate) root: Option<Root>,
    pub(crate) mounts: Option<Vec<Mount>>,
    pub(crate) process: Option<ProcessSpec>,
    pub(crate) hostname: Option<String>,
    pub(crate) domainname: Option<String>,
    pub(crate) hooks: Option<Hooks>,
    pub(crate) annotations: Option<HashMap<String, String>>,
    pub(crate) linux: Option<Linux>,
    pub(crate) vm: Option<IgnoredAny>,
}

#[derive(Deserialize)]
pub(crate) struct Root {
    pub(crate) path: PathBuf,
    pub(crate) readonly: Option<bool>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Linux {
    pub(crate) namespaces: Option<Vec<LinuxNamespace>>,
    pub(crate) uid_mappings: Option<Vec<LinuxIdMapping>>,
    pub(crate) gid_mappings: Option<Vec<LinuxIdMapping>>,
    pub(crate) time_offsets: Option<HashMap<String, TimeOffset>>,
    pub(crate) devices: Option<Vec<LinuxDevice>>,
    pub(crate) cgroups_path: Option<PathBuf>,
    pub(crate) resources: Option<LinuxResources>,
    pub(crate) rootfs_propagation: Option<String>,
    pub(crate) masked_paths: Option<Vec<String>>,
    pub(crate) readonly_paths: Option<Vec<String>>,
    pub(crate) sysctl: Option<HashMap<String, String>>,
    pub(crate) mount_label: Option<String>,
    pub(crate) seccomp: Option<SeccompProfile>,
    pub(crate) intel_rdt: Option<IntelRdt>,
    pub(crate) memory_policy: Option<MemoryPolicySpec>,
    pub(crate) personality: Option<PersonalitySpec>,
    pub(crate) net_devices: Option<BTreeMap<String, NetDeviceSpec>>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct IntelRdt {
    #[serde(rename = "closID")]
    pub(crate) clos_id: String,
    pub(crate) schemata: Option<Vec<String>>,
    pub(crate) l3_cache_schema: String,
    pub(crate) mem_bw_schema: String,
    pub(crate) enable_monitoring: bool,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct MemoryPolicySpec {
    pub(crate) mode: String,
    /// As in cpuset(7), "List format".
    #[serde(default)]
    pub(crate) nodes: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) flags: Option<Vec<String>>,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct PersonalitySpec {
    pub(crate) domain: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) flags: Option<Vec<String>>,
}

#[derive(Clone, Debug, Deserialize)]
pub(crate) struct NetDeviceSpec {
    /// The name in the container, if it is another.
    #[serde(default)]
    pub(crate) name: String,
}

#[derive(Deserialize)]
pub(crate) struct TimeOffset {
    pub(crate) secs: Option<i64>,
    pub(crate) nanosecs: Option<u32>,
}

#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct ProcessSpec {
    pub(crate) terminal: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) console_size: Option<ConsoleSize>,
    pub(crate) user: User,
    pub(crate) args: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) env: Option<Vec<String>>,
    pub(crate) cwd: PathBuf,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) capabilities: Option<Capabilities>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) rlimits: Option<Vec<RlimitSpec>>,
    pub(crate) no_new_privileges: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) oom_score_adj: Option<i32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) apparmor_profile: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) selinux_label: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) io_priority: Option<IoPriority>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) scheduler: Option<Scheduler>,
    #[serde(skip_serializing_if = "Option::is_none", rename = "execCPUAffinity")]
    pub(crate) exec_cpu_affinity: Option<CpuAffinity>,
}

/// Names and numbers of sched_setattr(2).
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub(crate) struct Scheduler {
    /// `SCHED_OTHER` and the like.
    pub(crate) policy: String,
    pub(crate) nice: i32,
    pub(crate) priority: i32,
    pub(crate) flags: Option<Vec<String>>,
    /// Nanoseconds, as the two that follow.
    pub(crate) runtime: u64,
    pub(crate) deadline: u64,
    pub(crate) period: u64,
}

#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub(crate) struct IoPriority {
    /// `IOPRIO_CLASS_BE` and the like.
    pub(crate) class: String,
    pub(crate) priority: i32,
}

/// CPUs of a process that enters by `exec`, each as in cpuset(7), "List format".
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub(crate) struct CpuAffinity {
    pub(crate) initial: String,
    #[serde(rename = "final")]
    pub(crate) last: String,
}

#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub(crate) struct ConsoleSize {
    pub(crate) height: u64,
    pub(crate) width: u64,
}

#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct User {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) umask: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) additional_gids: Option<Vec<u32>>,
}

/// Names of capabilities, as `CAP_CHOWN`.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub(crate) struct Capabilities {
    pub(crate) bounding: Option<Vec<String>>,
    pub(crate) effective: Option<Vec<String>>,
    pub(crate) permitted: Option<Vec<String>>,
    pub(crate) inheritable: Option<Vec<String>>,
    pub(crate) ambient: Option<Vec<String>>,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct RlimitSpec {
    /// `RLIMIT_NOFILE` and the like.
    #[serde(rename = "type")]
    pub(crate) typ: String,
    pub(crate) soft: u64,
    pub(crate) hard: u64,
}

/// What `rrun state` prints and hooks get, in runc's order of fields.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct OciState<'a> {
    pub(crate) oci_version: &'a str,
    pub(crate) id: &'a str,
    pub(crate) pid: i32,
    pub(crate) status: &'a str,
    pub(crate) bundle: &'a Path,
    pub(crate) rootfs: &'a Path,
    pub(crate) created: &'a str,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) annotations: &'a BTreeMap<String, String>,
    pub(crate) owner: &'a str,
}

/// `linux.seccomp`.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct SeccompProfile {
    #[serde(default)]
    pub(crate) default_action: String,
    pub(crate) default_errno_ret: Option<u32>,
    pub(crate) architectures: Option<Vec<String>>,
    pub(crate) flags: Option<Vec<String>>,
    pub(crate) listener_path: Option<String>,
    pub(crate) listener_metadata: Option<String>,
    pub(crate) syscalls: Option<Vec<SeccompSyscalls>>,
}

/// An entry of `linux.seccomp.syscalls`.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct SeccompSyscalls {
    #[serde(default)]
    pub(crate) names: Vec<SeccompCallName>,
    #[serde(default)]
    pub(crate) action: String,
    pub(crate) errno_ret: Option<u32>,
    pub(crate) args: Option<Vec<SeccompArg>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct SeccompArg {
    pub(crate) index: u32,
    pub(crate) value: u64,
    #[serde(default)]
    pub(crate) value_two: u64,
    #[serde(default)]
    pub(crate) op: String,
}

/// Looked up while it is read: a profile has hundreds of them.
pub(crate) enum SeccompCallName {
    Known(Syscall),
    /// Of another architecture, or newer than rrun.
    Unknown(String),
}

impl<'de> Deserialize<'de> for SeccompCallName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ByName;
        impl Visitor<'_> for ByName {
            type Value = SeccompCallName;
            fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                formatter.write_str("the name of a system call")
            }
            fn visit_str<E>(self, name: &str) -> Result<SeccompCallName, E> {
                Ok(Syscall::by_name(name).map_or_else(
                    || SeccompCallName::Unknown(name.to_owned()),
                    SeccompCallName::Known,
                ))
            }
        }
        deserializer.deserialize_str(ByName)
    }
}
