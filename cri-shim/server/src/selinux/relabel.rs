//! Sets SELinux labels on files of the node for a container. The files are the sources of mounts
//! with `selinux_relabel`, and the server's own files such as a pod's resolv.conf. The container
//! sees these files through bind mounts, and no mount option can label the files of a bind mount.

use std::ffi::{CStr, CString};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, Dir, FileType, Mode, OFlags, XattrFlags, openat};
use rustix::io::Errno;

use super::label::Label;
use rrun_calls::error::{During, Error, Result};

const NAME: &str = "security.selinux";

/// The maximum nesting depth of relabelled directories. The depth is limited, because each level
/// requires two open file descriptors.
const MAX_DEPTH: usize = 256;

/// Paths that the server never relabels. The node would not work with other labels on these paths.
/// The Go library go-selinux refuses the same paths.
const NEVER_RELABELLED: [&str; 24] = [
    "/",
    "/bin",
    "/boot",
    "/dev",
    "/etc",
    "/etc/passwd",
    "/etc/pki",
    "/etc/shadow",
    "/home",
    "/lib",
    "/lib64",
    "/media",
    "/opt",
    "/proc",
    "/root",
    "/run",
    "/sbin",
    "/srv",
    "/sys",
    "/tmp",
    "/usr",
    "/var",
    "/var/lib",
    "/var/log",
];

/// Sets the SELinux label of a file or of a directory tree. The contents of a directory are
/// labelled before the directory itself. Symbolic links in `path` are followed, because mounting
/// `path` follows them too. Symbolic links below `path` are not followed. Files on file systems
/// that do not support labels are not changed. Calls `go_on` before each file; an error from `go_on`
/// ends the work. This call blocks.
///
/// # Errors
/// Returns an error if `NEVER_RELABELLED` contains `path`.
pub(crate) fn relabel(path: &Path, label: &Label, go_on: &dyn Fn() -> Result<()>) -> Result<()> {
    let what = || {
        format!(
            "give {} the SELinux label {label} (selinux_relabel)",
            path.display()
        )
    };
    // O_PATH prevents the kernel from calling a driver, even if the path leads to a device.
    let open = openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).during(what)?;
    let by_descriptor = of_descriptor(&open);
    let real = std::fs::read_link(&by_descriptor).during(what)?;
    if NEVER_RELABELLED
        .iter()
        .any(|refused| real.as_path() == Path::new(refused))
    {
        return Err(Error::invalid(format!(
            "{}: the node needs the current SELinux label of {}",
            what(),
            real.display()
        )));
    }
    let text = label.to_string();
    let stat = rustix::fs::fstat(&open).during(what)?;
    if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        // O_DIRECTORY makes this call fail for a device before its driver is called.
        let dir = openat(CWD, &by_descriptor, flags, Mode::empty()).during(what)?;
        entries(&dir, text.as_bytes(), MAX_DEPTH, go_on).during(what)?;
    }
    set(rustix::fs::setxattr(
        &by_descriptor,
        NAME,
        text.as_bytes(),
        XattrFlags::empty(),
    ))
    .during(what)
}

/// Sets the SELinux label of one file that the server owns.
pub(crate) fn one(path: &Path, label: &Label) -> Result<()> {
    let text = label.to_string();
    rustix::fs::lsetxattr(path, NAME, text.as_bytes(), XattrFlags::empty())
        .during(|| format!("give {} the SELinux label {label}", path.display()))
}

