//! Functions that run one plugin. The functions set the plugin's environment, write its input, read
//! its output and wait for its exit. See the CNI specification, section 2.

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde::Deserialize;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};
use tokio::time::{Instant, timeout, timeout_at};

use super::leftover;
use rrun_calls::wait::slow;
use rrun_kernel::errno::describe;

/// The maximum size of a plugin's output in bytes.
const ANSWER_BYTES: usize = 1 << 20;

/// The maximum number of bytes that rrun-cri keeps of a plugin's standard error output.
const STDERR_BYTES: usize = 4 << 10;

/// The maximum number of characters in a quotation in an error message. The quotation is a plugin's
/// standard error output or an invalid result.
const SHOWN_CHARACTERS: usize = 400;

/// The time for which rrun-cri continues to read the output of an exited plugin. Descendants of the
/// plugin can keep the output open.
const OUTPUT_GRACE: Duration = Duration::from_secs(1);

/// The time for which rrun-cri waits for the exit of a killed plugin. The time is limited, because
/// a plugin does not exit during a hanging system call.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);

/// The default value of PATH for plugins. It is used if rrun-cri itself was started without PATH.
/// Plugins need PATH to run programs such as iptables.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The reason why a command of a plugin failed. The display text is a sentence.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum PluginError {
    #[error("the CNI plugin {plugin} is not in any of {dirs}")]
    Missing { plugin: String, dirs: String },
    #[error("run the CNI plugin {path}: {reason}")]
    Start { path: String, reason: String },
    #[error(
        "the CNI plugin {plugin} did not finish {command} within {seconds} s, so rrun-cri killed it{complaint}"
    )]
    Hung {
        plugin: String,
        command: &'static str,
        seconds: u64,
        complaint: String,
    },
    /// The plugin reported an error in the format of the CNI specification.
    #[error("the CNI plugin {plugin} failed {command}: {message} (code {code}){complaint}")]
    Failed {
        plugin: String,
        command: &'static str,
        code: u64,
        message: String,
        complaint: String,
    },
    #[error("the CNI plugin {plugin} failed {command} without a CNI error: {how}{complaint}")]
    Died {
        plugin: String,
        command: &'static str,
        how: String,
        complaint: String,
    },
    #[error("the CNI plugin {plugin} returned no valid CNI result for {command}: {why}{complaint}")]
    Garbage {
        plugin: String,
        command: &'static str,
        why: String,
        complaint: String,
    },
}

/// A command for a plugin (CNI_COMMAND) and its parameters.
pub(super) struct PluginCall<'a> {
    pub command: &'static str,
    /// The name of the plugin's binary.
    pub plugin: &'a str,
    /// Environment variables of the plugin in addition to CNI_COMMAND and CNI_PATH.
    pub environment: &'a [(&'static str, String)],
    /// The pod's id. If the plugin is killed, this id is used to find the plugin's child processes.
    /// `None` if the command is not for a specific pod.
    pub container: Option<&'a str>,
    pub input: Vec<u8>,
    pub deadline: Instant,
}

/// The directories that contain the binaries of plugins.
#[derive(Clone, Debug)]
pub(super) struct PluginDirs {
    dirs: Vec<PathBuf>,
    /// The same directories as one text in the format of CNI_PATH.
    joined: String,
}

/// The error object that a failed plugin prints. See "Error" in the CNI specification, section 5.
#[derive(Deserialize)]
struct ErrorResult {
    #[serde(default)]
    code: u64,
    #[serde(default)]
    msg: String,
    #[serde(default)]
    details: String,
}

impl PluginDirs {
    pub(super) fn new(dirs: Vec<PathBuf>) -> Self {
        let joined = dirs.iter().map(|dir| dir.to_string_lossy());
        let joined = joined.collect::<Vec<_>>().join(":");
        PluginDirs { dirs, joined }
    }

    pub(super) fn all(&self) -> &[PathBuf] {
        &self.dirs
    }

