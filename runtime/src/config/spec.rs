//! The parts of config.json whose types are rrun's own.
//!
//! The others are `oci-spec`'s. These are not, because to read a process its types bring a
//! regular expression engine along, and types for every other platform: together half of
//! the program. What is not supported is only seen to be there, and refused by name.
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
pub const OCI_VERSION: &str = "1.3.0";

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Spec {
    #[serde(default)]
    pub oci_version: String,
    pub root: Option<Root>,
    pub mounts: Option<Vec<Mount>>,
    pub process: Option<Process>,
    pub hostname: Option<String>,
    pub domainname: Option<String>,
    pub hooks: Option<Hooks>,
    pub annotations: Option<HashMap<String, String>>,
    pub linux: Option<Linux>,
    pub vm: Option<IgnoredAny>,
}

#[derive(Deserialize)]
pub struct Root {
    pub path: PathBuf,
    pub readonly: Option<bool>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Linux {
    pub namespaces: Option<Vec<LinuxNamespace>>,
    pub uid_mappings: Option<Vec<LinuxIdMapping>>,
    pub gid_mappings: Option<Vec<LinuxIdMapping>>,
    pub time_offsets: Option<HashMap<String, TimeOffset>>,
    pub devices: Option<Vec<LinuxDevice>>,
    pub cgroups_path: Option<PathBuf>,
    pub resources: Option<LinuxResources>,
    pub rootfs_propagation: Option<String>,
    pub masked_paths: Option<Vec<String>>,
    pub readonly_paths: Option<Vec<String>>,
    pub sysctl: Option<HashMap<String, String>>,
    pub mount_label: Option<String>,
    pub seccomp: Option<SeccompProfile>,
    pub intel_rdt: Option<IntelRdt>,
    pub memory_policy: Option<MemoryPolicy>,
    pub personality: Option<Personality>,
    pub net_devices: Option<BTreeMap<String, NetDevice>>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct IntelRdt {
    #[serde(rename = "closID")]
    pub clos_id: String,
    pub schemata: Option<Vec<String>>,
    pub l3_cache_schema: String,
    pub mem_bw_schema: String,
    pub enable_monitoring: bool,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct MemoryPolicy {
    pub mode: String,
    /// As in cpuset(7), "List format".
    #[serde(default)]
    pub nodes: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flags: Option<Vec<String>>,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Personality {
    pub domain: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flags: Option<Vec<String>>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct NetDevice {
    /// The name in the container, if it is another.
    #[serde(default)]
    pub name: String,
}

#[derive(Deserialize)]
pub struct TimeOffset {
    pub secs: Option<i64>,
    pub nanosecs: Option<u32>,
}

#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Process {
    pub terminal: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub console_size: Option<ConsoleSize>,
    pub user: User,
    pub args: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub env: Option<Vec<String>>,
    pub cwd: PathBuf,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub capabilities: Option<Capabilities>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rlimits: Option<Vec<Rlimit>>,
    pub no_new_privileges: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub oom_score_adj: Option<i32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub apparmor_profile: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub selinux_label: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub io_priority: Option<IoPriority>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scheduler: Option<Scheduler>,
    #[serde(skip_serializing_if = "Option::is_none", rename = "execCPUAffinity")]
    pub exec_cpu_affinity: Option<CpuAffinity>,
}

/// Names and numbers of sched_setattr(2).
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Scheduler {
    /// `SCHED_OTHER` and the like.
    pub policy: String,
    pub nice: i32,
    pub priority: i32,
    pub flags: Option<Vec<String>>,
    /// Nanoseconds, as the two that follow.
    pub runtime: u64,
    pub deadline: u64,
    pub period: u64,
}

#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct IoPriority {
    /// `IOPRIO_CLASS_BE` and the like.
    pub class: String,
    pub priority: i32,
}

/// CPUs of a process that enters by `exec`, each as in cpuset(7), "List format".
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct CpuAffinity {
    pub initial: String,
    #[serde(rename = "final")]
    pub last: String,
}

#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub struct ConsoleSize {
    pub height: u64,
    pub width: u64,
}

#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub umask: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub additional_gids: Option<Vec<u32>>,
}

/// Names of capabilities, as `CAP_CHOWN`.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Capabilities {
    pub bounding: Option<Vec<String>>,
    pub effective: Option<Vec<String>>,
    pub permitted: Option<Vec<String>>,
    pub inheritable: Option<Vec<String>>,
    pub ambient: Option<Vec<String>>,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Rlimit {
    /// `RLIMIT_NOFILE` and the like.
    #[serde(rename = "type")]
    pub typ: String,
    pub soft: u64,
    pub hard: u64,
}

/// What `rrun state` prints and hooks get, in runc's order of fields.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Shown<'a> {
    pub oci_version: &'a str,
    pub id: &'a str,
    pub pid: i32,
    pub status: &'a str,
    pub bundle: &'a Path,
    pub rootfs: &'a Path,
    pub created: &'a str,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: &'a BTreeMap<String, String>,
    pub owner: &'a str,
}

/// `linux.seccomp`.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SeccompProfile {
    #[serde(default)]
    pub default_action: String,
    pub default_errno_ret: Option<u32>,
    pub architectures: Option<Vec<String>>,
    pub flags: Option<Vec<String>>,
    pub listener_path: Option<String>,
    pub listener_metadata: Option<String>,
    pub syscalls: Option<Vec<SeccompSyscalls>>,
}

/// An entry of `linux.seccomp.syscalls`.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SeccompSyscalls {
    #[serde(default)]
    pub names: Vec<SeccompCallName>,
    #[serde(default)]
    pub action: String,
    pub errno_ret: Option<u32>,
    pub args: Option<Vec<SeccompArg>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SeccompArg {
    pub index: u32,
    pub value: u64,
    #[serde(default)]
    pub value_two: u64,
    #[serde(default)]
    pub op: String,
}

/// Looked up while it is read: a profile has hundreds of them.
pub enum SeccompCallName {
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
