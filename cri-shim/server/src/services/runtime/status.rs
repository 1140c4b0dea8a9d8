//! The method Status, which reports whether pods can be created, and the features of the runtime
//! handlers.

use std::collections::BTreeMap;
use std::path::Path;

use rrun_proto::v1::{
    RuntimeCondition, RuntimeFeatures, RuntimeHandler, RuntimeHandlerFeatures, RuntimeStatus,
    StatusResponse,
};
use serde_json::{Value, json};

use crate::config::Config;
use crate::node::Node;
use rrun_calls::wait::slow;

/// Returns the response of the method Status.
pub(super) async fn status(node: &Node, verbose: bool) -> StatusResponse {
    let condition = |kind: &str, trouble: Option<(&str, String)>| {
        let (reason, message) = trouble.clone().unwrap_or_default();
        RuntimeCondition {
            r#type: kind.to_owned(),
            status: trouble.is_none(),
            reason: reason.to_owned(),
            message,
        }
    };
    let network = slow("check the state of the pods' network", node.network.ready()).await;
    let network = network.err().map(|why| ("NetworkPluginNotReady", why));
    let mut response = StatusResponse {
        status: Some(RuntimeStatus {
            conditions: vec![
                condition("RuntimeReady", essentials_missing(&node.config)),
                condition("NetworkReady", network),
                condition("RuntimeHandlersReady", other_runtimes_missing(&node.config)),
            ],
        }),
        info: BTreeMap::new(),
        runtime_handlers: handlers(node).await,
        features: Some(RuntimeFeatures {
            supplemental_groups_policy: true,
            user_namespaces_host_network: false,
        }),
    };
    if verbose {
        let shown = shown_config(node).to_string();
        response.info.insert("config".to_owned(), shown);
        response.info.extend(node.network.status_info().await);
    }
    response
}

/// Returns the values that `crictl info` shows under `config`.
fn shown_config(node: &Node) -> Value {
    let config = &node.config;
    json!({
        "root": config.root,
        "state": config.state,
        // Clients read the key `stateDir` to find this directory and to check the features of its
        // file system. containerd has the same key.
        "stateDir": config.state,
        "monitor": config.monitor,
        "defaultRuntime": config.default_runtime,
        "runtimes": config.runtimes.iter().map(|(name, handler)| (name.clone(), json!({
            "path": handler.path, "options": handler.options,
        }))).collect::<BTreeMap<_, _>>(),
        "restrictOomScoreAdj": config.restrict_oom_score_adj,
        "enableSelinux": config.enable_selinux,
        "unsetSeccompProfile": config.unset_seccomp_profile,
        // Kernels without seccomp do not have this file (seccomp(2), section "/proc interfaces").
        "seccomp": Path::new("/proc/sys/kernel/seccomp/actions_avail").exists(),
        "pods": node.sandboxes().len(),
        "containers": node.containers().len(),
    })
}

/// Returns an error if the default runtime or the monitor is missing. Pods cannot be created
/// without the default runtime and the monitor.
fn essentials_missing(config: &Config) -> Option<(&'static str, String)> {
    let runtime = config.runtime("").and_then(|runtime| runtime.missing());
    Some((
        "RuntimeMissing",
        runtime.or_else(|| config.monitor_missing())?,
    ))
}

/// Returns an error that lists the runtimes that do not exist, or `None` if all runtimes exist.
/// Pods that choose an existing runtime can still be created.
fn other_runtimes_missing(config: &Config) -> Option<(&'static str, String)> {
    let runtimes = config.runtimes.iter();
    let missing: Vec<String> = runtimes
        .filter_map(|(name, handler)| Some(format!("{name}: {}", handler.missing()?)))
        .collect();
    (!missing.is_empty()).then(|| ("RuntimeMissing", missing.join("; ")))
}

/// Lists every handler. The default handler is also listed with an empty name.
async fn handlers(node: &Node) -> Vec<RuntimeHandler> {
    let config = &node.config;
    let users = node.handlers.users(config).await;
    let mut handlers = Vec::new();
    for name in std::iter::once("").chain(config.runtimes.keys().map(String::as_str)) {
        let features = node.handlers.features(config, name).await;
        handlers.push(RuntimeHandler {
            name: name.to_owned(),
            features: Some(RuntimeHandlerFeatures {
                recursive_read_only_mounts: features.recursive_read_only,
                user_namespaces: users && features.users && features.mapped_mounts,
            }),
        });
    }
    handlers
}
