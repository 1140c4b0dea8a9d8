//! What mountinfo says of a container's mounts, as `inside report` shows it.

use serde_json::Value;

use crate::support::machine::Result;

/// The line of mountinfo for this mount point.
pub(crate) fn line(report: &Value, point: &str) -> Result<String> {
    let lines = report["mounts"]
        .as_array()
        .ok_or("no mounts in the report")?;
    let found = lines
        .iter()
        .filter_map(Value::as_str)
        .rfind(|line| line.split(' ').nth(4).is_some_and(|there| there == point));
    Ok(found
        .ok_or(format!("nothing is mounted on {point} in {lines:#?}"))?
        .to_owned())
}

/// The mount's own options, sorted.
pub(crate) fn options(report: &Value, point: &str) -> Result<Vec<String>> {
    let line = line(report, point)?;
    let own = line.split(' ').nth(5).unwrap_or_default();
    Ok(own.split(',').map(str::to_owned).collect())
}
