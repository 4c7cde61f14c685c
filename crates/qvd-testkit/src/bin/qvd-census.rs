//! Prints the leak census of this host, or how it differs from an earlier one.
//!
//! `qvd-census [--mark TEXT]… [--dir PATH]…` prints a census as JSON.
//! `qvd-census --compare FILE [--settle SECONDS]` takes one of the same scope
//! and fails, with a line per object, when it is not that of the file.
#![forbid(unsafe_code)]
// Its output is what it is for.
#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::{env, error::Error, fs, process::ExitCode, time::Duration};

use qvd_testkit::{Census, Scope};

fn main() -> ExitCode {
    match run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("qvd-census: {error}");
            ExitCode::from(2)
        }
    }
}

fn run() -> Result<ExitCode, Box<dyn Error>> {
    let (mut marks, mut directories, mut earlier, mut settle) = (Vec::new(), Vec::new(), None, 10);
    let mut args = env::args().skip(1);
    while let Some(option) = args.next() {
        let value = args.next().ok_or_else(|| format!("`{option}` needs a value"))?;
        match option.as_str() {
            "--mark" => marks.push(value),
            "--dir" => directories.push(value),
            "--compare" => earlier = Some(value),
            "--settle" => settle = value.parse().map_err(|_| format!("`{value}` is not a number of seconds"))?,
            _ => return Err(format!("unknown option `{option}`").into()),
        }
    }
    let Some(earlier) = earlier else {
        let scope = directories.into_iter().fold(Scope::marked(marks), Scope::files_under);
        println!("{}", serde_json::to_string(&Census::take(&scope))?);
        return Ok(ExitCode::SUCCESS);
    };
    let text = fs::read_to_string(&earlier).map_err(|e| format!("cannot read `{earlier}`: {e}"))?;
    let earlier: Census = serde_json::from_str(&text).map_err(|e| format!("`{earlier}` is not a census: {e}"))?;
    let difference = earlier.settle(Duration::from_secs(settle));
    print!("{difference}");
    Ok(if difference.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
