//! The files that define devices, read anew whenever a container asks for one: vendors' services
//! write them as devices come and go.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use serde::Deserialize;
use serde_json::Value;

use super::{Edits, yaml};
use rrun_calls::error::{Error, Result};
use rrun_kernel::regular_file;

/// The most bytes that are read of one file, and files of one directory.
const SIZE: u64 = 4 << 20;
const FILES: usize = 1000;

/// Hooks that there are; the specification's names.
const HOOKS: [&str; 6] = [
    "prestart",
    "createRuntime",
    "createContainer",
    "startContainer",
    "poststart",
    "poststop",
];

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Spec {
    cdi_version: String,
    kind: String,
    #[serde(default, rename = "annotations")]
    _annotations: Value,
    devices: Vec<SpecDevice>,
    #[serde(default)]
    container_edits: Edits,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct SpecDevice {
    name: String,
    #[serde(default, rename = "annotations")]
    _annotations: Value,
    container_edits: Edits,
}

/// A device as its file has it.
pub(super) struct Device {
    /// A number for the file.
    pub file: usize,
    pub path: PathBuf,
    /// The edits for every device of the file, and those for this one.
    pub of_all: Edits,
    pub own: Edits,
    /// Which directory: the higher wins.
    weight: usize,
    /// Another file of the same directory that defines it, too.
    conflict: Option<PathBuf>,
}

#[derive(Default)]
pub(super) struct Registry {
    dirs: Vec<PathBuf>,
    devices: BTreeMap<String, Device>,
    /// Files that could not be understood, and why.
    broken: Vec<String>,
}

impl Registry {
    /// Reads the directories, the weightiest last. What is wrong with a file concerns those who ask
    /// for a device that is not there.
    pub(super) fn read(dirs: &[PathBuf]) -> Self {
        let mut registry = Registry {
            dirs: dirs.to_vec(),
            ..Registry::default()
        };
        let mut number = 0;
        for (weight, dir) in dirs.iter().enumerate() {
            for path in files(dir) {
                number += 1;
                match read(&path) {
                    Ok(spec) => registry.add(spec, number, weight, &path),
                    Err(why) => registry.broken.push(format!("{}: {why}", path.display())),
                }
            }
        }
        registry
    }

    fn add(&mut self, spec: Spec, file: usize, weight: usize, path: &Path) {
        for device in spec.devices {
            let name = format!("{}={}", spec.kind, device.name);
            match self.devices.get_mut(&name) {
                Some(there) if there.weight == weight => {
                    there.conflict = Some(path.to_owned());
                    continue;
                }
                _ => {}
            }
            let device = Device {
                file,
                path: path.to_owned(),
                of_all: spec.container_edits.clone(),
                own: device.container_edits,
                weight,
                conflict: None,
            };
            self.devices.insert(name, device);
        }
    }

    /// The device of this name, `vendor/class=name`.
    pub(super) fn device(&self, name: &str) -> Result<&Device> {
        if !is_qualified(name) {
            return Err(Error::invalid(format!(
                "the CDI device {name:?} is not named VENDOR/CLASS=NAME"
            )));
        }
        match self.devices.get(name) {
            Some(Device {
                path,
                conflict: Some(other),
                ..
            }) => Err(Error::invalid(format!(
                "the CDI device {name:?} is defined twice, in {} and in {}",
                path.display(),
                other.display()
            ))),
            Some(device) => Ok(device),
            None => {
                let dirs: Vec<String> = self.dirs.iter().map(|d| d.display().to_string()).collect();
                let mut sentence = match dirs.is_empty() {
                    true => format!(
                        "there is no CDI device {name:?}: no directories are configured (cdi_spec_dirs)"
                    ),
                    false => format!("there is no CDI device {name:?} in {}", dirs.join(" or ")),
                };
                for broken in self.broken.iter().take(3) {
                    sentence.push_str("; ");
                    sentence.push_str(broken);
                }
                Err(Error::invalid(sentence))
            }
        }
    }
}

/// The files of a directory in the order of their names; a missing one has none.
fn files(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return Vec::new();
    };
    let is_spec = |path: &PathBuf| {
        let kind = path.extension().and_then(|kind| kind.to_str());
        matches!(kind, Some("json" | "yaml"))
    };
    let mut files: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(is_spec)
        .take(FILES)
        .collect();
    files.sort();
    files
}

