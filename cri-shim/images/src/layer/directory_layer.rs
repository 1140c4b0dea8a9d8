//! Creates an image's directory layer, which gives directories their metadata: owner, mode,
//! extended attributes and time.
//!
//! An archive can use a directory without listing it. For example, an archive can contain an entry
//! `etc/app.conf`, but no entry `etc/`. Here, `etc` is called an unlisted directory of the layer.
//! In an image, an unlisted directory has the metadata of the same directory in the layers below.
//! But the server unpacks a layer only once for all images with this layer. The layers below can
//! differ between these images. On the disk, an unlisted directory therefore always belongs to
//! root, has mode 0755 and has a mark (see [`super::tree`]).
//!
//! If an unlisted directory has other metadata in the layers below, the image gets a directory
//! layer. The directory layer is a small additional layer on top of the other layers, and contains
//! only directories. Several layers can contain a directory at the same path. In this case,
//! overlayfs shows the metadata of the uppermost directory, and merges the contents of all these
//! directories.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use rustix::fs::{AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

use super::disk_use::DiskUse;
use super::error::LayerError;
use super::tree::{is_opaque, is_unlisted, modified};

/// The maximum number of directory lookups in the layers of one image. Without a limit, a hostile
/// image could keep a thread busy for hours. An image of many layers that share tens of thousands
/// of directories needs far fewer lookups.
const MAX_LOOKUPS: u64 = 1 << 24;

/// The maximum number of bytes for the paths of directories that are still to be visited.
const PENDING_BYTES: usize = 64 << 20;

/// The maximum number of descriptors for the directories between the layers' roots and the directory
/// that is being visited. If these directories had to be opened again for each visit, the time would
/// grow with the square of the depth.
const TRAIL_DESCRIPTORS: usize = 512;

/// The prefix of overlayfs's own attributes. Overlayfs attributes are not copied, because they
/// apply only to the layer that contains them.
const OVERLAY: &[u8] = b"trusted.overlay.";

const OPEN: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// One unpacked layer of an image.
#[derive(Clone, Debug)]
pub(crate) struct LowerLayer {
    /// The layer's directory.
    pub path: PathBuf,
    /// True if directories below the layer's root are marked as unlisted.
    pub unlisted: bool,
}

/// Creates the directory layer for `layers` in the new directory `into`. `layers` lists the
/// uppermost layer first, and omits layers that another layer hides completely.
///
/// Returns the number of directories in the directory layer, and their bytes on the disk. If the
/// image needs no directory layer, returns 0 and does not create `into`. Calls `go_on` before each
/// step; an error from `go_on` ends the work. This call blocks on disk I/O.
pub(crate) fn make_directory_layer(
    layers: &[LowerLayer],
    into: &Path,
    go_on: impl FnMut() -> Result<(), LayerError>,
) -> Result<(u64, u64), LayerError> {
    walk(layers, into, go_on).map(|walk| (walk.count, walk.used.bytes()))
}

fn walk<'a, G: FnMut() -> Result<(), LayerError>>(
    layers: &'a [LowerLayer],
    into: &'a Path,
    go_on: G,
) -> Result<Walk<'a, G>, LayerError> {
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
        used: DiskUse::default(),
        lookups: 0,
        trail: Trail::default(),
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
    Ok(walk)
}

/// One layer's version of a directory in the image.
struct Part {
    layer: usize,
    directory: Rc<OwnedFd>,
    /// True if the layer's archive lists the directory, and therefore determines the directory's
    /// metadata.
    listed: bool,
    /// True if the directory hides the contents of the same directory in lower layers. A lower
    /// layer can nevertheless determine the metadata of the directory itself.
    opaque: bool,
}

struct Walk<'a, G> {
    layers: &'a [LowerLayer],
    roots: Vec<Rc<OwnedFd>>,
    into: &'a Path,
    go_on: G,
    made: bool,
    count: u64,
    used: DiskUse,
    lookups: u64,
    trail: Trail,
}

