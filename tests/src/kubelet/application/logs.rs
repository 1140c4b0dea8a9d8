//! Logs that kubelet rotates while they are written.

use std::fs;
use std::io::Read;
use std::path::Path;

use serde_json::Value;

use crate::ensure;
use crate::support::application::LINES;
use crate::support::kubelet::{KUBELET_TIMEOUT, pod_name};
use crate::support::machine::{Result, command, wait_within};

/// All that the first replica's second container has said, in whichever files, compressed or not.
pub(crate) fn no_line_is_lost_by_rotation(pod: &Value) -> Result {
    let uid = pod["metadata"]["annotations"]["kubernetes.io/config.hash"].as_str();
    let uid = uid.ok_or(format!("no hash in {}", pod["metadata"]))?;
    let dir = format!("/var/log/pods/default_{}_{uid}/neighbour", pod_name(pod));
    wait_within(KUBELET_TIMEOUT, "the log's last line", || {
        let mut files: Vec<_> = fs::read_dir(&dir)
            .map_err(|error| format!("{dir}: {error}"))?
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| !path.to_string_lossy().ends_with(".tmp"))
            .collect();
        files.sort();
        // `0.log` is the newest; the others' names end with their time.
        files.rotate_left(1);
        let mut numbers = Vec::new();
        for path in &files {
            let text = log_text(path)?;
            let lines = text
                .lines()
                .filter_map(|line| line.split(" F line ").nth(1));
            numbers.extend(lines.filter_map(|line| line.split(' ').next()?.parse::<usize>().ok()));
        }
        ensure!(
            numbers.last() == Some(&LINES),
            "the last line is {:?}, in {files:?}",
            numbers.last()
        );
        let all: Vec<usize> = (1..=LINES).collect();
        ensure!(numbers == all, "{} lines in {files:?}", numbers.len());
        ensure!(files.len() > 3, "only {files:?}");
        Ok(Some(()))
    })
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
