//! Programs that a configuration has run at six points of a container's life.
//!
//! See config.md, "POSIX-platform Hooks". Each gets the container's state on standard
//! input; a failure of any but the last two kinds undoes the container.

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

/// How long a hook may run that says nothing about it; the specification sets no limit, but
/// nothing here waits for ever.
const DEFAULT_HOOK_TIMEOUT: Duration = Duration::from_secs(3600);
/// After this, the log says what is being waited for.
const HOOK_WARNING_DELAY: Duration = Duration::from_secs(10);

/// # Errors
/// A hook whose path is not absolute, or whose timeout is not positive.
pub(crate) fn validate(hooks: &Hooks) -> Result<()> {
    #[allow(deprecated)] // prestart is: callers use it all the same
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

/// Where hooks run.
#[derive(Clone, Copy)]
pub(crate) enum HookPlace<'a> {
    /// In the host's or the caller's surroundings, for as long as the container's first process
    /// lives, if that is given: nobody needs them then.
    OnHost(Option<&'a OwnedFd>),
    /// In the container, as its own programs.
    InContainer {
        /// What the container's process has, for hooks that say nothing of their environment:
        /// so has runc.
        env: &'a [CString],
        /// Loaded in the hook alone.
        filter: Option<&'a Filter>,
    },
}

/// Runs hooks one after the other, until one fails.
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

/// The same, but a failure is only logged, as it is to be for poststart and poststop.
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

/// The state on its way into a hook, which may read it late or never.
struct HookInput<'a> {
    pipe: ChildStdin,
    rest: &'a [u8],
}

impl<'a> HookInput<'a> {
    fn new(pipe: ChildStdin, state: &'a str) -> Self {
        let rest = state.as_bytes();
        // What the pipe does not hold must not block. It can't fail on a descriptor of our own.
        let _ = rustix::io::ioctl_fionbio(&pipe, true);
        HookInput { pipe, rest }
    }

    /// Writes what there is room for. `None`: all is written, or nobody will read it, which makes
    /// no failed hook.
    fn write_more(mut self) -> Option<Self> {
        while !self.rest.is_empty() {
            match self.pipe.write(self.rest) {
                Ok(length) => self.rest = self.rest.get(length..)?,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Some(self),
                Err(_) => return None,
            }
        }
        None
    }
}

/// What a hook writes, to either output: the end of it tells why it failed.
struct HookOutput {
    pipe: Option<OwnedFd>,
    end: Vec<u8>,
}

impl HookOutput {
    /// How much is kept, in bytes.
    const OUTPUT_BYTES: usize = 4096;

    /// Also gives the side that the hook is to have.
    fn new() -> Result<(HookOutput, OwnedFd)> {
        let doing = || "make a pipe for its output";
        let (pipe, hooks) = pipe_with(PipeFlags::CLOEXEC).doing(doing)?;
        rustix::io::ioctl_fionbio(&pipe, true).doing(doing)?;
        let output = HookOutput {
            pipe: Some(pipe),
            end: Vec::new(),
        };
        Ok((output, hooks))
    }

    /// Takes some of what is there; whether there was any.
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
            // All who had it have closed it.
            _ => {
                self.pipe = None;
                false
            }
        }
    }

    /// Once the hook has ended. What it left running may go on writing, to nobody.
    fn text(mut self) -> String {
        // As much as a pipe holds, and no more.
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

/// Has the filter loaded in the process that becomes the hook.
fn load_in_hook(command: &mut Command, filter: &Filter) {
    let filter = filter.clone();
    let load = move || {
        let loaded = filter.load().map(drop);
        loaded.map_err(|error| std::io::Error::other(error.to_string()))
    };
    // SAFETY: rrun has one thread, so that what runs between fork and exec may do anything.
    unsafe { command.pre_exec(load) };
}

/// The hook's program with its arguments and environment.
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
    if let HookPlace::InContainer { env, filter } = place {
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
    }
    command
}

fn run_one(hook: &Hook, state: &str, place: HookPlace<'_>) -> Result<()> {
    let container = match place {
        HookPlace::OnHost(container) => container,
        HookPlace::InContainer { .. } => None,
    };
    let mut command = command(hook, place);
    let (mut output, hooks) = HookOutput::new()?;
    let again = hooks.try_clone().doing(|| "make a pipe for its output")?;
    command.stdout(hooks).stderr(again);
    let mut child = command.spawn().doing(|| "start it")?;
    // It holds the hook's side of the pipes.
    drop(command);
    let input = child.stdin.take().map(|pipe| HookInput::new(pipe, state));
    if let Some(pid) = Pid::from_raw(child.id() as i32) {
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).doing(|| "watch it")?;
        if let Err(ended) = await_hook(hook, &pidfd, container, input, &mut output) {
            let kill = |child: &mut Child| {
                let _ = child.kill();
                let _ = child.wait();
            };
            match ended {
                NotEnded::TimedOut(timeout) => {
                    kill(&mut child);
                    refuse!(
                        "it did not end within {} s and was killed",
                        timeout.as_secs()
                    );
                }
                NotEnded::ContainerDied => {
                    kill(&mut child);
                    refuse!("the container's first process died meanwhile");
                }
                NotEnded::Failed(errno) => return Err(errno).doing(|| "wait for it"),
            }
        }
    }
    let status = child.wait().doing(|| "wait for it")?;
    if !status.success() {
        refuse!("it ended with {status}{}", output.text());
    }
    Ok(())
}

/// Why a hook is not waited for any longer.
enum NotEnded {
    TimedOut(Duration),
    ContainerDied,
    Failed(Errno),
}

fn timeout(hook: &Hook) -> Duration {
    hook.timeout()
        .map(|seconds| u32::try_from(seconds).unwrap_or(u32::MAX))
        .map_or(DEFAULT_HOOK_TIMEOUT, |seconds| {
            Duration::from_secs(seconds.into())
        })
}

/// Waits until a hook has ended, and meanwhile writes its input and reads its output.
fn await_hook(
    hook: &Hook,
    pidfd: &OwnedFd,
    container: Option<&OwnedFd>,
    mut input: Option<HookInput<'_>>,
    output: &mut HookOutput,
) -> std::result::Result<(), NotEnded> {
    let timeout = timeout(hook);
    let deadline = Instant::now() + timeout;
    let mut warned = false;
    loop {
        input = input.and_then(HookInput::write_more);
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(NotEnded::TimedOut(timeout));
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
        let dead = |at: usize| watched.get(at).is_some_and(|fd| !fd.revents().is_empty());
        match polled {
            Ok(0) if !warned && left >= HOOK_WARNING_DELAY => {
                warned = true;
                log::warning(&format!("still waiting for hook {}", hook.path().display()));
            }
            Ok(0) | Err(Errno::INTR) => {}
            Ok(_) if dead(0) => return Ok(()),
            Ok(_) if container.is_some() && dead(1) => return Err(NotEnded::ContainerDied),
            // A pipe has room, or something in it.
            Ok(_) => {
                output.read_some();
            }
            Err(errno) => return Err(NotEnded::Failed(errno)),
        }
    }
}
