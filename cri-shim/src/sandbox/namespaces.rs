//! Which namespaces a pod has of its own, and its sysctls.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use nix::sched::{CloneFlags, setns};
use rrun_proto::v1::{NamespaceMode, NamespaceOption, PodSandboxConfig};

use crate::error::{During, Error, Result};

/// What a pod's namespace options come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sharing {
    /// A network namespace of the pod's own.
    pub own_network: bool,
    pub own_ipc: bool,
    /// One PID namespace for all containers that want the pod's.
    pub shared_pid: bool,
}

/// The pod's options; absent ones are the message's defaults.
pub fn options(config: &PodSandboxConfig) -> NamespaceOption {
    let context = config
        .linux
        .as_ref()
        .and_then(|linux| linux.security_context.as_ref());
    context
        .and_then(|context| context.namespace_options.clone())
        .unwrap_or_default()
}

/// Reads a pod's options; what makes no sense for a pod is refused.
pub fn sharing(config: &PodSandboxConfig) -> Result<Sharing> {
    let options = options(config);
    if let Some(users) = &options.userns_options
        && users.mode() != NamespaceMode::Node
    {
        return Err(Error::unimplemented(
            "the pod asks for a user namespace (userns_options), which rrun-cri does not do yet",
        ));
    }
    if options.pid() == NamespaceMode::Target {
        return Err(Error::invalid(
            "the pod's PID namespace mode is TARGET, which only a container can have",
        ));
    }
    let own = |field: &str, mode: NamespaceMode| match mode {
        NamespaceMode::Pod => Ok(true),
        NamespaceMode::Node => Ok(false),
        other => Err(Error::invalid(format!(
            "the pod's {field} namespace mode is {}, it can be POD or NODE",
            other.as_str_name()
        ))),
    };
    Ok(Sharing {
        own_network: own("network", options.network())?,
        own_ipc: own("IPC", options.ipc())?,
        shared_pid: options.pid() == NamespaceMode::Pod,
    })
}

/// Which namespace a sysctl belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owner {
    Network,
    Ipc,
}

/// The sysctls to write: the pod's own, over the defaults that containers expect of a network
/// namespace (ports below 1024 and ping without capabilities, as Docker and containerd have it).
fn sysctls(config: &PodSandboxConfig, sharing: Sharing) -> Result<Vec<(Owner, String, String)>> {
    let mut all = BTreeMap::new();
    if sharing.own_network {
        all.insert("net.ipv4.ip_unprivileged_port_start", "0");
        all.insert("net.ipv4.ping_group_range", "0 2147483647");
    }
    if let Some(linux) = &config.linux {
        for (name, value) in &linux.sysctls {
            all.insert(name, value);
        }
    }
    let mut owned = Vec::new();
    for (name, value) in all {
        // sysctl(8) takes dots and slashes for each other.
        let dotted = name.replace('/', ".");
        let ipc = ["kernel.shm", "kernel.msg", "kernel.sem", "fs.mqueue."];
        let owner = if dotted.starts_with("net.") && sharing.own_network {
            Owner::Network
        } else if ipc.iter().any(|prefix| dotted.starts_with(prefix)) && sharing.own_ipc {
            Owner::Ipc
        } else {
            return Err(Error::invalid(format!(
                "the sysctl {name} does not belong to a namespace that the pod has of its own"
            )));
        };
        if dotted.split('.').any(|part| part.is_empty()) || dotted.contains('\0') {
            return Err(Error::invalid(format!("{name:?} is no sysctl's name")));
        }
        owned.push((owner, name.to_owned(), value.to_owned()));
    }
    Ok(owned)
}

/// Refuses what [`write_sysctls`] would refuse.
pub fn check_sysctls(config: &PodSandboxConfig, sharing: Sharing) -> Result<()> {
    sysctls(config, sharing).map(drop)
}

