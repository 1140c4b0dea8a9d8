//! Fuzz targets for the CRI's messages, for files of images and devices, and for the records in the
//! store. `tests/fuzz` runs them.

use std::path::Path;

use rrun_images::ImageConfig;
use rrun_proto::Message;
use rrun_proto::v1::{ContainerConfig, LinuxContainerSecurityContext, PodSandboxConfig};

use crate::cgroup::{self, CgroupDriver};
use crate::container::fuzz::{config_json, device_file, record};
use crate::container::user::Accounts;
use crate::sandbox::namespaces::sharing;
use crate::sandbox::{files, sysctl, users};

/// The name and the function of a fuzz target.
pub type FuzzTarget = (&'static str, fn(&[u8]));

/// The fuzz targets in this crate.
pub const TARGETS: &[FuzzTarget] = &[
    ("accounts", accounts),
    ("cdi", device_file),
    ("pod-request", pod_request),
    ("store-record", record),
];

/// Returns the config.json for the request that `input` encodes, or `None` if the server refuses
/// the request.
pub fn container_request(input: &[u8]) -> Option<String> {
    let config = ContainerConfig::decode(input).ok()?;
    config_json(&config, &ImageConfig::default())
}

/// Resolves a user. The parts of `input` are separated by the byte 1: the image's user, passwd,
/// group, and the requested user.
fn accounts(input: &[u8]) {
    let mut parts = input.splitn(4, |byte| *byte == 1).map(<[u8]>::to_vec);
    let mut next = || parts.next().unwrap_or_default();
    let (image_user, accounts) = (next(), Accounts::of_files(next(), next()));
    let context = LinuxContainerSecurityContext {
        run_as_username: String::from_utf8_lossy(&next()).into_owned(),
        ..Default::default()
    };
    let image_user = String::from_utf8_lossy(&image_user);
    if let Ok(user) = accounts.resolve(Some(&context), &image_user) {
        // The kernel interprets this id as "no change", so the process would stay root.
        assert!(user.uid != u32::MAX && !user.groups.contains(&u32::MAX));
        assert_eq!(user.groups.first(), Some(&user.gid));
    }
}

/// Checks a pod's configuration, and builds the files that the configuration determines.
fn pod_request(input: &[u8]) {
    let Ok(config) = PodSandboxConfig::decode(input) else {
        return;
    };
    if let Ok(sharing) = sharing(&config) {
        let _ = sysctl::check_sysctls(&config, sharing);
    }
    let _ = users::mappings(&config);
    if let Some(linux) = &config.linux {
        for driver in [CgroupDriver::Cgroupfs, CgroupDriver::Systemd] {
            if let Ok(path) = cgroup::of_pod(driver, &linux.cgroup_parent) {
                assert!(
                    !Path::new(&path)
                        .components()
                        .any(|part| part.as_os_str() == "..")
                );
            }
        }
    }
    if let Some(dns) = &config.dns_config
        && files::check_dns(dns).is_ok()
        && *dns != Default::default()
    {
        let text = files::resolv_conf(Some(dns));
        let lines = usize::from(!dns.searches.is_empty())
            + usize::from(!dns.options.is_empty())
            + dns.servers.len();
        assert_eq!(text.lines().count(), lines);
    }
}
