//! Creates the bundles of the measured containers: the output of `runc spec` with as few changes as
//! possible.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::ValueEnum;
use serde_json::{Map, Value, json};

use crate::Result;

/// A copy of rrun-cri's default seccomp profile. A test of rrun-cri checks that the copy is equal
/// to the original.
const SECCOMP: &str = include_str!("../seccomp/default.json");

/// The configuration of the measured containers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Variant {
    /// The output of `runc spec` without its device rules and without a seccomp profile
    Plain,
    /// The output of `runc spec` with its device rules, which become an eBPF program
    Devices,
    /// The plain configuration in a user namespace
    Userns,
    /// The plain configuration with rrun-cri's default seccomp profile, which is similar to
    /// Docker's
    Seccomp,
}

/// Creates a bundle whose container runs `/bin/nothing ARGUMENTS`.
pub(crate) fn make(
    directory: &Path,
    nothing: &Path,
    arguments: &[&str],
    variant: Variant,
) -> Result<PathBuf> {
    let rootfs = directory.join("rootfs");
    for dir in ["bin", "dev", "etc", "proc", "sys", "tmp"] {
        fs::create_dir_all(rootfs.join(dir))?;
    }
    let program = rootfs.join("bin/nothing");
    fs::copy(nothing, &program).map_err(|error| format!("{}: {error}", nothing.display()))?;
    let config = directory.join("config.json");
    let _ = fs::remove_file(&config);
    let output = Command::new("runc")
        .arg("spec")
        .current_dir(directory)
        .output()
        .map_err(|error| format!("cannot start `runc spec`: {error}"))?;
    if !output.status.success() {
        return Err(format!(
            "`runc spec` failed; its error output: {}",
            String::from_utf8_lossy(&output.stderr)
        )
        .into());
    }
    let mut spec: Value = serde_json::from_slice(&fs::read(&config)?)?;
    change(&mut spec, arguments, variant);
    fs::write(&config, serde_json::to_vec_pretty(&spec)?)?;
    Ok(directory.to_owned())
}

fn change(spec: &mut Value, arguments: &[&str], variant: Variant) {
    let mut args = vec!["/bin/nothing"];
    args.extend(arguments);
    if let Some(process) = object(spec, "process") {
        process.insert("args".to_owned(), json!(args));
        process.insert("terminal".to_owned(), json!(false));
    }
    let Some(linux) = object(spec, "linux") else {
        return;
    };
    linux.remove("seccomp");
    if variant != Variant::Devices {
        linux.remove("resources");
    }
    match variant {
        Variant::Plain | Variant::Devices => {}
        Variant::Userns => {
            let map = json!([{ "containerID": 0, "hostID": 100_000, "size": 65_536 }]);
            linux.insert("uidMappings".to_owned(), map.clone());
            linux.insert("gidMappings".to_owned(), map);
            if let Some(namespaces) = linux.get_mut("namespaces").and_then(Value::as_array_mut) {
                namespaces.push(json!({ "type": "user" }));
            }
        }
        Variant::Seccomp => {
            let filter = serde_json::from_str(SECCOMP).unwrap_or_default();
            linux.insert("seccomp".to_owned(), filter);
        }
    }
}

fn object<'a>(value: &'a mut Value, name: &str) -> Option<&'a mut Map<String, Value>> {
    value.get_mut(name).and_then(Value::as_object_mut)
}
