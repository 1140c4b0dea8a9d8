//! Faults in the system calls of a command. [`trace`] runs a command and traces the command and its
//! children with ptrace(2). A child is traced until it executes another program. In one system call,
//! the tracer injects a fault: an error, a transfer of fewer bytes, or the death of the process.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::libc;
use nix::sys::ptrace::{self, Event, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::support::errnos;
use crate::support::machine::{Result, deadline};

/// The time for which the tracer waits for further system calls after the last command has exited.
const QUIET: Duration = Duration::from_millis(5);

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Fault {
    /// The kernel does not execute the system call, which returns this error.
    Error(Errno),
    /// The system call transfers half of the bytes that its caller requests.
    Short,
    /// A signal kills the process when it enters the system call.
    Kill,
}

/// Identifies a system call of the traced processes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Place {
    /// The process, in the order in which the processes were created. The command itself is 0.
    pub(crate) process: usize,
    /// The number of the system call.
    pub(crate) number: i64,
    /// How many times the process had entered this system call before.
    pub(crate) nth: usize,
}

/// A system call that a traced process entered.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) place: Place,
    pub(crate) arguments: [u64; 6],
    /// The path or the file to which the system call refers.
    pub(crate) object: String,
}

impl std::fmt::Display for Call {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Place {
            process,
            number,
            nth,
        } = self.place;
        let (name, object) = (errnos::name(number), &self.object);
        write!(out, "process {process}: {name} #{nth} ({object})")
    }
}

/// The result of traced commands.
pub(crate) struct Traced {
    /// All system calls, in the order in which they were entered. If a fault was injected, the list
    /// ends with the system call of the fault.
    pub(crate) calls: Vec<Call>,
    /// The system call in which the fault was injected.
    pub(crate) injected: Option<Call>,
    /// The number of the last command that ran.
    pub(crate) command: usize,
    /// The exit code of the last command, or `None` if a signal killed this command.
    pub(crate) code: Option<i32>,
    /// True if the tracer killed the processes, because the commands did not exit before the
    /// deadline.
    pub(crate) hung: bool,
}

/// Runs the commands one after the other until a command fails. Traces the commands and their
/// children, and injects `fault` into the system call at its place.
pub(crate) fn trace(commands: Vec<Command>, fault: Option<(Place, Fault)>) -> Result<Traced> {
    // A separate thread traces the commands. When this thread exits, the kernel detaches it from
    // all traced processes that still run.
    let thread = std::thread::spawn(move || Tracer::new(fault).run(commands));
    match thread.join() {
        Ok(Ok(traced)) => Ok(traced),
        Ok(Err(error)) => Err(format!("cannot trace the commands: {error}").into()),
        Err(_) => Err("the thread that traced the commands panicked".into()),
    }
}

struct Tracer {
    fault: Option<(Place, Fault)>,
    /// The traced processes, in the order of their creation.
    processes: Vec<Pid>,
    /// How many times each process has entered each system call.
    counts: BTreeMap<(usize, i64), usize>,
    calls: Vec<Call>,
    injected: Option<Call>,
    /// The process that is inside the system call of the fault, and the change that the tracer makes
    /// when the process leaves the system call.
    inside: Option<(Pid, Restore)>,
    /// The ids of all traced processes, for the thread that kills them at the deadline.
    known: Arc<Mutex<Vec<Pid>>>,
}

#[derive(Clone, Copy)]
enum Restore {
    Result(Errno),
    Argument(usize, u64),
}

type Outcome<T> = std::result::Result<T, Errno>;

impl Tracer {
    fn new(fault: Option<(Place, Fault)>) -> Tracer {
        Tracer {
            fault,
            processes: Vec::new(),
            counts: BTreeMap::new(),
            calls: Vec::new(),
            injected: None,
            inside: None,
            known: Arc::default(),
        }
    }

    fn run(mut self, commands: Vec<Command>) -> std::result::Result<Traced, String> {
        let watchdog = Watchdog::start(Arc::clone(&self.known));
        let last = commands.len().saturating_sub(1);
        let (mut command, mut code) = (0, None);
        for (index, mut next) in commands.into_iter().enumerate() {
            // SAFETY: between fork and exec, the closure only makes a system call.
            unsafe { next.pre_exec(|| Ok(ptrace::traceme()?)) };
            let child = next.spawn().map_err(|error| error.to_string())?;
            let main = Pid::from_raw(i32::try_from(child.id()).unwrap_or(-1));
            command = index;
            code = self
                .until_exit(main, index == last)
                .map_err(|errno| errno.to_string())?;
            if code != Some(0) {
                break;
            }
        }
        Ok(Traced {
            calls: self.calls,
            injected: self.injected,
            command,
            code,
            hung: watchdog.stop(),
        })
    }

