//! Where libvirt finds no KVM. A libvirt that can open the device of a KVM that
//! does not work tries it out at every start, for half a minute.

use std::{
    env, fs,
    path::Path,
    process::{Command, Stdio},
};

/// A `/dev` without it, and the user that libvirt's QEMU driver wants to exist;
/// both for the processes below alone. `$1` is a scratch directory.
const HIDE: &str = "set -e
mkdir $1/dev; mount -t tmpfs -o mode=755 tmpfs $1/dev
for n in null zero full random urandom tty net/tun; do
  mkdir -p $1/dev/net; touch $1/dev/$n; mount --bind /dev/$n $1/dev/$n
done
mkdir $1/dev/pts $1/dev/shm; mount --rbind /dev/pts $1/dev/pts; mount --bind /dev/shm $1/dev/shm
ln -s pts/ptmx $1/dev/ptmx
for f in passwd group; do cp /etc/$f $1/$f; done
grep -q ^libvirt-qemu: $1/passwd || echo libvirt-qemu:x:64055:64055::/:/usr/sbin/nologin >>$1/passwd
grep -q ^libvirt-qemu: $1/group || echo libvirt-qemu:x:64055: >>$1/group
for f in passwd group; do mount --bind $1/$f /etc/$f; done
mount --move $1/dev /dev
shift; exec \"$@\"";

const INSIDE: &str = "QVD_TEST_HIDDEN";

/// Runs `test`, of this name in this program, in a process of its own that has no
/// KVM. It fails if that fails.
pub fn without_kvm(name: &str, test: impl FnOnce()) {
    if env::var_os(INSIDE).is_some() {
        assert!(!Path::new("/dev/kvm").exists());
        return test();
    }
    let scratch = tempfile::tempdir().unwrap();
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "--", "sh", "-c", HIDE, "sh"]).arg(scratch.path());
    command.arg(env::current_exe().unwrap()).args(["--exact", name, "--nocapture"]);
    let status = command.env(INSIDE, "1").stdin(Stdio::null()).status().unwrap();
    assert!(status.success(), "{status}");
    fs::remove_dir(scratch.path().join("dev")).unwrap();
}
