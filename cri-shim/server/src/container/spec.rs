//! A container's OCI configuration, config.json of the runtime specification, from the CRI's.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

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
use rrun_calls::error::{Error, Result};
use rrun_images::ImageConfig;

const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What Docker and containerd hide from containers.
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

const READONLY: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

/// The namespaces to join; where there is no path, whether a new one.
#[derive(Debug, Default)]
pub(crate) struct Namespaces {
    pub network: Option<PathBuf>,
    pub ipc: Option<PathBuf>,
    pub uts: Option<PathBuf>,
    pub pid: PidNamespace,
    /// The pod's own user namespace, and whose its ids are.
    pub users: Option<(PathBuf, Mappings)>,
}

#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) enum PidNamespace {
    #[default]
    New,
    Node,
    Join(PathBuf),
}

/// Everything that the configuration is made of.
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
    /// `linux.resources` without devices.
    pub resources: LinuxResources,
    pub oom_score_adj: i64,
    pub seccomp: Option<SeccompFilter>,
    pub rlimits: &'a [Rlimit],
    /// What the handler's patterns let through.
    pub annotations: BTreeMap<String, String>,
    pub apparmor: Option<String>,
    pub selinux: Option<Labels>,
}

/// config.json by `oci_spec`'s types, except fields that those would lose (seccomp, intelRdt) or
/// write in random order (capabilities, annotations).
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

/// `process`.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(Default))]
pub(crate) struct ProcessSection {
    #[serde(flatten)]
    pub typed: Process,
    /// `Process` has hash sets, which would be in another order each time.
    capabilities: CapabilitySets,
}

/// `linux`.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(Default))]
#[serde(rename_all = "camelCase")]
pub(crate) struct LinuxSection {
    #[serde(flatten)]
    pub typed: Linux,
    /// `Linux` would lose what it does not know of a file's profile.
    #[serde(skip_serializing_if = "Option::is_none")]
    seccomp: Option<SeccompFilter>,
    /// `Linux` misspells two names, enableCMT and enableMBM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub intel_rdt: Option<IntelRdt>,
}

impl ConfigJson {
    /// The file's text.
    pub(crate) fn text(&self) -> Result<String> {
        serde_json::to_string(self)
            .map_err(|error| Error::internal(format!("write config.json: {error}")))
    }
}

/// Refuses what this server can't do yet, by the field's name.
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
                "the environment variable {key:?} has a name or a value that can't be"
            )));
        }
    }
    label::check(context(config).selinux_options.as_ref())?;
    for mount in &config.mounts {
        super::image_volume::check(mount)?;
    }
    Ok(())
}

/// The container's security context; an absent one is the default.
pub(crate) fn context(config: &ContainerConfig) -> LinuxContainerSecurityContext {
    let linux = config.linux.as_ref();
    linux
        .and_then(|linux| linux.security_context.clone())
        .unwrap_or_default()
}

/// The container's PID namespace mode.
pub(crate) fn pid_mode(config: &ContainerConfig) -> (NamespaceMode, String) {
    let options = context(config).namespace_options.unwrap_or_default();
    (options.pid(), options.target_id)
}

/// What to run: the request's command and arguments over the image's.
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
            "there is nothing to run: neither the request nor the image names a command",
        ));
    }
    Ok(all)
}

/// `NAME=value` each; the request's win over the image's.
fn environment(inputs: &SpecInputs<'_>) -> Result<Vec<String>> {
    let mut all: Vec<String> = vec![DEFAULT_PATH.to_owned()];
    let mut set = |pair: String| {
        let name = pair.split('=').next().unwrap_or_default();
        let same = |there: &&mut String| there.split('=').next() == Some(name);
        match all.iter_mut().find(same) {
            Some(there) => *there = pair,
            None => all.push(pair),
        }
    };
    set(format!("HOSTNAME={}", inputs.hostname));
    if inputs.config.tty {
        set("TERM=xterm".to_owned());
    }
    inputs.image.env.iter().cloned().for_each(&mut set);
    for pair in &inputs.config.envs {
        let value = std::str::from_utf8(&pair.value).map_err(|_| {
            let key = &pair.key;
            Error::invalid(format!(
                "the value of the environment variable {key} is not UTF-8, which config.json can't hold"
            ))
        })?;
        set(format!("{}={value}", pair.key));
    }
    Ok(all)
}

