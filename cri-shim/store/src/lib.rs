//! The metadata store: one `redb` file under `--root`.
//!
//! Memory is what the server works from; the store is read once, at start, and written through.
//! All writes go through one thread that puts whatever waits into one transaction, so that ten
//! pods created at once share one fsync. A change is durable when [`Store::commit`] returns. What
//! nobody waits for ([`Store::commit_soon`]) goes with what somebody does, or with other such:
//! the starts of a pod's containers are one transaction.

mod error;
pub mod record;

use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition, TableError};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::oneshot;

pub use error::StoreError;
use rrun_calls::lock::lock;

/// The rooms of the store. Keys are ids; values JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Table(&'static str);

impl Table {
    pub const SANDBOXES: Table = Table("sandboxes");
    pub const CONTAINERS: Table = Table("containers");
    pub const IMAGES: Table = Table("images");
    pub const LAYERS: Table = Table("layers");
    /// Images' whole configurations, for those who inspect them.
    pub const CONFIGURATIONS: Table = Table("configurations");
    /// Archives that were imported, by their file names.
    pub const PRELOADS: Table = Table("preloads");
    /// Which container or pod keeps which image's layers, whatever becomes of the image's names.
    pub const LEASES: Table = Table("leases");
    pub const ADDRESSES: Table = Table("addresses");
    /// What CNI plugins were called with for each pod, and what they answered.
    pub const ATTACHMENTS: Table = Table("attachments");
    /// What kubelet says of the node's network.
    pub const NETWORK: Table = Table("network");

    fn definition(self) -> TableDefinition<'static, &'static str, &'static [u8]> {
        TableDefinition::new(self.0)
    }
}

/// One change of a commit.
#[derive(Debug)]
pub struct Change {
    table: Table,
    key: String,
    value: Option<Vec<u8>>,
}

impl Change {
    /// Sets `key` to `value`.
    pub fn put<T: Serialize>(table: Table, key: &str, value: &T) -> Result<Self, StoreError> {
        let value = serde_json::to_vec(value).map_err(|source| StoreError::Value {
            table: table.0,
            key: key.to_owned(),
            source,
        })?;
        Ok(Change {
            table,
            key: key.to_owned(),
            value: Some(value),
        })
    }

    /// Removes `key`; it need not be there.
    pub fn delete(table: Table, key: &str) -> Self {
        Change {
            table,
            key: key.to_owned(),
            value: None,
        }
    }
}

struct Commit {
    changes: Vec<Change>,
    /// Somebody waits for it.
    awaited: bool,
    done: oneshot::Sender<Result<(), StoreError>>,
}

/// A handle to the store; clones share one file and one writer.
#[derive(Clone)]
pub struct Store {
    file: Arc<StoreFile>,
    writer: mpsc::Sender<Commit>,
}

/// The database, opened anew after a failure: redb takes nothing more once a write has failed
/// (a full disk), and repairs itself when it is opened.
struct StoreFile {
    path: PathBuf,
    database: Mutex<Option<Arc<Database>>>,
}

impl StoreFile {
    fn open(&self) -> Result<Database, redb::DatabaseError> {
        Database::builder()
            .set_cache_size(CACHE_BYTES)
            .create(&self.path)
    }

    fn with<T>(
        &self,
        work: impl FnOnce(&Database) -> Result<T, redb::Error>,
    ) -> Result<T, redb::Error> {
        let opened = {
            let mut database = lock(&self.database);
            match &*database {
                Some(opened) => Arc::clone(opened),
                None => Arc::clone(database.insert(Arc::new(self.open()?))),
            }
        };
        let result = work(&opened);
        if result.is_err() {
            let mut database = lock(&self.database);
            if database
                .as_ref()
                .is_some_and(|now| Arc::ptr_eq(now, &opened))
            {
                *database = None;
            }
        }
        result
    }
}

/// What the store may cache, in bytes: it is read once.
const CACHE_BYTES: usize = 256 << 10;

/// The most commits that share a transaction.
const COMMITS_AT_ONCE: usize = 256;

/// How long a change that nobody waits for may stay in memory.
const COMMIT_DELAY: Duration = Duration::from_millis(50);

