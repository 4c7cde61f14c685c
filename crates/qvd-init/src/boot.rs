//! The first process of a virtual machine: loads modules, asks the host what
//! to become, puts the root together, and is the init of that from then on.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    os::{
        fd::OwnedFd,
        unix::{
            fs::{MetadataExt as _, PermissionsExt as _, lchown},
            net::UnixListener,
        },
    },
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use nix::{
    mount::{MsFlags, mount},
    sys::{
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
    },
    unistd::Pid,
};
use qvd_guest::{
    BASE_SERIAL, Base, BootConfig, Booted, GuestLink, HOME_SERIAL, Identity, Network, ROOT_SERIAL, SessionConfig,
    Writable, carry_in_guest,
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{Mode, OFlags, inotify},
    system::RebootCommand,
};

use crate::desktop;

/// First argument when the kernel starts this program.
pub(crate) const BOOT: &str = "boot";
/// First argument of the process that carries conversations.
pub(crate) const CARRY: &str = "carry";

/// First argument of the process that gives the network interface its address.
pub(crate) const NETWORK: &str = "network";
/// Makes every host key that is missing: ssh-keygen(1).
pub(crate) const MAKE_HOST_KEYS: [&str; 2] = ["/usr/bin/ssh-keygen", "-A"];

/// Name of the port that leads to the host.
const PORT: &str = "org.qvd.link";
/// How long a device may take to appear after its driver was loaded.
const DEVICE_WITHIN: Duration = Duration::from_secs(20);
/// How file systems on the desktop's disks are mounted. The inode tables of a new
/// one read as zeros: writing that down would make the host's file grow. What is
/// deleted is given back to the host.
///
/// Source: Linux `Documentation/admin-guide/ext4.rst`.
const DISK_OPTIONS: &str = "noinit_itable,discard";
/// What no file system of the desktop's own lets in.
const SEALED: MsFlags = MsFlags::MS_NODEV.union(MsFlags::MS_NOSUID);
/// What every new file system has; nobody's home does.
const LOST: &str = "lost+found";
/// Directories nested deeper than this in a skeleton are not one's idea of a home.
const SKEL_DEPTH_MAX: usize = 32;
/// The file is compressed, and the kernel knows how.
///
/// Source: Linux `include/uapi/linux/module.h`, `MODULE_INIT_COMPRESSED_FILE`.
const COMPRESSED: i32 = 4;

fn failed(what: impl std::fmt::Display) -> impl FnOnce(io::Error) -> String {
    move |error| format!("cannot {what}: {error}")
}

/// Runs until the machine is to be switched off, and switches it off.
pub(crate) fn run() -> ExitCode {
    let begin = Instant::now();
    let cloned = whole_life(begin).unwrap_or_else(|error| {
        // The console, as far as there is one.
        let _written = writeln!(io::stderr(), "qvd-init: {error}");
        false
    });
    // What is left of the desktop would keep its disks busy.
    let _killed = nix::sys::signal::kill(Pid::from_raw(-1), Signal::SIGKILL);
    rustix::fs::sync();
    if cloned {
        // Switching off asks the base's device to flush, and QEMU keeps no state of
        // that (7.2 `hw/virtio/virtio-pmem.c` has none to migrate): a clone would wait
        // for ever. A restart asks nobody, and the host has restarts end the machine.
        // Source: Linux `Documentation/admin-guide/sysrq.rst`.
        if let Err(error) = fs::write("/proc/sysrq-trigger", "b") {
            let _written = writeln!(io::stderr(), "qvd-init: cannot end the clone at once: {error}");
        }
    }
    let off = rustix::system::reboot(RebootCommand::PowerOff);
    // Only a process with less rights than the first one comes here.
    let _written = writeln!(io::stderr(), "qvd-init: cannot switch off: {off:?}");
    ExitCode::FAILURE
}

