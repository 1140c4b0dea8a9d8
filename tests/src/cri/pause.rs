//! Tests of the pause process, which the monitor starts in pods with a shared PID namespace or a user
//! namespace. The containers of the pod can see the pause process.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::support::caller::cgroup_of;
use crate::support::machine::{Result, Running, command, wait_for};
use crate::support::needs::{Need, SYSTEMD, Test};
use crate::support::node::{A_NODE, BUSYBOX, Node, on_a_node};
use crate::support::user_namespace;
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        a_container_that_controls_the_pause_process_can_not_make_system_calls_in_its_name,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        the_pause_process_is_in_the_pods_cgroup_until_the_pod_is_stopped,
        A_NODE,
        Need::RrunCri,
        Need::Absent(SYSTEMD)
    ),
    test!(
        the_removal_of_a_pod_does_not_kill_the_pause_process_of_another_pod_in_the_same_cgroup,
        A_NODE,
        Need::RrunCri,
        Need::Absent(SYSTEMD)
    ),
    test!(
        the_kernel_prefers_every_container_to_the_pause_process_when_memory_runs_out,
        A_NODE,
        Need::RrunCri,
        MAY_LOWER
    ),
    test!(
        a_pod_whose_monitor_was_killed_leaves_no_cgroup_of_its_pause_process,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        a_container_in_a_user_namespace_can_not_control_processes_of_the_runtime,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        a_container_does_not_join_the_namespace_of_a_process_that_got_the_id_of_another_process,
        A_NODE,
        Need::RrunCri,
        NEXT_ID
    ),
    test!(
        a_pod_whose_pause_process_exited_is_not_ready_and_gets_no_container,
        A_NODE,
        Need::RrunCri
    ),
];

/// The file through which root chooses the id of the next process.
const NEXT_ID: Need = Need::Works(
    "ns_last_pid",
    "cat /proc/sys/kernel/ns_last_pid > /proc/sys/kernel/ns_last_pid",
);

/// The capability to lower an oom_score_adj, which the native view lacks.
const MAY_LOWER: Need = Need::Works("CAP_SYS_RESOURCE", "echo -1 > /proc/$$/oom_score_adj");

/// The name of the cgroup that a pod requests.
const CGROUP: &str = "rrun-e2e-pause";

/// Returns the configuration of a pod whose containers share one PID namespace.
fn shared(node: &Node, name: &str) -> Value {
    let mut pod = node.pod(name);
    pod["linux"]["security_context"]["namespace_options"]["pid"] = json!(0);
    pod
}

/// Returns the configuration of a container that can trace other processes of its pod.
fn tracer(node: &Node, command: &[&str]) -> Value {
    let mut container = node.container("tracer", command);
    let context = &mut container["linux"]["security_context"];
    context["namespace_options"]["pid"] = json!(0);
    context["capabilities"] = json!({ "add_capabilities": ["SYS_PTRACE"] });
    context["seccomp"] = json!({ "profile_type": 0 });
    // rrun's AppArmor profile does not allow a container to trace the pause process.
    context["apparmor"] = json!({ "profile_type": 1 });
    container
}

