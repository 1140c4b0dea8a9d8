//! The CRI server.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use rrun_cri::config::{DEFAULT_TEXT, Partial, Source};
use rrun_cri::{cgroup, journal, server};

/// A CRI v1 server for kubelet and crictl.
#[derive(Parser)]
#[command(name = "rrun-cri", version, args_conflicts_with_subcommands = true)]
struct Arguments {
    /// The configuration file; config.d/*.toml beside it are read, too
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    flags: Partial,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// About the configuration
    Config {
        #[command(subcommand)]
        what: ConfigCommand,
    },
}

#[derive(Subcommand)]
enum ConfigCommand {
    /// Print the whole default configuration, commented, as TOML
    Default,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if let Some(Command::Config {
        what: ConfigCommand::Default,
    }) = arguments.command
    {
        print!("{DEFAULT_TEXT}");
        return ExitCode::SUCCESS;
    }
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(sentence) => {
            eprintln!("rrun-cri: {sentence}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> Result<(), String> {
    let source = Source {
        file: arguments.config,
        flags: arguments.flags,
    };
    let config = source.load().map_err(|error| error.to_string())?;
    if !rustix::process::geteuid().is_root() {
        return Err("this must run as root".to_owned());
    }
    cgroup::check()?;
    journal::open(config.debug);
    server::run(source, config).map_err(|error| error.to_string())
}
