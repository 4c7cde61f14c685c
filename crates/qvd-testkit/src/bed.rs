//! A small virtual machine in which tests find what the host's kernel lacks:
//! device mapper, cgroups of version 2 alone, quotas.
//!
//! The guest sees the host's files, reads the same programs and libraries, and
//! keeps what it writes in its memory. `scripts/bed` makes kernel and initramfs.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    process::{Pid, PidfdFlags, pidfd_open},
};

use crate::need::{Need, privileged};

/// Set in the guest, where a test runs instead of booting another.
const INSIDE: &str = "QVD_IN_BED";

/// How much of the console and of the test's output a failure shows.
const SHOWN_LINES: usize = 60;

/// A machine that is to run one program and end.
#[derive(Debug, Clone)]
pub struct Bed {
    memory_mib: u32,
    disks_mib: Vec<u64>,
    limit: Duration,
    environment: Vec<(String, String)>,
}

/// What a program did in the bed.
#[derive(Debug)]
pub struct Ran {
    /// Its exit status, as a shell says it.
    pub status: i32,
    /// What it wrote.
    pub stdout: String,
    /// What it complained about.
    pub stderr: String,
    /// What the kernel wrote meanwhile.
    pub console: String,
}

impl Default for Bed {
    fn default() -> Self {
        Self::new()
    }
}

impl Bed {
    /// 512 MiB of memory, no disk and a deadline of a minute and a half.
    #[must_use]
    pub const fn new() -> Self {
        Self { memory_mib: 512, disks_mib: Vec::new(), limit: Duration::from_secs(90), environment: Vec::new() }
    }

    /// With this much memory; what the guest writes outside its disks is in it.
    #[must_use]
    pub const fn memory_mib(mut self, memory_mib: u32) -> Self {
        self.memory_mib = memory_mib;
        self
    }

    /// With one more empty disk: `/dev/vda`, then `/dev/vdb` and so on.
    #[must_use]
    pub fn disk_mib(mut self, size_mib: u64) -> Self {
        self.disks_mib.push(size_mib);
        self
    }

    /// With another deadline for boot and program together.
    #[must_use]
    pub const fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// With a variable in the program's environment.
    #[must_use]
    pub fn env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// Boots, runs `argv` as root and waits until the machine has ended.
    ///
    /// # Errors
    /// The machine cannot be started, or did not finish before the deadline;
    /// then the error shows the end of its console.
    pub fn run(&self, argv: &[impl AsRef<str>]) -> io::Result<Ran> {
        let bed = directory().ok_or_else(|| io::Error::other("there is no test bed; `make bed` makes it"))?;
        let dir = tempfile::Builder::new().prefix("qvd-bed-").tempdir()?;
        let work = dir.path().join("work");
        fs::create_dir(&work)?;
        let exports = self.environment.iter().map(|(name, value)| format!("export {name}={}\n", quoted(value)));
        let words: Vec<_> = argv.iter().map(|word| quoted(word.as_ref())).collect();
        fs::write(work.join("script"), format!("{}exec {}\n", exports.collect::<String>(), words.join(" ")))?;

        let console = dir.path().join("console");
        let mut guest = Guest(self.command(&bed, dir.path(), &work, &console)?.spawn()?);
        let ended = guest.wait(self.limit)?;
        let read = |name: &str| fs::read(work.join(name)).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        let console = fs::read(&console).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
        let (stdout, stderr) = (read("stdout").unwrap_or_default(), read("stderr").unwrap_or_default());
        let status = read("status").ok().and_then(|text| text.trim().parse().ok());
        let (Some(_), Some(status)) = (ended, status) else {
            let how = match ended {
                Some(status) => format!("ended before its program did ({status})"),
                None => format!("was not done after {} s", self.limit.as_secs()),
            };
            let (console, stderr) = (last_lines(&console), last_lines(&stderr));
            return Err(io::Error::other(format!(
                "the test bed {how}\n-- its console:\n{console}\n-- its program:\n{stderr}"
            )));
        };
        Ok(Ran { status, stdout, stderr, console })
    }

