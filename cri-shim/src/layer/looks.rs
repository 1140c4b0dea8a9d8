//! The layer that gives an image's directories their owner, mode, attributes and time.
//!
//! An archive may use a directory without listing it: `etc/app.conf` and no `etc/`. In the image
//! that directory looks as the layers below say, and those differ from image to image, while the
//! unpacked layer is shared by all of them. So a shared layer never takes anything over: there the
//! directory belongs to root with mode 0755 and is marked (see [`super::tree`]). An image whose
//! lower layers say otherwise gets a small layer of its own on top, of nothing but directories.
//! overlayfs shows the attributes of the uppermost directory and merges what the directories hold.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

use super::LayerError;
use super::tree::{is_opaque, is_unlisted, modified};

/// How often a directory is looked for in a layer. Images of many layers with ten thousands of
/// shared directories stay far below; a hostile one must not keep a thread busy for hours.
const LOOKUPS: u64 = 1 << 24;

/// The most bytes of names of directories that are still to be visited.
const PENDING_BYTES: usize = 64 << 20;

/// An overlayfs attribute is about the layer that it is in.
const OVERLAY: &[u8] = b"trusted.overlay.";

const OPEN: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// One unpacked layer of an image.
#[derive(Clone, Debug)]
pub struct Stacked {
    /// Its directory.
    pub path: PathBuf,
    /// It has marked directories below its root.
    pub unlisted: bool,
}

/// Makes the directory `into` as the layer that goes on top of `layers`, which are named uppermost
/// first and end above what a layer hides as a whole. Returns how many directories it has; 0: the
/// image needs none, and `into` was not made. Blocks.
pub fn looks(layers: &[Stacked], into: &Path) -> Result<u64, LayerError> {
    let roots = layers
        .iter()
        .map(|layer| {
            rustix::fs::openat(CWD, &layer.path, OPEN, Mode::empty()).map_err(|e| {
                let path = layer.path.as_os_str().as_encoded_bytes();
                LayerError::system("open the layer", path, e)
            })
        })
        .collect::<Result<Vec<_>, _>>()?;
    let mut walk = Walk {
        layers,
        roots,
        into,
        made: false,
        count: 0,
        lookups: 0,
    };
    walk.root()?;
    let mut pending = vec![Vec::new()];
    let mut bytes = 0;
    while let Some(path) = pending.pop() {
        bytes -= path.len();
        walk.visit(&path, |below| {
            bytes += below.len();
            pending.push(below);
            bytes <= PENDING_BYTES
        })?;
    }
    Ok(walk.count)
}

/// A directory of the image in one of its layers.
struct Part {
    layer: usize,
    directory: OwnedFd,
    /// The archive says how it looks.
    listed: bool,
    /// Nothing in it shows from the layers below; its own looks may come from there.
    opaque: bool,
}

struct Walk<'a> {
    layers: &'a [Stacked],
    roots: Vec<OwnedFd>,
    into: &'a Path,
    made: bool,
    count: u64,
    lookups: u64,
}

/// Those whose content overlayfs merges.
fn merged(parts: &mut Vec<Part>) -> &[Part] {
    if let Some(last) = parts.iter().position(|part| part.opaque) {
        parts.truncate(last + 1);
    }
    parts
}

/// The part that says how the directory looks in the image: the uppermost that is listed. Where no
/// layer lists it, it is as it was made.
fn source(parts: &[Part]) -> Option<&Part> {
    parts.iter().find(|part| part.listed).or(parts.first())
}

