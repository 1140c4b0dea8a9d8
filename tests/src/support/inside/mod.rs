//! The program `inside`, which runs inside the tests' containers. The program is the tests'
//! executable under another name, and needs no image, shell or library. A command of `inside`
//! prints information about the container or performs an operation in the container.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit};
use nix::sys::signal::{SigSet, Signal};
use serde_json::{Value, json};

pub(crate) mod attacker;
mod calls32;
mod headless;
mod keys;
mod leases;
pub(crate) mod observation;
mod pipes;
mod traced;
mod tracer;
pub(crate) mod traffic;
mod unprivileged;

/// The error type of all commands of `inside`.
pub(crate) type InsideError = Box<dyn std::error::Error>;

/// Runs `inside COMMAND ARG…`, and returns the command's exit code. The exit code of an unknown
/// command is 99.
pub(crate) fn main(args: &[String]) -> i32 {
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let result = match words.as_slice() {
        ["report"] => report_value().and_then(|report| say(&report.to_string())),
        ["observe"] => return observation::observe(),
        ["exit", code] => return code.parse().unwrap_or(99),
        ["echo", words @ ..] => say(&words.join(" ")),
        ["stderr", words @ ..] => {
            eprintln!("{}", words.join(" "));
            Ok(())
        }
        ["sleep", seconds] => seconds.parse().map_err(InsideError::from).map(|seconds| {
            std::thread::sleep(Duration::from_secs_f64(seconds));
        }),
        ["cat"] => std::io::copy(&mut std::io::stdin(), &mut std::io::stdout())
            .map(|_| ())
            .map_err(InsideError::from),
        ["cat", files @ ..] => cat(files),
        ["ls", dir] => list(dir),
        ["stat", path] => stat(path),
        ["write", path, text] => fs::write(path, text).map_err(InsideError::from),
        ["mkdir", path] => fs::create_dir(path).map_err(InsideError::from),
        ["wait"] => wait(),
        ["notify", text] => notify(text),
        ["notify-often", text, times] => times
            .parse()
            .map_err(InsideError::from)
            .and_then(|times| notify_often(text, times)),
        ["in-transit", count] => count
            .parse()
            .map_err(InsideError::from)
            .and_then(in_transit),
        ["headless", mode @ ..] => headless::main(mode),
        ["leave-user-namespace", source, target] => unprivileged::leave(source, target),
        ["deaf"] => deaf(),
        ["spin", seconds] => seconds.parse().map_err(InsideError::from).map(spin),
        ["allocate", megabytes] => megabytes
            .parse()
            .map_err(InsideError::from)
            .and_then(allocate),
        ["read", path] => read(path),
        ["fill", path, megabytes] => megabytes
            .parse()
            .map_err(InsideError::from)
            .and_then(|megabytes| fill(path, megabytes)),
        ["huge", pages] => pages.parse().map_err(InsideError::from).and_then(huge),
        ["forks", most] => most.parse().map_err(InsideError::from).and_then(forks),
        ["orphan", seconds] => orphan(seconds),
        ["reopen", path] => reopen(path),
        ["leave-writer", code] => {
            return leave_writer().map_or(98, |()| code.parse().unwrap_or(99));
        }
        ["stop-others"] => stop_others(),
        ["stop-others-forever"] => stop_others_forever(),
        ["nest-cgroups", levels, length] => nest_cgroups(levels, length),
        ["count", milliseconds] => milliseconds
            .parse()
            .map_err(InsideError::from)
            .and_then(count),
        ["call", numbers @ ..] => call(numbers),
        ["call32", numbers @ ..] => calls32::call(numbers),
        ["socketcall", numbers @ ..] => calls32::socketcall(numbers),
        ["call-in", process, numbers @ ..] => tracer::call_in(process, numbers),
        ["call-in-thread", numbers @ ..] => call_in_thread(numbers),
        ["call-and-catch", numbers @ ..] => call_and_catch(numbers),
        ["burst", lines] => lines.parse().map_err(InsideError::from).and_then(burst),
        ["tell", lines, code] => {
            let written = lines.parse().map_err(InsideError::from).and_then(burst);
            return written.map_or(98, |()| code.parse().unwrap_or(99));
        }
        ["later", seconds, code] => {
            std::thread::sleep(Duration::from_secs_f64(seconds.parse().unwrap_or(0.0)));
            return code.parse().unwrap_or(99);
        }
        ["supervised", socket, program @ ..] => super::supervisor::supervised(socket, program),
        ["net", traffic @ ..] => traffic::main(traffic),
        ["keys", keys @ ..] => keys::main(keys),
        ["lease", files @ ..] => leases::lease(files),
        ["lock-pipes", descriptors @ ..] => pipes::lock(descriptors),
        ["traced", traced @ ..] => traced::main(traced),
        ["attack", attack @ ..] => attacker::main(attack),
        _ => return 99,
    };
    match result {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("{}: {error}", words.join(" "));
            1
        }
    }
}

