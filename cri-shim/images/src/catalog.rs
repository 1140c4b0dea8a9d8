//! The in-memory catalog of this node's images, their names, their layers, and the leases that keep
//! layers. Methods that change the catalog return these changes, and the caller must write the
//! changes to the store. Apart from `load`, the methods never block.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::ImageError;
use crate::images::failed;
use crate::pin::Pins;
use crate::record::Image;
use crate::reference::{Name, Target};
use rrun_store::{Change, Store, Table};

/// The number of the empty layer. An image without layers uses the empty layer, because overlayfs
/// requires at least one lower directory.
pub(crate) const EMPTY_LAYER: u64 = 0;

/// The maximum number of tags, and of digest references, of one image. The server keeps them in
/// memory, and ListImages returns the names of all images in one message.
const MAX_NAMES: usize = 1000;

/// The maximum number of blobs of one layer that the catalog contains. Layers from further blobs are
/// fetched again for each image.
const MAX_BLOBS: usize = 1000;

/// The number of names of one image up to which a registry loses no name because of the names from
/// other registries.
const NAMES_OF_A_REGISTRY: usize = MAX_NAMES / 10;

/// The record of one unpacked layer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Layer {
    /// The number in the path of the layer's directory, `layers/NUMBER/fs`. The options of an
    /// overlay mount contain the paths of all layers, and must fit into one page. The path of a
    /// layer is therefore short.
    pub number: u64,
    pub bytes: u64,
    pub inodes: u64,
    /// True if the layer hides all layers below it. See [`crate::layer::UnpackSummary`].
    pub opaque_root: bool,
    /// True if the layer has unlisted directories. A directory is unlisted if the archive has
    /// entries for files in the directory, but no entry for the directory itself.
    #[serde(default)]
    pub unlisted: bool,
}

/// Returns the key of the layer with the given diff ID. All images can share this layer, because
/// its content depends only on its archive.
///
/// Older versions of rrun stored a layer under its diff ID without a prefix. They unpacked a layer
/// for the first image that contained it. A directory without an entry in the archive got the owner
/// and mode that were right for this first image. The images and containers in an older version's
/// records continue to use the layer under its diff ID. No other image may use it.
pub(crate) fn key_of(diff_id: &str) -> String {
    format!("shared/{diff_id}")
}

/// Returns the key of the directory layer for the layers with the given keys (lowest first). The
/// directory layer is placed on top of these layers and sets the owner and mode of directories. The
/// content of the directory layer depends only on the layers below.
pub(crate) fn directory_layer_key(keys: &[String]) -> String {
    let chain = crate::layer::digest_of(keys.join(" ").as_bytes());
    format!("looks/{chain}")
}

/// A lease, which keeps an image's layers on the node for a container or for one of its image
/// volumes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Lease {
    pub image: String,
    /// The keys of the image's layers, lowest first.
    pub layers: Vec<String>,
}

#[derive(Default)]
pub(crate) struct Catalog {
    images: BTreeMap<String, Arc<Image>>,
    /// The image ids, by complete tag or digest reference.
    names: HashMap<String, String>,
    /// The size of each image's unpacked layers in bytes, by the image's id.
    layer_bytes: HashMap<String, u64>,
    /// The layers, by their keys. A key is the result of [`key_of`] or [`directory_layer_key`], or
    /// a diff ID if an older version unpacked the layer.
    layers: HashMap<String, Layer>,
    /// The blobs from which each layer was unpacked: digest and size, by the layer's key. An image
    /// shares a layer only if its manifest names such a blob. Any image can name a diff ID, but only
    /// a pull that receives the blob proves that it has access to the layer.
    blobs: HashMap<String, HashSet<(String, u64)>>,
    /// The keys of layers whose records are not in the store yet.
    unrecorded: HashSet<String>,
    leases: HashMap<String, Lease>,
    /// For each layer, the number of images, leases and pulls in progress that need the layer. The key
    /// is the layer's key.
    uses: HashMap<String, usize>,
    /// The keys of the layers that can be unused: new layers, and layers whose last use ended. Only
    /// these layers are examined by [`Catalog::sweep`], because a node can have very many images and
    /// leases.
    released: HashSet<String>,
    /// The patterns of names that an image with too many names does not lose.
    pub pins: Pins,
}

pub(crate) fn directory(root: &Path, number: u64) -> PathBuf {
    root.join("layers").join(number.to_string())
}

