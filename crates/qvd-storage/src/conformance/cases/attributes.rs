//! Modes, owners, times and extended attributes.

use std::{
    fs::{self, FileTimes},
    io::Read,
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::Path,
    time::{Duration, SystemTime},
};

use qvd_core::{RootPolicy, UidRange};
use rustix::{
    fs::{Mode, OFlags, StatVfsMountFlags, XattrFlags, fstatvfs, lremovexattr, lsetxattr, open},
    io::Errno,
};

use super::{
    super::{
        base::{BaseForm, CAPABILITY, MODIFIED, TEXT, acl},
        bench::{Bench, id},
        manifest,
        report::{Checked, Failure, Seen, Step, equal, hold, refused},
        tree::Tree,
    },
    Listed,
};
use crate::{Capability, Deviation};

pub(super) const CASES: &[Listed] = &[
    ("extended-attributes", Some(Deviation::NoXattrs), xattrs),
    ("access-control-lists", Some(Deviation::NoAcls), acls),
    ("file-capabilities", Some(Deviation::NoFileCapabilities), capabilities),
    ("modes", None, modes),
    ("owners-at-the-ends", None, owners),
    ("owners-id-mapped", None, id_mapped),
    ("timestamps", None, timestamps),
    ("access-times", Some(Deviation::FrozenAccessTimes), access_times),
];

/// Sets an attribute where a back end may have none: what that says.
fn try_set(tree: &Tree, name: &str, key: &str, value: &[u8]) -> Result<Option<Seen>, Failure> {
    match lsetxattr(tree.path(name), key, value, XattrFlags::empty()) {
        Ok(()) => Ok(None),
        Err(Errno::OPNOTSUPP) => Ok(Some(Seen::Deviates(format!("an attribute `{key}` is not supported")))),
        Err(error) => Err(error).step(format!("`{name}` can be given an attribute `{key}`")),
    }
}

/// Whether this process may write `trusted` attributes, which root of a user
/// namespace may not.
fn trusted(path: &Path) -> bool {
    lsetxattr(path, "trusted.probe", b"", XattrFlags::empty()) != Err(Errno::PERM)
}

fn xattrs(bench: &Bench) -> Checked {
    bench.with_tree(|tree| {
        if let Some(deviates) = try_set(tree, "var/file", "user.new", b"1")? {
            return Ok(deviates);
        }
        equal("it is", tree.xattr("var/file", "user.new")?, b"1".to_vec())?;
        tree.expect("var/file", TEXT)?;
        equal("the base's is", tree.xattr("var/attributes", "user.base")?, b"1".to_vec())?;
        let set = |flags| lsetxattr(tree.path("var/attributes"), "user.base", b"new", flags);
        refused("to make one that the base has", set(XattrFlags::CREATE), &[Errno::EXIST])?;
        // Writing the file must not lose what the base gave it.
        tree.write("var/attributes", "changed")?;
        equal("the base's is, after a write,", tree.xattr("var/attributes", "user.base")?, b"1".to_vec())?;
        set(XattrFlags::REPLACE).step("the base's can be replaced")?;
        equal("it is", tree.xattr("var/attributes", "user.base")?, b"new".to_vec())?;
        lremovexattr(tree.path("var/attributes"), "user.base").step("it can be removed")?;
        let gone = manifest::xattr(&tree.path("var/attributes"), "user.base");
        refused("to read a removed one", gone, &[Errno::NODATA])?;
        tree.set_xattr("var/dir", "user.base", b"new")?;
        equal("a directory's is", tree.xattr("var/dir", "user.base")?, b"new".to_vec())?;
        tree.set_xattr("var/file", "user.large", &[7; 2000])?;
        equal("a large one is", tree.xattr("var/file", "user.large")?, vec![7; 2000])?;
        if trusted(&tree.path("var/file")) {
            equal("the base's trusted one is", tree.xattr("var/attributes", "trusted.base")?, b"2".to_vec())?;
            tree.set_xattr("var/attributes", "trusted.base", b"new")?;
            equal("it is", tree.xattr("var/attributes", "trusted.base")?, b"new".to_vec())?;
        }
        tree.rename("var/file", "var/renamed")?;
        equal("a renamed file's is", tree.xattr("var/renamed", "user.new")?, b"1".to_vec())?;
        Ok(Seen::Plain)
    })
}

