//! Changes to a tree that is being built. Every path is resolved inside the
//! tree: an absolute link in it never leads to the host's files.

use std::{
    collections::HashSet,
    ffi::CString,
    fs::File,
    io::{self, Read, Write},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::Path,
    time::{Duration, SystemTime},
};

use rustix::{
    fs::{
        AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Uid, fchmod, fchown, fstat, mkdirat, openat, openat2,
        unlinkat,
    },
    io::Errno,
};

use crate::{
    Error, UserConfig, fsio,
    glob::{self, Glob},
    recipe::FileSpec,
    trash::{self, Trash},
};

/// The date of everything that a build makes itself, in seconds since 1970:
/// the same recipe has to give the same tree. Source of the name:
/// <https://reproducible-builds.org/specs/source-date-epoch/>.
pub(crate) const SOURCE_DATE_EPOCH_S: u64 = 1_600_000_000;

/// Longest list of users or groups that is read, in bytes.
const LIST_MAX_BYTES: u64 = 4 << 20;

/// What a build leaves that has no place in an image: where packages came
/// from, what was logged on the way, and what must differ between desktops.
const LEFTOVERS: [&str; 24] = [
    "/etc/apt/sources.list",
    "/etc/apt/sources.list.d/*",
    "/etc/apt/apt.conf.d/*mmdebstrap*",
    "/etc/apt/auth.conf",
    "/etc/apt/auth.conf.d/*",
    "/etc/machine-id",
    "/etc/hostname",
    "/etc/resolv.conf",
    "/etc/passwd-",
    "/etc/group-",
    "/etc/shadow-",
    "/etc/gshadow-",
    "/etc/ssh/ssh_host_*",
    "/var/lib/dbus/machine-id",
    "/var/lib/systemd/random-seed",
    "/var/lib/apt/lists/*",
    "/var/cache/apt/*",
    "/var/cache/debconf/*-old",
    "/var/cache/ldconfig/*",
    "/var/lib/dpkg/*-old",
    "/tmp/*",
    "/var/tmp/*",
    "/run/*",
    "/dev/*",
];

/// Takes everything out that a build leaves.
pub(crate) fn clean(tree: &Path, trash: &Trash) -> Result<(), Error> {
    let edit = Error::io("clean", tree);
    for pattern in LEFTOVERS {
        let pattern = Glob::parse(pattern).map_err(io::Error::other).map_err(Error::io("clean", tree))?;
        remove(tree, &pattern, trash)?;
    }
    let work = || -> io::Result<()> {
        let root = fsio::open_dir(tree)?;
        fchmod(&root, Mode::from_raw_mode(0o755))?;
        empty_logs(&root)?;
        // A new machine id, host name and name server belong to each desktop.
        for (path, content) in [
            ("etc/machine-id", ""),
            ("etc/resolv.conf", ""),
            ("etc/hostname", "localhost\n"),
            ("etc/hosts", "127.0.0.1 localhost\n::1 localhost\n"),
        ] {
            write_file(&root, path, content.as_bytes(), 0o644, 0, 0)?;
        }
        Ok(())
    };
    work().map_err(edit)
}

/// Programs expect their log files and directories; what is in them is about
/// the machine that built.
fn empty_logs(root: &OwnedFd) -> io::Result<()> {
    let mut dirs = match fsio::open_dir_below(root, "var/log") {
        Ok(dir) => vec![dir],
        Err(error) if error.kind() == io::ErrorKind::NotFound => vec![],
        Err(error) => return Err(error),
    };
    while let Some(dir) = dirs.pop() {
        for (name, kind) in trash::list(&dir)? {
            match kind {
                FileType::Directory => dirs.push(fsio::open_dir_below(&dir, &name)?),
                FileType::RegularFile => unlinkat(&dir, &name, AtFlags::empty())?,
                _ => {}
            }
        }
    }
    Ok(())
}

/// Removes what matches and says how much that was. Links along the way are
/// not followed: a pattern names where things really are.
pub(crate) fn remove(tree: &Path, pattern: &Glob, trash: &Trash) -> Result<usize, Error> {
    let root = fsio::open_dir(tree).map_err(Error::io("open", tree))?;
    remove_parts(&root, pattern.parts(), tree, trash)
}