impl Walk<'_> {
    fn root_parts(&self) -> Result<Vec<Part>, LayerError> {
        let part = |(layer, root): (usize, &OwnedFd)| {
            Ok(Part {
                layer,
                directory: rustix::io::fcntl_dupfd_cloexec(root, 0)
                    .map_err(|e| failed("open", b"", e))?,
                listed: !is_unlisted(root).map_err(|e| failed("look at", b"", e))?,
                opaque: false,
            })
        };
        self.roots.iter().enumerate().map(part).collect()
    }

    /// The directory `name` in each of the layers that have it as part of `parents`.
    fn parts(&mut self, parents: &[Part], name: &[u8]) -> Result<Vec<Part>, LayerError> {
        self.lookups += parents.len() as u64;
        if self.lookups > LOOKUPS {
            return Err(LayerError::Bound(format!(
                "its layers share more directories than can be compared with {LOOKUPS} look-ups, which is the bound"
            )));
        }
        let mut parts = Vec::new();
        for parent in parents {
            let directory = match rustix::fs::openat(&parent.directory, name, OPEN, Mode::empty()) {
                Ok(directory) => directory,
                Err(Errno::NOENT) => continue,
                // A file, a link or a whiteout: nothing of the layers below shows.
                Err(Errno::NOTDIR | Errno::LOOP) => break,
                Err(error) => return Err(failed("open the directory", name, error)),
            };
            let marked = self.layers[parent.layer].unlisted
                && is_unlisted(&directory).map_err(|e| failed("look at", name, e))?;
            parts.push(Part {
                layer: parent.layer,
                listed: !marked,
                opaque: is_opaque(&directory),
                directory,
            });
        }
        Ok(parts)
    }

    fn parts_of(&mut self, path: &[u8]) -> Result<Vec<Part>, LayerError> {
        let mut parts = self.root_parts()?;
        for name in path.split(|byte| *byte == b'/').filter(|n| !n.is_empty()) {
            let parents = merged(&mut parts);
            let below = self.parts(parents, name)?;
            parts = below;
        }
        Ok(parts)
    }

    /// The image's root is the root of a container's writable layer, which is as new as the
    /// container: of a difference in the time alone nothing would be seen.
    fn root(&mut self) -> Result<(), LayerError> {
        let parts = self.root_parts()?;
        let (Some(top), Some(source)) = (parts.first(), source(&parts)) else {
            return Ok(());
        };
        if top.layer == source.layer {
            return Ok(());
        }
        let fail = |e| failed("look at", b"", e);
        let stat = |part: &Part| rustix::fs::fstat(&part.directory).map_err(fail);
        let (ours, theirs) = (stat(top)?, stat(source)?);
        let same = (ours.st_uid, ours.st_gid, ours.st_mode)
            == (theirs.st_uid, theirs.st_gid, theirs.st_mode)
            && attributes(&top.directory).map_err(fail)?
                == attributes(&source.directory).map_err(fail)?;
        if !same {
            self.make(b"")?;
        }
        Ok(())
    }

    /// Gives the directories in `path` their looks, and hands those to `later` in which there may
    /// be more of them; `later` answers whether there is room for it.
    fn visit(
        &mut self,
        path: &[u8],
        mut later: impl FnMut(Vec<u8>) -> bool,
    ) -> Result<(), LayerError> {
        let mut parts = self.parts_of(path)?;
        let parents = merged(&mut parts);
        // In the lowest layer that has it there is nothing to take over.
        let upper = parents.len().saturating_sub(1);
        for parent in &parents[..upper] {
            if !self.layers[parent.layer].unlisted {
                continue;
            }
            let fail = |e| failed("read the directory", path, e);
            for entry in Dir::read_from(&parent.directory).map_err(fail)? {
                let entry = entry.map_err(fail)?;
                let name = entry.file_name().to_bytes();
                if name == b"." || name == b".." {
                    continue;
                }
                if !is_directory(&parent.directory, name, entry.file_type()) {
                    continue;
                }
                let mut below = self.parts(parents, name)?;
                // Each name once: by the uppermost of the layers that are read here.
                let first = below.iter().find(|part| self.layers[part.layer].unlisted);
                if first.is_none_or(|first| first.layer != parent.layer) {
                    continue;
                }
                let whole = [path, b"/", name].concat();
                let whole = whole.strip_prefix(b"/").unwrap_or(&whole);
                if below.first().is_some_and(|top| !top.listed)
                    && below.iter().any(|part| part.listed)
                {
                    self.make(whole)?;
                }
                let below = merged(&mut below);
                let more = below
                    .iter()
                    .rev()
                    .skip(1)
                    .any(|part| self.layers[part.layer].unlisted);
                if more && !later(whole.to_vec()) {
                    return Err(LayerError::Bound(format!(
                        "the names of the directories that its layers share take more than {PENDING_BYTES} bytes, which is the bound"
                    )));
                }
            }
        }
        Ok(())
    }

    /// Makes a directory of the layer, and those above it, each as it looks in the image.
    fn make(&mut self, path: &[u8]) -> Result<(), LayerError> {
        let mut parts = self.root_parts()?;
        let mut at = self.top(&parts)?;
        for name in path.split(|byte| *byte == b'/').filter(|n| !n.is_empty()) {
            let fail = |e| failed("make the directory", path, e);
            let above = source(&parts).map(times).transpose();
            let above = above.map_err(fail)?;
            let below = self.parts(merged(&mut parts), name)?;
            parts = below;
            let made = match rustix::fs::mkdirat(&at, name, Mode::from_raw_mode(0o700)) {
                Ok(()) => true,
                Err(Errno::EXIST) => false,
                Err(error) => return Err(fail(error)),
            };
            let directory = rustix::fs::openat(&at, name, OPEN, Mode::empty()).map_err(fail)?;
            if made {
                self.count += 1;
                if let Some(source) = source(&parts) {
                    dress(&directory, &source.directory, path)?;
                }
                if let Some(above) = above {
                    rustix::fs::futimens(&at, &above).map_err(fail)?;
                }
            }
            at = directory;
        }
        Ok(())
    }

    /// The root of the layer, made when it is first asked for.
    fn top(&mut self, parts: &[Part]) -> Result<OwnedFd, LayerError> {
        let name = self.into.as_os_str().as_encoded_bytes();
        let fail = |e| LayerError::system("make the directory", name, e);
        if !self.made {
            rustix::fs::mkdir(self.into, Mode::from_raw_mode(0o700)).map_err(fail)?;
        }
        let top = rustix::fs::openat(CWD, self.into, OPEN, Mode::empty()).map_err(fail)?;
        if !self.made {
            self.made = true;
            self.count += 1;
            if let Some(source) = source(parts) {
                dress(&top, &source.directory, b"")?;
            }
        }
        Ok(top)
    }
}

