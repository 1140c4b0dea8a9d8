//! What a cgroup's processes use, as the kernel counts it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::ensure;
use crate::support::bundle::Bundle;
use crate::support::machine::{Failed, Result, note};

/// One file of the group, without the last line end.
pub(crate) fn file(group: &Path, name: &str) -> Result<String> {
    let path = group.join(name);
    let text = fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(text.trim_end().to_owned())
}

/// Groups below this one, the deepest first.
pub(crate) fn groups_below(dir: &Path) -> Vec<PathBuf> {
    let mut all = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            all.extend(groups_below(&entry.path()));
            all.push(entry.path());
        }
    }
    all
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
pub(crate) fn parts_of_a_cpu(groups: &[&Path]) -> Result<Vec<f64>> {
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

/// Two spinning containers on CPU 0 with these CPU resources: what part of the sum the first got.
pub(crate) fn split_of_a_cpu(first: Value, second: Value) -> Result<f64> {
    let bundles = [first, second]
        .into_iter()
        .map(|resources| {
            let mut bundle = Bundle::new(&["spin", "600"])?;
            bundle.set("/linux/resources", resources);
            bundle.set("/linux/resources/cpu/cpus", json!("0"));
            bundle.start()?;
            Ok(bundle)
        })
        .collect::<Result<Vec<_>>>()?;
    let groups: Vec<_> = bundles.iter().map(Bundle::cgroup).collect();
    let used = parts_of_a_cpu(&groups.iter().map(PathBuf::as_path).collect::<Vec<_>>())?;
    for bundle in &bundles {
        bundle.end()?;
    }
    Ok(used[0] / (used[0] + used[1]))
}

/// Whether processes that never rest are held to this part of a CPU, ± 5 of a hundred.
///
/// At no time may they get more. They must get as much in one of several windows, or, on a machine
/// that is too busy otherwise to give it, have been stopped by their quota, or their parent's: what
/// has none never is.
pub(crate) fn held_to(limit: f64, group: &Path) -> Result<f64> {
    let mut all = Vec::new();
    let before = throttling(group)?;
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
    let after = throttling(group)?;
    let stopped = (after.1 - before.1) / (after.0 - before.0).max(1.0);
    note(format!(
        "too busy a machine: {all:.3?} of a CPU, stopped in {stopped:.2} of the periods"
    ));
    ensure!(
        stopped > 0.0,
        "used {all:.3?} of a CPU, never {limit} ± 0.05, and was never stopped"
    );
    Ok(all.iter().copied().fold(0.0, f64::max))
}

/// The quota's periods so far, and how many of them ended with the group stopped, or its parent.
fn throttling(group: &Path) -> Result<(f64, f64)> {
    let count = |group: &Path, key: &str| {
        let stat = file(group, "cpu.stat")?;
        let line = stat.lines().find_map(|line| line.strip_prefix(key));
        Ok::<_, Failed>(line.map_or(0.0, |number| number.trim().parse().unwrap_or(0.0)))
    };
    let parent = group.parent().ok_or("a group without a parent")?;
    let stopped = count(group, "nr_throttled ")? + count(parent, "nr_throttled ").unwrap_or(0.0);
    Ok((count(group, "nr_periods ")?, stopped))
}

/// Which part of one CPU the processes of this group used over five seconds.
fn part_of_a_cpu(group: &Path) -> Result<f64> {
    Ok(parts_of_a_cpu(&[group])?
        .first()
        .copied()
        .unwrap_or_default())
}
