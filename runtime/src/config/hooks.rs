//! The hooks of a container. A hook is a program that rrun executes at one of six points of a
//! container's life cycle.
//!
//! See "POSIX-platform Hooks" in config.md of the runtime specification. Each hook receives the
//! container's state on its standard input. If a poststart or poststop hook fails, rrun only logs
//! the failure. If a hook of another kind fails, rrun deletes the container.

use std::ffi::{CString, OsStr};
use std::io::{ErrorKind, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use oci_spec::runtime::{Hook, Hooks};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::error::{Context, Result, refuse};
use crate::log;
use crate::seccomp::Filter;
use crate::sys::syscalls::{blocks_signal, set_signal_mask, signal_set};

/// The timeout of a hook for which config.json specifies no timeout. The specification sets no
/// default timeout, but rrun must not wait forever for a hook.
const DEFAULT_HOOK_TIMEOUT: Duration = Duration::from_secs(3600);
/// The time after which rrun logs that it is still waiting for a hook.
const HOOK_WARNING_DELAY: Duration = Duration::from_secs(10);

/// Checks the paths and the timeouts of all hooks.
///
/// # Errors
/// Fails if the path of a hook is not absolute, or if the timeout of a hook is not positive.
pub(crate) fn validate(hooks: &Hooks) -> Result<()> {
    #[allow(deprecated)] // prestart is deprecated, but callers still use it
    let lists = [
        ("prestart", hooks.prestart()),
        ("createRuntime", hooks.create_runtime()),
        ("createContainer", hooks.create_container()),
        ("startContainer", hooks.start_container()),
        ("poststart", hooks.poststart()),
        ("poststop", hooks.poststop()),
    ];
    for (name, list) in lists {
        for (index, hook) in list.iter().flatten().enumerate() {
            if !hook.path().is_absolute() {
                refuse!(
                    "hooks.{name}[{index}].path: {} is not an absolute path",
                    hook.path().display()
                );
            }
            if hook.timeout().is_some_and(|seconds| seconds <= 0) {
                refuse!("hooks.{name}[{index}].timeout: must be more than 0");
            }
        }
    }
    Ok(())
}

/// The root and the namespaces in which hooks run.
#[derive(Clone, Copy)]
pub(crate) enum HookPlace<'a> {
    /// The hook runs outside the container's root, in the namespaces of the calling process. If a
    /// pidfd of the container's first process is given, rrun kills the hook when the first process
    /// dies. The container then no longer needs the hook.
    OnHost(Option<&'a OwnedFd>),
    /// The hook runs in the container's root and namespaces, like the container's programs.
    InContainer {
        /// The environment of the container's process. As in runc, a hook gets this environment if
        /// config.json specifies no environment for the hook.
        env: &'a [CString],
        /// The seccomp filter that the hook's process loads for itself.
        filter: Option<&'a Filter>,
    },
}

/// Runs hooks one after the other. If a hook fails, the remaining hooks do not run.
pub(crate) fn run(
    name: &str,
    hooks: Option<&Vec<Hook>>,
    state: &str,
    place: HookPlace<'_>,
) -> Result<()> {
    for (index, hook) in hooks.into_iter().flatten().enumerate() {
        run_one(hook, state, place).map_err(|error| {
            error.while_doing(format!(
                "run hooks.{name}[{index}] {}",
                hook.path().display()
            ))
        })?;
    }
    Ok(())
}

/// Runs hooks one after the other. If a hook fails, this function only logs the failure, as the
/// specification requires for poststart and poststop hooks.
pub(crate) fn run_and_log_failures(name: &str, hooks: Option<&Vec<Hook>>, state: &str) {
    for (index, hook) in hooks.into_iter().flatten().enumerate() {
        if let Err(error) = run_one(hook, state, HookPlace::OnHost(None)) {
            log::warning(&format!(
                "run hooks.{name}[{index}] {}: {error}",
                hook.path().display()
            ));
        }
    }
}

/// The pipe to a hook's standard input, and the part of the container's state that rrun has not
/// written to the pipe yet. The hook can read the state late or never, so rrun writes without
/// blocking.
struct HookInput<'a> {
    pipe: ChildStdin,
    rest: &'a [u8],
}

impl<'a> HookInput<'a> {
    fn new(pipe: ChildStdin, state: &'a str) -> Self {
        let rest = state.as_bytes();
        // Make the pipe non-blocking, so that a full pipe does not block rrun. ioctl_fionbio cannot
        // fail on an open descriptor.
        let _ = rustix::io::ioctl_fionbio(&pipe, true);
        HookInput { pipe, rest }
    }

