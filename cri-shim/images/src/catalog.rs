//! What is here: images, their names, their layers, and who keeps which. In memory, with the
//! changes for the store; never waits for anything.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::ImageError;
use crate::record::Image;
use crate::reference::{Name, Target};
use rrun_store::{Change, Store, Table};

/// The directory of the layer that stands for none: overlayfs wants at least one.
pub(crate) const EMPTY_LAYER: u64 = 0;

/// One unpacked layer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Layer {
    /// It is in `layers/NUMBER/fs`: short, for the mount's options have to fit into a page.
    pub number: u64,
    pub bytes: u64,
    pub inodes: u64,
    /// See [`crate::layer::UnpackSummary`].
    pub opaque_root: bool,
    /// The layer has directories that its archive did not list.
    #[serde(default)]
    pub unlisted: bool,
}

/// The key of a layer whose content depends on its archive alone, so that all images share it.
///
/// Older versions kept a layer under its bare diff ID. There, directories that the archive did not
/// list have the owner and mode that they had in the first image with that layer. The images and
/// containers of such a store keep using that layer; no other image may use it.
pub(crate) fn key_of(diff_id: &str) -> String {
    format!("shared/{diff_id}")
}

/// The key of the layer that goes on top of layers with these keys, lowest first, and sets the
/// owner and mode of directories. Its content depends on the layers below it alone.
pub(crate) fn directory_layer_key(keys: &[String]) -> String {
    let chain = crate::layer::digest_of(keys.join(" ").as_bytes());
    format!("looks/{chain}")
}

/// What a container or pod keeps.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Lease {
    pub image: String,
    /// Keys of layers, lowest first.
    pub layers: Vec<String>,
}

#[derive(Default)]
pub(crate) struct Catalog {
    images: BTreeMap<String, Arc<Image>>,
    /// Tag and digest references in full, to ids.
    names: HashMap<String, String>,
    /// By key: [`key_of`], [`directory_layer_key`], or the diff ID in a store of an older version.
    layers: HashMap<String, Layer>,
    /// Layers that the store does not know yet.
    unrecorded: HashSet<String>,
    leases: HashMap<String, Lease>,
    /// How many pulls under way stand on a layer.
    holds: HashMap<String, usize>,
}

pub(crate) fn directory(root: &Path, number: u64) -> PathBuf {
    root.join("layers").join(number.to_string())
}

/// The overlay lower directory with nothing in it.
pub fn empty_layer(root: &Path) -> PathBuf {
    directory(root, EMPTY_LAYER).join("fs")
}

impl Catalog {
    /// Reads the store; layers whose directory is gone are forgotten, and the images with them.
    pub(crate) fn load(store: &Store, root: &Path) -> Result<(Self, Vec<Change>), ImageError> {
        let mut catalog = Catalog::default();
        let mut changes = Vec::new();
        for (key, layer) in store.load::<Layer>(Table::LAYERS)? {
            if directory(root, layer.number).join("fs").is_dir() {
                catalog.layers.insert(key, layer);
            } else {
                log::error!("the layer {key} is gone from the disk");
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
                log::error!("the image {id} lacks layers and has to be pulled again");
                changes.push(Change::delete(Table::IMAGES, &id));
            }
        }
        catalog.leases = store.load(Table::LEASES)?.into_iter().collect();
        Ok((catalog, changes))
    }

    fn insert(&mut self, image: Arc<Image>) {
        for name in image.repo_tags.iter().chain(&image.repo_digests) {
            self.names.insert(name.clone(), image.id.clone());
        }
        self.images.insert(image.id.clone(), image);
    }

    pub(crate) fn list(&self) -> Vec<Arc<Image>> {
        self.images.values().cloned().collect()
    }

    /// By name, id, or the beginning of just one id.
    pub(crate) fn find(&self, wanted: &str) -> Option<Arc<Image>> {
        if let Some(image) = self.images.get(wanted) {
            return Some(Arc::clone(image));
        }
        if let Ok(name) = Name::parse(wanted)
            && let Some(id) = self.names.get(&name.canonical())
        {
            return self.images.get(id).cloned();
        }
        let hex = wanted.strip_prefix("sha256:").unwrap_or(wanted);
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

    /// Makes an image that has come known under `names`, and by the digest of its manifest. A tag
    /// that another image had moves to this one.
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
        for name in names {
            if let Target::Tag(_) = name.target {
                let tag = name.canonical();
                if let Some(other) = self.names.get(&tag).filter(|id| **id != image.id)
                    && let Some(other) = self.images.get_mut(other)
                {
                    Arc::make_mut(other).repo_tags.retain(|known| *known != tag);
                    changes.push(Change::put(Table::IMAGES, &other.id, other.as_ref())?);
                }
                add(&mut image.repo_tags, tag);
            }
            if let Some(digest) = digest {
                add(&mut image.repo_digests, name.with_digest(digest));
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

    /// Takes an image and all its names away; its layers stay until [`Catalog::sweep`].
    pub(crate) fn remove(&mut self, id: &str) -> Vec<Change> {
        if self.images.remove(id).is_none() {
            return Vec::new();
        }
        self.names.retain(|_, named| named != id);
        vec![
            Change::delete(Table::IMAGES, id),
            Change::delete(Table::CONFIGURATIONS, id),
        ]
    }

    /// Undoes a [`Catalog::publish`] that did not reach the store.
    pub(crate) fn restore(&mut self, id: &str, before: Option<Arc<Image>>) {
        self.remove(id);
        if let Some(before) = before {
            self.insert(before);
        }
    }

    pub(crate) fn layer(&self, key: &str) -> Option<&Layer> {
        self.layers.get(key)
    }

    pub(crate) fn add_layer(&mut self, key: &str, layer: Layer) {
        self.unrecorded.insert(key.to_owned());
        self.layers.insert(key.to_owned(), layer);
    }

    /// Whether the store knows all of these.
    pub(crate) fn all_recorded<'a>(&self, mut keys: impl Iterator<Item = &'a str>) -> bool {
        keys.all(|key| self.layers.contains_key(key) && !self.unrecorded.contains(key))
    }

    pub(crate) fn hold<'a>(&mut self, keys: impl Iterator<Item = &'a str>) {
        for key in keys {
            *self.holds.entry(key.to_owned()).or_default() += 1;
        }
    }

    pub(crate) fn let_go<'a>(&mut self, keys: impl Iterator<Item = &'a str>) {
        for key in keys {
            if let Some(count) = self.holds.get_mut(key) {
                *count -= 1;
                if *count == 0 {
                    self.holds.remove(key);
                }
            }
        }
    }