    /// Traces all processes until the command `main` exits. Returns the command's exit code.
    fn until_exit(&mut self, main: Pid, last: bool) -> Outcome<Option<i32>> {
        seize(main)?;
        self.index(main);
        let flags = WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD;
        let mut ended: Option<(Instant, Option<i32>)> = None;
        loop {
            let poll = if ended.is_some() {
                WaitPidFlag::WNOHANG
            } else {
                WaitPidFlag::empty()
            };
            let status = match (waitpid(None, Some(flags | poll)), ended) {
                (Ok(WaitStatus::StillAlive), Some((at, code))) => {
                    if at.elapsed() > QUIET {
                        return Ok(code);
                    }
                    std::thread::sleep(Duration::from_micros(50));
                    continue;
                }
                (Err(Errno::ECHILD), Some((_, code))) => return Ok(code),
                (Err(Errno::EINTR), _) => continue,
                (status, _) => status?,
            };
            let code = match status {
                WaitStatus::Exited(pid, code) if pid == main => Some(code),
                WaitStatus::Signaled(pid, ..) if pid == main => None,
                status => {
                    self.event(main, status)?;
                    if let Some((at, _)) = &mut ended {
                        *at = Instant::now();
                    }
                    continue;
                }
            };
            // After the last command, children of the command can make further system calls.
            if !last || self.is_done() {
                return Ok(code);
            }
            ended = Some((Instant::now(), code));
        }
    }

    /// Returns true if the fault is complete. The tracer then detaches from every process.
    fn is_done(&self) -> bool {
        self.injected.is_some() && self.inside.is_none()
    }

    fn event(&mut self, main: Pid, status: WaitStatus) -> Outcome<()> {
        match status {
            WaitStatus::PtraceSyscall(pid) => match self.syscall_stop(pid) {
                // Another process has killed this process.
                Err(Errno::ESRCH) => {}
                outcome => {
                    outcome?;
                    self.go_on(pid, None);
                }
            },
            // The tracer detaches from a child that executes another program. A command can execute
            // itself again.
            WaitStatus::PtraceEvent(pid, _, event) if event == Event::PTRACE_EVENT_EXEC as i32 => {
                if pid == main {
                    self.go_on(pid, None);
                } else {
                    let _ = ptrace::detach(pid, None);
                }
            }
            WaitStatus::PtraceEvent(pid, _, event) if event == Event::PTRACE_EVENT_STOP as i32 => {
                self.index(pid);
                self.go_on(pid, None);
            }
            WaitStatus::PtraceEvent(pid, ..) => {
                if let Ok(child) = ptrace::getevent(pid) {
                    self.index(Pid::from_raw(child as i32));
                }
                self.go_on(pid, None);
            }
            WaitStatus::Stopped(pid, signal) => self.go_on(pid, Some(signal)),
            WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, ..)
                if self.inside.is_some_and(|(inside, _)| inside == pid) =>
            {
                self.inside = None;
            }
            _ => {}
        }
        Ok(())
    }

    fn go_on(&self, pid: Pid, signal: Option<Signal>) {
        // If another process has already killed this process, ptrace(2) fails. The tracer ignores
        // this error.
        let _ = if self.is_done() {
            ptrace::detach(pid, signal)
        } else {
            ptrace::syscall(pid, signal)
        };
    }

    /// Returns the number of a process in the order of creation.
    fn index(&mut self, pid: Pid) -> usize {
        if let Some(index) = self.processes.iter().position(|known| *known == pid) {
            return index;
        }
        self.processes.push(pid);
        if let Ok(mut known) = self.known.lock() {
            known.push(pid);
        }
        self.processes.len() - 1
    }

    fn syscall_stop(&mut self, pid: Pid) -> Outcome<()> {
        if let Some((inside, restore)) = self.inside
            && inside == pid
        {
            self.inside = None;
            return restore.apply(pid);
        }
        if self.injected.is_some() {
            return Ok(());
        }
        let info = ptrace::syscall_info(pid)?;
        if info.op != libc::PTRACE_SYSCALL_INFO_ENTRY {
            return Ok(());
        }
        // SAFETY: the kernel has filled in the variant `entry` of the union.
        let entry = unsafe { info.u.entry };
        let (process, number) = (self.index(pid), entry.nr as i64);
        let count = self.counts.entry((process, number)).or_default();
        let place = Place {
            process,
            number,
            nth: *count,
        };
        *count += 1;
        let call = Call {
            place,
            arguments: entry.args,
            object: object(pid, number, &entry.args),
        };
        if let Some((at, fault)) = self.fault
            && at == place
        {
            self.inside = Restore::inject(pid, number, &entry.args, fault)?.map(|it| (pid, it));
            self.injected = Some(call.clone());
        }
        self.calls.push(call);
        Ok(())
    }
}

