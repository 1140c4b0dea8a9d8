//! What a cgroup's processes use, as the kernel counts it.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::ensure;
use crate::machine::Result;

/// One file of the group, without the last line end.
pub fn file(group: &Path, name: &str) -> Result<String> {
    let path = group.join(name);
    let text = fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(text.trim_end().to_owned())
}

/// CPU time used so far, in microseconds.
fn usage(group: &Path) -> Result<f64> {
    let stat = file(group, "cpu.stat")?;
    let line = stat
        .lines()
        .find_map(|line| line.strip_prefix("usage_usec "));
    Ok(line.ok_or("cpu.stat has no usage_usec")?.parse::<f64>()?)
}

/// Which parts of one CPU the processes of these groups used over five seconds.
pub fn parts_of_a_cpu(groups: &[&Path]) -> Result<Vec<f64>> {
    // Past their start, and the first whole period of a quota.
    std::thread::sleep(Duration::from_secs(1));
    let started = Instant::now();
    let before = groups
        .iter()
        .map(|group| usage(group))
        .collect::<Result<Vec<_>>>()?;
    std::thread::sleep(Duration::from_secs(5));
    let wall = started.elapsed().as_micros() as f64;
    let after = groups
        .iter()
        .map(|group| usage(group))
        .collect::<Result<Vec<_>>>()?;
    Ok(before
        .iter()
        .zip(after)
        .map(|(before, after)| (after - before) / wall)
        .collect())
}

/// Whether the processes of this group use this part of a CPU, ± 5 of a hundred: at no time more,
/// and as much in at least one of several windows (a machine that is busy otherwise gives less).
pub fn held_to(limit: f64, group: &Path) -> Result<f64> {
    let mut all = Vec::new();
    for _ in 0..6 {
        let used = part_of_a_cpu(group)?;
        all.push(used);
        ensure!(
            used <= limit + 0.05,
            "used {:.1} % of a CPU, more than {:.0} + 5",
            used * 100.0,
            limit * 100.0
        );
        if used >= limit - 0.05 {
            return Ok(used);
        }
    }
    Err(format!("used these parts of a CPU, {all:.3?}, never {limit} ± 0.05").into())
}

/// Which part of one CPU the processes of this group used over five seconds.
fn part_of_a_cpu(group: &Path) -> Result<f64> {
    Ok(parts_of_a_cpu(&[group])?
        .first()
        .copied()
        .unwrap_or_default())
}
