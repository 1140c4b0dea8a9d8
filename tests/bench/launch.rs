//! Commands measured one after the other by the program `launch` (launch.c says what it counts).

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::Result;

/// What one sequence of commands took.
#[derive(Clone, Debug, Default)]
pub(crate) struct Usage {
    /// Per command, in milliseconds.
    pub(crate) wall: Vec<f64>,
    /// Of all processes of all commands, in milliseconds.
    pub(crate) cpu: f64,
    /// Of the largest process that one of the commands was or waited for, in MB.
    pub(crate) peak: f64,
}

/// Commands to run and what to make of them.
pub(crate) struct Launch<'a> {
    /// Where the program `launch` is.
    pub(crate) programs: &'a Path,
    /// A directory for what the commands say.
    pub(crate) scratch: &'a Path,
    pub(crate) realtime: bool,
}

impl Launch<'_> {
    /// Runs the commands; the last must exit with this status, the others with 0.
    pub(crate) fn run(&self, commands: &[Vec<String>], last_status: i32) -> Result<Usage> {
        let said = self.scratch.join("stderr");
        let output = Command::new(self.programs.join("launch"))
            .args(self.realtime.then_some("-r"))
            .args(commands.join(&";".to_owned()))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::create(&said)?)
            .output()
            .map_err(|error| format!("{}/launch: {error}", self.programs.display()))?;
        let said = || {
            fs::read_to_string(&said)
                .unwrap_or_default()
                .trim()
                .to_owned()
        };
        let result: Value = serde_json::from_slice(&output.stdout)
            .map_err(|_| format!("launch ended with {}: {}", output.status, said()))?;
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
                    "`{}` ended with {status}, not {expected}: {}",
                    command.join(" "),
                    said()
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