/// Traces a command that has called PTRACE_TRACEME and then executed its program.
///
/// After PTRACE_TRACEME, the kernel stops each new child with SIGSTOP. If the tracing thread exited
/// before it received this signal, the child would remain stopped. After PTRACE_SEIZE, the kernel
/// stops a child without a signal. So this function stops the command, and then seizes it.
fn seize(main: Pid) -> Outcome<()> {
    waitpid(main, None)?;
    ptrace::detach(main, Signal::SIGSTOP)?;
    waitpid(main, Some(WaitPidFlag::WUNTRACED))?;
    let options = Options::PTRACE_O_TRACESYSGOOD
        | Options::PTRACE_O_TRACEFORK
        | Options::PTRACE_O_TRACEVFORK
        | Options::PTRACE_O_TRACECLONE
        | Options::PTRACE_O_TRACEEXEC;
    ptrace::seize(main, options)?;
    kill(main, Signal::SIGCONT)
}

impl Restore {
    /// Changes the system call that the process is about to make.
    fn inject(pid: Pid, number: i64, args: &[u64; 6], fault: Fault) -> Outcome<Option<Restore>> {
        match fault {
            Fault::Kill => {
                kill(pid, Signal::SIGKILL)?;
                Ok(None)
            }
            Fault::Error(errno) => {
                registers::skip_call(pid)?;
                Ok(Some(Restore::Result(errno)))
            }
            Fault::Short => {
                let length = errnos::likely(number).and_then(|row| row.length);
                let Some((index, old)) = length.and_then(|at| Some((at, *args.get(at)?))) else {
                    return Ok(None);
                };
                registers::change(pid, |registers| {
                    *registers::argument(registers, index) = old.div_ceil(2);
                })?;
                Ok(Some(Restore::Argument(index, old)))
            }
        }
    }

    fn apply(self, pid: Pid) -> Outcome<()> {
        registers::change(pid, |all| match self {
            Restore::Result(errno) => {
                *registers::result(all) = i64::from(-(errno as i32)) as u64;
            }
            Restore::Argument(index, old) => *registers::argument(all, index) = old,
        })
    }
}

/// A thread that kills all traced processes at the deadline.
struct Watchdog {
    stop: mpsc::Sender<()>,
    thread: std::thread::JoinHandle<bool>,
}

impl Watchdog {
    fn start(known: Arc<Mutex<Vec<Pid>>>) -> Watchdog {
        let (stop, stopped) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let hung = stopped.recv_timeout(deadline()) == Err(mpsc::RecvTimeoutError::Timeout);
            // A killed process can have children that the tracer has not traced yet.
            while hung && stopped.try_recv() == Err(mpsc::TryRecvError::Empty) {
                for pid in known.lock().iter().flat_map(|known| known.iter()) {
                    let _ = kill(*pid, Signal::SIGKILL);
                }
                std::thread::sleep(Duration::from_millis(50));
            }
            hung
        });
        Watchdog { stop, thread }
    }

    /// Returns whether the thread has killed the processes.
    fn stop(self) -> bool {
        let _ = self.stop.send(());
        self.thread.join().unwrap_or(true)
    }
}