fn whole_life(begin: Instant) -> Result<bool, String> {
    for (kind, target) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        place(kind, target, kind, MsFlags::empty(), "")?;
    }
    load_modules()?;
    let port = find_port()?;
    let mut link = GuestLink::new(port);
    let config = link.configuration().map_err(|e| e.to_string())?;
    match become_desktop(&config) {
        Ok((control, booted)) => {
            link.booted(&booted).map_err(|e| e.to_string())?;
            let port = link.into_port().map_err(failed("keep the port"))?;
            crate::init::run_in_machine(begin, control, config.init, port)
        }
        Err(error) => {
            link.failed(&error).map_err(|e| e.to_string())?;
            Err(error)
        }
    }
}

fn place(source: &str, target: &str, kind: &str, flags: MsFlags, options: &str) -> Result<(), String> {
    let options = (!options.is_empty()).then_some(options);
    mount(Some(source), target, Some(kind), flags, options)
        .map_err(|error| format!("cannot mount {kind} at {target}: {error}"))
}

/// Loads what the host put into the initramfs, in the order of the names.
fn load_modules() -> Result<(), String> {
    let entries = fs::read_dir("/modules").map_err(failed("list the modules"))?;
    let mut paths: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.sort();
    for path in paths {
        let file = File::open(&path).map_err(failed(format_args!("open {}", path.display())))?;
        let flags = if path.extension().is_some_and(|end| end == "ko") { 0 } else { COMPRESSED };
        match rustix::system::finit_module(&file, c"", flags) {
            // Built in, or loaded by another's wish.
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            // A driver without its device does no harm; what is needed is
            // missed below, by its name.
            Err(error) => {
                let _written = writeln!(io::stderr(), "qvd-init: cannot load {}: {error}", path.display());
            }
        }
    }
    Ok(())
}

/// Looks with `find` whenever something appears in `/dev`, until it finds or
/// the time is up.
fn wait_for_device<T>(what: &str, find: impl Fn() -> Option<T>) -> Result<T, String> {
    let watch = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)
        .map_err(|e| format!("cannot watch /dev: {e}"))?;
    inotify::add_watch(&watch, "/dev", inotify::WatchFlags::CREATE | inotify::WatchFlags::ATTRIB)
        .map_err(|e| format!("cannot watch /dev: {e}"))?;
    let deadline = Instant::now() + DEVICE_WITHIN;
    loop {
        if let Some(found) = find() {
            return Ok(found);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(format!("there is no {what}, {DEVICE_WITHIN:?} after its driver was loaded"));
        }
        // The name of a port is there a moment after its node, without an event.
        let left = Timespec::try_from(left.min(Duration::from_millis(50))).map_err(|e| e.to_string())?;
        let _ready = poll(&mut [PollFd::new(&watch, PollFlags::IN)], Some(&left));
        let _read = rustix::io::read(&watch, &mut [0_u8; 4096]);
    }
}

fn find_port() -> Result<File, String> {
    wait_for_device("port to the host", || {
        let ports = fs::read_dir("/sys/class/virtio-ports").ok()?;
        let mut names = ports.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let name = names.find(|name| {
            let path = format!("/sys/class/virtio-ports/{name}/name");
            fs::read_to_string(path).is_ok_and(|text| text.trim() == PORT)
        })?;
        File::options().read(true).write(true).open(format!("/dev/{name}")).ok()
    })
}

/// The node of the disk with this serial number.
fn find_disk(serial: &str) -> Result<String, String> {
    wait_for_device(&format!("disk {serial}"), || {
        let disks = fs::read_dir("/sys/block").ok()?;
        let mut names = disks.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let name = names.find(|name| {
            fs::read_to_string(format!("/sys/block/{name}/serial")).is_ok_and(|text| text.trim() == serial)
        })?;
        let node = format!("/dev/{name}");
        Path::new(&node).exists().then_some(node)
    })
}

fn make(path: &str) -> Result<(), String> {
    match fs::create_dir_all(path) {
        Err(error) => Err(failed(format_args!("make directory {path}"))(error)),
        Ok(()) => Ok(()),
    }
}

