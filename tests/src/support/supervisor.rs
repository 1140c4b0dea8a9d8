//! Faults in the system calls of a server and of all processes that it starts.
//!
//! The server has several threads, and its work moves between them. The n-th system call of one run
//! is therefore another call in the next run. A test selects a call by its place instead: the
//! program, the system call, the call's object (a path, or the target of a descriptor), and how
//! many calls with the same three properties preceded it. Ids and numbers in paths are replaced, so
//! a place exists in every run.
//!
//! A seccomp filter reports the calls of the table [`CALLS`] to this process (seccomp_unotify(2)).
//! Monitors, runtimes and containers inherit the filter. This process answers each report: the
//! kernel executes the call, or the call fails with an errno, or the process is killed before the
//! call. ptrace(2) would stop each call of each thread twice and would have to follow every new
//! thread; a report costs one switch to this process and back, about ten microseconds. A container
//! whose own filter has a listener cannot start under the filter, because a task can have only one
//! listener.

use std::collections::BTreeMap;
use std::ffi::{CString, OsStr};
use std::io::IoSlice;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, Shutdown, recvmsg, sendmsg, shutdown,
};
use nix::unistd::Pid;

use crate::support::inside::InsideError;
use crate::support::machine::{Directory, Result, Run, command};
use crate::support::places::{CALLS, Call, Object};

/// The descriptor over which a supervised program sends its listener. The filter does not report
/// sendmsg(2) on this descriptor, because no process could answer before the listener has arrived.
const HANDOVER: RawFd = 1000;

/// A system call that can be identified in every run.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    /// The file name of the program.
    pub(crate) program: String,
    pub(crate) call: &'static str,
    /// The call's object. Ids and numbers are replaced by `ID` and `N`.
    pub(crate) object: String,
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}({})", self.program, self.call, self.object)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    Fail(Errno),
    Kill,
}

/// A fault: what happens at the call with the number `occurrence` (from 1) at the place.
#[derive(Clone, Debug)]
pub(crate) struct Fault {
    pub(crate) place: Place,
    pub(crate) occurrence: u32,
    pub(crate) action: Action,
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Fault {
            place,
            occurrence,
            action,
        } = self;
        match action {
            Action::Fail(errno) => write!(f, "{place} #{occurrence} fails with {errno:?}"),
            Action::Kill => write!(f, "{place} #{occurrence} kills the process"),
        }
    }
}

/// A place, and how often it occurred.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) place: Place,
    pub(crate) times: u32,
    pub(crate) errnos: Vec<Errno>,
}

/// The treatment of reported calls.
#[derive(Default)]
enum Mode {
    /// The kernel executes all calls.
    #[default]
    Idle,
    Record(BTreeMap<Place, (u32, Vec<Errno>)>),
    Inject {
        fault: Fault,
        /// The number of calls at the place so far.
        before: u32,
        /// The process id of the process that made the call.
        hit: Option<i32>,
    },
}

#[derive(Default)]
struct State {
    mode: Mode,
    /// Texts that differ between runs, and their replacements.
    replaced: Vec<(String, &'static str)>,
}

pub(crate) struct Supervisor {
    directory: Directory,
    listener: UnixListener,
    state: Arc<Mutex<State>>,
}

impl Supervisor {
    pub(crate) fn new() -> Result<Self> {
        let directory = Directory::new("supervisor")?;
        let listener = UnixListener::bind(directory.join("socket"))?;
        let state = Arc::<Mutex<State>>::default();
        let (accepting, shared) = (listener.try_clone()?, Arc::clone(&state));
        std::thread::spawn(move || {
            while let Ok((stream, _)) = accepting.accept() {
                let shared = Arc::clone(&shared);
                std::thread::spawn(move || match receive_listener(&stream) {
                    Ok(listener) => supervise(&listener, &shared),
                    Err(error) => eprintln!("receive a seccomp listener: {error:?}"),
                });
            }
        });
        Ok(Supervisor {
            directory,
            listener,
            state,
        })
    }

    /// Returns a command that runs `program` and reports its system calls to this supervisor.
    pub(crate) fn command(&self, program: &str) -> Run {
        let inside = std::env::temp_dir().join("rrun-e2e-inside");
        command(&inside.to_string_lossy(), ["supervised"])
            .arg(self.directory.join("socket"))
            .arg(program)
    }

    /// Replaces `text` with `with` in the objects of places.
    pub(crate) fn replace(&self, text: &Path, with: &'static str) {
        let text = text.display().to_string();
        self.state().replaced.push((text, with));
    }

