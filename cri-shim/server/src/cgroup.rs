//! cgroup v2 directories: made for pods, read for statistics, killed and removed at the end.
//! Limits are the OCI runtime's business.

pub(crate) mod slice;

use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::io::Errno;

use rrun_calls::error::{During, Error, Result};
use rrun_kernel::cgroup;
use rrun_kernel::errno::describe;

pub(crate) use rrun_kernel::cgroup::{MOUNT_POINT, keyed};

/// Who keeps the cgroup tree: rrun by files, or systemd by D-Bus. Kubelet asks and follows.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub(crate) enum CgroupDriver {
    Cgroupfs,
    Systemd,
}

/// One sentence if this host has no cgroup v2.
pub(crate) fn check() -> Result<(), String> {
    match cgroup::is_mounted() {
        Ok(true) => Ok(()),
        Ok(false) => Err(format!(
            "{MOUNT_POINT} is not a cgroup2 file system: rrun needs cgroup v2 (the unified hierarchy)"
        )),
        Err(errno) => Err(format!(
            "look at {MOUNT_POINT}: {}: rrun needs cgroup v2 (the unified hierarchy)",
            describe(&errno.into())
        )),
    }
}

/// The directory of a cgroup path such as `/kubepods/burstable/pod1`.
pub(crate) fn directory(cgroup: &str) -> PathBuf {
    Path::new(MOUNT_POINT).join(cgroup.trim_start_matches('/'))
}

/// The cgroup path of a pod with this parent, in the form of the driver.
pub(crate) fn of_pod(driver: CgroupDriver, parent: &str) -> Result<String> {
    if driver == CgroupDriver::Systemd {
        // Kubelet sends the slice's name, others its path.
        let name = parent.rsplit('/').next().unwrap_or(parent);
        return slice::path(if slice::is_slice(name) { name } else { parent });
    }
    if slice::is_slice(parent) {
        return Err(Error::invalid(format!(
            "the pod's cgroup parent {parent:?} is a systemd slice, but the cgroup driver is cgroupfs"
        )));
    }
    if !parent.starts_with('/') || parent.split('/').any(|part| part == "..") {
        return Err(Error::invalid(format!(
            "the pod's cgroup parent {parent:?} is not an absolute cgroup path"
        )));
    }
    Ok(parent.trim_end_matches('/').to_owned())
}

/// The cgroup path of a pod that names no parent: its own, in the one that is configured for such.
pub(crate) fn own(parent: &str, pod: &str) -> String {
    match parent.strip_suffix(".slice") {
        Some(prefix) => {
            let name = prefix.rsplit('/').next().unwrap_or(prefix);
            format!("{parent}/{name}-{pod}.slice")
        }
        None => format!("{parent}/{pod}"),
    }
}

/// Makes the cgroup and the ones above it, with every controller handed down. Returns the
/// directories made, outermost first.
pub(crate) fn create(cgroup: &str) -> Result<Vec<PathBuf>> {
    // A parent can go when the last pod in it does, just before the next one is made.
    let mut tries = 0;
    loop {
        match make(cgroup) {
            Err(ParentGone) if tries < 10 => tries += 1,
            Err(ParentGone) => {
                return Err(Error::internal(format!(
                    "make the cgroup {cgroup}: its parents are removed again and again"
                )));
            }
            Ok(result) => return result,
        }
    }
}

/// A parent went while a cgroup was made in it.
struct ParentGone;

fn make(cgroup: &str) -> Result<Result<Vec<PathBuf>>, ParentGone> {
    let mut made = Vec::new();
    let mut path = PathBuf::from(MOUNT_POINT);
    for part in cgroup.split('/').filter(|part| !part.is_empty()) {
        hand_down(&path);
        path.push(part);
        match std::fs::create_dir(&path) {
            Ok(()) => made.push(path.clone()),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => {
                remove_dirs(&made);
                if error.kind() == io::ErrorKind::NotFound {
                    return Err(ParentGone);
                }
                let what = || format!("make the cgroup {}", path.display());
                return Ok(Err(error).during(what));
            }
        }
    }
    // To the containers, too: what one without limits uses is counted by the controllers.
    hand_down(&path);
    Ok(Ok(made))
}

/// Makes every controller that `dir` has available to its children. What the kernel refuses here
/// (a controller in use by realtime threads, a parent with processes) shows when a limit is set.
fn hand_down(dir: &Path) {
    for controller in cgroup::missing_below(dir) {
        if let Err(errno) = cgroup::enable_below(dir, &controller) {
            log::debug!(
                "hand {controller} down in {}: {}",
                dir.display(),
                describe(&errno.into())
            );
        }
    }
}

/// The directory, or, while systemd has not made it, the nearest one above that is there.
pub(crate) fn nearest(dir: &Path) -> &Path {
    dir.ancestors().find(|dir| dir.is_dir()).unwrap_or(dir)
}

/// Removes directories made by [`create`], innermost first, as far as they are empty.
pub(crate) fn remove_dirs(made: &[PathBuf]) {
    for dir in made.iter().rev() {
        match std::fs::remove_dir(dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return,
            _ => {}
        }
    }
}

/// Kills every process in the cgroup and below, waits for their end and removes it and what is
/// below. Done if it is not there.
pub(crate) async fn destroy(dir: &Path) -> Result<()> {
    cgroup::kill(dir).during(|| format!("kill the cgroup {}", dir.display()))?;
    let mut pause = Duration::from_millis(1);
    // A process in an uninterruptible sleep can take long to die; rmdir says EBUSY until then.
    for _ in 0..100 {
        match cgroup::remove_tree(dir) {
            Ok(()) => return Ok(()),
            Err((_, Errno::BUSY)) => {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(Duration::from_millis(100));
            }
            Err((dir, errno)) => {
                return Err(errno).during(|| format!("remove the cgroup {}", dir.display()));
            }
        }
    }
    Err(Error::internal(format!(
        "remove the cgroup {}: its processes do not die",
        dir.display()
    )))
}

/// A file of the cgroup, if it is there: a controller may be missing. The kernel writes these,
/// none is larger than a page or two.
pub(crate) fn read(dir: &Path, file: &str) -> Option<String> {
    let file = std::fs::File::open(dir.join(file)).ok()?;
    let mut text = vec![0; 16 << 10];
    let length = file.read_at(&mut text, 0).ok()?;
    text.truncate(length);
    String::from_utf8(text).ok()
}

/// A file with one number; `None` also for `max`.
pub(crate) fn number(dir: &Path, file: &str) -> Option<u64> {
    read(dir, file)?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parent_has_the_drivers_form() -> Result<()> {
        let files = |parent| of_pod(CgroupDriver::Cgroupfs, parent);
        assert_eq!(files("/kubepods/pod1/")?, "/kubepods/pod1");
        assert!(files("kubepods-pod1.slice").is_err_and(|e| e.sentence().contains("slice")));
        assert!(files("/a/../..").is_err());
        assert!(files("a").is_err());
        assert_eq!(own("/rrun", "1"), "/rrun/1");
        assert_eq!(
            own("/a.slice/a-b.slice", "1"),
            "/a.slice/a-b.slice/a-b-1.slice"
        );
        let systemd = |parent| of_pod(CgroupDriver::Systemd, parent);
        let expected = "/kubepods.slice/kubepods-pod1.slice";
        assert_eq!(systemd("kubepods-pod1.slice")?, expected);
        assert_eq!(systemd(expected)?, expected);
        assert!(systemd("/kubepods/pod1").is_err_and(|e| e.sentence().contains("slice")));
        Ok(())
    }
}