fn acls(bench: &Bench) -> Checked {
    const ACCESS: &str = "system.posix_acl_access";
    bench.with_tree(|tree| {
        if bench.site.base.form == BaseForm::Image {
            tree.chmod("var/file", 0o600)?;
            tree.set_xattr("var/dir", "user.first", b"1")?;
        }
        if let Some(deviates) = try_set(tree, "var/file", ACCESS, &acl())? {
            return Ok(deviates);
        }
        equal("the list is", tree.xattr("var/file", ACCESS)?, acl())?;
        equal("the group's bits are the mask", tree.stat("var/file")?.mode() & 0o777, 0o664)?;
        equal("the base's list is", tree.xattr("var/acl", ACCESS)?, acl())?;
        tree.write("var/acl", "changed")?;
        equal("the base's list is, after a write,", tree.xattr("var/acl", ACCESS)?, acl())?;
        tree.chmod("var/acl", 0o600)?;
        equal("a change of mode changes the mask", tree.stat("var/acl")?.mode() & 0o777, 0o600)?;
        tree.set_xattr("var/dir", "system.posix_acl_default", &acl())?;
        let create = OFlags::WRONLY | OFlags::CREATE | OFlags::CLOEXEC;
        open(tree.path("var/dir/new"), create, Mode::from_raw_mode(0o666)).step("a file can be made")?;
        equal("a new file inherits the list", tree.stat("var/dir/new")?.mode() & 0o777, 0o664)?;
        hold("the new file has a list", tree.xattr("var/dir/new", ACCESS)?.len() > 4, "it is empty")?;
        Ok(Seen::Plain)
    })
}

fn capabilities(bench: &Bench) -> Checked {
    const NAME: &str = "security.capability";
    bench.with_tree(|tree| {
        if let Some(deviates) = try_set(tree, "var/file", NAME, &CAPABILITY)? {
            return Ok(deviates);
        }
        equal("the file's is", tree.xattr("var/file", NAME)?, CAPABILITY.to_vec())?;
        equal("the base's is", tree.xattr("var/capable", NAME)?, CAPABILITY.to_vec())?;
        // Other changes keep it; a write takes it away, as the kernel always does.
        tree.chmod("var/capable", 0o755)?;
        equal("it is, after a change of mode,", tree.xattr("var/capable", NAME)?, CAPABILITY.to_vec())?;
        tree.rename("var/capable", "var/renamed")?;
        equal("it is, after a new name,", tree.xattr("var/renamed", NAME)?, CAPABILITY.to_vec())?;
        tree.write("var/renamed", "changed")?;
        let after = manifest::xattr(&tree.path("var/renamed"), NAME);
        refused("to read it after a write", after, &[Errno::NODATA])?;
        Ok(Seen::Plain)
    })
}

fn modes(bench: &Bench) -> Checked {
    bench.with_tree(|tree| {
        let mode = |name: &str| tree.stat(name).map(|meta| meta.mode() & 0o7777);
        equal("the mode of the top is", mode("")?, 0o755)?;
        equal("the mode of the base's program is", mode("var/setuid")?, 0o4755)?;
        tree.set_xattr("var/setuid", "user.any", b"1")
            .or_else(|failure| if bench.deviates(Deviation::NoXattrs) { Ok(()) } else { Err(failure) })?;
        equal("it is, after another change,", mode("var/setuid")?, 0o4755)?;
        for bits in [0o1777, 0o2755, 0o000, 0o4711] {
            tree.chmod("var/dir", bits)?;
            equal("a directory's mode is", mode("var/dir")?, bits)?;
            tree.chmod("var/file", bits)?;
            equal("a file's mode is", mode("var/file")?, bits)?;
        }
        // A program that is given away must not keep its power.
        tree.chown("var/setuid", 5, 5)?;
        equal("a new owner takes the bits away", mode("var/setuid")?, 0o755)?;
        tree.chmod("var/dir", 0o2775)?;
        tree.chown("var/dir", 0, 9)?;
        tree.chmod("var/dir", 0o2775)?;
        tree.mkdir("var/dir/inner")?;
        equal("a directory inherits its group", tree.stat("var/dir/inner")?.gid(), 9)?;
        hold("and that it is inherited", mode("var/dir/inner")? & 0o2000 != 0, "it does not")?;
        Ok(Seen::Plain)
    })
}

fn owners(bench: &Bench) -> Checked {
    bench.with_tree(|tree| {
        for (name, expected) in [("var/low", 0), ("var/high", 65535), ("var/nobody", 65534)] {
            let meta = tree.stat(name)?;
            equal(format!("the owner of `{name}` is"), (meta.uid(), meta.gid()), (expected, expected))?;
            // What else is changed, the owner stays.
            tree.write(name, "changed")?;
            equal(format!("the owner of `{name}` is"), tree.stat(name)?.uid(), expected)?;
        }
        for uid in [0, 1, 65534, 65535] {
            tree.chown("var/file", uid, 65535 - uid)?;
            tree.chown("var/dir", uid, 65535 - uid)?;
            for name in ["var/file", "var/dir"] {
                let meta = tree.stat(name)?;
                equal(format!("the owner of `{name}` is"), (meta.uid(), meta.gid()), (uid, 65535 - uid))?;
            }
        }
        Ok(Seen::Plain)
    })
}

