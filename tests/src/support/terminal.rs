//! An interactive terminal, which tmux provides.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::ensure;
use crate::support::machine::{Result, command, wait_for};
use crate::support::needs::Need;

pub(crate) const TMUX: Need = Need::Program("tmux");

/// An interactive terminal that a test types into and reads from.
pub(crate) struct Terminal(PathBuf);

impl Terminal {
    /// Opens a terminal that runs `shell_command`. For each terminal, the function starts a
    /// separate tmux server with its own socket next to the path `socket`. A common tmux server
    /// would exit after its last session. An exiting server accepts no new session, and the test
    /// cannot detect when the server has exited.
    pub(crate) fn open(socket: PathBuf, shell_command: &str) -> Result<Self> {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let terminal = Terminal(socket.with_extension(number.to_string()));
        terminal.tmux(&["new-session", "-d", "-x", "80", "-y", "24", shell_command])?;
        Ok(terminal)
    }

    pub(crate) fn tmux(&self, args: &[&str]) -> Result<String> {
        let run = command("tmux", ["-f", "/dev/null", "-S"])
            .arg(&self.0)
            .args(args);
        Ok(run.ok()?.stdout)
    }

    pub(crate) fn types(&self, line: &str) -> Result {
        self.tmux(&["send-keys", line, "Enter"]).map(|_| ())
    }

    pub(crate) fn shows(&self, what: &str) -> Result {
        wait_for(&format!("the terminal to show {what:?}"), || {
            let screen = self.tmux(&["capture-pane", "-p"])?;
            ensure!(
                screen.lines().any(|line| line.trim() == what),
                "the terminal does not show {what:?}:\n{screen}"
            );
            Ok(Some(()))
        })
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.tmux(&["kill-server"]);
    }
}
