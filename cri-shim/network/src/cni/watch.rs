//! Detects changed CNI configurations with inotify(7). The server also checks the directory for
//! changes whenever it uses the configurations. With inotify(7), the server also reacts immediately
//! to each change. It logs the change, runs GC and retries failed DELs.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use tokio::io::unix::AsyncFd;

/// The time for which the server waits after each change of the configuration directory. Programs
/// often make several changes in a row. The server reads the directory after the last of these
/// changes.
const QUIET_TIME: Duration = Duration::from_millis(200);

/// Waits for a change in the directory, or for the creation of the directory.
pub(super) async fn changed(dir: &Path) -> std::io::Result<()> {
    let flags = CreateFlags::NONBLOCK | CreateFlags::CLOEXEC;
    // SAFETY: the AsyncFd owns the descriptor. Only the AsyncFd closes the descriptor, and it
    // unregisters the descriptor before the close. No other code uses the descriptor's number.
    let watch = unsafe { AsyncFd::register(inotify::init(flags)?)? };
    let watched = existing(dir);
    inotify::add_watch(
        watch.get_ref(),
        &watched,
        WatchFlags::CREATE
            | WatchFlags::CLOSE_WRITE
            | WatchFlags::MOVED_FROM
            | WatchFlags::MOVED_TO
            | WatchFlags::DELETE
            | WatchFlags::DELETE_SELF
            | WatchFlags::MOVE_SELF,
    )?;
    if watched != dir && dir.exists() {
        // `dir` did not exist during the call of `existing`. The watch is therefore on a parent
        // directory. Another program created `dir` before the watch was added, so the watch does
        // not report the creation. The caller must read `dir` now.
        return Ok(());
    }
    wait(&watch).await?;
    while let Ok(waited) = tokio::time::timeout(QUIET_TIME, wait(&watch)).await {
        waited?;
    }
    Ok(())
}

/// Waits for inotify events and removes them from the queue.
async fn wait(watch: &AsyncFd<OwnedFd>) -> std::io::Result<()> {
    loop {
        let mut ready = watch.readable().await?;
        let read = ready.try_io(|inner| {
            let mut buffer = [0; 4096];
            Ok(rustix::io::read(inner.get_ref(), &mut buffer)?)
        });
        match read {
            Ok(read) => return read.map(drop),
            Err(_would_block) => {}
        }
    }
}

/// Returns `dir`, or the nearest parent directory of `dir` that exists.
fn existing(dir: &Path) -> PathBuf {
    let mut above = dir.ancestors();
    let watched = above.find(|dir| dir.is_dir());
    watched.unwrap_or(Path::new("/")).to_owned()
}