    /// Writes as many bytes of the state as fit into the pipe. Returns `None` if no bytes remain,
    /// or if the hook has closed its standard input. A closed standard input is not an error,
    /// because a hook need not read the state.
    fn write_more(mut self) -> Result<Option<Self>> {
        while !self.rest.is_empty() {
            match self.pipe.write(self.rest) {
                Ok(length) => self.rest = self.rest.get(length..).unwrap_or_default(),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(Some(self)),
                Err(error) if error.kind() == ErrorKind::BrokenPipe => return Ok(None),
                Err(error) => {
                    return Err(error).doing(|| "write the container's state to the hook");
                }
            }
        }
        Ok(None)
    }
}

/// The combined standard output and standard error of a hook. If the hook fails, the end of this
/// output usually explains the failure.
struct HookOutput {
    pipe: Option<OwnedFd>,
    end: Vec<u8>,
}

impl HookOutput {
    /// The maximum number of bytes that rrun keeps from the end of the hook's output.
    const OUTPUT_BYTES: usize = 4096;

    /// Creates the pipe for a hook's output. Returns two values: a `HookOutput` that contains the
    /// read end, and the write end. The hook inherits the write end.
    fn new() -> Result<(HookOutput, OwnedFd)> {
        let doing = || "create a pipe for the output of the hook";
        let (pipe, write_end) = pipe_with(PipeFlags::CLOEXEC).doing(doing)?;
        rustix::io::ioctl_fionbio(&pipe, true).doing(doing)?;
        let output = HookOutput {
            pipe: Some(pipe),
            end: Vec::new(),
        };
        Ok((output, write_end))
    }

    /// Reads at most [`HookOutput::OUTPUT_BYTES`] of output from the pipe. Returns whether the
    /// function has read any output.
    fn read_some(&mut self) -> bool {
        let Some(pipe) = &self.pipe else {
            return false;
        };
        let mut buffer = [0u8; HookOutput::OUTPUT_BYTES];
        match rustix::io::read(pipe, &mut buffer) {
            Ok(length) if length > 0 => {
                self.end
                    .extend_from_slice(buffer.get(..length).unwrap_or_default());
                let surplus = self.end.len().saturating_sub(HookOutput::OUTPUT_BYTES);
                self.end.drain(..surplus);
                true
            }
            Err(Errno::INTR | Errno::AGAIN) => false,
            // End of file means that every process has closed the write end of the pipe.
            _ => {
                self.pipe = None;
                false
            }
        }
    }

    /// Returns the last bytes of the hook's output, as a suffix for an error sentence. rrun calls
    /// this function after the hook has exited. A background process of the hook can still write to
    /// the pipe, but rrun does not read this later output.
    fn text(mut self) -> String {
        // Read at most 64 KiB, the capacity of a pipe. A background process of the hook can write
        // to the pipe without end.
        let mut left = (64 << 10) / HookOutput::OUTPUT_BYTES;
        while left > 0 && self.read_some() {
            left -= 1;
        }
        let text = String::from_utf8_lossy(&self.end);
        match text.trim() {
            "" => String::new(),
            text => format!(": {text}"),
        }
    }
}

/// Makes the hook's process unblock all signals before it executes the hook's program. In the
/// foreground, rrun blocks the signals that it forwards to the container. If a hook inherited the
/// blocked signals, only SIGKILL could terminate the hook.
fn unblock_signals_in_hook(command: &mut Command) {
    if !blocks_signal(libc::SIGTERM) {
        return;
    }
    let unblock = || Ok(set_signal_mask(&signal_set(&[])).map(drop)?);
    // SAFETY: sigprocmask(2) can safely be called between fork and exec.
    unsafe { command.pre_exec(unblock) };
}

/// Makes the hook's process load `filter` before it executes the hook's program.
fn load_in_hook(command: &mut Command, filter: &Filter) {
    let filter = filter.clone();
    let load = move || {
        let loaded = filter.load().map(drop);
        loaded.map_err(|error| std::io::Error::other(error.to_string()))
    };
    // SAFETY: no other thread of rrun holds a lock, so `load` can safely call any function between
    // fork and exec.
    unsafe { command.pre_exec(load) };
}

