//! Limits how many bytes all partial blobs together occupy (`image.partial_bytes`).
//!
//! A registry can break off its answers, and each broken answer leaves a partial blob. Without a
//! limit, a registry could fill the disk with partial blobs. If a fetch needs room to keep more
//! bytes, partial blobs that no fetch uses are removed: first those of the registry with the most
//! bytes, and of these the oldest. A fetch without room continues, but keeps no more bytes.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use crate::partial::{is_fresh, registry_of, remove};
use rrun_calls::lock::lock;

/// Room is reserved in steps of this size. The number of files therefore has a limit, too.
const STEP: u64 = 1 << 20;

pub(crate) struct PartialBudget {
    limit: u64,
    files: Mutex<Files>,
}

#[derive(Default)]
struct Files {
    next: u64,
    by_id: HashMap<u64, KeptFile>,
}

struct KeptFile {
    path: PathBuf,
    registry: String,
    /// The number of reserved bytes. The file is never longer.
    reserved: u64,
    /// True if a fetch uses the file. Such a file is not removed.
    in_use: bool,
    last_use: SystemTime,
}

impl PartialBudget {
    /// Finds the partial blobs in `ingest/`, and removes those above the limit. This call blocks on
    /// disk I/O.
    pub(crate) fn new(root: &Path, limit: u64) -> Arc<Self> {
        let mut files = Files::default();
        let entries = std::fs::read_dir(root.join("ingest"));
        for entry in entries.into_iter().flatten().flatten() {
            let path = entry.path();
            let Some(metadata) = entry.metadata().ok().filter(|_| is_fresh(&path)) else {
                continue;
            };
            files.add(KeptFile {
                registry: registry_of(&path).to_owned(),
                path,
                reserved: steps(metadata.len()),
                in_use: false,
                last_use: metadata.modified().unwrap_or_else(|_| SystemTime::now()),
            });
        }
        let room = files.make_room("", 0, limit);
        remove_all(room.unwrap_or_else(|removed| removed));
        Arc::new(PartialBudget {
            limit,
            files: Mutex::new(files),
        })
    }

    /// Reserves room for a file that the caller has opened and locked, and that has `length` bytes.
    /// Returns `None` if there is no room.
    pub(crate) fn reserve(self: &Arc<Self>, path: &Path, length: u64) -> Option<Reservation> {
        let registry = registry_of(path).to_owned();
        let reserved = steps(length);
        let mut files = lock(&self.files);
        let same = |file: &KeptFile| !file.in_use && file.path == path;
        files.by_id.retain(|_, file| !same(file));
        let room = files.make_room(&registry, reserved, self.limit);
        let id = room.is_ok().then(|| {
            files.add(KeptFile {
                path: path.to_owned(),
                registry,
                reserved,
                in_use: true,
                last_use: SystemTime::now(),
            })
        });
        drop(files);
        remove_all(room.unwrap_or_else(|removed| removed));
        Some(Reservation {
            budget: Arc::clone(self),
            id: id?,
            reserved,
        })
    }

    /// Returns the reserved bytes of all partial blobs, and their number.
    pub(crate) fn used(&self) -> (u64, u64) {
        let files = lock(&self.files);
        let bytes = files.by_id.values().map(|file| file.reserved).sum();
        (bytes, files.by_id.len() as u64)
    }

    /// Forgets the file at `path`, which was removed. A fetch that still has the file open keeps
    /// its reservation.
    pub(crate) fn forget(&self, path: &Path) {
        let mut files = lock(&self.files);
        files
            .by_id
            .retain(|_, file| file.in_use || file.path != path);
    }
}

impl Files {
    fn add(&mut self, file: KeptFile) -> u64 {
        self.next += 1;
        self.by_id.insert(self.next, file);
        self.next
    }

    /// Makes room for `more` bytes of a registry. Returns the paths of the files that the caller
    /// must remove, as an error if there is not enough room nevertheless.
    fn make_room(
        &mut self,
        registry: &str,
        more: u64,
        limit: u64,
    ) -> Result<Vec<PathBuf>, Vec<PathBuf>> {
        let mut of_registry: HashMap<String, u64> = HashMap::new();
        for file in self.by_id.values() {
            *of_registry.entry(file.registry.clone()).or_default() += file.reserved;
        }
        let mut total: u64 = of_registry.values().sum();
        let mut removed = Vec::new();
        loop {
            let used_by = |name: &str| of_registry.get(name).copied().unwrap_or_default();
            let own = used_by(registry).saturating_add(more);
            // The files that fetches use are not removed. One registry must not fill the whole room
            // with them.
            let fair = own <= limit - limit / 4;
            if fair && total.saturating_add(more) <= limit {
                return Ok(removed);
            }
            let may_go = |file: &KeptFile| {
                let theirs = fair && used_by(&file.registry) >= own;
                !file.in_use && (theirs || file.registry == registry)
            };
            let first = self.by_id.iter().filter(|(_, file)| may_go(file));
            let first = first
                .max_by_key(|(_, file)| (used_by(&file.registry), Reverse(file.last_use)))
                .map(|(id, _)| *id);
            let Some(file) = first.and_then(|id| self.by_id.remove(&id)) else {
                return Err(removed);
            };
            total -= file.reserved;
            if let Some(used) = of_registry.get_mut(&file.registry) {
                *used -= file.reserved;
            }
            removed.push(file.path);
        }
    }
}

/// The room of one file that a fetch uses.
pub(crate) struct Reservation {
    budget: Arc<PartialBudget>,
    id: u64,
    reserved: u64,
}