    fn command(&self, bed: &Path, dir: &Path, work: &Path, console: &Path) -> io::Result<Command> {
        // A killed test takes its machine along.
        let mut qemu = Command::new("setpriv");
        qemu.args(["--pdeathsig", "KILL", "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none"]);
        // The emulated processor, because some hosts have a /dev/kvm that hangs.
        qemu.args(["-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-no-reboot"]);
        qemu.arg("-m").arg(self.memory_mib.to_string());
        qemu.arg("-kernel").arg(bed.join("vmlinuz")).arg("-initrd").arg(bed.join("initramfs"));
        let bed = bed.to_str().ok_or(io::ErrorKind::InvalidInput)?;
        // A loaded host is too slow for the kernel's look whether the timer ticks.
        let calm = "quiet panic=-1 no_timer_check mitigations=off random.trust_cpu=on";
        qemu.arg("-append").arg(format!("console=ttyS0 {calm} bed={bed}"));
        qemu.arg("-serial").arg(format!("file:{}", console.display()));
        qemu.args(["-device", "virtio-rng-pci"]);
        for (tag, path, more) in [("host", Path::new("/"), ",readonly=on,multidevs=remap"), ("work", work, "")] {
            let path = path.display();
            qemu.arg("-virtfs").arg(format!("local,path={path},mount_tag={tag},security_model=none{more}"));
        }
        for (number, size_mib) in self.disks_mib.iter().enumerate() {
            let file = dir.join(format!("disk{number}"));
            fs::File::create(&file)?.set_len(size_mib << 20)?;
            let file = file.display();
            qemu.arg("-drive").arg(format!("if=none,id=d{number},file={file},format=raw,cache=unsafe,discard=unmap"));
            qemu.arg("-device").arg(format!("virtio-blk-pci,drive=d{number},serial=bed{number}"));
        }
        qemu.stdin(Stdio::null()).stdout(Stdio::null());
        Ok(qemu)
    }
}

/// Runs `test` in a machine of its own, where it is root: the test program
/// starts itself there, with the calling test alone.
///
/// # Panics
/// As [`privileged`](crate::privileged); or the machine failed, or the test in it.
pub fn in_bed(bed: &Bed, test: impl FnOnce()) {
    if env::var_os(INSIDE).is_some() {
        test();
        return;
    }
    privileged(&[Need::Root, Need::Bed], || {
        let (program, name) = this_test();
        let bed = bed.clone().env(INSIDE, "1").env("QVD_TEST_PRIVILEGED", "1").env("RUST_BACKTRACE", "1");
        let ran =
            bed.run(&[program.as_str(), "--exact", &name, "--include-ignored", "--nocapture", "--test-threads=1"]);
        let ran = ran.unwrap_or_else(|error| panic!("{error}"));
        // A name that selects nothing would pass as well.
        assert!(
            ran.status == 0 && ran.stdout.contains("1 passed"),
            "{name} ended with {} in the bed\n-- it wrote:\n{}\n{}\n-- the console:\n{}",
            ran.status,
            last_lines(&ran.stdout),
            last_lines(&ran.stderr),
            last_lines(&ran.console),
        );
    });
}

/// Where kernel and initramfs are: `QVD_TEST_BED`, or `bed` in the directory
/// that this program was built in.
pub(crate) fn directory() -> Option<PathBuf> {
    let named = env::var_os("QVD_TEST_BED").map(PathBuf::from);
    let built = env::current_exe().ok()?;
    named.into_iter().chain(built.ancestors().map(|dir| dir.join("bed"))).find(|dir| dir.join("vmlinuz").is_file())
}

/// Where the bed's kernel (`vmlinuz`) and its modules (`lib/modules`) are, for
/// tests that boot a machine of their own.
#[must_use]
pub fn bed_directory() -> Option<PathBuf> {
    directory()
}

/// A disk with a Debian that boots by a BIOS and by UEFI and says on its serial port
/// what it finds: `QVD_TEST_DISK`, or `disk/debian` in the directory that this program
/// was built in. It is never written to; tests put an overlay on it.
#[must_use]
pub fn debian_disk() -> Option<PathBuf> {
    let named = env::var_os("QVD_TEST_DISK").map(PathBuf::from);
    let built = env::current_exe().ok()?;
    named.into_iter().chain(built.ancestors().map(|dir| dir.join("disk/debian"))).find(|disk| disk.is_file())
}

/// This program, and the test that the calling thread runs.
fn this_test() -> (String, String) {
    let program = env::current_exe().map(|path| path.display().to_string()).unwrap_or_default();
    // The main thread runs a test that is alone; its name is then an argument.
    let name = thread::current().name().filter(|name| *name != "main").map(str::to_owned);
    let argument = || env::args().skip(1).find(|arg| !arg.starts_with('-'));
    (program, name.or_else(argument).unwrap_or_default())
}

/// A running machine, ended with its owner.
struct Guest(Child);

impl Guest {
    /// Waits until it has ended; `None` after `limit`.
    fn wait(&mut self, limit: Duration) -> io::Result<Option<ExitStatus>> {
        let pid = i32::try_from(self.0.id()).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidInput)?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
        let deadline = std::time::Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(std::time::Instant::now());
            let left = Timespec::try_from(left).map_err(|_| io::ErrorKind::InvalidInput)?;
            match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&left)) {
                Ok(0) => return Ok(None),
                Ok(_) => return self.0.wait().map(Some),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Fails when it has ended, which is what is wanted.
        let _ended = self.0.kill();
        let _reaped = self.0.wait();
    }
}

/// A word as the shell takes it literally.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

fn last_lines(text: &str) -> String {
    let lines: Vec<_> = text.lines().collect();
    lines.get(lines.len().saturating_sub(SHOWN_LINES)..).unwrap_or_default().join("\n")
}
