//! Seccomp profiles of containers, by crictl: what they let through, by effect.

use std::fs;

use nix::libc;
use serde_json::{Value, json};

use crate::support::machine::Result;
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, BUSYBOX, Node, is_rrun, on_a_node};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        runtime_default_forbids_what_reaches_the_kernel_too_deep,
        A_NODE
    ),
    test!(capabilities_open_the_default_profile, A_NODE),
    test!(unconfined_privileged_and_unset_are_not_filtered, A_NODE),
    test!(
        a_localhost_profile_is_applied_and_a_missing_one_told,
        A_NODE
    ),
    test!(
        the_configuration_says_what_unset_means,
        A_NODE,
        Need::RrunCri
    ),
];

/// Numbers of security.proto.
const RUNTIME_DEFAULT: i32 = 0;
const UNCONFINED: i32 = 1;
const LOCALHOST: i32 = 2;

fn confined(node: &Node, name: &str, command: &[&str], profile: Value) -> Value {
    let mut container = node.container(name, command);
    container["linux"]["security_context"]["seccomp"] = profile;
    container
}

/// The status lines of a container that reports on itself.
fn report(node: &Node, pod: &(String, Value), container: &Value) -> Result<Value> {
    let id = node.run(&pod.0, &pod.1, container)?;
    node.exited(&id)?;
    Ok(serde_json::from_str(&node.asks(&["logs", &id])?)?)
}

fn a_pod(node: &Node) -> Result<(String, Value)> {
    node.pull(BUSYBOX)?;
    let pod = node.pod("seccomp");
    Ok((node.runp(&pod)?, pod))
}

/// What these calls give in a running container, each as `call NUMBER ARGUMENT…`.
fn calls(node: &Node, id: &str, calls: &[(&[i64], &str)]) -> Result {
    for (words, should) in calls {
        let words: Vec<String> = words.iter().map(i64::to_string).collect();
        let mut args = vec!["exec", "-s", id, "/inside", "call"];
        args.extend(words.iter().map(String::as_str));
        ensure_eq!(node.asks(&args)?, *should, "call {}", words.join(" "));
    }
    Ok(())
}

const NEWUSER: i64 = libc::CLONE_NEWUSER as i64;

fn runtime_default_forbids_what_reaches_the_kernel_too_deep() -> Result {
    on_a_node(|node| {
        let pod = a_pod(node)?;
        let container = confined(
            node,
            "default",
            &["/inside", "sleep", "600"],
            json!({ "profile_type": RUNTIME_DEFAULT }),
        );
        let id = node.run(&pod.0, &pod.1, &container)?;
        calls(
            node,
            &id,
            &[
                (&[libc::SYS_unshare, NEWUSER], "EPERM"),
                (&[libc::SYS_clone, NEWUSER], "EPERM"),
                // Its flags can not be seen: C libraries are to take clone.
                (&[libc::SYS_clone3], "ENOSYS"),
                (&[libc::SYS_mount], "EPERM"),
                (&[libc::SYS_keyctl], "EPERM"),
                (&[libc::SYS_bpf, 0], "EPERM"),
                (&[libc::SYS_perf_event_open], "EPERM"),
                (&[libc::SYS_io_uring_setup], "EPERM"),
                (&[libc::SYS_userfaultfd], "EPERM"),
                (&[libc::SYS_socket, libc::AF_VSOCK as i64], "EPERM"),
                (&[libc::SYS_personality, 0x4_0000], "EPERM"),
                // Newer than any profile.
                (&[9999], "ENOSYS"),
                (&[libc::SYS_getppid], "0"),
                (&[libc::SYS_personality, 0xffff_ffff], "0"),
                (&[libc::SYS_close, 999], "EBADF"),
                (&[libc::SYS_ptrace, 0xffff], "ESRCH"),
            ],
        )?;
        let status = node.asks(&["exec", "-s", &id, "/inside", "cat", "/proc/1/status"])?;
        ensure!(status.contains("Seccomp:\t2"), "{status}");
        if is_rrun() {
            calls(
                node,
                &id,
                &[(&[libc::SYS_socket, libc::AF_ALG as i64], "EPERM")],
            )?;
        }
        Ok(())
    })
}