/// The directories on the path to the directory that was visited last. The uppermost directories are
/// omitted if all together would need too many descriptors.
#[derive(Default)]
struct Trail {
    path: Vec<u8>,
    /// For each directory, the length of its path, and its versions.
    levels: VecDeque<(usize, Rc<Vec<Part>>)>,
    descriptors: usize,
}

impl Trail {
    /// Removes the directories that do not contain `path`. Returns the deepest remaining directory.
    fn shorten(&mut self, path: &[u8]) -> Option<(usize, Rc<Vec<Part>>)> {
        let equal = |(ours, theirs): &(&u8, &u8)| ours == theirs;
        let same = self.path.iter().zip(path).take_while(equal).count();
        while let Some((length, parts)) = self.levels.back() {
            let ends_there = path.get(*length).is_none_or(|next| *next == b'/');
            if *length <= same && ends_there {
                return Some((*length, Rc::clone(parts)));
            }
            self.descriptors -= parts.len();
            self.levels.pop_back();
        }
        None
    }

    fn push(&mut self, length: usize, parts: &Rc<Vec<Part>>) {
        self.descriptors += parts.len();
        self.levels.push_back((length, Rc::clone(parts)));
        while self.descriptors > TRAIL_DESCRIPTORS {
            let Some((_, parts)) = self.levels.pop_front() else {
                return;
            };
            self.descriptors -= parts.len();
        }
    }
}

/// The names of subdirectories that were already handled during a visit. Without this list, each
/// name would be looked up again for each layer that contains it.
struct HandledNames {
    names: HashSet<Vec<u8>>,
    bytes: usize,
    /// True if several layers can contain the same name.
    needed: bool,
}

impl HandledNames {
    fn new(layers: usize) -> Self {
        HandledNames {
            names: HashSet::new(),
            bytes: 0,
            needed: layers > 1,
        }
    }

    /// Adds a name. Returns false if the name was already handled.
    fn insert(&mut self, name: &[u8]) -> Result<bool, LayerError> {
        if !self.needed {
            return Ok(true);
        }
        if self.names.contains(name) {
            return Ok(false);
        }
        self.bytes += name.len();
        if self.bytes > PENDING_BYTES {
            return Err(too_many_paths());
        }
        Ok(self.names.insert(name.to_vec()))
    }
}

fn too_many_paths() -> LayerError {
    LayerError::Bound(format!(
        "several layers of the image contain the same directories, and the paths of these directories have more than {PENDING_BYTES} bytes in total"
    ))
}

/// Returns the versions of a directory down to the first opaque version. Overlayfs does not show
/// the contents of the versions below.
fn merged(parts: &[Part]) -> &[Part] {
    match parts.iter().position(|part| part.opaque) {
        Some(last) => &parts[..=last],
        None => parts,
    }
}

/// Returns the version of the directory that determines its metadata in the image. If the archive
/// of at least one layer lists the directory, the uppermost of these layers determines the
/// metadata. If no archive lists the directory, the uppermost layer that contains the directory
/// determines the metadata.
fn source(parts: &[Part]) -> Option<&Part> {
    parts.iter().find(|part| part.listed).or(parts.first())
}

