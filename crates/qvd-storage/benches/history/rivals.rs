//! What the same update costs in other ways.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use crate::Outcome;

pub(crate) fn copy(from: &Path, to: &Path) -> Outcome<()> {
    match Command::new("cp").arg("-a").arg(from).arg(to).status()?.success() {
        true => Ok(()),
        false => Err("cp failed".into()),
    }
}

/// Bytes of files.
pub(crate) fn plain(top: &Path, files: &[PathBuf]) -> Outcome<u64> {
    files.iter().map(|file| Ok(fs::metadata(top.join(file))?.len())).sum()
}

/// Bytes of files behind each other, compressed by zstd at its default level:
/// what has to travel if nothing is known but the files themselves.
pub(crate) fn compressed(top: &Path, files: &[PathBuf]) -> Outcome<usize> {
    let mut all = Vec::new();
    for file in files {
        all.extend(fs::read(top.join(file))?);
    }
    Ok(zstd::stream::encode_all(all.as_slice(), 3)?.len())
}

/// Bytes that rsync sends and receives to make `to` like `from`; none where it
/// is not installed.
pub(crate) fn rsync(from: &Path, to: &Path) -> Outcome<Option<f64>> {
    let mut source = from.as_os_str().to_owned();
    source.push("/");
    let output = Command::new("rsync").args(["-az", "--no-whole-file", "--stats"]).arg(source).arg(to).output();
    let Ok(output) = output else { return Ok(None) };
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let number = |what: &str| {
        let line = said.lines().find_map(|line| line.strip_prefix(what))?;
        line.replace([',', '.'], "").trim().parse::<f64>().ok()
    };
    Ok(number("Total bytes sent:").zip(number("Total bytes received:")).map(|(sent, received)| sent + received))
}
