//! CNI plugins that misbehave, configurations that come, change and go, and kills in between: what
//! was ADDed is always DELeted, and says so where it can't be.

use std::fs;
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::cni::write;
use crate::support::cni_recorder::{ADDRESS, Call, behave, calls, configure, install};
use crate::support::machine::{Dice, Result, rounds, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, Node, on_a_node};
use crate::{ensure, ensure_eq, test};

macro_rules! tests {
    ($($name:ident),* $(,)?) => {
        &[$(test!($name, A_NODE, Need::RrunCri)),*]
    };
}

pub(crate) const TESTS: &[Test] = tests![
    plugins_are_told_of_the_pod_and_given_back_what_they_answered,
    a_plugin_that_fails_hangs_or_prints_garbage_is_told_and_followed_by_del,
    a_broken_configuration_is_told_with_file_and_line_and_by_the_nodes_status,
    a_del_that_fails_is_kubelets_to_repeat_but_not_for_ever,
    what_a_pod_was_added_with_is_what_it_is_deleted_with,
    status_and_gc_are_asked_of_plugins_of_1_1,
    a_pod_is_taken_out_of_the_network_that_it_was_put_into,
    a_server_killed_in_the_middle_of_add_and_del_leaves_nothing,
    after_a_reboot_pods_are_deleted_without_their_namespace,
];

/// The condition NetworkReady: whether, and the sentence.
fn readiness(node: &Node) -> Result<(bool, String)> {
    let info = node.json(&["info"])?;
    let conditions = info.pointer("/status/conditions").and_then(Value::as_array);
    let mut conditions = conditions.into_iter().flatten();
    let found = conditions.find(|one| one["type"] == "NetworkReady");
    let found = found.ok_or(format!("no NetworkReady in {info}"))?;
    Ok((
        found["status"] == true,
        found["message"].as_str().unwrap_or_default().to_owned(),
    ))
}

/// Asks until the node's network is as wanted, and the sentence has this in it.
fn becomes(node: &Node, ready: bool, sentence: &str) -> Result {
    wait_for(&format!("NetworkReady {ready}, {sentence:?}"), || {
        let (is, said) = readiness(node)?;
        Ok((is == ready && said.contains(sentence)).then_some(()))
    })
}

/// `runp`, which must fail and say this.
fn refused(node: &Node, pod: &Value, sentence: &str) -> Result {
    let output = node.try_runp(pod)?;
    // crictl prints the sentence in quotes.
    let said = output.stderr.replace("\\\"", "\"");
    ensure!(
        output.code != 0 && said.contains(sentence),
        "should fail with {sentence:?}:\n{}",
        output.told()
    );
    Ok(())
}

/// Waits until every pod that ADD was called for has had a DEL.
fn balanced(node: &Node) -> Result {
    let pods = |calls: Vec<Call>| -> Vec<String> {
        let mut pods: Vec<String> = calls
            .iter()
            .filter_map(|call| call.variable("CNI_CONTAINERID").map(str::to_owned))
            .collect();
        pods.sort();
        pods.dedup();
        pods
    };
    wait_for("every ADD to have its DEL", || {
        let (added, deleted) = (pods(calls(node, "ADD")?), pods(calls(node, "DEL")?));
        Ok(added.iter().all(|pod| deleted.contains(pod)).then_some(()))
    })
}

