//! The parts of config.json for which rrun defines its own types.
//!
//! The other parts of config.json have types from the crate `oci-spec`. The type for a process in
//! `oci-spec` would add a regular expression engine and the types for all other platforms to rrun's
//! executable. These additions would make up half of the executable. rrun also defines types for
//! fields that it does not support. With these types, rrun can refuse the fields by name.
//!
//! rrun ignores properties of config.json that it does not recognise, as the specification requires
//! (config.md, "Extensibility").

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use oci_spec::runtime::{
    Hooks, LinuxDevice, LinuxIdMapping, LinuxNamespace, LinuxResources, Mount,
};
use serde::de::{IgnoredAny, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use crate::seccomp::table::Syscall;

/// The version of the runtime specification that rrun implements.
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
    /// The NUMA nodes, in the format of cpuset(7), "List format".
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
    /// The name of the network device in the container, if this name differs from the name on the
    /// host.
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

/// The field `process.scheduler`, which contains the parameters for sched_setattr(2).
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub(crate) struct Scheduler {
    /// The name of the scheduling policy, such as `SCHED_OTHER`.
    pub(crate) policy: String,
    pub(crate) nice: i32,
    pub(crate) priority: i32,
    pub(crate) flags: Option<Vec<String>>,
    /// The CPU time of the process in each period (`sched_runtime` of sched_setattr(2)), in
    /// nanoseconds. `deadline` and `period` are also in nanoseconds.
    pub(crate) runtime: u64,
    pub(crate) deadline: u64,
    pub(crate) period: u64,
}

#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub(crate) struct IoPriority {
    /// The name of the I/O class, such as `IOPRIO_CLASS_BE`.
    pub(crate) class: String,
    pub(crate) priority: i32,
}

/// The field `process.execCPUAffinity`, which contains the CPUs for a process that `exec` creates.
/// `initial` and `final` have the format of cpuset(7), "List format".
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

/// The field `process.capabilities`, which contains lists of capability names such as `CAP_CHOWN`.
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
    /// The name of the resource limit, such as `RLIMIT_NOFILE`.
    #[serde(rename = "type")]
    pub(crate) typ: String,
    pub(crate) soft: u64,
    pub(crate) hard: u64,
}

/// The container's state, as `rrun state` prints it and as hooks receive it. The fields are in the
/// same order as in runc's output.
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

/// The field `linux.seccomp`.
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

/// The name of a system call. rrun looks up each name during the parsing of the profile. So rrun
/// need not store the hundreds of names of a profile.
pub(crate) enum SeccompCallName {
    Known(Syscall),
    /// A system call that exists only on other architectures, or that is newer than rrun.
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
