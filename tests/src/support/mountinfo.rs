//! The lines of /proc/PID/mountinfo for a container's mounts, as `inside report` prints them.

use serde_json::Value;

use crate::support::machine::Result;

/// Returns the line of `report` that describes the mount at the mount point `point`. If several
/// mounts have this mount point, the function returns the last of their lines.
pub(crate) fn line(report: &Value, point: &str) -> Result<String> {
    let lines = report["mounts"]
        .as_array()
        .ok_or("the report of `inside` contains no field `mounts`")?;
    let found = lines
        .iter()
        .filter_map(Value::as_str)
        .rfind(|line| line.split(' ').nth(4).is_some_and(|there| there == point));
    Ok(found
        .ok_or(format!(
            "the container's mountinfo contains no mount on {point}: {lines:#?}"
        ))?
        .to_owned())
}

/// Returns the mount options of the mount at `point`, without the options of the mounted file
/// system.
pub(crate) fn options(report: &Value, point: &str) -> Result<Vec<String>> {
    let line = line(report, point)?;
    let own = line.split(' ').nth(5).unwrap_or_default();
    Ok(own.split(',').map(str::to_owned).collect())
}