/// Writes the pod's sysctls from a thread inside its namespaces. Blocks.
pub fn write_sysctls(
    config: &PodSandboxConfig,
    sharing: Sharing,
    netns: &Path,
    monitor: i32,
) -> Result<()> {
    let all = sysctls(config, sharing)?;
    if all.is_empty() {
        return Ok(());
    }
    let written = std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("sysctl".into())
            .stack_size(128 << 10)
            .spawn_scoped(scope, || {
                if sharing.own_network {
                    enter(netns, CloneFlags::CLONE_NEWNET)?;
                }
                if sharing.own_ipc && all.iter().any(|(owner, ..)| *owner == Owner::Ipc) {
                    let path = format!("/proc/{monitor}/ns/ipc");
                    enter(Path::new(&path), CloneFlags::CLONE_NEWIPC)?;
                }
                for (_, name, value) in &all {
                    let path = Path::new("/proc/sys").join(slashes(name));
                    std::fs::write(&path, value)
                        .during(|| format!("set the sysctl {name} to {value:?}"))?;
                }
                Ok(())
            });
        thread
            .during(|| "start a thread for the pod's sysctls".to_owned())
            .map(std::thread::ScopedJoinHandle::join)
    });
    written?.unwrap_or_else(|_| Err(Error::internal("the thread for the sysctls panicked")))
}

/// `net.ipv4.conf.eth0/1.forwarding` is `net/ipv4/conf/eth0.1/forwarding`: whichever separator
/// comes first is the separator, sysctl(8).
fn slashes(name: &str) -> String {
    match name.find(['.', '/']) {
        Some(at) if name.as_bytes().get(at) == Some(&b'.') => name
            .chars()
            .map(|c| match c {
                '.' => '/',
                '/' => '.',
                other => other,
            })
            .collect(),
        _ => name.to_owned(),
    }
}

fn enter(path: &Path, kind: CloneFlags) -> Result<()> {
    let namespace = File::open(path).during(|| format!("open the namespace {}", path.display()))?;
    setns(namespace, kind)
        .map_err(std::io::Error::from)
        .during(|| format!("enter the namespace {}", path.display()))
}

#[cfg(test)]
mod tests {
    use rrun_proto::v1::{LinuxPodSandboxConfig, LinuxSandboxSecurityContext};

    use super::*;

    fn pod(options: NamespaceOption, sysctls: &[(&str, &str)]) -> PodSandboxConfig {
        PodSandboxConfig {
            linux: Some(LinuxPodSandboxConfig {
                security_context: Some(LinuxSandboxSecurityContext {
                    namespace_options: Some(options),
                    ..Default::default()
                }),
                sysctls: sysctls
                    .iter()
                    .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                    .collect(),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[test]
    fn a_pod_without_options_has_everything_of_its_own() -> Result<()> {
        let own = Sharing {
            own_network: true,
            own_ipc: true,
            shared_pid: true,
        };
        assert_eq!(sharing(&PodSandboxConfig::default())?, own);
        Ok(())
    }

    #[test]
    fn a_sysctl_of_the_node_is_refused() -> Result<()> {
        let config = pod(NamespaceOption::default(), &[("vm.swappiness", "1")]);
        let refused = check_sysctls(&config, sharing(&config)?);
        assert!(refused.is_err_and(|error| error.sentence().contains("vm.swappiness")));

        let node = NamespaceOption {
            network: NamespaceMode::Node.into(),
            ..Default::default()
        };
        let config = pod(node, &[("net.core.somaxconn", "1")]);
        assert!(check_sysctls(&config, sharing(&config)?).is_err());
        Ok(())
    }

    #[test]
    fn both_spellings_of_a_sysctl_name_the_same_file() {
        assert_eq!(slashes("net.ipv4.ip_forward"), "net/ipv4/ip_forward");
        assert_eq!(
            slashes("net/ipv4/conf/eth0.1/mtu"),
            "net/ipv4/conf/eth0.1/mtu"
        );
        assert_eq!(
            slashes("net.ipv4.conf.eth0/1.mtu"),
            "net/ipv4/conf/eth0.1/mtu"
        );
    }
}
