//! Volumes that an image declares. The container gets a separate directory for each volume, outside
//! the overlay of its root filesystem. The directory starts as a copy of the image's directory at
//! the same path.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use pathrs::flags::OpenFlags;
use pathrs::{Root, error::ErrorKind};
use rrun_proto::v1::Mount;
use rustix::fs::{
    AtFlags, Dir, FileType, Gid, Mode, OFlags, RawMode, Stat, Timespec, Timestamps, Uid,
    XattrFlags, chownat, fchmod, fgetxattr, flistxattr, fsetxattr, mkdirat, mknodat, openat,
    readlinkat, statat, symlinkat, utimensat,
};

use super::mounts::cleaned;
use crate::sandbox::files::private_dir;
use rrun_calls::error::{During, Error, Result};
use rrun_kernel::regular_file;

/// The maximum nesting depth of copied directories. The depth is limited, because each level
/// requires two open file descriptors during the copy.
const MAX_DEPTH: usize = 64;

/// A size limit in bytes for extended attributes. It applies to the list of a file's attributes,
/// and to the value of each attribute.
const XATTR: usize = 64 << 10;

/// Creates the volumes in `dir` and returns a mount for each volume. A volume is skipped if the
/// request has a mount at the same path. A volume belongs to `owner` if its path does not exist in
/// the image. This call blocks.
pub(crate) fn make(
    declared: &[String],
    requested: &[Mount],
    rootfs: &Path,
    dir: &Path,
    owner: (u32, u32),
) -> Result<Vec<Mount>> {
    let mut made: Vec<Mount> = Vec::new();
    let paths = requested.iter().map(|mount| cleaned(&mount.container_path));
    let mut taken: HashSet<PathBuf> = paths.collect();
    taken.insert("/".into());
    for volume in declared {
        let destination = cleaned(volume);
        if !taken.insert(destination.clone()) {
            continue;
        }
        let host = dir.join(made.len().to_string());
        private_dir(&host)?;
        let what = || format!("create the volume {volume:?} of the image");
        fill(rootfs, &destination, &host, owner).during(what)?;
        made.push(Mount {
            container_path: destination.to_string_lossy().into_owned(),
            host_path: host.to_string_lossy().into_owned(),
            selinux_relabel: true,
            ..Mount::default()
        });
    }
    Ok(made)
}

fn fill(rootfs: &Path, place: &Path, host: &Path, (uid, gid): (u32, u32)) -> Result<()> {
    let failed = |error: pathrs::error::Error| {
        Error::invalid(format!("open the volume's directory in the image: {error}"))
    };
    let root = Root::open(rootfs).map_err(failed)?;
    // Ours: the server has just created this directory, so opening it by its path is safe.
    let into: OwnedFd = File::open(host)
        .during(|| format!("open {}", host.display()))?
        .into();
    let inside = place.strip_prefix("/").unwrap_or(place);
    let from: OwnedFd = match root.resolve(inside) {
        Ok(found) => found
            // O_DIRECTORY makes this call fail for a device before its driver is called.
            .reopen(OpenFlags::O_RDONLY | OpenFlags::O_DIRECTORY)
            .map_err(failed)?
            .into(),
        Err(error) if matches!(error.kind(), ErrorKind::OsError(Some(libc::ENOENT))) => {
            fchmod(&into, Mode::from_raw_mode(0o755))
                .during(|| "set the volume's mode".to_owned())?;
            return std::os::unix::fs::fchown(&into, Some(uid), Some(gid))
                .during(|| "set the volume's owner".to_owned());
        }
        Err(error) => return Err(failed(error)),
    };
    copy_directory(&from, &into, MAX_DEPTH).during(|| "copy the image's directory".to_owned())
}

/// Copies the entries of a directory, and then the directory's own attributes. Symbolic links are
/// copied, not followed.
fn copy_directory(from: &OwnedFd, into: &OwnedFd, depth: usize) -> Result<()> {
    for entry in Dir::read_from(from).during(|| "read a directory".to_owned())? {
        let entry = entry.during(|| "read a directory".to_owned())?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let shown = || name.to_string_lossy().into_owned();
        let stat = statat(from, name, AtFlags::SYMLINK_NOFOLLOW).during(shown)?;
        copy_entry(from, into, name, &stat, depth).during(shown)?;
    }
    let stat = rustix::fs::fstat(from).during(|| "read the directory's attributes".to_owned())?;
    finish(Some((from, into)), into, c"", &stat)
        .during(|| "set the attributes of the copied directory".to_owned())
}

