//! Measures log throughput. One container writes lines of 100 bytes as fast as possible.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::time::{Duration, Instant};

use rrun_proto::v1::{ContainerConfig, Mount};
use serde_json::Value;

use crate::Result;
use crate::cri::{CriOptions, Network, Server, cpu_of_others, pod_config};
use crate::report::{self, Comparison};

const QUANTITIES: &[&str] = &[
    "lines each second",
    "CPU without the writer, ns for each line",
    "lost",
];

/// The path of the program `lines` (lines.c) in the container.
const LINES: &str = "/lines";

pub(crate) async fn run(
    options: &CriOptions,
    servers: &mut [Server],
    programs: &Path,
    results: &Path,
) -> Result<(Value, Vec<String>)> {
    let names: Vec<String> = servers.iter().map(|server| server.name.clone()).collect();
    let count = options.lines;
    let title =
        format!("a container's log: {count} lines of 100 bytes, one write(2) for each line");
    let mut comparison = Comparison::new(title, &names, QUANTITIES);
    let mut skipped = Vec::new();
    for round in 0..4 {
        for server in servers.iter_mut() {
            match once(server, options, programs).await {
                Ok(figures) if round > 0 => comparison.add(&server.name, &figures),
                Ok(_) => {}
                Err(error) => skipped.push(format!("{} logs: {error}", server.name)),
            }
        }
    }
    report::show(results, &comparison.table())?;
    Ok((comparison.raw(), skipped))
}

async fn once(server: &mut Server, options: &CriOptions, programs: &Path) -> Result<Vec<f64>> {
    let config = pod_config(Network::Node)?;
    let pod = server.run_pod(&config).await?;
    let container = ContainerConfig {
        mounts: vec![Mount {
            container_path: LINES.to_owned(),
            host_path: programs.join("lines").to_string_lossy().into_owned(),
            readonly: true,
            ..Default::default()
        }],
        ..Server::container(&options.image, &[LINES, &options.lines.to_string()])
    };
    let id = server.create_from(&pod, &config, container).await?;
    let cpu = cpu_of_others()?;
    let started = Instant::now();
    server.start(&id).await?;
    while !server.has_exited(&id).await? {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let seconds = started.elapsed().as_secs_f64();
    let cpu = cpu_of_others()? - cpu;
    let log = Path::new(&config.log_directory).join("bench/0.log");
    let (lines, own) = count(&log)?;
    server.stop_pod(&pod).await?;
    server.remove_pod(&pod).await?;
    std::fs::remove_dir_all(&config.log_directory)?;
    let written = options.lines as f64;
    Ok(vec![
        written / seconds,
        (cpu * 1e6 - own * 1e3) / written,
        written - lines as f64,
    ])
}

/// Returns the number of lines before the last line, and the writer's own CPU time in microseconds.
fn count(log: &Path) -> Result<(u64, f64)> {
    let mut reader = BufReader::with_capacity(1 << 20, File::open(log)?);
    let mut lines = 0;
    let mut line = String::new();
    loop {
        line.clear();
        if reader.read_line(&mut line)? == 0 {
            return Err(format!(
                "{}: the last line, which contains the writer's CPU time, is missing",
                log.display()
            )
            .into());
        }
        let text = line
            .split_once(" stdout F ")
            .map(|(_, text)| text.trim_end());
        let text = text.ok_or_else(|| {
            format!(
                "{}: the line {line:?} does not contain \" stdout F \"",
                log.display()
            )
        })?;
        if let Some(own) = text.strip_prefix("own ") {
            return Ok((lines, own.parse()?));
        }
        let number = text.split(' ').next().and_then(|word| word.parse().ok());
        if number != Some(lines) || text.len() != 99 {
            return Err(format!(
                "{}: the text of line {lines} is wrong: {text:?}",
                log.display()
            )
            .into());
        }
        lines += 1;
    }
}