fn capabilities_open_the_default_profile() -> Result {
    on_a_node(|node| {
        let pod = a_pod(node)?;
        let mut container = confined(
            node,
            "admin",
            &["/inside", "sleep", "600"],
            json!({ "profile_type": RUNTIME_DEFAULT }),
        );
        container["linux"]["security_context"]["capabilities"] = json!({
            "add_capabilities": ["SYS_ADMIN", "SYS_TIME"], "drop_capabilities": ["SYS_CHROOT"],
        });
        let id = node.run(&pod.0, &pod.1, &container)?;
        calls(
            node,
            &id,
            &[
                (&[libc::SYS_mount], "EFAULT"),
                (&[libc::SYS_clone3], "EINVAL"),
                (&[libc::SYS_unshare, 0], "0"),
                (&[libc::SYS_bpf, 9999], "EINVAL"),
                (&[libc::SYS_clock_settime, 9999], "EINVAL"),
                (&[libc::SYS_chroot], "EPERM"),
                (&[libc::SYS_io_uring_setup], "EPERM"),
                (&[libc::SYS_kexec_load], "EPERM"),
            ],
        )
    })
}

fn unconfined_privileged_and_unset_are_not_filtered() -> Result {
    on_a_node(|node| {
        let mut pod = node.pod("seccomp");
        pod["linux"]["security_context"]["privileged"] = json!(true);
        node.pull(BUSYBOX)?;
        let pod = (node.runp(&pod)?, pod);
        let command = ["/inside", "report"];
        let mut privileged = confined(
            node,
            "privileged",
            &command,
            json!({ "profile_type": RUNTIME_DEFAULT }),
        );
        privileged["linux"]["security_context"]["privileged"] = json!(true);
        for container in [
            confined(
                node,
                "unconfined",
                &command,
                json!({ "profile_type": UNCONFINED }),
            ),
            privileged,
            node.container("unset", &command),
        ] {
            let report = report(node, &pod, &container)?;
            ensure_eq!(
                report["status"]["Seccomp"],
                "0",
                "mode of {}",
                container["metadata"]["name"]
            );
        }
        Ok(())
    })
}

fn a_localhost_profile_is_applied_and_a_missing_one_told() -> Result {
    on_a_node(|node| {
        let pod = a_pod(node)?;
        let file = node.join("profile.json");
        let path = file.display().to_string();
        let rule =
            json!([{ "names": ["getppid"], "action": "SCMP_ACT_ERRNO", "errnoRet": libc::EDOM }]);
        let profile = json!({ "defaultAction": "SCMP_ACT_ALLOW", "syscalls": rule });
        fs::write(&file, profile.to_string())?;
        let localhost = json!({ "profile_type": LOCALHOST, "localhost_ref": path });
        let container = confined(
            node,
            "localhost",
            &["/inside", "sleep", "600"],
            localhost.clone(),
        );
        let id = node.run(&pod.0, &pod.1, &container)?;
        calls(node, &id, &[(&[libc::SYS_getppid], "EDOM")])?;

        for (text, word) in [
            (Some("{ nothing"), "JSON"),
            (
                Some(r#"{"defaultAction":"SCMP_ACT_WRONG"}"#),
                "SCMP_ACT_WRONG",
            ),
            (None, "profile.json"),
        ] {
            match text {
                Some(text) => fs::write(&file, text)?,
                None => fs::remove_file(&file)?,
            }
            let container = confined(node, "broken", &["/inside", "exit", "0"], localhost.clone());
            let output = node.try_create(&pod.0, &pod.1, &container)?;
            ensure!(output.code != 0, "{}", output.told());
            if is_rrun() {
                ensure!(output.stderr.contains(word), "{}", output.told());
            }
        }
        Ok(())
    })
}

fn the_configuration_says_what_unset_means() -> Result {
    on_a_node(|node| {
        let config = node.join("config.toml");
        let text = fs::read_to_string(&config)?;
        fs::write(
            &config,
            format!("unset_seccomp_profile = \"runtime/default\"\n{text}"),
        )?;
        node.terminate_server()?;
        node.start_server()?;
        let info = node.json(&["info"])?;
        ensure_eq!(
            (
                &info["config"]["unsetSeccompProfile"],
                &info["config"]["seccomp"]
            ),
            (&json!("runtime/default"), &json!(true)),
            "what info tells of seccomp"
        );
        let pod = a_pod(node)?;
        let container = node.container("unset", &["/inside", "report"]);
        let report = report(node, &pod, &container)?;
        ensure_eq!(report["status"]["Seccomp"], "2", "mode");
        Ok(())
    })
}
