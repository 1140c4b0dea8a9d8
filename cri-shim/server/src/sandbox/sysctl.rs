//! Sets a pod's sysctls. Each sysctl belongs to a namespace, and only a thread in this namespace
//! can set it.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, setns};
use rrun_proto::v1::PodSandboxConfig;

use super::namespaces::Sharing;
use super::users;
use rrun_calls::error::{During, Error, Result};
use rrun_kernel::sysctl::is_of_network_namespace;

/// The namespace to which a sysctl belongs. A thread enters the namespaces in the order of this
/// type's variants. The IPC namespace is last. If the pod has its own user namespace, the thread
/// must change its user id to write IPC sysctls. After this change, the thread lacks the privileges
/// to enter another namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Owner {
    Network,
    Uts,
    Ipc,
}

/// Returns the sysctls to write. They are the values in the pod's configuration. If the pod has its
/// own network namespace, the defaults that containers expect are added. As in Docker and
/// containerd, the defaults allow processes without capabilities to listen on ports below 1024 and
/// to run ping.
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
        // sysctl(8) accepts both dots and slashes as separators.
        let dotted = name.replace('/', ".");
        let ipc = ["kernel.shm", "kernel.msg", "kernel.sem", "fs.mqueue."];
        let owner = if is_of_network_namespace(&dotted) && sharing.own_network {
            Owner::Network
        } else if ipc.iter().any(|prefix| dotted.starts_with(prefix)) && sharing.own_ipc {
            Owner::Ipc
        } else if dotted == "kernel.domainname" && sharing.own_uts {
            Owner::Uts
        } else {
            return Err(Error::invalid(format!(
                "the sysctl {name} does not belong to one of the pod's own namespaces"
            )));
        };
        if dotted.split('.').any(|part| part.is_empty()) || dotted.contains('\0') {
            return Err(Error::invalid(format!(
                "{name:?} is not a valid sysctl name"
            )));
        }
        owned.push((owner, name.to_owned(), value.to_owned()));
    }
    owned.sort_by_key(|(owner, ..)| *owner);
    Ok(owned)
}

/// Rejects the sysctls that [`write_sysctls`] would reject.
pub(crate) fn check_sysctls(config: &PodSandboxConfig, sharing: Sharing) -> Result<()> {
    sysctls(config, sharing).map(drop)
}

/// Returns whether the pod's sysctls set `accept_ra` or `accept_redirects` of an interface.
pub(crate) fn sets_router_acceptance(config: &PodSandboxConfig) -> bool {
    names(config).any(|name| name.ends_with(".accept_ra") || name.ends_with(".accept_redirects"))
}

/// Returns whether the pod's sysctls enable or disable IPv4 forwarding. If a sysctl switches IPv4
/// forwarding on or off, the kernel also changes `accept_redirects` of all interfaces. The server
/// must then set `accept_redirects` again.
pub(crate) fn switches_forwarding(config: &PodSandboxConfig) -> bool {
    names(config)
        .any(|name| name == "net.ipv4.ip_forward" || name == "net.ipv4.conf.all.forwarding")
}

/// Returns the names of the pod's sysctls, with dots as separators.
fn names(config: &PodSandboxConfig) -> impl Iterator<Item = String> {
    let sysctls = config.linux.iter().flat_map(|linux| linux.sysctls.keys());
    sysctls.map(|name| name.replace('/', "."))
}

/// Writes the pod's sysctls from a thread that enters the namespaces of the process `holder`. This
/// call blocks until the sysctls are written.
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
    written?.unwrap_or_else(|_| {
        Err(Error::internal(
            "the thread that sets the pod's sysctls panicked",
        ))
    })
}

/// Converts a sysctl name to a path: `net.ipv4.conf.eth0/1.forwarding` becomes
/// `net/ipv4/conf/eth0.1/forwarding`. As in sysctl(8), the first dot or slash determines which
/// character is the separator.
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

/// Sets the user ids of the calling thread permanently. A user namespace owns the pod's IPC
/// namespace. Only the root user of this user namespace can write the IPC namespace's sysctls. The
/// node's root can't write them. This function makes the system call directly, because the C
/// library's function would change the ids of every thread.
fn become_thread_user(uid: u32) -> Result<()> {
    let uid = rustix::thread::Uid::from_raw(uid);
    rustix::thread::set_thread_res_uid(uid, uid, uid)
        .during(|| format!("switch to the user id {uid:?} of the pod's root"))
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
        for name in ["vm.swappiness", "net.netfilter.nf_hooks_lwtunnel"] {
            let config = pod(NamespaceOption::default(), &[(name, "1")]);
            let refused = check_sysctls(&config, sharing(&config)?);
            assert!(refused.is_err_and(|error| error.sentence().contains(name)));
        }

        let node = NamespaceOption {
            network: NamespaceMode::Node.into(),
            ..Default::default()
        };
        let config = pod(node, &[("net.core.somaxconn", "1")]);
        assert!(check_sysctls(&config, sharing(&config)?).is_err());
        Ok(())
    }

    #[test]
    fn both_spellings_of_a_sysctl_refer_to_the_same_file() {
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
