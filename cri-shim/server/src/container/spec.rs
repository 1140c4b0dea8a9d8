//! Builds a container's config.json from the CRI request. The OCI runtime specification defines the
//! format of config.json.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use oci_spec::runtime::{
    Hooks, Linux, LinuxNamespace, LinuxNamespaceType, LinuxResources, Mount, Process, Root,
    User as ProcessUser,
};
use rrun_proto::v1::{ContainerConfig, LinuxContainerSecurityContext, NamespaceMode};
use serde::Serialize;

use super::capabilities::CapabilitySets;
use super::cdi::IntelRdt;
use super::devices::Devices;
use super::mounts;
use super::seccomp::SeccompFilter;
use super::user::User;
use crate::config::Rlimit;
use crate::sandbox::users::Mappings;
use crate::selinux::{Labels, label};
use rrun_calls::error::{During, Error, Result};
use rrun_images::ImageConfig;

const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The paths that are hidden from containers, as in Docker and containerd.
const MASKED: [&str; 12] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];

/// The directory that contains a directory for each CPU.
const CPUS: &str = "/sys/devices/system/cpu";

/// The paths in `MASKED`, and the directory `thermal_throttle` of each CPU that has one. A program
/// that reads the counters of thermal interrupts can draw conclusions about the data that other
/// programs process (GHSA-6fw5-f8r9-fgfm).
fn default_masked() -> Result<&'static [String]> {
    static ALL: OnceLock<Vec<String>> = OnceLock::new();
    if let Some(all) = ALL.get() {
        return Ok(all);
    }
    let mut all: Vec<String> = MASKED.map(str::to_owned).into();
    let counters = thermal_counters(Path::new(CPUS));
    all.extend(counters.during(|| format!("find the thermal counters in {CPUS}"))?);
    Ok(ALL.get_or_init(|| all))
}

/// The paths that are read-only in containers.
const READONLY: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

/// The maximum length of a path in bytes, without the terminating zero byte (PATH_MAX).
const MAX_PATH_BYTES: usize = 4095;

/// The namespaces that a container joins. `None` instead of a path means that the container uses
/// the node's namespace.
#[derive(Debug, Default)]
pub(crate) struct Namespaces {
    pub network: Option<PathBuf>,
    pub ipc: Option<PathBuf>,
    pub uts: Option<PathBuf>,
    pub pid: PidNamespace,
    /// The path and the id mappings of the pod's user namespace, or `None` if the pod uses the
    /// node's user namespace.
    pub users: Option<(PathBuf, Mappings)>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum PidNamespace {
    #[default]
    New,
    Node,
    /// The PID namespace of the process with this id.
    Join(i32),
}

/// The inputs from which [`spec`] builds config.json.
pub(crate) struct SpecInputs<'a> {
    pub config: &'a ContainerConfig,
    pub image: &'a ImageConfig,
    pub user: &'a User,
    pub hostname: &'a str,
    pub rootfs: &'a Path,
    pub cgroup: &'a str,
    pub namespaces: Namespaces,
    pub capabilities: CapabilitySets,
    pub devices: Devices,
    pub mounts: Vec<Mount>,
    pub root_propagation: Option<&'static str>,
    /// The value of `linux.resources` without devices.
    pub resources: LinuxResources,
    pub oom_score_adj: i64,
    pub seccomp: Option<SeccompFilter>,
    pub rlimits: &'a [Rlimit],
    /// The annotations that match the handler's patterns.
    pub annotations: BTreeMap<String, String>,
    pub apparmor: Option<String>,
    pub selinux: Option<Labels>,
}

/// The contents of config.json. Most fields have the types of the crate `oci_spec`. The fields
/// `seccomp` and `intelRdt` have other types, because the types of `oci_spec` would change their
/// values. The capabilities and annotations have other types, because the types of `oci_spec` would
/// write their entries in random order.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(Default))]
#[serde(rename_all = "camelCase")]
pub(crate) struct ConfigJson {
    oci_version: &'static str,
    root: Root,
    pub process: ProcessSection,
    pub mounts: Vec<Mount>,
    pub linux: LinuxSection,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hooks: Option<Hooks>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    annotations: BTreeMap<String, String>,
}