/// Puts the root together and makes it the root.
fn become_desktop(config: &BootConfig) -> Result<(OwnedFd, Booted), String> {
    match config.base {
        Base::Memory => {
            let node =
                wait_for_device("persistent memory", || Path::new("/dev/pmem0").exists().then_some("/dev/pmem0"))?;
            place(node, "/base", "erofs", MsFlags::MS_RDONLY, "dax=always")?;
        }
        Base::Disk => place(&find_disk(BASE_SERIAL)?, "/base", "erofs", MsFlags::MS_RDONLY, "")?,
    }
    match config.writable {
        Writable::Memory { bytes } => {
            place("writable", "/disk", "tmpfs", MsFlags::empty(), &format!("size={bytes},mode=755"))?;
        }
        Writable::Disk => place(&find_disk(ROOT_SERIAL)?, "/disk", "ext4", MsFlags::empty(), DISK_OPTIONS)?,
    }
    // While it can be seen: the root that is entered below hides it.
    let direct = config.base == Base::Memory && is_direct("/proc/mounts");
    if config.base == Base::Memory && !direct {
        return Err("the kernel does not map the base as it is: erofs or the memory's driver lacks DAX".to_owned());
    }
    make("/disk/upper")?;
    make("/disk/work")?;
    place("root", "/root", "overlay", MsFlags::empty(), "lowerdir=/base,upperdir=/disk/upper,workdir=/disk/work")?;
    if let Some(home) = &config.home {
        match &config.init.session {
            Some(session) if session.home == *home => mount_home("/root", session)?,
            _ => {
                let target = format!("/root{home}");
                make(&target)?;
                place(&find_disk(HOME_SERIAL)?, &target, "ext4", SEALED, DISK_OPTIONS)?;
            }
        }
    }
    for name in ["dev", "proc", "sys"] {
        make(&format!("/root/{name}"))?;
        let (from, to) = (format!("/{name}"), format!("/root/{name}"));
        mount(Some(from.as_str()), to.as_str(), None::<&str>, MsFlags::MS_MOVE, None::<&str>)
            .map_err(|error| format!("cannot move {from}: {error}"))?;
    }
    enter("/root").map_err(failed("enter the root"))?;
    // Terminals are devices: what forbids those would forbid to open them.
    let terminals = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    for (target, kind, flags, options) in [
        ("/dev/pts", "devpts", terminals, "mode=620,ptmxmode=666,gid=5"),
        ("/dev/shm", "tmpfs", SEALED, "mode=1777"),
        ("/tmp", "tmpfs", SEALED, "mode=1777"),
        ("/run", "tmpfs", SEALED, "mode=755"),
    ] {
        make(target)?;
        place(kind, target, kind, flags, options)?;
    }
    if let Err(error) = qvd_sys::guest::bring_up("lo") {
        let _written = writeln!(io::stderr(), "qvd-init: cannot bring the loopback interface up: {error}");
    }
    identify(&config.identity)?;
    if let Some(network) = &config.identity.network {
        take_place(network)?;
    }
    desktop::prepare_root().map_err(|e| e.to_string())?;
    let control = Path::new(desktop::ROOT_DIR).join("control");
    // Whoever may use it is root inside already, and may do all that it does.
    rustix::process::umask(Mode::from_raw_mode(0o077));
    let listener = UnixListener::bind(&control).map_err(failed("listen for the host"));
    rustix::process::umask(Mode::from_raw_mode(0o022));
    Ok((listener?.into(), Booted { uptime_ms: uptime_ms(), direct }))
}

/// Mounts the home of a session's user below `root`, and fills it if it is new.
///
/// Its name comes from the image. Where it is mounted after the session's
/// programs have run, they have ended, and only what they were given could have
/// put a link there: that was the template's, which is nobody's.
pub(crate) fn mount_home(root: &str, session: &SessionConfig) -> Result<(), String> {
    let home = &session.home;
    let target = format!("{root}{home}");
    make(&target)?;
    place(&find_disk(HOME_SERIAL)?, &target, "ext4", SEALED, DISK_OPTIONS)?;
    let skeleton = format!("{root}/etc/skel");
    fill_home(Path::new(&skeleton), Path::new(&target), (session.uid, session.gid))
        .map_err(failed(format_args!("fill the new home {home}")))
}

