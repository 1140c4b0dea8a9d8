//! A pod's sysctls, written into the namespaces that they belong to.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, setns};
use rrun_proto::v1::PodSandboxConfig;

use super::namespaces::Sharing;
use super::users;
use rrun_calls::error::{During, Error, Result};

/// Which namespace a sysctl belongs to, in the order in which they are entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Owner {
    Network,
    Uts,
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
        } else if dotted == "kernel.domainname" && sharing.own_uts {
            Owner::Uts
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
    owned.sort_by_key(|(owner, ..)| *owner);
    Ok(owned)
}

/// Refuses what [`write_sysctls`] would refuse.
pub(crate) fn check_sysctls(config: &PodSandboxConfig, sharing: Sharing) -> Result<()> {
    sysctls(config, sharing).map(drop)
}

/// Whether the pod's own sysctls set which router advertisements or redirects its interfaces
/// accept.
pub(crate) fn chooses_routers(config: &PodSandboxConfig) -> bool {
    names(config).any(|name| name.ends_with(".accept_ra") || name.ends_with(".accept_redirects"))
}

/// Whether the pod's sysctls switch the forwarding of IPv4 on or off. The kernel then changes which
/// redirects all interfaces accept.
pub(crate) fn switches_forwarding(config: &PodSandboxConfig) -> bool {
    names(config)
        .any(|name| name == "net.ipv4.ip_forward" || name == "net.ipv4.conf.all.forwarding")
}

/// The names of the pod's sysctls, with dots.
fn names(config: &PodSandboxConfig) -> impl Iterator<Item = String> {
    let sysctls = config.linux.iter().flat_map(|linux| linux.sysctls.keys());
    sysctls.map(|name| name.replace('/', "."))
}

/// Writes the pod's sysctls from a thread inside its namespaces, which are those of the process
/// `holder`. Blocks.
pub(crate) fn write_sysctls(
    config: &PodSandboxConfig,
    sharing: Sharing,
    netns: &Path,
    holder: i32,
) -> Result<()> {
    let all = sysctls(config, sharing)?;
    if all.is_empty() {
        return Ok(());
    }
    let of = |pid: i32, kind: &str| PathBuf::from(format!("/proc/{pid}/ns/{kind}"));
    let root = users::mappings(config)?.map(|users| users.root());
    let written = std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("sysctl".into())
            .stack_size(128 << 10)
            .spawn_scoped(scope, || {
                let mut inside = None;
                for (owner, name, value) in &all {
                    if inside != Some(*owner) {
                        inside = Some(*owner);
                        match owner {
                            Owner::Network => enter(netns, CloneFlags::CLONE_NEWNET)?,
                            Owner::Uts => enter(&of(holder, "uts"), CloneFlags::CLONE_NEWUTS)?,
                            Owner::Ipc => {
                                enter(&of(holder, "ipc"), CloneFlags::CLONE_NEWIPC)?;
                                if let Some((root, _)) = root {
                                    become_thread_user(root)?;
                                }
                            }
                        }
                    }
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

/// Only the root of the namespace's owner may write its IPC sysctls, not the node's. For the
/// calling thread, for good: the C library's call would change every thread.
fn become_thread_user(uid: u32) -> Result<()> {
    let uid = rustix::thread::Uid::from_raw(uid);
    rustix::thread::set_thread_res_uid(uid, uid, uid)
        .during(|| format!("become the pod's root user {uid:?}"))
}

fn enter(path: &Path, kind: CloneFlags) -> Result<()> {
    let namespace = File::open(path).during(|| format!("open the namespace {}", path.display()))?;
    setns(namespace, kind)
        .map_err(std::io::Error::from)
        .during(|| format!("enter the namespace {}", path.display()))
}

#[cfg(test)]
mod tests {
    use rrun_proto::v1::{
        LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceMode, NamespaceOption,
    };

    use super::super::namespaces::sharing;
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
