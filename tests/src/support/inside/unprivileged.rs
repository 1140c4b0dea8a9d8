//! A process without privileges that leaves its user namespace.

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::InsideError;

/// Creates a user namespace together with a mount namespace, and covers the file `target` with the
/// file `source` there. Then sleeps.
pub(super) fn leave(source: &str, target: &str) -> Result<(), InsideError> {
    let none = None::<&str>;
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS)?;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    mount(Some(source), target, none, MsFlags::MS_BIND, none)?;
    super::say("covered")?;
    std::thread::sleep(std::time::Duration::from_secs(600));
    Ok(())
}