    /// Returns the path of the plugin's binary in the first directory that contains it.
    pub(super) fn find(&self, plugin: &str) -> Result<PathBuf, PluginError> {
        let mut paths = self.dirs.iter().map(|dir| dir.join(plugin));
        paths
            .find(|path| path.is_file())
            .ok_or_else(|| PluginError::Missing {
                plugin: plugin.to_owned(),
                dirs: self.joined.clone(),
            })
    }

    /// Runs a plugin until it exits, and returns its output. If the plugin has not exited at the
    /// deadline, this function kills the plugin and all processes of the plugin. If the caller
    /// drops the future, the plugin continues to run.
    pub(super) async fn run(&self, call: PluginCall<'_>) -> Result<Vec<u8>, PluginError> {
        let path = self.find(call.plugin)?;
        let begin = Instant::now();
        let mut child = self
            .start(&path, &call)
            .map_err(|error| PluginError::Start {
                path: path.display().to_string(),
                reason: describe(&error),
            })?;
        let (mut answer, mut complaint) = (Vec::new(), Vec::new());
        let pod = call.container.unwrap_or("no pod");
        let what = format!("{pod}: the CNI plugin {}, {}", call.plugin, call.command);
        let talk = converse(&mut child, &call.input, &mut answer, &mut complaint);
        let ended = timeout_at(call.deadline, slow(what, talk)).await;
        let plugin = call.plugin.to_owned();
        let command = call.command;
        let complaint = complained(&complaint);
        let status = match ended {
            Ok(Ok(status)) => status,
            Ok(Err(error)) => {
                let how = format!("cannot wait for its exit: {}", describe(&error));
                return Err(PluginError::Died {
                    plugin,
                    command,
                    how,
                    complaint,
                });
            }
            Err(_) => {
                kill(&mut child, call.container).await;
                let seconds = (begin.elapsed() + Duration::from_millis(500)).as_secs();
                return Err(PluginError::Hung {
                    plugin,
                    command,
                    seconds,
                    complaint,
                });
            }
        };
        if !complaint.is_empty() {
            log::debug!("the CNI plugin {plugin}, {command}{complaint}");
        }
        log::debug!(
            "the CNI plugin {plugin} ended {command} after {:?}",
            begin.elapsed()
        );
        accept(plugin, command, status, answer, complaint)
    }

    fn start(&self, path: &Path, call: &PluginCall<'_>) -> std::io::Result<Child> {
        let mut command = Command::new(path);
        command
            .env("CNI_COMMAND", call.command)
            .env("CNI_PATH", &self.joined)
            .envs(call.environment.iter().map(|(key, value)| (key, value)))
            // The plugin must not inherit NOTIFY_SOCKET, because only rrun-cri itself sends
            // notifications to systemd.
            .env_remove("NOTIFY_SOCKET")
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        if std::env::var_os("PATH").is_none() {
            command.env("PATH", PATH);
        }
        command.spawn()
    }
}

/// Returns the output of a plugin that has exited, or the plugin's error. `complaint` is text from
/// the plugin's standard error output, and is appended to the error message.
fn accept(
    plugin: String,
    command: &'static str,
    status: ExitStatus,
    answer: Vec<u8>,
    complaint: String,
) -> Result<Vec<u8>, PluginError> {
    if status.success() && answer.len() <= ANSWER_BYTES {
        return Ok(answer);
    }
    if status.success() {
        let why = format!("its output has more than {ANSWER_BYTES} bytes");
        return Err(PluginError::Garbage {
            plugin,
            command,
            why,
            complaint,
        });
    }
    match serde_json::from_slice::<ErrorResult>(&answer) {
        Ok(error) if error.code != 0 || !error.msg.is_empty() => {
            let message = if error.details.is_empty() {
                error.msg
            } else {
                format!("{}: {}", error.msg, error.details)
            };
            Err(PluginError::Failed {
                plugin,
                command,
                code: error.code,
                message: one_line(message.as_bytes()),
                complaint,
            })
        }
        _ => Err(PluginError::Died {
            plugin,
            command,
            how: if answer.is_empty() {
                how(status)
            } else {
                format!("{}, its output is {:?}", how(status), one_line(&answer))
            },
            complaint,
        }),
    }
}

