//! Notices new configurations, inotify(7). Each use looks for itself; this is for what has to
//! happen when nobody asks: the log, GC, the DELs that a missing plugin held up.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use tokio::io::unix::AsyncFd;

/// How long the directory has to be quiet: writers make several changes.
const QUIET_TIME: Duration = Duration::from_millis(200);

/// Waits for a change in the directory, or for its coming.
pub(super) async fn changed(dir: &Path) -> std::io::Result<()> {
    let flags = CreateFlags::NONBLOCK | CreateFlags::CLOEXEC;
    // SAFETY: the descriptor is owned by the AsyncFd, which alone closes it, after it has
    // unregistered it; nobody else knows its number.
    let watch = unsafe { AsyncFd::register(inotify::init(flags)?)? };
    let there = existing(dir);
    inotify::add_watch(
        watch.get_ref(),
        &there,
        WatchFlags::CREATE
            | WatchFlags::CLOSE_WRITE
            | WatchFlags::MOVED_FROM
            | WatchFlags::MOVED_TO
            | WatchFlags::DELETE
            | WatchFlags::DELETE_SELF
            | WatchFlags::MOVE_SELF,
    )?;
    if there != dir && dir.exists() {
        // It came in between.
        return Ok(());
    }
    wait(&watch).await?;
    while let Ok(waited) = tokio::time::timeout(QUIET_TIME, wait(&watch)).await {
        waited?;
    }
    Ok(())
}

/// Waits for events and takes them out.
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

/// The directory, or the nearest above that is there.
fn existing(dir: &Path) -> PathBuf {
    let mut above = dir.ancestors();
    let there = above.find(|dir| dir.is_dir());
    there.unwrap_or(Path::new("/")).to_owned()
}
