//! Management of the pods' cgroup v2 directories. The server creates the cgroups and reads their
//! statistics. When a pod is removed, the server kills the processes in the pod's cgroup and
//! removes the cgroup. The OCI runtime sets the cgroups' limits.

pub(crate) mod slice;

use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::io::Errno;

use rrun_calls::error::{During, Error, Result};
use rrun_calls::wait::blocking;
use rrun_kernel::cgroup::{self, Survivors};
use rrun_kernel::errno::describe;

pub(crate) use rrun_kernel::cgroup::{MOUNT_POINT, keyed};

/// The manager of the cgroup tree: rrun through files, or systemd through D-Bus. Kubelet queries
/// the server's driver and uses the same driver.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub(crate) enum CgroupDriver {
    Cgroupfs,
    Systemd,
}

/// Checks that this host has cgroup v2; the error is a complete sentence.
pub(crate) fn check() -> Result<(), String> {
    match cgroup::is_mounted() {
        Ok(true) => Ok(()),
        Ok(false) => Err(format!(
            "{MOUNT_POINT} is not a cgroup2 file system: rrun needs cgroup v2 (the unified hierarchy)"
        )),
        Err(errno) => Err(format!(
            "query the file system of {MOUNT_POINT}: {}: rrun needs cgroup v2 (the unified hierarchy)",
            describe(&errno.into())
        )),
    }
}

/// Returns the directory of a cgroup path such as `/kubepods/burstable/pod1`.
pub(crate) fn directory(cgroup: &str) -> PathBuf {
    Path::new(MOUNT_POINT).join(cgroup.trim_start_matches('/'))
}

/// Returns the directory of the cgroup of a pod's pause process, in the pod's cgroup `cgroup`. The
/// kernel refuses processes in the pod's cgroup itself, because controllers are enabled for its
/// children (cgroup-v2.rst, "No Internal Process Constraint"). The directory's name contains the
/// pod's id, because pods can have the same cgroup: kubelet creates a pod again in the cgroup of the
/// stopped pod, which it removes later.
pub(crate) fn of_pause(cgroup: &str, pod: &str) -> PathBuf {
    directory(cgroup).join(format!("rrun-pause-{pod}"))
}

