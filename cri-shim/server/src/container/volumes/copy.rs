//! Copies a directory of an image to a volume. The image is hostile: a small layer can contain huge
//! sparse files, and many links to one large file.

use std::collections::{HashMap, HashSet};
use std::ffi::{CStr, OsStr};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom as Position};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, Dir, FileType, Gid, Mode, OFlags, RawMode, SeekFrom, Stat, Timespec, Timestamps, Uid,
    XattrFlags, chownat, fchmod, fgetxattr, fgetxattr_query, flistxattr, fsetxattr, linkat,
    mkdirat, mknodat, openat, readlinkat, statat, symlinkat, utimensat,
};
use rustix::io::Errno;

use crate::sandbox::files::private_dir;
use rrun_calls::error::{Code, During, Error, Result};
use rrun_images::layer::{self, DiskUse};
use rrun_kernel::errno::describe;
use rrun_kernel::regular_file;

/// The maximum nesting depth of copied directories. The depth is limited, because each level
/// requires two open file descriptors during the copy.
const MAX_DEPTH: usize = 64;

/// A size limit in bytes for extended attributes. It applies to the list of a file's attributes,
/// and to the value of each attribute.
const XATTR: usize = 64 << 10;

/// The number of bytes that are copied between two checks whether the copy must go on.
const CHUNK_BYTES: u64 = 16 << 20;

/// The limits for all volumes of one container together.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub bytes: u64,
    pub files: u64,
}

/// Copies directories until the limits are reached.
pub(super) struct Copier<'a, G> {
    limits: Limits,
    /// The bytes on the disk and the number of files in all copies.
    used: DiskUse,
    files: u64,
    /// Fails if the copy must end early.
    go_on: G,
    /// The directory for links to the copied files that have several names.
    names: &'a Path,
    /// For each copied file with several names, the name of its link in `names`. The key is the
    /// file's device and inode number in the image.
    links: HashMap<(u64, u64), u64>,
    /// The open directory `names`, if it exists.
    open_names: Option<OwnedFd>,
    /// The paths of all volumes in the container, if there are several.
    volumes: HashSet<PathBuf>,
    /// The path of the current directory in the container, if there are several volumes.
    path: PathBuf,
    /// True if the contents of another volume were omitted in the current copy.
    omitted: bool,
}

impl<'a, G: Fn() -> Result<()>> Copier<'a, G> {
    pub(super) fn new(
        limits: Limits,
        names: &'a Path,
        volumes: HashSet<PathBuf>,
        go_on: G,
    ) -> Self {
        Copier {
            limits,
            used: DiskUse::default(),
            files: 0,
            go_on,
            names,
            links: HashMap::new(),
            open_names: None,
            volumes,
            path: PathBuf::new(),
            omitted: false,
        }
    }

    /// Copies the contents and the attributes of a directory. The names of one file in the
    /// directory are also names of one file in the copy. If another volume is inside the directory,
    /// the copy omits its contents, because that volume hides them. Returns whether the copy is
    /// complete. `path` is the directory's path in the container.
    pub(super) fn copy(&mut self, path: &Path, from: &OwnedFd, into: &OwnedFd) -> Result<bool> {
        self.omitted = false;
        path.clone_into(&mut self.path);
        self.directory(from, into, MAX_DEPTH)?;
        self.links.clear();
        if self.open_names.take().is_some() {
            layer::remove_path(self.names)
                .map_err(|errno| Error::internal(describe(&errno.into())))
                .during(|| format!("remove {}", self.names.display()))?;
        }
        Ok(!self.omitted)
    }

    /// Copies the entries of a directory, and then the directory's own attributes. Symbolic links
    /// are copied, not followed.
    fn directory(&mut self, from: &OwnedFd, into: &OwnedFd, depth: usize) -> Result<()> {
        for entry in Dir::read_from(from).during(|| "read a directory".to_owned())? {
            let entry = entry.during(|| "read a directory".to_owned())?;
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            self.files += 1;
            self.used.add_name(name.to_bytes());
            self.check()?;
            let shown = || name.to_string_lossy().into_owned();
            let stat = statat(from, name, AtFlags::SYMLINK_NOFOLLOW).during(shown)?;
            self.entry(from, into, name, &stat, depth).during(shown)?;
        }
        let stat =
            rustix::fs::fstat(from).during(|| "read the directory's attributes".to_owned())?;
        finish(Some(into), into, c"", &stat)
            .during(|| "set the attributes of the copied directory".to_owned())?;
        self.xattrs(from, into)
    }

