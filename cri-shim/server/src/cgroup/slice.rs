//! The cgroups of pods if systemd manages the cgroup tree. A pod is a slice, systemd.slice(5). A
//! container is a scope in the pod's slice, systemd.scope(5). The runtime requests the scope from
//! systemd. systemd creates a missing slice together with the first scope in it.

use std::path::Path;
use std::time::Duration;

use tokio::process::Command;

use rrun_calls::error::{During, Error, Result};

/// The prefix of the names of containers' scopes, which have the form `cri-rrun-ID.scope`.
const PREFIX: &str = "cri-rrun";

/// The time limit for systemd to start a slice, or to stop an empty slice.
const SYSTEMCTL_TIMEOUT: Duration = Duration::from_secs(60);

/// Returns whether systemd is PID 1, sd_booted(3).
pub(crate) fn is_systemd_booted() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

/// Returns whether `name` is the name or the cgroup path of a slice.
pub(crate) fn is_slice(name: &str) -> bool {
    name.ends_with(".slice")
}

/// Returns the cgroup path of a slice, for example `/a.slice/a-b.slice` for `a-b.slice`,
/// systemd.slice(5).
pub(crate) fn path(slice: &str) -> Result<String> {
    let refuse = |why: &str| {
        Err(Error::invalid(format!(
            "the cgroup parent {slice:?} is invalid: {why}; the cgroup driver systemd requires the name of a slice, such as kubepods-burstable-pod1.slice"
        )))
    };
    let Some(name) = slice.strip_suffix(".slice") else {
        return refuse("the name does not end in .slice");
    };
    if name == "-" {
        return refuse("the root slice is not allowed");
    }
    if slice.contains(['/', '\0', '\n']) || name.split('-').any(str::is_empty) {
        return refuse("the name contains an invalid character or an empty part");
    }
    let mut path = String::new();
    for (at, _) in name.match_indices('-').chain([(name.len(), "")]) {
        path.push('/');
        path.push_str(name.get(..at).unwrap_or_default());
        path.push_str(".slice");
    }
    Ok(path)
}

/// Returns the name of a slice, which is the last component of its cgroup path.
fn name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// Returns the cgroup path of a container in a pod's slice.
pub(crate) fn scope(slice: &str, container: &str) -> String {
    format!("{slice}/{PREFIX}-{container}.scope")
}

/// Returns a container's scope in the form `SLICE:PREFIX:NAME`, which runtimes expect with
/// `--systemd-cgroup`.
pub(crate) fn for_runtime(slice: &str, container: &str) -> String {
    format!("{}:{PREFIX}:{container}", name(slice))
}

/// Starts a slice. systemd then creates the slice's cgroup.
pub(crate) async fn start(slice: &str) -> Result<()> {
    systemctl("start", slice).await
}

/// Stops a slice, together with the units that remain in it. Only rrun-cri may create units in the
/// slice, because this function also stops the units of other programs. A missing slice is not an
/// error.
pub(crate) async fn stop(slice: &str) -> Result<()> {
    let stopped = systemctl("stop", slice).await;
    match super::directory(slice).try_exists() {
        Ok(false) => Ok(()),
        _ => stopped,
    }
}

/// Runs `systemctl COMMAND` for a slice.
async fn systemctl(command: &str, slice: &str) -> Result<()> {
    let name = name(slice);
    let what = || format!("run systemctl {command} {name}");
    let running = Command::new("systemctl")
        .args(["--quiet", command, name])
        .stdin(std::process::Stdio::null())
        .kill_on_drop(true)
        .output();
    match tokio::time::timeout(SYSTEMCTL_TIMEOUT, running).await {
        Ok(output) => {
            let output = output.during(what)?;
            if output.status.success() {
                return Ok(());
            }
            let stderr = String::from_utf8_lossy(&output.stderr);
            Err(Error::internal(format!("{}: {}", what(), stderr.trim())))
        }
        Err(_) => Err(Error::internal(format!(
            "{}: the command did not exit within {} s",
            what(),
            SYSTEMCTL_TIMEOUT.as_secs()
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_dash_of_a_slices_name_is_a_directory() -> Result<()> {
        assert_eq!(
            path("kubepods-burstable-podab_c.slice")?,
            "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podab_c.slice"
        );
        assert_eq!(path("rrun.slice")?, "/rrun.slice");
        for wrong in [
            "",
            ".slice",
            "-.slice",
            "a--b.slice",
            "-a.slice",
            "a-.slice",
            "a/b.slice",
            "/kubepods/pod1",
            "a.scope",
        ] {
            assert!(
                path(wrong).is_err(),
                "the invalid slice name {wrong:?} was accepted"
            );
        }
        Ok(())
    }

    #[test]
    fn a_scope_has_a_cgroup_path_and_a_form_for_the_runtime() {
        let slice = "/a.slice/a-b.slice";
        assert_eq!(scope(slice, "1"), "/a.slice/a-b.slice/cri-rrun-1.scope");
        assert_eq!(for_runtime(slice, "1"), "a-b.slice:cri-rrun:1");
    }
}
