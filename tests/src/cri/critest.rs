//! Runs critest, the conformance suite of the CRI. Every critest test that can run on this machine
//! must pass. The module `cri::streaming` runs critest's streaming tests over WebSocket.

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
        every_critest_test_passes_on_the_embedded_network,
        CRITEST,
        Need::RrunCri,
        Need::NativeOrLong,
        A_NODE,
    ),
    test!(
        every_critest_test_passes_on_a_bridge_of_cni_plugins,
        CRITEST,
        Need::NativeOrLong,
        A_NODE,
        PLUGINS,
        FIREWALL,
    ),
    test!(
        the_apparmor_and_oom_tests_of_critest_pass_in_the_guest,
        CRITEST,
        Need::OwnMachine,
        Need::Controller(MEMORY),
        APPARMOR,
        SUDO,
        A_NODE,
    ),
];

/// critest loads its AppArmor profiles through sudo.
const SUDO: Need = Need::Program("sudo");

/// The critest tests that are skipped. Each entry contains a part of the test's name, the reason
/// for the skip, and optionally a cgroup controller. If an entry names a controller, the test is
/// skipped only on a node without this controller.
const SKIPPED: &[(&str, &str, Option<&str>)] = &[
    (
        "public image with digest should be pulled and removed",
        "the test pulls an image by a digest that exists only on registry.k8s.io",
        None,
    ),
    (
        "should terminate with exitCode 137 and reason OOMKilled",
        "the cgroup v2 controller memory is missing",
        Some(MEMORY),
    ),
];

/// A pattern for the critest tests that need AppArmor or a memory limit.
const GUEST_TESTS: &str = "AppArmor|OOM";

fn every_critest_test_passes_on_the_embedded_network() -> Result {
    on_a_node(|node| critest(node, "the embedded network", None))
}

fn every_critest_test_passes_on_a_bridge_of_cni_plugins() -> Result {
    let result = on_a_node(|node| {
        node.has_cni_bridge()?;
        critest(node, "a bridge of CNI plugins", None)
    });
    tidy();
    result
}

fn the_apparmor_and_oom_tests_of_critest_pass_in_the_guest() -> Result {
    on_a_node(|node| critest(node, "the embedded network", Some(GUEST_TESTS)))
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

/// Runs all critest tests, or only the tests that match `focus`. Prints the numbers of tests that
/// passed, failed or did not run. For each test that did not run, also prints the reason.
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
    let results: Value = serde_json::from_str(&text)?;
    let specs = results
        .pointer("/0/SpecReports")
        .and_then(Value::as_array)
        .ok_or("critest's JSON report has no SpecReports")?;
    let (mut passed, mut failed, mut not_run) = (0, Vec::new(), Vec::new());
    for spec in specs.iter().filter(|spec| spec["LeafNodeType"] == "It") {
        let name = name_of(spec);
        let message = spec.pointer("/Failure/Message").and_then(Value::as_str);
        match spec["State"].as_str().unwrap_or_default() {
            "passed" => passed += 1,
            "skipped" => {
                // critest skips the tests that do not match `focus`, and reports no reason for
                // these skips. Therefore, if `focus` is set, a skipped test counts as not run only
                // if critest reports a reason.
                let listed = skips().into_iter().find(|(part, _)| name.contains(part));
                let listed = listed.filter(|_| focus.is_none());
                if let Some(reason) = listed.map(|(_, reason)| reason).or(message) {
                    not_run.push((name, reason.to_owned()));
                }
            }
            state => failed.push(format!("{name}: {state}: {}", message.unwrap_or_default())),
        }
    }
    let of = focus.map_or(String::new(), |focus| format!(", only {focus}"));
    note(format!(
        "critest on {network}{of}: {passed} passed, {} failed, {} not run, in {:.0} s",
        failed.len(),
        not_run.len(),
        output.took.as_secs_f64()
    ));
    for (name, reason) in &not_run {
        note(format!("critest did not run the test \"{name}\": {reason}"));
    }
    // critest reports the reason for some failures only in its warnings.
    let warned = output.stdout.lines().chain(output.stderr.lines());
    let warned: BTreeSet<&str> = warned
        .filter_map(|line| line.split_once("level=warning").map(|(_, text)| text))
        .collect();
    // If `focus` is set, critest runs in the guest machine. The guest machine has everything that
    // the selected tests need. critest must therefore not skip any of these tests.
    let skipped_in_focus = focus.is_some() && !not_run.is_empty();
    ensure!(
        failed.is_empty() && output.code == 0 && passed > 0 && !skipped_in_focus,
        "critest exited with {}, {passed} tests passed, {} failed, {} did not run:\n{}\ncritest's warnings: {warned:?}\n{}",
        output.code,
        failed.len(),
        not_run.len(),
        failed.join("\n"),
        tail(&output.stdout, 2000)
    );
    Ok(())
}

/// The node's host name and the content of /etc/hosts. Dropping this value restores the host name
/// and /etc/hosts. One critest test runs a pod on the node's network and changes the node's host
/// name. Later tests call sudo. If the host name is not in /etc/hosts, sudo prints a warning.
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
