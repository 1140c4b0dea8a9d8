//! Path lookups below a directory whose content can come from an attacker.
//!
//! A lookup resolves a path with the directory as `/`, as openat2(2) does with RESOLVE_IN_ROOT. A
//! symbolic link can't lead out of the directory. If any file of the system is renamed or mounted
//! while openat2(2) resolves a `..`, it fails with EAGAIN. An attacker can rename files all the time,
//! so a lookup that has failed a few times resolves the path without the kernel's help: component by
//! component, and for a `..` it goes back to the directory from which it came. Only such a lookup fails
//! with ENAMETOOLONG if the path leads through more than [`MAX_DEPTH`] directories.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, fstat, fstatfs, openat2, readlinkat};
use rustix::io::{Errno, fcntl_dupfd_cloexec};

/// The number of attempts to let the kernel resolve a path.
const ATTEMPTS: usize = 4;

/// The maximum number of symbolic links that a lookup follows (path_resolution(7)).
const MAX_LINKS: usize = 40;

/// The maximum length in bytes of a path and of a link's target, with the zero byte at its end.
const PATH_MAX: usize = 4096;

/// The maximum number of directories between the root and the file that a lookup by components opens.
/// Each needs a descriptor. A path of `PATH_MAX` bytes with many links can lead through 80,000
/// directories.
const MAX_DEPTH: usize = 512;

/// The `f_type` of procfs (statfs(2)).
const PROC_SUPER_MAGIC: u64 = 0x9fa0;

/// Opens the file at `path` below `root`. `flags` must contain O_PATH or O_DIRECTORY, so that this
/// call does not open a device. Of `resolve`, this function supports NO_SYMLINKS and NO_XDEV. Magic
/// links are refused. Fails with the errors of openat2(2), except EAGAIN.
pub fn open(
    root: impl AsFd,
    path: &[u8],
    flags: OFlags,
    resolve: ResolveFlags,
) -> Result<OwnedFd, Errno> {
    let flags = flags | OFlags::CLOEXEC;
    let resolve = resolve | ResolveFlags::NO_MAGICLINKS;
    let in_root = resolve | ResolveFlags::IN_ROOT;
    for _ in 0..ATTEMPTS {
        match openat2(&root, path, flags, Mode::empty(), in_root) {
            Err(Errno::AGAIN) => {}
            result => return result,
        }
    }
    open_by_components(root.as_fd(), path, flags, resolve)
}

/// The directories from the root to the current directory. The root is not in the list.
type Directories = Vec<OwnedFd>;

/// Like [`open`], but opens each component in the directory before it.
fn open_by_components(
    root: BorrowedFd<'_>,
    path: &[u8],
    flags: OFlags,
    resolve: ResolveFlags,
) -> Result<OwnedFd, Errno> {
    if path.is_empty() {
        return Err(Errno::NOENT);
    }
    let mut above = Directories::new();
    let mut rest = components(path);
    let mut links = 0;
    while let Some(name) = rest.pop() {
        match name.as_slice() {
            b"." => continue,
            b".." => {
                above.pop();
                continue;
            }
            _ => {}
        }
        let current = above.last().map_or(root, AsFd::as_fd);
        let found = open_one(current, &name, resolve)?;
        match FileType::from_raw_mode(fstat(&found)?.st_mode) {
            FileType::Directory if above.len() == MAX_DEPTH => return Err(Errno::NAMETOOLONG),
            FileType::Directory => above.push(found),
            FileType::Symlink if rest.is_empty() && flags.contains(OFlags::NOFOLLOW) => {
                return finish(found, flags);
            }
            FileType::Symlink => {
                links += 1;
                if links > MAX_LINKS || resolve.contains(ResolveFlags::NO_SYMLINKS) {
                    return Err(Errno::LOOP);
                }
                let target = link_target(current, &name, &found)?;
                if target.starts_with(b"/") {
                    above.clear();
                }
                rest.extend(components(&target));
            }
            _ if rest.is_empty() => return finish(found, flags),
            _ => return Err(Errno::NOTDIR),
        }
    }
    let found = match above.pop() {
        Some(found) => found,
        None => fcntl_dupfd_cloexec(root, 3)?,
    };
    if flags.contains(OFlags::PATH) {
        return Ok(found);
    }
    openat2(&found, ".", flags, Mode::empty(), resolve)
}

