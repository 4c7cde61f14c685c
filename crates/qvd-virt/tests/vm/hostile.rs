//! Peers, disks and hosts that do harm to machines: what goes wrong is said, and
//! nothing is left.

use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader, Read as _, Write as _},
    os::unix::{
        fs::FileExt as _,
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
    thread,
    time::Duration,
};

use qvd_core::{DesktopId, Instance, UidRange};
use qvd_guest::Link;
use qvd_sys::process::traced::{self, Counted, End};
use qvd_virt::{
    Error, Exit, Runtime,
    vm::{DiskFormat, DiskSpec, GuestKernel, Qemu, StopLimits, StoppedBy, Vm, VmRecord, VmSpec, VmState},
};

use crate::{
    bed::{Bed, SOON, with_bed},
    guest::{Guests, with_guests},
};

const AT_ONCE: StopLimits = StopLimits { guest: Duration::ZERO, button: Duration::ZERO };

/// What a QEMU says that a guest has taken over, once it has greeted.
type Peer = fn(&mut UnixStream);

const GREETING: &str = "{\"QMP\": {\"version\": {\"qemu\": {\"micro\": 22, \"minor\": 2, \"major\": 7}, \"package\": \"\"}, \"capabilities\": []}}\n";

/// Greets, and answers as QEMU would until it is driven; then does what `then` does.
fn serve(listener: &UnixListener, then: Peer) {
    let (socket, _) = listener.accept().unwrap();
    let mut lines = BufReader::new(socket.try_clone().unwrap()).lines();
    let mut socket = socket;
    socket.write_all(GREETING.as_bytes()).unwrap();
    for (id, answer) in ["{}", "{\"status\": \"running\", \"running\": true}"].iter().enumerate() {
        lines.next();
        writeln!(socket, "{{\"return\": {answer}, \"id\": {id}}}").unwrap();
    }
    then(&mut socket);
}

/// The record of a machine whose control socket is another's.
fn taken_over(record: &VmRecord, dir: &Path) -> VmRecord {
    let mut record = serde_json::to_value(record).unwrap();
    record["dir"] = dir.to_str().unwrap().into();
    serde_json::from_value(record).unwrap()
}

fn waiting(bed: &Bed, number: u32, dir: &Path) -> Vm {
    let kernel = bed.kernel(Path::new("/bin/true"));
    let mut spec = bed.spec(number, &kernel);
    spec.dir = dir.to_owned();
    bed.qemu.start(spec).unwrap()
}

#[test]
fn a_machine_whose_control_socket_turns_against_us_is_ended_all_the_same() {
    let garbage: Peer = |socket| drop(socket.write_all(b"GET / HTTP/1.1\n\n"));
    let endless: Peer = |socket| while socket.write_all(&[b'['; 65_536]).is_ok() {};
    let flood: Peer = |socket| while socket.write_all(b"{\"event\": \"RESUME\"}\n").is_ok() {};
    let lies: Peer = |socket| {
        while socket.write_all(b"{\"return\": 7, \"id\": 2}\n{\"return\": [], \"id\": 3}\n").is_ok() {}
    };
    let cut: Peer = |_| {};
    let silent: Peer = |socket| while socket.read(&mut [0; 100]).is_ok_and(|got| got > 0) {};
    with_bed(|bed| {
        let work = tempfile::tempdir().unwrap();
        thread::scope(|scope| {
            for (number, then) in (1..).zip([garbage, endless, flood, lies, cut, silent]) {
                let dir = work.path().join(number.to_string());
                scope.spawn(move || {
                    let (theirs, ours) = (dir.join("theirs"), dir.join("ours"));
                    fs::create_dir_all(&theirs).unwrap();
                    fs::create_dir_all(&ours).unwrap();
                    let vm = waiting(bed, number, &theirs);
                    let pid = vm.pid();
                    let record = vm.detach().unwrap();
                    let listener = UnixListener::bind(ours.join("qmp.sock")).unwrap();
                    let peer = thread::spawn(move || serve(&listener, then));
                    let mut vm = bed.qemu.adopt(&taken_over(&record, &ours)).unwrap().unwrap();
                    assert_eq!(vm.state(), VmState::Running);
                    assert!(matches!(vm.pause(), Err(Error::Qmp { .. })), "{number}");
                    assert_eq!(vm.stop(AT_ONCE, || false).unwrap(), StoppedBy::Kill, "{number}");
                    assert_eq!(vm.wait(SOON).unwrap(), Some(Exit::Signal(9)), "{number}");
                    vm.close().unwrap();
                    drop(vm);
                    peer.join().unwrap();
                    assert!(!Path::new(&format!("/proc/{pid}/exe")).exists());
                });
            }
        });
    });
}