impl Store {
    /// Opens or creates the file; its directory must be there.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let file = StoreFile {
            path: path.to_owned(),
            database: Mutex::default(),
        };
        let database = file.open().map_err(|source| StoreError::Open {
            path: path.to_owned(),
            source,
        })?;
        let file = Arc::new(StoreFile {
            database: Mutex::new(Some(Arc::new(database))),
            ..file
        });
        let (writer, commits) = mpsc::channel();
        let for_writer = Arc::clone(&file);
        std::thread::Builder::new()
            .name("store".into())
            .stack_size(256 << 10)
            .spawn(move || write_loop(&for_writer, &commits))
            .map_err(|error| StoreError::Write(Arc::new(redb::Error::Io(error))))?;
        Ok(Store { file, writer })
    }

    /// Every entry of a table, in the order of the keys.
    pub fn load<T: DeserializeOwned>(&self, table: Table) -> Result<Vec<(String, T)>, StoreError> {
        let read = |error: redb::Error| StoreError::Read {
            table: table.0,
            source: Box::new(error),
        };
        let entries = self.file.with(|database| entries(database, table));
        let entries = entries.map_err(read)?;
        let parsed = entries.into_iter().map(|(key, value)| {
            let value = serde_json::from_slice(&value).map_err(|source| StoreError::Value {
                table: table.0,
                key: key.clone(),
                source,
            })?;
            Ok((key, value))
        });
        parsed.collect()
    }

    /// One entry of a table, for what is too large to be kept in memory.
    pub fn get<T: DeserializeOwned>(
        &self,
        table: Table,
        key: &str,
    ) -> Result<Option<T>, StoreError> {
        let read = |error: redb::Error| StoreError::Read {
            table: table.0,
            source: Box::new(error),
        };
        let value = self.file.with(|database| value(database, table, key));
        let parsed = value.map_err(read)?.map(|value| {
            serde_json::from_slice(&value).map_err(|source| StoreError::Value {
                table: table.0,
                key: key.to_owned(),
                source,
            })
        });
        parsed.transpose()
    }

    /// Makes all the changes or none; the answer comes when they are on the disk.
    ///
    /// The changes are queued by the call itself, not when its future is polled: who calls while
    /// holding the lock over what is in memory has both in one order, and awaits without it.
    pub fn commit(
        &self,
        changes: Vec<Change>,
    ) -> impl Future<Output = Result<(), StoreError>> + Send + use<> {
        self.queue(changes, true)
    }

    /// As [`Store::commit`], a moment later: for what no answer depends on.
    pub fn commit_soon(
        &self,
        changes: Vec<Change>,
    ) -> impl Future<Output = Result<(), StoreError>> + Send + use<> {
        self.queue(changes, false)
    }

    fn queue(
        &self,
        changes: Vec<Change>,
        awaited: bool,
    ) -> impl Future<Output = Result<(), StoreError>> + Send + use<> {
        let (done, answer) = oneshot::channel();
        let queued = self.writer.send(Commit {
            changes,
            awaited,
            done,
        });
        async move {
            queued.map_err(|_| StoreError::Stopped)?;
            answer.await.map_err(|_| StoreError::Stopped)?
        }
    }
}

/// An entry that is written each time its object changes, until it is deleted for good.
pub struct Entry {
    table: Table,
    key: String,
    deleted: Mutex<bool>,
}

impl Entry {
    pub fn new(table: Table, key: &str) -> Self {
        Entry {
            table,
            key: key.to_owned(),
            deleted: Mutex::new(false),
        }
    }

    /// Writes what `value` gives; nothing once the entry is deleted. Of two calls the later one's
    /// value stays.
    pub async fn save<T: Serialize>(
        &self,
        store: &Store,
        value: impl FnOnce() -> T,
    ) -> Result<(), StoreError> {
        self.write(store, value, true).await
    }

    /// As [`Entry::save`], for what no answer depends on.
    pub async fn save_soon<T: Serialize>(
        &self,
        store: &Store,
        value: impl FnOnce() -> T,
    ) -> Result<(), StoreError> {
        self.write(store, value, false).await
    }

    async fn write<T: Serialize>(
        &self,
        store: &Store,
        value: impl FnOnce() -> T,
        awaited: bool,
    ) -> Result<(), StoreError> {
        let written = {
            let deleted = lock(&self.deleted);
            if *deleted {
                return Ok(());
            }
            let change = Change::put(self.table, &self.key, &value())?;
            store.queue(vec![change], awaited)
        };
        written.await
    }

