//! A terminal that somebody could sit at, by tmux.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::ensure;
use crate::support::machine::{Result, command, wait_for};
use crate::support::needs::Need;

pub(crate) const TMUX: Need = Need::Program("tmux");

/// A terminal that somebody could sit at.
pub(crate) struct Terminal(PathBuf);

impl Terminal {
    /// Its server listens on a socket next to this path: one that is on its way out takes no more
    /// sessions, and nothing tells when it has gone.
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
        wait_for(&format!("{what:?} on the terminal"), || {
            let screen = self.tmux(&["capture-pane", "-p"])?;
            ensure!(screen.lines().any(|line| line.trim() == what), "{screen}");
            Ok(Some(()))
        })
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.tmux(&["kill-server"]);
    }
}
