//! Containers without a daemon, with everything that confines a desktop: a
//! writable root on a directory, ids of their own, a port if asked for. Prints
//! a line of JSON for each, and removes all.
//!
//! As root: `cargo run --release --example container -- --root DIR [--net] [--count N] [--keep] -- true`
#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use std::{
    error::Error,
    fs::File,
    io::{self, Read as _},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use qvd::core::{DesktopId, Digest, Instance, NetPolicy, RootPolicy, UidRange};
use qvd::net::{NetConfig, Network, Port, PortSpec, loopback_up};
use qvd::storage::{BaseTree, Overlayfs, Place, Root, RootBackend as _, RootId};
use qvd::virt::{Container, ContainerSpec, Exit, Program, Runtime};
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use serde_json::json;

/// Where programs of the root are looked for.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Longer than any program here should run.
const ENDS_WITHIN: Duration = Duration::from_secs(600);

struct Options {
    root: PathBuf,
    net: bool,
    count: u32,
    keep: bool,
    argv: Vec<String>,
}

/// What containers are made with.
struct Bed {
    runtime: Runtime,
    roots: Overlayfs,
    base: BaseTree,
    network: Option<Network>,
}

/// A container with what it stands on. Removed in the order of its fields.
struct Running {
    container: Container,
    port: Option<Port>,
    root: Box<dyn Root>,
}

fn main() -> Result<(), Box<dyn Error>> {
    let options = Options::parse()?;
    let instance = Instance::new(0xc0de);
    let store = tempfile::tempdir()?;
    let bed = Bed {
        runtime: Runtime::new(instance)?,
        roots: Overlayfs::new(Place::open(store.path())?),
        base: BaseTree::new(Digest::new([0; 32]), options.root.canonicalize()?),
        network: if options.net { Some(Network::open(NetConfig::new(instance))?) } else { None },
    };
    let mut kept = Vec::new();
    for number in 1..=options.count {
        let id = DesktopId::new(number)?;
        let began = Instant::now();
        let mut running = bed.start(id, &options.argv)?;
        let exec_us = began.elapsed().as_micros();
        let mut line = json!({
            "id": number,
            "pid": running.container.pid(),
            "exec_us": exec_us,
            "syscalls": running.container.start_calls(),
        });
        if options.keep {
            kept.push(running);
        } else {
            let exit = running.container.wait(ENDS_WITHIN)?;
            line["exit"] = match exit {
                Some(Exit::Code(code)) => json!(code),
                Some(Exit::Signal(signal)) => json!(format!("signal {signal}")),
                _ => json!(format!("none within {ENDS_WITHIN:?}")),
            };
            running.close()?;
            line["cycle_us"] = json!(began.elapsed().as_micros());
        }
        println!("{line}");
    }
    if options.keep {
        std::io::stdin().read_to_end(&mut Vec::new())?;
        let began = Instant::now();
        for running in &kept {
            running.container.kill()?;
        }
        for running in &mut kept {
            running.close()?;
        }
        println!("{}", json!({ "removed": kept.len(), "remove_us": began.elapsed().as_micros() }));
    }
    if let Some(mut network) = bed.network {
        network.close()?;
    }
    Ok(())
}

impl Bed {
    fn start(&self, id: DesktopId, argv: &[String]) -> Result<Running, Box<dyn Error>> {
        let ids = UidRange::of_slot(id.number())?;
        let userns = qvd_sys::userns::create(ids.base(), UidRange::LEN)?;
        let root = self.roots.create(&self.base, &RootId::from(id), &RootPolicy::Volatile.into())?;
        let mount = root.mount(Some(userns.as_fd()))?;
        let file = find_inside(&mount, argv.first().map_or("", String::as_str))?;
        let program = Program { file, argv: argv.to_vec(), env: vec![format!("PATH={PATH}")] };
        let prepared = self.runtime.prepare(ContainerSpec::new(id, mount, ids, program))?;
        let netns = prepared.netns()?;
        let port = match &self.network {
            Some(network) => {
                let policy = NetPolicy::host_only();
                Some(network.attach(&PortSpec { desktop: id, netns: netns.as_fd(), address: None, policy })?)
            }
            None => {
                loopback_up(netns.as_fd())?;
                None
            }
        };
        Ok(Running { container: prepared.start()?, port, root })
    }
}

impl Running {
    fn close(&mut self) -> Result<(), Box<dyn Error>> {
        self.container.close()?;
        if let Some(port) = &mut self.port {
            port.release()?;
        }
        Ok(self.root.close()?)
    }
}

/// Opens a program as the container would find it, links included: by its
/// path if its name has a slash, else where `PATH` says.
fn find_inside(root: &OwnedFd, name: &str) -> Result<OwnedFd, Box<dyn Error>> {
    let open = |path: &str| -> io::Result<OwnedFd> {
        let file = openat2(root, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty(), ResolveFlags::IN_ROOT)?;
        let meta = File::from(file.try_clone()?).metadata()?;
        if meta.is_file() && meta.mode() & 0o111 != 0 { Ok(file) } else { Err(io::ErrorKind::PermissionDenied.into()) }
    };
    let found = if name.contains('/') {
        open(name)
    } else {
        let tried =
            PATH.split(':').map(|dir| open(&format!("{dir}/{name}"))).reduce(|best, next| match (&best, &next) {
                // One that cannot be run explains more than one that is not there.
                (Ok(_), _) => best,
                (Err(error), Err(_)) if error.kind() == io::ErrorKind::PermissionDenied => best,
                _ => next,
            });
        tried.unwrap_or(Err(io::ErrorKind::NotFound.into()))
    };
    found.map_err(|error| format!("cannot run program `{name}` of the root: {error}").into())
}

impl Options {
    fn parse() -> Result<Self, Box<dyn Error>> {
        let usage = "usage: container --root DIR [--net] [--count N] [--keep] [--json] -- COMMAND...";
        let mut options = Self { root: PathBuf::new(), net: false, count: 1, keep: false, argv: Vec::new() };
        let mut args = std::env::args().skip(1);
        while let Some(arg) = args.next() {
            match arg.as_str() {
                "--root" => options.root = args.next().ok_or(usage)?.into(),
                "--net" => options.net = true,
                "--count" => options.count = args.next().ok_or(usage)?.parse()?,
                "--keep" => options.keep = true,
                // Every line is JSON anyway.
                "--json" => {}
                "--" => options.argv = args.by_ref().collect(),
                _ => return Err(format!("unknown argument `{arg}`; {usage}").into()),
            }
        }
        let whole = options.root != Path::new("") && options.argv.first().is_some_and(|name| !name.is_empty());
        if whole { Ok(options) } else { Err(format!("name a root and a command; {usage}").into()) }
    }
}