fn say(line: &str) -> Result<(), InsideError> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}")?;
    Ok(out.flush()?)
}

fn text(path: &str) -> String {
    fs::read_to_string(path)
        .unwrap_or_default()
        .trim_end()
        .to_owned()
}

fn links(dir: &str) -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if let Ok(target) = fs::read_link(entry.path()) {
            let name = entry.file_name().to_string_lossy().into_owned();
            all.insert(name, target.to_string_lossy().into_owned());
        }
    }
    all
}

/// Returns the settings of this process that a runtime can influence.
fn report_value() -> Result<Value, InsideError> {
    let status: BTreeMap<String, String> = text("/proc/self/status")
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
        .collect();
    let limits: BTreeMap<&str, Value> = [
        ("RLIMIT_NOFILE", Resource::RLIMIT_NOFILE),
        ("RLIMIT_NPROC", Resource::RLIMIT_NPROC),
        ("RLIMIT_CORE", Resource::RLIMIT_CORE),
        ("RLIMIT_STACK", Resource::RLIMIT_STACK),
    ]
    .into_iter()
    .filter_map(|(name, which)| {
        getrlimit(which)
            .ok()
            .map(|pair| (name, json!([pair.0, pair.1])))
    })
    .collect();
    // To read /proc/self/fd, this process opens another descriptor and then closes it. The report
    // omits this descriptor.
    let mut descriptors = links("/proc/self/fd");
    descriptors.retain(|_, target| !target.ends_with("/fd"));
    let terminals = [0, 1, 2].map(|descriptor| {
        fs::read_link(format!("/proc/self/fd/{descriptor}"))
            .is_ok_and(|path| path.starts_with("/dev/pts") || path.starts_with("/dev/console"))
    });
    let name = nix::sys::utsname::uname()?;
    let groups: Vec<u32> = nix::unistd::getgroups()?
        .iter()
        .map(|gid| gid.as_raw())
        .collect();
    let node = name.nodename().to_string_lossy().into_owned();
    let files: BTreeMap<&str, String> = [
        "/proc/sys/kernel/shm_rmid_forced",
        "/proc/sys/net/ipv4/ip_unprivileged_port_start",
        "/proc/self/timens_offsets",
        "/proc/self/setgroups",
        "/sys/class/net/lo/flags",
    ]
    .into_iter()
    .map(|path| (path, text(path)))
    .collect();
    Ok(json!({
        "pid": std::process::id(),
        "parent": nix::unistd::getppid().as_raw(),
        "session": nix::unistd::getsid(None).map(|pid| pid.as_raw()).unwrap_or(-1),
        "uid": nix::unistd::getuid().as_raw(),
        "gid": nix::unistd::getgid().as_raw(),
        "groups": groups,
        "cwd": std::env::current_dir().unwrap_or_default(),
        "args": std::env::args().collect::<Vec<_>>(),
        "env": std::env::vars().collect::<BTreeMap<_, _>>(),
        "status": status,
        "limits": limits,
        "hostname": node,
        "domainname": name.domainname().to_string_lossy(),
        "oom_score_adj": text("/proc/self/oom_score_adj"),
        "fds": descriptors,
        "namespaces": links("/proc/self/ns"),
        "uid_map": text("/proc/self/uid_map").split_whitespace().collect::<Vec<_>>(),
        "gid_map": text("/proc/self/gid_map").split_whitespace().collect::<Vec<_>>(),
        "mounts": text("/proc/self/mountinfo").lines().collect::<Vec<_>>(),
        // The line of cgroup v2 begins with `0::`. A host can also have cgroup v1 hierarchies,
        // whose lines begin with other numbers.
        "cgroup": text("/proc/self/cgroup").lines().find(|line| line.starts_with("0::")),
        "exe": fs::read_link("/proc/self/exe").unwrap_or_default(),
        "tty": terminals,
        "stat": text("/proc/self/stat").rsplit_once(") ").map(|(_, rest)| {
            rest.split(' ').map(str::to_owned).collect::<Vec<_>>()
        }),
        "io_priority": io_priority(),
        "personality": text("/proc/self/personality"),
        "machine": name.machine().to_string_lossy(),
        "memory_policy": text("/proc/self/numa_maps").lines().next()
            .and_then(|line| line.split(' ').nth(1).map(str::to_owned)),
        "keyring": keyring(),
        // If SELinux is enabled, the label ends with a NUL byte, which the report omits.
        "label": text("/proc/self/attr/current").trim_end_matches('\0'),
        "files": files,
        "devices": device_nodes(),
    }))
}

