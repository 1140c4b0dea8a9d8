//! `linux.sysctl`: the kernel parameters of a container's own namespaces.

use std::collections::HashMap;

use oci_spec::runtime::LinuxNamespaceType as Type;

use crate::error::{Context, Result, refuse};
use crate::namespaces::Namespaces;
use rrun_kernel::procfs::Procfs;
use rrun_kernel::sysctl::is_of_network_namespace;

/// The parameters with the prefix `kernel.` that each IPC namespace has separately.
const IPC: &[&str] = &[
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
    "kernel.shm_rmid_forced",
];

/// Converts the name of a kernel parameter to a path relative to /proc/sys. sysctl(8) allows a dot
/// or a slash as the separator. The first dot or slash in the name is the separator. If the
/// separator is a dot, a slash in the name represents a dot in a path component.
fn path_of(name: &str) -> String {
    match name.find(['.', '/']) {
        Some(first) if name.as_bytes().get(first) == Some(&b'.') => name
            .chars()
            .map(|letter| match letter {
                '.' => '/',
                '/' => '.',
                other => other,
            })
            .collect(),
        _ => name.to_owned(),
    }
}

/// Checks that setting the parameters changes only the container's own namespaces.
///
/// # Errors
/// Fails if setting a parameter would change the host.
pub(crate) fn validate(sysctl: &HashMap<String, String>, namespaces: &Namespaces) -> Result<()> {
    for name in sysctl.keys() {
        let path = path_of(name);
        if path.split('/').any(|part| matches!(part, "" | "." | "..")) {
            refuse!("linux.sysctl: {name} is not a valid name of a parameter");
        }
        let dotted = path.replace('/', ".");
        let owner = if IPC.contains(&dotted.as_str()) || dotted.starts_with("fs.mqueue.") {
            Type::Ipc
        } else if is_of_network_namespace(&dotted) {
            Type::Network
        } else if dotted == "kernel.domainname" || dotted == "kernel.hostname" {
            Type::Uts
        } else {
            refuse!("linux.sysctl: {name} is a parameter of the host, not of a namespace");
        };
        if !namespaces.own(owner) {
            refuse!(
                "linux.sysctl: {name} would be set for the host, because the container does not have its own {owner} namespace"
            );
        }
    }
    Ok(())
}

/// Writes the parameters through the host's /proc, because the container could have manipulated its
/// own /proc. The kernel applies each parameter to the namespaces of the process that writes it.
pub(crate) fn apply(sysctl: &HashMap<String, String>) -> Result<()> {
    if sysctl.is_empty() {
        return Ok(());
    }
    let procfs = Procfs::open()?;
    for (name, value) in sysctl {
        procfs
            .write(&format!("sys/{}", path_of(name)), value)
            .doing(|| format!("set linux.sysctl {name} to {value}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn validated(name: &str, namespaces: &[&str]) -> Result<()> {
        let list: Vec<String> = namespaces
            .iter()
            .map(|typ| format!("{{\"type\":\"{typ}\"}}"))
            .collect();
        let spec: Vec<oci_spec::runtime::LinuxNamespace> =
            serde_json::from_str(&format!("[{}]", list.join(","))).unwrap();
        let sysctl = HashMap::from([(name.to_owned(), "1".to_owned())]);
        validate(&sysctl, &Namespaces::from_spec(&spec).unwrap())
    }

    #[test]
    fn only_parameters_of_the_containers_own_namespaces_can_be_set() {
        assert!(validated("net.ipv4.ip_forward", &["network"]).is_ok());
        assert!(validated("net/ipv4/ip_forward", &["network"]).is_ok());
        assert!(validated("net.ipv4.ip_forward", &["ipc"]).is_err());
        assert!(validated("kernel.shmmax", &["ipc"]).is_ok());
        assert!(validated("net.netfilter.nf_hooks_lwtunnel", &["network"]).is_err());
        assert!(validated("net/netfilter/nf_hooks_lwtunnel", &["network"]).is_err());
        assert!(validated("net/./netfilter/nf_hooks_lwtunnel", &["network"]).is_err());
        assert!(validated("kernel.panic", &["ipc", "network", "uts"]).is_err());
        assert!(validated("net.../../kernel/panic", &["network"]).is_err());
    }

    #[test]
    fn a_slash_represents_a_dot_in_the_name_of_an_interface() {
        assert_eq!(
            path_of("net.ipv4.conf.eth0/1.mtu"),
            "net/ipv4/conf/eth0.1/mtu"
        );
        assert_eq!(
            path_of("net/ipv4/conf/eth0.1/mtu"),
            "net/ipv4/conf/eth0.1/mtu"
        );
    }
}