/// Makes a new disk its user's home, from the image's skeleton. One that was
/// interrupted is new again: it belongs to its user, and loses what every new
/// file system has, at the very end.
fn fill_home(skeleton: &Path, home: &Path, owner: (u32, u32)) -> io::Result<()> {
    let about = fs::symlink_metadata(home)?;
    // What is not root's any more may have been anybody's since.
    if about.uid() != 0 || !home.join(LOST).is_dir() {
        return Ok(());
    }
    if skeleton.is_dir() {
        copy_skeleton(skeleton, home, owner, 0)?;
    }
    fs::set_permissions(home, fs::Permissions::from_mode(0o700))?;
    fs::remove_dir(home.join(LOST))?;
    rustix::fs::sync();
    lchown(home, Some(owner.0), Some(owner.1))
}

/// Copies directories, files and links; links as such, and nothing else at all.
fn copy_skeleton(from: &Path, to: &Path, owner: (u32, u32), depth: usize) -> io::Result<()> {
    if depth > SKEL_DEPTH_MAX {
        return Err(io::Error::other("/etc/skel is nested too deeply"));
    }
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        let about = fs::symlink_metadata(&source)?;
        let kind = about.file_type();
        if kind.is_dir() {
            fs::create_dir_all(&target)?;
            copy_skeleton(&source, &target, owner, depth + 1)?;
        } else if kind.is_file() {
            fs::copy(&source, &target)?;
        } else if kind.is_symlink() {
            match std::os::unix::fs::symlink(fs::read_link(&source)?, &target) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => {}
            }
        } else {
            continue;
        }
        lchown(&target, Some(owner.0), Some(owner.1))?;
        if !kind.is_symlink() {
            fs::set_permissions(&target, fs::Permissions::from_mode(about.mode() & 0o777))?;
        }
    }
    Ok(())
}

/// Makes `root` the root of everything. What the initramfs held was memory.
fn enter(root: &str) -> io::Result<()> {
    for path in ["/init", "/modules"] {
        let removed = if path == "/init" { fs::remove_file(path) } else { fs::remove_dir_all(path) };
        removed?;
    }
    rustix::process::chdir(root)?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)?;
    rustix::process::chroot(".")?;
    Ok(rustix::process::chdir("/")?)
}

/// Whether the kernel says that the base is mapped as it is: it drops the
/// option when it cannot.
fn is_direct(mounts: &str) -> bool {
    fs::read_to_string(mounts)
        .is_ok_and(|text| text.lines().any(|line| line.starts_with("/dev/pmem0 ") && line.contains("dax=always")))
}

fn uptime_ms() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let (seconds, nanoseconds) = (u64::try_from(now.tv_sec), u64::try_from(now.tv_nsec));
    seconds.unwrap_or(0) * 1000 + nanoseconds.unwrap_or(0) / 1_000_000
}

/// Becomes who `identity` says.
pub(crate) fn identify(identity: &Identity) -> Result<(), String> {
    let seed = bytes_of(&identity.seed).ok_or("the seed is not hexadecimal")?;
    qvd_sys::guest::reseed(&seed).map_err(failed("mix in the seed"))?;
    if identity.machine_id.len() != 32 || bytes_of(&identity.machine_id).is_none() {
        return Err("the machine id is not 32 hexadecimal digits".to_owned());
    }
    // A name that the image could have made a link is not written through.
    let replace = |path: &str, text: String| {
        let fresh = format!("{path}.new");
        let write = || {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let file = rustix::fs::open(fresh.as_str(), flags, Mode::from_raw_mode(0o644))?;
            File::from(file).write_all(text.as_bytes())?;
            fs::rename(&fresh, path)
        };
        write().map_err(failed(format_args!("write {path}")))
    };
    if Path::new("/etc").is_dir() {
        replace("/etc/machine-id", format!("{}\n", identity.machine_id))?;
        replace("/etc/hostname", format!("{}\n", identity.hostname))?;
    }
    rustix::system::sethostname(identity.hostname.as_bytes()).map_err(|e| failed("set the name")(e.into()))?;
    set_clock(identity.time_ns)
}

