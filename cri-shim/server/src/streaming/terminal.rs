//! The size of a container's or command's terminal, which clients can change.

use rustix::termios::{Winsize, tcsetwinsize};

use crate::container::Container;
use rrun_kernel::errno::describe;
use rrun_streams::Descriptor;
use rrun_streams::remotecommand::Resizable;

/// A terminal whose size clients can change.
pub(super) struct Terminal<'a> {
    container: &'a Container,
    /// The pid of a command's first process. `None` means the container's first process.
    exec: Option<i32>,
    /// The terminal's master, if the pod has a monitor of an earlier version, which passes the master
    /// to the server.
    master: Option<&'a Descriptor>,
}

impl<'a> Terminal<'a> {
    /// `data` is the socket for the terminal's data or, with a monitor of an earlier version, the
    /// terminal's master.
    pub(super) fn new(
        container: &'a Container,
        exec: Option<i32>,
        data: Option<&'a Descriptor>,
    ) -> Self {
        Terminal {
            container,
            exec,
            master: data.filter(|data| data.is_terminal()),
        }
    }
}

impl Resizable for Terminal<'_> {
    async fn resize(&self, size: Winsize) {
        let (container, failure) = (self.container, "resize the terminal");
        if let Some(master) = self.master {
            if let Err(errno) = tcsetwinsize(master, size) {
                log::debug!(
                    "{}: {failure}: {}",
                    container.name(),
                    describe(&errno.into())
                );
            }
            return;
        }
        let (monitor, size) = (&container.sandbox.monitor, (size.ws_col, size.ws_row));
        if let Err(error) = monitor.resize(&container.id, self.exec, size).await {
            log::debug!("{}: {failure}: {error}", container.name());
        }
    }
}