fn entries(
    dir: &OwnedFd,
    label: &[u8],
    depth: usize,
    go_on: &dyn Fn() -> Result<()>,
) -> Result<()> {
    for entry in Dir::read_from(dir).during(|| "read a directory".to_owned())? {
        go_on()?;
        let entry = entry.during(|| "read a directory".to_owned())?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let shown = || name.to_string_lossy().into_owned();
        if matches!(entry.file_type(), FileType::Directory | FileType::Unknown) {
            let flags = OFlags::RDONLY
                | OFlags::DIRECTORY
                | OFlags::NOFOLLOW
                | OFlags::NONBLOCK
                | OFlags::CLOEXEC;
            // O_DIRECTORY makes this call fail for a device before its driver is called.
            match openat(dir, name, flags, Mode::empty()) {
                Ok(below) => {
                    let Some(depth) = depth.checked_sub(1) else {
                        return Err(Error::invalid(format!(
                            "the directories are nested more than {MAX_DEPTH} levels deep"
                        )));
                    };
                    entries(&below, label, depth, go_on).during(shown)?;
                }
                // The directory was replaced or removed after its entry was read.
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {}
                Err(errno) => return Err(errno).during(shown),
            }
        }
        let path = in_directory(dir, name).during(shown)?;
        set(rustix::fs::lsetxattr(
            &*path,
            NAME,
            label,
            XattrFlags::empty(),
        ))
        .during(shown)?;
    }
    Ok(())
}

fn of_descriptor(open: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", open.as_raw_fd())
}

/// Returns a path to the entry `name` in an open directory. If the directory is moved, this path
/// remains valid.
fn in_directory(dir: &OwnedFd, name: &CStr) -> std::io::Result<CString> {
    let mut path = of_descriptor(dir).into_bytes();
    path.push(b'/');
    path.extend_from_slice(name.to_bytes());
    Ok(CString::new(path)?)
}

/// Ignores two errors of setxattr(2): the file no longer exists (ENOENT), or its file system does
/// not support labels (EOPNOTSUPP).
fn set(done: rustix::io::Result<()>) -> rustix::io::Result<()> {
    match done {
        Err(Errno::NOENT | Errno::OPNOTSUPP) => Ok(()),
        done => done,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn label_of(path: &Path) -> String {
        let mut value = [0_u8; 128];
        let length = rustix::fs::lgetxattr(path, NAME, &mut value).unwrap_or_default();
        String::from_utf8_lossy(value.get(..length).unwrap_or_default()).into_owned()
    }

    #[test]
    fn a_whole_tree_is_labelled_and_no_link_in_it_is_followed()
    -> Result<(), Box<dyn std::error::Error>> {
        let base = std::env::temp_dir().join(format!("rrun-relabel-{}", std::process::id()));
        let volume = base.join("volume");
        std::fs::create_dir_all(volume.join("a/b"))?;
        std::fs::create_dir_all(base.join("other"))?;
        for file in ["volume/a/b/file", "other/file"] {
            std::fs::write(base.join(file), "")?;
        }
        symlink(base.join("other"), volume.join("dir"))?;
        symlink(base.join("other/file"), volume.join("a/link"))?;
        symlink(&volume, base.join("link"))?;
        let label: Label = "u:object_r:t:s0:c1,c2".parse()?;
        if one(&base, &label).is_err() {
            eprintln!(
                "skipped: {} does not support SELinux labels, or this process can't set SELinux labels",
                base.display()
            );
            std::fs::remove_dir_all(&base)?;
            return Ok(());
        }
        relabel(&base.join("link"), &label, &|| Ok(()))?;
        for path in ["volume", "volume/a", "volume/a/b", "volume/a/b/file"] {
            assert_eq!(label_of(&base.join(path)), label.to_string(), "{path}");
        }
        for path in ["other", "other/file", "link"] {
            assert_eq!(label_of(&base.join(path)), "", "{path}");
        }
        std::fs::remove_dir_all(&base)?;
        Ok(())
    }

    #[test]
    fn directories_of_the_node_are_not_relabelled() -> Result<(), Box<dyn std::error::Error>> {
        let label: Label = "u:object_r:t:s0".parse()?;
        let link = std::env::temp_dir().join(format!("rrun-relabel-etc-{}", std::process::id()));
        symlink("/etc", &link)?;
        for path in ["/", "/etc", "/etc/", "/usr/../etc", "/var/lib"].map(Path::new) {
            let refused = relabel(path, &label, &|| Ok(()));
            assert!(refused.is_err(), "{}", path.display());
        }
        let refused = relabel(&link, &label, &|| Ok(()));
        std::fs::remove_file(&link)?;
        assert!(refused.is_err_and(|error| {
            error
                .sentence()
                .contains("the current SELinux label of /etc")
        }));
        Ok(())
    }
}
