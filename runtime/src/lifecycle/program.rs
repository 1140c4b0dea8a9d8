//! The last steps of a process on its way to its program, of a container's first process and of
//! one of `exec` alike.

use std::ffi::{CStr, CString};
use std::os::fd::BorrowedFd;

use rustix::fs::Mode;
use rustix::io::Errno;

use crate::error::{Context, Error, Result};
use crate::lifecycle::channel::Channel;
use crate::log;
use crate::process::descriptors::Descriptors;
use crate::process::lsm::OpenLabels;
use crate::process::terminal::Terminal;
use crate::process::{Process, enter_cwd, environment, make_cwd, not_executed};
use crate::seccomp::{Filter, SharedPage};
use crate::sys::syscalls::{self, Execution};

/// Everything between the container's root and the program: the working directory, the
/// user, and the descriptors. `kept` stay open until the execution. Returns the program's path.
///
/// A filter could forbid these steps, so they all happen before one is loaded.
pub(crate) fn apply_process(
    process: &mut Process,
    labels: OpenLabels,
    descriptors: &Descriptors,
    will_be_filtered: bool,
    kept: &[BorrowedFd<'_>],
) -> Result<CString> {
    labels.apply()?;
    drop(labels);
    // Before this, no path of the container is resolved; after it, no path of the host.
    log::close();
    // SAFETY: the owners of other descriptors belong to the code that forked this process, and it
    // never returns there ([`crate::sys::child::NeverReturn`]).
    unsafe { descriptors.close_all_but(kept) }?;
    environment::complete(&mut process.env, process.uid, descriptors.listen);
    process.apply_inherited()?;
    process.chown_stdio();
    rustix::process::umask(Mode::from_raw_mode(process.umask.unwrap_or(0o022)));
    // With all rights first: the directory may be root's alone. Without them then, because
    // a network file system may know only the user.
    let entered = match enter_cwd(&process.cwd) {
        Err(_) if !process.cwd.exists() => make_cwd(&process.cwd),
        entered => entered,
    };
    // Rust ignores SIGPIPE; what is ignored stays so in a program executed.
    syscalls::default_signal(libc::SIGPIPE).doing(|| "reset SIGPIPE")?;
    process.become_user(will_be_filtered && !process.no_new_privileges)?;
    if entered.is_err() {
        enter_cwd(&process.cwd)?;
    }
    if process.no_new_privileges {
        rustix::thread::set_no_new_privs(true).doing(|| "set process.noNewPrivileges")?;
    }
    process.find_program()
}

/// Becomes the program; if that fails, returns the reason. `send` hands over the page through
/// which a filtered process reports.
///
/// Once a filter is loaded, this process makes no system call but execve(2). A profile must allow
/// that call, or no program could be started under it.
pub(crate) fn execute(
    program: &CStr,
    process: &Process,
    filter: Option<(&Filter, SharedPage)>,
    send: impl FnOnce(BorrowedFd<'_>) -> Result<()>,
) -> Error {
    let execution = Execution::new(program, &process.args, &process.env);
    let Some((filter, page)) = filter else {
        return not_executed(&program.to_string_lossy(), execution.execute(), false);
    };
    let confined = page.hand_over(program, send).and_then(|reporter| {
        filter.confine(&reporter)?;
        Ok(reporter)
    });
    match confined {
        Err(error) => error,
        Ok(reporter) => {
            reporter.failed(execution.execute());
            filter.end()
        }
    }
}

/// Joins the container's session keyring, which is made if it is not there.
pub(crate) fn join_keyring(id: &str, labels: &OpenLabels) -> Result<Option<i64>> {
    labels.label_keyring(
        || match syscalls::join_session_keyring(&format!("_ses.{id}")) {
            // A kernel without keyrings has no keys to protect.
            Err(Errno::NOSYS) => {
                log::warning("no session keyring is made: the kernel has no keyrings");
                Ok(None)
            }
            result => result
                .map(Some)
                .doing(|| "make a session keyring (--no-new-keyring leaves it out)"),
        },
    )
}

/// Gives the master side of a terminal to the socket that the caller named, or else to rrun, which
/// relays it.
pub(crate) fn hand_over_terminal(
    terminal: &Terminal,
    socket: Option<BorrowedFd<'_>>,
    channel: &Channel,
) -> Result<()> {
    if let Some(socket) = socket {
        return terminal.send_master(socket);
    }
    terminal.keep_newlines()?;
    channel.send_terminal(terminal.master())
}
