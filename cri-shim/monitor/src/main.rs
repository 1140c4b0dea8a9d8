//! The program `rrun-monitor`. The crate's library contains the code.

use std::process::ExitCode;

fn main() -> ExitCode {
    rrun_monitor::main()
}