fn copy_entry(
    from: &OwnedFd,
    into: &OwnedFd,
    name: &std::ffi::CStr,
    stat: &Stat,
    depth: usize,
) -> Result<()> {
    let plain = OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let private = Mode::RUSR | Mode::WUSR;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => {
            let Some(depth) = depth.checked_sub(1) else {
                return Err(Error::invalid(format!(
                    "the volume's directories are nested more than {MAX_DEPTH} levels deep"
                )));
            };
            mkdirat(into, name, Mode::RWXU).during(|| "create a copy".to_owned())?;
            let open = |dir: &OwnedFd| {
                let flags = plain | OFlags::RDONLY | OFlags::DIRECTORY;
                // O_DIRECTORY makes this call fail for a device before its driver is called.
                openat(dir, name, flags, Mode::empty()).during(|| "open the directory".to_owned())
            };
            copy_directory(&open(from)?, &open(into)?, depth)
        }
        FileType::RegularFile => {
            let mut source = regular_file::open_at(from, name, OFlags::RDONLY, false)
                .map_err(|unfit| Error::invalid(unfit.to_string()))?;
            let flags = plain | OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
            // Ours: with O_EXCL, the kernel opens only a file that this call creates.
            let target = openat(into, name, flags, private);
            let mut target = File::from(target.during(|| "create a copy".to_owned())?);
            io::copy(&mut source, &mut target).during(|| "copy the contents".to_owned())?;
            let (source, target) = (OwnedFd::from(source), OwnedFd::from(target));
            finish(Some((&source, &target)), into, name, stat)
                .during(|| "set the attributes of the copied file".to_owned())
        }
        FileType::Symlink => {
            let target = readlinkat(from, name, Vec::new())
                .during(|| "read the symbolic link".to_owned())?;
            symlinkat(target, into, name).during(|| "create a copy".to_owned())?;
            finish(None, into, name, stat)
                .during(|| "set the attributes of the copied file".to_owned())
        }
        kind => {
            mknodat(into, name, kind, private, stat.st_rdev)
                .during(|| "create a copy".to_owned())?;
            finish(None, into, name, stat)
                .during(|| "set the attributes of the copied file".to_owned())
        }
    }
}

/// Sets the owner, mode, extended attributes and times of a copied file. The order matters: no step
/// may change the result of an earlier step. An empty `name` means the directory `into` itself.
fn finish(
    open: Option<(&OwnedFd, &OwnedFd)>,
    into: &OwnedFd,
    name: &std::ffi::CStr,
    stat: &Stat,
) -> rustix::io::Result<()> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::EMPTY_PATH;
    let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    chownat(into, name, Some(uid), Some(gid), flags)?;
    let mode = Mode::from_raw_mode(stat.st_mode & RawMode::from(0o7777_u16));
    match open {
        Some((from, to)) => {
            fchmod(to, mode)?;
            copy_xattrs(from, to)?;
        }
        None if FileType::from_raw_mode(stat.st_mode) == FileType::Symlink => {}
        None => rustix::fs::chmodat(into, name, mode, AtFlags::empty())?,
    }
    let time = |seconds: i64, nanoseconds: u64| Timespec {
        tv_sec: seconds,
        tv_nsec: i64::try_from(nanoseconds).unwrap_or_default(),
    };
    let times = Timestamps {
        last_access: time(stat.st_atime, stat.st_atime_nsec),
        last_modification: time(stat.st_mtime, stat.st_mtime_nsec),
    };
    match open {
        Some((_, to)) => rustix::fs::futimens(to, &times),
        None => utimensat(into, name, &times, AtFlags::SYMLINK_NOFOLLOW),
    }
}

fn copy_xattrs(from: impl AsFd, into: impl AsFd) -> rustix::io::Result<()> {
    let mut names = vec![0_u8; XATTR];
    let length = match flistxattr(&from, &mut names) {
        Err(rustix::io::Errno::OPNOTSUPP) => return Ok(()),
        length => length?,
    };
    let mut value = Vec::new();
    for name in names
        .get(..length)
        .unwrap_or_default()
        .split_inclusive(|byte| *byte == 0)
    {
        let Ok(name) = std::ffi::CStr::from_bytes_with_nul(name) else {
            continue;
        };
        value.resize(XATTR, 0);
        let length = fgetxattr(&from, name, &mut value[..])?;
        fsetxattr(
            &into,
            name,
            value.get(..length).unwrap_or_default(),
            XattrFlags::empty(),
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use super::*;

    #[test]
    fn a_volume_starts_as_a_copy_of_the_images_directory() -> Result<(), Box<dyn std::error::Error>>
    {
        let base = std::env::temp_dir().join(format!("rrun-volumes-{}", std::process::id()));
        let (rootfs, dir) = (base.join("rootfs"), base.join("volumes"));
        std::fs::create_dir_all(rootfs.join("real/sub"))?;
        std::fs::write(rootfs.join("real/sub/file"), "text")?;
        std::fs::set_permissions(rootfs.join("real/sub"), PermissionsExt::from_mode(0o1751))?;
        symlink("/etc/passwd", rootfs.join("real/link"))?;
        // If the link `data` is resolved inside the image, it leads to the image's directory /real.
        symlink("/real", rootfs.join("data"))?;
        symlink("../../../..", rootfs.join("out"))?;
        let declared =
            ["/data", "data/", "/none", "/taken", "/", "/out/real/sub"].map(String::from);
        let requested = [Mount {
            container_path: "/taken".into(),
            ..Mount::default()
        }];
        let ids = (
            rustix::process::geteuid().as_raw(),
            rustix::process::getegid().as_raw(),
        );
        let made = make(&declared, &requested, &rootfs, &dir, ids)?;
        let places: Vec<&str> = made
            .iter()
            .map(|mount| mount.container_path.as_str())
            .collect();
        assert_eq!(places, ["/data", "/none", "/out/real/sub"]);
        assert_eq!(std::fs::read_to_string(dir.join("0/sub/file"))?, "text");
        assert_eq!(
            std::fs::metadata(dir.join("0/sub"))?.mode() & 0o7777,
            0o1751
        );
        assert_eq!(
            std::fs::read_link(dir.join("0/link"))?,
            Path::new("/etc/passwd")
        );
        assert_eq!(std::fs::read_dir(dir.join("1"))?.count(), 0);
        assert_eq!(std::fs::read_to_string(dir.join("2/file"))?, "text");
        std::fs::remove_dir_all(&base)?;
        Ok(())
    }
}
