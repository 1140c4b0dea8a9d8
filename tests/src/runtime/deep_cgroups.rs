//! Tests of containers that nest cgroups below their own cgroup. The paths of these cgroups can be
//! longer than PATH_MAX.

use serde_json::json;

use crate::support::bundle::Bundle;
use crate::support::machine::{Result, wait_for};
use crate::support::needs::{Need, Test};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[test!(
    deep_cgroups_are_listed_killed_and_removed,
    Need::Rrun
)];

/// The numbers of nested cgroups, and the lengths of their names.
const TREES: [(&str, &str); 2] = [("30", "200"), ("1900", "1")];

/// Starts a container whose process creates nested cgroups and moves into the deepest of them.
fn start(levels: &str, length: &str) -> Result<Bundle> {
    let mut bundle = Bundle::new(&["nest-cgroups", levels, length])?;
    for mount in bundle.mounts().filter(|mount| mount["type"] == "cgroup") {
        mount["options"] = json!(["nosuid", "noexec", "nodev"]);
    }
    bundle.start()?;
    wait_for("the container to move into the deepest cgroup", || {
        let count = bundle.cgroup_count("cgroup.stat", "nr_descendants")?;
        let moved = bundle.cgroup_file("cgroup.procs")?.is_empty();
        Ok((count.to_string() == levels && moved).then_some(()))
    })?;
    Ok(bundle)
}

fn deep_cgroups_are_listed_killed_and_removed() -> Result {
    for (levels, length) in TREES {
        let bundle = start(levels, length)?;
        let listed = bundle.runtime(&["ps", "--format", "json", bundle.id()]);
        ensure_eq!(
            listed.ok()?.json()?,
            json!([bundle.pid()?]),
            "the processes of a container with {levels} nested cgroups"
        );
        bundle.exec(&[], &["exit", "0"]).ok()?;
        bundle
            .runtime(&["kill", "--all", bundle.id(), "TERM"])
            .ok()?;
        bundle.wait_status("stopped")?;
        bundle.delete()?;
        ensure!(
            !bundle.cgroup().exists(),
            "the cgroup of a container with {levels} nested cgroups still exists after `delete`"
        );

        let bundle = start(levels, length)?;
        bundle.end()?;
        ensure!(
            !bundle.cgroup().exists(),
            "the cgroup of a container with {levels} nested cgroups still exists after `delete --force`"
        );
    }
    Ok(())
}
