//! Settings of the calling thread's network namespace below `/proc/sys/net`.

use std::{fs, io};

use crate::Error;

/// `name` is relative to `/proc/sys/net`; link names of ours have no slash.
fn path(name: &str) -> String {
    format!("/proc/sys/net/{name}")
}

pub(crate) fn read(name: &str) -> Result<String, Error> {
    let path = path(name);
    fs::read_to_string(&path).map(|text| text.trim().to_owned()).map_err(Error::io("read", path))
}

pub(crate) fn write(name: &str, value: &str) -> Result<(), Error> {
    let path = path(name);
    fs::write(&path, value).map_err(Error::io("write", path))
}

/// As [`write`], for what a kernel without the feature does not have.
pub(crate) fn write_if_there(name: &str, value: &str) -> Result<(), Error> {
    match write(name, value) {
        Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Whether there is such a setting here.
pub(crate) fn is_there(name: &str) -> bool {
    fs::exists(path(name)).unwrap_or(false)
}

/// What is in a directory of settings.
pub(crate) fn list(name: &str) -> Result<Vec<String>, Error> {
    let path = path(name);
    let entries = fs::read_dir(&path).and_then(Iterator::collect::<io::Result<Vec<_>>>);
    let names = entries.map_err(Error::io("list", path))?;
    Ok(names.iter().filter_map(|entry| entry.file_name().into_string().ok()).collect())
}