/// Returns whether the directory of a layer exists. Any other error must not count as a missing
/// directory, because the server would then delete the records of images.
fn is_directory(path: &Path) -> Result<bool, ImageError> {
    match std::fs::symlink_metadata(path) {
        Ok(found) => Ok(found.is_dir()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(failed("find the directory", path, &error)),
    }
}

/// Returns the path of the empty lower directory, which an image without layers uses.
pub fn empty_layer(root: &Path) -> PathBuf {
    directory(root, EMPTY_LAYER).join("fs")
}

impl Catalog {
    /// Loads the records from the store. If a layer's directory no longer exists, drops the layer's
    /// record and the records of all images with this layer. Also returns the changes that delete
    /// the dropped records from the store.
    pub(crate) fn load(store: &Store, root: &Path) -> Result<(Self, Vec<Change>), ImageError> {
        let mut catalog = Catalog::default();
        let mut changes = Vec::new();
        for (key, layer) in store.load::<Layer>(Table::LAYERS)? {
            if is_directory(&directory(root, layer.number).join("fs"))? {
                catalog.released.insert(key.clone());
                catalog.layers.insert(key, layer);
            } else {
                log::error!("the directory of the layer {key} no longer exists");
                changes.push(Change::delete(Table::LAYERS, &key));
            }
        }
        for (id, image) in store.load::<Image>(Table::IMAGES)? {
            if image
                .keys()
                .into_iter()
                .all(|key| catalog.layers.contains_key(key))
            {
                catalog.insert(Arc::new(image));
            } else {
                log::error!(
                    "layers of the image {id} no longer exist; the image must be pulled again"
                );
                changes.push(Change::delete(Table::IMAGES, &id));
                changes.push(Change::delete(Table::CONFIGURATIONS, &id));
            }
        }
        for (owner, lease) in store.load::<Lease>(Table::LEASES)? {
            catalog.insert_lease(owner, lease);
        }
        Ok((catalog, changes))
    }

    fn insert(&mut self, image: Arc<Image>) {
        // An image was recorded only after all its blobs were unpacked. In a record of an older
        // version, `unpacked` can be empty. No other image shares the layers of such an image.
        for (key, layer) in image.unpacked.iter().zip(&image.layers) {
            self.add_blob(key, &layer.digest, layer.size);
        }
        for name in image.repo_tags.iter().chain(&image.repo_digests) {
            self.names.insert(name.clone(), image.id.clone());
        }
        self.hold(image.keys().into_iter());
        let bytes = self.bytes_of_layers(&image);
        self.layer_bytes.insert(image.id.clone(), bytes);
        if let Some(before) = self.images.insert(image.id.clone(), image) {
            self.release_hold(before.keys().into_iter());
        }
    }

    pub(crate) fn list(&self) -> Vec<Arc<Image>> {
        self.images.values().cloned().collect()
    }

    /// Finds an image by its name, by its id, or by a unique beginning of its id.
    pub(crate) fn find(&self, query: &str) -> Option<Arc<Image>> {
        if let Some(image) = self.images.get(query) {
            return Some(Arc::clone(image));
        }
        if let Ok(name) = Name::parse(query)
            && let Some(id) = self.names.get(&name.canonical())
        {
            return self.images.get(id).cloned();
        }
        let hex = query.strip_prefix("sha256:").unwrap_or(query);
        if hex.is_empty() || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        let beginning = format!("sha256:{hex}");
        let mut found = self
            .images
            .range(beginning.clone()..)
            .take_while(|(id, _)| id.starts_with(&beginning));
        match (found.next(), found.next()) {
            (Some((_, only)), None) => Some(Arc::clone(only)),
            _ => None,
        }
    }

    /// Records a pulled image under `names` and under the digest of its manifest. A tag that
    /// belongs to another image moves to the pulled image.
    pub(crate) fn publish(
        &mut self,
        mut image: Image,
        names: &[Name],
        digest: Option<&str>,
    ) -> Result<(Arc<Image>, Vec<Change>), ImageError> {
        let mut changes = Vec::new();
        if let Some(known) = self.images.get(&image.id) {
            image.repo_tags.clone_from(&known.repo_tags);
            image.repo_digests.clone_from(&known.repo_digests);
            image.pinned = known.pinned;
        }
        let is_tag = |name: &&Name| matches!(name.target, Target::Tag(_));
        let tags: Vec<String> = names.iter().filter(is_tag).map(Name::canonical).collect();
        for other in self.take_tags(&tags, &image.id) {
            changes.push(Change::put(Table::IMAGES, &other.id, other.as_ref())?);
        }
        let digests = digest.into_iter();
        let digests = digests.flat_map(|digest| names.iter().map(|name| name.with_digest(digest)));
        let digests: Vec<String> = digests.collect();
        for (list, new) in [
            (&mut image.repo_tags, tags),
            (&mut image.repo_digests, digests),
        ] {
            add(list, new.iter().cloned());
            for name in take_excess_names(list, &new, &self.pins) {
                log::info!(
                    "the image {} loses the name {name}, because it has more than {MAX_NAMES} names",
                    image.id
                );
                if self.names.get(&name) == Some(&image.id) {
                    self.names.remove(&name);
                }
            }
        }
        for key in image.keys() {
            if self.unrecorded.contains(key)
                && let Some(record) = self.layers.get(key)
            {
                changes.push(Change::put(Table::LAYERS, key, record)?);
            }
        }
        changes.push(Change::put(Table::IMAGES, &image.id, &image)?);
        for key in image.keys() {
            self.unrecorded.remove(key);
        }
        let image = Arc::new(image);
        self.insert(Arc::clone(&image));
        Ok((image, changes))
    }

    /// Removes `tags` from all images except the image `id`. Returns the changed images.
    fn take_tags(&mut self, tags: &[String], id: &str) -> Vec<Arc<Image>> {
        let owners: BTreeSet<&String> = tags.iter().filter_map(|tag| self.names.get(tag)).collect();
        let tags: HashSet<&String> = tags.iter().collect();
        let mut changed = Vec::new();
        for owner in owners.into_iter().filter(|owner| *owner != id) {
            if let Some(image) = self.images.get_mut(owner) {
                let kept = |tag: &String| !tags.contains(tag);
                Arc::make_mut(image).repo_tags.retain(kept);
                changed.push(Arc::clone(image));
            }
        }
        changed
    }

    /// Removes an image and all its names. The image's layers remain until [`Catalog::sweep`]
    /// removes them.
    pub(crate) fn remove(&mut self, id: &str) -> Vec<Change> {
        let Some(image) = self.images.remove(id) else {
            return Vec::new();
        };
        self.layer_bytes.remove(id);
        self.release_hold(image.keys().into_iter());
        for name in image.repo_tags.iter().chain(&image.repo_digests) {
            if self.names.get(name).is_some_and(|named| named == id) {
                self.names.remove(name);
            }
        }
        vec![
            Change::delete(Table::IMAGES, id),
            Change::delete(Table::CONFIGURATIONS, id),
        ]
    }

    /// Reverts a call of [`Catalog::publish`] whose changes could not be written to the store.
    /// `before` is the image's record from before this call.
    pub(crate) fn restore(&mut self, id: &str, before: Option<Arc<Image>>) {
        self.remove(id);
        if let Some(before) = before {
            self.insert(before);
        }
    }

    pub(crate) fn layer(&self, key: &str) -> Option<&Layer> {
        self.layers.get(key)
    }

    /// Returns whether a layer was unpacked from the blob with this digest and size.
    pub(crate) fn has_blob(&self, key: &str, digest: &str, size: u64) -> bool {
        let blobs = self.blobs.get(key);
        self.layers.contains_key(key)
            && blobs.is_some_and(|blobs| blobs.contains(&(digest.to_owned(), size)))
    }

    /// Records that the layer with the given key was unpacked from this blob.
    pub(crate) fn add_blob(&mut self, key: &str, digest: &str, size: u64) {
        let blobs = self.blobs.entry(key.to_owned()).or_default();
        if blobs.len() < MAX_BLOBS {
            blobs.insert((digest.to_owned(), size));
        }
    }

    pub(crate) fn add_layer(&mut self, key: &str, layer: Layer) {
        self.unrecorded.insert(key.to_owned());
        self.released.insert(key.to_owned());
        self.layers.insert(key.to_owned(), layer);
    }

    /// Returns whether the store contains the records of all layers with the given keys.
    pub(crate) fn all_recorded<'a>(&self, mut keys: impl Iterator<Item = &'a str>) -> bool {
        keys.all(|key| self.layers.contains_key(key) && !self.unrecorded.contains(key))
    }

    /// Counts one more use of each layer.
    pub(crate) fn hold<'a>(&mut self, keys: impl Iterator<Item = &'a str>) {
        for key in keys {
            match self.uses.get_mut(key) {
                Some(count) => *count += 1,
                None => drop(self.uses.insert(key.to_owned(), 1)),
            }
        }
    }

    /// Ends one use of each layer that [`Catalog::hold`] counted.
    pub(crate) fn release_hold<'a>(&mut self, keys: impl Iterator<Item = &'a str>) {
        for key in keys {
            if let Some(count) = self.uses.get_mut(key) {
                *count -= 1;
                if *count == 0 {
                    self.uses.remove(key);
                    self.released.insert(key.to_owned());
                }
            }
        }
    }

    /// Removes the records of layers that no image, lease or pull uses. Returns the removed
    /// records, and the changes that delete these records from the store. After the changes are
    /// written, the caller must remove the layers' directories.
    pub(crate) fn sweep(&mut self) -> (Vec<Layer>, Vec<Change>) {
        let mut layers = Vec::new();
        let mut changes = Vec::new();
        for key in std::mem::take(&mut self.released) {
            if self.uses.contains_key(&key) {
                continue;
            }
            let Some(layer) = self.layers.remove(&key) else {
                continue;
            };
            layers.push(layer);
            self.blobs.remove(&key);
            if !self.unrecorded.remove(&key) {
                changes.push(Change::delete(Table::LAYERS, &key));
            }
        }
        (layers, changes)
    }

    pub(crate) fn lease(&self, owner: &str) -> Option<&Lease> {
        self.leases.get(owner)
    }

    /// Returns whether the image of a lease is on the node and uses all layers of the lease. If so,
    /// no layer becomes unused when the lease is removed.
    pub(crate) fn image_keeps_lease(&self, owner: &str) -> bool {
        self.leases.get(owner).is_some_and(|lease| {
            let image = self.images.get(&lease.image);
            image.is_some_and(|image| image.keys() == lease.layers)
        })
    }

    pub(crate) fn image(&self, id: &str) -> Option<&Arc<Image>> {
        self.images.get(id)
    }

    pub(crate) fn add_lease(
        &mut self,
        owner: &str,
        lease: Lease,
    ) -> Result<Vec<Change>, ImageError> {
        let change = Change::put(Table::LEASES, owner, &lease)?;
        self.insert_lease(owner.to_owned(), lease);
        Ok(vec![change])
    }

    fn insert_lease(&mut self, owner: String, lease: Lease) {
        self.hold(lease.layers.iter().map(String::as_str));
        if let Some(before) = self.leases.insert(owner, lease) {
            self.release_hold(before.layers.iter().map(String::as_str));
        }
    }

    pub(crate) fn remove_lease(&mut self, owner: &str) -> Vec<Change> {
        match self.leases.remove(owner) {
            Some(lease) => {
                self.release_hold(lease.layers.iter().map(String::as_str));
                vec![Change::delete(Table::LEASES, owner)]
            }
            None => Vec::new(),
        }
    }

    pub(crate) fn owners(&self) -> Vec<String> {
        self.leases.keys().cloned().collect()
    }

    /// Returns the overlay lower directories of the layers with the given keys (lowest first). The
    /// result starts with the uppermost layer. If a layer hides all layers below it, the result
    /// ends with this layer. The kernel refuses an overlay mount with the same lower directory
    /// twice. If an image contains a layer twice, the result therefore contains only the upper
    /// occurrence. The lower occurrence would not change the files in the container. Returns `None`
    /// if a layer is missing.
    pub(crate) fn lowers<'a>(
        &self,
        keys: impl DoubleEndedIterator<Item = &'a str>,
        root: &Path,
    ) -> Option<Vec<PathBuf>> {
        let stack = self.stack(keys)?;
        let path = |number| directory(root, number).join("fs");
        Some(if stack.is_empty() {
            vec![path(EMPTY_LAYER)]
        } else {
            stack.iter().map(|layer| path(layer.number)).collect()
        })
    }

    /// Returns the layers whose directories [`Catalog::lowers`] returns, in the same order.
    pub(crate) fn stack<'a>(
        &self,
        keys: impl DoubleEndedIterator<Item = &'a str>,
    ) -> Option<Vec<Layer>> {
        let mut stack: Vec<Layer> = Vec::new();
        for key in keys.rev() {
            let layer = self.layers.get(key)?;
            if !stack.iter().any(|above| above.number == layer.number) {
                stack.push(layer.clone());
            }
            if layer.opaque_root {
                break;
            }
        }
        Some(stack)
    }

    /// Returns the numbers of the directories of all layers in the catalog.
    pub(crate) fn numbers(&self) -> HashSet<u64> {
        self.layers.values().map(|layer| layer.number).collect()
    }

    /// Returns the size of an image on the disk in bytes, including its configuration in the store
    /// and the layers that it shares with other images.
    pub(crate) fn bytes_of(&self, image: &Image) -> u64 {
        let layers = self.layer_bytes.get(&image.id).copied();
        let layers = layers.unwrap_or_else(|| self.bytes_of_layers(image));
        layers.saturating_add(image.document_bytes())
    }

    fn bytes_of_layers(&self, image: &Image) -> u64 {
        let keys: HashSet<&str> = image.keys().into_iter().collect();
        let layers = keys.into_iter().filter_map(|key| self.layers.get(key));
        layers.map(|layer| layer.bytes).sum()
    }

    /// Returns the number of bytes and inodes of all layers.
    pub(crate) fn usage(&self) -> (u64, u64) {
        self.layers.values().fold((0, 0), |(bytes, inodes), layer| {
            (bytes + layer.bytes, inodes + layer.inodes)
        })
    }
}

