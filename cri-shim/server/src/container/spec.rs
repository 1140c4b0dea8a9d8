//! A container's OCI configuration, config.json of the runtime specification, from the CRI's.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use rrun_proto::v1::{ContainerConfig, LinuxContainerSecurityContext, NamespaceMode};
use serde_json::{Value, json};

use super::capabilities::CapabilitySets;
use super::devices::Devices;
use super::mounts;
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
pub(crate) struct Parts<'a> {
    pub config: &'a ContainerConfig,
    pub image: &'a ImageConfig,
    pub user: &'a User,
    pub hostname: &'a str,
    pub rootfs: &'a Path,
    pub cgroup: &'a str,
    pub namespaces: Namespaces,
    pub capabilities: CapabilitySets,
    pub devices: Devices,
    pub mounts: Vec<Value>,
    pub root_propagation: Option<&'static str>,
    /// `linux.resources` without devices.
    pub resources: Value,
    pub oom_score_adj: i64,
    /// `linux.seccomp`.
    pub seccomp: Option<Value>,
    pub rlimits: &'a [Rlimit],
    /// What the handler's patterns let through.
    pub annotations: BTreeMap<String, String>,
    pub apparmor: Option<String>,
    pub selinux: Option<Labels>,
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
fn environment(parts: &Parts<'_>) -> Result<Vec<String>> {
    let mut all: Vec<String> = vec![DEFAULT_PATH.to_owned()];
    let mut set = |pair: String| {
        let name = pair.split('=').next().unwrap_or_default();
        let same = |there: &&mut String| there.split('=').next() == Some(name);
        match all.iter_mut().find(same) {
            Some(there) => *there = pair,
            None => all.push(pair),
        }
    };
    set(format!("HOSTNAME={}", parts.hostname));
    if parts.config.tty {
        set("TERM=xterm".to_owned());
    }
    parts.image.env.iter().cloned().for_each(&mut set);
    for pair in &parts.config.envs {
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
pub(crate) fn spec(parts: Parts<'_>) -> Result<Value> {
    let context = context(parts.config);
    let mut process = json!({
        "terminal": parts.config.tty,
        "user": {
            "uid": parts.user.uid, "gid": parts.user.gid, "additionalGids": parts.user.groups,
        },
        "args": arguments(parts.config, parts.image)?,
        "env": environment(&parts)?,
        "cwd": working_dir(parts.config, parts.image)?,
        "capabilities": parts.capabilities.to_json(),
        "noNewPrivileges": context.no_new_privs && !context.privileged,
        "oomScoreAdj": parts.oom_score_adj,
    });
    if parts.capabilities.ambient == 0
        && let Some(sets) = process["capabilities"].as_object_mut()
    {
        sets.remove("inheritable");
        sets.remove("ambient");
    }

    if let Some(profile) = &parts.apparmor {
        process["apparmorProfile"] = json!(profile);
    }

    // The privileged run as whoever starts them, or as the policy has it (spc_t).
    if let Some(labels) = parts.selinux.as_ref().filter(|_| !context.privileged) {
        process["selinuxLabel"] = json!(labels.process);
    }

    let mut namespaces = vec![json!({ "type": "mount" })];
    // The privileged see the node's cgroups, as with containerd; but the root of a user namespace
    // can only mount those of a cgroup namespace of its own.
    if !context.privileged || parts.namespaces.users.is_some() {
        namespaces.push(json!({ "type": "cgroup" }));
    }
    if let Some((path, _)) = &parts.namespaces.users {
        namespaces.push(json!({ "type": "user", "path": path }));
    }
    let joined = [
        ("network", &parts.namespaces.network),
        ("ipc", &parts.namespaces.ipc),
        ("uts", &parts.namespaces.uts),
    ];
    for (kind, path) in joined {
        if let Some(path) = path {
            namespaces.push(json!({ "type": kind, "path": path }));
        }
    }
    match &parts.namespaces.pid {
        PidNamespace::New => namespaces.push(json!({ "type": "pid" })),
        PidNamespace::Join(path) => namespaces.push(json!({ "type": "pid", "path": path })),
        PidNamespace::Node => {}
    }

    let mut resources = parts.resources;
    resources["devices"] = json!(parts.devices.rules);
    let mut linux = json!({
        "cgroupsPath": parts.cgroup,
        "namespaces": namespaces,
        "resources": resources,
    });
    if let Some(labels) = &parts.selinux {
        linux["mountLabel"] = json!(labels.files);
    }
    if !parts.devices.nodes.is_empty() {
        linux["devices"] = json!(parts.devices.nodes);
    }
    if let Some(profile) = parts.seccomp {
        linux["seccomp"] = profile;
    }
    if let Some((_, users)) = &parts.namespaces.users {
        linux["uidMappings"] = mounts::id_mappings(&users.uids);
        linux["gidMappings"] = mounts::id_mappings(&users.gids);
    }
    if let Some(propagation) = parts.root_propagation {
        linux["rootfsPropagation"] = json!(propagation);
    }
    if !context.privileged {
        // Kubelet names these paths; none are what a pod's `procMount: Unmasked` comes to, which
        // it takes only with a user namespace.
        let or_default = |asked: &[String], default: &[&str]| {
            if asked.is_empty() && parts.namespaces.users.is_none() {
                json!(default)
            } else {
                json!(asked)
            }
        };
        linux["maskedPaths"] = or_default(&context.masked_paths, &MASKED);
        linux["readonlyPaths"] = or_default(&context.readonly_paths, &READONLY);
    }
    if !parts.rlimits.is_empty() {
        process["rlimits"] = parts.rlimits.iter().map(Rlimit::to_json).collect();
    }
    let mut spec = json!({
        "ociVersion": "1.2.0",
        "root": { "path": parts.rootfs, "readonly": context.readonly_rootfs },
        "process": process,
        "mounts": parts.mounts,
        "linux": linux,
    });
    if !parts.annotations.is_empty() {
        spec["annotations"] = json!(parts.annotations);
    }
    Ok(spec)
}

#[cfg(test)]
mod tests {
    use rrun_kernel::capability::Capability;
    use rrun_proto::v1::{KeyValue, LinuxContainerConfig};

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
        let around = mounts::Surroundings {
            pod: Path::new("/p"),
            privileged,
            readonly_rootfs: false,
            own_ipc: true,
            features: crate::handlers::Features::default(),
        };
        let linux = config.linux.clone().unwrap_or_default();
        let resources = linux.resources.unwrap_or_default();
        spec(Parts {
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
            mounts: mounts::mounts(&config.mounts, &around)?,
            root_propagation: None,
            resources: resources::to_json(&resources, resources::Controllers::default())?,
            oom_score_adj: 0,
            seccomp: None,
            rlimits: &[],
            annotations: BTreeMap::new(),
            apparmor: None,
            selinux: None,
        })
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