    /// Records all calls until [`Supervisor::recorded`] is called.
    pub(crate) fn record(&self) {
        self.state().mode = Mode::Record(BTreeMap::new());
    }

    pub(crate) fn recorded(&self) -> Vec<Seen> {
        match std::mem::take(&mut self.state().mode) {
            Mode::Record(places) => places
                .into_iter()
                .map(|(place, (times, errnos))| Seen {
                    place,
                    times,
                    errnos,
                })
                .collect(),
            _ => Vec::new(),
        }
    }

    pub(crate) fn inject(&self, fault: Fault) {
        self.state().mode = Mode::Inject {
            fault,
            before: 0,
            hit: None,
        };
    }

    /// Returns the id of the process whose call was affected by the fault, if the call has
    /// happened.
    pub(crate) fn hit(&self) -> Option<i32> {
        match &self.state().mode {
            Mode::Inject { hit, .. } => *hit,
            _ => None,
        }
    }

    /// Executes all further calls, and returns the same value as [`Supervisor::hit`].
    pub(crate) fn end(&self) -> Option<i32> {
        let hit = self.hit();
        self.state().mode = Mode::Idle;
        hit
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        // The threads that answer reports end with the last supervised process.
        let _ = shutdown(self.listener.as_raw_fd(), Shutdown::Both);
    }
}

fn receive_listener(stream: &UnixStream) -> Result<OwnedFd> {
    let mut space = nix::cmsg_space!(RawFd);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let mut byte = [0];
    let mut parts = [std::io::IoSliceMut::new(&mut byte)];
    let message = recvmsg::<()>(stream.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(descriptors) = control
            && let Some(&descriptor) = descriptors.first()
        {
            // SAFETY: the kernel has just given this descriptor to this process, and nothing else
            // owns it.
            return Ok(unsafe { OwnedFd::from_raw_fd(descriptor) });
        }
    }
    Err("the message contains no descriptor".into())
}

/// Answers the reports of one filter until its last process has exited.
fn supervise(listener: &OwnedFd, state: &Mutex<State>) {
    let fd = listener.as_raw_fd();
    loop {
        let mut poll = libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: `poll` is one valid pollfd.
        unsafe { libc::poll(&raw mut poll, 1, -1) };
        if poll.revents & libc::POLLIN == 0 && poll.revents & libc::POLLHUP != 0 {
            return;
        }
        // SAFETY: all-zero values of these plain types are valid, and SECCOMP_IOCTL_NOTIF_RECV
        // requires a zeroed request.
        let (mut request, mut answer): (libc::seccomp_notif, libc::seccomp_notif_resp) =
            unsafe { (std::mem::zeroed(), std::mem::zeroed()) };
        // SAFETY: SECCOMP_IOCTL_NOTIF_RECV writes a seccomp_notif, which is the type of `request`.
        let got = unsafe { libc::ioctl(fd, libc::SECCOMP_IOCTL_NOTIF_RECV as _, &raw mut request) };
        if got != 0 {
            // The process was killed before this process received its report.
            continue;
        }
        answer.id = request.id;
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        let decision = decide(&mut state, &request);
        drop(state);
        match decision {
            None => answer.flags = libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32,
            Some(Effect::Fail(errno)) => answer.error = -(errno as i32),
            // With an answer, the kernel could still execute the call.
            Some(Effect::Killed) => continue,
        }
        // SAFETY: SECCOMP_IOCTL_NOTIF_SEND reads a seccomp_notif_resp, which is the type of
        // `answer`. The call fails if the process was killed.
        unsafe { libc::ioctl(fd, libc::SECCOMP_IOCTL_NOTIF_SEND as _, &raw mut answer) };
    }
}

/// The effect of a fault on the call at which it happens.
enum Effect {
    Fail(Errno),
    /// The process was killed. It exits before the call.
    Killed,
}

/// Records the call, or causes the fault at this call. Returns `None` if the kernel executes the
/// call.
fn decide(state: &mut State, request: &libc::seccomp_notif) -> Option<Effect> {
    if let Mode::Idle | Mode::Inject { hit: Some(_), .. } = state.mode {
        return None;
    }
    let number = i64::from(request.data.nr);
    let call = CALLS.iter().find(|call| call.number == number)?;
    let pid = i32::try_from(request.pid).ok()?;
    let program = std::fs::read_link(format!("/proc/{pid}/exe")).ok()?;
    let program = program.file_name()?.to_string_lossy().into_owned();
    if let Mode::Inject { fault, .. } = &state.mode
        && (fault.place.call != call.name() || fault.place.program != program)
    {
        return None;
    }
    if call.name() == "prlimit64" && request.data.args[2] == 0 {
        // The kernel never refuses to report the limits of the process itself.
        return None;
    }
    let object = object(pid, call, &request.data.args).unwrap_or_default();
    let place = Place {
        program,
        call: call.name(),
        object: match call.object {
            // A command or a kind is the same in every run.
            Object::Number(_) => object.clone(),
            _ => without_numbers(&object, &state.replaced),
        },
    };
    match &mut state.mode {
        Mode::Idle => None,
        Mode::Record(places) => {
            let creates = creates(pid, call, &request.data.args);
            let errnos = || (0, call.errnos(&object, creates));
            places.entry(place).or_insert_with(errnos).0 += 1;
            None
        }
        Mode::Inject { fault, before, hit } => {
            if fault.place != place {
                return None;
            }
            *before += 1;
            if *before != fault.occurrence {
                return None;
            }
            *hit = process_of(pid).or(Some(pid));
            match fault.action {
                Action::Fail(errno) => Some(Effect::Fail(errno)),
                Action::Kill => {
                    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
                    Some(Effect::Killed)
                }
            }
        }
    }
}

/// Returns the id of the process to which a thread belongs (proc_pid_status(5), Tgid).
fn process_of(thread: i32) -> Option<i32> {
    let status = std::fs::read_to_string(format!("/proc/{thread}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("Tgid:"))?;
    line.trim().parse().ok()
}

/// Returns a description of the call's object.
fn object(pid: i32, call: &Call, args: &[u64; 6]) -> Option<String> {
    let descriptor = |index: usize| {
        let fd = args.get(index)?.cast_signed() as RawFd;
        let target = std::fs::read_link(format!("/proc/{pid}/fd/{fd}")).ok()?;
        Some(target.to_string_lossy().into_owned())
    };
    let path = |index: usize| text_at(pid, *args.get(index)?);
    match call.object {
        Object::None => None,
        Object::Descriptor(index) => descriptor(index),
        Object::Path(index) => path(index),
        Object::Number(index) => Some(format!("{:#x}", args.get(index)?)),
        Object::At(directory, index) => {
            let path = path(index)?;
            if path.starts_with('/') || args.get(directory)?.cast_signed() as i32 == libc::AT_FDCWD
            {
                return Some(path);
            }
            Some(format!("{}/{path}", descriptor(directory)?))
        }
    }
}

/// Returns whether the call creates a file, or adds a descriptor to an epoll set.
fn creates(pid: i32, call: &Call, args: &[u64; 6]) -> bool {
    let flags = match call.name() {
        "openat" => args[2],
        "open" => args[1],
        "openat2" => {
            let mut how = [0; 8];
            read_memory(pid, args[2], &mut how);
            u64::from_ne_bytes(how)
        }
        "epoll_ctl" => return args[1] == libc::EPOLL_CTL_ADD as u64,
        _ => return false,
    };
    flags & libc::O_CREAT as u64 != 0
}

/// Reads the text that ends with a NUL byte at the address in the memory of the process.
fn text_at(pid: i32, address: u64) -> Option<String> {
    const PAGE_BYTES: u64 = 4096;
    let mut bytes = Vec::new();
    let mut next = address;
    // The text can end just before a page that is not mapped, so each read ends at a page's end.
    while bytes.len() < 4096 {
        let mut page = vec![0; (PAGE_BYTES - next % PAGE_BYTES) as usize];
        let length = read_memory(pid, next, &mut page);
        let part = page.get(..length).filter(|part| !part.is_empty())?;
        if let Some(end) = part.iter().position(|&byte| byte == 0) {
            bytes.extend_from_slice(part.get(..end)?);
            return Some(String::from_utf8_lossy(&bytes).into_owned());
        }
        bytes.extend_from_slice(part);
        next += length as u64;
    }
    None
}

/// Reads the memory of a process, and returns the number of bytes that were read.
fn read_memory(pid: i32, address: u64, buffer: &mut [u8]) -> usize {
    let local = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    let remote = libc::iovec {
        iov_base: address as *mut libc::c_void,
        iov_len: buffer.len(),
    };
    // SAFETY: `local` describes the whole of `buffer`. The kernel checks the address in the other
    // process.
    let read = unsafe { libc::process_vm_readv(pid, &raw const local, 1, &raw const remote, 1, 0) };
    usize::try_from(read).unwrap_or(0)
}

/// Replaces ids by `ID`, hardware and IPv6 addresses by `ADDRESS`, and numbers by `N`.
pub(crate) fn without_numbers(text: &str, replaced: &[(String, &'static str)]) -> String {
    let mut text = text.to_owned();
    for (from, to) in replaced {
        text = text.replace(from, to);
    }
    let mut result = String::with_capacity(text.len());
    let mut rest = text.as_str();
    while let Some(first) = rest.chars().next() {
        let run = |of: fn(&char) -> bool| rest.chars().take_while(of).count();
        let hex = run(char::is_ascii_hexdigit);
        let digits = run(char::is_ascii_digit);
        let address = run(|c| c.is_ascii_hexdigit() || *c == ':');
        let colons = rest.get(..address).map_or(0, |it| it.matches(':').count());
        let after_letter = result.ends_with(|c: char| c.is_ascii_alphanumeric());
        let is_id = hex >= 12 && !after_letter || hex >= 11 && result.ends_with("rr");
        let length = if is_id {
            result.push_str("ID");
            hex
        } else if colons >= 2 && !after_letter {
            result.push_str("ADDRESS");
            address
        } else if digits > 0 {
            result.push('N');
            digits
        } else {
            result.push(first);
            first.len_utf8()
        };
        rest = rest.get(length..).unwrap_or_default();
    }
    result
}

/// The command `inside supervised SOCKET PROGRAM ARG…`: installs the filter, sends its listener to
/// the supervisor at SOCKET, and executes PROGRAM.
pub(crate) fn supervised(socket: &str, words: &[&str]) -> std::result::Result<(), InsideError> {
    let stream = UnixStream::connect(PathBuf::from(socket))?;
    // SAFETY: this process has no descriptor with the number HANDOVER, so no owner loses one.
    let handover = unsafe { libc::dup3(stream.as_raw_fd(), HANDOVER, libc::O_CLOEXEC) };
    Errno::result(handover)?;
    let words: Vec<CString> = words
        .iter()
        .map(|word| CString::new(OsStr::new(word).as_bytes()))
        .collect::<std::result::Result<_, _>>()?;
    let program = words.first().ok_or("the command has no program")?.clone();
    let listener = install_filter()?;
    let descriptors = [listener.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&descriptors)];
    sendmsg::<()>(
        HANDOVER,
        &[IoSlice::new(b"1")],
        &rights,
        MsgFlags::empty(),
        None,
    )?;
    drop(listener);
    nix::unistd::execvp(&program, &words)?;
    Ok(())
}

fn install_filter() -> nix::Result<OwnedFd> {
    let mut code = filter();
    let program = libc::sock_fprog {
        len: u16::try_from(code.len()).map_err(|_| Errno::E2BIG)?,
        filter: code.as_mut_ptr(),
    };
    let flags =
        libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV;
    // SAFETY: `program` describes the whole of `code`, which outlives the call.
    let listener = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            &raw const program,
        )
    };
    let listener = Errno::result(listener)?;
    // SAFETY: seccomp(2) has just created this descriptor, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(listener as RawFd) })
}

/// Returns the filter's program. It reports the calls of [`CALLS`], except sendmsg(2) on
/// [`HANDOVER`].
fn filter() -> Vec<libc::sock_filter> {
    const NUMBER: u32 = std::mem::offset_of!(libc::seccomp_data, nr) as u32;
    const ARCHITECTURE: u32 = std::mem::offset_of!(libc::seccomp_data, arch) as u32;
    const FIRST_ARGUMENT: u32 = std::mem::offset_of!(libc::seccomp_data, args) as u32;
    #[cfg(target_arch = "x86_64")]
    const NATIVE: u32 = 0xc000_003e;
    #[cfg(target_arch = "aarch64")]
    const NATIVE: u32 = 0xc000_00b7;
    let load = |offset| statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset);
    let decision = |action| statement(libc::BPF_RET | libc::BPF_K, action);
    let skip_unless = |value, count| libc::sock_filter {
        code: (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16,
        jt: 0,
        jf: count,
        k: value,
    };
    let (allow, report) = (libc::SECCOMP_RET_ALLOW, libc::SECCOMP_RET_USER_NOTIF);
    let mut code = vec![
        load(ARCHITECTURE),
        skip_unless(NATIVE, 6),
        load(NUMBER),
        skip_unless(libc::SYS_sendmsg as u32, 5),
        load(FIRST_ARGUMENT),
        skip_unless(HANDOVER.cast_unsigned(), 1),
        decision(allow),
        decision(report),
        decision(allow),
    ];
    for call in CALLS {
        code.extend([skip_unless(call.number as u32, 1), decision(report)]);
    }
    code.push(decision(allow));
    code
}

fn statement(code: u32, k: u32) -> libc::sock_filter {
    libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf: 0,
        k,
    }
}
