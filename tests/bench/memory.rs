//! Measures the memory that each pod needs in addition to its workload, and the memory of the
//! servers.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::Result;
use crate::cri::{CriOptions, Network, SLEEP, Server};
use crate::report::{self, Table, figure, ratio};

/// The memory of all processes except the workload's. The maps contain the sum for each program.
#[derive(Clone, Debug, Default)]
struct Memory {
    /// The proportional set sizes in kB. If n processes share memory, 1/n of this memory is added
    /// to the size of each process.
    pss: BTreeMap<String, f64>,
    /// The resident set sizes in kB.
    rss: BTreeMap<String, f64>,
}

pub(crate) async fn run(
    options: &CriOptions,
    servers: &mut [Server],
    results: &Path,
) -> Result<(Value, Vec<String>)> {
    let title = format!(
        "memory with {} pods of one container each (MB)",
        options.pods
    );
    let columns = [
        "",
        "PSS a pod",
        "× first",
        "helpers",
        "the server",
        "server RSS idle",
        "server RSS with pods",
        "by program, for each pod",
    ];
    let mut table = Table::new(title, &columns);
    let mut skipped = Vec::new();
    let mut raw = BTreeMap::new();
    let mut first = None;
    for server in servers.iter_mut() {
        let (before, after) = match measure(server, options).await {
            Ok(both) => both,
            Err(error) => {
                skipped.push(format!("{} memory: {error}", server.name));
                continue;
            }
        };
        let per_pod = |name: &str| {
            let of = |memory: &Memory| memory.pss.get(name).copied().unwrap_or(0.0);
            (of(&after) - of(&before)) / options.pods as f64 / 1024.0
        };
        let grown: Vec<(&str, f64)> = after
            .pss
            .keys()
            .filter(|name| !OTHERS.contains(&name.as_str()))
            .map(|name| (name.as_str(), per_pod(name)))
            .filter(|(_, megabytes)| megabytes.abs() > 0.004)
            .collect();
        let total: f64 = grown.iter().map(|(_, megabytes)| megabytes).sum();
        let of_server = per_pod(&server.name);
        first = first.or(Some(total));
        let rss = |memory: &Memory| memory.rss.get(&server.name).map(|kb| kb / 1024.0);
        let programs: Vec<_> = grown
            .iter()
            .map(|(name, megabytes)| format!("{name} {megabytes:.2}"))
            .collect();
        table.row(
            &server.name,
            [
                figure(Some(total)),
                ratio(Some(total), first),
                figure(Some(total - of_server)),
                figure(Some(of_server)),
                figure(rss(&before)),
                figure(rss(&after)),
                programs.join(", "),
            ],
        );
        raw.insert(
            server.name.clone(),
            json!({
                "pss_kb_without_pods": before.pss, "pss_kb_with_pods": after.pss,
                "rss_kb_without_pods": before.rss, "rss_kb_with_pods": after.rss,
            }),
        );
    }
    report::show(results, &table)?;
    Ok((json!(raw), skipped))
}

/// Programs that run during the measurement but are not part of a server.
const OTHERS: &[&str] = &["rrun-bench", "docker-registry", "bash"];

async fn measure(server: &mut Server, options: &CriOptions) -> Result<(Memory, Memory)> {
    // The first pod loads files into memory that all pods share. This pod is started before the
    // first measurement, so that the shared memory is not counted.
    let pod = server
        .start_pod(Network::Own, &options.image, SLEEP)
        .await?;
    server.end_pod(&pod).await?;
    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    let before = read_memory()?;
    let mut pods = Vec::new();
    let mut outcome = Ok(());
    for _ in 0..options.pods {
        match server.start_pod(Network::Own, &options.image, SLEEP).await {
            Ok(pod) => pods.push(pod),
            Err(error) => {
                outcome = Err(error);
                break;
            }
        }
    }
    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    let after = read_memory();
    for pod in &pods {
        server.end_pod(pod).await?;
    }
    outcome?;
    Ok((before, after?))
}

/// Returns the sum of the proportional set sizes of a program's processes, in kB.
pub(crate) fn of_program(name: &str) -> Result<f64> {
    Ok(read_memory()?.pss.get(name).copied().unwrap_or(0.0))
}

/// Returns the sum of the resident set sizes of a program's processes, in kB.
pub(crate) fn resident(name: &str) -> Result<f64> {
    Ok(read_memory()?.rss.get(name).copied().unwrap_or(0.0))
}

/// Returns the proportional set sizes of all programs, in kB, except the programs in `workload` and
/// in [`OTHERS`].
pub(crate) fn without(workload: &[&str]) -> Result<BTreeMap<String, f64>> {
    let mut programs = read_memory()?.pss;
    programs
        .retain(|name, _| !OTHERS.contains(&name.as_str()) && !workload.contains(&name.as_str()));
    Ok(programs)
}

fn read_memory() -> Result<Memory> {
    let mut memory = Memory::default();
    for entry in fs::read_dir("/proc")?.flatten() {
        let process = entry.path();
        if !entry
            .file_name()
            .to_string_lossy()
            .bytes()
            .all(|byte| byte.is_ascii_digit())
        {
            continue;
        }
        // A process that exits during the measurement is skipped.
        let (Ok(name), Ok(arguments), Ok(sizes)) = (
            fs::read_to_string(process.join("comm")),
            fs::read(process.join("cmdline")),
            fs::read_to_string(process.join("smaps_rollup")),
        ) else {
            continue;
        };
        if arguments == [SLEEP.join("\0").as_bytes(), b"\0"].concat() {
            continue;
        }
        let name = name.trim_end().to_owned();
        *memory.pss.entry(name.clone()).or_default() += size(&sizes, "Pss:");
        *memory.rss.entry(name).or_default() += size(&sizes, "Rss:");
    }
    Ok(memory)
}

/// Returns the value in kB of the line of smaps_rollup that begins with `name`.
fn size(sizes: &str, name: &str) -> f64 {
    let line = sizes.lines().find_map(|line| line.strip_prefix(name));
    let word = line.and_then(|line| line.split_whitespace().next());
    word.and_then(|word| word.parse().ok()).unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_line_of_smaps_rollup_is_read_in_kilobytes() {
        let text =
            "7f-7f ---p 00000000 00:00 0 [rollup]\nRss:   1464 kB\nPss:    77 kB\nPss_Anon: 3 kB\n";
        assert_eq!(super::size(text, "Pss:"), 77.0);
        assert_eq!(super::size(text, "Swap:"), 0.0);
    }
}
