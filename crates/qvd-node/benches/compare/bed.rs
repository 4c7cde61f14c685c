//! QVD itself, from its libraries, as a node uses them.

use std::{
    cell::{Cell, RefCell},
    env, fs,
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use qvd_core::{DesktopId, Instance, NetPolicy, RootPolicy, UidRange};
use qvd_net::{NetConfig, Network, PortSpec, loopback_up};
use qvd_storage::{Defaults, Image, ImageConfig, RootId, Store, UserConfig};
use qvd_virt::{ContainerSpec, Exit, Program, Runtime, seal};
use tempfile::TempDir;

use crate::{Contestant, INIT, LIMIT, Outcome, Sample, median, peer};

/// What a start consists of, in order. The container's own set-up goes on
/// while the port is made.
const STEPS: [&str; 4] = ["root", "process", "port", "exec"];

/// What all starts share.
pub(crate) struct Bed {
    store: Store,
    runtime: Runtime,
    network: Network,
    image: Image,
    init: OwnedFd,
    steps: RefCell<[Vec<f64>; STEPS.len()]>,
    port_requests: Cell<u64>,
    // Last: what is above has files in it.
    dir: TempDir,
}

impl Bed {
    pub(crate) fn new() -> Outcome<Self> {
        let instance = Instance::new(0xbe4d);
        let dir = TempDir::new_in(env!("CARGO_TARGET_TMPDIR"))?;
        let program = dir.path().join(INIT);
        peer::compile(concat!(env!("CARGO_MANIFEST_DIR"), "/benches/compare/stamp.c").as_ref(), &program, "-static")?;
        let store = Store::open(&dir.path().join("store"))?;
        let config = ImageConfig {
            flavour: "bench".parse()?,
            description: String::new(),
            user: UserConfig { name: "user".to_owned(), uid: 1000, gid: 1000 },
            session: None,
            services: Vec::new(),
            defaults: Defaults::default(),
        };
        let image = store.import(config, &mut |tree| peer::plant(tree, &program))?;
        let tree = dir.path().join("tree");
        fs::create_dir(&tree)?;
        peer::plant(&tree, &program)?;
        let runtime = Runtime::new(instance)?;
        let network = Network::open(NetConfig { internet: true, ..NetConfig::new(instance) })?;
        let init = seal(c"bench-init", &fs::read(&program)?)?;
        let (steps, port_requests) = (RefCell::default(), Cell::default());
        Ok(Self { store, runtime, network, image, init, steps, port_requests, dir })
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// What is in the image, as plain files, to be read only.
    pub(crate) fn tree(&self) -> PathBuf {
        self.dir().join("tree")
    }

    pub(crate) fn program(&self) -> PathBuf {
        self.dir().join(INIT)
    }

    /// What a node does for a desktop without a home, and undoes again.
    pub(crate) fn cycle(&self, with_port: bool) -> Outcome<Sample> {
        let id = DesktopId::new(1)?;
        let began = Instant::now();
        let mut times = Vec::with_capacity(STEPS.len());
        let mut step = || times.push(micros(began));

        let ids = UidRange::of_slot(0)?;
        let userns = qvd_sys::userns::create(ids.base(), UidRange::LEN)?;
        let mut root = self.store.root(&self.image, &RootId::from(id), RootPolicy::Volatile)?;
        let mount = root.mount(Some(userns.as_fd()))?;
        step();
        let program = Program { file: self.init.try_clone()?, argv: vec![INIT.to_owned()], env: Vec::new() };
        let prepared = self.runtime.prepare(ContainerSpec::new(id, mount, ids, program))?;
        step();
        let netns = prepared.netns()?;
        let port = if with_port {
            let policy = NetPolicy::internet();
            let sent = self.network.requests_sent();
            let spec = PortSpec { desktop: id, netns: netns.as_fd(), address: None, policy };
            let port = self.network.attach(&spec)?;
            self.port_requests.set(self.network.requests_sent() - sent);
            Some(port)
        } else {
            loopback_up(netns.as_fd())?;
            None
        };
        step();
        let mut container = prepared.start()?;
        step();
        let start_us = times.last().copied().unwrap_or(f64::NAN);

        let exit = container.wait(LIMIT)?;
        // Also without a reader of its FIFO, and seen by nobody else.
        if !matches!(exit, Some(Exit::Code(0))) {
            return Err(format!("the program ended with {exit:?}").into());
        }
        drop(netns);
        container.close()?;
        if let Some(mut port) = port {
            port.release()?;
        }
        root.close()?;
        let cycle_us = micros(began);

        if with_port {
            let mut before = 0.0;
            for (all, now) in self.steps.borrow_mut().iter_mut().zip(times) {
                all.push(now - before);
                before = now;
            }
        }
        Ok(Sample { start_us, cycle_us })
    }

    /// Median time of each step of a start with a port, in microseconds.
    pub(crate) fn steps(&self) -> [(&'static str, f64); STEPS.len()] {
        let steps = self.steps.borrow();
        std::array::from_fn(|index| (STEPS[index], median(&steps[index])))
    }

    pub(crate) fn port_requests(&self) -> u64 {
        self.port_requests.get()
    }

    pub(crate) fn close(mut self) -> Outcome<()> {
        Ok(self.network.close()?)
    }
}

pub(crate) fn micros(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e6
}

pub(crate) struct Qvd<'a> {
    bed: &'a Bed,
    port: bool,
}

impl<'a> Qvd<'a> {
    pub(crate) const fn new(bed: &'a Bed, port: bool) -> Self {
        Self { bed, port }
    }
}

impl Contestant for Qvd<'_> {
    fn name(&self) -> &'static str {
        if self.port { "qvd" } else { "qvd, no port" }
    }

    fn run(&self) -> Outcome<Sample> {
        self.bed.cycle(self.port)
    }

    fn command(&self) -> Option<Command> {
        let mut command = Command::new(env::current_exe().ok()?);
        command.arg("--once");
        self.port.then_some(command)
    }
}