/// Returns the command of a hook, with its arguments and its environment.
fn command(hook: &Hook, place: HookPlace<'_>) -> Command {
    let mut command = Command::new(hook.path());
    if let Some((name, rest)) = hook.args().as_ref().and_then(|args| args.split_first()) {
        command.arg0(name).args(rest);
    }
    command.env_clear().stdin(Stdio::piped());
    for variable in hook.env().iter().flatten() {
        if let Some((name, value)) = variable.split_once('=') {
            command.env(name, value);
        }
    }
    let HookPlace::InContainer { env, filter } = place else {
        unblock_signals_in_hook(&mut command);
        return command;
    };
    if hook.env().is_none() {
        for variable in env {
            let mut parts = variable.to_bytes().splitn(2, |byte| *byte == b'=');
            if let (Some(name), Some(value)) = (parts.next(), parts.next()) {
                command.env(OsStr::from_bytes(name), OsStr::from_bytes(value));
            }
        }
    }
    if let Some(filter) = filter {
        load_in_hook(&mut command, filter);
    }
    command
}

fn run_one(hook: &Hook, state: &str, place: HookPlace<'_>) -> Result<()> {
    let container = match place {
        HookPlace::OnHost(container) => container,
        HookPlace::InContainer { .. } => None,
    };
    let mut command = command(hook, place);
    let (mut output, stdout) = HookOutput::new()?;
    let stderr = stdout
        .try_clone()
        .doing(|| "create a pipe for the output of the hook")?;
    command.stdout(stdout).stderr(stderr);
    let mut child = command.spawn().doing(|| "start the hook")?;
    // Drop `command`, to close rrun's copies of the hook's ends of the pipes. As long as rrun has a
    // copy of the output pipe's write end, rrun never reads end of file from this pipe.
    drop(command);
    let input = child.stdin.take().map(|pipe| HookInput::new(pipe, state));
    if let Err(error) = await_hook(hook, &child, container, input, &mut output) {
        let _ = child.kill();
        let _ = child.wait();
        return Err(error);
    }
    let status = child.wait().doing(|| "read the exit status of the hook")?;
    if !status.success() {
        refuse!("the hook failed with {status}{}", output.text());
    }
    Ok(())
}

fn timeout(hook: &Hook) -> Duration {
    hook.timeout()
        .map(|seconds| u32::try_from(seconds).unwrap_or(u32::MAX))
        .map_or(DEFAULT_HOOK_TIMEOUT, |seconds| {
            Duration::from_secs(seconds.into())
        })
}

/// Waits until a hook has exited. While this function waits, it writes to the hook's standard input
/// and reads the hook's output. If the function fails, the hook can still be running.
fn await_hook(
    hook: &Hook,
    child: &Child,
    container: Option<&OwnedFd>,
    mut input: Option<HookInput<'_>>,
    output: &mut HookOutput,
) -> Result<()> {
    let Some(pid) = Pid::from_raw(child.id() as i32) else {
        return Ok(());
    };
    let pidfd = &pidfd_open(pid, PidfdFlags::empty()).doing(|| "open a pidfd for the hook")?;
    let timeout = timeout(hook);
    let deadline = Instant::now() + timeout;
    let mut warned = false;
    loop {
        input = input.map(HookInput::write_more).transpose()?.flatten();
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            refuse!(
                "the hook did not exit within {} s, so rrun killed it",
                timeout.as_secs()
            );
        }
        let wait = left.min(HOOK_WARNING_DELAY);
        let wait = Timespec {
            tv_sec: wait.as_secs() as _,
            tv_nsec: wait.subsec_nanos() as _,
        };
        let mut watched = vec![PollFd::new(pidfd, PollFlags::IN)];
        watched.extend(container.map(|container| PollFd::new(container, PollFlags::IN)));
        let writing = input.as_ref().map(|input| &input.pipe);
        watched.extend(writing.map(|pipe| PollFd::new(pipe, PollFlags::OUT)));
        let reading = output.pipe.as_ref();
        watched.extend(reading.map(|pipe| PollFd::new(pipe, PollFlags::IN)));
        let polled = poll(&mut watched, Some(&wait));
        let ready = |at: usize| watched.get(at).is_some_and(|fd| !fd.revents().is_empty());
        match polled {
            Ok(0) if !warned && left >= HOOK_WARNING_DELAY => {
                warned = true;
                log::warning(&format!(
                    "rrun is still waiting for hook {}",
                    hook.path().display()
                ));
            }
            Ok(0) | Err(Errno::INTR) => {}
            Ok(_) if ready(0) => return Ok(()),
            Ok(_) if container.is_some() && ready(1) => {
                refuse!("the container's first process died while the hook was running");
            }
            // The pipe to the hook's standard input has free space, or the pipe with the hook's
            // output contains data.
            Ok(_) => {
                output.read_some();
            }
            Err(errno) => return Err(errno).doing(|| "wait for the hook"),
        }
    }
}