/// Returns the components of a path, the last one first. A slash at the end becomes the component
/// `.`, because the file before it must be a directory.
fn components(path: &[u8]) -> Vec<Vec<u8>> {
    let mut components: Vec<_> = path
        .split(|byte| *byte == b'/')
        .filter(|component| !component.is_empty())
        .map(<[u8]>::to_vec)
        .collect();
    if path.ends_with(b"/") {
        components.push(b".".to_vec());
    }
    components.reverse();
    components
}

/// Opens the file `name` of a directory. Does not follow a symbolic link.
fn open_one(
    directory: BorrowedFd<'_>,
    name: &[u8],
    resolve: ResolveFlags,
) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat2(directory, name, flags, Mode::empty(), resolve)
}

/// Returns the target of a symbolic link. `link` is an O_PATH descriptor of the link `name` of
/// `directory`. Fails with `LOOP` for a magic link of /proc, whose text can be a path of the host. Fails
/// with `INVAL` or `NOENT` if the file is not a link.
pub fn link_target(
    directory: BorrowedFd<'_>,
    name: &[u8],
    link: &OwnedFd,
) -> Result<Vec<u8>, Errno> {
    if fstatfs(link)?.f_type as u64 == PROC_SUPER_MAGIC {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let resolve = ResolveFlags::NO_MAGICLINKS;
        if let Err(Errno::LOOP) = openat2(directory, name, flags, Mode::empty(), resolve) {
            return Err(Errno::LOOP);
        }
    }
    let target = readlinkat(link, "", Vec::with_capacity(PATH_MAX))?.into_bytes();
    if target.is_empty() {
        return Err(Errno::NOENT);
    }
    Ok(target)
}