/// The working directory, absolute.
pub(crate) fn working_dir<'a>(
    config: &'a ContainerConfig,
    image: &'a ImageConfig,
) -> Result<&'a str> {
    let dir = [&config.working_dir, &image.working_dir]
        .into_iter()
        .find(|dir| !dir.is_empty());
    match dir {
        None => Ok("/"),
        Some(dir) if dir.starts_with('/') => Ok(dir),
        Some(dir) => Err(Error::invalid(format!(
            "the working directory {dir:?} is not an absolute path"
        ))),
    }
}

/// config.json.
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

/// `Process::default()` is not empty (args `sh`, a nofile limit, …): every field that it fills is
/// set here.
fn process(inputs: &SpecInputs<'_>, context: &LinuxContainerSecurityContext) -> Result<Process> {
    let mut user = ProcessUser::default();
    user.set_uid(inputs.user.uid)
        .set_gid(inputs.user.gid)
        .set_additional_gids(Some(inputs.user.groups.clone()));
    let oom_score_adj = i32::try_from(inputs.oom_score_adj)
        .map_err(|error| Error::invalid(format!("oom_score_adj: {error}")))?;
    let rlimits = inputs.rlimits.iter().map(|limit| limit.0).collect();
    // The privileged run as whoever starts them, or as the policy has it (spc_t).
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

/// `Linux::default()` is not empty (namespaces, masked paths, …): every field that it fills is
/// set here.
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
    // Kubelet names these paths; none are what a pod's `procMount: Unmasked` comes to, which it
    // takes only with a user namespace.
    let paths = |requested: &[String], default: &[&str]| {
        if context.privileged {
            None
        } else if requested.is_empty() && own_users.is_none() {
            Some(default.iter().map(|path| (*path).to_owned()).collect())
        } else {
            Some(requested.to_owned())
        }
    };
    linux
        .set_masked_paths(paths(&context.masked_paths, &MASKED))
        .set_readonly_paths(paths(&context.readonly_paths, &READONLY));
    Ok(linux)
}

fn namespaces(namespaces: &Namespaces, privileged: bool) -> Vec<LinuxNamespace> {
    let entry = |kind: LinuxNamespaceType, path: Option<&PathBuf>| {
        let mut entry = LinuxNamespace::default();
        entry.set_typ(kind).set_path(path.cloned());
        entry
    };
    let mut all = vec![entry(LinuxNamespaceType::Mount, None)];
    // The privileged see the node's cgroups, as with containerd; but the root of a user namespace
    // can only mount those of a cgroup namespace of its own.
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
        PidNamespace::Join(path) => all.push(entry(LinuxNamespaceType::Pid, Some(path))),
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

    fn made(config: &ContainerConfig, image: &ImageConfig) -> Result<Value> {
        let privileged = context(config).privileged;
        let inputs = mounts::MountInputs {
            pod: Path::new("/p"),
            privileged,
            readonly_rootfs: false,
            own_ipc: true,
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

    /// What the specification's own types don't know vanishes on the way through them.
    #[test]
    fn every_field_is_one_of_the_specification() -> Result<(), Box<dyn std::error::Error>> {
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
                        panic!("{at}.{name} is not in the specification");
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
    fn command_and_args_over_the_images() -> Result<()> {
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
    fn the_requests_environment_wins() -> Result<()> {
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
    fn a_privileged_container_has_nothing_masked() -> Result<()> {
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
}