fn read(path: &Path) -> Result<Spec, String> {
    let text = regular_file::open(path, OFlags::RDONLY)
        .and_then(|file| regular_file::read(file, SIZE))
        .map_err(|unfit| unfit.to_string())?;
    let text = String::from_utf8(text).map_err(|error| error.to_string())?;
    let value = match path.extension().is_some_and(|kind| kind == "json") {
        true => serde_json::from_str(&text).map_err(|error| error.to_string())?,
        false => yaml::parse(&text)?,
    };
    let spec: Spec = serde_json::from_value(value).map_err(|error| error.to_string())?;
    check(&spec)?;
    Ok(spec)
}

fn check(spec: &Spec) -> Result<(), String> {
    let version = spec.cdi_version.trim_start_matches('v');
    if !version.starts_with("0.") && !version.starts_with("1.") {
        return Err(format!("cdiVersion {version:?} is not known"));
    }
    if !is_kind(&spec.kind) {
        return Err(format!("kind {:?} is not VENDOR/CLASS", spec.kind));
    }
    check_edits(&spec.container_edits)?;
    for (at, device) in spec.devices.iter().enumerate() {
        if !is_name(&device.name) {
            return Err(format!("{:?} is no name of a device", device.name));
        }
        if spec
            .devices
            .iter()
            .skip(at + 1)
            .any(|other| other.name == device.name)
        {
            return Err(format!("the device {:?} is there twice", device.name));
        }
        check_edits(&device.container_edits)
            .map_err(|why| format!("the device {:?}: {why}", device.name))?;
    }
    Ok(())
}

fn check_edits(edits: &Edits) -> Result<(), String> {
    let absolute = |field: &str, path: &Path| match path.is_absolute() {
        true => Ok(()),
        false => Err(format!(
            "{field} {} is not an absolute path",
            path.display()
        )),
    };
    if let Some(pair) = edits
        .env
        .iter()
        .find(|pair| !pair.contains('=') || pair.starts_with('='))
    {
        return Err(format!("env {pair:?} is not NAME=value"));
    }
    for node in &edits.device_nodes {
        absolute("deviceNodes.path", &node.path)?;
        let kind = node.r#type.as_deref();
        if !matches!(kind, None | Some("b" | "c" | "u" | "p")) {
            return Err(format!("deviceNodes.type {kind:?} is not b, c, u or p"));
        }
        let permissions = node.permissions.as_deref().unwrap_or_default();
        if permissions.chars().any(|c| !"rwm".contains(c)) {
            return Err(format!(
                "deviceNodes.permissions {permissions:?} are not of r, w and m"
            ));
        }
    }
    for mount in &edits.mounts {
        absolute("mounts.containerPath", &mount.container_path)?;
    }
    for hook in &edits.hooks {
        absolute("hooks.path", &hook.path)?;
        if !HOOKS.contains(&hook.hook_name.as_str()) {
            return Err(format!("hooks.hookName {:?} is no hook", hook.hook_name));
        }
    }
    Ok(())
}

fn is_qualified(name: &str) -> bool {
    let parts = name.split_once('=');
    parts.is_some_and(|(kind, name)| is_kind(kind) && is_name(name))
}

fn is_kind(kind: &str) -> bool {
    let word = |word: &str, also: &[char]| {
        word.starts_with(|c: char| c.is_ascii_alphabetic())
            && word.ends_with(|c: char| c.is_ascii_alphanumeric())
            && word
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || also.contains(&c))
    };
    let parts = kind.split_once('/');
    parts.is_some_and(|(vendor, class)| {
        word(vendor, &['-', '_', '.']) && word(class, &['-', '_', '.'])
    })
}

fn is_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.ends_with(|c: char| c.is_ascii_alphanumeric())
        && name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "-_.:".contains(c))
}
