//! Tests of failing CNI plugins, of changes of the CNI configuration, and of killed servers. In all
//! these cases, rrun-cri must call DEL for each ADD, and must report a failed DEL.

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
    plugins_receive_pod_data_and_the_results_of_earlier_plugins,
    a_plugin_that_fails_or_hangs_or_prints_garbage_causes_an_error_and_a_call_of_del,
    a_broken_configuration_is_reported_with_file_and_line_in_errors_and_node_status,
    the_stop_of_a_pod_waits_only_for_a_limited_time_for_a_failing_del,
    del_uses_the_configuration_that_add_used,
    plugins_of_cni_1_1_are_called_with_status_and_gc,
    a_pod_is_removed_from_the_network_that_it_was_added_to,
    nothing_is_left_behind_if_the_server_is_killed_during_add_or_del,
    del_is_called_without_a_network_namespace_after_a_reboot,
];

/// Returns the status and the message of the condition NetworkReady.
fn readiness(node: &Node) -> Result<(bool, String)> {
    let info = node.json(&["info"])?;
    let conditions = info.pointer("/status/conditions").and_then(Value::as_array);
    let mut conditions = conditions.into_iter().flatten();
    let found = conditions.find(|one| one["type"] == "NetworkReady");
    let found = found.ok_or(format!(
        "the condition NetworkReady is missing in the output of `crictl info`: {info}"
    ))?;
    Ok((
        found["status"] == true,
        found["message"].as_str().unwrap_or_default().to_owned(),
    ))
}

/// Waits until the condition NetworkReady has the status `ready` and its message contains
/// `sentence`.
fn wait_for_readiness(node: &Node, ready: bool, sentence: &str) -> Result {
    wait_for(
        &format!(
            "the condition NetworkReady to be {ready} with a message that contains {sentence:?}"
        ),
        || {
            let (status, message) = readiness(node)?;
            Ok((status == ready && message.contains(sentence)).then_some(()))
        },
    )
}

/// Runs `crictl runp` for a pod. The command must fail with an error that contains `sentence`.
fn runp_fails(node: &Node, pod: &Value, sentence: &str) -> Result {
    let output = node.try_runp(pod)?;
    // crictl prints the error in quotes, and escapes the quotes within it.
    let stderr = output.stderr.replace("\\\"", "\"");
    ensure!(
        output.code != 0 && stderr.contains(sentence),
        "runp did not fail with an error that contains {sentence:?}:\n{}",
        output.told()
    );
    Ok(())
}

/// Waits until DEL was called for each pod with an ADD call.
fn wait_for_dels(node: &Node) -> Result {
    let pods = |calls: Vec<Call>| -> Vec<String> {
        let mut pods: Vec<String> = calls
            .iter()
            .filter_map(|call| call.variable("CNI_CONTAINERID").map(str::to_owned))
            .collect();
        pods.sort();
        pods.dedup();
        pods
    };
    wait_for("DEL to be called for every ADD", || {
        let (added, deleted) = (pods(calls(node, "ADD")?), pods(calls(node, "DEL")?));
        Ok(added.iter().all(|pod| deleted.contains(pod)).then_some(()))
    })
}

