//! Files that are no files: sockets, fifos and devices; and programs that run.

use std::{
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    process::{Command, Stdio},
    thread,
};

use rustix::{
    fs::{CWD, FileType, Mode, OFlags, makedev, mknodat, open},
    io::Errno,
};

use super::{
    super::{
        bench::Bench,
        report::{Checked, Failure, Seen, Step, equal, hold, refused},
    },
    Listed,
};
use crate::Deviation;

pub(super) const CASES: &[Listed] = &[
    ("sockets", None, sockets),
    ("fifos", None, fifos),
    ("device-nodes", None, devices),
    ("running-programs", Some(Deviation::WritableText), programs),
    ("read-only-parts", Some(Deviation::ReadOnlyParts), parts),
];

fn sockets(bench: &Bench) -> Checked {
    bench.with_tree(|tree| {
        let listener = UnixListener::bind(tree.path("var/dir/s")).step("a socket can be made")?;
        let mut client = UnixStream::connect(tree.path("var/dir/s")).step("it can be connected to")?;
        let (mut server, _) = listener.accept().step("the connection arrives")?;
        client
            .write_all(b"hello")
            .and_then(|()| client.shutdown(std::net::Shutdown::Write))
            .step("it can be written")?;
        let mut text = String::new();
        server.read_to_string(&mut text).step("it can be read")?;
        equal("through the socket came", &*text, "hello")?;
        // X servers and message buses move their sockets into place.
        tree.rename("var/dir/s", "var/s")?;
        UnixStream::connect(tree.path("var/s")).step("a renamed socket can be connected to")?;
        // The one of the base stands where nobody listens.
        match UnixStream::connect(tree.path("var/socket")) {
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {}
            other => return Err(Failure::new("nobody listens to the base's socket", format!("{other:?}"))),
        }
        tree.remove("var/socket")?;
        UnixListener::bind(tree.path("var/socket")).step("the base's name can be used again")?;
        Ok(Seen::Plain)
    })
}

fn fifos(bench: &Bench) -> Checked {
    bench.with_tree(|tree| {
        mknodat(CWD, tree.path("var/new"), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).step("a fifo can be made")?;
        for name in ["var/new", "var/fifo"] {
            // Both ends are open at once, so that nobody waits for the other.
            let mut both = tree.open(name, OFlags::RDWR | OFlags::NONBLOCK)?;
            let mut writer = tree.open(name, OFlags::WRONLY)?;
            writer.write_all(b"hello").step("it can be written")?;
            let mut text = [0; 5];
            both.read_exact(&mut text).step("it can be read")?;
            equal(format!("through `{name}` came"), &text, b"hello")?;
        }
        tree.chmod("var/fifo", 0o640)?;
        tree.rename("var/fifo", "var/dir/fifo")?;
        hold("a renamed one is a fifo still", !tree.stat("var/dir/fifo")?.is_file(), "it is a file")?;
        Ok(Seen::Plain)
    })
}

fn devices(bench: &Bench) -> Checked {
    bench.with_tree(|tree| {
        let null = makedev(1, 3);
        let made = mknodat(CWD, tree.path("var/new"), FileType::CharacterDevice, Mode::RUSR | Mode::WUSR, null);
        let mut names = vec!["var/null"];
        match made {
            // Whoever is root of a user namespace alone cannot make one.
            Err(Errno::PERM) => {}
            made => {
                made.step("a device node can be made, as archives have them")?;
                names.push("var/new");
            }
        }
        for name in names {
            // In a user namespace the base has none.
            if tree.stat(name).is_ok() {
                let opened = open(tree.path(name), OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
                refused(format!("to open the device `{name}`"), opened, &[Errno::ACCESS, Errno::PERM])?;
            }
        }
        Ok(Seen::Plain)
    })
}

fn programs(bench: &Bench) -> Checked {
    bench.with_tree(|tree| {
        let started = Command::new(tree.path("var/cat")).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut running = started.step("a program of the base can be run")?;
        // It lives as long as its input does; returned from `spawn`, it executes.
        let written = open(tree.path("var/cat"), OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty());
        let (input, output) = (running.stdin.take(), running.stdout.take());
        let reader = thread::spawn(move || {
            let mut text = String::new();
            output.map(|mut output| output.read_to_string(&mut text)).transpose().map(|_| text)
        });
        let fed = input.map_or(Ok(()), |mut input| input.write_all(b"hello"));
        let ended = running.wait().step("the program ends")?;
        fed.step("the program reads its input")?;
        hold("the program ends well", ended.success(), ended)?;
        let text = reader.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)).step("it can be read")?;
        equal("the program wrote", &*text, "hello")?;
        match written {
            Ok(_) => Ok(Seen::Deviates("it can be opened for writing".to_owned())),
            result => {
                refused("to write to a running program", result, &[Errno::TXTBSY])?;
                tree.write("var/cat", "it has ended")?;
                Ok(Seen::Plain)
            }
        }
    })
}

fn parts(bench: &Bench) -> Checked {
    bench.with_tree(|tree| {
        let create = OFlags::WRONLY | OFlags::CREATE | OFlags::CLOEXEC;
        match open(tree.path("usr/part/new"), create, Mode::RUSR) {
            Err(Errno::ROFS) => {
                tree.expect("usr/part/file", super::super::base::TEXT)?;
                return Ok(Seen::Deviates("a file below `/usr` cannot be made: EROFS".to_owned()));
            }
            made => drop(made.step("a file can be made anywhere")?),
        }
        for name in ["usr/part/file", "etc/motd", "top"] {
            tree.write(name, "changed")?;
            tree.expect(name, "changed")?;
        }
        Ok(Seen::Plain)
    })
}
