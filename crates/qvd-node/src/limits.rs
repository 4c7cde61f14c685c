//! What the kernel counts for all desktops together.
//!
//! Each desktop has users of its own, but root of the host made its namespace,
//! and the kernel counts there too: with the usual 128, the 129th desktop would
//! find that nobody may watch a file any more.

use std::{fs, io, path::Path};

use qvd_core::{Missing, Support};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// A limit of the kernel that desktops share.
struct Shared {
    /// Below `/proc/sys`.
    file: &'static str,
    /// Enough for some thousand desktops with a dozen programs each.
    wanted: u64,
}

const SHARED: &[Shared] = &[
    Shared { file: "fs/inotify/max_user_instances", wanted: 1 << 16 },
    Shared { file: "fs/inotify/max_user_watches", wanted: 1 << 20 },
    Shared { file: "kernel/pid_max", wanted: 1 << 18 },
    Shared { file: "kernel/pty/max", wanted: 1 << 15 },
];

/// Raises what all desktops share to what some thousand of them need, and the
/// number of files that this process may have open to the most that it may: each
/// desktop takes a few, and the usual 1024 is for programs that use `select`.
/// Lowers nothing. What stays too low is logged: fewer desktops fit then.
pub fn raise_limits() {
    let most = getrlimit(Resource::Nofile).maximum;
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: most, maximum: most }) {
        tracing::warn!(%error, "the number of open files stays limited: fewer desktops fit");
    }
    for limit in SHARED {
        match raise(Path::new("/proc/sys"), limit) {
            Ok(None) => {}
            Ok(Some(before)) => {
                tracing::info!(limit = limit.file, before, now = limit.wanted, "raised for all desktops")
            }
            Err(error) => tracing::warn!(limit = limit.file, %error, "stays as it is: fewer desktops fit"),
        }
    }
}

fn raise(sys: &Path, limit: &Shared) -> io::Result<Option<u64>> {
    let path = sys.join(limit.file);
    let before = read(&path)?;
    if before >= limit.wanted {
        return Ok(None);
    }
    fs::write(path, limit.wanted.to_string())?;
    Ok(Some(before))
}

fn read(path: &Path) -> io::Result<u64> {
    fs::read_to_string(path)?.trim().parse().map_err(io::Error::other)
}

/// Whether more than a hundred desktops fit as the kernel is set now.
pub(crate) fn support() -> Support {
    let low = SHARED.iter().find_map(|limit| {
        let now = read(&Path::new("/proc/sys").join(limit.file)).ok()?;
        (now < limit.wanted).then(|| format!("room for thousands: {} is {now}", limit.file.replace('/', ".")))
    });
    low.map_or(Support::Yes, |what| Support::No(Missing::Kernel(what)))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_raised_and_never_lowered() {
        let dir = tempfile::tempdir().unwrap();
        let limit = Shared { file: "a/limit", wanted: 1000 };
        fs::create_dir(dir.path().join("a")).unwrap();
        let path = dir.path().join("a/limit");
        fs::write(&path, "128\n").unwrap();
        assert_eq!(raise(dir.path(), &limit).unwrap(), Some(128));
        assert_eq!(read(&path).unwrap(), 1000);
        fs::write(&path, "5000\n").unwrap();
        assert_eq!(raise(dir.path(), &limit).unwrap(), None);
        assert_eq!(read(&path).unwrap(), 5000);
        fs::write(&path, "max\n").unwrap();
        assert!(raise(dir.path(), &limit).is_err());
    }
}
