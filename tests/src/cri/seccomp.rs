//! Tests of the seccomp profiles of containers that crictl creates. The tests make system calls in
//! the containers and check the results.

use std::fs;

use nix::libc;
use serde_json::{Value, json};

use crate::support::machine::{Result, program_path};
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, BUSYBOX, Node, is_rrun, on_a_node};
use crate::support::seccomp::CALLS_32;
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        the_runtime_default_seccomp_profile_denies_dangerous_system_calls,
        A_NODE
    ),
    test!(
        capabilities_allow_more_system_calls_in_the_default_seccomp_profile,
        A_NODE
    ),
    test!(
        bits_that_the_kernel_ignores_do_not_bypass_the_default_seccomp_profile,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        the_default_seccomp_profile_restricts_32_bit_programs,
        A_NODE,
        Need::RrunCri,
        CALLS_32
    ),
    test!(
        the_configuration_decides_whether_32_bit_programs_can_use_socketcall,
        A_NODE,
        Need::RrunCri,
        CALLS_32
    ),
    test!(
        containers_get_no_seccomp_filter_if_they_are_privileged_or_unconfined_or_have_no_profile,
        A_NODE
    ),
    test!(
        a_localhost_seccomp_profile_is_applied_and_a_missing_profile_is_refused,
        A_NODE
    ),
    test!(
        the_configuration_sets_the_seccomp_profile_of_containers_that_request_no_profile,
        A_NODE,
        Need::RrunCri
    ),
];

/// Profile types of the CRI's `SecurityProfile`.
const RUNTIME_DEFAULT: i32 = 0;
const UNCONFINED: i32 = 1;
const LOCALHOST: i32 = 2;

fn confined(node: &Node, name: &str, command: &[&str], profile: Value) -> Value {
    let mut container = node.container(name, command);
    container["linux"]["security_context"]["seccomp"] = profile;
    container
}

/// Runs a container whose program reports its own state, and returns the report.
fn report(node: &Node, pod: &(String, Value), container: &Value) -> Result<Value> {
    let id = node.run(&pod.0, &pod.1, container)?;
    node.exited(&id)?;
    Ok(serde_json::from_str(&node.asks(&["logs", &id])?)?)
}

fn a_pod(node: &Node) -> Result<(String, Value)> {
    a_pod_by(node, "")
}

/// Runs a pod with the runtime handler `handler`.
fn a_pod_by(node: &Node, handler: &str) -> Result<(String, Value)> {
    node.pull(BUSYBOX)?;
    let pod = node.pod("seccomp");
    Ok((node.runp_by(handler, &pod)?, pod))
}

/// Makes the system calls `calls` in a running container and checks their results. The command
/// `inside call NUMBER ARGUMENT…` makes each system call.
fn calls(node: &Node, id: &str, calls: &[(&[i64], &str)]) -> Result {
    for (words, should) in calls {
        let words: Vec<String> = words.iter().map(i64::to_string).collect();
        let mut args = vec!["exec", "-s", id, "/inside", "call"];
        args.extend(words.iter().map(String::as_str));
        ensure_eq!(
            node.asks(&args)?,
            *should,
            "result of the system call with this number and these arguments: {}",
            words.join(" ")
        );
    }
    Ok(())
}

/// Runs a container with the default profile, which then sleeps, and returns the container's id.
/// The container's pod has the runtime handler `handler`.
fn sleeper(node: &Node, handler: &str) -> Result<String> {
    let pod = a_pod_by(node, handler)?;
    let profile = json!({ "profile_type": RUNTIME_DEFAULT });
    let container = confined(node, "default", &["/inside", "sleep", "600"], profile);
    node.run(&pod.0, &pod.1, &container)
}

/// Runs `inside` with the words `command` in a running container, and checks its output.
fn prints(node: &Node, id: &str, command: &[&str], expected: &[&str]) -> Result {
    let output = node.asks(&[&["exec", "-s", id, "/inside"], command].concat())?;
    ensure!(
        expected.contains(&output.as_str()),
        "`inside {}` prints {output}, but the test expects one of {expected:?}",
        command.join(" ")
    );
    Ok(())
}

const NEWUSER: i64 = libc::CLONE_NEWUSER as i64;

fn the_runtime_default_seccomp_profile_denies_dangerous_system_calls() -> Result {
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
                // A seccomp filter cannot read the flags of clone3, which are in memory. ENOSYS
                // makes C libraries fall back to clone.
                (&[libc::SYS_clone3], "ENOSYS"),
                (&[libc::SYS_mount], "EPERM"),
                (&[libc::SYS_keyctl], "EPERM"),
                (&[libc::SYS_bpf, 0], "EPERM"),
                (&[libc::SYS_perf_event_open], "EPERM"),
                (&[libc::SYS_io_uring_setup], "EPERM"),
                (&[libc::SYS_userfaultfd], "EPERM"),
                (&[libc::SYS_socket, libc::AF_VSOCK as i64], "EPERM"),
                (&[libc::SYS_personality, 0x4_0000], "EPERM"),
                // No system call has the number 9999. The number represents a system call that is
                // newer than the profile.
                (&[9999], "ENOSYS"),
                (&[libc::SYS_getppid], "0"),
                (&[libc::SYS_personality, 0xffff_ffff], "0"),
                (&[libc::SYS_close, 999], "EBADF"),
                (&[libc::SYS_ptrace, 0xffff], "ESRCH"),
            ],
        )?;
        let status = node.asks(&["exec", "-s", &id, "/inside", "cat", "/proc/1/status"])?;
        ensure!(
            status.contains("Seccomp:\t2"),
            "the container's process has no seccomp filter: {status}"
        );
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