fn plugins_receive_pod_data_and_the_results_of_earlier_plugins() -> Result {
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
            "the pod's address in its status"
        );
        let adds = calls(node, "ADD")?;
        ensure_eq!(
            adds.len(),
            2,
            "the number of ADD calls that the plugins recorded"
        );
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
            ensure_eq!(
                add.variable(name),
                Some(value),
                "the plugin's environment variable {name}"
            );
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
            "the runtimeConfig that the first plugin receives"
        );
        ensure!(
            add.input.get("prevResult").is_none() && add.input.get("capabilities").is_none(),
            "the first plugin's input contains prevResult or capabilities: {}",
            add.input
        );
        ensure_eq!(
            add.input["name"],
            json!("recorded"),
            "the network's name in the plugin's input"
        );
        let result = json!({"cniVersion": "1.0.0", "ips": [{"address": format!("{ADDRESS}/24")}]});
        ensure_eq!(
            adds[1].input["prevResult"],
            result,
            "the first plugin's result (prevResult) that the second plugin receives"
        );
        node.asks(&["stopp", &pod_id])?;
        let dels = calls(node, "DEL")?;
        ensure_eq!(
            dels.len(),
            2,
            "the number of DEL calls that the plugins recorded"
        );
        ensure_eq!(
            dels[0].input["type"],
            json!("second"),
            "the first plugin that rrun-cri calls with DEL"
        );
        for del in &dels {
            ensure_eq!(
                del.input["prevResult"],
                result,
                "the result of ADD (prevResult) that the plugin receives in DEL"
            );
            ensure_eq!(
                del.variable("CNI_NETNS"),
                add.variable("CNI_NETNS"),
                "the variable CNI_NETNS that DEL receives"
            );
        }
        // The second `crictl stopp` calls no plugin, because the first `crictl stopp` has already
        // detached the pod from its network.
        node.asks(&["stopp", &pod_id])?;
        ensure_eq!(
            calls(node, "DEL")?.len(),
            2,
            "the number of DEL calls that the plugins recorded"
        );
        // rrun-cri refuses a pod with an invalid bandwidth annotation before it calls ADD.
        let mut pod = node.pod("wrong");
        pod["annotations"] = json!({ "kubernetes.io/egress-bandwidth": "fast" });
        runp_fails(node, &pod, "kubernetes.io/egress-bandwidth is \"fast\"")?;
        ensure_eq!(
            calls(node, "ADD")?.len(),
            2,
            "the number of ADD calls that the plugins recorded"
        );
        Ok(())
    })
}

fn a_plugin_that_fails_or_hangs_or_prints_garbage_causes_an_error_and_a_call_of_del() -> Result {
    on_a_node(|node| {
        install(node, &["first", "second"], "auto", "timeout_seconds = 2")?;
        configure(node, "10-a.conflist", "1.0.0", &["first", "second"])?;
        let pod = node.pod("fails");
        let error =
            "{\"cniVersion\":\"1.0.0\",\"code\":111,\"msg\":\"no room\",\"details\":\"at all\"}";
        for (script, sentence) in [
            (
                format!("echo complaint >&2; echo '{error}'; exit 1"),
                "the CNI plugin second failed ADD: no room: at all (code 111); the plugin's standard error: complaint",
            ),
            (
                "exit 3".to_owned(),
                "the CNI plugin second failed ADD without a CNI error: exit status 3",
            ),
            (
                "echo garbage; exit 0".to_owned(),
                "the CNI plugin second returned no valid CNI result for ADD: its output is \"garbage\"",
            ),
            (
                "exit 0".to_owned(),
                "the CNI plugin second returned no valid CNI result for ADD: its output is empty",
            ),
            (
                "kill -9 $$".to_owned(),
                "the CNI plugin second failed ADD without a CNI error: killed by signal 9",
            ),
            (
                // rrun-cri must also kill a child of the plugin that has left the plugin's process
                // group.
                "setsid sleep 987 & sleep 986".to_owned(),
                "the CNI plugin second did not finish ADD within ",
            ),
            (
                "head -c 3000000 /dev/zero; exit 0".to_owned(),
                "the CNI plugin second returned no valid CNI result for ADD: its output has more than",
            ),
        ] {
            behave(node, "second-ADD", &script)?;
            runp_fails(node, &pod, sentence)?;
        }
        wait_for_dels(node)?;
        behave(node, "second-ADD", "")?;
        // rrun-cri reports a missing plugin binary before it calls any plugin, and also in the
        // node's status.
        let added = calls(node, "ADD")?.len();
        configure(node, "10-a.conflist", "1.0.0", &["first", "absent"])?;
        wait_for_readiness(node, false, "the CNI plugin absent is not in any of ")?;
        runp_fails(node, &pod, "the CNI plugin absent is not in any of ")?;
        ensure_eq!(
            calls(node, "ADD")?.len(),
            added,
            "the number of ADD calls that the plugins recorded"
        );
        configure(node, "10-a.conflist", "1.0.0", &["first"])?;
        wait_for_readiness(node, true, "")?;
        wait_for_dels(node)?;
        let pods = node.asks(&["pods", "--quiet"])?;
        ensure!(
            pods.is_empty(),
            "pods whose creation failed are still listed: {pods}"
        );
        wait_for(
            "the network namespaces of the pods whose creation failed to be removed",
            || {
                let left = fs::read_dir(node.join("state/netns"))?.count();
                Ok((left == 0).then_some(()))
            },
        )
    })
}

