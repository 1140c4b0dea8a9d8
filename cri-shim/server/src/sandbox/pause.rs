//! The cgroup and the OOM score adjustment of a pod's pause process. The monitor starts the pause
//! process in this cgroup, so the pod's limits and statistics include the pause process.

use super::{Sandbox, namespaces};
use crate::cgroup::{self, slice};
use crate::container::resources;
use crate::node::Node;
use rrun_calls::error::{During, Result};
use rrun_calls::wait::{blocking, slow};
use rrun_protocol::Pause;

/// The OOM score adjustment of the pause process. Kubelet and containerd use the same value for
/// their pause containers: the kernel kills every container of the pod before the pause process.
const OOM_SCORE_ADJ: i64 = -998;

/// Creates the cgroup of the pod's pause process, and returns the settings for the monitor. Returns
/// `None` if the pod has no pause process.
pub(super) async fn prepare(node: &Node, sandbox: &Sandbox) -> Result<Option<Pause>> {
    if !namespaces::sharing(&sandbox.config)?.has_pause_process() {
        return Ok(None);
    }
    let pod = cgroup::directory(&sandbox.cgroup);
    if slice::is_slice(&sandbox.cgroup) && !pod.exists() {
        // Kubelet creates the slices of its pods. For other callers, systemd would create the slice
        // only together with the pod's first container.
        let started = slice::start(&sandbox.cgroup);
        slow(
            format!("{}: start the pod's slice", sandbox.name()),
            started,
        )
        .await?;
    }
    let dir = cgroup::of_pause(&sandbox.cgroup, &sandbox.id);
    let pause = Pause {
        cgroup: dir.clone(),
        oom_score_adj: resources::oom_score_adj(OOM_SCORE_ADJ, node.config.restrict_oom_score_adj)?,
    };
    let what = format!("create the cgroup {}", dir.display());
    blocking(format!("{}: {what}", sandbox.name()), move || {
        std::fs::create_dir(&dir).during(|| what)
    })
    .await?;
    Ok(Some(pause))
}

/// Removes the cgroup of the pod's pause process, and kills the process if it is still running. A
/// missing cgroup is not an error.
pub(super) async fn remove(sandbox: &Sandbox) -> Result<()> {
    if !namespaces::sharing(&sandbox.config)?.has_pause_process() {
        return Ok(());
    }
    cgroup::destroy(&cgroup::of_pause(&sandbox.cgroup, &sandbox.id)).await
}
