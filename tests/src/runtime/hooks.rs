//! Hooks: programs that the configuration has run at certain points of a container's life.

use std::fs;

use serde_json::{Value, json};

use crate::support::bundle::Bundle;
use crate::support::machine::Result;
use crate::support::needs::{Need, Test};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    // runc has poststart run by create; crun, by start, as the specification says.
    test!(hooks_run_in_the_specifications_order, Need::Rrun),
    test!(hooks_get_the_containers_state, Need::Rrun),
    test!(a_start_container_hook_is_the_containers_own_program),
    test!(a_start_container_hook_is_confined_as_the_process_is),
    test!(a_failing_hook_undoes_the_container),
    test!(a_failing_hook_is_told_with_what_it_said),
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

/// By the filter of the process, and it has its environment, unless it says something of one.
fn a_start_container_hook_is_confined_as_the_process_is() -> Result {
    let mut bundle = Bundle::new(&["exit", "0"])?;
    let hook = json!([{ "path": "/bin/inside", "args": ["inside", "mkdir", "/data/hooked"] }]);
    bundle
        .set("/root/readonly", json!(false))
        .set("/process/noNewPrivileges", json!(true))
        .set("/hooks/startContainer", hook);
    bundle.run()?;
    fs::remove_dir(bundle.join("rootfs/data/hooked"))?;
    bundle.set(
        "/linux/seccomp",
        json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{
                "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28,
            }],
        }),
    );
    let output = bundle.call(&["run"])?.end()?;
    ensure!(output.code != 0, "{}", output.told());
    ensure!(
        output.stderr.contains("No space left on device"),
        "{}",
        output.told()
    );
    bundle.without("/linux/seccomp");
    for (env, expected) in [(None, true), (Some(json!(["A=b"])), false)] {
        // It fails, for its output to be told.
        let args = json!(["inside", "cat", "/proc/self/environ", "/not-there"]);
        let mut hook = json!({ "path": "/bin/inside", "args": args });
        if let Some(env) = env {
            hook["env"] = env;
        }
        bundle
            .set("/process/env", json!(["ONE=two"]))
            .set("/hooks/startContainer", json!([hook]));
        let output = bundle.call(&["run"])?.end()?;
        ensure!(output.code != 0, "{}", output.told());
        ensure_eq!(
            output.stderr.contains("ONE=two"),
            expected,
            "the process's variables: {}",
            output.told()
        );
    }
    Ok(())
}

/// The end of it, from both its outputs.
fn a_failing_hook_is_told_with_what_it_said() -> Result {
    for kind in ["createRuntime", "createContainer"] {
        let mut bundle = Bundle::new(&["exit", "0"])?;
        let line =
            "head -c 300000 /dev/zero | tr '\\0' x; echo no such device; echo alas >&2; exit 3";
        bundle.set(&format!("/hooks/{kind}"), shell(line));
        let output = bundle.call(&["create"])?.exits(1)?;
        for words in ["no such device", "alas"] {
            ensure!(output.stderr.contains(words), "{}", output.told());
        }
    }
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
