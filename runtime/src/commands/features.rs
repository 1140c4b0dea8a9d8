use serde_json::json;

use crate::arguments::Arguments;
use crate::commands::globals::{Command, Globals, print};
use crate::config::spec::OCI_VERSION;
use crate::error::{Error, Result};
use crate::mounts::options;
use crate::process::memory_policy;
use crate::{cgroup, namespaces, seccomp};
use rrun_kernel::capability;

pub(crate) const COMMAND: Command = Command {
    name: "features",
    usage: "",
    about: "print the features of this runtime as JSON",
    flags: &[],
    rest_is_foreign: false,
    call: features,
};

fn features(_globals: &Globals, arguments: &Arguments) -> Result<u8> {
    arguments.check_only_flags()?;
    let capabilities: Vec<String> = capability::all_names().collect();
    let flags = seccomp::FLAGS.iter().map(|(name, _)| *name);
    let supported: Vec<&str> = flags.filter(|name| seccomp::supports(name)).collect();
    // features-linux.md of the runtime specification defines the following fields.
    let features = json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": OCI_VERSION,
        "hooks": [
            "prestart", "createRuntime", "createContainer", "startContainer", "poststart",
            "poststop",
        ],
        "mountOptions": options::known(),
        "linux": {
            "namespaces": namespaces::TYPES.map(|(_, name)| name),
            "capabilities": capabilities,
            "cgroup": {
                "v1": false, "v2": true, "systemd": true, "systemdUser": true, "rdma": true,
            },
            "seccomp": {
                "enabled": true,
                "actions": seccomp::ACTIONS.map(|(name, _)| name),
                "operators": seccomp::OPERATORS,
                "archs": seccomp::architecture::NAMES,
                "knownFlags": seccomp::FLAGS.map(|(name, _)| name),
                "supportedFlags": supported,
            },
            "apparmor": { "enabled": true },
            "selinux": { "enabled": true },
            "intelRdt": { "enabled": true, "schemata": true, "monitoring": true },
            "memoryPolicy": {
                "modes": memory_policy::MODES.map(|(name, _)| name),
                "flags": memory_policy::FLAGS.map(|(name, _)| name),
            },
            "mountExtensions": { "idmap": { "enabled": true } },
            "netDevices": { "enabled": true },
        },
        "potentiallyUnsafeConfigAnnotations": [cgroup::ANNOTATION],
        "annotations": {
            "io.rrun.version": env!("CARGO_PKG_VERSION"),
            "io.rrun.create.after": own_device_and_inode(),
        },
    });
    let text = serde_json::to_string_pretty(&features)
        .map_err(|error| Error::new(format!("print the features: {error}")))?;
    print(&format!("{text}\n"))?;
    Ok(0)
}

/// Returns the device and the inode of rrun's executable as `DEVICE:INODE`. If a wrapper program
/// executes rrun, `features` prints the numbers of rrun's executable, not the numbers of the
/// wrapper's file. rrun's caller compares the printed numbers with the numbers of the file that it
/// executes. If they differ, the file is a wrapper.
///
/// Only rrun itself supports `create --after`. A wrapper can read the bundle before it executes
/// rrun. So rrun's caller must write the bundle before it starts the wrapper.
fn own_device_and_inode() -> String {
    rustix::fs::stat("/proc/self/exe").map_or(String::new(), |file| {
        format!("{}:{}", file.st_dev, file.st_ino)
    })
}
