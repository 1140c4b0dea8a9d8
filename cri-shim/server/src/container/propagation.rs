//! Checks whether a mount's source supports the requested mount propagation, mount_namespaces(7).

use std::collections::HashMap;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rrun_proto::v1::{Mount, MountPropagation};

use rrun_calls::error::{During, Error, Result};

/// One line of proc_pid_mountinfo(5).
struct MountInfoLine<'a> {
    point: PathBuf,
    /// The optional fields of the line, such as `shared:N` and `master:N`.
    fields: Vec<&'a str>,
}

/// Refuses a propagation that would silently have no effect. Propagation from the node to the
/// container has an effect only if the mount's source is on a shared or slave mount. Propagation
/// from the container to the node has an effect only if the mount's source is on a shared mount.
/// This call blocks.
pub(crate) fn check(requested: &[Mount]) -> Result<()> {
    let propagates = |mount: &&Mount| mount.propagation() != MountPropagation::PropagationPrivate;
    let mut requested = requested.iter().filter(propagates).peekable();
    if requested.peek().is_none() {
        return Ok(());
    }
    let table =
        std::fs::read("/proc/self/mountinfo").during(|| "read /proc/self/mountinfo".to_owned())?;
    let table = String::from_utf8_lossy(&table);
    let lines = by_point(&table);
    for mount in requested {
        let source = std::fs::canonicalize(&mount.host_path)
            .during(|| format!("resolve the mount source {}", mount.host_path))?;
        let Some(line) = mount_of(&lines, &source) else {
            continue;
        };
        let has = |kind: &str| line.fields.iter().any(|field| field.starts_with(kind));
        let (word, fits) = match mount.propagation() {
            MountPropagation::PropagationBidirectional => ("not shared", has("shared:")),
            _ => (
                "neither shared nor a slave",
                has("shared:") || has("master:"),
            ),
        };
        if !fits {
            return Err(Error::invalid(format!(
                "the mount at {:?} requests the propagation {}, but its source {} is on the mount {}, which is {word}",
                mount.container_path,
                mount.propagation().as_str_name(),
                mount.host_path,
                line.point.display()
            )));
        }
    }
    Ok(())
}

fn parse(line: &str) -> Option<MountInfoLine<'_>> {
    let mut words = line.split(' ');
    let point = unescaped(words.nth(4)?);
    words.next()?;
    Some(MountInfoLine {
        point,
        fields: words.take_while(|word| *word != "-").collect(),
    })
}

/// Decodes a path from mountinfo. In mountinfo, a backslash and three octal digits replace a blank
/// or a special character.
fn unescaped(word: &str) -> PathBuf {
    let mut bytes = Vec::with_capacity(word.len());
    let mut rest = word.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let code = (first == b'\\')
            .then(|| tail.get(..3))
            .flatten()
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match code {
            Some(code) => {
                bytes.push(code);
                rest = tail.get(3..).unwrap_or_default();
            }
            None => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    PathBuf::from(std::ffi::OsStr::from_bytes(&bytes))
}

/// Returns the lines of mountinfo by their mount points. If several mounts have the same mount
/// point, only the last mount is returned, because it covers the others.
fn by_point(table: &str) -> HashMap<PathBuf, MountInfoLine<'_>> {
    let lines = table.lines().filter_map(parse);
    lines.map(|line| (line.point.clone(), line)).collect()
}

/// Returns the mount that contains `path`. A mount contains `path` if its mount point is `path` or
/// a parent of `path`. If several mounts contain `path`, the mount with the longest mount point is
/// returned.
fn mount_of<'a, 'b>(
    lines: &'a HashMap<PathBuf, MountInfoLine<'b>>,
    path: &Path,
) -> Option<&'a MountInfoLine<'b>> {
    path.ancestors().find_map(|above| lines.get(above))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_on_the_deepest_and_last_mount() {
        let table = "\
            1 0 8:1 / / rw shared:1 - ext4 /dev/vda rw\n\
            2 1 8:1 / /mnt/a\\040b rw - tmpfs t rw\n\
            3 1 8:1 / /mnt/a\\040b rw,nodev master:4 propagate_from:2 - tmpfs t rw\n";
        let lines = by_point(table);
        let fields = |path: &str| mount_of(&lines, Path::new(path)).map(|line| line.fields.clone());
        assert_eq!(
            fields("/mnt/a b/c"),
            Some(vec!["master:4", "propagate_from:2"])
        );
        assert_eq!(fields("/mnt/a"), Some(vec!["shared:1"]));
    }
}
