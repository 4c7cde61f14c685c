//! How a desktop comes to run: the steps of a start, undone in reverse when one
//! of them fails.

mod machine;

use std::{
    os::fd::AsFd as _,
    time::{Duration, Instant},
};

use qvd_core::{Calls, DesktopId, DesktopSpec, RootPolicy, StartStep, UidRange, Virtualizer};
use qvd_guest::{InitConfig, SessionConfig, VERSION};
use qvd_net::{Network, Port, PortSpec, loopback_up};
use qvd_storage::{Home, HomeId, Image, RootId};
use qvd_virt::{ContainerMount, ContainerSpec, InheritedFd, Merging, Program, seal};

use crate::{
    HostError, HostErrorKind, Timings,
    desktop::{Desktop, Parts, failed, micros, net, note, rest_of, storage, user_namespace, virt},
    forks::ForkWatch,
    guest::Guest,
    machine::{Failure, InContainer, Machine},
    record::Record,
};

/// How many times as long as others' the session of an emulated machine may take.
const EMULATED: u32 = 5;

/// How long it may take until a desktop gives a display, if `usual` is right for a container.
/// What emulates a machine takes longer; that it is not emulated after all does no harm.
pub(crate) fn attach_limit(usual: Duration, spec: &DesktopSpec) -> Duration {
    if spec.virtualizer == Virtualizer::Qemu { usual * EMULATED } else { usual }
}

/// Undoes the steps of a start, last first, unless the start succeeds.
#[derive(Default)]
struct Undo<'a>(Vec<Box<dyn FnOnce() + 'a>>);

impl<'a> Undo<'a> {
    fn step(&mut self, undo: impl FnOnce() + 'a) {
        self.0.push(Box::new(undo));
    }

    fn keep(mut self) {
        self.0.clear();
    }
}

impl Drop for Undo<'_> {
    fn drop(&mut self) {
        while let Some(undo) = self.0.pop() {
            undo();
        }
    }
}

/// What both kinds of start have to know.
struct Start<'a> {
    spec: &'a DesktopSpec,
    image: &'a Image,
    ids: UidRange,
    uid_slot: u32,
    began: Instant,
    /// Whether all its memory is offered for merging.
    merges: bool,
    /// Begins the error of any step.
    what: &'a str,
}

/// What a start made.
type Made = (Box<dyn Machine>, Option<Port>, Timings);

impl Parts {
    /// Makes everything up to the running init. Each owner undoes its part
    /// when it is dropped, so an early return leaves nothing.
    ///
    /// `began` is when it was asked for; `session_us` of the result is not
    /// known yet. With `merges`, a container's memory is offered for merging.
    pub(crate) fn start(
        &self,
        spec: &DesktopSpec,
        (began, merges): (Instant, bool),
        step: &mut dyn FnMut(StartStep),
    ) -> Result<(Desktop, Timings), HostError> {
        let id = spec.id;
        let what = format!("cannot start desktop {id}");
        let image = self.store.image(spec.image).map_err(storage(&what))?;
        let mut undo = Undo::default();
        let ready = self.take_ready(spec, &image);
        let uid_slot = ready.as_ref().map_or_else(|| self.ranges.take(), |ready| Ok(ready.uid_slot))?;
        undo.step(move || self.ranges.free(uid_slot));
        if let Some(machine) = ready.as_ref().map(|ready| ready.vm.id()) {
            undo.step(move || note(id, self.records.end_ready(machine)));
        }
        let ids = UidRange::of_slot(uid_slot).map_err(failed(HostErrorKind::Busy, &what))?;
        let guest = Guest::at(self.records.socket(id));
        let start = Start { spec, image: &image, ids, uid_slot, began, merges, what: &what };
        let (machine, port, timings) = match spec.virtualizer {
            Virtualizer::Container => self.start_container(&start, &guest, &mut undo, step),
            Virtualizer::Qemu => self.start_vm(&start, ready, &guest, &mut undo, step),
            other => {
                let missing = format!("{what}: this host runs containers and machines by QEMU, not by {other:?}");
                Err(HostError::new(HostErrorKind::Unsupported, missing))
            }
        }?;
        let address = port.as_ref().map(Port::address);
        let facts = machine.record().map_err(failed(HostErrorKind::Failed, &what))?;
        self.records
            .write(&Record::new(spec.clone(), uid_slot, facts, address).merging(merges))
            .map_err(failed(HostErrorKind::Failed, &what))?;
        undo.keep();
        let (rest, linger) = rest_of(&image);
        let (spec, forks) = (spec.clone(), ForkWatch::default());
        Ok((Desktop { spec, uid_slot, guest, machine, port, rest, linger, forks, verdict: None }, timings))
    }

