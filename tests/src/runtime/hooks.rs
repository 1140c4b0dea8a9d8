//! Tests of hooks. A hook is a program that the runtime runs at a certain point of a container's
//! life cycle.

use std::fs;

use serde_json::{Value, json};

use crate::support::bundle::Bundle;
use crate::support::machine::{Result, command};
use crate::support::needs::{Need, Test};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    // runc runs poststart hooks in `create`. rrun and crun run poststart hooks in `start`, as the
    // specification requires.
    test!(hooks_run_in_the_order_of_the_specification, Need::Rrun),
    test!(hooks_receive_the_containers_state, Need::Rrun),
    test!(hooks_on_the_host_have_the_umask_of_the_runtimes_caller_and_no_blocked_signals),
    test!(a_start_container_hook_runs_in_the_container),
    test!(a_start_container_hook_is_confined_like_the_process),
    test!(a_failing_hook_makes_create_remove_the_container),
    test!(the_error_about_a_failing_hook_contains_the_hooks_output),
    test!(a_hook_does_not_need_to_read_a_large_state, Need::Rrun),
    test!(hooks_on_the_host_are_not_in_the_containers_namespaces),
    test!(poststop_hooks_run_although_the_joined_pid_namespace_has_ended),
    test!(a_hook_in_the_containers_mount_namespace_has_the_hosts_root),
];

/// The kinds of hooks that run in the host's root, in their order.
const HOST_KINDS: [&str; 5] = [
    "prestart",
    "createRuntime",
    "createContainer",
    "poststart",
    "poststop",
];

/// Returns a hook that runs the shell command `line` on the host.
fn shell(line: &str) -> Value {
    json!([{ "path": "/bin/sh", "args": ["sh", "-c", line] }])
}

fn hooks_run_in_the_order_of_the_specification() -> Result {
    let mut bundle = Bundle::new(&["exit", "0"])?;
    let log = bundle.join("hooks.log");
    for kind in HOST_KINDS {
        let line = format!("echo {kind} >> {}", log.display());
        bundle.set(&format!("/hooks/{kind}"), shell(&line));
    }
    bundle.call(&["create"])?.ok()?;
    let logged_hooks = || fs::read_to_string(&log).unwrap_or_default();
    ensure_eq!(
        logged_hooks(),
        "prestart\ncreateRuntime\ncreateContainer\n",
        "the hooks that `create` runs"
    );
    bundle.call(&["start"])?.ok()?;
    ensure!(
        logged_hooks().ends_with("\npoststart\n"),
        "the hook poststart did not run after `start` (the hooks that ran: {:?})",
        logged_hooks()
    );
    bundle.wait_status("stopped")?;
    bundle.delete()?;
    ensure!(
        logged_hooks().ends_with("\npoststart\npoststop\n"),
        "the hook poststop did not run after `delete` (the hooks that ran: {:?})",
        logged_hooks()
    );
    Ok(())
}

fn hooks_receive_the_containers_state() -> Result {
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
        ensure_eq!(
            state["id"],
            json!(bundle.id()),
            "the container's id in the state that the hook {kind} received"
        );
        ensure_eq!(
            state["bundle"],
            json!(bundle.path()),
            "the bundle's path in the state that the hook {kind} received"
        );
        let status = state["status"].as_str().unwrap_or_default();
        ensure!(
            statuses.contains(&status),
            "the hook {kind} received a state whose `status` is not one of {statuses:?}; the state: {state}"
        );
        if kind != "poststop" {
            ensure_eq!(
                state["pid"],
                json!(pid),
                "the process id in the state that the hook {kind} received"
            );
        }
    }
    Ok(())
}

/// With the umask 0, every user could write to the files that a hook creates on the host. With
/// blocked signals, only SIGKILL could terminate a hook.
fn hooks_on_the_host_have_the_umask_of_the_runtimes_caller_and_no_blocked_signals() -> Result {
    let mut bundle = Bundle::new(&["exit", "0"])?;
    // A shell that creates a process unblocks signals, so the shell executes grep itself.
    let line = "umask; exec grep SigBlk /proc/self/status";
    for kind in HOST_KINDS {
        let line = format!("exec > {}; {line}", bundle.join(kind).display());
        bundle.set(&format!("/hooks/{kind}"), shell(&line));
    }
    bundle.run()?;
    for kind in HOST_KINDS {
        ensure_eq!(
            fs::read_to_string(bundle.join(kind))?,
            command("sh", ["-c", line]).ok()?.stdout,
            "the umask and the blocked signals of the hook {kind}"
        );
    }
    Ok(())
}