fn a_container_that_controls_the_pause_process_can_not_make_system_calls_in_its_name() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = shared(node, "traced");
        let pod_id = node.runp(&pod)?;
        let container = tracer(node, &["/inside", "sleep", "600"]);
        let id = node.run(&pod_id, &pod, &container)?;
        let pause = node.pause_process(&pod_id)?;
        let call = |words: &[i64]| {
            let words: Vec<String> = words.iter().map(i64::to_string).collect();
            let mut command = vec!["exec", "-s", &id, "/inside", "call-in", "1"];
            command.extend(words.iter().map(String::as_str));
            node.asks(&command)
        };
        for words in [
            &[libc::SYS_socket, i64::from(libc::AF_VSOCK), 1][..],
            &[libc::SYS_socket, i64::from(libc::AF_INET), 1],
            &[libc::SYS_clone, i64::from(libc::SIGCHLD)],
            &[libc::SYS_clone3],
            &[libc::SYS_unshare, i64::from(libc::CLONE_NEWUSER)],
            &[libc::SYS_execve],
            &[libc::SYS_openat, -100],
            &[libc::SYS_ptrace],
            &[libc::SYS_keyctl],
            &[libc::SYS_kill, -1, 0],
            &[libc::SYS_mmap, 0, 4096],
            &[libc::SYS_prctl, 22],
            &[libc::SYS_exit_group],
            // No system call has the number 9999.
            &[9999],
        ] {
            ensure_eq!(
                call(words)?,
                "EPERM",
                "result of the system call with this number and these arguments in the pause process: {words:?}"
            );
        }
        // The tracer does control the process.
        ensure_eq!(
            call(&[libc::SYS_close_range, 0, i64::from(u32::MAX)])?,
            "0",
            "result of close_range(2), which the pause process needs"
        );
        // The pause process still waits.
        ensure_eq!(
            node.pause_process(&pod_id)?,
            pause,
            "id of the pause process"
        );
        let status = fs::read_to_string(format!("/proc/{pause}/status"))?;
        for line in ["Seccomp:\t2", "NoNewPrivs:\t1", "CapEff:\t0000000000000000"] {
            ensure!(
                status.contains(line),
                "the status of the pause process does not contain {line:?}: {status}"
            );
        }
        let environment = fs::read(format!("/proc/{pause}/environ"))?;
        ensure_eq!(
            environment.len(),
            0,
            "size of the pause process's environment"
        );
        node.asks(&["exec", "-s", &id, "true"]).map(|_| ())
    })
}

fn the_pause_process_is_in_the_pods_cgroup_until_the_pod_is_stopped() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let mut with_parent = shared(node, "parent");
        with_parent["linux"]["cgroup_parent"] = json!(format!("/{CGROUP}"));
        let users = user_namespace::pod(node, "users", 0);
        for (pod, parent) in [
            (with_parent, Some(CGROUP)),
            (shared(node, "own"), None),
            (users, None),
        ] {
            let pod_id = node.runp(&pod)?;
            let cgroup = cgroup_of(&node.pause_process(&pod_id)?.to_string())?;
            let parent = parent.map_or_else(|| format!("rrun/{pod_id}"), str::to_owned);
            ensure_eq!(
                cgroup,
                Path::new("/sys/fs/cgroup")
                    .join(parent)
                    .join(format!("rrun-pause-{pod_id}")),
                "cgroup of the pause process"
            );
            node.asks(&["stopp", &pod_id])?;
            ensure!(
                !cgroup.exists(),
                "the cgroup {} still exists after the pod was stopped",
                cgroup.display()
            );
            node.asks(&["rmp", &pod_id])?;
        }
        Ok(())
    })
}

fn the_removal_of_a_pod_does_not_kill_the_pause_process_of_another_pod_in_the_same_cgroup() -> Result
{
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        // Kubelet creates and removes the pod's cgroup itself.
        let cgroup = Path::new("/sys/fs/cgroup").join(CGROUP);
        fs::create_dir(&cgroup)?;
        let in_cgroup = |name| {
            let mut pod = shared(node, name);
            pod["linux"]["cgroup_parent"] = json!(format!("/{CGROUP}"));
            pod
        };
        let stopped = node.runp(&in_cgroup("stopped"))?;
        node.asks(&["stopp", &stopped])?;
        // Kubelet creates a pod again before it removes the stopped pod.
        let pod = in_cgroup("again");
        let again = node.runp(&pod)?;
        node.asks(&["rmp", &stopped])?;
        let other = node.runp(&in_cgroup("other"))?;
        node.asks(&["rmp", "--force", &other])?;
        // CreateContainer fails if the pod's pause process has exited.
        let mut container = node.container("again", &["sleep", "600"]);
        container["linux"]["security_context"]["namespace_options"]["pid"] = json!(0);
        node.run(&again, &pod, &container)?;
        node.asks(&["rmp", "--force", &again])?;
        Ok(fs::remove_dir(&cgroup)?)
    })
}

