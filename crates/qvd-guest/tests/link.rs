//! Both ends of a link, with an init and a node that are made up.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

use std::{
    collections::BTreeMap,
    fs::File,
    io::{Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::Path,
    thread,
    time::Duration,
};

use qvd_guest::{
    Base, BootConfig, Booted, Carrier, Channel, ExecRequest, Exit, GuestLink, Identity, InitConfig, Link, LinkError,
    Reply, Request, VERSION, Writable, carry_in_guest,
};
use tempfile::TempDir;

const SOON: Duration = Duration::from_secs(20);

fn config() -> BootConfig {
    BootConfig {
        identity: Identity {
            hostname: "desktop".to_owned(),
            machine_id: "0".repeat(32),
            time_ns: 1,
            seed: "00".to_owned(),
            network: None,
        },
        base: Base::Memory,
        writable: Writable::Memory { bytes: 1 << 20 },
        home: None,
        init: InitConfig {
            version: VERSION,
            env: BTreeMap::new(),
            services: Vec::new(),
            session: None,
            name_servers: Vec::new(),
        },
    }
}

/// A guest whose init answers one request on each connection by `answer`.
struct World {
    dir: TempDir,
    carrier: Carrier,
    guest: thread::JoinHandle<Result<(), LinkError>>,
    _stop: UnixStream,
}

fn listen(path: &Path) -> OwnedFd {
    UnixListener::bind(path).unwrap().into()
}

/// What QEMU does: it serves one connection after the other.
fn serve(listener: &UnixListener, port: &UnixStream) {
    // The pair stands for the port; a new connection replaces the old one.
    for socket in listener.incoming() {
        let socket = socket.unwrap();
        let (mut from, mut to) = (socket.try_clone().unwrap(), port.try_clone().unwrap());
        let back = thread::spawn({
            let (mut from, mut to) = (port.try_clone().unwrap(), socket.try_clone().unwrap());
            from.set_read_timeout(Some(Duration::from_millis(5))).unwrap();
            move || {
                let mut bytes = [0; 4096];
                loop {
                    match from.read(&mut bytes) {
                        Ok(0) => return drop(to.shutdown(std::net::Shutdown::Both)),
                        Ok(got) if to.write_all(&bytes[..got]).is_err() => return,
                        Err(_) if to.write_all(&[]).is_err() || to.take_error().unwrap().is_some() => return,
                        Err(error) if error.kind() != std::io::ErrorKind::WouldBlock => return,
                        _ => {}
                    }
                    // Nobody is there any more.
                    if rustix::net::recv(
                        &to,
                        &mut [0; 1],
                        rustix::net::RecvFlags::PEEK | rustix::net::RecvFlags::DONTWAIT,
                    )
                    .is_ok_and(|(got, _)| got == 0)
                    {
                        return;
                    }
                }
            }
        });
        let _copied = std::io::copy(&mut from, &mut to);
        back.join().unwrap();
    }
}

fn world(answer: fn(&mut Channel, Request, Vec<OwnedFd>)) -> World {
    let dir = tempfile::tempdir().unwrap();
    let init = UnixListener::bind(dir.path().join("init")).unwrap();
    thread::spawn(move || {
        for socket in init.incoming() {
            let mut channel = Channel::new(socket.unwrap().into());
            thread::spawn(move || {
                if let Ok((request, fds)) = channel.recv::<Request>(SOON) {
                    answer(&mut channel, request, fds);
                }
            });
        }
    });
    let machine = UnixListener::bind(dir.path().join("port")).unwrap();
    let (port, theirs) = UnixStream::pair().unwrap();
    thread::spawn(move || serve(&machine, &theirs));
    let (stop, stopped) = UnixStream::pair().unwrap();
    let control = dir.path().join("init");
    let guest = thread::spawn(move || {
        let mut link = GuestLink::new(File::from(OwnedFd::from(port)));
        assert_eq!(link.configuration().unwrap(), config());
        link.booted(&Booted { uptime_ms: 5, direct: true }).unwrap();
        carry_in_guest(link.into_port().unwrap(), stopped.into(), control)
    });
    let mut link = Link::connect(&dir.path().join("port"), SOON).unwrap();
    assert_eq!(link.boot(&config(), SOON).unwrap().uptime_ms, 5);
    let carrier = link.carry(listen(&dir.path().join("node"))).unwrap();
    World { dir, carrier, guest, _stop: stop }
}

impl World {
    fn connect(&self) -> Channel {
        Channel::new(UnixStream::connect(self.dir.path().join("node")).unwrap().into())
    }
}

fn exec(argv: &[&str]) -> Request {
    let argv = argv.iter().map(|&word| word.to_owned()).collect();
    Request::Exec(ExecRequest { argv, env: BTreeMap::new(), root: true, tty: None })
}

const MUCH: usize = 3_000_000;

#[test]
fn a_program_gets_its_input_and_all_its_output_comes_before_its_end() {
    let world = world(|channel, request, fds| {
        assert_eq!(request, exec(&["cat"]));
        let [input, output, errors] = <[OwnedFd; 3]>::try_from(fds).unwrap().map(File::from);
        channel.send(&Reply::Started { pid: 7 }, &[]).unwrap();
        let mut text = Vec::new();
        (&input).read_to_end(&mut text).unwrap();
        assert_eq!(text, b"typed");
        (&output).write_all(&vec![b'x'; MUCH]).unwrap();
        (&errors).write_all(b"complaint").unwrap();
        drop((output, errors));
        channel.send(&Reply::Exited(Exit::Code(3)), &[]).unwrap();
    });
    let (input, mut typed) = std::io::pipe().unwrap();
    let (mut output, out) = std::io::pipe().unwrap();
    let (mut errors, err) = std::io::pipe().unwrap();
    let mut node = world.connect();
    node.send(&exec(&["cat"]), &[input.as_fd(), out.as_fd(), err.as_fd()]).unwrap();
    drop((input, out, err));
    typed.write_all(b"typed").unwrap();
    drop(typed);
    assert_eq!(node.recv::<Reply>(SOON).unwrap().0, Reply::Started { pid: 7 });
    let reader = thread::spawn(move || {
        let mut bytes = Vec::new();
        output.read_to_end(&mut bytes).unwrap();
        bytes.len()
    });
    assert_eq!(node.recv::<Reply>(SOON).unwrap().0, Reply::Exited(Exit::Code(3)));
    assert_eq!(reader.join().unwrap(), MUCH);
    let mut text = String::new();
    errors.read_to_string(&mut text).unwrap();
    assert_eq!(text, "complaint");
    assert!(node.recv::<Reply>(SOON).is_err(), "the conversation ends with the init's");
}

#[test]
fn a_display_is_a_stream_both_ways_that_outlives_its_conversation() {
    let mut world = world(|channel, _, _| {
        let (give, keep) = UnixStream::pair().unwrap();
        channel.send(&Reply::Progress("wait".to_owned()), &[]).unwrap();
        channel.send(&Reply::Display, &[give.as_fd()]).unwrap();
        drop(give);
        let mut copy = keep.try_clone().unwrap();
        std::io::copy(&mut copy, &mut &keep).unwrap();
    });
    let mut node = world.connect();
    node.send(&Request::Watch, &[]).unwrap();
    assert!(matches!(node.recv::<Reply>(SOON).unwrap().0, Reply::Progress(_)));
    let (reply, mut fds) = node.recv::<Reply>(SOON).unwrap();
    assert_eq!((reply, fds.len()), (Reply::Display, 1));
    drop(node);
    let mut display = UnixStream::from(fds.pop().unwrap());
    let sent = vec![7; MUCH];
    let mut writer = display.try_clone().unwrap();
    let writing = thread::spawn(move || {
        writer.write_all(&sent).unwrap();
        writer.shutdown(std::net::Shutdown::Write).unwrap();
    });
    let mut echoed = Vec::new();
    display.read_to_end(&mut echoed).unwrap();
    writing.join().unwrap();
    assert!(echoed.len() == MUCH && echoed.iter().all(|&byte| byte == 7));

    // As after a restart of the node, in the middle of something.
    let mut node = world.connect();
    node.send(&Request::Watch, &[]).unwrap();
    world.carrier.close().unwrap();
    drop(node);
    std::fs::remove_file(world.dir.path().join("node")).unwrap();
    let link = Link::reconnect(&world.dir.path().join("port"), SOON).unwrap();
    world.carrier = link.carry(listen(&world.dir.path().join("node"))).unwrap();
    let mut node = world.connect();
    node.send(&Request::Watch, &[]).unwrap();
    assert!(matches!(node.recv::<Reply>(SOON).unwrap().0, Reply::Progress(_)));
    assert!(!world.guest.is_finished());
}

/// The host's end against a guest that says `bytes`.
fn against(bytes: &[u8]) -> Result<(), LinkError> {
    let dir = tempfile::tempdir().unwrap();
    let machine = UnixListener::bind(dir.path().join("port")).unwrap();
    let bytes = bytes.to_vec();
    let guest = thread::spawn(move || {
        let (port, _) = machine.accept().unwrap();
        let mut link = GuestLink::new(File::from(OwnedFd::from(port)));
        link.configuration().unwrap();
        link.booted(&Booted { uptime_ms: 5, direct: true }).unwrap();
        let mut port = File::from(link.into_port().unwrap());
        // The host may have had enough already.
        let _sent = port.write_all(&bytes);
        let _rest = port.read_to_end(&mut Vec::new());
    });
    let mut link = Link::connect(&dir.path().join("port"), SOON)?;
    link.boot(&config(), SOON)?;
    let mut carrier = link.carry(listen(&dir.path().join("node")))?;
    guest.join().unwrap();
    carrier.close()
}

fn frame(kind: u8, stream: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![kind, 0, 0, 0];
    bytes.extend_from_slice(&stream.to_le_bytes());
    bytes.extend_from_slice(&u32::try_from(body.len()).unwrap().to_le_bytes());
    bytes.extend_from_slice(body);
    bytes
}

#[test]
fn a_guest_that_breaks_the_protocol_is_not_talked_with_any_more() {
    let streams = |count: u32| -> Vec<u8> {
        (0..count).flat_map(|n| frame(7, 2, &[&[1, 3], (2 * n + 1).to_le_bytes().as_slice(), b"{}"].concat())).collect()
    };
    let cases = [
        frame(99, 0, b""),
        frame(3, 0, b"{}"),
        frame(6, 1, b""),
        frame(7, 2, b""),
        frame(7, 2, &[3, 1]),
        frame(7, 2, &[200]),
        frame(7, 2, &[[0].as_slice(), b"not json"].concat()),
        frame(7, 2, &[&[0], [b'['; 1000].as_slice()].concat()),
        frame(7, 2, &[1, 3, 2, 0, 0, 0, b'{', b'}']),
        frame(7, 2, &[1, 9, 1, 0, 0, 0, b'{', b'}']),
        frame(9, 0, b"12345"),
        vec![1, 0, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255],
    ];
    for case in cases {
        let error = against(&case).unwrap_err();
        assert!(matches!(error, LinkError::Bad(_) | LinkError::Message { .. }), "{case:?}: {error}");
    }
    // Streams for conversations that nobody has are dropped at once.
    against(&[streams(2000), frame(200, 0, b"")].concat()).unwrap_err();
}
