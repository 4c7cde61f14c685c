//! Homes on a file server: the bed's kernel serves NFS to itself.
#![allow(clippy::unwrap_used, clippy::panic)]

mod scratch;

use std::{
    fs, io,
    os::{
        fd::AsFd,
        unix::fs::{MetadataExt, chown},
    },
    path::Path,
    process::Command,
    time::Duration,
};

use qvd_core::{Bytes, UidRange};
use qvd_storage::{ErrorKind, Home, HomeKind, HomeOptions, Image, Quota, Store};
use qvd_testkit::{Bed, in_bed};
use scratch::{path, tiny};

/// Flags of an export: any port, at once, without a look at directories above,
/// known by a number. Source: Linux `include/uapi/linux/nfsd/export.h`.
const EXPORT: u32 = 0x2 | 0x10 | 0x400 | 0x2000;

fn run(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output().unwrap();
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn write(path: &str, text: &str) {
    fs::write(path, text).unwrap_or_else(|error| panic!("{path}: {error}"));
}

/// Tells the server of this machine what the programs of other machines would.
fn export(dir: &str) {
    const FOR_EVER: u32 = i32::MAX.unsigned_abs();
    write("/proc/net/rpc/auth.unix.ip/channel", &format!("nfsd 127.0.0.1 {FOR_EVER} me\n"));
    write("/proc/net/rpc/nfsd.export/channel", &format!("me {dir} {FOR_EVER} {EXPORT} 65534 65534 0\n"));
    write("/proc/net/rpc/nfsd.fh/channel", &format!("me 1 \\x00000000 {FOR_EVER} {dir}\n"));
}

/// Serves `dir` by NFS 4 and mounts it at `at`.
fn serve(dir: &str, at: &str) {
    for module in ["nfsd", "nfsv4"] {
        run("/run/busybox", &["modprobe", module]);
    }
    run("mount", &["-t", "nfsd", "nfsd", "/proc/fs/nfsd"]);
    export(dir);
    // Where the server notes who had something open, so that it need not wait for them.
    fs::create_dir_all("/var/lib/nfs/v4recovery").unwrap();
    write("/proc/fs/nfsd/versions", "-3 +4\n");
    write("/proc/fs/nfsd/nfsv4gracetime", "10\n");
    write("/proc/fs/nfsd/portlist", "tcp 2049\n");
    write("/proc/fs/nfsd/threads", "2\n");
    // Nobody has anything open from an earlier life of the server.
    write("/proc/fs/nfsd/v4_end_grace", "Y\n");
    fs::create_dir(at).unwrap();
    run("mount", &["-i", "-t", "nfs4", "-o", "addr=127.0.0.1,clientaddr=127.0.0.1,vers=4.2", "127.0.0.1:/", at]);
}

fn image(at: &Path) -> (Store, Image) {
    let store = Store::open(&at.join("store")).unwrap();
    let fill = &mut |tree: &Path| -> io::Result<()> {
        fs::create_dir_all(tree.join("etc/skel"))?;
        fs::write(tree.join("etc/skel/.profile"), "umask 077")
    };
    let image = store.import(tiny().config().clone(), fill).unwrap();
    (store, image)
}

#[test]
fn a_home_on_a_file_server_is_taken_as_it_is_and_not_shown_with_other_ids() {
    in_bed(&Bed::new().memory_mib(768).disk_mib(256).limit(Duration::from_secs(170)), || {
        run("mkfs.ext4", &["-q", "/dev/vda"]);
        fs::create_dir("/run/at").unwrap();
        run("mount", &["/dev/vda", "/run/at"]);
        fs::create_dir("/run/at/served").unwrap();
        serve("/run/at/served", "/run/nfs");
        let (_store, image) = image(Path::new("/run/at"));
        // As an administrator makes one for a user.
        let dir = Path::new("/run/nfs/one");
        fs::create_dir(dir).unwrap();
        chown(dir, Some(1000), Some(1000)).unwrap();
        fs::write(dir.join("file"), "there").unwrap();

        let home = Home::open(dir, &image).unwrap();
        let mount = home.mount(None).unwrap();
        assert_eq!(fs::metadata(path(&mount, "")).unwrap().uid(), 1000);
        assert_eq!(fs::read_to_string(path(&mount, "file")).unwrap(), "there");
        fs::write(path(&mount, "file"), "kept").unwrap();
        let flags = rustix::fs::fstatvfs(&mount).unwrap().f_flag;
        assert!(flags.contains(rustix::fs::StatVfsMountFlags::NOSUID | rustix::fs::StatVfsMountFlags::NODEV));
        drop(mount);
        assert_eq!(fs::read_to_string("/run/at/served/one/file").unwrap(), "kept");
        let userns = qvd_sys::userns::create(UidRange::of_slot(1).unwrap().base(), UidRange::LEN).unwrap();
        let error = home.mount(Some(userns.as_fd())).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        assert!(error.to_string().contains("id-mapped mounts") && error.to_string().contains("`loop`"), "{error}");
        assert_eq!(fs::read_dir("/run/at/served").unwrap().count(), 1, "nothing is left beside it");

        in_a_file_system_of_its_own(&image, userns.as_fd());
    });
}

/// A file on the server with a file system in it, as another host made it: it shows with
/// the ids of a desktop, which no directory of the server does, and holds what it may.
fn in_a_file_system_of_its_own(image: &Image, userns: std::os::fd::BorrowedFd<'_>) {
    let file = Path::new("/run/nfs/two");
    let size = Bytes::mib(16);
    fs::File::create(file).unwrap().set_len(size.get()).unwrap();
    run("mkfs.ext4", &["-q", "-F", "-E", "root_owner=1000:1000", file.to_str().unwrap()]);
    let options = HomeOptions { kind: HomeKind::Loop, quota: Quota { bytes: Some(size), inodes: None } };
    for written in ["first", "second"] {
        let home = Home::open_with(file, image, &options).unwrap();
        let mount = home.mount(Some(userns)).unwrap();
        assert_eq!(fs::metadata(path(&mount, "")).unwrap().uid(), UidRange::of_slot(1).unwrap().base() + 1000);
        if written == "second" {
            assert_eq!(fs::read_to_string(path(&mount, "file")).unwrap(), "first");
        }
        drop(mount);
        let mount = home.mount(None).unwrap();
        fs::write(path(&mount, "file"), written).unwrap();
        let error = fs::write(path(&mount, "much"), vec![1; 20 << 20]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull, "{error}");
        fs::remove_file(path(&mount, "much")).unwrap();
    }
}
