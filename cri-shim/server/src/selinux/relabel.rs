//! Labels on files of the node that a container is given: `selinux_relabel` of mounts, and what
//! of a pod's is no file system of its own.

use std::ffi::{CStr, CString};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, Dir, FileType, Mode, OFlags, XattrFlags, openat};
use rustix::io::Errno;

use super::label::Label;
use rrun_calls::error::{During, Error, Result};

const NAME: &str = "security.selinux";

/// How deep directories may lie in each other: each costs two descriptors.
const MAX_DEPTH: usize = 256;

/// With another label on these the node would be no use; those that go-selinux refuses.
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

/// Labels a file, or a directory with all that is in it, itself last: no link is followed but in
/// `path`, as by the mount. File systems that have no labels of their own keep what they have.
/// Blocks.
///
/// # Errors
/// A directory without which the node is no use.
pub(crate) fn relabel(path: &Path, label: &Label) -> Result<()> {
    let what = || {
        format!(
            "give {} the SELinux label {label} (selinux_relabel)",
            path.display()
        )
    };
    // O_PATH calls no driver.
    let open = openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).during(what)?;
    let by_descriptor = of_descriptor(&open);
    let real = std::fs::read_link(&by_descriptor).during(what)?;
    if NEVER_RELABELLED
        .iter()
        .any(|refused| real.as_path() == Path::new(refused))
    {
        return Err(Error::invalid(format!(
            "{}: the node needs {} as it is",
            what(),
            real.display()
        )));
    }
    let text = label.to_string();
    let stat = rustix::fs::fstat(&open).during(what)?;
    if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        // O_DIRECTORY lets the kernel refuse a device before it calls the driver.
        let dir = openat(CWD, &by_descriptor, flags, Mode::empty()).during(what)?;
        entries(&dir, text.as_bytes(), MAX_DEPTH).during(what)?;
    }
    set(rustix::fs::setxattr(
        &by_descriptor,
        NAME,
        text.as_bytes(),
        XattrFlags::empty(),
    ))
    .during(what)
}

/// Labels one file of ours.
pub(crate) fn one(path: &Path, label: &Label) -> Result<()> {
    let text = label.to_string();
    rustix::fs::lsetxattr(path, NAME, text.as_bytes(), XattrFlags::empty())
        .during(|| format!("give {} the SELinux label {label}", path.display()))
}

fn entries(dir: &OwnedFd, label: &[u8], depth: usize) -> Result<()> {
    for entry in Dir::read_from(dir).during(|| "read a directory".to_owned())? {
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
            // O_DIRECTORY lets the kernel refuse a device before it calls the driver.
            match openat(dir, name, flags, Mode::empty()) {
                Ok(below) => {
                    let Some(depth) = depth.checked_sub(1) else {
                        return Err(Error::invalid(format!(
                            "its directories lie more than {MAX_DEPTH} deep in each other"
                        )));
                    };
                    entries(&below, label, depth).during(shown)?;
                }
                // Another one by now, or none.
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

/// A path to what has this name in an open directory, and in no other.
fn in_directory(dir: &OwnedFd, name: &CStr) -> std::io::Result<CString> {
    let mut path = of_descriptor(dir).into_bytes();
    path.push(b'/');
    path.extend_from_slice(name.to_bytes());
    Ok(CString::new(path)?)
}

/// What is gone needs no label, and not every file system has them.
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
    fn everything_below_is_labelled_and_no_link_is_followed()
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
        symlink(&volume, base.join("way"))?;
        let label: Label = "u:object_r:t:s0:c1,c2".parse()?;
        if one(&base, &label).is_err() {
            eprintln!(
                "skipped: {} takes no labels, or not from us",
                base.display()
            );
            std::fs::remove_dir_all(&base)?;
            return Ok(());
        }
        relabel(&base.join("way"), &label)?;
        for path in ["volume", "volume/a", "volume/a/b", "volume/a/b/file"] {
            assert_eq!(label_of(&base.join(path)), label.to_string(), "{path}");
        }
        for path in ["other", "other/file", "way"] {
            assert_eq!(label_of(&base.join(path)), "", "{path}");
        }
        std::fs::remove_dir_all(&base)?;
        Ok(())
    }

    #[test]
    fn the_node_keeps_its_own() -> Result<(), Box<dyn std::error::Error>> {
        let label: Label = "u:object_r:t:s0".parse()?;
        let way = std::env::temp_dir().join(format!("rrun-relabel-etc-{}", std::process::id()));
        symlink("/etc", &way)?;
        for path in ["/", "/etc", "/etc/", "/usr/../etc", "/var/lib"].map(Path::new) {
            assert!(relabel(path, &label).is_err(), "{}", path.display());
        }
        let refused = relabel(&way, &label);
        std::fs::remove_file(&way)?;
        assert!(refused.is_err_and(|error| error.sentence().contains("/etc as it is")));
        Ok(())
    }
}