fn plugins_are_told_of_the_pod_and_given_back_what_they_answered() -> Result {
    on_a_node(|node| {
        install(node, &["first", "second"], "auto", "")?;
        configure(node, "10-a.conflist", "1.0.0", &["first", "second"])?;
        let mut pod = node.pod("told");
        pod["port_mappings"] = json!([
            { "protocol": 1, "container_port": 53, "host_port": 5353, "host_ip": "127.0.0.1" }
        ]);
        pod["annotations"] = json!({ "kubernetes.io/ingress-bandwidth": "10M", "other": "x" });
        pod["dns_config"] = json!({ "servers": ["192.0.2.1"] });
        pod["linux"]["cgroup_parent"] = json!("/rrun-told");
        let pod_id = node.runp(&pod)?;
        let status = node.json(&["inspectp", &pod_id])?;
        ensure_eq!(
            status.pointer("/status/network/ip"),
            Some(&json!(ADDRESS)),
            "the pod's address"
        );
        let adds = calls(node, "ADD")?;
        ensure_eq!(adds.len(), 2, "calls of ADD");
        let add = &adds[0];
        let netns = node.join("state/netns").join(&pod_id);
        for (name, value) in [
            ("CNI_CONTAINERID", pod_id.as_str()),
            ("CNI_NETNS", &netns.to_string_lossy()),
            ("CNI_IFNAME", "eth0"),
            (
                "CNI_ARGS",
                &format!(
                    "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=told;\
                     K8S_POD_INFRA_CONTAINER_ID={pod_id};K8S_POD_UID=uid-told"
                ),
            ),
            (
                "CNI_PATH",
                &format!("{}:/usr/lib/cni", node.join("bin").display()),
            ),
        ] {
            ensure_eq!(add.variable(name), Some(value), "{name}");
        }
        ensure_eq!(
            add.input["runtimeConfig"],
            json!({
                "portMappings": [
                    {"hostPort": 5353, "containerPort": 53, "protocol": "udp", "hostIP": "127.0.0.1"}
                ],
                "bandwidth": {"ingressRate": 10_000_000, "ingressBurst": u32::MAX},
                "dns": {"servers": ["192.0.2.1"], "searches": [], "options": []},
                "cgroupPath": "/rrun-told",
                "io.kubernetes.cri.pod-annotations": pod["annotations"],
            }),
            "what the first is told of the pod"
        );
        ensure!(
            add.input.get("prevResult").is_none() && add.input.get("capabilities").is_none(),
            "the first's input is {}",
            add.input
        );
        ensure_eq!(add.input["name"], json!("recorded"), "its network's name");
        let result = json!({"cniVersion": "1.0.0", "ips": [{"address": format!("{ADDRESS}/24")}]});
        ensure_eq!(
            adds[1].input["prevResult"],
            result,
            "what the second is told"
        );
        node.asks(&["stopp", &pod_id])?;
        let dels = calls(node, "DEL")?;
        ensure_eq!(dels.len(), 2, "calls of DEL");
        ensure_eq!(
            dels[0].input["type"],
            json!("second"),
            "the first to be deleted"
        );
        for del in &dels {
            ensure_eq!(del.input["prevResult"], result, "what DEL is told");
            ensure_eq!(
                del.variable("CNI_NETNS"),
                add.variable("CNI_NETNS"),
                "the namespace"
            );
        }
        // A second time: nothing is left to be deleted.
        node.asks(&["stopp", &pod_id])?;
        ensure_eq!(calls(node, "DEL")?.len(), 2, "calls of DEL");
        // What can't be told is refused before anything is made.
        let mut pod = node.pod("wrong");
        pod["annotations"] = json!({ "kubernetes.io/egress-bandwidth": "fast" });
        refused(node, &pod, "kubernetes.io/egress-bandwidth is \"fast\"")?;
        ensure_eq!(calls(node, "ADD")?.len(), 2, "calls of ADD");
        Ok(())
    })
}

