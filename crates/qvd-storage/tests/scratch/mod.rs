//! A file system of a given kind for a test, and bases and looks at roots on it.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use std::{
    fs,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::{PermissionsExt, chown, symlink},
    },
    path::{Path, PathBuf},
    process::Command,
};

use qvd_core::UidRange;
use qvd_storage::{BaseTree, Quota, Recipe, RootId, RootOptions};
use qvd_sys::{
    loopdev::LoopDevice,
    mount::{FsContext, Restrictions, attach, in_private_namespace, open_dir_path},
};
use qvd_testkit::{Census, Scope};

/// Runs `test` in a directory on a new file system, on a thread in whose mount
/// namespace alone it is mounted, and demands that no loop device stays.
pub fn on(kind: &'static str, mkfs: &[&str], test: impl FnOnce(&Path) + Send) {
    let dir = tempfile::tempdir().unwrap();
    let census = Census::take(&Scope::marked([dir.path().file_name().unwrap().to_str().unwrap()]));
    let image = dir.path().join("disk");
    let file = fs::File::options().read(true).write(true).create_new(true).open(&image).unwrap();
    file.set_len(512 << 20).unwrap();
    let made = Command::new(format!("mkfs.{kind}")).args(mkfs).arg("-q").arg(&image).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let at = dir.path().join("mnt");
    fs::create_dir(&at).unwrap();
    in_private_namespace(|| {
        {
            let device = LoopDevice::attach(file.as_fd(), false).unwrap();
            let context = FsContext::open(kind).unwrap();
            context.set("source", device.path().to_str().unwrap()).unwrap();
            let mount = context.mount(Restrictions::default()).unwrap();
            attach(mount.as_fd(), open_dir_path(&at).unwrap().as_fd()).unwrap();
        }
        test(&at);
    })
    .unwrap();
    drop(file);
    // The file below the device is named in the census.
    census.assert_unchanged();
}

/// The least that a recipe says.
pub const TINY: &str = r#"
name = "tiny"
packages = []
base = { distribution = "debian", suite = "bookworm" }
user = { name = "user", uid = 1000, gid = 1000 }
"#;

pub fn tiny() -> Recipe {
    Recipe::parse(TINY).unwrap()
}

pub fn base(at: &Path) -> BaseTree {
    let dir = at.join("base");
    for name in ["etc", "usr/bin", "var/lib", "home"] {
        fs::create_dir_all(dir.join(name)).unwrap();
    }
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(dir.join("etc/f"), "from the image").unwrap();
    fs::write(dir.join("usr/bin/tool"), vec![7; 100_000]).unwrap();
    fs::write(dir.join("home/mine"), "").unwrap();
    chown(dir.join("home/mine"), Some(1000), Some(1000)).unwrap();
    symlink("f", dir.join("etc/link")).unwrap();
    BaseTree::new(format!("sha256:{}", "7".repeat(64)).parse().unwrap(), dir)
}

pub fn id(name: &str) -> RootId {
    name.parse().unwrap()
}

pub fn path(mount: &OwnedFd, name: &str) -> PathBuf {
    format!("/proc/self/fd/{}/{name}", mount.as_raw_fd()).into()
}

pub fn userns() -> OwnedFd {
    qvd_sys::userns::create(UidRange::FIRST, UidRange::LEN).unwrap()
}

pub fn volatile() -> RootOptions {
    RootOptions::default()
}

pub fn kept() -> RootOptions {
    RootOptions { policy: qvd_core::RootPolicy::Persistent, quota: Quota::default() }
}

pub fn read(mount: &OwnedFd, name: &str) -> String {
    fs::read_to_string(path(mount, name)).unwrap()
}

/// Writes zeros until the file system says no more, and returns how many
/// bytes it took and the error's number.
pub fn fill(file: &Path, most: u64) -> (u64, Option<i32>) {
    use std::io::Write;
    let mut out = fs::File::create(file).unwrap();
    let chunk = vec![1; 256 * 1024];
    let mut written = 0;
    while written < most {
        match out.write_all(&chunk).and_then(|()| out.sync_data()) {
            Ok(()) => written += chunk.len() as u64,
            Err(error) => return (written, error.raw_os_error()),
        }
    }
    (written, None)
}
