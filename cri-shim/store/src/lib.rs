//! The metadata store, which is one `redb` database file in the directory `--root`.
//!
//! The server works from memory: it reads the store once, at start, and writes every change to the
//! store. One writer thread does all writes. The writer puts all queued commits into one
//! transaction. If ten pods are created at the same time, they can therefore share one fsync.
//!
//! A change is durable when the future of [`Store::commit`] resolves. [`Store::commit_soon`] is for
//! changes that no caller waits for. A change of `commit_soon` is written together with the next
//! change of `commit`, or after a short delay. Several changes of `commit_soon` within this delay
//! are written together. For example, if the containers of a pod start at the same time, one
//! transaction records all their starts.
//!
//! If a transaction fails, the store opens the file again and repeats the transaction once. Changes
//! that no caller waits for are then repeated until they are written. A caller of `commit` gets an
//! error instead, and its changes are not repeated.

mod error;
pub mod record;

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition, TableError};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::oneshot;

pub use error::StoreError;
use rrun_calls::lock::lock;

/// A table of the store. The keys of a table are strings, usually ids, and the values are JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Table(&'static str);

impl Table {
    pub const SANDBOXES: Table = Table("sandboxes");
    pub const CONTAINERS: Table = Table("containers");
    pub const IMAGES: Table = Table("images");
    pub const LAYERS: Table = Table("layers");
    /// The images' complete configurations, for CRI requests that inspect an image.
    pub const CONFIGURATIONS: Table = Table("configurations");
    /// The imported image archives, by file name.
    pub const PRELOADS: Table = Table("preloads");
    /// The leases that containers have on images. A lease keeps an image's layers even if all names
    /// of the image are removed.
    pub const LEASES: Table = Table("leases");
    pub const ADDRESSES: Table = Table("addresses");
    /// The input and the result of the CNI plugins for each pod.
    pub const ATTACHMENTS: Table = Table("attachments");
    /// The network configuration that kubelet sent for the node.
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
    /// Creates a change that sets `key` to `value`.
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

    /// Creates a change that removes `key`. The key need not exist.
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
    urgency: Urgency,
    done: oneshot::Sender<Result<(), StoreError>>,
}

/// When a commit is written, and what happens if this fails.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Urgency {
    /// A caller waits for the commit, and repeats it after a failure.
    Awaited,
    /// The commit is written immediately, and repeated after a failure.
    Now,
    /// The commit is written after a short delay, and repeated after a failure.
    Soon,
}