    fn start_container<'a>(
        &'a self,
        start: &Start<'_>,
        guest: &Guest,
        undo: &mut Undo<'a>,
        step: &mut dyn FnMut(StartStep),
    ) -> Result<Made, HostError> {
        let Start { spec, image, ids, uid_slot, began, merges, what } = start;
        let id = spec.id;
        let userns = user_namespace(*uid_slot, what)?;
        let mut timings = Timings::default();

        // By name, because making it can fail half-way, as on a full disk.
        if spec.root == RootPolicy::Volatile {
            undo.step(move || note(id, self.store.remove_root(&RootId::from(id))));
        }
        let root = self.store.root(image, &RootId::from(id), spec.root).map_err(storage(what))?;
        let root_mount = root.mount(Some(userns.as_fd())).map_err(storage(what))?;
        let home = self.home(spec, image).and_then(|home| home.mount(Some(userns.as_fd()))).map_err(storage(what))?;
        timings.root_us = micros(*began);

        step(StartStep::Confinement);
        self.begin(id, undo, what)?;
        let control = guest.listen().map_err(|e| e.into_host_error((*what).to_owned()))?;
        let policy = self.networks.allowed(&spec.tenant, &spec.net);
        let mut init_config = init_config(image, self.head_limit(spec));
        if policy.port {
            let servers = |network: &Network| network.name_servers(id, &policy).map_err(net(what));
            init_config.name_servers = self.networks.with(&spec.tenant, servers)?;
        }
        let init_config = serde_json::to_vec(&init_config).map_err(failed(HostErrorKind::Failed, what))?;
        let init_config = seal(c"qvd-init.json", &init_config).map_err(failed(HostErrorKind::Failed, what))?;
        let file = self.init.try_clone().map_err(failed(HostErrorKind::Failed, what))?;
        let program = Program { file, argv: vec!["qvd-init".to_owned()], env: Vec::new() };
        let mut container = ContainerSpec::new(id, root_mount, *ids, program);
        container.hostname.clone_from(&spec.hostname);
        container.limits = spec.limits;
        let defaults = &image.config().defaults;
        container.profile.devices = defaults.devices.union(&spec.devices).copied().collect();
        container.profile.calls = spec.calls.unwrap_or(defaults.calls);
        if *merges {
            container.profile.merging = Merging::All;
        }
        if container.profile.calls == Calls::System {
            let reason = format!("{what}: the system calls of `system` are for images whose own init runs");
            return Err(HostError::new(HostErrorKind::Unsupported, reason));
        }
        container.mounts = vec![ContainerMount { target: image.config().user.home().into(), mount: home }];
        container.fds = vec![
            InheritedFd { number: qvd_guest::fds::CONTROL, fd: control },
            InheritedFd { number: qvd_guest::fds::CONFIG, fd: init_config },
        ];
        let prepared = self.runtime.prepare(container).map_err(virt(what))?;

        step(StartStep::Port);
        let port_began = Instant::now();
        let netns = prepared.netns().map_err(virt(what))?;
        let port = if policy.port {
            Some(self.networks.with(&spec.tenant, |network| {
                let port = PortSpec { desktop: id, netns: netns.as_fd(), address: spec.address, policy };
                network.attach(&port).map_err(net(what))
            })?)
        } else {
            loopback_up(netns.as_fd()).map_err(net(what))?;
            None
        };
        timings.port_us = micros(port_began);

        step(StartStep::Init);
        let container = prepared.start().map_err(virt(what))?;
        timings.start_us = micros(*began);
        Ok((Box::new(InContainer::new(container, root, *ids, *merges)), port, timings))
    }

    /// How long the session of a desktop that was started may take.
    pub(crate) fn session_limit(&self, spec: &DesktopSpec) -> Duration {
        let emulated = spec.virtualizer == Virtualizer::Qemu && self.machines.are_emulated();
        self.session_limit * if emulated { EMULATED } else { 1 }
    }

    /// How long the init of a desktop waits for a display: it is to say why there is none before
    /// whoever asked gives up.
    fn head_limit(&self, spec: &DesktopSpec) -> Duration {
        attach_limit(self.attach_limit, spec) * 2 / 3
    }

    /// Makes the directory of what is remembered of a desktop.
    fn begin<'a>(&'a self, id: DesktopId, undo: &mut Undo<'a>, what: &str) -> Result<(), HostError> {
        undo.step(move || note(id, self.records.end(id)));
        self.records.begin(id).map_err(failed(HostErrorKind::Failed, what))
    }

    fn home(&self, spec: &DesktopSpec, image: &Image) -> Result<Home, qvd_storage::Error> {
        match &spec.home {
            Some(dir) => Home::open(dir, image),
            None => self.store.home_with(&HomeId::from(spec.id), image, &image.config().defaults.home),
        }
    }
}

/// Why machines cannot be run here at all is for whoever asked to change.
fn refused(what: &str) -> impl FnOnce(Failure) -> HostError {
    move |error| match error.downcast::<qvd_virt::Error>() {
        Ok(error) => virt(what)(*error),
        Err(error) => HostError::because(HostErrorKind::Unsupported, what, error),
    }
}

/// What the init is told, from what the image's recipe said. It gives up on a display after
/// `attach_limit`.
fn init_config(image: &Image, attach_limit: Duration) -> InitConfig {
    let config = image.config();
    let env = config.session.as_ref().map(|session| session.env.clone()).unwrap_or_default();
    let session = config.session.as_ref().map(|session| SessionConfig {
        user: config.user.name.clone(),
        uid: config.user.uid,
        gid: config.user.gid,
        home: config.user.home(),
        command: session.command.clone(),
        autostart: session.autostart.clone(),
        geometry: session.geometry,
        head_linger_s: session.head_linger_s,
        attach_within_s: u32::try_from(attach_limit.as_secs()).unwrap_or(u32::MAX),
    });
    InitConfig { version: VERSION, env, services: config.services.clone(), session, name_servers: Vec::new() }
}
