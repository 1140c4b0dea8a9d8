//! Benchmarks that compare rrun with other runtimes and servers. During one run, a benchmark
//! alternates between the programs that it compares. `tests/bench/run` starts the benchmarks as
//! root, in the native view (tests/native/run) or in the guest machine. The benchmarks measure
//! times, but they never fail because a program is slow.

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
    /// Directory of the programs floor, launch and nothing, which tests/bench/run builds
    #[arg(long, global = true, default_value = "/out/bin")]
    programs: PathBuf,
    /// Directory for the raw figures
    #[arg(long, global = true, default_value = "/out")]
    results: PathBuf,
    #[command(subcommand)]
    benchmark: Benchmark,
}

#[derive(Subcommand)]
enum Benchmark {
    /// Measures OCI runtimes: `run`, create + start + delete, and `exec` of a program that does
    /// nothing
    Oci(oci::OciOptions),
    /// Measures CRI servers: critest's benchmark, creating and removing pods, ExecSync, pulls,
    /// memory
    Cri(cri::CriOptions),
    /// Measures kubelet: the time until pods are Ready, and the load of a node full of probed pods
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