impl<G: FnMut() -> Result<(), LayerError>> Walk<'_, G> {
    fn root_parts(&self) -> Result<Vec<Part>, LayerError> {
        let part = |(layer, root): (usize, &Rc<OwnedFd>)| {
            Ok(Part {
                layer,
                directory: Rc::clone(root),
                listed: !is_unlisted(root).map_err(|e| failed("read the attributes of", b"", e))?,
                opaque: false,
            })
        };
        self.roots.iter().enumerate().map(part).collect()
    }

    /// Returns the directories with the name `name` in `parents`. Skips each parent without a file
    /// `name`. Stops at the first parent in which `name` is not a directory.
    fn parts(&mut self, parents: &[Part], name: &[u8]) -> Result<Vec<Part>, LayerError> {
        (self.go_on)()?;
        self.lookups += parents.len() as u64;
        if self.lookups > MAX_LOOKUPS {
            return Err(LayerError::Bound(format!(
                "the image's layers share too many directories: comparing the directories takes more than {MAX_LOOKUPS} lookups"
            )));
        }
        let mut parts = Vec::new();
        for parent in parents {
            let directory = match rustix::fs::openat(&parent.directory, name, OPEN, Mode::empty()) {
                Ok(directory) => directory,
                Err(Errno::NOENT) => continue,
                // A file, a symbolic link or a whiteout hides the directory `name` in the layers
                // below.
                Err(Errno::NOTDIR | Errno::LOOP) => break,
                Err(error) => return Err(failed("open the directory", name, error)),
            };
            let marked = self.layers[parent.layer].unlisted
                && is_unlisted(&directory)
                    .map_err(|e| failed("read the attributes of", name, e))?;
            parts.push(Part {
                layer: parent.layer,
                listed: !marked,
                opaque: is_opaque(&directory),
                directory: Rc::new(directory),
            });
        }
        Ok(parts)
    }

    /// Returns the versions of the directory `path`.
    fn parts_of(&mut self, path: &[u8]) -> Result<Rc<Vec<Part>>, LayerError> {
        let (mut end, mut parts) = match self.trail.shorten(path) {
            Some(known) => known,
            None => (0, Rc::new(self.root_parts()?)),
        };
        while end < path.len() {
            let start = end + usize::from(end > 0);
            let rest = &path[start..];
            let slash = rest.iter().position(|byte| *byte == b'/');
            end = start + slash.unwrap_or(rest.len());
            parts = Rc::new(self.parts(merged(&parts), &path[start..end])?);
            self.trail.push(end, &parts);
        }
        self.trail.path = path.to_vec();
        Ok(parts)
    }

    /// Creates the root of the directory layer if the uppermost layer's root directory has the
    /// wrong metadata for this image. A wrong modification time alone does not matter, because a
    /// container sees the time of its writable layer's root.
    fn root(&mut self) -> Result<(), LayerError> {
        let parts = self.root_parts()?;
        let (Some(top), Some(source)) = (parts.first(), source(&parts)) else {
            return Ok(());
        };
        if top.layer == source.layer {
            return Ok(());
        }
        let fail = |e| failed("read the attributes of", b"", e);
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

    /// Visits the subdirectories of the directory `path`. For each subdirectory, checks the
    /// metadata in the uppermost layer that contains the subdirectory. If the metadata is wrong for
    /// this image, creates the subdirectory in the directory layer. Calls `later` with the path of
    /// each subdirectory that must also be visited. `later` collects these paths, and returns false
    /// if the paths have too many bytes.
    fn visit(
        &mut self,
        path: &[u8],
        mut later: impl FnMut(Vec<u8>) -> bool,
    ) -> Result<(), LayerError> {
        let parts = self.parts_of(path)?;
        let parents = merged(&parts);
        // Skip the lowest layer that contains this directory. No layer below contains the same
        // subdirectories, so the subdirectories already have the right metadata.
        let upper = parents.len().saturating_sub(1);
        let unlisted = |parent: &&Part| self.layers[parent.layer].unlisted;
        let upper: Vec<&Part> = parents[..upper].iter().filter(unlisted).collect();
        let mut handled = HandledNames::new(upper.len());
        for parent in upper {
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
                // Several layers can contain a directory with this name. The directory is handled
                // only once, for the uppermost of these layers that has unlisted directories.
                if !handled.insert(name)? {
                    continue;
                }
                let below = self.parts(parents, name)?;
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
                let below = merged(&below);
                let more = below
                    .iter()
                    .rev()
                    .skip(1)
                    .any(|part| self.layers[part.layer].unlisted);
                if more && !later(whole.to_vec()) {
                    return Err(too_many_paths());
                }
            }
        }
        Ok(())
    }

    /// Creates the directory `path` and its parents in the directory layer. Gives each of these
    /// directories the metadata that the directory must have in the image.
    fn make(&mut self, path: &[u8]) -> Result<(), LayerError> {
        let fail = |e| failed("create the directory", path, e);
        let root = self.root_parts()?;
        let top = self.top(&root)?;
        let mut missing = Vec::new();
        let mut prefix = path;
        let mut at = loop {
            if prefix.is_empty() {
                break top;
            }
            match rustix::fs::openat(&top, prefix, OPEN, Mode::empty()) {
                Ok(directory) => break directory,
                // If the path is too long for one call, its directories are opened one by one.
                Err(Errno::NOENT | Errno::NAMETOOLONG) => {}
                Err(error) => return Err(fail(error)),
            }
            let (parent, name) = split(prefix);
            missing.push((parent, prefix, name));
            prefix = parent;
        };
        for (parent, prefix, name) in missing.into_iter().rev() {
            let above = source(&self.parts_of(parent)?).map(times).transpose();
            let above = above.map_err(fail)?;
            let made = match rustix::fs::mkdirat(&at, name, Mode::from_raw_mode(0o700)) {
                Ok(()) => true,
                Err(Errno::EXIST) => false,
                Err(error) => return Err(fail(error)),
            };
            let directory = rustix::fs::openat(&at, name, OPEN, Mode::empty()).map_err(fail)?;
            if made {
                self.count += 1;
                self.used.add_directory();
                self.used.add_name(name);
                if let Some(source) = source(&self.parts_of(prefix)?) {
                    copy_metadata(&directory, &source.directory, path, &mut self.used)?;
                }
                if let Some(above) = above {
                    rustix::fs::futimens(&at, &above).map_err(fail)?;
                }
            }
            at = directory;
        }
        Ok(())
    }

    /// Opens the root of the directory layer. The first call creates the root.
    fn top(&mut self, parts: &[Part]) -> Result<OwnedFd, LayerError> {
        let name = self.into.as_os_str().as_encoded_bytes();
        let fail = |e| LayerError::system("create the directory", name, e);
        if !self.made {
            rustix::fs::mkdir(self.into, Mode::from_raw_mode(0o700)).map_err(fail)?;
        }
        let top = rustix::fs::openat(CWD, self.into, OPEN, Mode::empty()).map_err(fail)?;
        if !self.made {
            self.made = true;
            self.count += 1;
            self.used.add_directory();
            if let Some(source) = source(parts) {
                copy_metadata(&top, &source.directory, b"", &mut self.used)?;
            }
        }
        Ok(top)
    }
}

