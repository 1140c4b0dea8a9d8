//! SELinux labels of pods, under the policy of `tests/vm/run --selinux`, which is enforced.

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
        each_pod_has_an_selinux_level_of_its_own,
        SELINUX,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        selinux_keeps_pods_from_each_others_volumes,
        SELINUX,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        a_container_gets_the_selinux_label_it_asks_for,
        SELINUX,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        selinux_goes_with_user_namespaces_and_images_as_volumes,
        SELINUX,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        without_enable_selinux_there_are_no_labels,
        SELINUX,
        A_NODE,
        Need::RrunCri
    ),
    test!(a_bad_selinux_level_is_refused_by_its_field, A_NODE),
];

/// A node with `enable_selinux`, and levels for three pods.
fn on_a_labelling_node(test: impl FnOnce(&mut Node) -> Result) -> Result {
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

/// A pod's id, and its configuration.
fn pod(node: &Node, name: &str) -> Result<(String, Value)> {
    let pod = node.pod(name);
    Ok((node.runp(&pod)?, pod))
}

/// Runs a container that does nothing.
fn idle(node: &Node, (id, pod): &(String, Value), name: &str) -> Result<String> {
    node.run(id, pod, &node.container(name, &["sleep", "3600"]))
}

/// The label of a container's first process, once that is its program.
fn label(node: &Node, container: &str) -> Result<String> {
    let process = format!("/proc/{}", node.pid(container)?);
    wait_for(&format!("container {container} to be executed"), || {
        let line = fs::read_to_string(format!("{process}/cmdline"))?;
        Ok(line.starts_with("sleep\0").then_some(()))
    })?;
    let text = fs::read_to_string(format!("{process}/attr/current"))?;
    Ok(text.trim_end_matches('\0').to_owned())
}

fn label_of_file(path: impl AsRef<Path>) -> Result<String> {
    let output = command("stat", ["--format", "%C"])
        .arg(path.as_ref())
        .ok()?;
    Ok(output.text().to_owned())
}

fn each_pod_has_an_selinux_level_of_its_own() -> Result {
    on_a_labelling_node(|node| {
        let (first, second) = (pod(node, "first")?, pod(node, "second")?);
        let (a, b) = (idle(node, &first, "a")?, idle(node, &first, "b")?);
        let c = idle(node, &second, "c")?;
        let process = label(node, &a)?;
        let level = process
            .strip_prefix("system_u:system_r:container_t:")
            .ok_or(format!("the label is {process}"))?
            .to_owned();
        ensure!(level.starts_with("s0:c"), "the level is {level}");
        ensure_eq!(label(node, &b)?, process, "label in the same pod");
        let other = label(node, &c)?;
        ensure!(other != process, "two pods have the label {process}");

        let own = node.asks(&["exec", "--sync", &a, "cat", "/proc/self/attr/current"])?;
        ensure_eq!(own.trim_end_matches('\0'), process, "label of exec");
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
            let there = label_of_file(format!("{root}{path}"))?;
            ensure_eq!(there, files, "label of {path}");
        }
        // And it has the use of them.
        let script =
            "echo x >/dev/shm/x && cat /etc/hosts /etc/resolv.conf && echo y >/y && cat /y";
        node.asks(&["exec", "--sync", &a, "sh", "-c", script])?;
        node.asks(&["exec", "--sync", &b, "cat", "/dev/shm/x"])?;

        let shown = node.json(&["inspectp", &first.0])?;
        ensure_eq!(shown["info"]["selinux"]["process"], process, "inspectp");
        let shown = node.json(&["inspect", &a])?;
        let spec = &shown["info"]["runtimeSpec"];
        ensure_eq!(spec["process"]["selinuxLabel"], process, "inspect");
        ensure_eq!(spec["linux"]["mountLabel"], files, "inspect");

        // After a crash the levels are still theirs.
        node.kill_server()?;
        node.start_server()?;
        let late = idle(node, &first, "late")?;
        ensure_eq!(label(node, &late)?, process, "label after a restart");
        let third = pod(node, "third")?;
        let d = idle(node, &third, "d")?;
        let third = label(node, &d)?;
        ensure!(
            third != process && third != other,
            "the third has {third}, the others {process} and {other}"
        );
        let fourth = node.pod("fourth");
        let refused = node.try_runp(&fourth)?;
        refused.fails_with("selinux_category_range")?;
        node.asks(&["rmp", "--force", &second.0])?;
        let fourth = (node.runp(&fourth)?, fourth);
        let e = idle(node, &fourth, "e")?;
        ensure_eq!(label(node, &e)?, other, "label that became free");
        Ok(())
    })
}