/// Appends each of the `new` names that `names` does not contain yet.
fn add(names: &mut Vec<String>, new: impl IntoIterator<Item = String>) {
    let mut known: HashSet<String> = names.iter().cloned().collect();
    names.extend(new.into_iter().filter(|name| known.insert(name.clone())));
}

/// Removes names until at most [`MAX_NAMES`] names are left, and returns the removed names. Removes
/// the newest name from the registry with the most names, except pinned names and the names `new`
/// of the pull in progress. A user who pulls an image under many names can therefore hardly remove
/// the names that other users have pulled.
fn take_excess_names(names: &mut Vec<String>, new: &[String], pins: &Pins) -> Vec<String> {
    let mut taken = Vec::new();
    while names.len() > MAX_NAMES {
        let newest = newest_of_largest(names, |name| !pins.hold_name(name) && !new.contains(name))
            .or_else(|| newest_of_largest(names, |name| !pins.hold_name(name)))
            .or_else(|| newest_of_largest(names, |_| true));
        match newest {
            Some(newest) => taken.push(names.remove(newest)),
            None => break,
        }
    }
    taken
}

/// Finds the newest of the names that match `may_go` from the registry with the most names. If no
/// registry has more than [`NAMES_OF_A_REGISTRY`] names, finds the newest of all.
fn newest_of_largest(names: &[String], may_go: impl Fn(&String) -> bool) -> Option<usize> {
    let free: Vec<(usize, &str)> = names
        .iter()
        .enumerate()
        .filter(|(_, name)| may_go(name))
        .map(|(at, name)| (at, name.split('/').next().unwrap_or_default()))
        .collect();
    let mut counts: HashMap<&str, usize> = HashMap::new();
    for (_, registry) in &free {
        *counts.entry(registry).or_default() += 1;
    }
    let counted = |registry: &str| counts.get(registry).copied().unwrap_or_default();
    let newest = free
        .iter()
        .max_by_key(|(at, registry)| (counted(registry).max(NAMES_OF_A_REGISTRY), *at));
    newest.map(|(at, _)| *at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{ImageConfig, LayerName};

    fn id(c: &str) -> String {
        format!("sha256:{}", c.repeat(64))
    }

    fn image(c: &str, layers: &[&str]) -> Image {
        Image {
            id: id(c),
            repo_tags: Vec::new(),
            repo_digests: Vec::new(),
            size: 1,
            config: ImageConfig::default(),
            large_config: false,
            layers: layers
                .iter()
                .map(|layer| LayerName {
                    diff_id: id(layer),
                    digest: id(layer),
                    size: 1,
                })
                .collect(),
            unpacked: Vec::new(),
            pinned: false,
        }
    }

    fn with_layers(names: &[&str]) -> Catalog {
        let mut catalog = Catalog::default();
        for (number, name) in (1..).zip(names) {
            catalog.add_layer(
                &id(name),
                Layer {
                    number,
                    bytes: 10,
                    inodes: 1,
                    opaque_root: false,
                    unlisted: false,
                },
            );
        }
        catalog
    }

    #[test]
    fn an_image_keeps_its_digest_when_its_tag_moves_to_another_image() -> Result<(), ImageError> {
        let mut catalog = with_layers(&["1", "2"]);
        let name = Name::parse("r.example/app:1")?;
        catalog.publish(
            image("a", &["1"]),
            std::slice::from_ref(&name),
            Some(&id("e")),
        )?;
        catalog.publish(image("b", &["2"]), &[name], Some(&id("f")))?;
        let found = catalog
            .find("r.example/app:1")
            .map(|image| image.id.clone());
        assert_eq!(found, Some(id("b")));
        let old = catalog.find(&id("a"));
        assert!(old.is_some_and(|old| old.repo_tags.is_empty() && old.repo_digests.len() == 1));
        Ok(())
    }

    /// Records the same image under all names at once. Returns its record.
    fn pull_as(
        catalog: &mut Catalog,
        names: impl IntoIterator<Item = String>,
    ) -> Result<Arc<Image>, ImageError> {
        let names = names.into_iter().map(|name| Name::parse(&name));
        let names = names.collect::<Result<Vec<_>, _>>()?;
        Ok(catalog.publish(image("a", &[]), &names, Some(&id("e")))?.0)
    }

    #[test]
    fn the_names_of_one_registry_do_not_remove_the_names_of_another() -> Result<(), ImageError> {
        let mut catalog = with_layers(&[]);
        let few = ["r.example/few:1", "r.example/few:2", "r.example/other:1"];
        pull_as(&mut catalog, few.map(str::to_owned))?;
        let many = |number: usize| format!("many.example/r{number}:1");
        pull_as(&mut catalog, (0..MAX_NAMES - 3).map(many))?;
        for number in MAX_NAMES - 3..MAX_NAMES + 3 {
            let found = pull_as(&mut catalog, [many(number)])?;
            let counts = (found.repo_tags.len(), found.repo_digests.len());
            assert_eq!(counts, (MAX_NAMES, MAX_NAMES));
            assert!(catalog.find(&many(number)).is_some());
        }
        assert!(few.iter().all(|name| catalog.find(name).is_some()));
        // The names from a third registry replace names from the registry with the most names.
        let mut third = (0..5).map(|number| format!("third.example/r:{number}"));
        pull_as(&mut catalog, third.clone())?;
        pull_as(&mut catalog, [many(MAX_NAMES * 2)])?;
        assert!(third.all(|name| catalog.find(&name).is_some()));
        Ok(())
    }

    #[test]
    fn the_names_of_many_registries_and_pinned_names_do_not_remove_older_names()
    -> Result<(), ImageError> {
        let mut catalog = with_layers(&[]);
        catalog.pins = vec!["pinned.example/*".to_owned()].into();
        let are_here = |catalog: &Catalog, names: &[String]| {
            names.iter().all(|name| catalog.find(name).is_some())
        };
        let old: Vec<_> = (0..NAMES_OF_A_REGISTRY)
            .map(|number| format!("r.example/app:{number}"))
            .collect();
        pull_as(&mut catalog, old.clone())?;
        let many = |number: usize| format!("r{number}.example/app:1");
        pull_as(&mut catalog, (0..MAX_NAMES - old.len()).map(many))?;
        for number in MAX_NAMES..MAX_NAMES + 5 {
            pull_as(&mut catalog, [many(number)])?;
        }
        assert!(are_here(&catalog, &old));
        let pinned: Vec<_> = (0..MAX_NAMES)
            .map(|number| format!("pinned.example/app:{number}"))
            .collect();
        pull_as(&mut catalog, pinned.clone())?;
        assert!(are_here(&catalog, &pinned));
        // If no name may be removed, the image does not get the new name.
        let found = pull_as(&mut catalog, ["new.example/app:1".to_owned()])?;
        assert_eq!(found.repo_tags.len(), MAX_NAMES);
        assert!(are_here(&catalog, &pinned));
        Ok(())
    }

    #[test]
    fn the_record_of_an_image_that_loses_several_tags_is_written_once() -> Result<(), ImageError> {
        let mut catalog = with_layers(&[]);
        let names = ["x:1", "x:2", "x:3"].map(Name::parse);
        let names = names.into_iter().collect::<Result<Vec<_>, _>>()?;
        catalog.publish(image("a", &[]), &names, None)?;
        let (image, changes) = catalog.publish(image("b", &[]), &names[1..], None)?;
        assert_eq!((image.repo_tags.len(), changes.len()), (2, 2));
        let old = catalog.find("x:1").map(|image| image.repo_tags.clone());
        assert_eq!(old, Some(vec!["docker.io/library/x:1".to_owned()]));
        catalog.remove(&id("a"));
        assert!(catalog.find("x:1").is_none());
        assert!(catalog.find("x:2").is_some());
        Ok(())
    }

    #[test]
    fn an_image_is_found_by_a_unique_beginning_of_its_id() -> Result<(), ImageError> {
        let mut catalog = with_layers(&[]);
        catalog.publish(image("a", &[]), &[Name::parse("x:1")?], Some(&id("e")))?;
        let mut second = image("b", &[]);
        second.id = format!("sha256:aab{}", "0".repeat(61));
        catalog.publish(second, &[Name::parse("x:2")?], Some(&id("f")))?;
        assert!(catalog.find("aa").is_none());
        assert!(catalog.find("aaa").is_some());
        assert!(catalog.find("sha256:aab").is_some());
        assert!(catalog.find("x:1").is_some());
        assert!(catalog.find("docker.io/library/x:2").is_some());
        assert!(catalog.find("").is_none());
        Ok(())
    }

    #[test]
    fn a_layer_is_kept_while_an_image_a_lease_or_a_pull_needs_it() -> Result<(), ImageError> {
        let mut catalog = with_layers(&["1", "2", "3"]);
        catalog.publish(
            image("a", &["1", "2"]),
            &[Name::parse("x")?],
            Some(&id("e")),
        )?;
        catalog.hold([id("3").as_str()].into_iter());
        assert!(catalog.sweep().0.is_empty());
        catalog.add_lease(
            "pod",
            Lease {
                image: id("a"),
                layers: vec![id("1"), id("2")],
            },
        )?;
        assert!(catalog.image_keeps_lease("pod"));
        catalog.remove(&id("a"));
        assert!(!catalog.image_keeps_lease("pod"));
        assert!(catalog.sweep().0.is_empty());
        catalog.release_hold([id("3").as_str()].into_iter());
        assert_eq!(catalog.sweep().0.len(), 1);
        catalog.remove_lease("pod");
        let (removed, changes) = catalog.sweep();
        assert_eq!((removed.len(), changes.len()), (2, 2));
        assert_eq!(catalog.usage(), (0, 0));
        Ok(())
    }

    #[test]
    fn a_layer_of_an_image_that_is_recorded_twice_is_unused_after_one_removal()
    -> Result<(), ImageError> {
        let mut catalog = with_layers(&["1", "2"]);
        let names = [Name::parse("x")?];
        catalog.publish(image("a", &["1", "1"]), &names, Some(&id("e")))?;
        let lease = |image: &str, layer: &str| Lease {
            image: id(image),
            layers: vec![id(layer)],
        };
        catalog.add_lease("pod", lease("a", "1"))?;
        let before = catalog
            .publish(image("a", &["1", "2"]), &names, Some(&id("e")))?
            .0;
        assert_eq!(catalog.bytes_of(&before), 20);
        catalog.add_lease("pod", lease("b", "2"))?;
        catalog.remove(&id("a"));
        assert_eq!(catalog.sweep().0.len(), 1);
        catalog.remove_lease("pod");
        assert_eq!(catalog.sweep().0.len(), 1);
        assert!(catalog.sweep().1.is_empty());
        Ok(())
    }

    #[test]
    fn each_lower_directory_is_listed_once_and_the_uppermost_is_first() {
        let mut catalog = with_layers(&["1", "2", "3"]);
        let names = [id("1"), id("2"), id("1")];
        let lowers = |catalog: &Catalog, names: &[String]| {
            catalog.lowers(names.iter().map(String::as_str), Path::new("/r"))
        };
        assert_eq!(
            lowers(&catalog, &names),
            Some(vec!["/r/layers/1/fs".into(), "/r/layers/2/fs".into()])
        );
        assert_eq!(lowers(&catalog, &[]), Some(vec!["/r/layers/0/fs".into()]));
        assert_eq!(lowers(&catalog, &[id("9")]), None);
        catalog.add_layer(
            &id("4"),
            Layer {
                number: 4,
                bytes: 0,
                inodes: 0,
                opaque_root: true,
                unlisted: false,
            },
        );
        assert_eq!(
            lowers(&catalog, &[id("1"), id("4"), id("2")]),
            Some(vec!["/r/layers/2/fs".into(), "/r/layers/4/fs".into()])
        );
    }
}
