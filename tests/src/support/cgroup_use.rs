//! Measurements of the resources that a cgroup's processes use.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::ensure;
use crate::support::bundle::Bundle;
use crate::support::machine::{Failed, Result, note};

/// Returns the content of a cgroup's file `name`, without the final newlines.
pub(crate) fn file(group: &Path, name: &str) -> Result<String> {
    let path = group.join(name);
    let text = fs::read_to_string(&path)
        .map_err(|error| format!("cannot read {}: {error}", path.display()))?;
    Ok(text.trim_end().to_owned())
}

/// Returns all cgroups below `dir`. In the result, each cgroup precedes its parent.
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

/// Returns a cgroup's CPU time in microseconds.
fn usage(group: &Path) -> Result<f64> {
    let stat = file(group, "cpu.stat")?;
    let line = stat
        .lines()
        .find_map(|line| line.strip_prefix("usage_usec "));
    Ok(line
        .ok_or("cpu.stat contains no line that begins with usage_usec")?
        .parse::<f64>()?)
}

/// Measures the CPU time of the cgroups in `groups` for five seconds. Returns one number for each
/// cgroup: the fraction of one CPU that the processes of the cgroup use.
pub(crate) fn cpu_fractions(groups: &[&Path]) -> Result<Vec<f64>> {
    // During this second, the processes start and the first whole period of a CPU quota passes.
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

/// Runs two containers with busy loops on CPU 0. The first container has the resources `first`, and
/// the second container has the resources `second`. Returns the first container's share of the CPU
/// time that both containers used.
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
    let used = cpu_fractions(&groups.iter().map(PathBuf::as_path).collect::<Vec<_>>())?;
    for bundle in &bundles {
        bundle.end()?;
    }
    Ok(used[0] / (used[0] + used[1]))
}

/// Checks that the kernel limits busy processes in `group` to the fraction `limit` of a CPU, ± 5
/// percentage points.
///
/// No measurement may exceed the limit, and at least one measurement must reach the limit. On a
/// busy machine, perhaps no measurement reaches the limit. The function then only checks that the
/// kernel throttled the cgroup or its parent cgroup. The kernel never throttles a cgroup without a
/// CPU quota. Throttling therefore shows that the quota is in effect.
pub(crate) fn held_to(limit: f64, group: &Path) -> Result<f64> {
    let mut all = Vec::new();
    let before = throttling(group)?;
    for _ in 0..6 {
        let used = cpu_fraction(group)?;
        all.push(used);
        ensure!(
            used <= limit + 0.05,
            "the processes used {:.1} % of a CPU, which is more than the limit {:.0} % + 5 %",
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
        "the machine is too busy. The processes used these fractions of a CPU: {all:.3?}. \
         The kernel throttled the processes in the fraction {stopped:.2} of the quota's periods"
    ));
    ensure!(
        stopped > 0.0,
        "the processes used these fractions of a CPU: {all:.3?}. \
         Each fraction is less than {limit} - 0.05, but the kernel never throttled the cgroup or its parent"
    );
    Ok(all.iter().copied().fold(0.0, f64::max))
}

/// Returns two counts: all past periods of the CPU quota, and the periods in which the kernel
/// throttled the cgroup or its parent.
fn throttling(group: &Path) -> Result<(f64, f64)> {
    let count = |group: &Path, key: &str| {
        let stat = file(group, "cpu.stat")?;
        let line = stat.lines().find_map(|line| line.strip_prefix(key));
        Ok::<_, Failed>(line.map_or(0.0, |number| number.trim().parse().unwrap_or(0.0)))
    };
    let parent = group.parent().ok_or("the cgroup has no parent")?;
    let stopped = count(group, "nr_throttled ")? + count(parent, "nr_throttled ").unwrap_or(0.0);
    Ok((count(group, "nr_periods ")?, stopped))
}

/// Returns the fraction of one CPU that the cgroup's processes use, measured over five seconds.
fn cpu_fraction(group: &Path) -> Result<f64> {
    Ok(cpu_fractions(&[group])?
        .first()
        .copied()
        .unwrap_or_default())
}
