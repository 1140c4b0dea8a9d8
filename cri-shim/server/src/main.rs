//! The program `rrun-cri`. The crate's library contains the code.

use std::process::ExitCode;

fn main() -> ExitCode {
    rrun_cri::main()
}
