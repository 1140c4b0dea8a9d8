//! Decides which namespaces a pod shares with the node.

use rrun_proto::v1::{NamespaceMode, NamespaceOption, PodSandboxConfig};

use super::users;
use rrun_calls::error::{Error, Result};

/// The namespaces that a pod's options select.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sharing {
    /// True if the pod has its own network namespace.
    pub own_network: bool,
    pub own_ipc: bool,
    /// True if the pod has its own host name. A pod in the node's network always has the node's
    /// host name.
    pub own_uts: bool,
    /// True if the pod's containers share one PID namespace. A container that requests another PID
    /// namespace does not use the shared one.
    pub shared_pid: bool,
    /// True if the pod has its own user namespace, which owns the pod's other namespaces.
    pub own_users: bool,
}

impl Sharing {
    /// Returns true if the monitor starts a pause process for the pod.
    pub(crate) fn has_pause_process(self) -> bool {
        self.shared_pid || self.own_users
    }
}

/// Returns the pod's namespace options. An option that the request does not set has the default of
/// its protobuf field.
pub(crate) fn options(config: &PodSandboxConfig) -> NamespaceOption {
    let context = config
        .linux
        .as_ref()
        .and_then(|linux| linux.security_context.as_ref());
    context
        .and_then(|context| context.namespace_options.clone())
        .unwrap_or_default()
}

/// Reads a pod's namespace options, and rejects combinations that are invalid for a pod.
pub(crate) fn sharing(config: &PodSandboxConfig) -> Result<Sharing> {
    let options = options(config);
    if options.pid() == NamespaceMode::Target {
        return Err(Error::invalid(
            "the pod's PID namespace mode is TARGET, which only a container can have",
        ));
    }
    let own = |field: &str, mode: NamespaceMode| match mode {
        NamespaceMode::Pod => Ok(true),
        NamespaceMode::Node => Ok(false),
        other => Err(Error::invalid(format!(
            "the pod's {field} namespace mode is {}, but it must be POD or NODE",
            other.as_str_name()
        ))),
    };
    let sharing = Sharing {
        own_network: own("network", options.network())?,
        own_ipc: own("IPC", options.ipc())?,
        own_uts: options.network() == NamespaceMode::Pod && !config.hostname.is_empty(),
        shared_pid: options.pid() == NamespaceMode::Pod,
        own_users: users::mappings(config)?.is_some(),
    };
    // The root of a user namespace has no privileges over namespaces that other user namespaces
    // own. The pod's containers must mount /sys, /dev/mqueue and /proc. If the pod used the node's
    // network, IPC or PID namespace, the kernel would refuse one of these mounts.
    let nodes = [
        ("network", !sharing.own_network),
        ("IPC", !sharing.own_ipc),
        ("PID", options.pid() == NamespaceMode::Node),
    ];
    if sharing.own_users
        && let Some((field, _)) = nodes.iter().find(|(_, node)| *node)
    {
        return Err(Error::invalid(format!(
            "a pod with its own user namespace (userns_options) cannot use the node's {field} namespace"
        )));
    }
    Ok(sharing)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_without_options_has_its_own_namespaces() -> Result<()> {
        let own = Sharing {
            own_network: true,
            own_ipc: true,
            own_uts: false,
            shared_pid: true,
            own_users: false,
        };
        assert_eq!(sharing(&PodSandboxConfig::default())?, own);
        Ok(())
    }

    #[test]
    fn a_user_namespace_together_with_the_nodes_network_is_refused() {
        let config = |network: NamespaceMode| {
            let ids = rrun_proto::v1::IdMapping {
                host_id: 65536,
                container_id: 0,
                length: 65536,
            };
            let options = NamespaceOption {
                network: network.into(),
                userns_options: Some(rrun_proto::v1::UserNamespace {
                    mode: NamespaceMode::Pod.into(),
                    uids: vec![ids],
                    gids: vec![ids],
                }),
                ..Default::default()
            };
            PodSandboxConfig {
                linux: Some(rrun_proto::v1::LinuxPodSandboxConfig {
                    security_context: Some(rrun_proto::v1::LinuxSandboxSecurityContext {
                        namespace_options: Some(options),
                        ..Default::default()
                    }),
                    ..Default::default()
                }),
                ..Default::default()
            }
        };
        assert!(sharing(&config(NamespaceMode::Pod)).is_ok_and(|sharing| sharing.own_users));
        let refused = sharing(&config(NamespaceMode::Node));
        assert!(refused.is_err_and(|error| error.sentence().contains("userns_options")));
    }
}