/// Changes that could not be written yet: the value of each table and key, or `None` if the key is
/// removed.
type Unwritten = BTreeMap<(&'static str, String), Option<Vec<u8>>>;

/// A handle to the store. All clones share one database file and one writer thread.
#[derive(Clone)]
pub struct Store {
    file: Arc<StoreFile>,
    writer: mpsc::Sender<Commit>,
}

/// The database file and its open handle. After a failed write (for example on a full disk), redb
/// refuses all further operations on the handle. The next use of the store then opens the file
/// again, and redb repairs it.
struct StoreFile {
    path: PathBuf,
    database: Mutex<Option<Arc<Database>>>,
}

impl StoreFile {
    /// Opens the file with access for root only, because records contain the secrets in containers'
    /// environments. Earlier versions of the server created the file with the mode 0644.
    fn open(&self) -> Result<Database, redb::DatabaseError> {
        // Ours: only root can create an entry in the directory ROOT.
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&self.path)?;
        file.set_permissions(Permissions::from_mode(0o600))?;
        Database::builder()
            .set_cache_size(CACHE_BYTES)
            .create_file(file)
    }

    /// Opens the file after an operation has failed. The file is then written again: after a failed
    /// fsync(2), the kernel keeps the written pages in memory but no longer writes them to the
    /// disk. A later transaction would succeed although it builds on pages that a power failure
    /// destroys. The database is open meanwhile, so no other handle can write to the file.
    fn open_again(&self) -> Result<Database, redb::DatabaseError> {
        let database = self.open()?;
        write_again(&self.path).map_err(redb::StorageError::from)?;
        Ok(database)
    }

    fn with<T>(
        &self,
        work: impl FnOnce(&Database) -> Result<T, redb::Error>,
    ) -> Result<T, redb::Error> {
        let opened = {
            let mut database = lock(&self.database);
            match &*database {
                Some(opened) => Arc::clone(opened),
                None => Arc::clone(database.insert(Arc::new(self.open_again()?))),
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

/// Writes the content of the file to the file again, and waits until it is on the disk.
fn write_again(path: &Path) -> io::Result<()> {
    // Ours: only the server writes to its store.
    let file = File::options().read(true).write(true).open(path)?;
    let mut chunk = vec![0; 64 << 10];
    let mut offset = 0;
    loop {
        let length = file.read_at(&mut chunk, offset)?;
        let Some(read) = chunk.get(..length).filter(|read| !read.is_empty()) else {
            return file.sync_all();
        };
        file.write_all_at(read, offset)?;
        offset += length as u64;
    }
}

/// The size of redb's cache in bytes. A small cache is enough, because the server reads nearly all
/// entries only once, at its start.
const CACHE_BYTES: usize = 256 << 10;

/// The maximum number of commits that share a transaction.
const COMMITS_AT_ONCE: usize = 256;

/// The time between two attempts to write changes that no caller waits for.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// The maximum delay before a change of [`Store::commit_soon`] is written.
const COMMIT_DELAY: Duration = Duration::from_millis(50);

impl Store {
    /// Opens the database file at `path`, or creates the file if it does not exist. The file's
    /// directory must exist.
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

    /// Returns all entries of a table, ordered by key.
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

    /// Returns one entry of a table. Callers use this function for values that are too large to be
    /// kept in memory.
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

    /// Returns the path of the database file.
    pub fn path(&self) -> &Path {
        &self.file.path
    }

    /// Writes either all the changes or no change. The returned future resolves when the changes
    /// are on the disk.
    ///
    /// `commit` queues the changes before it returns, even if the returned future is never polled.
    /// A caller can therefore change its own state and queue the commit under one lock. Overlapping
    /// changes then have the same order in the callers' state and in the store. The caller can
    /// await the future without the lock.
    pub fn commit(
        &self,
        changes: Vec<Change>,
    ) -> impl Future<Output = Result<(), StoreError>> + Send + use<> {
        self.queue(changes, Urgency::Awaited)
    }

    /// Writes the changes like [`Store::commit`]. If the changes cannot be written, the returned
    /// future resolves to the error, and the store repeats the changes until they are written. A
    /// caller that has already changed its own state then need not revert it.
    pub fn commit_now(
        &self,
        changes: Vec<Change>,
    ) -> impl Future<Output = Result<(), StoreError>> + Send + use<> {
        self.queue(changes, Urgency::Now)
    }

    /// Writes the changes like [`Store::commit_now`], but after a short delay. `commit_soon` is for
    /// changes that need not be durable before the caller answers its client.
    pub fn commit_soon(
        &self,
        changes: Vec<Change>,
    ) -> impl Future<Output = Result<(), StoreError>> + Send + use<> {
        self.queue(changes, Urgency::Soon)
    }

    fn queue(
        &self,
        changes: Vec<Change>,
        urgency: Urgency,
    ) -> impl Future<Output = Result<(), StoreError>> + Send + use<> {
        let (done, answer) = oneshot::channel();
        let queued = self.writer.send(Commit {
            changes,
            urgency,
            done,
        });
        async move {
            queued.map_err(|_| StoreError::Stopped)?;
            answer.await.map_err(|_| StoreError::Stopped)?
        }
    }
}

/// An entry of the store. An entry describes one object, and is written after each change of the
/// object. After the entry has been deleted, it is never written again.
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

    /// Writes the value that `value` returns. Does nothing if the entry was deleted. If two calls
    /// overlap, the store keeps the value of the later call.
    pub async fn save<T: Serialize>(
        &self,
        store: &Store,
        value: impl FnOnce() -> T,
    ) -> Result<(), StoreError> {
        self.write(store, value, Urgency::Awaited).await
    }

    /// Writes the value immediately like [`Entry::save`], but for a caller that only logs an error.
    /// The store repeats the change until it is written.
    pub async fn save_now<T: Serialize>(
        &self,
        store: &Store,
        value: impl FnOnce() -> T,
    ) -> Result<(), StoreError> {
        self.write(store, value, Urgency::Now).await
    }

    /// Writes the value like [`Entry::save_now`], but after a short delay. `save_soon` is for
    /// values that need not be durable before the caller answers its client.
    pub async fn save_soon<T: Serialize>(
        &self,
        store: &Store,
        value: impl FnOnce() -> T,
    ) -> Result<(), StoreError> {
        self.write(store, value, Urgency::Soon).await
    }

    async fn write<T: Serialize>(
        &self,
        store: &Store,
        value: impl FnOnce() -> T,
        urgency: Urgency,
    ) -> Result<(), StoreError> {
        let written = {
            let deleted = lock(&self.deleted);
            if *deleted {
                return Ok(());
            }
            let change = Change::put(self.table, &self.key, &value())?;
            store.queue(vec![change], urgency)
        };
        written.await
    }

    /// Removes the entry from the store. Later calls of [`Entry::save`] do nothing.
    pub async fn delete(&self, store: &Store) -> Result<(), StoreError> {
        let written = {
            let mut deleted = lock(&self.deleted);
            *deleted = true;
            store.commit(vec![Change::delete(self.table, &self.key)])
        };
        written.await
    }
}

/// Returns the keys and values of a table.
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

/// Returns the value of one entry of a table.
fn value(database: &Database, table: Table, key: &str) -> Result<Option<Vec<u8>>, redb::Error> {
    let transaction = database.begin_read()?;
    match transaction.open_table(table.definition()) {
        Ok(opened) => Ok(opened.get(key)?.map(|value| value.value().to_vec())),
        Err(TableError::TableDoesNotExist(_)) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn write_loop(file: &StoreFile, commits: &mpsc::Receiver<Commit>) {
    let mut unwritten = Unwritten::new();
    loop {
        let first = if unwritten.is_empty() {
            match commits.recv() {
                Ok(first) => Some(first),
                Err(_) => return,
            }
        } else {
            match commits.recv_timeout(RETRY_INTERVAL) {
                Ok(first) => Some(first),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => return,
            }
        };
        let batch = first.map_or_else(Vec::new, |first| batch(first, commits));
        let attempt = || file.with(|database| write(database, &unwritten, &batch));
        let result = attempt().or_else(|_| attempt()).map_err(Arc::new);
        match &result {
            Ok(()) => unwritten.clear(),
            Err(_) => {
                let kept = batch.iter().filter(|it| it.urgency != Urgency::Awaited);
                for change in kept.flat_map(|commit| &commit.changes) {
                    let key = (change.table.0, change.key.clone());
                    unwritten.insert(key, change.value.clone());
                }
            }
        }
        for commit in batch {
            // Sending fails if the caller no longer waits for its commit. Ignore this error,
            // because the callers of the other commits still need their results.
            let _ = commit.done.send(result.clone().map_err(StoreError::Write));
        }
    }
}

/// Returns the commit `first` and further commits that share its transaction.
fn batch(first: Commit, commits: &mpsc::Receiver<Commit>) -> Vec<Commit> {
    let until = Instant::now() + COMMIT_DELAY;
    let mut soon = first.urgency == Urgency::Soon;
    let mut batch = vec![first];
    while batch.len() < COMMITS_AT_ONCE {
        let next = if soon {
            let rest = until.saturating_duration_since(Instant::now());
            commits.recv_timeout(rest).ok()
        } else {
            commits.try_recv().ok()
        };
        let Some(next) = next else {
            break;
        };
        soon &= next.urgency == Urgency::Soon;
        batch.push(next);
    }
    batch
}

/// Writes all changes in one transaction. A change in `batch` replaces an older unwritten change of
/// the same key.
fn write(database: &Database, unwritten: &Unwritten, batch: &[Commit]) -> Result<(), redb::Error> {
    let transaction = database.begin_write()?;
    let old = unwritten
        .iter()
        .map(|((table, key), value)| (Table(table), key, value));
    let new = batch
        .iter()
        .flat_map(|commit| &commit.changes)
        .map(|change| (change.table, &change.key, &change.value));
    for (table, key, value) in old.chain(new) {
        let mut table = transaction.open_table(table.definition())?;
        match value {
            Some(value) => table.insert(key.as_str(), value.as_slice())?,
            None => table.remove(key.as_str())?,
        };
    }
    transaction.commit()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_later_change_replaces_an_unwritten_change_of_the_same_key()
    -> Result<(), Box<dyn std::error::Error>> {
        let path = std::env::temp_dir().join(format!("rrun-store-{}.redb", std::process::id()));
        let file = StoreFile {
            path: path.clone(),
            database: Mutex::default(),
        };
        let value = |text: &str| Some(format!("{text:?}").into_bytes());
        let unwritten = ["kept", "replaced", "removed"]
            .map(|key| ((Table::IMAGES.0, key.to_owned()), value("old")))
            .into();
        let (done, _answer) = oneshot::channel();
        let batch = [Commit {
            changes: vec![
                Change::put(Table::IMAGES, "replaced", &"new")?,
                Change::delete(Table::IMAGES, "removed"),
            ],
            urgency: Urgency::Awaited,
            done,
        }];
        file.with(|database| write(database, &unwritten, &batch))?;
        // The file is opened again, as after a failed operation.
        *lock(&file.database) = None;
        let found = file.with(|database| entries(database, Table::IMAGES))?;
        let found: Vec<_> = found.into_iter().map(|(key, it)| (key, Some(it))).collect();
        assert_eq!(
            found,
            [("kept", "old"), ("replaced", "new")]
                .map(|(key, text)| (key.to_owned(), value(text)))
                .to_vec()
        );
        Ok(std::fs::remove_file(&path)?)
    }

    #[tokio::test]
    async fn a_committed_change_is_read_after_the_store_is_opened_again()
    -> Result<(), Box<dyn std::error::Error>> {
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
            // Changes of `commit_soon` are written before a later change of `commit`, in the order
            // of the calls.
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
        // After the last handle is dropped, the writer thread closes the file with a delay. The
        // first attempts to open the file again can therefore fail.
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