fn is_directory(parent: impl AsFd, name: &[u8], kind: FileType) -> bool {
    match kind {
        FileType::Unknown => rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)
            .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory),
        kind => kind == FileType::Directory,
    }
}

fn times(part: &Part) -> Result<Timestamps, Errno> {
    let stat = rustix::fs::fstat(&part.directory)?;
    Ok(modified(stat.st_mtime, stat.st_mtime_nsec as u32))
}

/// The extended attributes of a directory, without those of overlayfs.
fn attributes(directory: impl AsFd) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, Errno> {
    let directory = directory.as_fd();
    let names = match rustix::fs::flistxattr_query(directory) {
        Ok(0) | Err(Errno::NOTSUP) => return Ok(BTreeMap::new()),
        Ok(length) => {
            let mut names = vec![0; length];
            let length = rustix::fs::flistxattr(directory, &mut names[..])?;
            names.truncate(length);
            names
        }
        Err(error) => return Err(error),
    };
    let mut found = BTreeMap::new();
    for name in names.split(|byte| *byte == 0) {
        if name.is_empty() || name.starts_with(OVERLAY) {
            continue;
        }
        let mut value = vec![0; rustix::fs::fgetxattr_query(directory, name)?];
        if !value.is_empty() {
            let length = rustix::fs::fgetxattr(directory, name, &mut value[..])?;
            value.truncate(length);
        }
        found.insert(name.to_vec(), value);
    }
    Ok(found)
}

/// Gives one directory the owner, mode, attributes and time of another.
fn dress(ours: impl AsFd, theirs: impl AsFd, path: &[u8]) -> Result<(), LayerError> {
    let (ours, theirs) = (ours.as_fd(), theirs.as_fd());
    let fail = |e| failed("set the owner, mode and attributes of", path, e);
    let stat = rustix::fs::fstat(theirs).map_err(fail)?;
    let (owner, group) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    rustix::fs::fchown(ours, Some(owner), Some(group)).map_err(fail)?;
    rustix::fs::fchmod(ours, Mode::from_raw_mode(stat.st_mode & 0o7777)).map_err(fail)?;
    for (name, value) in attributes(theirs).map_err(fail)? {
        match rustix::fs::fsetxattr(ours, name.as_slice(), &value, XattrFlags::empty()) {
            // As when a layer is unpacked: the label of a security module, for example.
            Ok(()) | Err(Errno::NOTSUP | Errno::PERM | Errno::INVAL) => {}
            Err(error) => return Err(fail(error)),
        }
    }
    let times = modified(stat.st_mtime, stat.st_mtime_nsec as u32);
    rustix::fs::futimens(ours, &times).map_err(fail)
}

fn failed(what: &str, path: &[u8], errno: Errno) -> LayerError {
    LayerError::system(what, path, errno)
}
