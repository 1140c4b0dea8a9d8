//! Checks of log rotations by kubelet while a container writes to the log.

use std::fs;
use std::io::Read;
use std::path::Path;

use serde_json::Value;

use crate::ensure;
use crate::support::application::LINES;
use crate::support::kubelet::{KUBELET_TIMEOUT, pod_name};
use crate::support::machine::{Result, command, wait_within};

/// Checks that the log of the second container of the first replica contains every line. The log
/// consists of several files, and kubelet has compressed some of these files.
pub(crate) fn rotation_loses_no_line(pod: &Value) -> Result {
    let uid = pod["metadata"]["annotations"]["kubernetes.io/config.hash"].as_str();
    let uid = uid.ok_or(format!(
        "the pod has no annotation with its config hash: {}",
        pod["metadata"]
    ))?;
    let dir = format!("/var/log/pods/default_{}_{uid}/neighbour", pod_name(pod));
    wait_within(
        KUBELET_TIMEOUT,
        "the last line to appear in the log files",
        || {
            let mut files: Vec<_> = fs::read_dir(&dir)
                .map_err(|error| format!("cannot read the log directory {dir}: {error}"))?
                .flatten()
                .map(|entry| entry.path())
                .filter(|path| !path.to_string_lossy().ends_with(".tmp"))
                .collect();
            files.sort();
            // `0.log` is the newest file. The names of the other files end with the time of their
            // rotation.
            files.rotate_left(1);
            let mut numbers = Vec::new();
            for path in &files {
                let text = log_text(path)?;
                let lines = text
                    .lines()
                    .filter_map(|line| line.split(" F line ").nth(1));
                numbers
                    .extend(lines.filter_map(|line| line.split(' ').next()?.parse::<usize>().ok()));
            }
            ensure!(
                numbers.last() == Some(&LINES),
                "the last line in the log files has the number {:?} instead of {LINES}; the log files: {files:?}",
                numbers.last()
            );
            let all: Vec<usize> = (1..=LINES).collect();
            ensure!(
                numbers == all,
                "lines are missing or out of order; the log files contain {} lines: {files:?}",
                numbers.len()
            );
            ensure!(
                files.len() > 3,
                "kubelet has not rotated the log often enough; the log files: {files:?}"
            );
            Ok(Some(()))
        },
    )
}

fn log_text(path: &Path) -> Result<String> {
    if path.extension().is_some_and(|extension| extension == "gz") {
        let output = command("gzip", ["-dc"]).arg(path).ok()?;
        return Ok(output.stdout);
    }
    let mut text = String::new();
    fs::File::open(path)?.read_to_string(&mut text)?;
    Ok(text)
}
