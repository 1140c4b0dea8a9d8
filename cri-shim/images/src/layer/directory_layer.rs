//! Makes the layer that gives an image's directories their metadata: owner, mode, extended
//! attributes and time.
//!
//! An archive may use a directory without listing it: `etc/app.conf`, but no `etc/`. In an image,
//! such a directory has the metadata that the layers below give it. Those layers differ from image
//! to image, but all images share the unpacked layer. So a shared layer takes nothing from the
//! layers below: there the directory belongs to root, has mode 0755 and is marked (see
//! [`super::tree`]). If the lower layers of an image give it other metadata, the image gets a small
//! layer on top, which has nothing but directories. overlayfs shows the metadata of the uppermost
//! directory of a name and merges the contents of all of them.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use rustix::fs::{AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

use super::error::LayerError;
use super::tree::{is_opaque, is_unlisted, modified};

/// The most lookups of a directory in a layer. An image of many layers that share tens of thousands
/// of directories needs far fewer. A hostile image must not keep a thread busy for hours.
const MAX_LOOKUPS: u64 = 1 << 24;

/// The most bytes that the paths of directories still to be visited may take.
const PENDING_BYTES: usize = 64 << 20;

/// The prefix of overlayfs's attributes, which concern only the layer that they are in.
const OVERLAY: &[u8] = b"trusted.overlay.";

const OPEN: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// One unpacked layer of an image.
#[derive(Clone, Debug)]
pub(crate) struct LowerLayer {
    /// Its directory.
    pub path: PathBuf,
    /// It has marked directories below its root.
    pub unlisted: bool,
}

/// Makes the directory `into`, which is the layer on top of `layers`. Those are listed uppermost
/// first, without the ones that another layer hides as a whole. Returns the number of directories
/// in the new layer. 0: the image needs no such layer, and `into` was not made. Calls `go_on`
/// before each step; an error of `go_on` ends the work. Blocks.
pub(crate) fn make_directory_layer(
    layers: &[LowerLayer],
    into: &Path,
    go_on: impl FnMut() -> Result<(), LayerError>,
) -> Result<u64, LayerError> {
    let roots = layers
        .iter()
        .map(|layer| {
            let root = rustix::fs::openat(CWD, &layer.path, OPEN, Mode::empty()).map_err(|e| {
                let path = layer.path.as_os_str().as_encoded_bytes();
                LayerError::system("open the layer", path, e)
            })?;
            Ok::<_, LayerError>(Rc::new(root))
        })
        .collect::<Result<Vec<_>, _>>()?;
    let mut walk = Walk {
        layers,
        roots,
        into,
        go_on,
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
    directory: Rc<OwnedFd>,
    /// The archive lists it, and so gives it its metadata.
    listed: bool,
    /// It hides the contents of the directory below it, but its metadata may come from there.
    opaque: bool,
}

struct Walk<'a, G> {
    layers: &'a [LowerLayer],
    roots: Vec<Rc<OwnedFd>>,
    into: &'a Path,
    go_on: G,
    made: bool,
    count: u64,
    lookups: u64,
}

/// The parts whose contents overlayfs merges.
fn merged(parts: &mut Vec<Part>) -> &[Part] {
    if let Some(last) = parts.iter().position(|part| part.opaque) {
        parts.truncate(last + 1);
    }
    parts
}

/// The part that gives the directory its metadata in the image: the uppermost that is listed, or
/// the uppermost of all if no layer lists the directory.
fn source(parts: &[Part]) -> Option<&Part> {
    parts.iter().find(|part| part.listed).or(parts.first())
}

impl<G: FnMut() -> Result<(), LayerError>> Walk<'_, G> {
    fn root_parts(&self) -> Result<Vec<Part>, LayerError> {
        let part = |(layer, root): (usize, &Rc<OwnedFd>)| {
            Ok(Part {
                layer,
                directory: Rc::clone(root),
                listed: !is_unlisted(root).map_err(|e| failed("look at", b"", e))?,
                opaque: false,
            })
        };
        self.roots.iter().enumerate().map(part).collect()
    }

    /// The directory `name` in each of `parents` that has it, above the first that hides the rest.
    fn parts(&mut self, parents: &[Part], name: &[u8]) -> Result<Vec<Part>, LayerError> {
        (self.go_on)()?;
        self.lookups += parents.len() as u64;
        if self.lookups > MAX_LOOKUPS {
            return Err(LayerError::Bound(format!(
                "its layers share too many directories: to compare them takes more than {MAX_LOOKUPS} lookups"
            )));
        }
        let mut parts = Vec::new();
        for parent in parents {
            let directory = match rustix::fs::openat(&parent.directory, name, OPEN, Mode::empty()) {
                Ok(directory) => directory,
                Err(Errno::NOENT) => continue,
                // A file, a link or a whiteout hides the directory in the layers below.
                Err(Errno::NOTDIR | Errno::LOOP) => break,
                Err(error) => return Err(failed("open the directory", name, error)),
            };
            let marked = self.layers[parent.layer].unlisted
                && is_unlisted(&directory).map_err(|e| failed("look at", name, e))?;
            parts.push(Part {
                layer: parent.layer,
                listed: !marked,
                opaque: is_opaque(&directory),
                directory: Rc::new(directory),
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

    /// Gives the root directory its metadata. A difference in its time alone does not matter:
    /// containers see the time of their writable layer's root, which is as new as the container.
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

    /// Gives the directories in `path` their metadata. Passes those that may contain further ones
    /// to `later`, which returns whether it has room for another path.
    fn visit(
        &mut self,
        path: &[u8],
        mut later: impl FnMut(Vec<u8>) -> bool,
    ) -> Result<(), LayerError> {
        let mut parts = self.parts_of(path)?;
        let parents = merged(&mut parts);
        // The lowest layer that has the directory takes no metadata from a layer below.
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
                // Each name is handled once, in the uppermost of the layers that are read here.
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
                        "the paths of the directories that its layers share take more than {PENDING_BYTES} bytes"
                    )));
                }
            }
        }
        Ok(())
    }

    /// Makes a directory of the layer and its parents, and gives each the metadata that it has in
    /// the image.
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

    /// The root of the layer, which the first call makes.
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
            // Ignored as when a layer is unpacked: a security module's label, for example.
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
