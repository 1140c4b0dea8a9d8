//! Tests of a real application under kubelet: three replicas of a Flask service as static pods. The
//! pods use all features that the pods of a web application usually use.

use std::fs;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::application::{
    answer_shows_the_manifests_values, answers, replica, tells, write_config,
};
use crate::support::kubelet::{
    COUNTED, KUBELET, KUBELET_TIMEOUT, Kubelet, Options, UNCOUNTED, container_status, is_ready,
    lives, without_limits,
};
use crate::support::machine::{Result, deadline, note, wait_within};
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, Node, on_a_node};
use crate::support::reboot::reboot;
use crate::support::swap::Swap;
use crate::{ensure, ensure_eq, test};
use limits::{
    a_busy_loop_uses_no_more_cpu_time_than_its_limit, a_critical_pod_gets_no_swap,
    a_resize_in_place_takes_effect, large_allocations_cause_oom_kills_and_a_back_off,
    limits_in_the_cgroups_match_the_pod_manifests_and_the_kubelet_configuration, restarted,
    statistics_are_plausible,
};
use logs::rotation_loses_no_line;
use streams::{exec, kubelet_receives_events, streams_work_through_kubelet};

mod limits;
mod logs;
mod streams;

pub(crate) const TESTS: &[Test] = &[
    test!(
        three_replicas_run_until_their_manifests_are_removed,
        Need::Long,
        COUNTED,
        KUBELET,
    ),
    test!(
        three_replicas_run_on_a_node_without_resource_limits,
        Need::Native,
        KUBELET
    ),
    test!(
        three_replicas_run_under_an_older_kubelet_with_events,
        Need::Long,
        COUNTED,
        Need::Program(OLDER),
        A_NODE,
    ),
];

/// The path of an older kubelet. Kubernetes still supports the minor version of this kubelet.
const OLDER: &str = "/tools/kubelet-old/kubelet";

/// The kubelet configuration, which is like the configuration of a real node. Each test replaces
/// EVENTED with `true` or `false`.
const CONFIG: &str = "\
featureGates: {PodAndContainerStatsFromCRI: true, MemoryQoS: true, EventedPLEG: EVENTED}
memoryThrottlingFactor: 0.9
memorySwap: {swapBehavior: LimitedSwap}
seccompDefault: true
shutdownGracePeriod: 10s
shutdownGracePeriodCriticalPods: 5s
containerLogMaxSize: 64Ki
containerLogMaxFiles: 40
containerLogMonitorInterval: 3s
";

/// kubelet 1.36 protects the requested memory in the cgroups only with this setting. The older
/// kubelet that another test runs does not support the key memoryReservationPolicy.
const RESERVATION: &str = "memoryReservationPolicy: TieredReservation\n";

fn three_replicas_run_until_their_manifests_are_removed() -> Result {
    let config = CONFIG.replace("EVENTED", "false") + RESERVATION;
    run_replicas(
        Options {
            config: &config,
            ..Options::default()
        },
        Some("memory.low"),
    )
}

/// This test checks everything except the resource limits. tests/native/run executes the test on
/// the machine's own kernel. There the test is twenty times faster than in the virtual machine.
fn three_replicas_run_on_a_node_without_resource_limits() -> Result {
    let config = CONFIG
        .replace("EVENTED", "true")
        .replace("MemoryQoS: true, ", "")
        + UNCOUNTED;
    run_replicas(
        Options {
            config: &config,
            ..Options::default()
        },
        None,
    )
}

fn three_replicas_run_under_an_older_kubelet_with_events() -> Result {
    let config = CONFIG.replace("EVENTED", "true");
    run_replicas(
        Options {
            program: Some(OLDER),
            config: &config,
            ..Options::default()
        },
        Some("memory.min"),
    )
}