/// The section `process`.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(Default))]
pub(crate) struct ProcessSection {
    #[serde(flatten)]
    pub typed: Process,
    /// Replaces the field `capabilities` of `Process`, whose hash sets would be written in a
    /// different order each time.
    capabilities: CapabilitySets,
}

/// The section `linux`.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(Default))]
#[serde(rename_all = "camelCase")]
pub(crate) struct LinuxSection {
    #[serde(flatten)]
    pub typed: Linux,
    /// Replaces the field `seccomp` of `Linux`. The type of `Linux.seccomp` would drop the
    /// fields of a profile file that this type does not support.
    #[serde(skip_serializing_if = "Option::is_none")]
    seccomp: Option<SeccompFilter>,
    /// Replaces the field `intel_rdt` of `Linux`, whose type misspells the names enableCMT and
    /// enableMBM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub intel_rdt: Option<IntelRdt>,
}

impl ConfigJson {
    /// Returns the text of config.json.
    pub(crate) fn text(&self) -> Result<String> {
        serde_json::to_string(self)
            .map_err(|error| Error::internal(format!("serialize config.json: {error}")))
    }
}

/// Refuses a configuration that this server does not support; the error names the field.
pub(crate) fn check(config: &ContainerConfig) -> Result<()> {
    if config.windows.is_some() {
        return Err(Error::invalid(
            "the container has a configuration for Windows (windows)",
        ));
    }
    for env in &config.envs {
        let key = &env.key;
        if key.is_empty() || key.contains(['=', '\0']) || env.value.contains(&0) {
            return Err(Error::invalid(format!(
                "the environment variable {key:?} has an empty name, a \"=\" in its name or a zero byte"
            )));
        }
    }
    label::check(context(config).selinux_options.as_ref())?;
    for mount in &config.mounts {
        super::image_volume::check(mount)?;
    }
    Ok(())
}

/// Returns the container's security context, or the default if the request contains no security
/// context.
pub(crate) fn context(config: &ContainerConfig) -> LinuxContainerSecurityContext {
    let linux = config.linux.as_ref();
    linux
        .and_then(|linux| linux.security_context.clone())
        .unwrap_or_default()
}

/// Returns the container's PID namespace mode and the id of the target container.
pub(crate) fn pid_mode(config: &ContainerConfig) -> (NamespaceMode, String) {
    let options = context(config).namespace_options.unwrap_or_default();
    (options.pid(), options.target_id)
}

/// Returns the arguments of the container's process: the command and the arguments in the request
/// replace those of the image.
fn arguments(config: &ContainerConfig, image: &ImageConfig) -> Result<Vec<String>> {
    let mut all = config.command.clone();
    if all.is_empty() {
        all.clone_from(&image.entrypoint);
        if config.args.is_empty() {
            all.extend_from_slice(&image.cmd);
        }
    }
    all.extend_from_slice(&config.args);
    if all.is_empty() {
        return Err(Error::invalid(
            "neither the request nor the image specifies a command",
        ));
    }
    Ok(all)
}

/// Returns the environment, each entry as `NAME=value`. A variable in the request replaces the
/// image's variable with the same name.
fn environment(inputs: &SpecInputs<'_>) -> Result<Vec<String>> {
    let mut all: Vec<String> = Vec::new();
    // The index in `all` of each variable.
    let mut places = HashMap::new();
    let mut set = |pair: String| match places.entry(name_of(&pair).to_owned()) {
        Entry::Occupied(place) => {
            if let Some(existing) = all.get_mut(*place.get()) {
                *existing = pair;
            }
        }
        Entry::Vacant(place) => {
            place.insert(all.len());
            all.push(pair);
        }
    };
    set(DEFAULT_PATH.to_owned());
    set(format!("HOSTNAME={}", inputs.hostname));
    if inputs.config.tty {
        set("TERM=xterm".to_owned());
    }
    inputs.image.env.iter().cloned().for_each(&mut set);
    for pair in &inputs.config.envs {
        let value = std::str::from_utf8(&pair.value).map_err(|_| {
            let key = &pair.key;
            Error::invalid(format!(
                "the value of the environment variable {key} is not UTF-8, so config.json can't contain it"
            ))
        })?;
        set(format!("{}={value}", pair.key));
    }
    Ok(all)
}