fn a_plugin_that_fails_hangs_or_prints_garbage_is_told_and_followed_by_del() -> Result {
    on_a_node(|node| {
        install(node, &["first", "second"], "auto", "timeout_seconds = 2")?;
        configure(node, "10-a.conflist", "1.0.0", &["first", "second"])?;
        let pod = node.pod("fails");
        let error =
            "{\"cniVersion\":\"1.0.0\",\"code\":111,\"msg\":\"no room\",\"details\":\"at all\"}";
        for (script, sentence) in [
            (
                format!("echo complaint >&2; echo '{error}'; exit 1"),
                "the CNI plugin second failed ADD: no room: at all (code 111); it wrote: complaint",
            ),
            (
                "exit 3".to_owned(),
                "the CNI plugin second failed ADD without a CNI error: exit status 3",
            ),
            (
                "echo garbage; exit 0".to_owned(),
                "the CNI plugin second answered ADD with no CNI result: \"garbage\"",
            ),
            (
                "exit 0".to_owned(),
                "the CNI plugin second answered ADD with no CNI result: nothing",
            ),
            (
                "kill -9 $$".to_owned(),
                "the CNI plugin second failed ADD without a CNI error: killed by signal 9",
            ),
            (
                // One that is no child of the plugin's group has to go as well.
                "setsid sleep 987 & sleep 986".to_owned(),
                "the CNI plugin second did not end ADD within ",
            ),
            (
                "head -c 3000000 /dev/zero; exit 0".to_owned(),
                "the CNI plugin second answered ADD with no CNI result: over",
            ),
        ] {
            behave(node, "second-ADD", &script)?;
            refused(node, &pod, sentence)?;
        }
        balanced(node)?;
        behave(node, "second-ADD", "")?;
        // A missing binary is told before any is run, by the node's state too.
        let added = calls(node, "ADD")?.len();
        configure(node, "10-a.conflist", "1.0.0", &["first", "absent"])?;
        becomes(node, false, "the CNI plugin absent is in none of ")?;
        refused(node, &pod, "the CNI plugin absent is in none of ")?;
        ensure_eq!(calls(node, "ADD")?.len(), added, "calls of ADD");
        configure(node, "10-a.conflist", "1.0.0", &["first"])?;
        becomes(node, true, "")?;
        balanced(node)?;
        let pods = node.asks(&["pods", "--quiet"])?;
        ensure!(pods.is_empty(), "there are pods: {pods}");
        wait_for("the namespaces of failed pods to go", || {
            let left = fs::read_dir(node.join("state/netns"))?.count();
            Ok((left == 0).then_some(()))
        })
    })
}

fn a_broken_configuration_is_told_with_file_and_line_and_by_the_nodes_status() -> Result {
    on_a_node(|node| {
        install(node, &["first"], "cni", "")?;
        let pod = node.pod("waits");
        becomes(node, false, "there is no CNI configuration in ")?;
        refused(node, &pod, "there is no CNI configuration in ")?;
        write(node, "10-a.conflist", "{\n  \"name\": \"x\",\n  oops\n}")?;
        becomes(node, false, "cni/10-a.conflist, line 3, column 3: ")?;
        refused(node, &pod, "cni/10-a.conflist, line 3, column 3: ")?;
        // The first by name is the one, and a good later one does not take its place.
        configure(node, "20-b.conflist", "1.0.0", &["first"])?;
        becomes(node, false, "cni/10-a.conflist, line 3")?;
        configure(node, "05-c.conflist", "1.0.0", &["first"])?;
        becomes(node, true, "")?;
        node.runp(&pod)?;
        let adds = calls(node, "ADD")?;
        ensure_eq!(adds.len(), 1, "calls of ADD");
        ensure_eq!(
            adds[0].input["marker"],
            json!("05-c.conflist"),
            "the configuration in use"
        );
        node.asks(&["rmp", "--all", "--force"])?;
        balanced(node)
    })
}