/// Returns the cgroup path that the cgroup parent in a pod's request specifies. The parent must
/// have the form that the cgroup driver requires.
pub(crate) fn of_pod(driver: CgroupDriver, parent: &str) -> Result<String> {
    if driver == CgroupDriver::Systemd {
        // Kubelet sends only the slice's name as the cgroup parent, and other clients send the
        // slice's path.
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

/// Returns the cgroup path of a pod whose request has no cgroup parent: a separate cgroup below the
/// configured parent.
pub(crate) fn own(parent: &str, pod: &str) -> String {
    match parent.strip_suffix(".slice") {
        Some(prefix) => {
            let name = prefix.rsplit('/').next().unwrap_or(prefix);
            format!("{parent}/{name}-{pod}.slice")
        }
        None => format!("{parent}/{pod}"),
    }
}

/// Returns the directories that [`create`] would create now, outermost first.
pub(crate) fn missing(cgroup: &str) -> Vec<PathBuf> {
    let dir = directory(cgroup);
    let missing = dir.ancestors().take_while(|dir| !dir.is_dir());
    let mut missing: Vec<PathBuf> = missing.map(Path::to_owned).collect();
    missing.reverse();
    missing
}

/// Creates the cgroup and its missing parents, and enables every available controller in them.
/// Returns the directories that were created, outermost first.
pub(crate) fn create(cgroup: &str) -> Result<Vec<PathBuf>> {
    // The removal of a parent cgroup's last pod can also remove the parent cgroup. If the parent
    // cgroup is removed just before the server creates another pod's cgroup in it, the creation
    // fails. The server then repeats the creation.
    let mut tries = 0;
    loop {
        match make(cgroup) {
            Err(ParentGone) if tries < 10 => tries += 1,
            Err(ParentGone) => {
                return Err(Error::internal(format!(
                    "create the cgroup {cgroup}: one of its parent cgroups was removed during every attempt"
                )));
            }
            Ok(result) => return result,
        }
    }
}

/// Limits the number of cgroups in a pod's cgroup. The pod's containers do not see the pod's cgroup,
/// so they can't change the limit. Other pods can have the same cgroup: the first pod sets the limit.
pub(crate) fn limit_descendants(cgroup: &str, most: usize) -> Result<()> {
    let dir = directory(cgroup);
    cgroup::limit_descendants(&dir, most).during(|| {
        format!(
            "limit the number of cgroups in {} (pod_cgroups)",
            dir.display()
        )
    })
}

/// The error if the parent cgroup was removed during the creation of a cgroup.
struct ParentGone;

fn make(cgroup: &str) -> Result<Result<Vec<PathBuf>>, ParentGone> {
    let mut made = Vec::new();
    let mut path = PathBuf::from(MOUNT_POINT);
    for part in cgroup.split('/').filter(|part| !part.is_empty()) {
        enable_controllers(&path);
        path.push(part);
        match std::fs::create_dir(&path) {
            Ok(()) => made.push(path.clone()),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => {
                remove_dirs(&made);
                if error.kind() == io::ErrorKind::NotFound {
                    return Err(ParentGone);
                }
                let what = || format!("create the cgroup {}", path.display());
                return Ok(Err(error).during(what));
            }
        }
    }
    // Enable the controllers for the containers' cgroups, too, because controllers also measure the
    // resource usage of a container without limits.
    enable_controllers(&path);
    Ok(Ok(made))
}

/// Enables every available controller of `dir` for the children of `dir`. The kernel can refuse to
/// enable a controller, for example because of processes in `dir` or of realtime threads. A refusal
/// is not an error here. A later attempt to set a limit then fails, and the error of that attempt
/// names the missing controller.
fn enable_controllers(dir: &Path) {
    for controller in cgroup::missing_below(dir) {
        if let Err(errno) = cgroup::enable_below(dir, &controller) {
            log::debug!(
                "enable the controller {controller} below {}: {}",
                dir.display(),
                describe(&errno.into())
            );
        }
    }
}

/// Returns `dir`, or its nearest existing ancestor if systemd has not created the directory yet.
pub(crate) fn nearest(dir: &Path) -> &Path {
    dir.ancestors().find(|dir| dir.is_dir()).unwrap_or(dir)
}

/// Removes the directories that [`create`] created, innermost first. The removal stops at a
/// directory that is not empty.
pub(crate) fn remove_dirs(made: &[PathBuf]) {
    for dir in made.iter().rev() {
        match std::fs::remove_dir(dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return,
            _ => {}
        }
    }
}

/// Kills every process in the cgroup and in its descendants, waits until the processes have exited,
/// and removes the cgroups. A missing cgroup is not an error. A container can hold locks of the kernel
/// that this needs, so a separate thread does it.
pub(crate) async fn destroy(dir: &Path) -> Result<()> {
    let (what, dir) = (
        format!("remove the cgroup {}", dir.display()),
        dir.to_owned(),
    );
    blocking(what, move || destroy_now(&dir)).await
}

fn destroy_now(dir: &Path) -> Result<()> {
    cgroup::kill_after_leases(dir).during(|| format!("kill the cgroup {}", dir.display()))?;
    let mut survivors = Survivors::new();
    let mut pause = Duration::from_millis(1);
    // A process in an uninterruptible sleep can take a long time to exit. Until it has exited,
    // rmdir(2) fails with EBUSY for the process's cgroup.
    for _ in 0..100 {
        match cgroup::remove_tree(dir) {
            Ok(()) => return Ok(()),
            Err((_, Errno::BUSY)) => {
                std::thread::sleep(pause);
                survivors.kill_if_due(dir);
                pause = (pause * 2).min(Duration::from_millis(100));
            }
            Err((dir, errno)) => {
                return Err(errno).during(|| format!("remove the cgroup {}", dir.display()));
            }
        }
    }
    Err(Error::internal(format!(
        "remove the cgroup {}: its processes do not exit",
        dir.display()
    )))
}

/// Returns the contents of a cgroup file. If the file's controller is not enabled, the file does
/// not exist, and the result is `None`. The result is also `None` if a process of the container
/// holds a lease on the file. A buffer of 16 KiB is enough: the kernel's files are at most one or
/// two pages long.
pub(crate) fn read(dir: &Path, file: &str) -> Option<String> {
    let file = cgroup::open_file(&dir.join(file)).ok()?;
    let mut text = vec![0; 16 << 10];
    let length = file.read_at(&mut text, 0).ok()?;
    text.truncate(length);
    String::from_utf8(text).ok()
}

/// Returns the number in a cgroup file, or `None` if the file does not exist or contains `max`.
pub(crate) fn number(dir: &Path, file: &str) -> Option<u64> {
    read(dir, file)?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cgroup_parent_must_have_the_drivers_form() -> Result<()> {
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
