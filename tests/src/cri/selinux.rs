//! Tests of the SELinux labels of pods. Most tests need an enforced SELinux policy, as in the guest
//! that `tests/vm/run --selinux` starts.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::support::machine::{Result, command, wait_for};
use crate::support::needs::{Need, SELINUX, Test};
use crate::support::node::{A_NODE, BUSYBOX, Node, WEB, on_a_node};
use crate::support::user_namespace;
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        each_pod_has_its_own_selinux_level,
        SELINUX,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        selinux_denies_access_to_the_volumes_of_another_pod,
        SELINUX,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        a_container_gets_the_selinux_label_that_it_requests,
        SELINUX,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        selinux_works_with_user_namespaces_and_image_volumes,
        SELINUX,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        containers_get_no_selinux_label_unless_enable_selinux_is_set,
        SELINUX,
        A_NODE,
        Need::RrunCri
    ),
    test!(the_refusal_of_a_bad_selinux_level_names_the_field, A_NODE),
];

/// Runs the test on a node whose server has `enable_selinux` and SELinux categories for at most
/// three pods.
fn with_selinux(test: impl FnOnce(&mut Node) -> Result) -> Result {
    on_a_node(|node| {
        fs::write(
            node.join("config.d/50-selinux.toml"),
            "enable_selinux = true\nselinux_category_range = 3\n",
        )?;
        node.terminate_server()?;
        node.start_server()?;
        node.pull(BUSYBOX)?;
        test(node)
    })
}

/// Runs a pod and returns its id and its configuration.
fn pod(node: &Node, name: &str) -> Result<(String, Value)> {
    let pod = node.pod(name);
    Ok((node.runp(&pod)?, pod))
}

/// Runs a container that only sleeps, and returns the container's id.
fn idle(node: &Node, (id, pod): &(String, Value), name: &str) -> Result<String> {
    node.run(id, pod, &node.container(name, &["sleep", "3600"]))
}

/// Waits until the container runs its program, and returns the SELinux label of the container's
/// first process.
fn label(node: &Node, container: &str) -> Result<String> {
    let process = format!("/proc/{}", node.pid(container)?);
    wait_for(
        &format!("the program of the container {container} to run"),
        || {
            let line = fs::read_to_string(format!("{process}/cmdline"))?;
            Ok(line.starts_with("sleep\0").then_some(()))
        },
    )?;
    let text = fs::read_to_string(format!("{process}/attr/current"))?;
    Ok(text.trim_end_matches('\0').to_owned())
}

fn label_of_file(path: impl AsRef<Path>) -> Result<String> {
    let output = command("stat", ["--format", "%C"])
        .arg(path.as_ref())
        .ok()?;
    Ok(output.text().to_owned())
}

