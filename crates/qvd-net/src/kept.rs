//! Small files that outlive a process.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::Path,
};

use crate::Error;

/// What a file says; nothing if there is none.
pub(crate) fn read(file: &Path) -> Result<String, Error> {
    match fs::read_to_string(file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        other => other.map_err(Error::io("read", file.display().to_string())),
    }
}

/// A line that nobody here wrote.
pub(crate) fn unknown(line: &str, file: &str, what: &str) -> Error {
    let shown: String = line.chars().take(64).flat_map(char::escape_default).collect();
    Error::Invalid(format!("`{shown}` in `{file}` is {what}"))
}

/// Writes a file whole or not at all. A host that dies at once may come back
/// with what was there before.
pub(crate) fn write(file: &Path, text: &str) -> Result<(), Error> {
    replace(file, text, |_| Ok(())).map_err(Error::io("write", file.display().to_string()))
}

/// The same, and once it is written no death of the host undoes it.
pub(crate) fn write_for_good(file: &Path, text: &str) -> Result<(), Error> {
    let directory = file.parent().filter(|directory| !directory.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let written = replace(file, text, File::sync_all).and_then(|()| File::open(directory)?.sync_all());
    written.map_err(Error::io("write", file.display().to_string()))
}

/// Adds text to the end of a file. What becomes of a host that dies at once is as with
/// [`write`], but that the text may be there in part.
pub(crate) fn append(file: &Path, text: &str) -> Result<(), Error> {
    let added = File::options().create(true).append(true).open(file).and_then(|mut to| to.write_all(text.as_bytes()));
    added.map_err(Error::io("write", file.display().to_string()))
}

fn replace(file: &Path, text: &str, settle: impl FnOnce(&File) -> io::Result<()>) -> io::Result<()> {
    let new = file.with_extension("new");
    let mut to = File::create(&new)?;
    to.write_all(text.as_bytes())?;
    settle(&to)?;
    fs::rename(&new, file)
}