#[test]
fn a_machine_that_does_not_greet_its_new_owner_is_not_adopted_and_not_left() {
    with_bed(|bed| {
        let work = tempfile::tempdir().unwrap();
        let vm = waiting(bed, 1, work.path());
        let record = vm.detach().unwrap();
        let ours = work.path().join("ours");
        fs::create_dir(&ours).unwrap();
        let listener = UnixListener::bind(ours.join("qmp.sock")).unwrap();
        let peer = thread::spawn(move || listener.accept().unwrap().0.write_all(b"SSH-2.0-OpenSSH\n").unwrap());
        let error = bed.qemu.adopt(&taken_over(&record, &ours)).unwrap_err();
        assert!(matches!(error, Error::Qmp { .. }), "{error:?}");
        peer.join().unwrap();
        assert!(bed.qemu.adopt(&record).unwrap().is_none(), "it was ended: nobody could drive it");
    });
}

/// An image of qcow2 whose header names something.
fn image(guests: &Guests<'_>, name: &str, options: &[&str]) -> PathBuf {
    let path = guests.path(name);
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", "qcow2"]).args(options).arg(&path).arg("1M");
    assert!(command.stdout(Stdio::null()).status().unwrap().success(), "{name}");
    path
}

fn disk(serial: &str, path: &Path) -> DiskSpec {
    let file = File::options().read(true).write(true).open(path).unwrap().into();
    DiskSpec { serial: serial.to_owned(), file, format: DiskFormat::Qcow2 { backing: None } }
}

/// Puts `name` into the header of an image as what is behind it, unchecked, as
/// somebody with an editor would.
///
/// Source: QEMU docs/interop/qcow2.txt: at 8 the place of the name, at 16 its length.
fn name_backing(path: &Path, name: &str) {
    let file = File::options().write(true).open(path).unwrap();
    file.write_all_at(name.as_bytes(), 0x200).unwrap();
    file.write_all_at(&0x200_u64.to_be_bytes(), 8).unwrap();
    file.write_all_at(&u32::try_from(name.len()).unwrap().to_be_bytes(), 16).unwrap();
}

#[test]
fn what_a_disk_names_is_not_opened() {
    with_guests(|guests| {
        let secret = guests.path("secret");
        fs::write(&secret, vec![b'S'; 1 << 20]).unwrap();
        let mut spec = guests.spec(1);
        let looped = guests.path("looped");
        for (serial, name) in [
            ("looped", looped.to_str().unwrap().to_owned()),
            ("plain", secret.display().to_string()),
            ("file", format!("file:{}", secret.display())),
            ("json", format!("json:{{\"driver\":\"file\",\"filename\":\"{}\"}}", secret.display())),
            ("nbd", "nbd://127.0.0.1:10809/x".to_owned()),
        ] {
            let path = image(guests, serial, &[]);
            name_backing(&path, &name);
            spec.disks.push(disk(serial, &path));
        }
        let vm = guests.bed.qemu.start(spec).unwrap();
        let opened = fs::read_dir(format!("/proc/{}/fd", vm.pid())).unwrap();
        let opened: Vec<_> = opened.filter_map(|fd| fs::read_link(fd.unwrap().path()).ok()).collect();
        assert!(!opened.contains(&secret), "{opened:?}");
        drop(vm);

        // What is kept in another file altogether cannot be told apart from a
        // disk of ours by anything but its header: QEMU finds no such file.
        let outside = image(guests, "outside", &["-o", &format!("data_file={}", guests.path("data").display())]);
        let mut spec = guests.spec(2);
        spec.disks.push(disk("outside", &outside));
        let error = guests.bed.qemu.start(spec).unwrap_err();
        assert!(matches!(&error, Error::Hypervisor { said, .. } if said.contains("data")), "{error:?}");
    });
}

