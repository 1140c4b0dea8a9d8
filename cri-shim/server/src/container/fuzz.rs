//! The parts of the fuzz targets that need a container's modules.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::path::Path;

use rrun_images::ImageConfig;
use rrun_kernel::capability::Capability;
use rrun_proto::v1::ContainerConfig;

use super::devices::Devices;
use super::spec::{Namespaces, SpecInputs, check, context, spec};
use super::user::User;
use super::{ContainerRecord, capabilities, cdi, mounts, resources};
use crate::handlers::Features;
use crate::sandbox::SandboxRecord;

/// Parses a CDI file as YAML and as JSON.
pub(crate) fn device_file(input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    for is_json in [false, true] {
        if let Err(sentence) = cdi::check_file(&text, is_json) {
            assert!((3..20_000).contains(&sentence.len()), "{sentence}");
        }
    }
}

/// Parses the record of a pod and the record of a container.
pub(crate) fn record(input: &[u8]) {
    if let Ok(record) = serde_json::from_slice::<ContainerRecord>(input) {
        let text = serde_json::to_vec(&record).unwrap();
        serde_json::from_slice::<ContainerRecord>(&text).unwrap();
    }
    let _ = serde_json::from_slice::<SandboxRecord>(input);
}

/// Returns the config.json of a container, or `None` if the server refuses the request.
pub(crate) fn config_json(config: &ContainerConfig, image: &ImageConfig) -> Option<String> {
    check(config).ok()?;
    let context = context(config);
    let privileged = context.privileged;
    let inputs = mounts::MountInputs {
        pod: Path::new("/p"),
        etc: Path::new("/p/etc"),
        privileged,
        readonly_rootfs: context.readonly_rootfs,
        own_ipc: true,
        terminals: NonZeroU32::MIN,
        features: Features::default(),
    };
    let linux = config.linux.clone().unwrap_or_default();
    let limits = linux.resources.unwrap_or_default();
    let own = Capability::CAP_CHOWN.bitmask();
    let requested = context.capabilities.as_ref();
    let made = spec(SpecInputs {
        config,
        image,
        user: &User::default(),
        hostname: "pod",
        rootfs: Path::new("rootfs"),
        cgroup: "/kubepods/p/c",
        namespaces: Namespaces::default(),
        capabilities: capabilities::sets(requested, privileged, own).ok()?,
        devices: Devices::default(),
        mounts: mounts::mounts(&config.mounts, &inputs).ok()?,
        root_propagation: None,
        resources: resources::limits(&limits, resources::Controllers::default()).ok()?,
        oom_score_adj: limits.oom_score_adj,
        seccomp: None,
        rlimits: &[],
        annotations: BTreeMap::new(),
        apparmor: None,
        selinux: None,
    });
    made.ok()?.text().ok()
}
