//! The files that define CDI devices. The server reads the files again for every container that
//! requests a device. Vendors' services rewrite the files when devices appear or disappear.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::OFlags;

use super::spec_file::{ContainerEdits, FILE_BYTES, SpecFile, is_qualified};
use rrun_calls::error::{Error, Result};
use rrun_kernel::regular_file;

/// The maximum number of CDI files that the server reads in one directory.
const MAX_FILES: usize = 1000;

/// A device that a CDI file defines.
pub(super) struct RegisteredDevice {
    /// The number of the device's CDI file. All devices of a file have the same number.
    pub file: usize,
    pub path: PathBuf,
    /// The edits that the CDI file defines for all its devices.
    pub shared_edits: Arc<ContainerEdits>,
    /// The edits that the CDI file defines for this device only.
    pub own_edits: Arc<ContainerEdits>,
    /// The index of the file's directory in the configured list of CDI directories. If several
    /// directories define the same device, the definition with the highest index is used.
    weight: usize,
    /// Another CDI file in the same directory that defines the same device. If such a file exists,
    /// a request for the device fails.
    conflict: Option<PathBuf>,
}

#[derive(Default)]
pub(super) struct Registry {
    dirs: Vec<PathBuf>,
    devices: BTreeMap<String, RegisteredDevice>,
    /// The error messages for unreadable and invalid CDI files.
    broken: Vec<String>,
}

impl Registry {
    /// Reads the CDI directories, in order of increasing priority. Unreadable and invalid CDI files
    /// are reported only if a requested device is not found.
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

    fn add(&mut self, spec: SpecFile, file: usize, weight: usize, path: &Path) {
        let shared_edits = Arc::new(spec.container_edits);
        for device in spec.devices {
            let name = format!("{}={}", spec.kind, device.name);
            match self.devices.get_mut(&name) {
                Some(existing) if existing.weight == weight => {
                    existing.conflict = Some(path.to_owned());
                    continue;
                }
                _ => {}
            }
            let device = RegisteredDevice {
                file,
                path: path.to_owned(),
                shared_edits: Arc::clone(&shared_edits),
                own_edits: Arc::new(device.container_edits),
                weight,
                conflict: None,
            };
            self.devices.insert(name, device);
        }
    }

    /// Returns the device `name`, a text of the form `vendor/class=name`.
    pub(super) fn device(&self, name: &str) -> Result<&RegisteredDevice> {
        if !is_qualified(name) {
            return Err(Error::invalid(format!(
                "the CDI device name {name:?} does not have the form VENDOR/CLASS=NAME"
            )));
        }
        match self.devices.get(name) {
            Some(RegisteredDevice {
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
                let mut sentence = if dirs.is_empty() {
                    format!(
                        "there is no CDI device {name:?}: no directories are configured (cdi_spec_dirs)"
                    )
                } else {
                    format!("there is no CDI device {name:?} in {}", dirs.join(" or "))
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

/// Returns the specification files of a directory in the order of their names. If the directory
/// does not exist, the list is empty.
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
        .take(MAX_FILES)
        .collect();
    files.sort();
    files
}

fn read(path: &Path) -> Result<SpecFile, String> {
    let text = regular_file::open(path, OFlags::RDONLY)
        .and_then(|file| regular_file::read(file, FILE_BYTES as u64))
        .map_err(|unfit| unfit.to_string())?;
    let text = String::from_utf8(text).map_err(|error| error.to_string())?;
    let is_json = path.extension().is_some_and(|kind| kind == "json");
    SpecFile::parse(&text, is_json)
}