/// Starts a machine, lets it run and ends it, as a process of its own would.
fn live(bed: &Short) {
    let qemu = Qemu::find(Arc::new(Runtime::new(bed.instance).unwrap())).unwrap();
    let spec = VmSpec::of_kernel(DesktopId::new(1).unwrap(), bed.ids, &bed.kernel, bed.dir.clone()).unwrap();
    let mut vm = qemu.start(spec).unwrap();
    vm.resume().unwrap();
    vm.close().unwrap();
}

/// What of a bed another process needs.
struct Short {
    instance: Instance,
    ids: UidRange,
    kernel: GuestKernel,
    dir: PathBuf,
}

#[test]
fn whatever_a_killed_process_leaves_of_a_machine_is_swept() {
    with_bed(|bed| {
        let kernel = bed.kernel(Path::new("/bin/true"));
        let dir = bed.dir.path().to_owned();
        let short = Arc::new(Short { instance: bed.instance, ids: bed.ids, kernel, dir });
        let (mut killed, mut after) = (0, 1);
        loop {
            let theirs = Arc::clone(&short);
            let run = traced::run(Some(after), Counted::Lasting, SOON, move || {
                live(&theirs);
                0
            });
            let end = run.unwrap().end;
            // What the next process does, which knows of no machine.
            bed.runtime.sweep(&[]).unwrap_or_else(|error| panic!("after call {after} ({end:?}): {error}"));
            match end {
                End::Killed(_) => killed += 1,
                End::Returned(0) => break,
                other => panic!("after call {after}: {other:?}"),
            }
            // Each point costs a start of QEMU; `crash.rs` of containers has them all.
            after += 3;
        }
        assert!(killed > 20, "{killed}");
        // The next start finds the sockets of the last, and goes on.
        live(&short);
    });
}

/// Takes the port to the host away from the guest's init, as its root can, and says what the
/// host never expects: noise, then the longest lengths without end.
const TURNS: &str = "sleep 1; cd /sys/bus/virtio/drivers/virtio_console; for d in virtio*; do
    echo $d >unbind; echo $d >bind; done
    until [ -e /dev/vport*p1 ]; do sleep 0.1; done
    head -c 4194304 /dev/urandom >$(echo /dev/vport*p1)
    while true; do tr '\\000' '\\377' </dev/zero >$(echo /dev/vport*p1); done";

#[test]
fn a_guest_that_turns_against_the_line_to_it_ends_that_and_nothing_else() {
    with_guests(|guests| {
        let vm = guests.bed.qemu.start(guests.spec(1)).unwrap();
        let mut guest = guests.boot(vm);
        guest.sh(&format!("{{ {TURNS}; }} >/dev/console 2>&1 </dev/null &"));
        let error = guest.line_ends().to_string();
        assert!(error.contains("broke the protocol"), "{error}");
        let resident = resident_mib();
        // Whoever takes up the line again hears nothing that makes sense, within bounds.
        for _ in 0..3 {
            let again = Link::reconnect(guest.vm.link(), Duration::from_secs(10));
            assert!(again.is_err(), "{error}; then: {again:?}");
        }
        assert!(resident_mib() < resident + 32, "{resident} MiB became {}", resident_mib());
        // It is still a machine that can be driven.
        assert_eq!(guest.vm.watch(Duration::ZERO).unwrap(), VmState::Running);
        guest.vm.pause().unwrap();
        assert_eq!(guest.vm.state(), VmState::Paused);
        guest.vm.resume().unwrap();
        assert_eq!(guest.vm.stop(AT_ONCE, || false).unwrap(), StoppedBy::Kill);
        assert!(guest.vm.wait(SOON).unwrap().is_some());
        guest.close();
    });
}

/// What this process has in memory.
fn resident_mib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.split_ascii_whitespace().next().unwrap().parse::<u64>().unwrap() >> 10
}