/// Returns the name of each file in /dev, with its mode, its owner and its device number. A symbolic
/// link has its target instead.
fn device_nodes() -> BTreeMap<String, String> {
    let mut all = links("/dev");
    for entry in fs::read_dir("/dev").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if let Ok(file) = fs::symlink_metadata(entry.path()) {
            let (mode, uid, gid) = (file.mode(), file.uid(), file.gid());
            all.entry(name)
                .or_insert_with(|| format!("{mode:o} {uid}:{gid} {:#x}", file.rdev()));
        }
    }
    all
}

/// Returns the I/O class and the I/O priority of this process (ioprio_get(2)).
fn io_priority() -> [i64; 2] {
    const WHO_PROCESS: i32 = 1;
    // SAFETY: ioprio_get(2) gets no pointers.
    let value = unsafe { nix::libc::syscall(nix::libc::SYS_ioprio_get, WHO_PROCESS, 0) };
    [value >> 13, value & 0x1fff]
}

/// Returns the kernel's description of the session keyring (keyctl(2)), which has the form
/// `type;uid;gid;permissions;name`.
fn keyring() -> String {
    const KEYCTL_DESCRIBE: i32 = 6;
    const SESSION_KEYRING: i32 = -3;
    let mut text = [0u8; 256];
    // SAFETY: `text` is writable for the length that keyctl(2) gets.
    let length = unsafe {
        nix::libc::syscall(
            nix::libc::SYS_keyctl,
            KEYCTL_DESCRIBE,
            SESSION_KEYRING,
            text.as_mut_ptr(),
            text.len(),
        )
    };
    let length = usize::try_from(length).unwrap_or(0).saturating_sub(1);
    String::from_utf8_lossy(text.get(..length).unwrap_or_default()).into_owned()
}

fn cat(files: &[&str]) -> Result<(), InsideError> {
    for file in files {
        let bytes = fs::read(file).map_err(|error| format!("{file}: {error}"))?;
        std::io::stdout().write_all(&bytes)?;
    }
    Ok(())
}

