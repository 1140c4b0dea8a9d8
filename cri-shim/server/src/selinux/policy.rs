//! Reads the labels for containers from the node's SELinux policy, and checks labels against the
//! loaded policy.

use std::io::{Read as _, Write as _};
use std::path::Path;

use super::Labels;
use super::label::Label;
use rrun_calls::error::{During, Error, Result};
use rrun_kernel::errno::describe;

/// The file system type of selinuxfs, linux/magic.h.
const SELINUX_MAGIC: u64 = 0xf97c_ff8c;
const SELINUXFS: &str = "/sys/fs/selinux";
const CONFIG: &str = "/etc/selinux/config";
/// The file with the labels for containers. If this file exists, it is read instead of the policy's
/// own file, as in podman, CRI-O and containerd.
const CONTEXTS: &str = "/usr/share/containers/selinux/contexts";
/// The maximum size in bytes of an SELinux configuration file that the server reads.
const FILE_BYTES: u64 = 1 << 20;

pub(super) struct Policy {
    /// The policy's labels for containers. In a pod's labels, the pod's own level replaces the
    /// policy's level.
    pub labels: Labels,
}

/// Returns whether SELinux is enabled in the kernel and a policy is loaded.
pub(super) fn is_in_kernel() -> bool {
    rustix::fs::statfs(SELINUXFS).is_ok_and(|fs| fs.f_type as u64 == SELINUX_MAGIC)
        && std::fs::read_to_string("/proc/self/attr/current").is_ok_and(|label| label.contains(':'))
}

/// Checks whether a label is valid in the loaded policy. The error text describes the kernel's
/// errno.
pub(super) fn check(label: &Label) -> std::result::Result<(), String> {
    let path = Path::new(SELINUXFS).join("context");
    std::fs::OpenOptions::new()
        .write(true)
        .open(path)
        .and_then(|mut file| file.write_all(label.to_string().as_bytes()))
        .map_err(|error| describe(&error))
}

impl Policy {
    /// Reads the labels for containers from the same files as other container runtimes.
    pub(super) fn read() -> Result<Policy> {
        let mut file = Path::new(CONTEXTS).to_owned();
        let exists = file.try_exists();
        if !exists.during(|| format!("find {}", file.display()))? {
            let kind = value(&text(Path::new(CONFIG))?, "SELINUXTYPE").unwrap_or_default();
            file = Path::new("/etc/selinux")
                .join(kind)
                .join("contexts/lxc_contexts");
        }
        let text = text(&file)?;
        let label = |key: &str| -> Result<Label> {
            let found = value(&text, key).ok_or_else(|| {
                Error::internal(format!(
                    "enable_selinux is set, but {} contains no label for containers ({key})",
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
                "read the SELinux policy's file {} (enable_selinux)",
                path.display()
            )
        })?;
    Ok(text)
}

/// Returns the value of the line `key = "value"`. The blanks and the quotes are optional. Lines
/// that begin with # or ; are comments.
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
    fn values_are_read_in_all_forms_that_policies_use() {
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
