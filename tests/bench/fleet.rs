//! Measures a node full of pods. The figures are the time of list calls, the server's memory, and
//! the time from the server's restart to its first answer.

use std::path::Path;
use std::time::{Duration, Instant};

use rrun_proto::v1::{
    ListContainerStatsRequest, ListContainersRequest, ListPodSandboxRequest,
    ListPodSandboxStatsRequest,
};
use serde_json::Value;

use crate::Result;
use crate::cri::{CriOptions, Network, Pod, SLEEP, Server, call_error, timed};
use crate::memory;
use crate::report::{self, Comparison};
use crate::service::Service;

const QUANTITIES: &[&str] = &[
    "ListPodSandbox",
    "ListContainers",
    "ListContainerStats",
    "ListPodSandboxStats",
];

/// The number of measurements of each list call.
const ROUNDS: usize = 20;

pub(crate) async fn run(
    options: &CriOptions,
    servers: &mut [Server],
    services: &[Service],
    results: &Path,
) -> Result<(Value, Vec<String>)> {
    let names: Vec<String> = servers.iter().map(|server| server.name.clone()).collect();
    let title = format!(
        "{} pods of one container each (milliseconds)",
        options.fleet
    );
    let ends = [
        "time from the server's restart to its first answer",
        "server's RSS, MB",
    ];
    let quantities = [QUANTITIES, &ends].concat();
    let mut comparison = Comparison::new(title, &names, &quantities);
    let mut skipped = Vec::new();
    for server in servers.iter_mut() {
        let mut pods = Vec::new();
        let outcome = measure(server, services, options, &mut pods, &mut comparison).await;
        for pod in &pods {
            if let Err(error) = server.end_pod(pod).await {
                skipped.push(format!("{} fleet: {error}", server.name));
            }
        }
        if let Err(error) = outcome {
            skipped.push(format!("{} fleet: {error}", server.name));
        }
    }
    report::show(results, &comparison.table())?;
    Ok((comparison.raw(), skipped))
}

async fn measure(
    server: &mut Server,
    services: &[Service],
    options: &CriOptions,
    pods: &mut Vec<Pod>,
    comparison: &mut Comparison,
) -> Result {
    for _ in 0..options.fleet {
        pods.push(
            server
                .start_pod(Network::Node, &options.image, SLEEP)
                .await?,
        );
    }
    let name = server.name.clone();
    for round in 0..=ROUNDS {
        let times = lists(server, options.fleet).await?;
        if round > 0 {
            comparison.add(&name, &times);
        }
    }
    let megabytes = memory::resident(&name)? / 1024.0;
    comparison.add_one(&name, "server's RSS, MB", megabytes);
    let Some(service) = services.iter().find(|service| service.is_named(&name)) else {
        return Ok(());
    };
    service.end()?;
    let started = Instant::now();
    let mut starting = service.begin()?;
    while lists(server, options.fleet).await.is_err() {
        if started.elapsed() > Duration::from_secs(60) {
            return Err("the server does not answer after its restart".into());
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let took = started.elapsed().as_secs_f64() * 1e3;
    starting.wait()?;
    comparison.add_one(
        &name,
        "time from the server's restart to its first answer",
        took,
    );
    Ok(())
}

async fn lists(server: &mut Server, count: usize) -> Result<Vec<f64>> {
    let runtime = &mut server.runtime;
    let call = |name: &'static str| move |status: tonic::Status| call_error(name, &status);
    let (pods, answer) = timed(async {
        let answer = runtime.list_pod_sandbox(ListPodSandboxRequest::default());
        Ok(answer.await.map_err(call("ListPodSandbox"))?.into_inner())
    })
    .await?;
    if answer.items.len() < count {
        return Err(format!(
            "ListPodSandbox returned only {} of the {count} pods",
            answer.items.len()
        )
        .into());
    }
    let (containers, _) = timed(async {
        let answer = runtime.list_containers(ListContainersRequest::default());
        Ok(answer.await.map_err(call("ListContainers"))?)
    })
    .await?;
    let (stats, _) = timed(async {
        let answer = runtime.list_container_stats(ListContainerStatsRequest::default());
        Ok(answer.await.map_err(call("ListContainerStats"))?)
    })
    .await?;
    let (pod_stats, _) = timed(async {
        let answer = runtime.list_pod_sandbox_stats(ListPodSandboxStatsRequest::default());
        Ok(answer.await.map_err(call("ListPodSandboxStats"))?)
    })
    .await?;
    Ok(vec![pods, containers, stats, pod_stats])
}
