//! A pod's monitor; `rrun_cri::monitor` is all of it.

use std::process::ExitCode;

fn main() -> ExitCode {
    match rrun_cri::monitor::run(std::env::args().skip(1)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("rrun-monitor: {error}");
            ExitCode::FAILURE
        }
    }
}
