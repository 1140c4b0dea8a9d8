//! Measures ExecSync of `true`. kubelet's exec probes cause many such calls each second.

use std::path::Path;

use serde_json::Value;

use crate::Result;
use crate::cri::{CriOptions, Network, SLEEP, Server, cpu_of_others, timed};
use crate::report::{self, Comparison};

/// The number of consecutive calls whose CPU time is measured together.
const BATCH: usize = 10;

pub(crate) async fn run(
    options: &CriOptions,
    servers: &mut [Server],
    results: &Path,
) -> Result<(Value, Vec<String>)> {
    let names: Vec<String> = servers.iter().map(|server| server.name.clone()).collect();
    let title = "ExecSync of `true` (milliseconds)";
    let mut comparison = Comparison::new(title, &names, &["wall", "CPU of the node"]);
    let mut skipped = Vec::new();
    let mut pods = Vec::new();
    for server in servers.iter_mut() {
        pods.push(
            match server.start_pod(Network::Node, &options.image, SLEEP).await {
                Ok(pod) => Some(pod),
                Err(error) => {
                    skipped.push(format!("{} ExecSync: {error}", server.name));
                    None
                }
            },
        );
    }
    for round in 0..options.rounds.div_ceil(BATCH).max(5) + 1 {
        for (server, pod) in servers.iter_mut().zip(&mut pods) {
            let Some(running) = pod else { continue };
            match batch(server, &running.container).await {
                Ok(measured) if round > 0 => {
                    measured
                        .iter()
                        .for_each(|times| comparison.add(&server.name, times));
                }
                Ok(_) => {}
                Err(error) => {
                    skipped.push(format!("{} ExecSync: {error}", server.name));
                    let _ = server.end_pod(running).await;
                    *pod = None;
                }
            }
        }
    }
    for (server, pod) in servers.iter_mut().zip(&pods) {
        if let Some(pod) = pod {
            server.end_pod(pod).await?;
        }
    }
    report::show(results, &comparison.table())?;
    Ok((comparison.raw(), skipped))
}

async fn batch(server: &mut Server, container: &str) -> Result<Vec<Vec<f64>>> {
    let mut walls = Vec::new();
    let cpu = cpu_of_others()?;
    for _ in 0..BATCH {
        walls.push(timed(server.exec(container, &["true"])).await?.0);
    }
    let cpu = (cpu_of_others()? - cpu) / BATCH as f64;
    Ok(walls.into_iter().map(|wall| vec![wall, cpu]).collect())
}