fn each_pod_has_its_own_selinux_level() -> Result {
    with_selinux(|node| {
        let (first, second) = (pod(node, "first")?, pod(node, "second")?);
        let (a, b) = (idle(node, &first, "a")?, idle(node, &first, "b")?);
        let c = idle(node, &second, "c")?;
        let process = label(node, &a)?;
        let level = process
            .strip_prefix("system_u:system_r:container_t:")
            .ok_or(format!("the SELinux label {process} of a container's process does not have the type container_t"))?
            .to_owned();
        ensure!(
            level.starts_with("s0:c"),
            "the SELinux level {level} of the first pod has no categories"
        );
        ensure_eq!(
            label(node, &b)?,
            process,
            "SELinux label of another container in the same pod"
        );
        let other = label(node, &c)?;
        ensure!(
            other != process,
            "containers of two pods have the same SELinux label {process}"
        );

        let own = node.asks(&["exec", "--sync", &a, "cat", "/proc/self/attr/current"])?;
        ensure_eq!(
            own.trim_end_matches('\0'),
            process,
            "SELinux label of a command that exec ran"
        );
        let files = format!("system_u:object_r:container_file_t:{level}");
        let root = format!("/proc/{}/root", node.pid(&a)?);
        for path in [
            "/",
            "/bin",
            "/dev",
            "/dev/shm",
            "/etc/hosts",
            "/etc/hostname",
        ] {
            let found = label_of_file(format!("{root}{path}"))?;
            ensure_eq!(found, files, "SELinux label of {path} in the container");
        }
        // The SELinux policy must allow the pod's containers to use the pod's files.
        let script =
            "echo x >/dev/shm/x && cat /etc/hosts /etc/resolv.conf && echo y >/y && cat /y";
        node.asks(&["exec", "--sync", &a, "sh", "-c", script])?;
        node.asks(&["exec", "--sync", &b, "cat", "/dev/shm/x"])?;

        let shown = node.json(&["inspectp", &first.0])?;
        ensure_eq!(
            shown["info"]["selinux"]["process"],
            process,
            "SELinux label of the process in the output of inspectp"
        );
        let shown = node.json(&["inspect", &a])?;
        let spec = &shown["info"]["runtimeSpec"];
        ensure_eq!(
            spec["process"]["selinuxLabel"],
            process,
            "SELinux label of the process in the output of inspect"
        );
        ensure_eq!(
            spec["linux"]["mountLabel"],
            files,
            "SELinux label of the mounts in the output of inspect"
        );

        // After a crash of the server, a new container still gets the level of its pod, and a new
        // pod gets an unused level.
        node.kill_server()?;
        node.start_server()?;
        let late = idle(node, &first, "late")?;
        ensure_eq!(
            label(node, &late)?,
            process,
            "SELinux label of a new container after the restart"
        );
        let third = pod(node, "third")?;
        let d = idle(node, &third, "d")?;
        let third = label(node, &d)?;
        ensure!(
            third != process && third != other,
            "the SELinux label {third} of the third pod is also the label of another pod; the labels of the other pods are {process} and {other}"
        );
        let fourth = node.pod("fourth");
        let refused = node.try_runp(&fourth)?;
        refused.fails_with("selinux_category_range")?;
        node.asks(&["rmp", "--force", &second.0])?;
        let fourth = (node.runp(&fourth)?, fourth);
        let e = idle(node, &fourth, "e")?;
        ensure_eq!(
            label(node, &e)?,
            other,
            "SELinux label of the fourth pod, which gets the level of the removed pod"
        );
        Ok(())
    })
}

fn selinux_denies_access_to_the_volumes_of_another_pod() -> Result {
    with_selinux(|node| {
        let volume = node.join("volume");
        fs::create_dir_all(volume.join("deep/er"))?;
        fs::write(volume.join("deep/er/file"), "secret")?;
        let outside = node.join("outside");
        fs::write(&outside, "not theirs")?;
        std::os::unix::fs::symlink(&outside, volume.join("link"))?;
        let before = label_of_file(&outside)?;
        let mounted = |name: &str, relabel: bool| {
            let mut container = node.container(name, &["sleep", "3600"]);
            container["mounts"] = json!([{
                "container_path": "/volume", "host_path": volume, "selinux_relabel": relabel,
            }]);
            container
        };
        let read = |container: &str| {
            node.crictl(&["exec", "--sync", container, "cat", "/volume/deep/er/file"])
        };
        let (first, second) = (pod(node, "first")?, pod(node, "second")?);
        let unlabelled = node.run(&first.0, &first.1, &mounted("unlabelled", false))?;
        ensure!(
            read(&unlabelled).end()?.code != 0,
            "the container can read a volume that the server did not relabel"
        );
        let a = node.run(&first.0, &first.1, &mounted("a", true))?;
        ensure_eq!(
            read(&a).ok()?.text(),
            "secret",
            "content of the volume of the first pod"
        );
        ensure_eq!(
            label_of_file(&outside)?,
            before,
            "SELinux label of a file that is outside the volume, but is the target of a link in the volume"
        );

        let b = node.run(&second.0, &second.1, &mounted("b", false))?;
        let denied = read(&b).end()?;
        denied.fails_with("denied")?;
        let taken = node.run(&second.0, &second.1, &mounted("taken", true))?;
        ensure_eq!(
            read(&taken).ok()?.text(),
            "secret",
            "content of the volume that the server relabelled for the second pod"
        );
        ensure!(
            read(&a).end()?.code != 0,
            "the first pod can still read the volume that the server relabelled for the second pod"
        );

        let mut container = node.container("etc", &["true"]);
        container["mounts"] = json!([{
            "container_path": "/volume", "host_path": "/etc", "selinux_relabel": true,
        }]);
        let refused = node.try_create(&first.0, &first.1, &container)?;
        refused.fails_with("/etc")?;
        Ok(())
    })
}