fn a_del_that_fails_is_kubelets_to_repeat_but_not_for_ever() -> Result {
    on_a_node(|node| {
        install(node, &["first"], "auto", "teardown_patience_seconds = 3")?;
        configure(node, "10-a.conflist", "1.0.0", &["first"])?;
        let pod = node.pod("stays");
        let pod_id = node.runp(&pod)?;
        behave(
            node,
            "DEL",
            "echo '{\"code\":100,\"msg\":\"not now\"}'; exit 1",
        )?;
        let output = node.crictl(&["stopp", &pod_id]).end()?;
        output.fails_with("failed DEL: not now (code 100)")?;
        ensure!(
            node.join("state/netns").join(&pod_id).exists(),
            "the namespace is gone before the DEL"
        );
        wait_for("the pod to be let go", || {
            std::thread::sleep(Duration::from_millis(500));
            Ok((node.crictl(&["stopp", &pod_id]).end()?.code == 0).then_some(()))
        })?;
        node.asks(&["rmp", &pod_id])?;
        ensure!(
            !node.join("state/netns").join(&pod_id).exists(),
            "the namespace is there after the removal"
        );
        // A restart does not forget it.
        node.kill_server()?;
        node.start_server()?;
        behave(node, "DEL", "")?;
        let before = calls(node, "DEL")?.len();
        wait_for("the DEL to come after all", || {
            Ok((calls(node, "DEL")?.len() > before).then_some(()))
        })?;
        let last = calls(node, "DEL")?;
        ensure_eq!(
            last.last().and_then(|call| call.variable("CNI_NETNS")),
            Some(""),
            "the namespace that is gone"
        );
        // A plugin that is gone for good holds up nothing.
        let pod_id = node.runp(&node.pod("gone"))?;
        fs::rename(node.join("bin/first"), node.join("bin/away"))?;
        node.asks(&["stopp", &pod_id])?;
        node.asks(&["rmp", &pod_id])?;
        fs::rename(node.join("bin/away"), node.join("bin/first"))?;
        configure(node, "10-a.conflist", "0.4.0", &["first"])?;
        balanced(node)
    })
}

fn what_a_pod_was_added_with_is_what_it_is_deleted_with() -> Result {
    on_a_node(|node| {
        install(node, &["first", "second"], "auto", "")?;
        configure(node, "10-a.conflist", "0.4.0", &["first"])?;
        let [changed, gone] = [
            node.runp(&node.pod("changed"))?,
            node.runp(&node.pod("gone"))?,
        ];
        configure(node, "10-a.conflist", "1.0.0", &["second"])?;
        node.asks(&["stopp", &changed])?;
        fs::remove_file(node.join("cni/10-a.conflist"))?;
        // With no configuration, and after a crash.
        node.kill_server()?;
        node.start_server()?;
        node.asks(&["stopp", &gone])?;
        let dels = calls(node, "DEL")?;
        ensure_eq!(dels.len(), 2, "calls of DEL");
        for del in dels {
            ensure_eq!(del.input["type"], json!("first"), "the plugin");
            ensure_eq!(del.input["cniVersion"], json!("0.4.0"), "the version");
            ensure!(
                del.input["prevResult"].is_object(),
                "no prevResult in {}",
                del.input
            );
        }
        Ok(())
    })
}

fn status_and_gc_are_asked_of_plugins_of_1_1() -> Result {
    on_a_node(|node| {
        install(node, &["first"], "auto", "")?;
        configure(node, "10-a.conflist", "1.1.0", &["first"])?;
        becomes(node, true, "")?;
        let pod_id = node.runp(&node.pod("valid"))?;
        behave(
            node,
            "STATUS",
            "echo '{\"code\":50,\"msg\":\"no daemon\"}'; exit 1",
        )?;
        becomes(node, false, "failed STATUS: no daemon (code 50)")?;
        // One that hangs holds up no answer.
        behave(node, "STATUS", "sleep 60")?;
        becomes(node, false, "")?;
        behave(node, "STATUS", "")?;
        becomes(node, true, "")?;
        node.terminate_server()?;
        node.start_server()?;
        wait_for("GC to name the pod as valid, and nothing else", || {
            let calls = calls(node, "GC")?;
            let last = calls
                .last()
                .map(|call| call.input["cni.dev/valid-attachments"].clone());
            let valid = json!([{ "containerID": pod_id, "ifname": "eth0" }]);
            Ok((last == Some(valid)).then_some(()))
        })?;
        wait_for("the pod to be CHECKed after the start", || {
            let calls = calls(node, "CHECK")?;
            Ok(calls
                .iter()
                .any(|call| call.input["prevResult"].is_object())
                .then_some(()))
        })
    })
}

