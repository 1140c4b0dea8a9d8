//! kubelet and a real application: three replicas of a Flask service as static pods, with all that
//! such pods can have, from their manifests to their removal.

use std::fs;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::application::{
    answer_shows_what_it_was_given, answers, replica, tells, write_config,
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
    a_busy_loop_is_held_to_its_limit, a_resize_in_place_takes_effect,
    allocations_are_oomkilled_and_backed_off, limits_are_as_kubelet_means_them, restarted,
    statistics_are_plausible, there_is_no_swap_for_a_critical_pod,
};
use logs::no_line_is_lost_by_rotation;
use streams::{events_come, exec, streams_go_through_kubelet};

mod limits;
mod logs;
mod streams;

pub(crate) const TESTS: &[Test] = &[
    test!(
        three_replicas_from_their_manifests_to_their_removal,
        Need::Long,
        COUNTED,
        KUBELET,
    ),
    test!(
        the_same_on_a_node_that_counts_nothing,
        Need::Native,
        KUBELET
    ),
    test!(
        the_same_under_an_older_kubelet_and_by_events,
        Need::Long,
        COUNTED,
        Need::Program(OLDER),
        A_NODE,
    ),
];

/// The kubelet of an older minor that is still supported.
const OLDER: &str = "/tools/kubelet-old/kubelet";

/// As a node's configuration has it.
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

/// The 1.36 kubelet protects memory only if told so; the older one does not know the key.
const RESERVATION: &str = "memoryReservationPolicy: TieredReservation\n";

fn three_replicas_from_their_manifests_to_their_removal() -> Result {
    let config = CONFIG.replace("EVENTED", "false") + RESERVATION;
    story(
        Options {
            config: &config,
            ..Options::default()
        },
        Some("memory.low"),
    )
}

/// All but the limits: twenty times quicker than in the guest.
fn the_same_on_a_node_that_counts_nothing() -> Result {
    let config = CONFIG
        .replace("EVENTED", "true")
        .replace("MemoryQoS: true, ", "")
        + UNCOUNTED;
    story(
        Options {
            config: &config,
            ..Options::default()
        },
        None,
    )
}

fn the_same_under_an_older_kubelet_and_by_events() -> Result {
    let config = CONFIG.replace("EVENTED", "true");
    story(
        Options {
            program: Some(OLDER),
            config: &config,
            ..Options::default()
        },
        Some("memory.min"),
    )
}

/// `protection`: where this kubelet puts the memory request, if anything counts memory at all.
fn story(options: Options, protection: Option<&str>) -> Result {
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
            "three replicas were Ready {:.1} s after their manifests, the images' pull included",
            started.elapsed().as_secs_f64()
        ));
        for (pod, number) in pods.iter().zip(1..) {
            answer_shows_what_it_was_given(pod, number)?;
        }
        if options.config.contains("EventedPLEG: true") {
            events_come(&kubelet)?;
        }
        streams_go_through_kubelet(&pods[0])?;
        if let Some(protection) = protection {
            limits_are_as_kubelet_means_them(node, &pods, protection)?;
            there_is_no_swap_for_a_critical_pod(node, &pods)?;
            a_resize_in_place_takes_effect(node, &pods[0])?;
            a_busy_loop_is_held_to_its_limit(node, &pods[0])?;
            statistics_are_plausible(&kubelet)?;
            allocations_are_oomkilled_and_backed_off(&kubelet, &pods[1])?;
        }
        a_failed_probe_takes_out_and_restarts(&kubelet, &pods[2])?;
        no_line_is_lost_by_rotation(&pods[0])?;
        restarts_go_unnoticed(node, &kubelet)?;
        all_come_again_after_a_reboot(node, &kubelet)?;
        let started = Instant::now();
        kubelet.removes(node, &manifests)?;
        note(format!(
            "everything of the pods was gone {:.1} s after their manifests",
            started.elapsed().as_secs_f64()
        ));
        for number in 1..=3 {
            let told = fs::read_to_string(node.join("host").join(format!("app-{number}.stopped")));
            ensure_eq!(
                told?,
                "stopped\n",
                "what the preStop hook of app-{number} left"
            );
        }
        Ok(())
    })
}

/// The third replica fails its readiness, which takes it out; then its liveness, which restarts it.
fn a_failed_probe_takes_out_and_restarts(kubelet: &Kubelet, pod: &Value) -> Result {
    tells(pod, "/fail/ready")?;
    wait_within(
        KUBELET_TIMEOUT,
        "the failing replica to be not Ready",
        || {
            let now = kubelet.pod(pod)?;
            ensure_eq!(
                container_status(&now, "web")?["restartCount"],
                0,
                "restarts"
            );
            Ok((!is_ready(&now)).then_some(()))
        },
    )?;
    exec(pod, "web", &["rm", "/shared/alive"], b"")?;
    let web = restarted(kubelet, pod, 1)?;
    // Python ends by itself when told to.
    ensure_eq!(web["lastState"]["terminated"]["exitCode"], 0, "{web}");
    for pod in &kubelet.ready(3)? {
        answers(pod)?;
        let neighbour = container_status(pod, "neighbour")?;
        ensure_eq!(neighbour["restartCount"], 0, "the neighbour's restarts");
    }
    Ok(())
}

fn restarts_go_unnoticed(node: &mut Node, kubelet: &Kubelet) -> Result {
    let pods = kubelet.ready(3)?;
    let before = lives(node, &pods)?;

    node.kill_server()?;
    // The web servers answer while there is nobody to ask about them.
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
        "containers, processes and restarts"
    );
    // Probes and all, for some rounds more.
    std::thread::sleep(Duration::from_secs(12).min(deadline()));
    let pods = kubelet.ready(3)?;
    ensure_eq!(
        lives(node, &pods)?,
        before,
        "containers, processes and restarts a little later"
    );
    for pod in &pods {
        answers(pod)?;
    }
    Ok(())
}

/// What was on disk is all that is left: every container is another one, in a pod that is another one.
fn all_come_again_after_a_reboot(node: &mut Node, kubelet: &Kubelet) -> Result {
    let before = lives(node, &kubelet.ready(3)?)?;
    kubelet.stop()?;
    reboot(node)?;
    kubelet.begin()?;
    let again = wait_within(KUBELET_TIMEOUT, "every container to be another one", || {
        let pods = kubelet.ready(3)?;
        let now = lives(node, &pods)?;
        ensure_eq!(now.len(), before.len(), "containers");
        let old = now
            .iter()
            .find(|(id, ..)| before.iter().any(|(old, ..)| old == id));
        ensure!(old.is_none(), "{old:?} was there before");
        Ok(Some(pods))
    })?;
    for (pod, number) in again.iter().zip(1..) {
        answer_shows_what_it_was_given(pod, number)?;
    }
    Ok(())
}
