//! Runs fuzz targets with the stable compiler.
//!
//!     rrun-fuzz list                       prints the names of all targets
//!     rrun-fuzz one TARGET FILE…           passes the files to the target
//!     rrun-fuzz run [--seconds N] [--seed N] [--found DIR] [TARGET…]
//!
//! `run` passes the corpus of each target to the target, and changed inputs until the time has
//! passed. All targets share the time. The output is in the format of Rust's tests. Each target
//! runs in a child process. If the child dies or one input takes longer than [`INPUT_TIMEOUT`], the
//! input is written to the directory DIR, and the target fails.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use clap::{Parser, Subcommand};
use rrun_fuzz::{Target, run, target, targets};

/// The longest time that a target may take for one input. No parser needs a second, but the machine
/// can be busy.
const INPUT_TIMEOUT: Duration = Duration::from_secs(60);

/// The number of bytes of a failed child's error output that are printed. The output ends with the
/// message of the panic.
const STDERR_BYTES: usize = 3000;

const POLL_INTERVAL: Duration = Duration::from_millis(50);

#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Print the names of all targets
    List,
    /// Pass the files to the target
    One { target: String, files: Vec<PathBuf> },
    /// Pass the corpus and changed inputs to the targets
    Run {
        #[arg(long, default_value_t = 60)]
        seconds: u64,
        /// The default is the number of the day
        #[arg(long)]
        seed: Option<u64>,
        /// The directory for inputs that found a mistake
        #[arg(long, default_value = "target/fuzz/found")]
        found: PathBuf,
        targets: Vec<String>,
    },
    /// Run one target in this process
    #[command(hide = true)]
    Child {
        target: String,
        milliseconds: u64,
        seed: u64,
        record: PathBuf,
    },
}

fn main() -> ExitCode {
    match act(Arguments::parse().command) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("rrun-fuzz: {error}");
            ExitCode::FAILURE
        }
    }
}

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Returns false if a target failed.
fn act(action: Action) -> Result<bool> {
    match action {
        Action::List => {
            for target in targets() {
                println!("{}", target.name);
            }
        }
        Action::One { target, files } => {
            let target = find(&target)?;
            for file in files {
                (target.function)(&fs::read(file)?);
            }
        }
        Action::Run {
            seconds,
            seed,
            found,
            targets,
        } => return run_all(&targets, Duration::from_secs(seconds), seed, &found),
        Action::Child {
            target,
            milliseconds,
            seed,
            record,
        } => {
            let record = File::options().write(true).open(record)?;
            let time = Duration::from_millis(milliseconds);
            println!("{}", run(find(&target)?, time, seed, &record)?.executions);
        }
    }
    Ok(true)
}

fn find(name: &str) -> Result<Target> {
    target(name).ok_or_else(|| format!("there is no fuzz target {name:?}").into())
}

fn run_all(names: &[String], time: Duration, seed: Option<u64>, found: &Path) -> Result<bool> {
    let selected = if names.is_empty() {
        targets()
    } else {
        names.iter().map(|name| find(name)).collect::<Result<_>>()?
    };
    let today = || {
        let now = std::time::SystemTime::UNIX_EPOCH.elapsed();
        now.unwrap_or_default().as_secs() / 86400
    };
    let seed = seed.unwrap_or_else(today);
    let share = time / u32::try_from(selected.len().max(1))?;
    fs::create_dir_all(found)?;
    println!(
        "the seed is {seed}; each of {} targets gets {share:?}",
        selected.len()
    );
    let mut failed = 0;
    for target in &selected {
        match run_child(*target, share, seed, found)? {
            Ok(executions) => println!("test fuzz::{} ... ok ({executions} inputs)", target.name),
            Err(reason) => {
                println!("{reason}\ntest fuzz::{} ... FAILED", target.name);
                failed += 1;
            }
        }
    }
    println!(
        "\ntest result: {}. {} passed; {failed} failed; 0 ignored; 0 measured; 0 filtered out",
        if failed == 0 { "ok" } else { "FAILED" },
        selected.len() - failed
    );
    Ok(failed == 0)
}

/// Runs the target in a child process. Returns the number of inputs, or the reason why the target
/// failed.
fn run_child(
    target: Target,
    time: Duration,
    seed: u64,
    found: &Path,
) -> Result<std::result::Result<u64, String>> {
    let record_path = found.join(format!(".{}-{}", target.name, std::process::id()));
    let record = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&record_path)?;
    let stderr_path = record_path.with_extension("stderr");
    let mut child = Command::new(std::env::current_exe()?)
        .args(["child", target.name])
        .args([time.as_millis().to_string(), seed.to_string()])
        .arg(&record_path)
        .stdout(Stdio::piped())
        .stderr(File::create(&stderr_path)?)
        .spawn()?;
    let (mut last, mut since) = (Vec::new(), Instant::now());
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break Some(status);
        }
        std::thread::sleep(POLL_INTERVAL);
        let now = recorded(&record);
        if now != last {
            (last, since) = (now, Instant::now());
        } else if since.elapsed() > INPUT_TIMEOUT {
            child.kill()?;
            child.wait()?;
            break None;
        }
    };
    let input = recorded(&record);
    let stderr = fs::read(&stderr_path)?;
    fs::remove_file(&record_path)?;
    fs::remove_file(&stderr_path)?;
    if status.is_some_and(|status| status.success()) {
        let mut output = String::new();
        if let Some(mut stdout) = child.stdout {
            std::io::Read::read_to_string(&mut stdout, &mut output)?;
        }
        return Ok(Ok(output.trim().parse()?));
    }
    let file = found.join(format!("{}-{seed}-{}", target.name, input.len()));
    fs::write(&file, input)?;
    let what = status.map_or_else(
        || format!("takes longer than {INPUT_TIMEOUT:?}"),
        |status| format!("kills the process ({status})"),
    );
    let file = file.display();
    let stderr = String::from_utf8_lossy(&stderr[stderr.len().saturating_sub(STDERR_BYTES)..]);
    Ok(Err(format!(
        "{stderr}\nthe input in {file} {what}; `rrun-fuzz one {} {file}` repeats it",
        target.name
    )))
}

/// Returns the input that the child recorded last.
fn recorded(record: &File) -> Vec<u8> {
    let mut length = [0; 8];
    let Ok(()) = record.read_exact_at(&mut length, 0) else {
        return Vec::new();
    };
    let mut input = vec![0; usize::try_from(u64::from_le_bytes(length)).unwrap_or(0)];
    match record.read_exact_at(&mut input, 8) {
        Ok(()) => input,
        Err(_) => Vec::new(),
    }
}
