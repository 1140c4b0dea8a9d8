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
    about: "print what this runtime supports as JSON",
    flags: &[],
    rest_is_foreign: false,
    call: features,
};

fn features(_globals: &Globals, arguments: &Arguments) -> Result<u8> {
    arguments.none()?;
    let capabilities: Vec<String> = capability::all_names().collect();
    let flags = seccomp::FLAGS.iter().map(|(name, _)| *name);
    let supported: Vec<&str> = flags.filter(|name| seccomp::supports(name)).collect();
    // See features-linux.md of the runtime specification.
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
    print(&format!("{text}\n"));
    Ok(0)
}

/// That `create --after` is there, and of which file that is true, as `DEVICE:INODE`: a program of
/// another name that looks into the bundle first and then becomes rrun passes these features on as
/// if they were its own, and must not be started before the bundle is written.
fn own_device_and_inode() -> String {
    rustix::fs::stat("/proc/self/exe").map_or(String::new(), |file| {
        format!("{}:{}", file.st_dev, file.st_ino)
    })
}