    /// Forgets the layers that nobody names, keeps or is pulling. Their directories are the
    /// caller's to remove, when the store has forgotten them too.
    pub(crate) fn sweep(&mut self) -> (Vec<Layer>, Vec<Change>) {
        let used: HashSet<&str> = self
            .images
            .values()
            .flat_map(|image| image.keys())
            .chain(
                self.leases
                    .values()
                    .flat_map(|lease| lease.layers.iter().map(String::as_str)),
            )
            .chain(self.holds.keys().map(String::as_str))
            .collect();
        let unused: Vec<String> = self
            .layers
            .keys()
            .filter(|key| !used.contains(key.as_str()))
            .cloned()
            .collect();
        let mut layers = Vec::new();
        let mut changes = Vec::new();
        for key in unused {
            layers.extend(self.layers.remove(&key));
            if !self.unrecorded.remove(&key) {
                changes.push(Change::delete(Table::LAYERS, &key));
            }
        }
        (layers, changes)
    }

    pub(crate) fn lease(&self, owner: &str) -> Option<&Lease> {
        self.leases.get(owner)
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
        self.leases.insert(owner.to_owned(), lease);
        Ok(vec![change])
    }

    pub(crate) fn remove_lease(&mut self, owner: &str) -> Vec<Change> {
        match self.leases.remove(owner) {
            Some(_) => vec![Change::delete(Table::LEASES, owner)],
            None => Vec::new(),
        }
    }

    pub(crate) fn owners(&self) -> Vec<String> {
        self.leases.keys().cloned().collect()
    }

    /// The overlay lower directories of layers named lowest first: uppermost first, each once,
    /// for the kernel refuses a directory twice and the lower one shows nothing anyway; nothing
    /// below a layer that hides all. `None` if one is missing.
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

    /// The layers that [`Catalog::lowers`] names.
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

    /// Numbers of all directories in use.
    pub(crate) fn numbers(&self) -> HashSet<u64> {
        self.layers.values().map(|layer| layer.number).collect()
    }

    /// What an image takes on the disk, in bytes, layers that it shares with others included.
    pub(crate) fn bytes_of(&self, image: &Image) -> u64 {
        let mut counted = HashSet::new();
        image
            .keys()
            .into_iter()
            .filter(|key| counted.insert(*key))
            .filter_map(|key| self.layers.get(key))
            .map(|layer| layer.bytes)
            .sum()
    }

    /// Bytes and inodes of all layers.
    pub(crate) fn usage(&self) -> (u64, u64) {
        self.layers.values().fold((0, 0), |(bytes, inodes), layer| {
            (bytes + layer.bytes, inodes + layer.inodes)
        })
    }
}

fn add(names: &mut Vec<String>, name: String) {
    if !names.contains(&name) {
        names.push(name);
    }
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
            layers: layers
                .iter()
                .map(|layer| LayerName {
                    diff_id: id(layer),
                    digest: id(layer),
                    size: 1,
                })
                .collect(),
            unpacked: Vec::new(),
            created: None,
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
    fn a_moved_tag_leaves_the_old_image_its_digest() -> Result<(), ImageError> {
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

    #[test]
    fn ids_may_be_shortened_as_long_as_they_are_unique() -> Result<(), ImageError> {
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
    fn a_layer_stays_while_an_image_a_lease_or_a_pull_names_it() -> Result<(), ImageError> {
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
        catalog.remove(&id("a"));
        assert!(catalog.sweep().0.is_empty());
        catalog.let_go([id("3").as_str()].into_iter());
        assert_eq!(catalog.sweep().0.len(), 1);
        catalog.remove_lease("pod");
        let (gone, changes) = catalog.sweep();
        assert_eq!((gone.len(), changes.len()), (2, 2));
        assert_eq!(catalog.usage(), (0, 0));
        Ok(())
    }

    #[test]
    fn lower_directories_are_named_once_and_from_above() {
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
