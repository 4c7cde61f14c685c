//! What aufs is told, in its own words.

use std::{fmt, path::PathBuf};

use qvd_core::Missing;

use crate::Error;

/// What may be done with a branch. Source: aufs(5), "Branch Syntax".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AufsPermission {
    /// Written to.
    ReadWrite,
    /// Not written to, and removed names of it may be marked in it already.
    ReadOnlyWithWhiteouts,
}

impl fmt::Display for AufsPermission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ReadWrite => "rw",
            Self::ReadOnlyWithWhiteouts => "ro+wh",
        })
    }
}

/// One directory of a stack.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AufsBranch {
    path: String,
    permission: AufsPermission,
}

impl fmt::Display for AufsBranch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.path, self.permission)
    }
}

/// The options of a mount. Displayed as `mount -o` takes them.
///
/// ```
/// # fn main() -> Result<(), qvd_storage::Error> {
/// let options = qvd_storage::AufsOptions::new("/own/upper", ["/base"], "/own/xino")?;
/// assert_eq!(options.to_string(), "br=/own/upper=rw:/base=ro+wh,xino=/own/xino,udba=none,dirperm1");
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AufsOptions {
    branches: Vec<AufsBranch>,
    numbers: String,
}

impl AufsOptions {
    /// `upper` is written to, the `lower` ones are not, uppermost first. `numbers`
    /// is a file that aufs makes on a writable file system: it has to be outside
    /// of the branches.
    ///
    /// # Errors
    /// A path is not absolute, or has a character that means something to aufs:
    /// it knows no way to write these.
    pub fn new(
        upper: impl Into<PathBuf>,
        lower: impl IntoIterator<Item = impl Into<PathBuf>>,
        numbers: impl Into<PathBuf>,
    ) -> Result<Self, Error> {
        let branch = |path, permission| plain(path).map(|path| AufsBranch { path, permission });
        let mut branches = vec![branch(upper.into(), AufsPermission::ReadWrite)?];
        for path in lower {
            branches.push(branch(path.into(), AufsPermission::ReadOnlyWithWhiteouts)?);
        }
        Ok(Self { branches, numbers: plain(numbers.into())? })
    }

    /// Each option with its value, in the order in which they have to be set.
    pub(super) fn each<E>(&self, mut set: impl FnMut(&str, Option<&str>) -> Result<(), E>) -> Result<(), E> {
        let branches: Vec<_> = self.branches.iter().map(ToString::to_string).collect();
        set("br", Some(&branches.join(":")))?;
        set("xino", Some(&self.numbers))?;
        // Nobody changes branches behind its back, so it need not look.
        set("udba", Some("none"))?;
        // A directory's mode is that of the uppermost branch alone.
        set("dirperm1", None)
    }
}

impl fmt::Display for AufsOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut first = true;
        self.each(|key, value| {
            let comma = if std::mem::take(&mut first) { "" } else { "," };
            match value {
                Some(value) => write!(f, "{comma}{key}={value}"),
                None => write!(f, "{comma}{key}"),
            }
        })
    }
}

/// A path that aufs reads as one.
fn plain(path: PathBuf) -> Result<String, Error> {
    let special = |c: char| matches!(c, ',' | ':' | '=' | '+' | '\\') || c.is_control();
    match path.into_os_string().into_string() {
        Ok(path) if path.starts_with('/') && !path.contains(special) => Ok(path),
        Ok(path) => Err(unreadable(&path)),
        Err(path) => Err(unreadable(&path.to_string_lossy())),
    }
}

fn unreadable(path: &str) -> Error {
    let why = format!("aufs takes no path like `{}`: it would read its options in it", path.escape_debug());
    Error::Unsupported { op: "mount roots", missing: Missing::Design(why) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Path, permission, attributes.
    type Branch = (String, String, Vec<String>);
    /// Name and value.
    type Other = (String, Option<String>);

    /// Reads options as aufs(5) describes them: a list with commas, in `br` a list
    /// with colons of `PATH[=PERMISSION[+ATTRIBUTE]...]`.
    fn parse(text: &str) -> Option<(Vec<Branch>, Vec<Other>)> {
        let (mut branches, mut others) = (Vec::new(), Vec::new());
        for option in text.split(',') {
            match option.split_once('=') {
                Some(("br", list)) => {
                    for branch in list.split(':') {
                        let (path, permission) = branch.rsplit_once('=').unwrap_or((branch, "ro"));
                        let mut words = permission.split('+');
                        let permission = words.next().filter(|word| ["rw", "ro", "rr"].contains(word))?;
                        let attributes: Vec<_> = words.map(str::to_owned).collect();
                        let known = ["wh", "nolwh", "moo", "unpin", "coo_reg", "coo_all", "fhsm"];
                        if !attributes.iter().all(|one| known.contains(&one.as_str())) || !path.starts_with('/') {
                            return None;
                        }
                        branches.push((path.to_owned(), permission.to_owned(), attributes));
                    }
                }
                Some((key, value)) => {
                    let fits = match key {
                        "xino" => value.starts_with('/'),
                        "udba" => ["none", "reval", "notify"].contains(&value),
                        _ => false,
                    };
                    others.push(fits.then(|| (key.to_owned(), Some(value.to_owned())))?);
                }
                None if option == "dirperm1" => others.push((option.to_owned(), None)),
                None => return None,
            }
        }
        Some((branches, others))
    }

    proptest! {
        /// Whatever the paths: either aufs reads from it exactly what was meant, or
        /// it is refused.
        #[test]
        fn aufs_reads_what_was_meant(paths in prop::collection::vec("/[ -~]{0,20}", 3..6)) {
            let (numbers, branches) = paths.split_last().unwrap();
            let special = paths.iter().any(|path| path.contains([',', ':', '=', '+', '\\']));
            match AufsOptions::new(&branches[0], &branches[1..], numbers) {
                Ok(options) => {
                    prop_assert!(!special);
                    let (read, others) = parse(&options.to_string()).unwrap();
                    prop_assert_eq!(read.iter().map(|(path, ..)| path).collect::<Vec<_>>(), branches.iter().collect::<Vec<_>>());
                    prop_assert_eq!(&read[0].1, "rw");
                    let lower_is_read_only = read[1..].iter().all(|(_, permission, attributes)| permission == "ro" && *attributes == ["wh"]);
                    prop_assert!(lower_is_read_only);
                    prop_assert_eq!(&others[0], &("xino".to_owned(), Some(numbers.clone())));
                }
                Err(error) => prop_assert!(special, "{error}"),
            }
        }
    }

    #[test]
    fn paths_that_are_none_are_refused() {
        for bad in ["relative", "", "/a\nb", "/a:b", "/a=rw"] {
            let error = AufsOptions::new(bad, ["/base"], "/xino").unwrap_err().to_string();
            assert!(error.contains("aufs takes no path"), "{error}");
        }
    }
}