impl Reservation {
    /// Reserves room for `length` bytes in total. Returns false if there is no room.
    pub(crate) fn grow(&mut self, length: u64) -> bool {
        let more = steps(length).saturating_sub(self.reserved);
        if more == 0 {
            return true;
        }
        let mut files = lock(&self.budget.files);
        let Some(registry) = files.by_id.get(&self.id).map(|file| file.registry.clone()) else {
            return false;
        };
        let room = files.make_room(&registry, more, self.budget.limit);
        let fits = room.is_ok();
        if fits && let Some(file) = files.by_id.get_mut(&self.id) {
            file.reserved += more;
            self.reserved += more;
        }
        drop(files);
        remove_all(room.unwrap_or_else(|removed| removed));
        fits
    }

    /// Ends the use of the file. `length` is `None` if the file no longer exists.
    pub(crate) fn end(&self, length: Option<u64>) {
        let mut files = lock(&self.budget.files);
        match (length, files.by_id.get_mut(&self.id)) {
            (Some(length), Some(file)) => {
                file.reserved = steps(length);
                file.in_use = false;
                file.last_use = SystemTime::now();
            }
            _ => drop(files.by_id.remove(&self.id)),
        }
    }
}

/// Returns the number of bytes that are reserved for a file of `length` bytes.
fn steps(length: u64) -> u64 {
    length.max(1).div_ceil(STEP).saturating_mul(STEP)
}

fn remove_all(paths: Vec<PathBuf>) {
    for path in paths {
        log::info!(
            "remove the partial blob {}, because all partial blobs together reach their limit (image.partial_bytes)",
            path.display()
        );
        if let Err(error) = remove(&path) {
            log::warn!("cannot remove the partial blob {}: {error}", path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn path(name: &str, registry: &str) -> PathBuf {
        PathBuf::from(format!("/nowhere/{name}-{registry}.partial"))
    }

    /// Adds a file that no fetch uses.
    fn keep(budget: &Arc<PartialBudget>, name: &str, registry: &str, length: u64) -> bool {
        let reserved = budget.reserve(&path(name, registry), length);
        if let Some(reserved) = &reserved {
            reserved.end(Some(length));
        }
        reserved.is_some()
    }

    fn kept(budget: &PartialBudget) -> Vec<PathBuf> {
        let files = lock(&budget.files);
        let mut kept: Vec<PathBuf> = files.by_id.values().map(|file| file.path.clone()).collect();
        kept.sort();
        kept
    }

    #[test]
    fn the_oldest_file_of_the_registry_with_the_most_bytes_is_removed() {
        let budget = PartialBudget::new(Path::new("/nowhere"), 8 * MIB);
        for (name, registry) in [("1", "small"), ("2", "big"), ("3", "big"), ("4", "big")] {
            assert!(keep(&budget, name, registry, 2 * MIB));
        }
        assert!(keep(&budget, "5", "new", MIB));
        let left = [("1", "small"), ("3", "big"), ("4", "big"), ("5", "new")];
        assert_eq!(
            kept(&budget),
            left.map(|(name, registry)| path(name, registry))
        );
        assert_eq!(budget.used(), (7 * MIB, 4));
        // A registry with more bytes than the others removes its own files.
        assert!(keep(&budget, "6", "big", 2 * MIB));
        assert_eq!(kept(&budget)[1], path("4", "big"));
        assert_eq!(kept(&budget)[0], path("1", "small"));
    }

    #[test]
    fn files_in_use_remain_and_one_registry_does_not_get_all_room() -> Result<(), &'static str> {
        let budget = PartialBudget::new(Path::new("/nowhere"), 8 * MIB);
        let one = path("1", "one");
        let mut used = budget.reserve(&one, 0).ok_or("there is no room")?;
        assert!(used.grow(6 * MIB));
        assert!(
            !used.grow(6 * MIB + 1),
            "one registry got more than its share"
        );
        assert!(!keep(&budget, "2", "one", 1));
        assert!(keep(&budget, "3", "other", 2 * MIB));
        assert!(!keep(&budget, "4", "third", 3 * MIB));
        assert_eq!(kept(&budget)[0], one);
        used.end(None);
        assert!(!kept(&budget).contains(&one));
        Ok(())
    }

    #[test]
    fn the_start_counts_the_files_on_the_disk_and_removes_the_oldest() -> std::io::Result<()> {
        let root = std::env::temp_dir().join(format!("rrun-budget-{}", std::process::id()));
        let ingest = root.join("ingest");
        std::fs::create_dir_all(ingest.join("1"))?;
        for (name, age) in [("new", 1), ("old", 60), ("middle", 30)] {
            let file = std::fs::File::create(ingest.join(format!("{name}-r.partial")))?;
            file.set_len(MIB)?;
            file.set_modified(SystemTime::now() - std::time::Duration::from_secs(age))?;
        }
        assert_eq!(PartialBudget::new(&root, 8 * MIB).used(), (3 * MIB, 3));
        let budget = PartialBudget::new(&root, 2 * MIB);
        let left = ["middle", "new"].map(|name| ingest.join(format!("{name}-r.partial")));
        assert_eq!(kept(&budget), left);
        assert!(!ingest.join("old-r.partial").exists());
        assert!(left.iter().all(|path| path.exists()));
        std::fs::remove_dir_all(&root)
    }

    #[test]
    fn the_number_of_files_is_limited() {
        let budget = PartialBudget::new(Path::new("/nowhere"), 8 * MIB);
        for number in 0..100 {
            assert!(keep(&budget, &number.to_string(), &number.to_string(), 1));
        }
        assert_eq!(budget.used(), (8 * MIB, 8));
        let none = PartialBudget::new(Path::new("/nowhere"), 0);
        assert!(!keep(&none, "1", "one", 1));
    }
}
