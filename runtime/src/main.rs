use std::process::ExitCode;

fn main() -> ExitCode {
    rrun::commands::main(std::env::args_os())
}