fn a_broken_configuration_is_reported_with_file_and_line_in_errors_and_node_status() -> Result {
    on_a_node(|node| {
        install(node, &["first"], "cni", "")?;
        let pod = node.pod("waits");
        wait_for_readiness(node, false, "there is no CNI configuration in ")?;
        runp_fails(node, &pod, "there is no CNI configuration in ")?;
        write(node, "10-a.conflist", "{\n  \"name\": \"x\",\n  oops\n}")?;
        wait_for_readiness(node, false, "cni/10-a.conflist, line 3, column 3: ")?;
        runp_fails(node, &pod, "cni/10-a.conflist, line 3, column 3: ")?;
        // rrun-cri uses the configuration file whose name sorts first. If this file is broken,
        // rrun-cri does not use a valid later file instead.
        configure(node, "20-b.conflist", "1.0.0", &["first"])?;
        wait_for_readiness(node, false, "cni/10-a.conflist, line 3")?;
        configure(node, "05-c.conflist", "1.0.0", &["first"])?;
        wait_for_readiness(node, true, "")?;
        node.runp(&pod)?;
        let adds = calls(node, "ADD")?;
        ensure_eq!(
            adds.len(),
            1,
            "the number of ADD calls that the plugins recorded"
        );
        ensure_eq!(
            adds[0].input["marker"],
            json!("05-c.conflist"),
            "the file name of the CNI configuration that rrun-cri uses"
        );
        node.asks(&["rmp", "--all", "--force"])?;
        wait_for_dels(node)
    })
}

fn the_stop_of_a_pod_waits_only_for_a_limited_time_for_a_failing_del() -> Result {
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
            "the pod's network namespace was removed before DEL succeeded"
        );
        wait_for("the pod to be stopped despite the failing DEL", || {
            std::thread::sleep(Duration::from_millis(500));
            Ok((node.crictl(&["stopp", &pod_id]).end()?.code == 0).then_some(()))
        })?;
        node.asks(&["rmp", &pod_id])?;
        ensure!(
            !node.join("state/netns").join(&pod_id).exists(),
            "the pod's network namespace still exists after the pod's removal"
        );
        // After a restart, the server must repeat the DEL, because no DEL for this pod has
        // succeeded yet.
        node.kill_server()?;
        node.start_server()?;
        behave(node, "DEL", "")?;
        let before = calls(node, "DEL")?.len();
        wait_for("DEL to be called again after the restart", || {
            Ok((calls(node, "DEL")?.len() > before).then_some(()))
        })?;
        let last = calls(node, "DEL")?;
        ensure_eq!(
            last.last().and_then(|call| call.variable("CNI_NETNS")),
            Some(""),
            "the variable CNI_NETNS in a DEL call after the removal of the pod's network namespace"
        );
        // A plugin whose binary was deleted does not prevent a pod's removal.
        let pod_id = node.runp(&node.pod("gone"))?;
        fs::rename(node.join("bin/first"), node.join("bin/away"))?;
        node.asks(&["stopp", &pod_id])?;
        node.asks(&["rmp", &pod_id])?;
        fs::rename(node.join("bin/away"), node.join("bin/first"))?;
        configure(node, "10-a.conflist", "0.4.0", &["first"])?;
        wait_for_dels(node)
    })
}

fn del_uses_the_configuration_that_add_used() -> Result {
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
        // Before the test stops the pod `gone`, the test deletes the only CNI configuration, and
        // restarts the server.
        node.kill_server()?;
        node.start_server()?;
        node.asks(&["stopp", &gone])?;
        let dels = calls(node, "DEL")?;
        ensure_eq!(
            dels.len(),
            2,
            "the number of DEL calls that the plugins recorded"
        );
        for del in dels {
            ensure_eq!(
                del.input["type"],
                json!("first"),
                "the plugin that rrun-cri calls with DEL"
            );
            ensure_eq!(
                del.input["cniVersion"],
                json!("0.4.0"),
                "the CNI version in the input of DEL"
            );
            ensure!(
                del.input["prevResult"].is_object(),
                "the input of DEL contains no prevResult: {}",
                del.input
            );
        }
        Ok(())
    })
}

