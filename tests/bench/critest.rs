//! Runs critest's own benchmark, whose pods have their own network.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::Result;
use crate::cri::{CriOptions, Server};
use crate::report::{self, Comparison};

/// The files that critest writes, each with its operations. For each operation, the list contains
/// critest's name and the name of the CRI call.
const FILES: &[(&str, &[(&str, &str)])] = &[
    (
        "pod_benchmark_data.json",
        &[
            ("CreatePod", "RunPodSandbox"),
            ("StatusPod", "PodSandboxStatus"),
            ("StopPod", "StopPodSandbox"),
            ("RemovePod", "RemovePodSandbox"),
        ],
    ),
    (
        "container_benchmark_data.json",
        &[
            ("CreateContainer", "CreateContainer"),
            ("StartContainer", "StartContainer"),
            ("StatusContainer", "ContainerStatus"),
            ("StopContainer", "StopContainer"),
            ("RemoveContainer", "RemoveContainer"),
        ],
    ),
];

/// The number of times that critest measures each server.
const TURNS: usize = 3;

pub(crate) async fn run(
    options: &CriOptions,
    servers: &[Server],
    results: &Path,
) -> Result<(Value, Vec<String>)> {
    let parameters = results.join("critest-parameters.yaml");
    let each = options.rounds.div_ceil(TURNS);
    fs::write(
        &parameters,
        format!(
            "podsNumber: {each}\npodsNumberParallel: 1\n\
             containersNumber: {each}\ncontainersNumberParallel: 1\n\
             podBenchmarkTimeoutSeconds: 120\ncontainerBenchmarkTimeoutSeconds: 120\n\
             podContainerStartBenchmarkTimeoutSeconds: 120\n"
        ),
    )?;
    let names: Vec<String> = servers.iter().map(|server| server.name.clone()).collect();
    let calls: Vec<&str> = FILES
        .iter()
        .flat_map(|(_, calls)| calls.iter().map(|call| call.1))
        .collect();
    let title = format!(
        "critest -benchmark, {} pods and as many containers for each server (milliseconds)",
        each * TURNS
    );
    let mut comparison = Comparison::new(title, &names, &calls);
    let mut skipped = Vec::new();
    for turn in 1..=TURNS {
        for server in servers {
            let directory = results.join(format!("critest-{}-{turn}", server.name));
            let _ = fs::remove_dir_all(&directory);
            fs::create_dir_all(&directory)?;
            if let Err(error) = once(server, &parameters, &directory) {
                skipped.push(format!("{} critest: {error}", server.name));
            }
            for (file, calls) in FILES {
                if let Ok(text) = fs::read(directory.join(file)) {
                    add(
                        &mut comparison,
                        &server.name,
                        &serde_json::from_slice(&text)?,
                        calls,
                    );
                }
            }
        }
    }
    report::show(results, &comparison.table())?;
    Ok((
        json!({ "calls": comparison.raw(), "turns": TURNS }),
        skipped,
    ))
}

fn once(server: &Server, parameters: &Path, directory: &Path) -> Result {
    let log = directory.join("log");
    let status = Command::new("critest")
        .arg("-benchmark")
        .arg(format!("-runtime-endpoint={}", server.address))
        .arg(format!("-image-endpoint={}", server.address))
        .arg(format!(
            "-benchmarking-params-file={}",
            parameters.display()
        ))
        .arg(format!("-benchmarking-output-dir={}", directory.display()))
        // The image benchmarks need parameters and images that this benchmark does not have.
        .arg("-ginkgo.skip=Image")
        .arg("-ginkgo.no-color")
        .stdin(Stdio::null())
        .stdout(fs::File::create(&log)?)
        .stderr(fs::OpenOptions::new().append(true).open(&log)?)
        .status()
        .map_err(|error| format!("cannot start critest: {error}"))?;
    if status.success() {
        Ok(())
    } else {
        Err(format!(
            "critest failed with {status}; its output is in the file {}",
            log.display()
        )
        .into())
    }
}

/// Adds the figures of one file to the comparison.
fn add(comparison: &mut Comparison, server: &str, file: &Value, calls: &[(&str, &str)]) {
    let operations: Vec<&str> = file
        .get("operationsNames")
        .and_then(Value::as_array)
        .map(|names| names.iter().filter_map(Value::as_str).collect())
        .unwrap_or_default();
    let points = file.get("datapoints").and_then(Value::as_array);
    for point in points.into_iter().flatten() {
        let durations = point.get("operationsDurationsNs").and_then(Value::as_array);
        for (operation, duration) in operations.iter().zip(durations.into_iter().flatten()) {
            let call = calls.iter().find(|(theirs, _)| theirs == operation);
            if let Some(((_, call), duration)) = call.zip(duration.as_f64()) {
                comparison.add_one(server, call, duration / 1e6);
            }
        }
    }
}
