//! The `qvd` command.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    qvd_bin::run(std::env::args_os())
}