fn list(dir: &str) -> Result<(), InsideError> {
    let mut names: Vec<_> = fs::read_dir(dir)?
        .flatten()
        .map(|entry| entry.file_name())
        .collect();
    names.sort();
    names
        .iter()
        .try_for_each(|name| say(&name.to_string_lossy()))
}

fn stat(path: &str) -> Result<(), InsideError> {
    let file = fs::symlink_metadata(path)?;
    let kind = file.file_type();
    let kind = match () {
        () if kind.is_dir() => "directory",
        () if kind.is_symlink() => "link",
        () if kind.is_char_device() => "character device",
        () if kind.is_block_device() => "block device",
        () if kind.is_fifo() => "fifo",
        () if kind.is_socket() => "socket",
        () => "file",
    };
    say(&json!({
        "kind": kind,
        "mode": format!("{:o}", file.mode() & 0o7777),
        "uid": file.uid(),
        "gid": file.gid(),
        "device": [nix::libc::major(file.rdev()), nix::libc::minor(file.rdev())],
    })
    .to_string())
}

/// Waits for signals, prints the name of each signal, and exits on SIGTERM. The first process of a
/// PID namespace receives only signals that it blocks or handles. The program therefore blocks
/// these signals.
fn wait() -> Result<(), InsideError> {
    let mut set = SigSet::empty();
    for signal in [
        Signal::SIGTERM,
        Signal::SIGINT,
        Signal::SIGHUP,
        Signal::SIGUSR1,
    ] {
        set.add(signal);
    }
    set.thread_block()?;
    say("ready")?;
    loop {
        let signal = set.wait()?;
        say(signal.as_str())?;
        if signal == Signal::SIGTERM {
            return Ok(());
        }
    }
}

