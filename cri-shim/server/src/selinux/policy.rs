//! What the node's policy says of containers, and what its kernel takes for a label.

use std::io::{Read as _, Write as _};
use std::path::Path;

use super::Labels;
use super::label::Label;
use rrun_calls::error::{During, Error, Result};
use rrun_kernel::errno::describe;

/// linux/magic.h
const SELINUX_MAGIC: u64 = 0xf97c_ff8c;
const SELINUXFS: &str = "/sys/fs/selinux";
const CONFIG: &str = "/etc/selinux/config";
/// Comes before the policy's own, as for podman, CRI-O and containerd.
const CONTEXTS: &str = "/usr/share/containers/selinux/contexts";
/// Of a file of the node's.
const FILE_BYTES: u64 = 1 << 20;

pub(super) struct Policy {
    /// Of a container, before it is told apart from the others.
    pub labels: Labels,
}

/// Whether the kernel has SELinux on and a policy loaded.
pub(super) fn is_in_kernel() -> bool {
    rustix::fs::statfs(SELINUXFS).is_ok_and(|fs| fs.f_type as u64 == SELINUX_MAGIC)
        && std::fs::read_to_string("/proc/self/attr/current").is_ok_and(|label| label.contains(':'))
}

/// Whether the loaded policy knows the label; else what the kernel says.
pub(super) fn check(label: &Label) -> std::result::Result<(), String> {
    let path = Path::new(SELINUXFS).join("context");
    std::fs::OpenOptions::new()
        .write(true)
        .open(path)
        .and_then(|mut file| file.write_all(label.to_string().as_bytes()))
        .map_err(|error| describe(&error))
}

impl Policy {
    /// Reads the labels of containers from where other runtimes have them.
    pub(super) fn read() -> Result<Policy> {
        let mut file = Path::new(CONTEXTS).to_owned();
        if !file.exists() {
            let kind = value(&text(Path::new(CONFIG))?, "SELINUXTYPE").unwrap_or_default();
            file = Path::new("/etc/selinux")
                .join(kind)
                .join("contexts/lxc_contexts");
        }
        let text = text(&file)?;
        let label = |key: &str| -> Result<Label> {
            let found = value(&text, key).ok_or_else(|| {
                Error::internal(format!(
                    "enable_selinux is set, and {} has no label for containers ({key})",
                    file.display()
                ))
            })?;
            let label: Result<Label> = found.parse();
            label.during(|| format!("{}, {key}", file.display()))
        };
        Ok(Policy {
            labels: Labels {
                process: label("process")?,
                files: label("file")?,
            },
        })
    }
}

fn text(path: &Path) -> Result<String> {
    let mut text = String::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(FILE_BYTES).read_to_string(&mut text))
        .during(|| {
            format!(
                "read the SELinux policy's {} (enable_selinux)",
                path.display()
            )
        })?;
    Ok(text)
}

/// Of `key = "value"`, with or without blanks and quotes; comments begin with # or ;.
fn value(text: &str, key: &str) -> Option<String> {
    let lines = text.lines().map(str::trim);
    lines
        .filter(|line| !line.starts_with(['#', ';']))
        .filter_map(|line| line.split_once('='))
        .find(|(name, _)| name.trim() == key)
        .map(|(_, value)| value.trim().trim_matches('"').to_owned())
        .filter(|value| !value.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_read_as_policies_write_them() {
        let text = "# process = \"a\"\n;process=b\n\nprocess = \"u:r:t:s0\"\nfile=u:o:f:s0\nro_file = \"\"\nSELINUXTYPE=targeted \n";
        let is = |key: &str, expected: Option<&str>| {
            assert_eq!(value(text, key).as_deref(), expected, "{key}");
        };
        is("process", Some("u:r:t:s0"));
        is("file", Some("u:o:f:s0"));
        is("SELINUXTYPE", Some("targeted"));
        is("ro_file", None);
        is("sandbox", None);
    }
}
