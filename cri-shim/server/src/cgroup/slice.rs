//! Pods' cgroups where systemd keeps the tree: a pod is a slice, a container a scope in it,
//! systemd.slice(5) and systemd.scope(5). The runtime asks systemd for the scope; a slice that is
//! not there comes with the first scope in it.

use std::path::Path;
use std::time::Duration;

use tokio::process::Command;

use rrun_calls::error::{During, Error, Result};

/// What the names of containers' scopes begin with: `cri-rrun-ID.scope`.
const PREFIX: &str = "cri-rrun";

/// How long systemd may take to stop an empty slice.
const STOP_TIMEOUT: Duration = Duration::from_secs(60);

/// Whether systemd is PID 1, sd_booted(3).
pub(crate) fn is_systemd_booted() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

/// Whether this is the name or the cgroup path of a slice.
pub(crate) fn is_slice(name: &str) -> bool {
    name.ends_with(".slice")
}

/// The cgroup path of a slice: `a-b.slice` is `/a.slice/a-b.slice`, systemd.slice(5).
pub(crate) fn path(slice: &str) -> Result<String> {
    let refuse = |why: &str| {
        Err(Error::invalid(format!(
            "the cgroup parent {slice:?} {why}; with the cgroup driver systemd it is a slice, such as kubepods-burstable-pod1.slice"
        )))
    };
    let Some(name) = slice.strip_suffix(".slice") else {
        return refuse("is not the name of a slice");
    };
    if name == "-" {
        return refuse("is the root of all");
    }
    if slice.contains(['/', '\0', '\n']) || name.split('-').any(str::is_empty) {
        return refuse("is not a well-formed name");
    }
    let mut path = String::new();
    for (at, _) in name.match_indices('-').chain([(name.len(), "")]) {
        path.push('/');
        path.push_str(name.get(..at).unwrap_or_default());
        path.push_str(".slice");
    }
    Ok(path)
}

/// A slice's name, the last part of its cgroup path.
fn name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// The cgroup path of a container in a pod's slice.
pub(crate) fn scope(slice: &str, container: &str) -> String {
    format!("{slice}/{PREFIX}-{container}.scope")
}

/// The same as runtimes are told with `--systemd-cgroup`: `SLICE:PREFIX:NAME`.
pub(crate) fn for_runtime(slice: &str, container: &str) -> String {
    format!("{}:{PREFIX}:{container}", name(slice))
}

/// Stops a slice that nobody else looks after, with what is left in it. Done if it is not there.
pub(crate) async fn stop(slice: &str) -> Result<()> {
    let name = name(slice);
    let what = || format!("run systemctl stop {name}");
    let stopping = Command::new("systemctl")
        .args(["--quiet", "stop", name])
        .stdin(std::process::Stdio::null())
        .kill_on_drop(true)
        .output();
    match tokio::time::timeout(STOP_TIMEOUT, stopping).await {
        Ok(output) => {
            let output = output.during(what)?;
            let said = String::from_utf8_lossy(&output.stderr);
            if !output.status.success() && super::directory(slice).exists() {
                return Err(Error::internal(format!("{}: {}", what(), said.trim())));
            }
            Ok(())
        }
        Err(_) => Err(Error::internal(format!(
            "{}: it did not end within {} s",
            what(),
            STOP_TIMEOUT.as_secs()
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
            assert!(path(wrong).is_err(), "{wrong} was taken");
        }
        Ok(())
    }

    #[test]
    fn a_scope_has_a_path_and_a_name_for_the_runtime() {
        let slice = "/a.slice/a-b.slice";
        assert_eq!(scope(slice, "1"), "/a.slice/a-b.slice/cri-rrun-1.scope");
        assert_eq!(for_runtime(slice, "1"), "a-b.slice:cri-rrun:1");
    }
}