/// Returns the name of the variable in the entry `NAME=value` of an environment.
pub(crate) fn name_of(pair: &str) -> &str {
    pair.split('=').next().unwrap_or_default()
}

/// Returns the working directory of the container's process, which is an absolute path. An image or
/// a pod spec can contain a longer path than Linux accepts. The creation of its directories would
/// take hours.
pub(crate) fn working_dir<'a>(
    config: &'a ContainerConfig,
    image: &'a ImageConfig,
) -> Result<&'a str> {
    let dir = [&config.working_dir, &image.working_dir]
        .into_iter()
        .find(|dir| !dir.is_empty());
    match dir {
        None => Ok("/"),
        Some(dir) if dir.len() > MAX_PATH_BYTES => Err(Error::invalid(format!(
            "the path of the working directory has {} bytes, but Linux allows at most {MAX_PATH_BYTES} bytes",
            dir.len()
        ))),
        Some(dir) if dir.starts_with('/') => Ok(dir),
        Some(dir) => Err(Error::invalid(format!(
            "the working directory {dir:?} is not an absolute path"
        ))),
    }
}

/// Returns the contents of config.json.
pub(crate) fn spec(inputs: SpecInputs<'_>) -> Result<ConfigJson> {
    let context = context(inputs.config);
    let mut root = Root::default();
    root.set_path(inputs.rootfs.to_owned())
        .set_readonly(Some(context.readonly_rootfs));
    Ok(ConfigJson {
        oci_version: "1.2.0",
        root,
        process: ProcessSection {
            typed: process(&inputs, &context)?,
            capabilities: inputs.capabilities,
        },
        linux: LinuxSection {
            typed: linux(&inputs, &context)?,
            seccomp: inputs.seccomp,
            intel_rdt: None,
        },
        mounts: inputs.mounts,
        hooks: None,
        annotations: inputs.annotations,
    })
}

/// Returns the section `process` of config.json. `Process::default()` contains unwanted values such
/// as the argument `sh` and a nofile limit. This function therefore overwrites every field that the
/// default fills.
fn process(inputs: &SpecInputs<'_>, context: &LinuxContainerSecurityContext) -> Result<Process> {
    let mut user = ProcessUser::default();
    user.set_uid(inputs.user.uid)
        .set_gid(inputs.user.gid)
        .set_additional_gids(Some(inputs.user.groups.clone()));
    let oom_score_adj = i32::try_from(inputs.oom_score_adj)
        .map_err(|error| Error::invalid(format!("oom_score_adj: {error}")))?;
    let rlimits = inputs.rlimits.iter().map(|limit| limit.0).collect();
    // A privileged container gets no SELinux label from the server. The container keeps the
    // runtime's label. The policy can change the label's type to spc_t when the container's program
    // is executed.
    let labels = inputs.selinux.as_ref().filter(|_| !context.privileged);
    let mut process = Process::default();
    process
        .set_terminal(Some(inputs.config.tty))
        .set_user(user)
        .set_args(Some(arguments(inputs.config, inputs.image)?))
        .set_env(Some(environment(inputs)?))
        .set_cwd(working_dir(inputs.config, inputs.image)?.into())
        .set_capabilities(None)
        .set_rlimits((!inputs.rlimits.is_empty()).then_some(rlimits))
        .set_no_new_privileges(Some(context.no_new_privs && !context.privileged))
        .set_oom_score_adj(Some(oom_score_adj))
        .set_apparmor_profile(inputs.apparmor.clone())
        .set_selinux_label(labels.map(|labels| labels.process.to_string()));
    Ok(process)
}

