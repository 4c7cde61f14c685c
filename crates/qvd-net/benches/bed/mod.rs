//! A host with an uplink, and another host behind it.

use std::{
    error::Error,
    io::{self, Write as _},
    net::{Ipv4Addr, UdpSocket},
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use qvd_net::NetConfig;
use qvd_sys::netns;

pub(crate) const OUTSIDE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);
const UPLINK: &str = "198.51.100.1/24";

pub(crate) type Outcome<T = ()> = Result<T, Box<dyn Error + Send + Sync>>;

/// Another host behind the host's uplink.
pub(crate) struct Outside {
    pub(crate) netns: OwnedFd,
}

impl Outside {
    pub(crate) fn new(config: &NetConfig) -> Outcome<Self> {
        let netns = netns::create()?;
        let path = format!("/proc/{}/fd/{}", std::process::id(), std::os::fd::AsRawFd::as_raw_fd(&netns));
        let subnet = config.subnet;
        shell(&format!(
            "ip link set lo up; ip link add uplink type veth peer name far; ip addr add {UPLINK} dev uplink; \
             ip link set uplink up; ip link set far netns {path}"
        ))?;
        let setup = format!(
            "ip link set lo up; ip addr add {OUTSIDE}/24 dev far; ip link set far up; ip route add {subnet} via 198.51.100.1"
        );
        netns::in_netns(netns.as_fd(), || shell(&setup))??;
        Ok(Self { netns })
    }

    pub(crate) fn end(&self) -> End<'_> {
        End { netns: self.netns.as_fd(), address: OUTSIDE }
    }
}

/// Who is sent to: an address, and the namespace that has it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct End<'a> {
    pub(crate) netns: BorrowedFd<'a>,
    pub(crate) address: Ipv4Addr,
}

impl End<'_> {
    /// A socket there, and one of `from` that sends to it.
    pub(crate) fn sockets(&self, from: BorrowedFd<'_>) -> Outcome<(UdpSocket, UdpSocket)> {
        let there = netns::in_netns(self.netns, || UdpSocket::bind((self.address, 0)))??;
        let here = netns::in_netns(from, || UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)))??;
        here.connect(there.local_addr()?)?;
        for socket in [&here, &there] {
            socket.set_read_timeout(Some(Duration::from_secs(5)))?;
        }
        Ok((here, there))
    }
}

/// Mean time of a datagram there and back, in millionths of a second.
pub(crate) fn round_trip_us(from: BorrowedFd<'_>, to: End<'_>, trips: u32) -> Outcome<f64> {
    let (here, there) = to.sockets(from)?;
    let answering = thread::spawn(move || -> io::Result<()> {
        let mut buffer = [0; 64];
        for _ in 0..trips {
            let (length, from) = there.recv_from(&mut buffer)?;
            there.send_to(buffer.get(..length).unwrap_or_default(), from)?;
        }
        Ok(())
    });
    let began = Instant::now();
    let mut buffer = [0; 64];
    for _ in 0..trips {
        here.send(&[0; 18])?;
        here.recv(&mut buffer)?;
    }
    let trip_us = began.elapsed().as_secs_f64() * 1e6 / f64::from(trips);
    answering.join().map_err(|_| "the echo panicked")??;
    Ok(trip_us)
}

pub(crate) fn shell(text: &str) -> Outcome {
    input("sh", &["-e"], text)
}

pub(crate) fn input(program: &str, args: &[&str], text: &str) -> Outcome {
    let mut child = Command::new(program).args(args).stdin(Stdio::piped()).spawn()?;
    child.stdin.take().ok_or("no input")?.write_all(text.as_bytes())?;
    let status = child.wait()?;
    if status.success() { Ok(()) } else { Err(format!("{program} failed: {status}").into()) }
}