/// Sends the notification `text` (sd_notify(3)), and then sleeps until it is killed.
fn notify(text: &str) -> Result<(), InsideError> {
    let socket = std::os::unix::net::UnixDatagram::unbound()?;
    socket.send_to(text.as_bytes(), std::env::var("NOTIFY_SOCKET")?)?;
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

/// Sends `text` to the notification socket `times` times, and exits. The reader can close the socket
/// after the first message.
fn notify_often(text: &str, times: u32) -> Result<(), InsideError> {
    let socket = std::os::unix::net::UnixDatagram::unbound()?;
    let path = std::env::var("NOTIFY_SOCKET")?;
    socket.send_to(text.as_bytes(), &path)?;
    for _ in 1..times {
        let _ = socket.send_to(text.as_bytes(), &path);
    }
    Ok(())
}

/// Sends `count` descriptors to a socket from which no process reads, and sleeps.
fn in_transit(count: usize) -> Result<(), InsideError> {
    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
    use std::os::fd::AsRawFd;
    let (sender, _receiver) = std::os::unix::net::UnixDatagram::pair()?;
    let descriptors = vec![sender.as_raw_fd(); count];
    let (parts, rights) = (
        [std::io::IoSlice::new(b"x")],
        [ControlMessage::ScmRights(&descriptors)],
    );
    sendmsg::<()>(sender.as_raw_fd(), &parts, &rights, MsgFlags::empty(), None)?;
    say("sent")?;
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

/// Sleeps, and blocks every signal except SIGKILL and SIGSTOP, which cannot be blocked.
fn deaf() -> Result<(), InsideError> {
    SigSet::all().thread_block()?;
    say("ready")?;
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

fn spin(seconds: f64) {
    let started = Instant::now();
    let mut turns = 0u64;
    while started.elapsed().as_secs_f64() < seconds {
        for _ in 0..10_000 {
            turns = std::hint::black_box(turns.wrapping_add(1));
        }
    }
}

/// Reads a file. The kernel then stores the file's content in the page cache.
fn read(path: &str) -> Result<(), InsideError> {
    let mut file = fs::File::open(path)?;
    std::io::copy(&mut file, &mut std::io::sink())?;
    Ok(())
}

/// Writes `megabytes` MB to the file `path`, and waits until the data is on the disk.
fn fill(path: &str, megabytes: usize) -> Result<(), InsideError> {
    use std::io::Write as _;
    let mut file = fs::File::create(path)?;
    for _ in 0..megabytes {
        file.write_all(&[1u8; 1 << 20])?;
    }
    file.sync_all()?;
    Ok(())
}

/// Allocates `pages` huge pages of 2 MB, and writes to each of them.
fn huge(pages: usize) -> Result<(), InsideError> {
    use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};
    const SIZE: usize = 2 << 20;
    let length =
        std::num::NonZeroUsize::new(pages * SIZE).ok_or("the number of huge pages is 0")?;
    let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_HUGETLB | MapFlags::MAP_NORESERVE;
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: mmap(2) creates a new mapping, at an address that the kernel chooses.
    let start = unsafe { mmap_anonymous(None, length, protection, flags) }?;
    for page in 0..pages {
        // SAFETY: the address is inside the mapping, to which no other reference exists.
        unsafe { start.cast::<u8>().add(page * SIZE).write_volatile(1) };
    }
    say(&format!("{pages} huge pages"))
}

/// Allocates `megabytes` MB, one MB at a time, and prints the total after every 8 MB.
fn allocate(megabytes: usize) -> Result<(), InsideError> {
    let mut kept = Vec::new();
    for taken in 1..=megabytes {
        let mut block = vec![0u8; 1 << 20];
        block.iter_mut().step_by(4096).for_each(|byte| *byte = 1);
        kept.push(std::hint::black_box(block));
        if taken % 8 == 0 || taken == megabytes {
            say(&format!("{taken} MB"))?;
        }
    }
    Ok(())
}

/// Starts at most `most` children, but stops after the first failure. Prints the number of started
/// children and the error.
fn forks(most: usize) -> Result<(), InsideError> {
    let mut children = Vec::new();
    let mut refusal = None;
    for _ in 0..most {
        let child = std::process::Command::new("/proc/self/exe")
            .args(["sleep", "60"])
            .env("RRUN_E2E_INSIDE", "1")
            .spawn();
        match child {
            Ok(child) => children.push(child),
            Err(error) => {
                refusal = Some(error);
                break;
            }
        }
    }
    let refusal = refusal.map_or("none refused".to_owned(), |error| error.to_string());
    let result = say(&format!("{} children, {refusal}", children.len()));
    for mut child in children {
        let _ = child.kill();
        let _ = child.wait();
    }
    result
}

/// Starts a child process that sleeps for `seconds`, prints the child's process id, and exits
/// immediately. The child process becomes an orphan.
fn orphan(seconds: &str) -> Result<(), InsideError> {
    let child = std::process::Command::new("/proc/self/exe")
        .args(["sleep", seconds])
        .env("RRUN_E2E_INSIDE", "1")
        .spawn()?;
    say(&child.id().to_string())
}

/// Prints a line, closes its terminal, opens the terminal at `path` and prints a line again.
fn reopen(path: &str) -> Result<(), InsideError> {
    say("before")?;
    let null = fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/null")?;
    nix::unistd::dup2_stdin(&null)?;
    nix::unistd::dup2_stdout(&null)?;
    nix::unistd::dup2_stderr(&null)?;
    // In this time, a runtime can notice that no process has the terminal open.
    std::thread::sleep(Duration::from_millis(200));
    let mut terminal = fs::File::options().write(true).open(path)?;
    Ok(terminal.write_all(b"after\n")?)
}

/// Starts a process that ignores SIGHUP and prints lines forever.
fn leave_writer() -> Result<(), InsideError> {
    // SAFETY: SIG_IGN is not a function of this program.
    unsafe { nix::sys::signal::signal(Signal::SIGHUP, nix::sys::signal::SigHandler::SigIgn)? };
    std::process::Command::new("/proc/self/exe")
        .args(["count", "0"])
        .env("RRUN_E2E_INSIDE", "1")
        .spawn()?;
    Ok(())
}

/// Starts a child that stops all other processes of the container again and again, except the
/// container's first process. Then waits for signals.
fn stop_others() -> Result<(), InsideError> {
    std::process::Command::new("/proc/self/exe")
        .args(["stop-others-forever"])
        .env("RRUN_E2E_INSIDE", "1")
        .spawn()?;
    wait()
}

fn stop_others_forever() -> ! {
    loop {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(-1), Signal::SIGSTOP);
    }
}

/// Creates `levels` nested cgroups below this process's cgroup, each with a name of `length` bytes.
/// Then moves this process into the deepest cgroup, and waits for signals.
fn nest_cgroups(levels: &str, length: &str) -> Result<(), InsideError> {
    let name = "d".repeat(length.parse()?);
    std::env::set_current_dir("/sys/fs/cgroup")?;
    for _ in 0..levels.parse::<u64>()? {
        fs::create_dir(&name)?;
        std::env::set_current_dir(&name)?;
    }
    fs::write("cgroup.procs", "0")?;
    wait()
}

/// Prints numbered lines forever, and sleeps for `milliseconds` after each line.
fn count(milliseconds: u64) -> Result<(), InsideError> {
    for number in 1u64.. {
        say(&format!("line {number}"))?;
        std::thread::sleep(Duration::from_millis(milliseconds));
    }
    Ok(())
}

/// Prints `lines` numbered lines, as fast as the reader reads them.
fn burst(lines: u64) -> Result<(), InsideError> {
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    for number in 1..=lines {
        writeln!(out, "line {number}")?;
    }
    Ok(out.flush()?)
}

/// Parses a system call's number and its arguments. A missing argument becomes 0.
fn words_of_call(numbers: &[&str]) -> Result<[i64; 7], InsideError> {
    let mut all = [0; 7];
    for (place, number) in all.iter_mut().zip(numbers) {
        let parsed = number.parse::<u64>().map(u64::cast_signed);
        *place = number.parse::<i64>().or(parsed)?;
    }
    Ok(all)
}

/// Makes a system call and prints its result: a number, or the name of an errno.
fn call(numbers: &[&str]) -> Result<(), InsideError> {
    let [number, a, b, c, d, e, f] = words_of_call(numbers)?;
    // SAFETY: the tests make only system calls without pointers, or with null pointers.
    let returned = unsafe { nix::libc::syscall(number, a, b, c, d, e, f) };
    say(&match returned {
        -1 => format!("{:?}", nix::errno::Errno::last()),
        number => number.to_string(),
    })
}

/// Makes a system call in a separate thread, and prints a line if the process survives the system
/// call.
fn call_in_thread(numbers: &[&str]) -> Result<(), InsideError> {
    let [number, a, ..] = words_of_call(numbers)?;
    // SAFETY: the tests pass only numbers, and no pointers, to the system call. The kernel can kill
    // the thread during the system call.
    std::thread::spawn(move || unsafe { nix::libc::syscall(number, a) });
    let tasks = || fs::read_dir("/proc/self/task").map(Iterator::count);
    while tasks()? > 1 {
        std::thread::sleep(Duration::from_millis(1));
    }
    say("survived")
}

/// Installs a handler for SIGSYS, and then makes a system call.
fn call_and_catch(numbers: &[&str]) -> Result<(), InsideError> {
    extern "C" fn caught(_signal: nix::libc::c_int) {
        // SAFETY: both functions are async-signal-safe (signal-safety(7)).
        unsafe {
            nix::libc::write(1, c"caught SIGSYS".as_ptr().cast(), 13);
            nix::libc::_exit(0);
        }
    }
    // SAFETY: the handler calls only async-signal-safe functions.
    unsafe {
        nix::sys::signal::signal(
            Signal::SIGSYS,
            nix::sys::signal::SigHandler::Handler(caught),
        )?;
    }
    call(numbers)
}
