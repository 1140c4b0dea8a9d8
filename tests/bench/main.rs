//! Benchmarks: rrun beside its peers, all of them measured in one run, taking turns. Runs as root
//! in a view (`tests/bench/run` starts it there). Nothing is asserted about time.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod bundle;
mod cri;
mod critest;
mod exec_sync;
mod fleet;
mod launch;
mod load;
mod logs;
mod memory;
mod network;
mod oci;
mod pods;
mod pull;
mod ready;
mod report;
mod samples;
mod service;
mod streaming;

type Error = Box<dyn std::error::Error + Send + Sync>;
type Result<T = ()> = std::result::Result<T, Error>;

#[derive(Parser)]
#[command(name = "rrun-bench")]
struct Arguments {
    /// Where floor, launch and nothing are, built by tests/bench/run
    #[arg(long, global = true, default_value = "/out/bin")]
    programs: PathBuf,
    /// Where the raw figures go
    #[arg(long, global = true, default_value = "/out")]
    results: PathBuf,
    #[command(subcommand)]
    benchmark: Benchmark,
}

#[derive(Subcommand)]
enum Benchmark {
    /// OCI runtimes: `run`, create + start + delete, `exec` of a program that does nothing
    Oci(oci::OciOptions),
    /// CRI servers: critest's benchmark, a pod's life, ExecSync, pulls, memory
    Cri(cri::CriOptions),
    /// kubelet: from manifests to Ready, and what a node full of probed pods uses
    Ready(ready::ReadyOptions),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = match &arguments.benchmark {
        Benchmark::Oci(options) => oci::run(options, &arguments.programs, &arguments.results),
        Benchmark::Cri(options) => cri::run(options, &arguments.programs, &arguments.results),
        Benchmark::Ready(options) => ready::run(options, &arguments.results),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("rrun-bench: {error}");
            ExitCode::FAILURE
        }
    }
}