/// Returns the O_PATH descriptor of a file that is not a directory.
fn finish(found: OwnedFd, flags: OFlags) -> Result<OwnedFd, Errno> {
    if flags.contains(OFlags::DIRECTORY) {
        return Err(Errno::NOTDIR);
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use rustix::fs::{CWD, mkdirat, openat};

    use super::*;

    /// Creates a directory with links, and calls `test` with its descriptor.
    fn in_a_tree(name: &str, test: impl FnOnce(&OwnedFd)) {
        let base = std::env::temp_dir().join(format!("rrun-{name}-{}", std::process::id()));
        let root = base.join("root");
        std::fs::create_dir_all(root.join("a/b")).unwrap();
        std::fs::write(base.join("secret"), "").unwrap();
        std::fs::write(root.join("a/file"), "").unwrap();
        let mut links = vec![
            ("up".to_owned(), "../../secret".to_owned()),
            ("abs".to_owned(), "/a/b".to_owned()),
            ("a/b/back".to_owned(), "../../a/../a/b/.".to_owned()),
            ("tail".to_owned(), "a/b/".to_owned()),
            ("file".to_owned(), "a/file".to_owned()),
            ("behind".to_owned(), "a/file/".to_owned()),
            ("loop".to_owned(), "loop".to_owned()),
            ("0".to_owned(), "a".to_owned()),
        ];
        links.extend((0..41).map(|number| ((number + 1).to_string(), number.to_string())));
        for (at, to) in links {
            std::os::unix::fs::symlink(to, root.join(at)).unwrap();
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        test(&openat(CWD, &root, flags, Mode::empty()).unwrap());
        std::fs::remove_dir_all(&base).unwrap();
    }

    const PATHS: [&str; 25] = [
        "a",
        "/a/b",
        "a/b/",
        "a//b/.",
        "..",
        "../../a",
        "up",
        "abs",
        "abs/..",
        "a/b/back",
        "a/b/back/../back",
        "tail",
        "tail/",
        "file",
        "file/",
        "file/x",
        "a/file/..",
        "behind",
        "loop",
        "none",
        "none/..",
        "/",
        ".",
        "40",
        "41",
    ];

    #[test]
    fn a_path_leads_to_the_same_file_with_and_without_the_kernels_resolution() {
        in_a_tree("components", |root| {
            for path in PATHS {
                for resolve in [ResolveFlags::empty(), ResolveFlags::NO_SYMLINKS] {
                    for flags in [
                        OFlags::PATH,
                        OFlags::PATH | OFlags::NOFOLLOW,
                        OFlags::PATH | OFlags::DIRECTORY,
                        OFlags::RDONLY | OFlags::DIRECTORY,
                    ] {
                        let id = |fd: OwnedFd| {
                            let stat = fstat(fd).unwrap();
                            (stat.st_dev, stat.st_ino)
                        };
                        let expected = open(root, path.as_bytes(), flags, resolve).map(id);
                        let resolve = resolve | ResolveFlags::NO_MAGICLINKS;
                        let flags = flags | OFlags::CLOEXEC;
                        let found =
                            open_by_components(root.as_fd(), path.as_bytes(), flags, resolve);
                        assert_eq!(found.map(id), expected, "{path} {flags:?} {resolve:?}");
                    }
                }
            }
        });
    }

    #[test]
    fn a_lookup_by_components_opens_a_limited_number_of_directories() {
        in_a_tree("deep", |root| {
            let flags = OFlags::PATH | OFlags::CLOEXEC;
            let find = |depth: usize| {
                let path = "d/".repeat(depth);
                open_by_components(root.as_fd(), path.as_bytes(), flags, ResolveFlags::empty())
            };
            let mut directory = root.try_clone().unwrap();
            for _ in 0..=MAX_DEPTH {
                mkdirat(&directory, "d", Mode::RWXU).unwrap();
                directory = openat(&directory, "d", flags, Mode::empty()).unwrap();
            }
            assert!(find(MAX_DEPTH).is_ok());
            assert_eq!(find(MAX_DEPTH + 1).map(drop), Err(Errno::NAMETOOLONG));
        });
    }

    #[test]
    fn magic_links_and_other_file_systems_are_refused() {
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let root = openat(CWD, Path::new("/"), flags, Mode::empty()).unwrap();
        let find = |path: &str, resolve: ResolveFlags| {
            let resolve = resolve | ResolveFlags::NO_MAGICLINKS;
            open_by_components(root.as_fd(), path.as_bytes(), OFlags::PATH, resolve).map(drop)
        };
        assert_eq!(find("proc/self/stat", ResolveFlags::empty()), Ok(()));
        assert_eq!(
            find("proc/self/cwd", ResolveFlags::empty()),
            Err(Errno::LOOP)
        );
        assert_eq!(
            find("proc/self/stat", ResolveFlags::NO_XDEV),
            Err(Errno::XDEV)
        );
    }

    #[test]
    fn renames_do_not_prevent_lookups() {
        in_a_tree("renames", |root| {
            let path = "a/b/../../".repeat(100);
            let names =
                ["1", "2"].map(|name| std::env::temp_dir().join(format!("rrun-renamed-{name}")));
            std::fs::write(&names[0], "").unwrap();
            let is_done = std::sync::atomic::AtomicBool::new(false);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    while !is_done.load(std::sync::atomic::Ordering::Relaxed) {
                        let _ = std::fs::rename(&names[0], &names[1]);
                        let _ = std::fs::rename(&names[1], &names[0]);
                    }
                });
                let failed = (0..1000)
                    .filter(|_| {
                        open(root, path.as_bytes(), OFlags::PATH, ResolveFlags::empty()).is_err()
                    })
                    .count();
                is_done.store(true, std::sync::atomic::Ordering::Relaxed);
                assert_eq!(failed, 0);
            });
            let _ = std::fs::remove_file(&names[0]);
        });
    }
}