/// Splits a path into its directory and its last component.
fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (&[], path),
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

/// Returns the extended attributes of a directory, except the attributes of overlayfs.
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

/// Copies the owner, mode, attributes and time from the directory `theirs` to `ours`. Adds the
/// attributes to `used`.
fn copy_metadata(
    ours: impl AsFd,
    theirs: impl AsFd,
    path: &[u8],
    used: &mut DiskUse,
) -> Result<(), LayerError> {
    let (ours, theirs) = (ours.as_fd(), theirs.as_fd());
    let fail = |e| failed("set the owner, mode and attributes of", path, e);
    let stat = rustix::fs::fstat(theirs).map_err(fail)?;
    let (owner, group) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    rustix::fs::fchown(ours, Some(owner), Some(group)).map_err(fail)?;
    rustix::fs::fchmod(ours, Mode::from_raw_mode(stat.st_mode & 0o7777)).map_err(fail)?;
    let attributes = attributes(theirs).map_err(fail)?;
    let lengths = attributes.iter();
    let lengths = lengths.map(|(name, value)| (name.len(), value.len()));
    used.add_xattrs(lengths);
    for (name, value) in attributes {
        match rustix::fs::fsetxattr(ours, name.as_slice(), &value, XattrFlags::empty()) {
            // The errors ENOTSUP, EPERM and EINVAL are ignored, as in the code that unpacks a
            // layer. For example, a label of an inactive security module causes one of these
            // errors.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::remove_path;
    use crate::layer::tree::mark_unlisted;

    /// Creates a layer whose directories are all unlisted if `unlisted` is true. `paths` are the
    /// components of each directory's path.
    fn layer(
        path: PathBuf,
        paths: &[Vec<String>],
        unlisted: bool,
    ) -> Result<LowerLayer, Box<dyn std::error::Error>> {
        std::fs::create_dir_all(&path)?;
        for components in paths {
            let mut at = rustix::fs::openat(CWD, &path, OPEN, Mode::empty())?;
            for name in components {
                match rustix::fs::mkdirat(&at, name.as_str(), Mode::from_raw_mode(0o755)) {
                    Err(error) if error != Errno::EXIST => return Err(error.into()),
                    _ => at = rustix::fs::openat(&at, name.as_str(), OPEN, Mode::empty())?,
                }
                if unlisted {
                    mark_unlisted(&at)?;
                } else {
                    rustix::fs::fchmod(&at, Mode::from_raw_mode(0o711))?;
                }
            }
        }
        Ok(LowerLayer { path, unlisted })
    }

    #[test]
    fn the_time_for_many_layers_grows_linearly_with_their_number()
    -> Result<(), Box<dyn std::error::Error>> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: only root can mark directories as unlisted");
            return Ok(());
        }
        let base = std::env::temp_dir().join(format!("rrun-many-layers-{}", std::process::id()));
        let paths: Vec<Vec<String>> = (0..100).map(|name| vec![name.to_string()]).collect();
        let mut layers = vec![layer(base.join("lowest"), &paths, false)?];
        for number in 0..50 {
            layers.insert(0, layer(base.join(number.to_string()), &paths, true)?);
        }
        let into = base.join("into");
        let walk = walk(&layers, &into, || Ok(()))?;
        assert_eq!(walk.count, 101);
        let opened = (paths.len() * layers.len()) as u64;
        assert!(walk.lookups < 4 * opened, "{} lookups", walk.lookups);
        remove_path(&base)?;
        Ok(())
    }

    /// A path of 1,000 directories with a second directory on each level, in two layers. If each
    /// visit began at the layers' roots, two million lookups would be necessary.
    #[test]
    fn the_time_for_a_deep_tree_grows_linearly_with_its_depth()
    -> Result<(), Box<dyn std::error::Error>> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: only root can mark directories as unlisted");
            return Ok(());
        }
        const DEPTH: usize = 1000;
        let base = std::env::temp_dir().join(format!("rrun-comb-{}", std::process::id()));
        let spine: Vec<String> = vec!["a".to_owned(); DEPTH];
        let teeth = (0..DEPTH).step_by(10).map(|depth| {
            let mut path = spine[..depth].to_vec();
            path.extend(["b".to_owned(), "c".to_owned()]);
            path
        });
        let paths: Vec<Vec<String>> = teeth.chain([spine.clone()]).collect();
        let layers = [
            layer(base.join("upper"), &paths, true)?,
            layer(base.join("lower"), &paths, false)?,
        ];
        let into = base.join("into");
        let walk = walk(&layers, &into, || Ok(()))?;
        let directories = 1 + DEPTH + 2 * DEPTH / 10;
        assert_eq!(walk.count, directories as u64);
        assert!(
            walk.lookups < 40 * directories as u64,
            "{} lookups",
            walk.lookups
        );
        let deepest = into.join(spine[..500].join("/"));
        let mode = std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(deepest)?);
        assert_eq!(mode & 0o777, 0o711);
        remove_path(&base)?;
        Ok(())
    }
}