/// Returns the section `linux` of config.json. `Linux::default()` contains unwanted values such as
/// namespaces and masked paths. This function therefore overwrites every field that the default
/// fills.
fn linux(inputs: &SpecInputs<'_>, context: &LinuxContainerSecurityContext) -> Result<Linux> {
    let mut resources = inputs.resources.clone();
    resources.set_devices(Some(inputs.devices.rules.clone()));
    let nodes = &inputs.devices.nodes;
    let propagation = inputs.root_propagation;
    let labels = inputs.selinux.as_ref();
    let mut linux = Linux::default();
    linux
        .set_cgroups_path(Some(inputs.cgroup.into()))
        .set_namespaces(Some(namespaces(&inputs.namespaces, context.privileged)))
        .set_resources(Some(resources))
        .set_devices((!nodes.is_empty()).then(|| nodes.clone()))
        .set_mount_label(labels.map(|labels| labels.files.to_string()))
        .set_rootfs_propagation(propagation.map(str::to_owned));
    let own_users = inputs.namespaces.users.as_ref();
    if let Some((_, users)) = own_users {
        linux
            .set_uid_mappings(Some(mounts::id_mappings(&users.uids)?))
            .set_gid_mappings(Some(mounts::id_mappings(&users.gids)?));
    }
    // Kubelet sends the lists of masked and read-only paths. If the pod's procMount is Unmasked,
    // kubelet sends empty lists. Kubernetes allows Unmasked only in pods with a user namespace. In
    // pods without a user namespace, the default paths therefore replace an empty list.
    let paths = |requested: &[String], default: &[String]| {
        let chosen = if requested.is_empty() && own_users.is_none() {
            default
        } else {
            requested
        };
        (!context.privileged).then(|| chosen.to_owned())
    };
    linux
        .set_masked_paths(paths(&context.masked_paths, default_masked()?))
        .set_readonly_paths(paths(&context.readonly_paths, &READONLY.map(str::to_owned)));
    Ok(linux)
}