fn the_kernel_prefers_every_container_to_the_pause_process_when_memory_runs_out() -> Result {
    on_a_node(|node| {
        let config = node.join("config.toml");
        let text = fs::read_to_string(&config)?;
        let free = text.replace("restrict_oom_score_adj = true", "");
        fs::write(&config, free)?;
        node.terminate_server()?;
        node.start_server()?;
        node.pull(BUSYBOX)?;
        for pod in [
            shared(node, "shared"),
            user_namespace::pod(node, "users", 0),
        ] {
            let pod_id = node.runp(&pod)?;
            let pause = node.pause_process(&pod_id)?;
            let adj = fs::read_to_string(format!("/proc/{pause}/oom_score_adj"))?;
            ensure_eq!(adj.trim(), "-998", "oom_score_adj of the pause process");
            node.asks(&["rmp", "--force", &pod_id])?;
        }
        Ok(())
    })
}

fn a_pod_whose_monitor_was_killed_leaves_no_cgroup_of_its_pause_process() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = shared(node, "killed");
        let pod_id = node.runp(&pod)?;
        let cgroup = cgroup_of(&node.pause_process(&pod_id)?.to_string())?;
        let monitor = node.monitor(&pod_id)?;
        kill(monitor, Signal::SIGKILL)?;
        not_ready(node, &pod_id)?;
        node.asks(&["stopp", &pod_id])?;
        ensure!(
            !cgroup.exists(),
            "the cgroup {} still exists after the pod was stopped",
            cgroup.display()
        );
        node.asks(&["rmp", &pod_id]).map(|_| ())
    })
}

/// Without a user namespace, a container with CAP_SYS_PTRACE can control these processes. Only
/// AppArmor or SELinux then prevents this.
fn a_container_in_a_user_namespace_can_not_control_processes_of_the_runtime() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = user_namespace::pod(node, "seized", 0);
        let pod_id = node.runp(&pod)?;
        let mut container = tracer(node, &["/inside", "attack", "seize", "6"]);
        let options = user_namespace::container(node, "", 0, &[]);
        let options = options.pointer("/linux/security_context/namespace_options");
        container["linux"]["security_context"]["namespace_options"] = json!(options);
        let id = node.run(&pod_id, &pod, &container)?;
        let log = || node.asks(&["logs", &id]);
        wait_for("the attacker to start", || {
            Ok(log()?.contains("ready").then_some(()))
        })?;
        // The test repeats `exec` until the container exits. The last `exec` then fails.
        while node.asks(&["exec", "-s", &id, "true"]).is_ok() {}
        node.exited(&id)?;
        let log = log()?;
        ensure!(
            log.contains("done") && !log.contains("done, 0 "),
            "the attacker saw no process of rrun: {log}"
        );
        ensure!(
            !log.contains("took control"),
            "the container took control of a process of rrun: {log}"
        );
        Ok(())
    })
}

/// Waits until the server reports that the pod is not ready.
fn not_ready(node: &Node, pod_id: &str) -> Result {
    wait_for("the pod to be not ready", || {
        let state = node.json(&["inspectp", pod_id])?["status"]["state"].clone();
        Ok((state == "SANDBOX_NOTREADY").then_some(()))
    })
}

/// Starts a process with the id `pid`, which no process has.
fn process_with_id(pid: i32) -> Result<Running> {
    wait_for("a process to get the id of another process", || {
        fs::write("/proc/sys/kernel/ns_last_pid", (pid - 1).to_string())?;
        let process = command("sleep", ["600"]).start()?;
        Ok((process.pid() == pid).then_some(process))
    })
}

/// Adds the runtime handler `held`. It runs rrun, but while the file `hold` exists, each `create`
/// first creates the file `held` and waits.
fn add_held_runtime(node: &mut Node) -> Result {
    let program = node.join("held-runtime");
    let (hold, held) = (node.join("hold"), node.join("held"));
    fs::write(
        &program,
        format!(
            "#!/bin/sh\n\
             case \" $* \" in *' create '*)\n\
             while [ -e {hold} ]; do touch {held}; sleep 0.1; done ;;\n\
             esac\n\
             exec rrun \"$@\"\n",
            hold = hold.display(),
            held = held.display()
        ),
    )?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    fs::write(
        node.join("config.d/50-held.toml"),
        format!("[runtime.held]\npath = {program:?}\n"),
    )?;
    node.terminate_server()?;
    node.start_server()
}