fn plugins_of_cni_1_1_are_called_with_status_and_gc() -> Result {
    on_a_node(|node| {
        install(node, &["first"], "auto", "")?;
        configure(node, "10-a.conflist", "1.1.0", &["first"])?;
        wait_for_readiness(node, true, "")?;
        let pod_id = node.runp(&node.pod("valid"))?;
        behave(
            node,
            "STATUS",
            "echo '{\"code\":50,\"msg\":\"no daemon\"}'; exit 1",
        )?;
        wait_for_readiness(node, false, "failed STATUS: no daemon (code 50)")?;
        // A plugin whose STATUS hangs does not delay `crictl info`.
        behave(node, "STATUS", "sleep 60")?;
        wait_for_readiness(node, false, "")?;
        behave(node, "STATUS", "")?;
        wait_for_readiness(node, true, "")?;
        node.terminate_server()?;
        node.start_server()?;
        wait_for(
            "a GC call that lists only this pod as a valid attachment",
            || {
                let calls = calls(node, "GC")?;
                let last = calls
                    .last()
                    .map(|call| call.input["cni.dev/valid-attachments"].clone());
                let valid = json!([{ "containerID": pod_id, "ifname": "eth0" }]);
                Ok((last == Some(valid)).then_some(()))
            },
        )?;
        wait_for(
            "CHECK to be called for the pod after the server's start",
            || {
                let calls = calls(node, "CHECK")?;
                Ok(calls
                    .iter()
                    .any(|call| call.input["prevResult"].is_object())
                    .then_some(()))
            },
        )
    })
}

fn a_pod_is_removed_from_the_network_that_it_was_added_to() -> Result {
    on_a_node(|node| {
        install(node, &["first"], "auto", "")?;
        let embedded = node.runp(&node.pod("embedded"))?;
        configure(node, "10-a.conflist", "1.0.0", &["first"])?;
        let plugged = node.runp(&node.pod("plugged"))?;
        fs::remove_file(node.join("cni/10-a.conflist"))?;
        let again = node.runp(&node.pod("again"))?;
        ensure_eq!(
            calls(node, "ADD")?.len(),
            1,
            "the number of ADD calls that the plugins recorded"
        );
        for pod in [&embedded, &plugged, &again] {
            node.asks(&["stopp", pod])?;
        }
        let dels = calls(node, "DEL")?;
        let pods: Vec<_> = dels
            .iter()
            .map(|del| del.variable("CNI_CONTAINERID"))
            .collect();
        ensure_eq!(
            pods,
            [Some(plugged.as_str())],
            "the pods for which DEL was called"
        );
        Ok(())
    })
}

fn nothing_is_left_behind_if_the_server_is_killed_during_add_or_del() -> Result {
    on_a_node(|node| {
        install(node, &["first", "second"], "auto", "")?;
        configure(node, "10-a.conflist", "1.0.0", &["first", "second"])?;
        // Each plugin first sleeps for a random time. In ADD, the plugin then creates a file. In
        // DEL, the plugin then removes this file.
        let files = node.join("made");
        fs::create_dir(&files)?;
        let file = format!("{}/$CNI_CONTAINERID-$kind", files.display());
        let mut dice = Dice::new();
        for round in 0..rounds(6, 200) {
            // A child of the plugin creates the file. Therefore, the file can appear after the
            // death of the server.
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
                wait_for("`crictl runp` to exit", || {
                    Ok((!client.lives()).then_some(()))
                })?;
                client = node.crictl(&["rmp", "--all", "--force"]).start()?;
                std::thread::sleep(Duration::from_millis(dice.below(300)));
            }
            node.kill_server()?;
            drop(client);
            node.start_server()?;
            node.asks(&["rmp", "--all", "--force"])?;
            wait_for(
                "the plugins' files and the pods' network namespaces to be removed",
                || {
                    let left = fs::read_dir(&files)?.count()
                        + fs::read_dir(node.join("state/netns"))?.count();
                    Ok((left == 0).then_some(()))
                },
            )
            .map_err(|error| {
                format!(
                    "seed {} of the random times, round {round}; the failure: {error:?}",
                    dice.seed
                )
            })?;
        }
        // Plugins that are still running would create their files during this pause.
        std::thread::sleep(Duration::from_millis(300));
        ensure_eq!(
            fs::read_dir(&files)?.count(),
            0,
            "the number of files that the plugins left behind"
        );
        wait_for_dels(node)
    })
}

fn del_is_called_without_a_network_namespace_after_a_reboot() -> Result {
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
        wait_for_dels(node)?;
        let dels = calls(node, "DEL")?;
        ensure_eq!(
            dels.last().and_then(|del| del.variable("CNI_NETNS")),
            Some(""),
            "the variable CNI_NETNS in a DEL call after a reboot"
        );
        Ok(())
    })
}
