//! critest, the CRI's own conformance suite: whatever it can ask of this machine passes. Its streams
//! over WebSockets are `cri::streaming`'s.

use std::collections::BTreeSet;
use std::fs;

use serde_json::Value;

use crate::support::cni::{FIREWALL, PLUGINS, tidy};
use crate::support::critest::{CRITEST, CRITEST_TIMEOUT};
use crate::support::machine::{Result, command, note, tail};
use crate::support::needs::{APPARMOR, Need, Test};
use crate::support::node::{A_NODE, Node, on_a_node};
use crate::{ensure, test};

const MEMORY: &str = "memory";

pub(crate) const TESTS: &[Test] = &[
    test!(
        every_test_passes_on_the_embedded_network,
        CRITEST,
        Need::RrunCri,
        Need::NativeOrLong,
        A_NODE,
    ),
    test!(
        every_test_passes_on_a_bridge_of_cni_plugins,
        CRITEST,
        Need::NativeOrLong,
        A_NODE,
        PLUGINS,
        FIREWALL,
    ),
    test!(
        what_this_machine_s_own_kernel_can_not_show_passes_in_the_guest,
        CRITEST,
        Need::OwnMachine,
        Need::Controller(MEMORY),
        APPARMOR,
        SUDO,
        A_NODE,
    ),
];

/// By which critest loads its AppArmor profiles.
const SUDO: Need = Need::Program("sudo");

/// What is not run: a part of the test's name, why, and the controller without which alone it is so.
const SKIPPED: &[(&str, &str, Option<&str>)] = &[
    (
        "public image with digest should be pulled and removed",
        "it names an image by a digest that only registry.k8s.io's own copy has",
        None,
    ),
    (
        "should terminate with exitCode 137 and reason OOMKilled",
        "no cgroup v2 controller memory here",
        Some(MEMORY),
    ),
];

/// What wants AppArmor or a memory limit.
const OF_A_WHOLE_MACHINE: &str = "AppArmor|OOM";

fn every_test_passes_on_the_embedded_network() -> Result {
    on_a_node(|node| critest(node, "the embedded network", None))
}

fn every_test_passes_on_a_bridge_of_cni_plugins() -> Result {
    let result = on_a_node(|node| {
        node.has_cni_bridge()?;
        critest(node, "a bridge of CNI plugins", None)
    });
    tidy();
    result
}

fn what_this_machine_s_own_kernel_can_not_show_passes_in_the_guest() -> Result {
    on_a_node(|node| critest(node, "the embedded network", Some(OF_A_WHOLE_MACHINE)))
}

fn skips() -> Vec<(&'static str, &'static str)> {
    SKIPPED
        .iter()
        .filter(|(_, _, controller)| {
            controller.is_none_or(|name| Need::Controller(name).lacking().is_some())
        })
        .map(|(name, reason, _)| (*name, *reason))
        .collect()
}

/// Runs it, or of it what `focus` names, and tells how many passed and what was not run, for which
/// reason.
fn critest(node: &Node, network: &str, focus: Option<&str>) -> Result {
    let endpoint = format!("unix://{}", node.socket().display());
    let report = node.join("critest.json");
    let mut critest = command("critest", ["-ginkgo.no-color"])
        .arg(format!("-runtime-endpoint={endpoint}"))
        .arg(format!("-image-endpoint={endpoint}"))
        .arg(format!("-ginkgo.json-report={}", report.display()))
        .args(focus.map(|focus| format!("-ginkgo.focus={focus}")))
        .within(CRITEST_TIMEOUT);
    for (name, _) in skips() {
        critest = critest.arg(format!("-ginkgo.skip={name}"));
    }
    let host = Host::open()?;
    let output = critest.end()?;
    drop(host);
    let text = fs::read_to_string(&report)
        .map_err(|error| format!("{}: {error}\n{}", report.display(), output.told()))?;
    let told: Value = serde_json::from_str(&text)?;
    let specs = told
        .pointer("/0/SpecReports")
        .and_then(Value::as_array)
        .ok_or("no SpecReports")?;
    let (mut passed, mut failed, mut not_run) = (0, Vec::new(), Vec::new());
    for spec in specs.iter().filter(|spec| spec["LeafNodeType"] == "It") {
        let name = name_of(spec);
        let said = spec.pointer("/Failure/Message").and_then(Value::as_str);
        match spec["State"].as_str().unwrap_or_default() {
            "passed" => passed += 1,
            "skipped" => {
                // What the focus leaves out is not told.
                let listed = skips().into_iter().find(|(part, _)| name.contains(part));
                let listed = listed.filter(|_| focus.is_none());
                if let Some(reason) = listed.map(|(_, reason)| reason).or(said) {
                    not_run.push((name, reason.to_owned()));
                }
            }
            state => failed.push(format!("{name}: {state}: {}", said.unwrap_or_default())),
        }
    }
    let of = focus.map_or(String::new(), |focus| format!(", {focus} alone"));
    note(format!(
        "critest on {network}{of}: {passed} passed, {} failed, {} not run, in {:.0} s",
        failed.len(),
        not_run.len(),
        output.took.as_secs_f64()
    ));
    for (name, reason) in &not_run {
        note(format!("critest did not run: {name}: {reason}"));
    }
    // Of some failures it tells the reason here alone.
    let warned = output.stdout.lines().chain(output.stderr.lines());
    let warned: BTreeSet<&str> = warned
        .filter_map(|line| line.split_once("level=warning").map(|(_, text)| text))
        .collect();
    // Whatever it would take to skip here is there.
    let unasked = focus.is_some() && !not_run.is_empty();
    ensure!(
        failed.is_empty() && output.code == 0 && passed > 0 && !unasked,
        "critest ended with {}, {passed} passed, {} failed, {} not run:\n{}\nit warned: {warned:?}\n{}",
        output.code,
        failed.len(),
        not_run.len(),
        failed.join("\n"),
        tail(&output.stdout, 2000)
    );
    Ok(())
}

/// One test names the node anew, from a pod of the node's own network. sudo, which others call
/// after it, complains of a name that is not in the hosts' table.
struct Host {
    name: String,
    hosts: String,
}

impl Host {
    const NAME: &str = "/proc/sys/kernel/hostname";
    const HOSTS: &str = "/etc/hosts";

    fn open() -> Result<Self> {
        let name = fs::read_to_string(Self::NAME)?.trim_end().to_owned();
        let hosts = fs::read_to_string(Self::HOSTS)?;
        fs::write(Self::HOSTS, format!("{hosts}127.0.1.1 ANewHostName\n"))?;
        Ok(Host { name, hosts })
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = fs::write(Self::NAME, &self.name);
        let _ = fs::write(Self::HOSTS, &self.hosts);
    }
}

fn name_of(spec: &Value) -> String {
    let texts = spec["ContainerHierarchyTexts"].as_array();
    let texts = texts.into_iter().flatten().filter_map(Value::as_str);
    let leaf = spec["LeafNodeText"].as_str().unwrap_or_default();
    texts.chain([leaf]).collect::<Vec<_>>().join(" ")
}
