//! Measures each CRI call in the life cycle of a pod.

use std::path::Path;

use serde_json::{Value, json};

use crate::Result;
use crate::cri::{CriOptions, EXITS_ON_SIGTERM, Network, Server, cpu_of_others, pod_config, timed};
use crate::report::{self, Comparison};

const CALLS: &[&str] = &[
    "RunPodSandbox",
    "CreateContainer",
    "StartContainer",
    "StopContainer",
    "RemoveContainer",
    "StopPodSandbox",
    "RemovePodSandbox",
    "all calls",
    "CPU of the node, including an exec",
];

pub(crate) async fn run(
    options: &CriOptions,
    servers: &mut [Server],
    results: &Path,
) -> Result<(Value, Vec<String>)> {
    let mut raw = json!({});
    let mut skipped = Vec::new();
    for (network, title) in [
        (
            Network::Node,
            "a pod with the node's network, from creation to removal (our own client; milliseconds)",
        ),
        (
            Network::Own,
            "a pod with its own network, from creation to removal (our own client; milliseconds)",
        ),
    ] {
        let names: Vec<String> = servers.iter().map(|server| server.name.clone()).collect();
        let mut comparison = Comparison::new(title, &names, CALLS);
        let mut failed = vec![false; servers.len()];
        for round in 0..options.rounds + 2 {
            for (server, out) in servers
                .iter_mut()
                .zip(&mut failed)
                .filter(|(_, out)| !**out)
            {
                match life_cycle(server, network, &options.image).await {
                    // The figures of the first two rounds are ignored, because these rounds load
                    // files into memory.
                    Ok(times) if round >= 2 => comparison.add(&server.name, &times),
                    Ok(_) => {}
                    Err(error) => {
                        skipped.push(format!("{} {network:?} network: {error}", server.name));
                        *out = true;
                    }
                }
            }
        }
        report::show(results, &comparison.table())?;
        if let Some(raw) = raw.as_object_mut() {
            raw.insert(format!("{network:?}").to_lowercase(), comparison.raw());
        }
    }
    Ok((raw, skipped))
}

async fn life_cycle(server: &mut Server, network: Network, image: &str) -> Result<Vec<f64>> {
    let config = pod_config(network)?;
    let cpu = cpu_of_others()?;
    let (run, pod) = timed(server.run_pod(&config)).await?;
    let (create, container) = timed(server.create(&pod, &config, image, EXITS_ON_SIGTERM)).await?;
    let (start, ()) = timed(server.start(&container)).await?;
    // During this exec, the container's program has enough time to install its signal handler. The
    // program then exits immediately when the server stops the container.
    server.exec(&container, &["true"]).await?;
    let (stop, ()) = timed(server.stop(&container)).await?;
    let (remove, ()) = timed(server.remove(&container)).await?;
    let (stop_pod, ()) = timed(server.stop_pod(&pod)).await?;
    let (remove_pod, ()) = timed(server.remove_pod(&pod)).await?;
    let cpu = cpu_of_others()? - cpu;
    std::fs::remove_dir_all(&config.log_directory)?;
    let mut times = vec![run, create, start, stop, remove, stop_pod, remove_pod];
    times.push(times.iter().sum());
    times.push(cpu);
    Ok(times)
}
