//! Hooks: programs that the configuration has run at certain points of a container's life.

use std::fs;

use serde_json::{Value, json};

use crate::bundle::Bundle;
use crate::machine::Result;
use crate::needs::{Need, Test};
use crate::{ensure, ensure_eq, test};

pub const TESTS: &[Test] = &[
    // runc has poststart run by create; crun, by start, as the specification says.
    test!(hooks_run_in_the_specifications_order, Need::Rrun),
    test!(hooks_get_the_containers_state, Need::Rrun),
    test!(a_start_container_hook_is_the_containers_own_program),
    test!(a_failing_hook_undoes_the_container),
    test!(a_hook_may_leave_a_large_state_unread, Need::Rrun),
];

/// A hook that runs this shell line on the host.
fn shell(line: &str) -> Value {
    json!([{ "path": "/bin/sh", "args": ["sh", "-c", line] }])
}

fn hooks_run_in_the_specifications_order() -> Result {
    let mut bundle = Bundle::new(&["exit", "0"])?;
    let log = bundle.join("hooks.log");
    let kinds = [
        "prestart",
        "createRuntime",
        "createContainer",
        "poststart",
        "poststop",
    ];
    for kind in kinds {
        let line = format!("echo {kind} >> {}", log.display());
        bundle.set(&format!("/hooks/{kind}"), shell(&line));
    }
    bundle.call(&["create"])?.ok()?;
    let heard = || fs::read_to_string(&log).unwrap_or_default();
    ensure_eq!(
        heard(),
        "prestart\ncreateRuntime\ncreateContainer\n",
        "hooks of create"
    );
    bundle.call(&["start"])?.ok()?;
    ensure!(
        heard().ends_with("\npoststart\n"),
        "hooks after start: {:?}",
        heard()
    );
    bundle.wait_status("stopped")?;
    bundle.delete()?;
    ensure!(
        heard().ends_with("\npoststart\npoststop\n"),
        "hooks after delete: {:?}",
        heard()
    );
    Ok(())
}

fn hooks_get_the_containers_state() -> Result {
    let mut bundle = Bundle::new(&["sleep", "600"])?;
    for kind in ["createRuntime", "poststart", "poststop"] {
        let line = format!("cat > {}", bundle.join(kind).display());
        bundle.set(&format!("/hooks/{kind}"), shell(&line));
    }
    bundle.start()?;
    let pid = bundle.pid()?;
    bundle.end()?;
    for (kind, statuses) in [
        ("createRuntime", &["creating", "created"][..]),
        ("poststart", &["running"]),
        ("poststop", &["stopped"]),
    ] {
        let state: Value = serde_json::from_slice(&fs::read(bundle.join(kind))?)?;
        ensure_eq!(state["id"], json!(bundle.id()), "id for {kind}");
        ensure_eq!(state["bundle"], json!(bundle.path()), "bundle for {kind}");
        let status = state["status"].as_str().unwrap_or_default();
        ensure!(statuses.contains(&status), "status for {kind}: {state}");
        if kind != "poststop" {
            ensure_eq!(state["pid"], json!(pid), "pid for {kind}");
        }
    }
    Ok(())
}

fn a_start_container_hook_is_the_containers_own_program() -> Result {
    let mut bundle = Bundle::new(&["cat", "/data/hooked"])?;
    bundle.set("/root/readonly", json!(false)).set(
        "/hooks/startContainer",
        json!([{ "path": "/bin/inside", "args": ["inside", "write", "/data/hooked", "before"] }]),
    );
    ensure_eq!(bundle.run()?.stdout, "before", "what the hook wrote");
    Ok(())
}

/// The state may be larger than a pipe holds: one hook reads it all, late, one never does and has
/// its time, and one ends without having read it.
fn a_hook_may_leave_a_large_state_unread() -> Result {
    let large = "x".repeat(300_000);
    let mut bundle = Bundle::new(&["exit", "0"])?;
    bundle.set("/annotations", json!({ "large": large }));
    let copy = bundle.join("copy");
    bundle.set(
        "/hooks/createRuntime",
        json!([
            // Longer than the clock lasts.
            { "path": "/bin/true", "timeout": i64::MAX },
            { "path": "/bin/sh", "args": ["sh", "-c", format!("sleep 1; cat >{}", copy.display())] },
        ]),
    );
    bundle.call(&["create"])?.ok()?;
    let told: Value = serde_json::from_str(&fs::read_to_string(&copy)?)?;
    ensure_eq!(told["annotations"]["large"], large, "what the hook read");
    bundle.runtime(&["delete", "--force", bundle.id()]).ok()?;
    bundle.set(
        "/hooks/createRuntime",
        json!([{ "path": "/bin/sleep", "args": ["sleep", "100000"], "timeout": 1 }]),
    );
    let output = bundle.call(&["create"])?.exits(1)?;
    ensure!(
        output.stderr.contains("did not end within 1 s"),
        "{}",
        output.told()
    );
    Ok(())
}

fn a_failing_hook_undoes_the_container() -> Result {
    for kind in ["prestart", "createRuntime", "createContainer"] {
        let mut bundle = Bundle::new(&["exit", "0"])?;
        bundle.set(&format!("/hooks/{kind}"), shell("exit 3"));
        let output = bundle.call(&["create"])?.exits(1)?;
        ensure!(output.stderr.contains("hook"), "{}", output.told());
        ensure!(!bundle.cgroup().exists(), "its cgroup is left after {kind}");
        ensure!(
            !bundle.root().join(bundle.id()).exists(),
            "its state is left after {kind}"
        );
    }
    Ok(())
}