    fn subdirectory(
        &mut self,
        from: &OwnedFd,
        into: &OwnedFd,
        name: &CStr,
        depth: usize,
    ) -> Result<()> {
        if self.volumes.len() < 2 {
            return self.directory(from, into, depth);
        }
        self.path.push(OsStr::from_bytes(name.to_bytes()));
        if self.volumes.contains(&self.path) {
            // The runtime mounts the other volume here, after the volume that contains it.
            self.omitted = true;
        } else {
            self.directory(from, into, depth)?;
        }
        self.path.pop();
        Ok(())
    }

    /// Fails if the copy must end early, or if the files and bytes exceed a limit. They are counted
    /// before they are copied.
    fn check(&self) -> Result<()> {
        (self.go_on)()?;
        let Limits { files, bytes } = self.limits;
        let (limit, key) = match (self.files > files, self.used.bytes() > bytes) {
            (true, _) => (format!("{files} files"), "image.volume_files"),
            (_, true) => (format!("{bytes} bytes"), "image.volume_bytes"),
            _ => return Ok(()),
        };
        Err(Error::new(
            Code::ResourceExhausted,
            format!("the volumes of the image have more than the limit of {limit} ({key})"),
        ))
    }

    fn entry(
        &mut self,
        from: &OwnedFd,
        into: &OwnedFd,
        name: &CStr,
        stat: &Stat,
        depth: usize,
    ) -> Result<()> {
        let kind = FileType::from_raw_mode(stat.st_mode);
        if kind == FileType::Directory {
            let Some(depth) = depth.checked_sub(1) else {
                return Err(Error::invalid(format!(
                    "the volume's directories are nested more than {MAX_DEPTH} levels deep"
                )));
            };
            self.used.add_directory();
            self.check()?;
            mkdirat(into, name, Mode::RWXU).during(|| "create a copy".to_owned())?;
            let open = |dir: &OwnedFd| {
                let flags = PLAIN | OFlags::RDONLY | OFlags::DIRECTORY;
                // O_DIRECTORY makes this call fail for a device before its driver is called.
                openat(dir, name, flags, Mode::empty()).during(|| "open the directory".to_owned())
            };
            return self.subdirectory(&open(from)?, &open(into)?, name, depth);
        }
        let has_names = stat.st_nlink > 1;
        if has_names && self.link(into, name, stat)? {
            return Ok(());
        }
        match kind {
            FileType::RegularFile => self.file(from, into, name, stat)?,
            FileType::Symlink => {
                let target = readlinkat(from, name, Vec::new())
                    .during(|| "read the symbolic link".to_owned())?;
                self.used.add_link(target.to_bytes());
                self.check()?;
                symlinkat(target, into, name).during(|| "create a copy".to_owned())?;
            }
            kind => {
                mknodat(into, name, kind, PRIVATE, stat.st_rdev)
                    .during(|| "create a copy".to_owned())?;
            }
        }
        if kind != FileType::RegularFile {
            finish(None, into, name, stat)
                .during(|| "set the attributes of the copied file".to_owned())?;
        }
        if has_names {
            self.remember(into, name, stat)?;
        }
        Ok(())
    }

    /// Links `name` to the copy of the same file, if the file was already copied under another
    /// name. Returns false if it was not.
    fn link(&self, into: &OwnedFd, name: &CStr, stat: &Stat) -> Result<bool> {
        let known = self.links.get(&(stat.st_dev, stat.st_ino));
        let (Some(number), Some(names)) = (known, &self.open_names) else {
            return Ok(false);
        };
        match linkat(names, number.to_string(), into, name, AtFlags::empty()) {
            // The copied file has as many names as its file system allows.
            Err(Errno::MLINK) => Ok(false),
            done => done
                .map(|()| true)
                .during(|| "create a hard link".to_owned()),
        }
    }

    /// Creates a link to the copied file in `names`. The file's other names become links to it.
    fn remember(&mut self, into: &OwnedFd, name: &CStr, stat: &Stat) -> Result<()> {
        let names = match &mut self.open_names {
            Some(names) => names,
            none => {
                private_dir(self.names)?;
                // Ours: the server has just created this directory.
                let open = File::open(self.names);
                none.insert(
                    open.during(|| format!("open {}", self.names.display()))?
                        .into(),
                )
            }
        };
        let number = self.files;
        linkat(into, name, names, number.to_string(), AtFlags::empty())
            .during(|| "create a hard link".to_owned())?;
        self.links.insert((stat.st_dev, stat.st_ino), number);
        Ok(())
    }

