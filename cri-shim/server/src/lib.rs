//! The CRI server `rrun-cri`.

mod cgroup;
mod clock;
mod config;
mod container;
mod directories;
mod events;
#[cfg(feature = "fuzz")]
pub mod fuzz;
mod handlers;
mod id;
mod metrics;
mod node;
mod preflight;
mod reconcile;
mod reload;
mod report_size;
mod sandbox;
mod selinux;
mod server;
mod services;
mod stats;
mod stderr_log;
mod streaming;
mod waiting;

use std::path::PathBuf;
use std::process::ExitCode;

use crate::config::{ConfigSource, DEFAULT_TEXT, Flags};
use clap::{Parser, Subcommand};
use rrun_images::Registries;

/// A CRI v1 server for kubelet and crictl.
#[derive(Parser)]
#[command(name = "rrun-cri", version, args_conflicts_with_subcommands = true)]
struct Arguments {
    /// The configuration file; the files config.d/*.toml next to it are read, too
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    flags: Flags,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Print or check the configuration
    Config {
        #[command(subcommand)]
        what: ConfigCommand,
    },
}

#[derive(Subcommand)]
enum ConfigCommand {
    /// Print the whole default configuration with comments, as TOML
    Default,
    /// Check the configuration and the registries' hosts.toml files, and exit with status 1 if
    /// there is a mistake. This command does not contact a running server
    Check {
        /// The configuration file; the files config.d/*.toml next to it are read, too
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
}

/// Reads the command line, and runs the server or the requested subcommand.
pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = match arguments.command {
        Some(Command::Config {
            what: ConfigCommand::Default,
        }) => {
            print!("{DEFAULT_TEXT}");
            Ok(())
        }
        Some(Command::Config {
            what: ConfigCommand::Check { config },
        }) => check(config),
        None => run(arguments.config, arguments.flags),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(sentence) => {
            eprintln!("rrun-cri: {sentence}");
            ExitCode::FAILURE
        }
    }
}

/// Reports mistakes in the configuration and in the registries' files. A mistake in the
/// configuration would prevent the server's start. A mistake in a registry's file would make pulls
/// fail.
fn check(file: Option<PathBuf>) -> Result<(), String> {
    stderr_log::open(false);
    let flags = Flags::default();
    let config = ConfigSource { file, flags }.load();
    let config = config.map_err(|error| error.to_string())?;
    let registries = Registries::new(&config.registry_config_path);
    let files = registries.files();
    let wrong: Vec<String> = files
        .keys()
        .filter_map(|file| registries.check(file).err())
        .map(|error| error.to_string())
        .collect();
    if wrong.is_empty() {
        Ok(())
    } else {
        Err(wrong.join("\nrrun-cri: "))
    }
}

fn run(file: Option<PathBuf>, flags: Flags) -> Result<(), String> {
    let source = ConfigSource { file, flags };
    let config = source.load().map_err(|error| error.to_string())?;
    if !rustix::process::geteuid().is_root() {
        return Err("the server must run as root".to_owned());
    }
    cgroup::check()?;
    stderr_log::open(config.debug);
    stderr_log::set_max_lines(config.log_lines);
    server::run(source, config).map_err(|error| error.to_string())
}