fn id_mapped(bench: &Bench) -> Checked {
    if let Some(not_offered) = bench.lacks(Capability::IdMapped) {
        return not_offered;
    }
    let range = UidRange::of_slot(UidRange::COUNT - 1).step("there is a last range of ids")?;
    let userns = qvd_sys::userns::create(range.base(), UidRange::LEN).step("a user namespace can be made")?;
    let mut root = bench.create(&id("mapped"), RootPolicy::Persistent)?;
    let mount = || root.mount(Some(userns.as_fd())).step("a root can be mounted id-mapped").map(Tree::new);
    let tree = mount()?;
    for (name, uid) in [("var/low", 0), ("var/high", 65535), ("var/nobody", 65534), ("", 0)] {
        equal(format!("the owner of `{name}` is"), tree.stat(name)?.uid(), range.base() + uid)?;
    }
    for uid in [0, 65535] {
        tree.chown("var/file", range.base() + uid, range.base() + uid)?;
        tree.chown("var/dir/a", range.base() + uid, range.base() + uid)?;
        equal("the owner given is", tree.stat("var/file")?.uid(), range.base() + uid)?;
    }
    let outside = std::os::unix::fs::lchown(tree.path("var/file"), Some(range.base() - 1), None);
    let outside = outside.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO));
    refused("an owner out of the range", outside, &[Errno::OVERFLOW, Errno::INVAL, Errno::PERM])?;
    drop(tree);
    // Nothing is shifted on disk: the next range sees it as its own.
    let plain = super::super::bench::mount(&*root)?;
    equal("without a map, the owner is", plain.stat("var/file")?.uid(), 65535)?;
    equal("without a map, the owner of what is the base's is", plain.stat("var/high")?.uid(), 65535)?;
    drop(plain);
    root.close().step("it can be closed")?;
    Ok(Seen::Plain)
}

fn timestamps(bench: &Bench) -> Checked {
    bench.with_tree(|tree| {
        let modified = |name: &str| tree.stat(name).map(|meta| (meta.mtime(), meta.mtime_nsec()));
        for name in ["var/file", "var/dir", "var/link", "etc/motd"] {
            equal(format!("`{name}` was modified at"), modified(name)?, MODIFIED)?;
        }
        let changed = tree.stat("var/file")?.ctime_nsec();
        tree.chmod("var/file", 0o600)?;
        equal("a change of mode leaves the time of modification", modified("var/file")?, MODIFIED)?;
        hold("and moves that of change", tree.stat("var/file")?.ctime_nsec() != changed, "it does not")?;
        tree.write("var/file", "now")?;
        hold("a write moves the time of modification", modified("var/file")? != MODIFIED, "it does not")?;
        // Before 1970, to the nanosecond, and after 2038.
        let epoch = SystemTime::UNIX_EPOCH;
        for time in [epoch - Duration::from_secs(1000), epoch + Duration::new(4_000_000_000, 999_999_999)] {
            for name in ["var/other", "var/dir"] {
                let file = tree.open(name, OFlags::RDONLY)?;
                let times = FileTimes::new().set_modified(time).set_accessed(time);
                file.set_times(times).step(format!("the times of `{name}` can be set"))?;
                let seen = fs::metadata(tree.path(name)).and_then(|meta| meta.modified()).step("it has times")?;
                equal(format!("`{name}` was modified at"), seen, time)?;
            }
        }
        tree.write("var/dir/new", "x")?;
        let now = fs::metadata(tree.path("var/dir")).and_then(|meta| meta.modified()).step("it has times")?;
        hold(
            "a new name moves a directory's time",
            now < epoch + Duration::from_secs(4_000_000_000),
            format!("{now:?}"),
        )?;
        Ok(Seen::Plain)
    })
}

fn access_times(bench: &Bench) -> Checked {
    bench.with_tree(|tree| {
        let flags = fstatvfs(tree.fd()).step("the root has flags")?.f_flag;
        if flags.contains(StatVfsMountFlags::NOATIME) {
            return Ok(Seen::NotOffered("a file system below that is mounted with noatime".to_owned()));
        }
        // It was accessed before it was modified, so that `relatime` moves it.
        let accessed = || tree.stat("var/large").map(|meta| (meta.atime(), meta.atime_nsec()));
        let before = accessed()?;
        let mut file = tree.open("var/large", OFlags::RDONLY)?;
        file.read_exact(&mut [0; 4096]).step("it can be read")?;
        drop(file);
        if accessed()? == before {
            return Ok(Seen::Deviates("it is the same after a read".to_owned()));
        }
        hold("it moves forward", accessed()? > before, format!("{:?} after {before:?}", accessed()?))?;
        Ok(Seen::Plain)
    })
}
