//! The size of a container's configuration, which counts for the limit `pod_configuration_bytes`.
//!
//! Copies of the request are in memory, in the store and in the state directory until the container
//! is removed. config.json, and the state of the runtime that repeats a part of it, also contain what
//! the server adds from the image, the pod and CDI. JSON can be several times longer than the text
//! that it contains.

use prost::Message as _;
use rrun_proto::v1::ContainerConfig;

use super::Container;
use crate::node::Node;
use crate::sandbox::Sandbox;
use rrun_calls::error::{Error, Result};

/// The memory in bytes that each entry of a list needs in addition to its bytes.
const ENTRY_BYTES: usize = 64;

/// The number of bytes of config.json that do not count. What the server itself writes for a
/// container, including the default seccomp profile, is shorter.
const FIXED_BYTES: usize = 16 << 10;

/// Returns the size in bytes of the requested configuration.
pub(super) fn of_request(config: &ContainerConfig) -> usize {
    let entries = config.envs.len()
        + config.command.len()
        + config.args.len()
        + config.mounts.len()
        + config.devices.len()
        + config.cdi_devices.len()
        + config.labels.len()
        + config.annotations.len();
    config.encoded_len() + entries * ENTRY_BYTES
}

/// Returns the size in bytes of the whole configuration. `config_json` is the length of config.json.
pub(super) fn of_container(config: &ContainerConfig, config_json: usize) -> usize {
    of_request(config).max(config_json.saturating_sub(FIXED_BYTES))
}

/// Refuses a container with a configuration of `own` bytes if the configurations of all containers
/// of its pod would be too large.
pub(super) fn check(node: &Node, sandbox: &Sandbox, own: usize) -> Result<()> {
    let others = node.containers_of(&sandbox.id);
    // The record of an older server contains no size.
    let of_other = |other: &Container| other.configuration_bytes.max(of_request(&other.config));
    let others = others.iter().map(|other| of_other(other));
    let (all, limit) = (
        own + others.sum::<usize>(),
        node.config.pod_configuration_bytes.get(),
    );
    if all > limit {
        return Err(Error::invalid(format!(
            "the configurations of all containers of the pod would have {all} bytes, and the limit is {limit} bytes (pod_configuration_bytes)"
        )));
    }
    Ok(())
}