fn a_container_gets_the_selinux_label_that_it_requests() -> Result {
    with_selinux(|node| {
        let mut config = node.pod("asked");
        config["linux"]["security_context"]["selinux_options"] = json!({ "level": "s0:c5,c6" });
        config["linux"]["security_context"]["privileged"] = json!(true);
        let id = node.runp(&config)?;
        let with = |name: &str, key: &str, value: Value| {
            let mut container = node.container(name, &["sleep", "3600"]);
            container["linux"]["security_context"][key] = value;
            container
        };
        let of_pod = node.run(&id, &config, &with("pod", "privileged", json!(false)))?;
        ensure_eq!(
            label(node, &of_pod)?,
            "system_u:system_r:container_t:s0:c5,c6",
            "SELinux label of a container without its own SELinux options"
        );
        let own = json!({ "type": "container_other_t", "level": "s0:c7" });
        let own = node.run(&id, &config, &with("own", "selinux_options", own))?;
        ensure_eq!(
            label(node, &own)?,
            "system_u:system_r:container_other_t:s0:c7",
            "SELinux label of a container with its own SELinux options"
        );
        let unconfined = json!({ "type": "spc_t" });
        let unconfined = with("unconfined", "selinux_options", unconfined);
        let unconfined = node.run(&id, &config, &unconfined)?;
        ensure_eq!(
            label(node, &unconfined)?,
            "system_u:system_r:spc_t:s0:c5,c6",
            "SELinux label of an unconfined container"
        );
        // The test's SELinux policy defines no transition for a privileged container. The container
        // therefore keeps the label of the process that starts the container.
        let privileged = node.run(&id, &config, &with("privileged", "privileged", json!(true)))?;
        let ours = fs::read_to_string("/proc/self/attr/current")?;
        ensure_eq!(
            label(node, &privileged)?,
            ours.trim_end_matches('\0'),
            "SELinux label of a privileged container"
        );
        let unknown = with("unknown", "selinux_options", json!({ "type": "no_t" }));
        let refused = node.try_create(&id, &config, &unknown)?;
        refused.fails_with("selinux_options")?;
        Ok(())
    })
}

fn selinux_works_with_user_namespaces_and_image_volumes() -> Result {
    with_selinux(|node| {
        node.pull(WEB)?;
        for users in [true, false] {
            let name = if users { "users" } else { "plain" };
            let (config, mut container) = if users {
                (
                    user_namespace::pod(node, name, 1),
                    user_namespace::container(node, name, 1, &["sleep", "3600"]),
                )
            } else {
                (node.pod(name), node.container(name, &["sleep", "3600"]))
            };
            container["mounts"] = json!([{
                "container_path": "/data", "readonly": true, "image": { "image": WEB },
            }]);
            container["tty"] = json!(true);
            let id = node.runp(&config)?;
            let container = node.run(&id, &config, &container)?;
            let process = label(node, &container)?;
            let (_, level) = process.split_once("container_t:").ok_or(process.clone())?;
            let root = format!("/proc/{}/root", node.pid(&container)?);
            for path in ["/", "/data/www", "/dev/pts", "/dev/shm", "/etc/resolv.conf"] {
                let found = label_of_file(format!("{root}{path}"))?;
                let expected = format!("system_u:object_r:container_file_t:{level}");
                ensure_eq!(
                    found,
                    expected,
                    "SELinux label of {path} in the container {name}"
                );
            }
            let script = "cat /data/www/index.html /etc/hosts && touch /x /dev/shm/x";
            node.asks(&["exec", "--sync", &container, "sh", "-c", script])?;
        }
        Ok(())
    })
}

fn containers_get_no_selinux_label_unless_enable_selinux_is_set() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let mut config = node.pod("off");
        config["linux"]["security_context"]["selinux_options"] = json!({ "type": "container_t" });
        let id = node.runp(&config)?;
        let container = idle(node, &(id, config), "off")?;
        let ours = fs::read_to_string("/proc/self/attr/current")?;
        ensure_eq!(
            label(node, &container)?,
            ours.trim_end_matches('\0'),
            "SELinux label of the container on a node without enable_selinux"
        );
        ensure!(
            node.log().contains("enable_selinux"),
            "the server's log does not mention enable_selinux"
        );
        Ok(())
    })
}

fn the_refusal_of_a_bad_selinux_level_names_the_field() -> Result {
    on_a_node(|node| {
        let mut config = node.pod("bad");
        config["linux"]["security_context"]["selinux_options"] = json!({ "level": "s0,c1,c2" });
        let refused = node.try_runp(&config)?;
        refused.fails_with("level")?;
        Ok(())
    })
}