/// The hooks of this test write the names of their PID namespace and time namespace to a file. If a
/// hook were in a joined PID namespace, the other processes of this namespace could kill the hook.
fn hooks_on_the_host_are_not_in_the_containers_namespaces() -> Result {
    let mut first = Bundle::new(&["sleep", "600"])?;
    first
        .add("/linux/namespaces", json!({ "type": "time" }))
        .set(
            "/linux/timeOffsets",
            json!({ "boottime": { "secs": 1000 } }),
        );
    first.start()?;
    let pid = first.pid()?;
    let joined = |name: &str| json!({ "type": name, "path": format!("/proc/{pid}/ns/{name}") });
    let user = json!({ "type": "user" });
    let offsets = json!({ "monotonic": { "secs": 1000 } });
    for (namespaces, offsets) in [
        (vec![joined("pid")], None),
        (vec![joined("time")], None),
        (vec![joined("pid"), joined("time")], None),
        (vec![json!({ "type": "time" })], Some(&offsets)),
        (
            vec![joined("pid"), json!({ "type": "time" })],
            Some(&offsets),
        ),
        (vec![json!({ "type": "time" }), user], Some(&offsets)),
    ] {
        let mut bundle = Bundle::new(&["exit", "0"])?;
        for namespace in &namespaces {
            bundle
                .without_namespace(namespace["type"].as_str().unwrap_or_default())
                .add("/linux/namespaces", namespace.clone());
        }
        if let Some(offsets) = offsets {
            bundle.set("/linux/timeOffsets", offsets.clone());
        }
        if namespaces.iter().any(|one| one["type"] == "user") {
            let maps = json!([{ "containerID": 0, "hostID": 100_000, "size": 65_536 }]);
            bundle
                .set("/linux/uidMappings", maps.clone())
                .set("/linux/gidMappings", maps);
        }
        let log = bundle.join("hooks.log");
        let line = format!(
            "readlink /proc/self/ns/pid /proc/self/ns/time >> {}",
            log.display()
        );
        for kind in ["prestart", "createRuntime", "poststart", "poststop"] {
            bundle.set(&format!("/hooks/{kind}"), shell(&line));
        }
        bundle.run()?;
        let mut expected = String::new();
        for _ in 0..4 {
            for name in ["pid", "time"] {
                let own = fs::read_link(format!("/proc/self/ns/{name}"))?;
                expected += &format!("{}\n", own.display());
            }
        }
        ensure_eq!(
            fs::read_to_string(&log)?,
            expected,
            "the PID namespace and time namespace of each hook of a container with {namespaces:?}"
        );
    }
    first.end()?;
    Ok(())
}

/// If a hook that enters the mount namespace had the container's root, it would execute the image's
/// programs with root's rights. The hook must also find the container's mounts below root.path.
fn a_hook_in_the_containers_mount_namespace_has_the_hosts_root() -> Result {
    let map = json!([{ "containerID": 0, "hostID": 100_000, "size": 65_536 }]);
    for (options, has_user_namespace) in [
        (&["run"][..], false),
        (&["run", "--no-pivot"], false),
        (&["run"], true),
    ] {
        let mut bundle = Bundle::new(&["exit", "0"])?;
        if has_user_namespace {
            bundle
                .add("/linux/namespaces", json!({ "type": "user" }))
                .set("/linux/uidMappings", map.clone())
                .set("/linux/gidMappings", map.clone());
        }
        let look = format!(
            "stat -c %i /; stat -f -c %T {}/proc",
            bundle.rootfs().display()
        );
        let log = bundle.join("seen");
        let line = format!(
            "pid=$(sed 's/.*\"pid\": *\\([0-9]*\\).*/\\1/'); nsenter --mount --target $pid /bin/sh -c '{look}' > {}",
            log.display()
        );
        bundle.set("/hooks/createRuntime", shell(&line));
        bundle.call(options)?.ok()?;
        let root = command("stat", ["-c", "%i", "/"]).ok()?.stdout;
        ensure_eq!(
            fs::read_to_string(&log)?,
            format!("{root}proc\n"),
            "the inode of `/` and the file system at root.path/proc for a hook of a container with {options:?} (user namespace: {has_user_namespace})"
        );
    }
    Ok(())
}

fn poststop_hooks_run_although_the_joined_pid_namespace_has_ended() -> Result {
    let first = Bundle::new(&["sleep", "600"])?;
    first.start()?;
    let mut bundle = Bundle::new(&["sleep", "600"])?;
    let log = bundle.join("hooks.log");
    let path = format!("/proc/{}/ns/pid", first.pid()?);
    bundle
        .without_namespace("pid")
        .add("/linux/namespaces", json!({ "type": "pid", "path": path }))
        .set(
            "/hooks/poststop",
            shell(&format!("echo poststop >> {}", log.display())),
        );
    let run = bundle.run_in_background()?;
    // The kernel kills all processes of the PID namespace when its first process exits.
    first.end()?;
    ensure_eq!(
        run.end()?.code,
        137,
        "the exit code of `run` after the PID namespace has ended"
    );
    ensure_eq!(
        fs::read_to_string(&log).unwrap_or_default(),
        "poststop\n",
        "the output of the poststop hook"
    );
    Ok(())
}