/// Sets the clock to so many nanoseconds since 1970.
pub(crate) fn set_clock(time_ns: u64) -> Result<(), String> {
    let (seconds, rest) = (time_ns / 1_000_000_000, time_ns % 1_000_000_000);
    let time = Timespec { tv_sec: seconds.cast_signed(), tv_nsec: rest.cast_signed() };
    rustix::time::clock_settime(rustix::time::ClockId::Realtime, time).map_err(|e| failed("set the clock")(e.into()))
}

/// Takes its place in the network, once there is an interface: a clone's is
/// plugged in while it runs.
pub(crate) fn take_place(network: &Network) -> Result<(), String> {
    wait_for_device("network interface eth0", || Path::new("/sys/class/net/eth0").exists().then_some(()))?;
    qvd_sys::guest::set_address("eth0", network.address, network.prefix, network.gateway)
        .map_err(failed("set the address of eth0"))?;
    if let Err(failure) = crate::desktop::name_servers(&network.name_servers) {
        let _written = writeln!(io::stderr(), "qvd-init: {failure}");
    }
    let Some(place) = network.ipv6 else { return Ok(()) };
    // A desktop without it is better than none: the image's kernel may have no IPv6.
    if let Err(error) = qvd_sys::guest::set_address6("eth0", place.address, place.router, place.way_out) {
        let _written = writeln!(io::stderr(), "qvd-init: cannot set the address of IPv6 of eth0: {error}");
    }
    Ok(())
}

/// [`take_place`] as a process of its own, which may wait.
pub(crate) fn place_in_network(argument: Option<String>) -> ExitCode {
    let place = || {
        let network = argument.ok_or("an argument is missing")?;
        take_place(&serde_json::from_str(&network).map_err(|error| format!("the place cannot be read: {error}"))?)
    };
    match place() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _written = writeln!(io::stderr(), "cannot take a place in the network: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Arguments for [`place_in_network`].
pub(crate) fn network_arguments(network: &Network) -> Result<[String; 2], String> {
    let place = serde_json::to_string(network).map_err(|error| error.to_string())?;
    Ok([NETWORK.to_owned(), place])
}

/// Removes the keys by which others know this machine: an image's or a
/// template's are no secret. Whether there is a program that makes new ones.
pub(crate) fn forget_host_keys() -> io::Result<bool> {
    let Ok(names) = fs::read_dir("/etc/ssh") else { return Ok(false) };
    for entry in names {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with("ssh_host_") && (name.ends_with("_key") || name.ends_with("_key.pub")) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(Path::new(MAKE_HOST_KEYS[0]).exists())
}

fn bytes_of(hexadecimal: &str) -> Option<Vec<u8>> {
    let digits = hexadecimal.as_bytes();
    if !digits.len().is_multiple_of(2) {
        return None;
    }
    let pair = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    digits.chunks(2).map(pair).collect()
}

/// Carries conversations, as a process of its own that can fail alone.
pub(crate) fn carry() -> ExitCode {
    let work = || {
        let mask: SigSet = [Signal::SIGTERM].into_iter().collect();
        mask.thread_block()?;
        let stop = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        let stop = rustix::io::fcntl_dupfd_cloexec(&stop, 3)?;
        let port = rustix::io::fcntl_dupfd_cloexec(io::stdin(), 3)?;
        let control = Path::new(desktop::ROOT_DIR).join("control");
        carry_in_guest(port, stop, control).map_err(io::Error::other)
    };
    match work() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _written = writeln!(io::stderr(), "cannot carry what the host says: {error}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hexadecimal_is_read_and_nothing_else() {
        assert_eq!(bytes_of("00ff10"), Some(vec![0, 255, 16]));
        assert_eq!(bytes_of("0"), None);
        assert_eq!(bytes_of("zz"), None);
        assert_eq!(bytes_of("é0"), None);
    }
}
