//! Which namespaces a pod has of its own.

use rrun_proto::v1::{NamespaceMode, NamespaceOption, PodSandboxConfig};

use super::users;
use rrun_calls::error::{Error, Result};

/// What a pod's namespace options come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sharing {
    /// A network namespace of the pod's own.
    pub own_network: bool,
    pub own_ipc: bool,
    /// A host name of its own; the node's network goes with the node's name.
    pub own_uts: bool,
    /// One PID namespace for all containers that want the pod's.
    pub shared_pid: bool,
    /// A user namespace, which then owns the others.
    pub own_users: bool,
}

/// The pod's options; absent ones are the message's defaults.
pub(crate) fn options(config: &PodSandboxConfig) -> NamespaceOption {
    let context = config
        .linux
        .as_ref()
        .and_then(|linux| linux.security_context.as_ref());
    context
        .and_then(|context| context.namespace_options.clone())
        .unwrap_or_default()
}

/// Reads a pod's options; what makes no sense for a pod is refused.
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
            "the pod's {field} namespace mode is {}, it can be POD or NODE",
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
    // The root of a user namespace has no say over namespaces that are not its own: no /sys, no
    // /dev/mqueue and no /proc could be mounted.
    let nodes = [
        ("network", !sharing.own_network),
        ("IPC", !sharing.own_ipc),
        ("PID", options.pid() == NamespaceMode::Node),
    ];
    if sharing.own_users
        && let Some((field, _)) = nodes.iter().find(|(_, node)| *node)
    {
        return Err(Error::invalid(format!(
            "the pod has a user namespace of its own (userns_options) and the node's {field} namespace, which do not go together"
        )));
    }
    Ok(sharing)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_without_options_has_everything_of_its_own() -> Result<()> {
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
    fn a_user_namespace_and_the_nodes_network_do_not_go_together() {
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