fn a_start_container_hook_runs_in_the_container() -> Result {
    let mut bundle = Bundle::new(&["cat", "/data/hooked"])?;
    bundle.set("/root/readonly", json!(false)).set(
        "/hooks/startContainer",
        json!([{ "path": "/bin/inside", "args": ["inside", "write", "/data/hooked", "before"] }]),
    );
    ensure_eq!(
        bundle.run()?.stdout,
        "before",
        "the content of the file that the hook wrote"
    );
    Ok(())
}

/// The seccomp filter of the container's process also applies to a startContainer hook. The hook
/// has the environment of the process, unless the hook specifies its own environment.
fn a_start_container_hook_is_confined_like_the_process() -> Result {
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
    ensure!(
        output.code != 0,
        "the hook succeeds despite the seccomp filter:\n{}",
        output.told()
    );
    ensure!(
        output.stderr.contains("No space left on device"),
        "the error of `run` does not contain the text of ENOSPC, which is the errno that the seccomp filter returns to the hook:\n{}",
        output.told()
    );
    bundle.without("/linux/seccomp");
    for (env, expected) in [(None, true), (Some(json!(["A=b"])), false)] {
        // The hook fails, because the file /not-there does not exist. The runtime's error about a
        // failed hook contains the hook's output, which includes the hook's environment.
        let args = json!(["inside", "cat", "/proc/self/environ", "/not-there"]);
        let mut hook = json!({ "path": "/bin/inside", "args": args });
        if let Some(env) = env {
            hook["env"] = env;
        }
        bundle
            .set("/process/env", json!(["ONE=two"]))
            .set("/hooks/startContainer", json!([hook]));
        let output = bundle.call(&["run"])?.end()?;
        ensure!(
            output.code != 0,
            "the container starts although its hook fails:\n{}",
            output.told()
        );
        ensure_eq!(
            output.stderr.contains("ONE=two"),
            expected,
            "whether the environment of the hook contains a variable of the container's process ({})",
            output.told()
        );
    }
    Ok(())
}

/// The runtime's error contains the end of the output that the hook wrote to stdout and stderr.
fn the_error_about_a_failing_hook_contains_the_hooks_output() -> Result {
    for kind in ["createRuntime", "createContainer"] {
        let mut bundle = Bundle::new(&["exit", "0"])?;
        let line =
            "head -c 300000 /dev/zero | tr '\\0' x; echo no such device; echo alas >&2; exit 3";
        bundle.set(&format!("/hooks/{kind}"), shell(line));
        let output = bundle.call(&["create"])?.exits(1)?;
        for words in ["no such device", "alas"] {
            ensure!(
                output.stderr.contains(words),
                "the error of `create` does not contain {words:?} from the output of the hook {kind}:\n{}",
                output.told()
            );
        }
    }
    Ok(())
}

/// A container's state can be larger than a pipe's buffer. One hook of this test reads the whole
/// state, but only after a second. Another hook never reads the state, and is killed after its
/// timeout. A third hook exits without reading the state.
fn a_hook_does_not_need_to_read_a_large_state() -> Result {
    let large = "x".repeat(300_000);
    let mut bundle = Bundle::new(&["exit", "0"])?;
    bundle.set("/annotations", json!({ "large": large }));
    let copy = bundle.join("copy");
    bundle.set(
        "/hooks/createRuntime",
        json!([
            // The current time plus this timeout exceeds the largest time that the clock can
            // represent.
            { "path": "/bin/true", "timeout": i64::MAX },
            { "path": "/bin/sh", "args": ["sh", "-c", format!("sleep 1; cat >{}", copy.display())] },
        ]),
    );
    bundle.call(&["create"])?.ok()?;
    let state: Value = serde_json::from_str(&fs::read_to_string(&copy)?)?;
    ensure_eq!(
        state["annotations"]["large"],
        large,
        "the annotation that the hook read"
    );
    bundle.runtime(&["delete", "--force", bundle.id()]).ok()?;
    bundle.set(
        "/hooks/createRuntime",
        json!([{ "path": "/bin/sleep", "args": ["sleep", "100000"], "timeout": 1 }]),
    );
    let output = bundle.call(&["create"])?.exits(1)?;
    ensure!(
        output.stderr.contains("did not exit within 1 s"),
        "the error of `create` does not report the hook's timeout:\n{}",
        output.told()
    );
    Ok(())
}

fn a_failing_hook_makes_create_remove_the_container() -> Result {
    for kind in ["prestart", "createRuntime", "createContainer"] {
        let mut bundle = Bundle::new(&["exit", "0"])?;
        bundle.set(&format!("/hooks/{kind}"), shell("exit 3"));
        let output = bundle.call(&["create"])?.exits(1)?;
        ensure!(
            output.stderr.contains("hook"),
            "the error of `create` does not mention the failing hook {kind}:\n{}",
            output.told()
        );
        ensure!(
            !bundle.cgroup().exists(),
            "the container's cgroup still exists after the hook {kind} failed"
        );
        ensure!(
            !bundle.root().join(bundle.id()).exists(),
            "the container's state directory still exists after the hook {kind} failed"
        );
    }
    Ok(())
}