/// Returns the path or the file to which a system call refers.
fn object(pid: Pid, number: i64, args: &[u64; 6]) -> String {
    let path = match number {
        #[cfg(target_arch = "x86_64")]
        libc::SYS_open
        | libc::SYS_readlink
        | libc::SYS_stat
        | libc::SYS_lstat
        | libc::SYS_mkdir
        | libc::SYS_rmdir
        | libc::SYS_unlink
        | libc::SYS_access => 0,
        libc::SYS_chdir
        | libc::SYS_statfs
        | libc::SYS_execve
        | libc::SYS_umount2
        | libc::SYS_fsopen
        | libc::SYS_memfd_create
        | libc::SYS_chroot => 0,
        libc::SYS_openat
        | libc::SYS_openat2
        | libc::SYS_newfstatat
        | libc::SYS_statx
        | libc::SYS_mkdirat
        | libc::SYS_mknodat
        | libc::SYS_unlinkat
        | libc::SYS_readlinkat
        | libc::SYS_faccessat2
        | libc::SYS_fchownat
        | libc::SYS_open_tree
        | libc::SYS_mount => 1,
        libc::SYS_fsconfig | libc::SYS_symlinkat => 2,
        libc::SYS_move_mount | libc::SYS_renameat2 => 3,
        libc::SYS_prctl | libc::SYS_keyctl | libc::SYS_bpf | libc::SYS_prlimit64 => {
            return format!("{}, {:#x}", args[0], args[1]);
        }
        _ => {
            return fs::read_link(format!("/proc/{pid}/fd/{}", args[0])).map_or_else(
                |_| format!("{:#x}", args[0]),
                |to| to.to_string_lossy().into_owned(),
            );
        }
    };
    text(pid, args[path])
}

/// Reads a string in the memory of a process.
fn text(pid: Pid, address: u64) -> String {
    let mut bytes = [0; 200];
    let length = File::open(format!("/proc/{pid}/mem"))
        .and_then(|memory| memory.read_at(&mut bytes, address))
        .unwrap_or(0);
    let text = bytes.get(..length).unwrap_or_default();
    let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(text).into_owned()
}

/// The registers in which the kernel receives a system call, and in which it returns the result.
#[cfg(target_arch = "x86_64")]
mod registers {
    use super::{Outcome, Pid, libc, ptrace};

    pub(super) fn argument(registers: &mut libc::user_regs_struct, index: usize) -> &mut u64 {
        match index {
            0 => &mut registers.rdi,
            1 => &mut registers.rsi,
            2 => &mut registers.rdx,
            3 => &mut registers.r10,
            4 => &mut registers.r8,
            _ => &mut registers.r9,
        }
    }

    pub(super) fn result(registers: &mut libc::user_regs_struct) -> &mut u64 {
        &mut registers.rax
    }

    /// Replaces the number of the system call, so that the kernel executes no system call.
    pub(super) fn skip_call(pid: Pid) -> Outcome<()> {
        change(pid, |registers| registers.orig_rax = u64::MAX)
    }

    pub(super) fn change(
        pid: Pid,
        change: impl FnOnce(&mut libc::user_regs_struct),
    ) -> Outcome<()> {
        let mut registers = ptrace::getregs(pid)?;
        change(&mut registers);
        ptrace::setregs(pid, registers)
    }
}

/// The registers in which the kernel receives a system call, and in which it returns the result.
#[cfg(target_arch = "aarch64")]
mod registers {
    use super::{Errno, Outcome, Pid, libc, ptrace};

    pub(super) fn argument(registers: &mut libc::user_regs_struct, index: usize) -> &mut u64 {
        &mut registers.regs[index]
    }

    pub(super) fn result(registers: &mut libc::user_regs_struct) -> &mut u64 {
        &mut registers.regs[0]
    }

    /// Replaces the number of the system call, so that the kernel executes no system call.
    pub(super) fn skip_call(pid: Pid) -> Outcome<()> {
        // linux/elf.h
        const NT_ARM_SYSTEM_CALL: libc::c_int = 0x404;
        let mut number: libc::c_int = -1;
        let mut whole = libc::iovec {
            iov_base: (&raw mut number).cast(),
            iov_len: size_of_val(&number),
        };
        // SAFETY: the kernel only reads `number`, through `whole`. Both live until the call returns.
        let returned = unsafe {
            libc::ptrace(
                libc::PTRACE_SETREGSET,
                pid.as_raw(),
                NT_ARM_SYSTEM_CALL,
                &raw mut whole,
            )
        };
        Errno::result(returned).map(drop)
    }

    pub(super) fn change(
        pid: Pid,
        change: impl FnOnce(&mut libc::user_regs_struct),
    ) -> Outcome<()> {
        let mut registers = ptrace::getregs(pid)?;
        change(&mut registers);
        ptrace::setregs(pid, registers)
    }
}