/// Runs `test` with a container of each installed runtime. All runtimes must compile the default
/// profile to equivalent filters.
fn by_each_runtime(test: fn(&Node, &str) -> Result) -> Result {
    on_a_node(|node| {
        for handler in ["", "runc", "crun"] {
            if handler.is_empty() || program_path(handler).is_some() {
                let tested = sleeper(node, handler).and_then(|id| test(node, &id));
                tested.map_err(|failed| {
                    let message = failed.message().unwrap_or_default();
                    format!("test of the runtime handler {handler:?}: {message}")
                })?;
                node.asks(&["rmp", "--all", "--force"])?;
            }
        }
        Ok(())
    })
}

/// The kernel reads only the lower half of an argument of type `int`, but a filter compares both
/// halves.
fn bits_that_the_kernel_ignores_do_not_bypass_the_default_seccomp_profile() -> Result {
    by_each_runtime(|node, id| {
        let (alg, vsock) = (i64::from(libc::AF_ALG), i64::from(libc::AF_VSOCK));
        for bits in [1 << 32, -1 << 32] {
            for family in [alg, vsock] {
                for call in [libc::SYS_socket, libc::SYS_socketpair] {
                    calls(node, id, &[(&[call, family | bits, 1], "EPERM")])?;
                }
            }
            calls(
                node,
                id,
                &[
                    (&[libc::SYS_clone, NEWUSER | bits], "EPERM"),
                    (&[libc::SYS_personality, 0x4_0000 | bits], "EPERM"),
                    // The kernel ignores the bits, so these system calls are harmless.
                    (&[libc::SYS_socket, i64::from(libc::AF_UNIX) | bits, 1], "3"),
                    (&[libc::SYS_personality, 0xffff_ffff | bits], "0"),
                ],
            )?;
        }
        #[cfg(target_arch = "x86_64")]
        for family in [alg, vsock] {
            const X32: i64 = 0x4000_0000;
            let number = libc::SYS_socket | X32;
            calls(node, id, &[(&[number, family | 1 << 32, 1], "EPERM")])?;
        }
        Ok(())
    })
}

/// 32-bit x86 system calls with their arguments, each with its result under the default profile.
const CALLS_OF_32_BITS: [(&[&str], &str); 12] = [
    (&["359", "38", "5"], "EPERM"),   // socket(AF_ALG)
    (&["359", "40", "1"], "EPERM"),   // socket(AF_VSOCK)
    (&["359", "1", "1"], "3"),        // socket(AF_UNIX)
    (&["360", "38", "5"], "EPERM"),   // socketpair(AF_ALG)
    (&["120", "268435456"], "EPERM"), // clone(CLONE_NEWUSER)
    (&["310", "268435456"], "EPERM"), // unshare(CLONE_NEWUSER)
    (&["435"], "ENOSYS"),             // clone3
    (&["136", "262144"], "EPERM"),    // personality(ADDR_NO_RANDOMIZE)
    (&["21"], "EPERM"),               // mount
    (&["288"], "EPERM"),              // keyctl
    (&["357"], "EPERM"),              // bpf
    (&["425"], "EPERM"),              // io_uring_setup
];

fn the_default_seccomp_profile_restricts_32_bit_programs() -> Result {
    by_each_runtime(|node, id| {
        for (call, expected) in CALLS_OF_32_BITS {
            prints(node, id, &[&["call32"], call].concat(), &[expected])?;
        }
        // With AppArmor, the profile allows socketcall, and AppArmor denies the families.
        for family in ["38", "40"] {
            for operation in ["1", "8"] {
                let command = ["socketcall", operation, family, "1"];
                prints(node, id, &command, &["ENOSYS", "EACCES"])?;
            }
        }
        Ok(())
    })
}

fn the_configuration_decides_whether_32_bit_programs_can_use_socketcall() -> Result {
    on_a_node(|node| {
        let config = node.join("config.toml");
        let text = fs::read_to_string(&config)?;
        for (value, expected) in [("allow", "3"), ("deny", "ENOSYS")] {
            fs::write(&config, format!("seccomp_socketcall = {value:?}\n{text}"))?;
            node.terminate_server()?;
            node.start_server()?;
            let id = sleeper(node, "")?;
            let unix = ["socketcall", "1", "1", "1"];
            prints(node, &id, &unix, &[expected])?;
            node.asks(&["rmp", "--all", "--force"])?;
        }
        Ok(())
    })
}

fn capabilities_allow_more_system_calls_in_the_default_seccomp_profile() -> Result {
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

fn containers_get_no_seccomp_filter_if_they_are_privileged_or_unconfined_or_have_no_profile()
-> Result {
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
                "seccomp mode of the container {}",
                container["metadata"]["name"]
            );
        }
        Ok(())
    })
}

fn a_localhost_seccomp_profile_is_applied_and_a_missing_profile_is_refused() -> Result {
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
            ensure!(
                output.code != 0,
                "the server created a container with a broken or missing seccomp profile: {}",
                output.told()
            );
            if is_rrun() {
                ensure!(
                    output.stderr.contains(word),
                    "the error about the seccomp profile does not contain {word:?}: {}",
                    output.told()
                );
            }
        }
        Ok(())
    })
}

fn the_configuration_sets_the_seccomp_profile_of_containers_that_request_no_profile() -> Result {
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
            "seccomp settings in the output of crictl info"
        );
        let pod = a_pod(node)?;
        let container = node.container("unset", &["/inside", "report"]);
        let report = report(node, &pod, &container)?;
        ensure_eq!(
            report["status"]["Seccomp"],
            "2",
            "seccomp mode of a container without a profile"
        );
        Ok(())
    })
}
