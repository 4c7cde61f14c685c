//! Small trees for desktops of tests.

use std::{fs, path::Path, process::Command};

/// Copies a program of this host into a tree, with the libraries that it names.
///
/// # Panics
/// It is not there, or cannot be copied.
pub fn copy_program(program: &str, tree: &Path) {
    copy_program_as(program, program, tree);
}

/// As [`copy_program`], under another path.
///
/// # Panics
/// As [`copy_program`].
pub fn copy_program_as(program: &str, name: &str, tree: &Path) {
    let copy = |from: &str, to: &str| {
        let inside = tree.join(to.trim_start_matches('/'));
        let made = fs::create_dir_all(inside.parent().unwrap_or(tree)).and_then(|()| fs::copy(from, inside));
        made.unwrap_or_else(|error| panic!("cannot copy {from}: {error}"));
    };
    // One that needs no library says so on its error output, and names none.
    let listed = Command::new("ldd").arg(program).output().unwrap_or_else(|error| panic!("cannot run ldd: {error}"));
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    for library in listed.split_ascii_whitespace().filter(|word| word.starts_with('/') && !word.ends_with(':')) {
        copy(library, library);
    }
    copy(program, name);
}
