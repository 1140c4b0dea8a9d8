//! critest, the CRI's own conformance suite: whatever it can ask of this machine passes. Its streams
//! over WebSockets are `cri_streaming`'s.

use std::fs;
use std::time::Duration;

use serde_json::Value;

use crate::machine::{Result, command, note, tail};
use crate::needs::{Need, Test};
use crate::node::{CRICTL, IMAGES, Node, REGISTRY, SERVER, on_a_node};
use crate::{ensure, test};

pub const TESTS: &[Test] = &[test!(
    every_test_of_critest_passes,
    Need::Program("critest"),
    Need::NativeOrLong,
    CRICTL,
    SERVER,
    REGISTRY,
    IMAGES,
)];

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
        Some("memory"),
    ),
];

/// Three minutes with containerd on an idle machine, fifteen under emulation.
const PATIENCE: Duration = Duration::from_secs(2400);

fn every_test_of_critest_passes() -> Result {
    on_a_node(|node| critest(node))
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

/// Runs it, and tells how many passed and what was not run, for which reason.
fn critest(node: &Node) -> Result {
    let endpoint = format!("unix://{}", node.socket().display());
    let report = node.join("critest.json");
    let mut critest = command("critest", ["-ginkgo.no-color"])
        .arg(format!("-runtime-endpoint={endpoint}"))
        .arg(format!("-image-endpoint={endpoint}"))
        .arg(format!("-ginkgo.json-report={}", report.display()))
        .within(PATIENCE);
    for (name, _) in skips() {
        critest = critest.arg(format!("-ginkgo.skip={name}"));
    }
    let output = critest.end()?;
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
                let listed = skips().into_iter().find(|(part, _)| name.contains(part));
                if let Some(reason) = listed.map(|(_, reason)| reason).or(said) {
                    not_run.push(format!("critest did not run: {name}: {reason}"));
                }
            }
            state => failed.push(format!("{name}: {state}: {}", said.unwrap_or_default())),
        }
    }
    note(format!(
        "critest: {passed} passed, {} failed, {} not run, in {:.0} s",
        failed.len(),
        not_run.len(),
        output.took.as_secs_f64()
    ));
    not_run.into_iter().for_each(note);
    ensure!(
        failed.is_empty() && output.code == 0 && passed > 0,
        "critest ended with {}, {passed} passed, {} failed:\n{}\n{}",
        output.code,
        failed.len(),
        failed.join("\n"),
        tail(&output.stdout, 2000)
    );
    Ok(())
}

fn name_of(spec: &Value) -> String {
    let texts = spec["ContainerHierarchyTexts"].as_array();
    let texts = texts.into_iter().flatten().filter_map(Value::as_str);
    let leaf = spec["LeafNodeText"].as_str().unwrap_or_default();
    texts.chain([leaf]).collect::<Vec<_>>().join(" ")
}
