//! A guest with a shell: busybox in a tree that it maps, kept by our init.

use std::{
    fs::{self, File},
    io::Read as _,
    os::{
        fd::AsFd as _,
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use qvd_core::Bytes;
use qvd_guest::{
    Base, BootConfig, Carrier, Channel, ExecRequest, Exit, Identity, InitConfig, Link, LinkError, Reply, Request,
    Stats, VERSION, Writable,
};
use qvd_testkit::{bed_directory, privileged};
use qvd_virt::vm::{BaseDevice, BaseSpec, GuestKernel, StopLimits, StoppedBy, Vm, VmSpec};
use tempfile::TempDir;

use crate::bed::{Bed, SOON, with_bed};

/// What guests of a test have in common.
pub struct Guests<'a> {
    pub bed: &'a Bed,
    pub kernel: GuestKernel,
    work: TempDir,
    base: PathBuf,
}

/// A guest that runs, and the line to its init.
pub struct Guest {
    pub vm: Vm,
    carrier: Option<Carrier>,
    control: PathBuf,
}

/// Where guests with a shell can be made, which have 16 MiB to read.
pub fn with_guests(test: impl FnOnce(&Guests<'_>)) {
    with_guests_of(16, test);
}

/// Where guests with a shell can be made, which have `file_mib` to read.
pub fn with_guests_of(file_mib: u64, test: impl FnOnce(&Guests<'_>)) {
    use qvd_testkit::Need::{Env, Program};
    privileged(&[Env("QVD_INIT"), Program("mkfs.erofs"), Program("cpio")], || {
        with_bed(|bed| {
            let init = PathBuf::from(std::env::var_os("QVD_INIT").unwrap());
            let work = tempfile::tempdir().unwrap();
            let base = base(work.path(), file_mib);
            test(&Guests { bed, kernel: bed.kernel(&init), work, base });
        });
    });
}

/// A base of the static busybox that the test bed has, with a file to read.
fn base(work: &Path, file_mib: u64) -> PathBuf {
    let (tree, base) = (work.join("tree"), work.join("base"));
    for dir in ["bin", "dev", "etc", "proc", "root", "run", "sys", "tmp"] {
        fs::create_dir_all(tree.join(dir)).unwrap();
    }
    let initramfs = bed_directory().unwrap().join("initramfs");
    let unpack = format!("zcat '{}' | cpio --quiet -i --to-stdout bin/busybox", initramfs.display());
    let busybox = Command::new("sh").args(["-c", &unpack]).output().unwrap().stdout;
    assert!(busybox.len() > 100_000, "no busybox in the test bed");
    fs::write(tree.join("bin/busybox"), busybox).unwrap();
    fs::set_permissions(tree.join("bin/busybox"), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    for name in ["sh", "cat", "dd", "grep", "head", "ls", "mount", "rm", "sleep", "sync", "tr", "wc", "yes"] {
        std::os::unix::fs::symlink("busybox", tree.join("bin").join(name)).unwrap();
    }
    fs::write(tree.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\n").unwrap();
    let random = File::open("/dev/urandom").unwrap();
    std::io::copy(&mut random.take(file_mib << 20), &mut File::create(tree.join("root/file")).unwrap()).unwrap();
    let mut mkfs = Command::new("mkfs.erofs");
    mkfs.args(["--quiet", "-Enoinline_data"]).arg(&base).arg(&tree).stdout(Stdio::null());
    assert!(mkfs.status().unwrap().success());
    let file = File::options().write(true).open(&base).unwrap();
    file.set_len(file.metadata().unwrap().len().next_multiple_of(2 << 20)).unwrap();
    base
}

impl Guests<'_> {
    /// A file for a test's own use.
    pub fn path(&self, name: &str) -> PathBuf {
        self.work.path().join(name)
    }

    /// What all guests read from.
    pub fn base(&self) -> &Path {
        &self.base
    }

    pub fn spec(&self, number: u32) -> VmSpec {
        let mut spec = self.bed.spec(number, &self.kernel);
        let size = Bytes::new(fs::metadata(&self.base).unwrap().len());
        let file = File::open(&self.base).unwrap().into();
        spec.base = Some(BaseSpec { file, size, device: BaseDevice::Pmem });
        spec
    }

    /// Lets `vm` run and become a desktop.
    pub fn boot(&self, vm: Vm) -> Guest {
        self.boot_from(Base::Memory, vm)
    }

    /// The same for one whose base is not memory.
    pub fn boot_from(&self, base: Base, mut vm: Vm) -> Guest {
        vm.resume().unwrap_or_else(|error| panic!("{error:?}: {}", vm.words()));
        let control = self.path(&format!("control-{}", vm.id()));
        let mut guest = Guest { vm, carrier: None, control };
        let config = BootConfig {
            identity: Identity::fresh("guest", None).unwrap(),
            base,
            writable: Writable::Memory { bytes: 32 << 20 },
            home: None,
            init: InitConfig {
                version: VERSION,
                env: Default::default(),
                services: Vec::new(),
                session: None,
                name_servers: Vec::new(),
            },
        };
        let booted = Link::connect(guest.vm.link(), SOON).and_then(|mut link| {
            link.boot(&config, SOON)?;
            Ok(link)
        });
        let link = booted.unwrap_or_else(|error| {
            panic!("{error:?}: {:?} {} {}", guest.vm.state(), guest.vm.words(), guest.vm.console().unwrap_or_default())
        });
        guest.carry(link);
        guest
    }
}

impl Guest {
    fn carry(&mut self, link: Link) {
        let _absent = fs::remove_file(&self.control);
        self.carrier = Some(link.carry(UnixListener::bind(&self.control).unwrap().into()).unwrap());
    }

    /// The same after the process that drove it has died.
    pub fn adopted(self, guests: &Guests<'_>) -> Self {
        let mut guest = self.adopted_asleep(guests);
        guest.reconnect();
        guest
    }

    /// The same for one whose init does not answer now.
    pub fn adopted_asleep(mut self, guests: &Guests<'_>) -> Self {
        drop(self.carrier.take());
        let record = self.vm.detach().unwrap();
        let vm = guests.bed.qemu.adopt(&record).unwrap().unwrap();
        Self { vm, carrier: None, control: self.control }
    }

    /// Takes up the line to its init again.
    pub fn reconnect(&mut self) {
        let link = Link::reconnect(self.vm.link(), SOON).unwrap();
        self.carry(link);
    }

    fn ask(&self, request: &Request, fds: &[std::os::fd::BorrowedFd<'_>]) -> Channel {
        let mut channel = Channel::new(UnixStream::connect(&self.control).unwrap().into());
        channel.send(request, fds).unwrap();
        channel
    }

    pub fn stats(&self) -> Stats {
        match self.ask(&Request::Stats, &[]).recv(SOON).unwrap().0 {
            Reply::Stats(stats) => stats,
            other => panic!("{other:?}"),
        }
    }

    pub fn set_clock(&self, time_ns: u64) {
        let answer = self.ask(&Request::Time { time_ns }, &[]).recv::<Reply>(SOON).unwrap().0;
        assert!(matches!(answer, Reply::Done), "{answer:?}");
    }

    /// What a script says inside, and how it ends.
    pub fn try_sh(&self, script: &str) -> (Exit, String) {
        let argv = ["sh", "-c", script].map(str::to_owned).to_vec();
        let (input, _) = std::io::pipe().unwrap();
        let (mut output, theirs) = std::io::pipe().unwrap();
        let request = Request::Exec(ExecRequest { argv, env: Default::default(), root: true, tty: None });
        let mut channel = self.ask(&request, &[input.as_fd(), theirs.as_fd(), theirs.as_fd()]);
        drop(theirs);
        let (Reply::Started { .. }, _) = channel.recv(SOON).unwrap() else { panic!("not started") };
        let mut said = String::new();
        output.read_to_string(&mut said).unwrap();
        match channel.recv(SOON).unwrap().0 {
            Reply::Exited(exit) => (exit, said),
            other => panic!("{other:?}"),
        }
    }

    /// What a script says inside; it ends well.
    pub fn sh(&self, script: &str) -> String {
        let (exit, said) = self.try_sh(script);
        assert_eq!(exit, Exit::Code(0), "{script}: {said}");
        said.trim().to_owned()
    }

    /// Why the line to its init has ended, once it has.
    pub fn line_ends(&mut self) -> LinkError {
        let mut carrier = self.carrier.take().unwrap();
        let deadline = std::time::Instant::now() + SOON;
        while !carrier.is_over() {
            assert!(std::time::Instant::now() < deadline, "{}", self.vm.console().unwrap());
            std::thread::sleep(Duration::from_millis(50));
        }
        carrier.close().unwrap_err()
    }

    /// Asks its init to end it.
    pub fn stop(&mut self) -> StoppedBy {
        let asked = matches!(self.ask(&Request::Stop { grace_ms: 500 }, &[]).recv(SOON), Ok((Reply::Stopping, _)));
        let limits = StopLimits { guest: SOON, button: Duration::ZERO };
        self.vm.stop(limits, || asked).unwrap()
    }

    /// The machine, once nobody holds the line to its init.
    pub fn into_vm(mut self) -> Vm {
        drop(self.carrier.take());
        self.vm
    }

    pub fn close(mut self) {
        self.vm.close().unwrap();
        // It ended in the middle of a conversation.
        drop(self.carrier.take());
    }
}