/// Parses the plugin's output as a JSON object.
pub(super) fn parse(call: &'static str, plugin: &str, answer: &[u8]) -> Result<Value, PluginError> {
    serde_json::from_slice::<Value>(answer)
        .ok()
        .filter(Value::is_object)
        .ok_or_else(|| PluginError::Garbage {
            plugin: plugin.to_owned(),
            command: call,
            why: if answer.is_empty() {
                "its output is empty".to_owned()
            } else {
                format!("its output is {:?}", one_line(answer))
            },
            complaint: String::new(),
        })
}

/// Writes the plugin's input, reads its output, and waits for its exit. After the exit, descendants
/// of the plugin can keep the output open. For this reason, the function then reads only for a
/// limited time.
async fn converse(
    child: &mut Child,
    input: &[u8],
    answer: &mut Vec<u8>,
    complaint: &mut Vec<u8>,
) -> std::io::Result<ExitStatus> {
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let talk = async {
        let feed = async {
            if let Some(mut stdin) = stdin {
                // The error EPIPE is ignored, because a plugin need not read its input.
                let _ = stdin.write_all(input).await;
            }
        };
        tokio::join!(
            feed,
            // `drain` keeps one byte more than the limit. From this byte, `accept` detects that the
            // output exceeds the limit.
            drain(stdout, answer, ANSWER_BYTES + 1),
            drain(stderr, complaint, STDERR_BYTES)
        );
    };
    let mut talk = std::pin::pin!(talk);
    let mut output_ended = false;
    let status = loop {
        tokio::select! {
            status = child.wait() => break status,
            () = &mut talk, if !output_ended => output_ended = true,
        }
    };
    if !output_ended {
        let _ = timeout(OUTPUT_GRACE, talk).await;
    }
    status
}

/// Reads `from` until its end, and appends at most `limit` bytes to `kept`.
async fn drain(from: Option<impl AsyncRead + Unpin>, kept: &mut Vec<u8>, limit: usize) {
    let Some(mut from) = from else { return };
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        let room = limit.saturating_sub(kept.len()).min(count);
        kept.extend_from_slice(buffer.get(..room).unwrap_or_default());
    }
}

/// Kills the plugin's process group, and also the plugin's descendants that have left this process
/// group.
async fn kill(child: &mut Child, container: Option<&str>) {
    if let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()) {
        // The plugin's process id can't belong to another process yet, because rrun-cri has not
        // reaped the plugin.
        let _ = killpg(Pid::from_raw(pid), Signal::SIGKILL);
    }
    let _ = timeout(KILL_TIMEOUT, child.wait()).await;
    if let Some(container) = container {
        leftover::end(container).await;
    }
}

fn how(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(signal)) => format!("killed by signal {signal}"),
        (None, None) => "its exit status is unknown".to_owned(),
    }
}

/// Returns a plugin's standard error output in a form that can be appended to an error message.
fn complained(complaint: &[u8]) -> String {
    let text = one_line(complaint);
    if text.is_empty() {
        String::new()
    } else {
        format!("; the plugin's standard error: {text}")
    }
}

/// Returns `text` as a single line of at most [`SHOWN_CHARACTERS`] characters.
fn one_line(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let mut short: String = line
        .chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .take(SHOWN_CHARACTERS)
        .collect();
    if short.len() < line.len() {
        short.push('…');
    }
    short
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_contains_the_output_of_a_plugin_on_one_short_line() {
        assert_eq!(one_line(b" two\n lines\x1b[0m\n"), "two lines\u{fffd}[0m");
        let long = one_line("ä".repeat(5000).as_bytes());
        assert_eq!(long.chars().count(), SHOWN_CHARACTERS + 1);
        assert_eq!(complained(b"\n"), "");
        assert!(parse("ADD", "x", b"[]").is_err());
        assert!(parse("ADD", "x", b"").is_err_and(|e| {
            e.to_string()
                .ends_with("returned no valid CNI result for ADD: its output is empty")
        }));
    }
}