fn selinux_keeps_pods_from_each_others_volumes() -> Result {
    on_a_labelling_node(|node| {
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
        ensure!(read(&unlabelled).end()?.code != 0, "the node's own is read");
        let a = node.run(&first.0, &first.1, &mounted("a", true))?;
        ensure_eq!(
            read(&a).ok()?.text(),
            "secret",
            "the volume of the first pod"
        );
        ensure_eq!(label_of_file(&outside)?, before, "label behind a link");

        let b = node.run(&second.0, &second.1, &mounted("b", false))?;
        let denied = read(&b).end()?;
        denied.fails_with("denied")?;
        let taken = node.run(&second.0, &second.1, &mounted("taken", true))?;
        ensure_eq!(read(&taken).ok()?.text(), "secret", "the volume taken over");
        ensure!(read(&a).end()?.code != 0, "the first pod reads it still");

        let mut container = node.container("etc", &["true"]);
        container["mounts"] = json!([{
            "container_path": "/volume", "host_path": "/etc", "selinux_relabel": true,
        }]);
        let refused = node.try_create(&first.0, &first.1, &container)?;
        refused.fails_with("/etc")?;
        Ok(())
    })
}

fn a_container_gets_the_selinux_label_it_asks_for() -> Result {
    on_a_labelling_node(|node| {
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
            "label of the pod"
        );
        let own = json!({ "type": "container_other_t", "level": "s0:c7" });
        let own = node.run(&id, &config, &with("own", "selinux_options", own))?;
        ensure_eq!(
            label(node, &own)?,
            "system_u:system_r:container_other_t:s0:c7",
            "label of the container"
        );
        let unconfined = json!({ "type": "spc_t" });
        let unconfined = with("unconfined", "selinux_options", unconfined);
        let unconfined = node.run(&id, &config, &unconfined)?;
        ensure_eq!(
            label(node, &unconfined)?,
            "system_u:system_r:spc_t:s0:c5,c6",
            "label of one that is not confined"
        );
        // As whoever starts it: here no policy says otherwise.
        let privileged = node.run(&id, &config, &with("privileged", "privileged", json!(true)))?;
        let ours = fs::read_to_string("/proc/self/attr/current")?;
        ensure_eq!(
            label(node, &privileged)?,
            ours.trim_end_matches('\0'),
            "label of a privileged one"
        );
        let unknown = with("unknown", "selinux_options", json!({ "type": "no_t" }));
        let refused = node.try_create(&id, &config, &unknown)?;
        refused.fails_with("selinux_options")?;
        Ok(())
    })
}

fn selinux_goes_with_user_namespaces_and_images_as_volumes() -> Result {
    on_a_labelling_node(|node| {
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
                let there = label_of_file(format!("{root}{path}"))?;
                let expected = format!("system_u:object_r:container_file_t:{level}");
                ensure_eq!(there, expected, "{name}: label of {path}");
            }
            let script = "cat /data/www/index.html /etc/hosts && touch /x /dev/shm/x";
            node.asks(&["exec", "--sync", &container, "sh", "-c", script])?;
        }
        Ok(())
    })
}

fn without_enable_selinux_there_are_no_labels() -> Result {
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
            "label"
        );
        ensure!(node.log().contains("enable_selinux"), "nothing is said");
        Ok(())
    })
}

fn a_bad_selinux_level_is_refused_by_its_field() -> Result {
    on_a_node(|node| {
        let mut config = node.pod("bad");
        config["linux"]["security_context"]["selinux_options"] = json!({ "level": "s0,c1,c2" });
        let refused = node.try_runp(&config)?;
        refused.fails_with("level")?;
        Ok(())
    })
}
