//! What benchmarks of ways to make roots and disks have in common: file systems
//! of their own, programs, options, figures.

use std::{
    error::Error,
    fs::{self, File},
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    process::Command,
};

use qvd_sys::{
    loopdev::LoopDevice,
    mount::{FsContext, Restrictions, attach, open_dir_path},
};

pub(crate) type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// Kinds of file systems that are compared.
pub(crate) const KINDS: [&str; 3] = ["ext4", "xfs", "btrfs"];

/// Makes a file system in the file `disk` and mounts it.
pub(crate) fn mount(kind: &'static str, bytes: u64, disk: &Path, at: &Path) -> Outcome<()> {
    let file = File::options().read(true).write(true).create_new(true).open(disk)?;
    file.set_len(bytes)?;
    run(Command::new(format!("mkfs.{kind}")).arg("-q").arg(disk))?;
    fs::create_dir(at)?;
    let device = LoopDevice::attach(file.as_fd(), false)?;
    let context = FsContext::open(kind)?;
    context.set("source", device.path().to_str().ok_or("a device with a strange name")?)?;
    let mount = context.mount(Restrictions::default())?;
    Ok(attach(mount.as_fd(), open_dir_path(at)?.as_fd())?)
}

/// Bytes that no file system could keep without storing them.
pub(crate) fn noise(bytes: u32) -> Vec<u8> {
    (0..bytes).map(|number| number.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect()
}

/// Runs a program; returns what it said, or fails with it.
pub(crate) fn run(command: &mut Command) -> Outcome<String> {
    let output = command.output()?;
    if output.status.success() {
        return Ok(String::from_utf8(output.stdout)?);
    }
    Err(format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr)).into())
}

/// Median and least of some values.
pub(crate) fn figures(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    Some((*values.get(values.len() / 2)?, *values.first()?))
}

pub(crate) fn short(value: f64) -> String {
    if value >= 100.0 { format!("{value:.0}") } else { format!("{value:.1}") }
}

/// What the command line asks for.
pub(crate) struct Options {
    pub(crate) rounds: usize,
    pub(crate) json: bool,
    pub(crate) svg: Option<PathBuf>,
}

impl Options {
    pub(crate) fn parse() -> Outcome<Self> {
        let mut options = Self { rounds: 9, json: false, svg: None };
        let mut args = std::env::args().skip(1);
        while let Some(arg) = args.next() {
            match arg.as_str() {
                // Cargo says so to every benchmark.
                "--bench" => {}
                "--json" => options.json = true,
                "--rounds" => options.rounds = args.next().ok_or("`--rounds` needs a number")?.parse()?,
                "--svg" => options.svg = Some(args.next().ok_or("`--svg` needs a file")?.into()),
                _ => return Err(format!("unknown argument `{arg}`").into()),
            }
        }
        Ok(options)
    }
}
