//! Running one plugin: its environment, its input, its answer, its end; CNI specification,
//! section 2.

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

/// The most that a plugin may answer, in bytes.
const ANSWER_BYTES: usize = 1 << 20;

/// How much of what a plugin writes to its standard error is kept, in bytes.
const COMPLAINT_BYTES: usize = 4 << 10;

/// How much of it, or of an answer that is none, an error shows, in characters.
const SHOWN_CHARACTERS: usize = 400;

/// How long a plugin that has exited may have descendants hold its output open.
const OUTPUT_GRACE: Duration = Duration::from_secs(1);

/// How long a killed plugin may take to end; one in a system call that hangs does not.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);

/// Where iptables and the like are, should rrun-cri have been started without a PATH.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What is wrong, in sentences; the first word is the plugin's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum PluginError {
    #[error("the CNI plugin {plugin} is in none of {dirs}")]
    Missing { plugin: String, dirs: String },
    #[error("run the CNI plugin {path}: {reason}")]
    Start { path: String, reason: String },
    #[error(
        "the CNI plugin {plugin} did not end {command} within {seconds} s and was killed{complaint}"
    )]
    Hung {
        plugin: String,
        command: &'static str,
        seconds: u64,
        complaint: String,
    },
    /// It said what is wrong, as the specification has it.
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
    #[error("the CNI plugin {plugin} answered {command} with no CNI result: {why}{complaint}")]
    Garbage {
        plugin: String,
        command: &'static str,
        why: String,
        complaint: String,
    },
}

/// CNI_COMMAND and what goes with it.
pub(super) struct PluginCall<'a> {
    pub command: &'static str,
    /// The binary's name.
    pub plugin: &'a str,
    /// The environment beside CNI_COMMAND and CNI_PATH.
    pub environment: &'a [(&'static str, String)],
    /// The pod, for what is left of a plugin that is killed.
    pub container: Option<&'a str>,
    pub input: Vec<u8>,
    pub deadline: Instant,
}

/// Where plugins are.
#[derive(Clone, Debug)]
pub(super) struct PluginDirs {
    dirs: Vec<PathBuf>,
    /// As CNI_PATH has it.
    joined: String,
}

/// What a plugin that failed prints; CNI specification, section 5, "Error".
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

    /// The plugin's binary: the first by its name.
    pub(super) fn find(&self, plugin: &str) -> Result<PathBuf, PluginError> {
        let mut paths = self.dirs.iter().map(|dir| dir.join(plugin));
        paths
            .find(|path| path.is_file())
            .ok_or_else(|| PluginError::Missing {
                plugin: plugin.to_owned(),
                dirs: self.joined.clone(),
            })
    }

    /// Runs a plugin to its end and gives what it printed. At the deadline it is killed, and all
    /// that it has started. Whoever drops the future leaves it running.
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
        let of = call.container.unwrap_or("of no pod");
        let what = format!("{of}: the CNI plugin {}, {}", call.plugin, call.command);
        let talk = converse(&mut child, &call.input, &mut answer, &mut complaint);
        let ended = timeout_at(call.deadline, slow(what, talk)).await;
        let plugin = call.plugin.to_owned();
        let command = call.command;
        let complaint = complained(&complaint);
        let status = match ended {
            Ok(Ok(status)) => status,
            Ok(Err(error)) => {
                let how = format!("wait for its end: {}", describe(&error));
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
            // Ours alone.
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

/// The answer of a plugin that has ended, or its error. `complaint` is for the end of a sentence.
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
        let why = format!("over {ANSWER_BYTES} bytes");
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
                message: shown(message.as_bytes()),
                complaint,
            })
        }
        _ => Err(PluginError::Died {
            plugin,
            command,
            how: if answer.is_empty() {
                how(status)
            } else {
                format!("{}, it printed {:?}", how(status), shown(&answer))
            },
            complaint,
        }),
    }
}

/// The answer as JSON.
pub(super) fn parse(call: &'static str, plugin: &str, answer: &[u8]) -> Result<Value, PluginError> {
    serde_json::from_slice::<Value>(answer)
        .ok()
        .filter(Value::is_object)
        .ok_or_else(|| PluginError::Garbage {
            plugin: plugin.to_owned(),
            command: call,
            why: if answer.is_empty() {
                "nothing".to_owned()
            } else {
                format!("{:?}", shown(answer))
            },
            complaint: String::new(),
        })
}

/// Feeds the plugin, takes what it writes, and waits for its end. Its descendants may keep its
/// output open for longer than it lives.
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
                // A plugin need not read it: EPIPE is its own affair.
                let _ = stdin.write_all(input).await;
            }
        };
        tokio::join!(
            feed,
            // One more than it may, which tells that it was too much.
            drain(stdout, answer, ANSWER_BYTES + 1),
            drain(stderr, complaint, COMPLAINT_BYTES)
        );
    };
    let mut talk = std::pin::pin!(talk);
    let mut said_all = false;
    let status = loop {
        tokio::select! {
            status = child.wait() => break status,
            () = &mut talk, if !said_all => said_all = true,
        }
    };
    if !said_all {
        let _ = timeout(OUTPUT_GRACE, talk).await;
    }
    status
}

/// Reads to the end and keeps the first `most` bytes.
async fn drain(from: Option<impl AsyncRead + Unpin>, kept: &mut Vec<u8>, most: usize) {
    let Some(mut from) = from else { return };
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        let room = most.saturating_sub(kept.len()).min(count);
        kept.extend_from_slice(buffer.get(..room).unwrap_or_default());
    }
}

/// Kills the plugin's process group, and what has left it for a session of its own.
async fn kill(child: &mut Child, container: Option<&str>) {
    if let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()) {
        // Not reaped yet, so the number is still its.
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
        (None, None) => "it ended in an unknown way".to_owned(),
    }
}

/// For the end of a sentence.
fn complained(complaint: &[u8]) -> String {
    let text = shown(complaint);
    if text.is_empty() {
        String::new()
    } else {
        format!("; it wrote: {text}")
    }
}

/// Text on one line, cut where it gets long.
fn shown(text: &[u8]) -> String {
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
    fn what_a_plugin_prints_is_shown_on_one_short_line() {
        assert_eq!(shown(b" two\n lines\x1b[0m\n"), "two lines\u{fffd}[0m");
        let long = shown("ä".repeat(5000).as_bytes());
        assert_eq!(long.chars().count(), SHOWN_CHARACTERS + 1);
        assert_eq!(complained(b"\n"), "");
        assert!(parse("ADD", "x", b"[]").is_err());
        assert!(
            parse("ADD", "x", b"")
                .is_err_and(|e| e.to_string().ends_with("no CNI result: nothing"))
        );
    }
}