fn a_container_does_not_join_the_namespace_of_a_process_that_got_the_id_of_another_process()
-> Result {
    on_a_node(|node| {
        add_held_runtime(node)?;
        node.pull(BUSYBOX)?;
        for name in ["target", "pause"] {
            let mut pod = node.pod(name);
            if name == "pause" {
                pod = shared(node, name);
            }
            let pod_id = node.runp_by("held", &pod)?;
            let mut new = node.container("new", &["sleep", "600"]);
            let options = &mut new["linux"]["security_context"]["namespace_options"];
            let owner = if name == "pause" {
                *options = json!({ "pid": 0 });
                i32::try_from(node.pause_process(&pod_id)?)?
            } else {
                let target = node.container("target", &["sleep", "600"]);
                let target = node.run(&pod_id, &pod, &target)?;
                *options = json!({ "pid": 3, "target_id": target });
                node.pid(&target)?
            };
            fs::write(node.join("hold"), "")?;
            let creation = node.start_create(&pod_id, &pod, &new)?;
            wait_for("the runtime's create to begin", || {
                Ok(node.join("held").exists().then_some(()))
            })?;
            kill(Pid::from_raw(owner), Signal::SIGKILL)?;
            wait_for("the process to be reaped", || {
                let exists = Path::new(&format!("/proc/{owner}")).exists();
                Ok((!exists).then_some(()))
            })?;
            let _other = process_with_id(owner)?;
            fs::remove_file(node.join("hold"))?;
            creation.end()?.fails_with("has exited")?;
            fs::remove_file(node.join("held"))?;
            let left = node.asks(&["ps", "--all", "--quiet", "--name", "new"])?;
            ensure_eq!(left, "", "containers after the refused CreateContainer");
            node.asks(&["rmp", "--force", &pod_id])?;
        }
        Ok(())
    })
}

/// With a user namespace and separate PID namespaces, the pod's containers survive the exit of the
/// pause process, as with containerd.
fn a_pod_whose_pause_process_exited_is_not_ready_and_gets_no_container() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        for (name, mode) in [("shared", 0), ("users", 1)] {
            let (pod, container) = if name == "users" {
                let container = user_namespace::container(node, "main", mode, &["sleep", "600"]);
                (user_namespace::pod(node, name, mode), container)
            } else {
                let mut container = node.container("main", &["sleep", "600"]);
                container["linux"]["security_context"]["namespace_options"]["pid"] = json!(mode);
                (shared(node, name), container)
            };
            let pod_id = node.runp(&pod)?;
            let main = node.run(&pod_id, &pod, &container)?;
            let info = node.json(&["inspectp", &pod_id])?["info"].clone();
            let pause = info[if name == "users" {
                "namespaces"
            } else {
                "pid1"
            }]
            .as_i64();
            let pause = pause.ok_or(format!("the pod has no pause process: {info}"))?;
            kill(Pid::from_raw(pause.try_into()?), Signal::SIGKILL)?;
            not_ready(node, &pod_id)?;

            let mut late = container.clone();
            late["metadata"]["name"] = json!("late");
            node.try_create(&pod_id, &pod, &late)?
                .fails_with("is not ready")?;
            node.kill_server()?;
            node.start_server()?;
            not_ready(node, &pod_id)?;
            node.try_create(&pod_id, &pod, &late)?
                .fails_with("is not ready")?;
            let info = node.json(&["inspectp", &pod_id])?["info"].clone();
            ensure!(
                info["pid1"].is_null() && !info["runtimeSpec"].to_string().contains("\"user\""),
                "the pod's status contains the id of the exited process: {info}"
            );
            if name == "users" {
                let state = node.status(&main)?["state"].clone();
                ensure_eq!(state, "CONTAINER_RUNNING", "state of the pod's container");
                // The restarted server still watches the pod's monitor.
                kill(Pid::from_raw(node.pid(&main)?), Signal::SIGKILL)?;
            }
            ensure_eq!(
                node.exited(&main)?["exitCode"],
                137,
                "exit code of the container"
            );
            node.asks(&["stopp", &pod_id])?;
            node.asks(&["rmp", &pod_id])?;
        }
        Ok(())
    })
}
