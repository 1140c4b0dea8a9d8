//! The last steps of a process before it executes its program. A container's first process and each
//! process that `exec` creates perform the same steps.

use std::ffi::{CStr, CString};
use std::os::fd::BorrowedFd;

use rustix::fs::{Mode, Uid};
use rustix::io::Errno;
use rustix::thread::set_thread_res_uid;

use crate::error::{Context, Error, Result};
use crate::lifecycle::channel::Channel;
use crate::log;
use crate::process::descriptors::Descriptors;
use crate::process::lsm::OpenLabels;
use crate::process::terminal::Terminal;
use crate::process::{Process, enter_cwd, environment, make_cwd, not_executed};
use crate::seccomp::{Filter, SharedPage};
use crate::sys::syscalls::{self, Execution};

/// Performs the last steps before the process executes the program. The process has already changed
/// its root. Among other steps, this function sets the labels, closes descriptors, enters the
/// working directory and changes the user. The descriptors in `kept` remain open until the process
/// executes the program. Returns the program's path.
///
/// A seccomp filter can forbid the system calls of these steps. So the process does all these steps
/// before it loads its filter.
pub(crate) fn apply_process(
    process: &mut Process,
    labels: OpenLabels,
    descriptors: &Descriptors,
    will_be_filtered: bool,
    kept: &[BorrowedFd<'_>],
) -> Result<CString> {
    labels.apply()?;
    drop(labels);
    // Close the log before the process resolves its first path in the container. After this call of
    // log::close, the process resolves no path on the host.
    log::close();
    // SAFETY: the values that own the closed descriptors belong to the code that forked this
    // process. This process never returns to that code ([`crate::sys::child::NeverReturn`]).
    unsafe { descriptors.close_all_but(kept) }?;
    environment::complete(&mut process.env, process.uid, descriptors.listen);
    process.take_standard_streams()?;
    process.apply_inherited()?;
    rustix::process::umask(Mode::from_raw_mode(process.umask.unwrap_or(0o022)));
    // Enter the working directory before the process changes its user, because possibly only root
    // has access to the directory. But a network file system can refuse root and accept the user.
    // So if this attempt fails, the process tries again after it has changed its user.
    let entered = match enter_cwd(&process.cwd) {
        Err(_) if !process.cwd.exists() => make_cwd(&process.cwd),
        entered => entered,
    };
    // rrun ignores SIGPIPE. Without this call, the program would also ignore SIGPIPE, because
    // execve(2) preserves ignored signals.
    syscalls::default_signal(libc::SIGPIPE).doing(|| "reset SIGPIPE to its default action")?;
    process.become_user(will_be_filtered)?;
    if entered.is_err() {
        enter_cwd(&process.cwd)?;
    }
    if process.no_new_privileges {
        rustix::thread::set_no_new_privs(true).doing(|| "set process.noNewPrivileges")?;
    }
    process.find_program()
}

/// Executes the program. Returns only if the execution fails, and returns the error. `send` sends
/// the shared page to the rrun process that waits for the execution. A process with a seccomp
/// filter reports an error through this page.
///
/// After this process has loaded a filter, it calls only execve(2), and exits if execve(2) fails.
/// Every profile must allow execve(2), because otherwise no program could be started.
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

/// Returns a name for the session keyring of a new container. Keyrings have no namespace, and a
/// process of another container with the same user id can join every keyring whose name it knows.
/// So the name contains random bytes.
pub(crate) fn keyring_name(id: &str) -> Result<String> {
    let random: [u8; 16] =
        syscalls::random_bytes().doing(|| "choose a name for the session keyring (getrandom)")?;
    Ok(format!("_ses.{id}.{:032x}", u128::from_ne_bytes(random)))
}

/// Gives the process the session keyring `name` of the container `id`. The container must not see
/// the keys in the session keyring of rrun's caller. The kernel creates the keyring if it does not
/// exist: for the first process, and for `exec` after all processes of the container have left the
/// keyring.
pub(crate) fn join_keyring(name: &str, id: &str, labels: &OpenLabels) -> Result<()> {
    let doing = || "create a session keyring (--no-new-keyring skips this step)";
    labels.label_keyring(|| {
        let mut name = name.to_owned();
        let mut joined = own_keyring(&name);
        if let Err(Errno::ACCESS | Errno::KEYEXPIRED | Errno::KEYREVOKED | Errno::NOKEY) = joined {
            // The container has taken the permissions away from its keyring, or has deleted the
            // keyring. The process that `exec` creates then gets another keyring.
            name = keyring_name(id)?;
            joined = own_keyring(&name);
        }
        match joined {
            Err(Errno::DQUOT) => with_other_quota(|| own_keyring(&name)).doing(doing),
            // If the kernel does not support keyrings, there are no keys that rrun must hide from
            // the container.
            Err(Errno::NOSYS) => {
                log::warning(
                    "rrun creates no session keyring, because the kernel does not support keyrings",
                );
                Ok(())
            }
            joined => joined.doing(doing),
        }
    })
}

/// Joins the session keyring `name`, or creates it, and sets its permissions.
fn own_keyring(name: &str) -> std::result::Result<(), Errno> {
    // The permissions of the keyring. Only a process that possesses the keyring can read its name
    // and its keys. `exec` searches for the keyring by its name, for which the keyring's owner needs
    // the permission to search. The other permissions that the kernel gives to the owner of a new
    // keyring would apply to every process with the same user id, also in other containers. See
    // linux/keyctl.h.
    const POSSESSOR_ALL: u32 = 0x3f00_0000;
    const OWNER_SEARCH: u32 = 0x0008_0000;
    syscalls::join_session_keyring(name)?;
    syscalls::set_session_keyring_permissions(POSSESSOR_ALL | OWNER_SEARCH)
}

/// Calls `create` while this process has another user id, so that the new keyring counts against
/// the quota of another user.
///
/// The kernel limits the keys of each user, see keyrings(7). Usually the user is root, and a
/// container whose user is also root can use up root's quota. Without this function, rrun could
/// then start no process in any container. The user id is random, because a container could
/// otherwise use up the quota of that user, too.
///
/// The process that is root cannot find the new keyring by its name, because another user owns the
/// keyring. So each `exec` then creates another keyring.
fn with_other_quota(
    create: impl Fn() -> std::result::Result<(), Errno>,
) -> std::result::Result<(), Errno> {
    let random = u32::from_ne_bytes(syscalls::random_bytes()?);
    // Hardly any process has one of the higher ids. A user namespace usually maps only the ids
    // below 65536. The id u32::MAX is not valid.
    let ids = [(random | 0x8000_0000) & !1, 1 + random % 0xfffe];
    let mut created = Err(Errno::DQUOT);
    for id in ids.map(Uid::from_raw) {
        // The saved user id stays 0, so that this process can become root again.
        if set_thread_res_uid(id, id, Uid::ROOT).is_ok() {
            created = create();
            set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT)?;
        }
        if created.is_ok() {
            break;
        }
    }
    created
}

/// Sends the master side of a terminal to the parent. If rrun's caller specified a console socket,
/// the parent sends the master side to this socket. Otherwise, the parent copies data between the
/// terminal and its own standard streams.
pub(crate) fn hand_over_terminal(
    terminal: &Terminal,
    has_console_socket: bool,
    channel: &Channel,
) -> Result<()> {
    if !has_console_socket {
        terminal.keep_newlines()?;
    }
    channel.send_terminal(terminal.master())
}