fn a_pod_is_taken_out_of_the_network_that_it_was_put_into() -> Result {
    on_a_node(|node| {
        install(node, &["first"], "auto", "")?;
        let embedded = node.runp(&node.pod("embedded"))?;
        configure(node, "10-a.conflist", "1.0.0", &["first"])?;
        let plugged = node.runp(&node.pod("plugged"))?;
        fs::remove_file(node.join("cni/10-a.conflist"))?;
        let again = node.runp(&node.pod("again"))?;
        ensure_eq!(calls(node, "ADD")?.len(), 1, "calls of ADD");
        for pod in [&embedded, &plugged, &again] {
            node.asks(&["stopp", pod])?;
        }
        let dels = calls(node, "DEL")?;
        let pods: Vec<_> = dels
            .iter()
            .map(|del| del.variable("CNI_CONTAINERID"))
            .collect();
        ensure_eq!(pods, [Some(plugged.as_str())], "the pods that were DELeted");
        Ok(())
    })
}

fn a_server_killed_in_the_middle_of_add_and_del_leaves_nothing() -> Result {
    on_a_node(|node| {
        install(node, &["first", "second"], "auto", "")?;
        configure(node, "10-a.conflist", "1.0.0", &["first", "second"])?;
        // What each makes and unmakes is a file, and it takes its time for it.
        let made = node.join("made");
        fs::create_dir(&made)?;
        let file = format!("{}/$CNI_CONTAINERID-$kind", made.display());
        let mut dice = Dice::new();
        for round in 0..rounds(6, 200) {
            // The last child of a killed server may still make something.
            behave(
                node,
                "ADD",
                &format!("sleep 0.0{}; (sleep 0.05; touch {file}); ", dice.below(9)),
            )?;
            behave(
                node,
                "DEL",
                &format!("sleep 0.0{}; rm -f {file}", dice.below(9)),
            )?;
            let pod = node.pod(&format!("killed-{round}"));
            let path = node.join(&format!("pod-{round}.json"));
            fs::write(&path, pod.to_string())?;
            let mut client = node.crictl(&["runp", &path.to_string_lossy()]).start()?;
            std::thread::sleep(Duration::from_millis(dice.below(300)));
            if round % 2 == 1 {
                wait_for("the pod to run", || Ok((!client.lives()).then_some(())))?;
                client = node.crictl(&["rmp", "--all", "--force"]).start()?;
                std::thread::sleep(Duration::from_millis(dice.below(300)));
            }
            node.kill_server()?;
            drop(client);
            node.start_server()?;
            node.asks(&["rmp", "--all", "--force"])?;
            wait_for("what plugins made to be unmade", || {
                let left =
                    fs::read_dir(&made)?.count() + fs::read_dir(node.join("state/netns"))?.count();
                Ok((left == 0).then_some(()))
            })
            .map_err(|error| format!("seed {}, round {round}: {error:?}", dice.seed))?;
        }
        // Nothing comes later either.
        std::thread::sleep(Duration::from_millis(300));
        ensure_eq!(fs::read_dir(&made)?.count(), 0, "files of plugins");
        balanced(node)
    })
}

fn after_a_reboot_pods_are_deleted_without_their_namespace() -> Result {
    on_a_node(|node| {
        install(node, &["first"], "auto", "")?;
        configure(node, "10-a.conflist", "1.0.0", &["first"])?;
        let pod_id = node.runp(&node.pod("lost"))?;
        let monitor = node.monitor(&pod_id)?;
        node.kill_server()?;
        nix::sys::signal::kill(monitor, nix::sys::signal::Signal::SIGKILL)?;
        node.unmount_all()?;
        fs::remove_dir_all(node.join("state"))?;
        node.start_server()?;
        node.asks(&["stopp", &pod_id])?;
        node.asks(&["rmp", &pod_id])?;
        balanced(node)?;
        let dels = calls(node, "DEL")?;
        ensure_eq!(
            dels.last().and_then(|del| del.variable("CNI_NETNS")),
            Some(""),
            "the namespace"
        );
        Ok(())
    })
}