/// Runs the replicas until their manifests are removed. `protection` is the name of the cgroup file
/// to which this kubelet writes the memory request. On a node without the memory controller,
/// `protection` is `None`.
fn run_replicas(options: Options, protection: Option<&str>) -> Result {
    on_a_node(|node| {
        if protection.is_none() {
            without_limits(node)?;
        }
        let _swap = protection.map(|_| Swap::on()).transpose()?;
        let kubelet = Kubelet::start(node, options)?;
        let mut manifests: Vec<Value> = (1..=3).map(|number| replica(node, number)).collect();
        if protection.is_none() {
            for pod in &mut manifests {
                pod["spec"]["containers"][0]["resources"] = json!({});
            }
        }
        write_config(node)?;
        let started = Instant::now();
        for pod in &manifests {
            kubelet.write_manifest(pod)?;
        }
        let pods = kubelet.ready(3)?;
        note(format!(
            "three replicas were Ready {:.1} s after their manifests were written (this includes the pull of the images)",
            started.elapsed().as_secs_f64()
        ));
        for (pod, number) in pods.iter().zip(1..) {
            answer_shows_the_manifests_values(pod, number)?;
        }
        if options.config.contains("EventedPLEG: true") {
            kubelet_receives_events(&kubelet)?;
        }
        streams_work_through_kubelet(&pods[0])?;
        if let Some(protection) = protection {
            limits_in_the_cgroups_match_the_pod_manifests_and_the_kubelet_configuration(
                node, &pods, protection,
            )?;
            a_critical_pod_gets_no_swap(node, &pods)?;
            a_resize_in_place_takes_effect(node, &pods[0])?;
            a_busy_loop_uses_no_more_cpu_time_than_its_limit(node, &pods[0])?;
            statistics_are_plausible(&kubelet)?;
            large_allocations_cause_oom_kills_and_a_back_off(&kubelet, &pods[1])?;
        }
        a_replica_whose_probes_fail_becomes_not_ready_and_is_then_restarted(&kubelet, &pods[2])?;
        rotation_loses_no_line(&pods[0])?;
        restarts_of_the_server_and_of_kubelet_affect_no_pod(node, &kubelet)?;
        all_pods_start_again_after_a_reboot(node, &kubelet)?;
        let started = Instant::now();
        kubelet.removes(node, &manifests)?;
        note(format!(
            "all pods were removed {:.1} s after the removal of their manifests",
            started.elapsed().as_secs_f64()
        ));
        for number in 1..=3 {
            let text = fs::read_to_string(node.join("host").join(format!("app-{number}.stopped")));
            ensure_eq!(
                text?,
                "stopped\n",
                "content of the file that the preStop hook of app-{number} wrote"
            );
        }
        Ok(())
    })
}

/// The replica first fails its readiness probe and becomes not Ready. The replica then fails its
/// liveness probe, and kubelet restarts the replica.
fn a_replica_whose_probes_fail_becomes_not_ready_and_is_then_restarted(
    kubelet: &Kubelet,
    pod: &Value,
) -> Result {
    tells(pod, "/fail/ready")?;
    wait_within(
        KUBELET_TIMEOUT,
        "the replica with the failing probe to become not Ready",
        || {
            let now = kubelet.pod(pod)?;
            ensure_eq!(
                container_status(&now, "web")?["restartCount"],
                0,
                "restart count of the replica that fails its readiness probe"
            );
            Ok((!is_ready(&now)).then_some(()))
        },
    )?;
    exec(pod, "web", &["rm", "/shared/alive"], b"")?;
    let web = restarted(kubelet, pod, 1)?;
    // Python exits with 0 on SIGTERM. So this exit code shows that kubelet did not have to kill the
    // container.
    ensure_eq!(
        web["lastState"]["terminated"]["exitCode"],
        0,
        "exit code of the container before its restart, in the container's status {web}"
    );
    for pod in &kubelet.ready(3)? {
        answers(pod)?;
        let neighbour = container_status(pod, "neighbour")?;
        ensure_eq!(
            neighbour["restartCount"],
            0,
            "restart count of the container `neighbour`"
        );
    }
    Ok(())
}

fn restarts_of_the_server_and_of_kubelet_affect_no_pod(
    node: &mut Node,
    kubelet: &Kubelet,
) -> Result {
    let pods = kubelet.ready(3)?;
    let before = lives(node, &pods)?;

    node.kill_server()?;
    // The web servers still answer while no CRI server runs.
    for pod in &pods {
        answers(pod)?;
    }
    node.start_server()?;
    kubelet.stop()?;
    node.terminate_server()?;
    node.start_server()?;
    kubelet.begin()?;

    let pods = kubelet.ready(3)?;
    ensure_eq!(
        lives(node, &pods)?,
        before,
        "container ids, process ids and restart counts of the replicas after the restarts"
    );
    // The test waits until the probes have run for some more rounds.
    std::thread::sleep(Duration::from_secs(12).min(deadline()));
    let pods = kubelet.ready(3)?;
    ensure_eq!(
        lives(node, &pods)?,
        before,
        "container ids, process ids and restart counts of the replicas after more rounds of probes"
    );
    for pod in &pods {
        answers(pod)?;
    }
    Ok(())
}

/// The reboot preserves only the data on disk, so kubelet must create every pod and every container
/// again.
fn all_pods_start_again_after_a_reboot(node: &mut Node, kubelet: &Kubelet) -> Result {
    let before = lives(node, &kubelet.ready(3)?)?;
    kubelet.stop()?;
    reboot(node)?;
    kubelet.begin()?;
    let again = wait_within(
        KUBELET_TIMEOUT,
        "kubelet to create every container again",
        || {
            let pods = kubelet.ready(3)?;
            let now = lives(node, &pods)?;
            ensure_eq!(
                now.len(),
                before.len(),
                "number of containers after the reboot"
            );
            let old = now
                .iter()
                .find(|(id, ..)| before.iter().any(|(old, ..)| old == id));
            ensure!(
                old.is_none(),
                "after the reboot, kubelet still reports this container from the time before the reboot: {old:?}"
            );
            Ok(Some(pods))
        },
    )?;
    for (pod, number) in again.iter().zip(1..) {
        answer_shows_the_manifests_values(pod, number)?;
    }
    Ok(())
}