    fn file(&mut self, from: &OwnedFd, into: &OwnedFd, name: &CStr, stat: &Stat) -> Result<()> {
        let mut source = regular_file::open_at(from, name, OFlags::RDONLY, false)
            .map_err(|unfit| Error::invalid(unfit.to_string()))?;
        let flags = PLAIN | OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
        // Ours: with O_EXCL, the kernel opens only a file that this call creates.
        let target = openat(into, name, flags, PRIVATE);
        let mut target = File::from(target.during(|| "create a copy".to_owned())?);
        self.contents(&mut source, &mut target, stat)?;
        let (source, target) = (OwnedFd::from(source), OwnedFd::from(target));
        finish(Some(&target), into, name, stat)
            .during(|| "set the attributes of the copied file".to_owned())?;
        self.xattrs(&source, &target)
    }

    /// Copies the data of a file. The holes of a sparse file become holes of the copy.
    fn contents(&mut self, source: &mut File, target: &mut File, stat: &Stat) -> Result<()> {
        let what = || "copy the contents".to_owned();
        let length = u64::try_from(stat.st_size).unwrap_or_default();
        // st_blocks counts in units of 512 bytes, stat(2).
        if u64::try_from(stat.st_blocks).unwrap_or_default() >= length.div_ceil(512) {
            return self.range(source, target, length);
        }
        let mut at = 0;
        while at < length {
            let data = match rustix::fs::seek(&*source, SeekFrom::Data(at)) {
                // No data follows.
                Err(Errno::NXIO) => break,
                data => data.during(what)?,
            };
            let hole = rustix::fs::seek(&*source, SeekFrom::Hole(data)).during(what)?;
            let end = hole.min(length);
            if data >= end {
                break;
            }
            source.seek(Position::Start(data)).during(what)?;
            target.seek(Position::Start(data)).during(what)?;
            self.range(source, target, end - data)?;
            at = end;
        }
        target.set_len(length).during(what)
    }

    /// Copies `length` bytes from the current position of `source` to that of `target`.
    fn range(&mut self, source: &mut File, target: &mut File, length: u64) -> Result<()> {
        let mut left = length;
        while left > 0 {
            let most = left.min(CHUNK_BYTES);
            self.used.add_content(most);
            self.check()?;
            let copied = io::copy(&mut (&mut *source).take(most), target);
            if copied.during(|| "copy the contents".to_owned())? == 0 {
                break;
            }
            left -= most;
        }
        Ok(())
    }

    /// Copies the extended attributes of a file. This changes no result of [`finish`]. All values
    /// together can be larger than the memory, so they are copied one by one.
    fn xattrs(&mut self, from: &OwnedFd, into: &OwnedFd) -> Result<()> {
        let what = || "copy the extended attributes".to_owned();
        let mut list = vec![0_u8; XATTR];
        let length = match flistxattr(from, &mut list) {
            Err(Errno::OPNOTSUPP) => return Ok(()),
            length => length.during(what)?,
        };
        if length == 0 {
            return Ok(());
        }
        let names = list.get(..length).unwrap_or_default();
        let names = names.split_inclusive(|byte| *byte == 0);
        let names = names.filter_map(|name| CStr::from_bytes_with_nul(name).ok());
        let mut lengths = Vec::new();
        for name in names.clone() {
            let length = fgetxattr_query(from, name).during(what)?;
            lengths.push((name.to_bytes().len(), length));
        }
        self.used.add_xattrs(lengths.into_iter());
        self.check()?;
        let mut value = vec![0; XATTR];
        for name in names {
            let length = fgetxattr(from, name, &mut value[..]).during(what)?;
            let value = value.get(..length).unwrap_or_default();
            fsetxattr(into, name, value, XattrFlags::empty()).during(what)?;
        }
        Ok(())
    }
}

const PLAIN: OFlags = OFlags::NOFOLLOW
    .union(OFlags::CLOEXEC)
    .union(OFlags::NONBLOCK);
const PRIVATE: Mode = Mode::RUSR.union(Mode::WUSR);

/// Sets the owner, mode and times of a copied file. The order matters: no step may change the result
/// of an earlier step. An empty `name` means the directory `into` itself.
fn finish(
    open: Option<&OwnedFd>,
    into: &OwnedFd,
    name: &CStr,
    stat: &Stat,
) -> rustix::io::Result<()> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::EMPTY_PATH;
    let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    chownat(into, name, Some(uid), Some(gid), flags)?;
    let mode = Mode::from_raw_mode(stat.st_mode & RawMode::from(0o7777_u16));
    match open {
        Some(to) => fchmod(to, mode)?,
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
        Some(to) => rustix::fs::futimens(to, &times),
        None => utimensat(into, name, &times, AtFlags::SYMLINK_NOFOLLOW),
    }
}
