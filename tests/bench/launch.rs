//! Measures commands with the program `launch`. The comment in launch.c describes the measured
//! quantities.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::Result;

/// The time and memory that one sequence of commands needed.
#[derive(Clone, Debug, Default)]
pub(crate) struct Usage {
    /// The wall time of each command, in milliseconds.
    pub(crate) wall: Vec<f64>,
    /// The sum of the CPU times of all commands and their child processes, in milliseconds.
    pub(crate) cpu: f64,
    /// The highest peak memory of a single process, among all commands and their child processes,
    /// in MB.
    pub(crate) peak: f64,
}

/// The settings for measuring commands.
pub(crate) struct Launch<'a> {
    /// The directory of the program `launch`.
    pub(crate) programs: &'a Path,
    /// A directory for the commands' standard error.
    pub(crate) scratch: &'a Path,
    /// True if the commands get real-time priority.
    pub(crate) realtime: bool,
}

impl Launch<'_> {
    /// Runs the commands. The last command must exit with `last_status`, and all other commands
    /// with 0.
    pub(crate) fn run(&self, commands: &[Vec<String>], last_status: i32) -> Result<Usage> {
        let stderr = self.scratch.join("stderr");
        let output = Command::new(self.programs.join("launch"))
            .args(self.realtime.then_some("-r"))
            .args(commands.join(&";".to_owned()))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::create(&stderr)?)
            .output()
            .map_err(|error| format!("{}/launch: {error}", self.programs.display()))?;
        let stderr = || {
            fs::read_to_string(&stderr)
                .unwrap_or_default()
                .trim()
                .to_owned()
        };
        let result: Value = serde_json::from_slice(&output.stdout).map_err(|_| {
            format!(
                "the program `launch` failed with {}; its error output: {}",
                output.status,
                stderr()
            )
        })?;
        let mut usage = Usage {
            cpu: number(&result, "cpu_us") / 1e3,
            ..Usage::default()
        };
        let measured = result.get("commands").and_then(Value::as_array);
        for (index, (command, measured)) in commands
            .iter()
            .zip(measured.into_iter().flatten())
            .enumerate()
        {
            let status = number(measured, "status");
            let expected = if index + 1 == commands.len() {
                last_status
            } else {
                0
            };
            if status != f64::from(expected) {
                return Err(format!(
                    "the command `{}` exited with {status}, expected: {expected}; its error output: {}",
                    command.join(" "),
                    stderr()
                )
                .into());
            }
            usage.wall.push(number(measured, "wall_ns") / 1e6);
            usage.peak = usage.peak.max(number(measured, "peak_kb") / 1024.0);
        }
        Ok(usage)
    }
}

fn number(value: &Value, name: &str) -> f64 {
    value.get(name).and_then(Value::as_f64).unwrap_or(f64::NAN)
}
