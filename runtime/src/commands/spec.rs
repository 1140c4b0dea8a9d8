use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use serde_json::{Value, json};

use crate::arguments::{Arguments, switch, value};
use crate::commands::globals::{Command, Globals, bundle};
use crate::config::spec::OCI_VERSION;
use crate::error::{Context, Error, Result, refuse};

pub(crate) const COMMAND: Command = Command {
    name: "spec",
    usage: "[options]",
    about: "write an example config.json",
    flags: &[
        value(
            "bundle",
            Some('b'),
            "directory in which config.json is created (default: the working directory)",
        ),
        switch(
            "rootless",
            None,
            "write a configuration with a user namespace, for users other than root",
        ),
    ],
    rest_is_foreign: false,
    call: spec,
};

fn spec(_globals: &Globals, arguments: &Arguments) -> Result<u8> {
    arguments.check_only_flags()?;
    let path = bundle(arguments).join("config.json");
    let mut spec = example();
    if arguments.is_set("rootless") {
        make_rootless(&mut spec);
    }
    let mut text = serde_json::to_string_pretty(&spec)
        .map_err(|error| Error::new(format!("write {}: {error}", path.display())))?;
    text.push('\n');
    write_new(&path, text.as_bytes())?;
    Ok(0)
}

fn write_new(path: &Path, content: &[u8]) -> Result<()> {
    let doing = || format!("write {}", path.display());
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let file = match rustix::fs::open(path, flags, Mode::from_raw_mode(0o666)) {
        Err(Errno::EXIST) => refuse!("{} already exists; remove it first", path.display()),
        result => result.doing(doing)?,
    };
    let written = std::io::Write::write_all(&mut std::fs::File::from(file), content);
    if written.is_err() {
        let _ = rustix::fs::unlink(path);
    }
    written.doing(doing)
}

/// Returns a configuration that suits most containers: all namespaces except a user namespace, the
/// usual mounts, three capabilities, and a shell on the terminal.
fn example() -> Value {
    let capabilities = json!(["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]);
    let mount = |destination: &str, typ: &str, source: &str, options: &[&str]| json!({ "destination": destination, "type": typ, "source": source, "options": options });
    json!({
        "ociVersion": OCI_VERSION,
        "process": {
            "terminal": true,
            "user": { "uid": 0, "gid": 0 },
            "args": ["sh"],
            "env": [
                "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                "TERM=xterm",
            ],
            "cwd": "/",
            "capabilities": {
                "bounding": capabilities,
                "effective": capabilities,
                "permitted": capabilities,
            },
            "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024 }],
            "noNewPrivileges": true,
        },
        "root": { "path": "rootfs", "readonly": true },
        "hostname": "rrun",
        "mounts": [
            json!({ "destination": "/proc", "type": "proc", "source": "proc" }),
            mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount("/dev/pts", "devpts", "devpts", &[
                "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5",
            ]),
            mount("/dev/shm", "tmpfs", "shm", &[
                "nosuid", "noexec", "nodev", "mode=1777", "size=65536k",
            ]),
            mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
            mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
            mount("/sys/fs/cgroup", "cgroup", "cgroup", &[
                "nosuid", "noexec", "nodev", "relatime", "ro",
            ]),
        ],
        "linux": {
            "resources": { "devices": [{ "allow": false, "access": "rwm" }] },
            "namespaces": [
                { "type": "pid" }, { "type": "network" }, { "type": "ipc" }, { "type": "uts" },
                { "type": "mount" }, { "type": "cgroup" },
            ],
            "maskedPaths": [
                "/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys",
                "/proc/latency_stats", "/proc/timer_list", "/proc/timer_stats",
                "/proc/sched_debug", "/sys/firmware", "/proc/scsi",
            ],
            "readonlyPaths": [
                "/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger",
            ],
        },
    })
}

fn make_rootless(spec: &mut Value) {
    let (uid, gid) = (
        rustix::process::geteuid().as_raw(),
        rustix::process::getegid().as_raw(),
    );
    let linux = &mut spec["linux"];
    if let Some(namespaces) = linux["namespaces"].as_array_mut() {
        namespaces.retain(|namespace| namespace["type"] != "network");
        namespaces.push(json!({ "type": "user" }));
    }
    linux["uidMappings"] = json!([{ "containerID": 0, "hostID": uid, "size": 1 }]);
    linux["gidMappings"] = json!([{ "containerID": 0, "hostID": gid, "size": 1 }]);
    if let Some(linux) = linux.as_object_mut() {
        linux.remove("resources");
    }
    for mount in spec["mounts"].as_array_mut().into_iter().flatten() {
        if mount["destination"] == "/sys" {
            // Mounting a new sysfs requires privileges over the network namespace. A rootless
            // container shares the host's network namespace, so it gets a bind mount of the host's
            // /sys.
            *mount = json!({
                "destination": "/sys", "type": "none", "source": "/sys",
                "options": ["rbind", "nosuid", "noexec", "nodev", "ro"],
            });
        }
        if let Some(options) = mount.get_mut("options").and_then(Value::as_array_mut) {
            options.retain(|option| {
                !option
                    .as_str()
                    .is_some_and(|text| text.starts_with("gid=") || text.starts_with("uid="))
            });
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_example_is_a_valid_configuration() {
        let mut value = super::example();
        serde_json::from_value::<crate::config::spec::Spec>(value.clone()).unwrap();
        super::make_rootless(&mut value);
        assert!(!value.to_string().contains("null"), "{value}");
        let spec: crate::config::spec::Spec = serde_json::from_value(value).unwrap();
        assert!(spec.linux.unwrap().uid_mappings.is_some());
    }
}