    /// Takes the entry out of the store, for good.
    pub async fn delete(&self, store: &Store) -> Result<(), StoreError> {
        let written = {
            let mut deleted = lock(&self.deleted);
            *deleted = true;
            store.commit(vec![Change::delete(self.table, &self.key)])
        };
        written.await
    }
}

/// Keys and values of a table.
fn entries(database: &Database, table: Table) -> Result<Vec<(String, Vec<u8>)>, redb::Error> {
    let transaction = database.begin_read()?;
    let opened = match transaction.open_table(table.definition()) {
        Ok(opened) => opened,
        Err(TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
        Err(error) => return Err(error.into()),
    };
    let mut entries = Vec::new();
    for entry in opened.iter()? {
        let (key, value) = entry?;
        entries.push((key.value().to_owned(), value.value().to_vec()));
    }
    Ok(entries)
}

/// One entry of a table.
fn value(database: &Database, table: Table, key: &str) -> Result<Option<Vec<u8>>, redb::Error> {
    let transaction = database.begin_read()?;
    match transaction.open_table(table.definition()) {
        Ok(opened) => Ok(opened.get(key)?.map(|value| value.value().to_vec())),
        Err(TableError::TableDoesNotExist(_)) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn write_loop(file: &StoreFile, commits: &mpsc::Receiver<Commit>) {
    while let Ok(first) = commits.recv() {
        let until = Instant::now() + COMMIT_DELAY;
        let mut awaited = first.awaited;
        let mut batch = vec![first];
        while batch.len() < COMMITS_AT_ONCE {
            let next = if awaited {
                commits.try_recv().ok()
            } else {
                let rest = until.saturating_duration_since(Instant::now());
                commits.recv_timeout(rest).ok()
            };
            let Some(next) = next else {
                break;
            };
            awaited |= next.awaited;
            batch.push(next);
        }
        let result = file.with(|database| write(database, &batch));
        let result = result.map_err(Arc::new);
        for commit in batch {
            // A caller that has gone is no reason to undo the work of the others.
            let _ = commit.done.send(result.clone().map_err(StoreError::Write));
        }
    }
}

fn write(database: &Database, batch: &[Commit]) -> Result<(), redb::Error> {
    let transaction = database.begin_write()?;
    for change in batch.iter().flat_map(|commit| &commit.changes) {
        let mut table = transaction.open_table(change.table.definition())?;
        match &change.value {
            Some(value) => table.insert(change.key.as_str(), value.as_slice())?,
            None => table.remove(change.key.as_str())?,
        };
    }
    transaction.commit()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_commit_is_there_after_opening_again() -> Result<(), Box<dyn std::error::Error>> {
        let dir = std::env::temp_dir().join(format!("rrun-store-{}", std::process::id()));
        std::fs::create_dir_all(&dir)?;
        let path = dir.join("meta.redb");
        {
            let store = Store::open(&path)?;
            assert!(store.load::<String>(Table::IMAGES)?.is_empty());
            store
                .commit(vec![
                    Change::put(Table::IMAGES, "a", &"one")?,
                    Change::put(Table::IMAGES, "b", &"two")?,
                ])
                .await?;
            // What nobody waits for keeps its place before what somebody does.
            drop(store.commit_soon(vec![Change::put(Table::IMAGES, "c", &"three")?]));
            drop(store.commit_soon(vec![Change::put(Table::IMAGES, "d", &"four")?]));
            store
                .commit(vec![
                    Change::delete(Table::IMAGES, "a"),
                    Change::delete(Table::IMAGES, "d"),
                ])
                .await?;
            let soon = store.commit_soon(vec![Change::put(Table::IMAGES, "e", &"five")?]);
            soon.await?;
        }
        // The writer lets go of the file when the last handle is gone.
        let mut tries = 0;
        let store = loop {
            match Store::open(&path) {
                Ok(store) => break store,
                Err(error) if tries == 100 => return Err(error.into()),
                Err(_) => std::thread::sleep(std::time::Duration::from_millis(10)),
            }
            tries += 1;
        };
        assert_eq!(
            store.load::<String>(Table::IMAGES)?,
            [("b", "two"), ("c", "three"), ("e", "five")]
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .to_vec()
        );
        std::fs::remove_dir_all(&dir)?;
        Ok(())
    }
}