/// Returns the path of the directory `thermal_throttle` of each CPU below `cpus`, sorted. An error
/// must not count as a missing directory, because the containers would then see the counters.
fn thermal_counters(cpus: &Path) -> std::io::Result<Vec<String>> {
    use std::io::ErrorKind::{NotADirectory, NotFound};
    let entries = match std::fs::read_dir(cpus) {
        Err(error) if error.kind() == NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut all = Vec::new();
    for cpu in entries {
        let directory = cpu?.path().join("thermal_throttle");
        match std::fs::symlink_metadata(&directory) {
            Ok(_) => all.push(directory.display().to_string()),
            Err(error) if matches!(error.kind(), NotADirectory | NotFound) => {}
            Err(error) => return Err(error),
        }
    }
    all.sort();
    Ok(all)
}

fn namespaces(namespaces: &Namespaces, privileged: bool) -> Vec<LinuxNamespace> {
    let entry = |kind: LinuxNamespaceType, path: Option<&PathBuf>| {
        let mut entry = LinuxNamespace::default();
        entry.set_typ(kind).set_path(path.cloned());
        entry
    };
    let mut all = vec![entry(LinuxNamespaceType::Mount, None)];
    // Without a user namespace, a privileged container gets no cgroup namespace and sees the node's
    // cgroups, as in containerd. In a user namespace, a privileged container gets its own cgroup
    // namespace. Otherwise, the container's root user could not mount cgroup2.
    if !privileged || namespaces.users.is_some() {
        all.push(entry(LinuxNamespaceType::Cgroup, None));
    }
    let users = namespaces.users.as_ref().map(|(path, _)| path);
    let joined = [
        (LinuxNamespaceType::User, users),
        (LinuxNamespaceType::Network, namespaces.network.as_ref()),
        (LinuxNamespaceType::Ipc, namespaces.ipc.as_ref()),
        (LinuxNamespaceType::Uts, namespaces.uts.as_ref()),
    ];
    for (kind, path) in joined {
        if path.is_some() {
            all.push(entry(kind, path));
        }
    }
    match &namespaces.pid {
        PidNamespace::New => all.push(entry(LinuxNamespaceType::Pid, None)),
        PidNamespace::Join(pid) => {
            let path = PathBuf::from(format!("/proc/{pid}/ns/pid"));
            all.push(entry(LinuxNamespaceType::Pid, Some(&path)));
        }
        PidNamespace::Node => {}
    }
    all
}

#[cfg(test)]
mod tests {
    use rrun_kernel::capability::Capability;
    use rrun_proto::v1::{KeyValue, LinuxContainerConfig};
    use serde_json::{Value, json};

    use super::super::{capabilities, resources};
    use super::*;

    fn image() -> ImageConfig {
        ImageConfig {
            entrypoint: vec!["/entry".into()],
            cmd: vec!["cmd".into()],
            env: vec!["PATH=/bin".into(), "A=image".into()],
            working_dir: "/srv".into(),
            ..ImageConfig::default()
        }
    }

    #[test]
    fn a_working_directory_that_linux_does_not_accept_is_refused() {
        let longest = format!("/{}", "a/".repeat(MAX_PATH_BYTES / 2));
        assert_eq!(longest.len(), MAX_PATH_BYTES);
        for (path, accepted) in [
            (longest.clone(), true),
            (format!("{longest}a"), false),
            ("/a".repeat(1_000_000), false),
            ("a".to_owned(), false),
        ] {
            let from_image = ImageConfig {
                working_dir: path.clone(),
                ..image()
            };
            let from_request = ContainerConfig {
                working_dir: path.clone(),
                ..ContainerConfig::default()
            };
            for result in [
                working_dir(&ContainerConfig::default(), &from_image),
                working_dir(&from_request, &image()),
            ] {
                assert_eq!(result.is_ok(), accepted, "a path of {} bytes", path.len());
            }
        }
    }

    fn made(config: &ContainerConfig, image: &ImageConfig) -> Result<Value> {
        let privileged = context(config).privileged;
        let inputs = mounts::MountInputs {
            pod: Path::new("/p"),
            etc: Path::new("/p/etc"),
            privileged,
            readonly_rootfs: false,
            own_ipc: true,
            terminals: std::num::NonZeroU32::MIN,
            features: crate::handlers::Features::default(),
        };
        let linux = config.linux.clone().unwrap_or_default();
        let resources = linux.resources.unwrap_or_default();
        let made = spec(SpecInputs {
            config,
            image,
            user: &User::default(),
            hostname: "pod",
            rootfs: Path::new("/b/rootfs"),
            cgroup: "/kubepods/p/c",
            namespaces: Namespaces {
                network: Some("/run/rrun/netns/p".into()),
                ipc: Some("/proc/7/ns/ipc".into()),
                uts: None,
                pid: PidNamespace::New,
                users: None,
            },
            capabilities: capabilities::sets(None, privileged, Capability::CAP_CHOWN.bitmask())?,
            devices: Devices::default(),
            mounts: mounts::mounts(&config.mounts, &inputs)?,
            root_propagation: None,
            resources: resources::limits(&resources, resources::Controllers::default())?,
            oom_score_adj: 0,
            seccomp: None,
            rlimits: &[],
            annotations: BTreeMap::new(),
            apparmor: None,
            selinux: None,
        })?;
        Ok(json!(made))
    }

    /// The test converts the configuration to the types of `oci_spec` and back. The conversion
    /// loses every field that is missing in these types.
    #[test]
    fn every_written_field_exists_in_the_specification() -> Result<(), Box<dyn std::error::Error>> {
        let value = made(&ContainerConfig::default(), &image())?;
        let typed: oci_spec::runtime::Spec = serde_json::from_value(value.clone())?;
        let back = serde_json::to_value(typed)?;
        contains(&back, &value, "config.json");
        Ok(())
    }

    fn contains(back: &Value, value: &Value, at: &str) {
        match (back, value) {
            (Value::Object(back), Value::Object(value)) => {
                for (name, inner) in value {
                    let Some(found) = back.get(name) else {
                        panic!("the field {at}.{name} is missing from the specification");
                    };
                    contains(found, inner, &format!("{at}.{name}"));
                }
            }
            (Value::Array(back), Value::Array(value)) => {
                assert_eq!(back.len(), value.len(), "{at}");
            }
            (back, value) => assert_eq!(back, value, "{at}"),
        }
    }

    #[test]
    fn the_requests_command_and_args_replace_the_images() -> Result<()> {
        let with = |command: &[&str], args: &[&str]| {
            let owned = |all: &[&str]| all.iter().map(|one| (*one).to_owned()).collect();
            let config = ContainerConfig {
                command: owned(command),
                args: owned(args),
                ..Default::default()
            };
            arguments(&config, &image())
        };
        assert_eq!(with(&[], &[])?, ["/entry", "cmd"]);
        assert_eq!(with(&[], &["a"])?, ["/entry", "a"]);
        assert_eq!(with(&["c"], &[])?, ["c"]);
        assert_eq!(with(&["c"], &["a"])?, ["c", "a"]);
        assert!(arguments(&ContainerConfig::default(), &ImageConfig::default()).is_err());
        Ok(())
    }

    #[test]
    fn the_requests_environment_replaces_the_images() -> Result<()> {
        let config = ContainerConfig {
            envs: vec![KeyValue {
                key: "A".into(),
                value: b"b=c".to_vec(),
            }],
            ..Default::default()
        };
        let value = made(&config, &image())?;
        assert_eq!(
            value["process"]["env"],
            json!(["PATH=/bin", "HOSTNAME=pod", "A=b=c"])
        );
        assert_eq!(value["process"]["cwd"], "/srv");
        Ok(())
    }

    #[test]
    fn a_privileged_container_has_no_masked_paths() -> Result<()> {
        let config = ContainerConfig {
            linux: Some(LinuxContainerConfig {
                security_context: Some(LinuxContainerSecurityContext {
                    privileged: true,
                    no_new_privs: true,
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let value = made(&config, &image())?;
        assert_eq!(value["linux"].get("maskedPaths"), None);
        assert_eq!(value["process"]["noNewPrivileges"], false);
        assert_eq!(
            value["process"]["capabilities"]["bounding"],
            json!(["CAP_CHOWN"])
        );
        Ok(())
    }

    #[test]
    fn the_default_masked_paths_hide_energy_meters_and_thermal_counters()
    -> std::result::Result<(), Box<dyn std::error::Error>> {
        // RAPL's energy meters: CVE-2020-8694, GHSA-7ww5-4wqc-m92c.
        for path in ["/sys/devices/virtual/powercap", "/proc/interrupts"] {
            assert!(
                default_masked()?.iter().any(|masked| masked == path),
                "{path}"
            );
        }
        // Thermal interrupts of CPUs: GHSA-6fw5-f8r9-fgfm.
        let cpus = std::env::temp_dir().join(format!("rrun-cpus-{}", std::process::id()));
        for counters in ["cpu0/thermal_throttle", "cpu11/thermal_throttle"] {
            std::fs::create_dir_all(cpus.join(counters))?;
        }
        std::fs::create_dir_all(cpus.join("cpufreq"))?;
        std::fs::write(cpus.join("online"), "0-11")?;
        let found = thermal_counters(&cpus)?;
        std::fs::remove_dir_all(&cpus)?;
        let expected = ["cpu0", "cpu11"].map(|cpu| cpus.join(cpu).join("thermal_throttle"));
        assert_eq!(found, expected.map(|path| path.display().to_string()));
        Ok(())
    }
}
