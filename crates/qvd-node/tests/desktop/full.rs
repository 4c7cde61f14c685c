//! The host's disk fills while a machine writes: it stands still, and goes on by itself.

use std::{
    path::PathBuf,
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use qvd_core::{DesktopId, DesktopState};
use qvd_node::{Host as _, Node, NodeConfig};

use super::{Host, machine::said};

/// What fills the rest of the file system, in bytes.
const FILLER: u64 = 40 << 20;

/// What the guest writes: more than there is room for beside that.
const WRITES: u64 = 16 << 20;

/// A file system of 64 MiB on a loop device, where homes' disks of a store are.
pub(crate) struct Small {
    at: PathBuf,
}

fn run(program: &str, arguments: &[&str]) {
    let done = Command::new(program).args(arguments).output().unwrap();
    assert!(done.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
}

/// Runs `test` where homes' disks are on a small file system, which nobody else sees.
pub(crate) fn with_small_homes(host: &Host, test: impl FnOnce(&Small) + Send) {
    let scratch = tempfile::tempdir().unwrap();
    let disk = scratch.path().join("disk");
    let disk = disk.to_str().unwrap();
    run("mkfs.ext4", &["-q", "-F", disk, "64M"]);
    let at = host.config.root.join("home-disks");
    std::fs::create_dir_all(&at).unwrap();
    qvd_sys::mount::in_private_namespace(|| {
        run("mount", &["-o", "loop", disk, at.to_str().unwrap()]);
        let filler = std::fs::File::create(at.join("filler")).unwrap();
        rustix::fs::fallocate(&filler, rustix::fs::FallocateFlags::empty(), 0, FILLER).unwrap();
        drop(filler);
        test(&Small { at });
    })
    .unwrap();
}

/// Runs `test` where what it does to the tags of the image is seen by nobody else, and
/// forgotten.
pub(crate) fn with_own_tags(host: &Host, test: impl FnOnce() + Send) {
    let scratch = tempfile::tempdir().unwrap();
    let [upper, work] = ["upper", "work"].map(|name| scratch.path().join(name));
    [&upper, &work].into_iter().for_each(|dir| std::fs::create_dir(dir).unwrap());
    let at = host.config.root.join("images/flavours").join(host.image.flavour.to_string());
    let at = at.to_str().unwrap();
    let options = format!("lowerdir={at},upperdir={},workdir={}", upper.display(), work.display());
    qvd_sys::mount::in_private_namespace(|| {
        run("mount", &["-t", "overlay", "-o", &options, "overlay", at]);
        test();
    })
    .unwrap();
}

impl Small {
    /// Takes it away, with all that is on it: a node moves what it removes to where it
    /// deletes it, on one file system.
    pub(crate) fn close(&self) {
        run("umount", &["--lazy", self.at.to_str().unwrap()]);
    }

    fn make_room(&self) {
        std::fs::remove_file(self.at.join("filler")).unwrap();
    }
}

fn wait_until_room(node: &Node, id: DesktopId, lacks: bool) {
    let end = Instant::now() + Duration::from_secs(120);
    while node.status(id).lacks_room != lacks {
        assert!(Instant::now() < end, "{lacks}: {:?}", node.status(id));
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Has a machine write more than there is room for, in its home, and its node die meanwhile.
/// Gives back the next node, once everything is written.
pub(crate) fn fill(small: &Small, node: Arc<Node>, config: &NodeConfig, id: DesktopId) -> Arc<Node> {
    let write = format!("{{ yes $(printf %0511d 7) | head -c {WRITES} >~/much && sync && echo all >/tmp/all; }}");
    said(&node, id, &format!("{write} >/dev/null 2>&1 </dev/null &"));
    wait_until_room(&node, id, true);
    // Whoever takes it over cannot ask its init, which is no reason to end it.
    drop(node);
    let node = Node::open(config.clone()).unwrap();
    let status = node.status(id);
    assert_eq!(status.state, DesktopState::Running);
    wait_until_room(&node, id, true);

    small.make_room();
    wait_until_room(&node, id, false);
    let wait = "until [ -e /tmp/all ]; do sleep 0.2; done; grep -cx 0*7 ~/much; rm ~/much; sync";
    let end = Instant::now() + Duration::from_secs(60);
    // The line to its init is made a moment later.
    while node.stats(id).is_err() {
        assert!(Instant::now() < end, "its init does not answer");
    }
    assert_eq!(said(&node, id, wait).trim(), (WRITES / 512).to_string());
    node
}