fn remove_parts(dir: &OwnedFd, parts: &[String], tree: &Path, trash: &Trash) -> Result<usize, Error> {
    let Some((part, rest)) = parts.split_first() else { return Ok(0) };
    let mut removed = 0;
    for (name, kind) in trash::list(dir).map_err(Error::io("read below", tree))? {
        if !glob::matches(part.as_bytes(), name.to_bytes()) {
            continue;
        }
        if rest.is_empty() {
            trash.discard_at(dir, &name).map_err(Error::io("remove below", tree))?;
            removed += 1;
        } else if kind == FileType::Directory {
            let below = fsio::open_dir_below(dir, &name).map_err(Error::io("open below", tree))?;
            removed += remove_parts(&below, rest, tree, trash)?;
        }
    }
    Ok(removed)
}

/// Adds the account that sessions run as, without a password, and the
/// directory its home is mounted on.
pub(crate) fn add_user(tree: &Path, user: &UserConfig) -> Result<(), Error> {
    let work = || -> io::Result<()> {
        let root = fsio::open_dir(tree)?;
        let (passwd, group) = (read(&root, "etc/passwd")?, read(&root, "etc/group")?);
        let field = |line: &str, n: usize| line.split(':').nth(n).unwrap_or_default().to_owned();
        let taken = |text: &str, id: u32| {
            text.lines().any(|line| field(line, 0) == user.name || field(line, 2) == id.to_string())
        };
        if taken(&passwd, user.uid) {
            return Err(io::Error::other(format!(
                "a package has the user {} or the uid {} already",
                user.name, user.uid
            )));
        }
        let shell = if statat_exists(&root, "usr/bin/bash") || statat_exists(&root, "bin/bash") {
            "/bin/bash"
        } else {
            "/bin/sh"
        };
        let (name, uid, gid, home) = (&user.name, user.uid, user.gid, user.home());
        append(&root, "etc/passwd", &format!("{name}:x:{uid}:{gid}::{home}:{shell}\n"))?;
        // `*` is no hash of anything: no password opens this account.
        let days = SOURCE_DATE_EPOCH_S / 86400;
        append(&root, "etc/shadow", &format!("{name}:*:{days}:0:99999:7:::\n"))?;
        if !taken(&group, gid) {
            append(&root, "etc/group", &format!("{name}:x:{gid}:\n"))?;
            append(&root, "etc/gshadow", &format!("{name}:!::\n"))?;
        }
        let homes = ensure_dir(&root, "home")?;
        match mkdirat(&homes, name.as_str(), Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
        let own = fsio::open_dir_below(&homes, name.as_str())?;
        fchown(&own, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
        Ok(fchmod(&own, Mode::RWXU)?)
    };
    work().map_err(Error::io("add the user to", tree))
}

/// Writes the files that a recipe brings; directories on the way are made.
pub(crate) fn add_files(tree: &Path, files: &[FileSpec]) -> Result<(), Error> {
    let root = fsio::open_dir(tree).map_err(Error::io("open", tree))?;
    for file in files {
        let path = file.path.trim_start_matches('/');
        write_file(&root, path, file.content.as_bytes(), file.mode, file.uid, file.gid)
            .map_err(Error::io("write", tree.join(path)))?;
    }
    Ok(())
}

/// Gives everything that was made since `started` the same old date. Caches
/// that remember the dates of directories (fontconfig's) stay valid, as they
/// are made after the first time this is done.
pub(crate) fn settle_times(tree: &Path, started: SystemTime) -> Result<(), Error> {
    let epoch = SystemTime::UNIX_EPOCH + Duration::from_secs(SOURCE_DATE_EPOCH_S);
    let time = rustix::fs::Timespec { tv_sec: 1_600_000_000, tv_nsec: 0 };
    let times = rustix::fs::Timestamps { last_access: time, last_modification: time };
    for entry in walkdir::WalkDir::new(tree).follow_links(false).same_file_system(true).contents_first(true) {
        let io = Error::io("set the times below", tree);
        let entry = match entry {
            Ok(entry) => entry,
            Err(error) => return Err(io(io::Error::from(error))),
        };
        let path = entry.path();
        let step = || -> io::Result<()> {
            let modified = std::fs::symlink_metadata(path)?.modified()?;
            // A file system's clock may lag behind by a tick.
            if modified + Duration::from_secs(1) >= started || modified == epoch {
                rustix::fs::utimensat(rustix::fs::CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)?;
            }
            Ok(())
        };
        step().map_err(io)?;
    }
    Ok(())
}

/// How many entries a tree has, its root included, and how many bytes its files:
/// one with several names counts once.
pub(crate) fn measure(tree: &Path) -> Result<(u64, u64), Error> {
    let (mut entries, mut bytes, mut seen) = (0, 0_u64, HashSet::new());
    for entry in walkdir::WalkDir::new(tree).follow_links(false).same_file_system(true) {
        let meta = entry.and_then(|entry| entry.metadata());
        let meta = meta.map_err(|error| Error::io("measure", tree)(io::Error::from(error)))?;
        entries += 1;
        if meta.is_file() && (meta.nlink() == 1 || seen.insert((meta.dev(), meta.ino()))) {
            bytes += meta.len();
        }
    }
    Ok((entries, bytes))
}

fn statat_exists(root: &OwnedFd, path: &str) -> bool {
    rustix::fs::statat(root, path, AtFlags::empty()).is_ok()
}

fn in_root(root: impl AsFd, path: &str, flags: OFlags) -> io::Result<OwnedFd> {
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    Ok(openat2(root, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve)?)
}

/// Opens a file that packages have made. It is looked at before it is opened: a
/// pipe would wait for another end, and a device would do whatever it does.
fn regular_in_root(root: &OwnedFd, path: &str, flags: OFlags) -> io::Result<File> {
    let found = in_root(root, path, OFlags::PATH)?;
    if FileType::from_raw_mode(fstat(&found)?.st_mode) != FileType::RegularFile {
        return Err(io::Error::other(format!("`/{path}` of the tree is no file")));
    }
    let by_number = format!("/proc/self/fd/{}", found.as_raw_fd());
    Ok(File::from(rustix::fs::open(by_number, flags | OFlags::CLOEXEC, Mode::empty())?))
}

fn read(root: &OwnedFd, path: &str) -> io::Result<String> {
    let mut text = String::new();
    match regular_in_root(root, path, OFlags::RDONLY) {
        Ok(file) => {
            if file.take(LIST_MAX_BYTES + 1).read_to_string(&mut text)? as u64 > LIST_MAX_BYTES {
                return Err(io::Error::other(format!("`/{path}` of the tree has more than {LIST_MAX_BYTES} bytes")));
            }
            Ok(text)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(text),
        Err(error) => Err(error),
    }
}

/// Appends to a file if it is there: not every distribution has every one.
fn append(root: &OwnedFd, path: &str, line: &str) -> io::Result<()> {
    match regular_in_root(root, path, OFlags::WRONLY | OFlags::APPEND) {
        Ok(mut file) => file.write_all(line.as_bytes()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

fn ensure_dir(root: &OwnedFd, path: &str) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY;
    match in_root(root, path, flags) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        done => return done,
    }
    let (parent, name) = match path.rsplit_once('/') {
        Some((parent, name)) => (ensure_dir(root, parent)?, name),
        None => (root.try_clone()?, path),
    };
    match mkdirat(&parent, name, Mode::from_raw_mode(0o755)) {
        Ok(()) => {
            let made = fsio::open_dir_below(&parent, name)?;
            fchmod(&made, Mode::from_raw_mode(0o755))?;
            Ok(made)
        }
        Err(Errno::EXIST) => in_root(root, path, flags),
        Err(error) => Err(error.into()),
    }
}

fn write_file(root: &OwnedFd, path: &str, content: &[u8], mode: u32, uid: u32, gid: u32) -> io::Result<()> {
    let (parent, name) = match path.rsplit_once('/') {
        Some((parent, name)) => (ensure_dir(root, parent)?, name),
        None => (root.try_clone()?, path),
    };
    let name = CString::new(name)?;
    match unlinkat(&parent, &name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(error) => return Err(error.into()),
    }
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut file = File::from(openat(&parent, &name, flags, Mode::RUSR | Mode::WUSR)?);
    file.write_all(content)?;
    fchown(&file, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
    Ok(fchmod(&file, Mode::from_raw_mode(mode))?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs;

    use super::*;

    fn setup() -> (tempfile::TempDir, Trash) {
        let dir = tempfile::tempdir().unwrap();
        for name in ["tree/usr/lib/x", "tree/usr/share/locale/de", "tree/usr/share/locale/fr", "tree/etc", "host"] {
            fs::create_dir_all(dir.path().join(name)).unwrap();
        }
        fs::write(dir.path().join("host/precious"), "x").unwrap();
        let trash = Trash::open(&dir.path().join("trash")).unwrap();
        (dir, trash)
    }

    #[test]
    fn patterns_remove_what_they_name_and_nothing_outside() {
        let (dir, trash) = setup();
        let tree = dir.path().join("tree");
        std::os::unix::fs::symlink(dir.path().join("host"), tree.join("out")).unwrap();
        let removed = |pattern: &str| remove(&tree, &Glob::parse(pattern).unwrap(), &trash).unwrap();
        assert_eq!(removed("/usr/share/locale/*"), 2);
        assert_eq!(removed("/usr/share/locale/*"), 0);
        assert_eq!(removed("/out/precious"), 0);
        assert_eq!(removed("/nowhere/*/x"), 0);
        assert_eq!(removed("/out"), 1);
        assert!(dir.path().join("host/precious").exists());
        assert!(tree.join("usr/lib/x").exists());
    }

    #[test]
    fn nothing_is_written_through_a_link_to_the_host() {
        let (dir, _trash) = setup();
        let tree = dir.path().join("tree");
        std::os::unix::fs::symlink(dir.path().join("host"), tree.join("etc/d")).unwrap();
        std::os::unix::fs::symlink(dir.path().join("host/precious"), tree.join("etc/f")).unwrap();
        let root = fsio::open_dir(&tree).unwrap();
        let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
        write_file(&root, "etc/f", b"new", 0o640, uid, gid).unwrap();
        // An absolute link leads to the same path inside, where nothing is yet.
        assert!(write_file(&root, "etc/d/new", b"new", 0o640, uid, gid).is_err());
        assert_eq!(fs::read_to_string(dir.path().join("host/precious")).unwrap(), "x");
        assert_eq!(fs::read_dir(dir.path().join("host")).unwrap().count(), 1);
        assert_eq!(fs::read_to_string(tree.join("etc/f")).unwrap(), "new");
    }

    #[test]
    fn a_user_is_added_once() {
        let (dir, _trash) = setup();
        let tree = dir.path().join("tree");
        fs::write(tree.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n").unwrap();
        fs::write(tree.join("etc/group"), "root:x:0:\n").unwrap();
        let (uid, gid) = (rustix::process::getuid().as_raw().max(1), rustix::process::getgid().as_raw().max(1));
        let user = UserConfig { name: "user".to_owned(), uid, gid };
        add_user(&tree, &user).unwrap();
        let passwd = fs::read_to_string(tree.join("etc/passwd")).unwrap();
        assert!(passwd.ends_with(&format!("user:x:{uid}:{gid}::/home/user:/bin/sh\n")), "{passwd}");
        let error = add_user(&tree, &user).unwrap_err();
        assert!(std::error::Error::source(&error).unwrap().to_string().contains("already"), "{error}");
    }

    /// A pipe would let the build wait for ever, a device would be opened.
    #[test]
    fn lists_that_are_no_files_are_refused() {
        use rustix::fs::{CWD, mknodat};
        let user = UserConfig { name: "user".to_owned(), uid: 1000, gid: 1000 };
        type Spoil = fn(&Path);
        let spoil: [(&str, Spoil); 5] = [
            ("etc/passwd", |at| mknodat(CWD, at, FileType::Fifo, Mode::RUSR, 0).unwrap()),
            ("etc/group", |at| mknodat(CWD, at, FileType::Fifo, Mode::RUSR, 0).unwrap()),
            ("etc/passwd", |at| fs::create_dir(at).unwrap()),
            ("etc/passwd", |at| fs::write(at, "x".repeat(5 << 20)).unwrap()),
            ("etc/passwd", |at| {
                mknodat(CWD, at.with_file_name("pipe"), FileType::Fifo, Mode::RUSR, 0).unwrap();
                std::os::unix::fs::symlink("/etc/pipe", at).unwrap();
            }),
        ];
        for (path, spoil) in spoil {
            let (dir, _trash) = setup();
            let tree = dir.path().join("tree");
            spoil(&tree.join(path));
            let error = add_user(&tree, &user).unwrap_err();
            let reason = std::error::Error::source(&error).unwrap().to_string();
            assert!(reason.contains(&format!("`/{path}` of the tree")), "{reason}");
        }
        // What leads out of the tree leads to nothing, and is not written.
        let (dir, _trash) = setup();
        let tree = dir.path().join("tree");
        std::os::unix::fs::symlink(dir.path().join("host/precious"), tree.join("etc/shadow")).unwrap();
        let root = fsio::open_dir(&tree).unwrap();
        append(&root, "etc/shadow", "user:*\n").unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("host/precious")).unwrap(), "x");
    }

    #[test]
    fn a_tree_is_measured() {
        let (dir, _trash) = setup();
        let tree = dir.path().join("tree");
        let (entries, _) = measure(&tree).unwrap();
        fs::write(tree.join("etc/f"), [7; 100]).unwrap();
        fs::hard_link(tree.join("etc/f"), tree.join("etc/g")).unwrap();
        std::os::unix::fs::symlink(dir.path().join("host"), tree.join("out")).unwrap();
        assert_eq!(measure(&tree).unwrap(), (entries + 3, 100));
    }
}
