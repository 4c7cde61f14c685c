//! A desktop in a virtual machine: booted, or born from a template.

use std::{net::IpAddr, path::PathBuf, sync::Arc};

use qvd_core::{Bytes, DesktopId, DesktopSpec, RootPolicy, StartStep, UidRange, Virtualizer};
use qvd_guest::{BootConfig, HOME_SERIAL, Identity, InitConfig, ROOT_SERIAL, Writable};
use qvd_net::{PortPlace, TapSpec};
use qvd_storage::{Disk, GuestBase, Image};
use qvd_virt::vm::{NicSpec, Qemu, Slot, Template, Vm, VmSpec};

use super::{Made, Start, Undo, init_config, refused};
use crate::{
    HostError, HostErrorKind, Timings,
    desktop::{Parts, failed, micros, net, note, storage, virt},
    governor::MACHINE_STEP,
    guest::Guest,
    machine::{Birth, Boot, Failure, InVm, Kind, Ready},
};

/// Number of the machine that is to become a template: there is one at a time, and
/// no desktop gets it before ten million others have. Those above try KVM.
const TEMPLATE: u32 = DesktopId::MAX - 1;

/// Number of the clone that stands ready, or did, with the first range of ids; others
/// have those below. Nobody else has the range for as long as such a machine lives.
const READY: u32 = TEMPLATE - 1;

impl Parts {
    pub(super) fn start_vm<'a>(
        &'a self,
        start: &Start<'_>,
        ready: Option<Ready>,
        guest: &Guest,
        undo: &mut Undo<'a>,
        step: &mut dyn FnMut(StartStep),
    ) -> Result<Made, HostError> {
        let Start { spec, image, began, what, .. } = start;
        let id = spec.id;
        let mut timings = Timings::default();
        if let Some(home) = &spec.home {
            let reason = format!("{what}: a machine keeps its home on a disk of its own, not in `{}`", home.display());
            return Err(HostError::new(HostErrorKind::Unsupported, reason));
        }
        if !spec.devices.is_empty() || spec.calls.is_some() {
            let reason = format!("{what}: a machine has devices and system calls of its own, not its host's");
            return Err(HostError::new(HostErrorKind::Unsupported, reason));
        }
        let base = self.store.guest_base(image).map_err(storage(what))?;
        let born = self.is_born(spec, image);
        if spec.root == RootPolicy::Volatile {
            undo.step(move || note(id, self.store.remove_guest_root(id)));
        }
        let disks = self.guest_disks(spec, image, born).map_err(storage(what))?;
        timings.root_us = micros(*began);

        step(StartStep::Confinement);
        self.begin(id, undo, what)?;
        let listener = guest.listen().map_err(|e| e.into_host_error((*what).to_owned()))?;

        step(StartStep::Port);
        let port_began = std::time::Instant::now();
        let policy = self.networks.allowed(&spec.tenant, &spec.net);
        let (port, nic, network) = if policy.port {
            let (port, tap, network) = self.networks.with(&spec.tenant, |network| {
                let tap = TapSpec { desktop: id, address: spec.address, policy, header: true };
                let (port, tap) = network.attach_tap(&tap).map_err(net(what))?;
                let place = port.place();
                Ok((port, tap, place))
            })?;
            let nic = NicSpec { tap, mac: port.mac().octets() };
            (Some(port), Some(nic), Some(place_of(network)))
        } else {
            (None, None, None)
        };
        timings.port_us = micros(port_began);

        step(StartStep::Init);
        let identity = Identity::fresh(&*spec.hostname, network);
        let identity = identity.map_err(failed(HostErrorKind::Failed, what))?;
        let vm = if born {
            let clone = match ready {
                Some(ready) => self.taken(start, ready)?,
                None => self.clone_of(start, &base)?,
            };
            let clone = plugged(clone, &disks, nic, what)?;
            InVm::born(clone, disks, Birth { identity: &identity, listener, guest })
        } else {
            let (qemu, mut machine) = self
                .planned(&Kind::of(spec), image, &base, (id, start.ids), self.records.dir(id))
                .map_err(refused(what))?;
            for (serial, disk) in [ROOT_SERIAL, HOME_SERIAL].into_iter().zip(&disks) {
                machine.disks.push(InVm::disk(serial, &**disk).map_err(failed(HostErrorKind::Failed, what))?);
            }
            machine.nics.extend(nic);
            let vm = qemu.start(machine).map_err(virt(what))?;
            let home = Some(image.config().user.home());
            let config = boot_config(identity, Writable::Disk, home, init_config(image, self.head_limit(spec)));
            InVm::boot(vm, disks, Boot { config: &config, listener })
        };
        let vm = vm.map_err(failed(HostErrorKind::Failed, what))?;
        timings.start_us = micros(*began);
        Ok((Box::new(vm), port, timings))
    }

    /// Whether a desktop's machine is born from a template.
    fn is_born(&self, spec: &DesktopSpec, image: &Image) -> bool {
        let config = image.config();
        self.machines.templates(config.defaults.machine)
            && spec.root == RootPolicy::Volatile
            && config.session.is_some()
    }

    /// A clone that stood ready, for a desktop that can be one.
    pub(super) fn take_ready(&self, spec: &DesktopSpec, image: &Image) -> Option<Ready> {
        if spec.virtualizer != Virtualizer::Qemu || !self.is_born(spec, image) {
            return None;
        }
        let (ready, dead) = self.machines.born.take(&Kind::of(spec));
        for one in dead {
            self.discard_or_log(one);
        }
        ready
    }

    /// What stood ready becomes the desktop's. It keeps its own number.
    fn taken(&self, start: &Start<'_>, ready: Ready) -> Result<Vm, HostError> {
        let Start { spec, what, .. } = start;
        let mut vm = ready.vm;
        vm.move_sockets(&self.records.dir(spec.id)).map_err(virt(what))?;
        note(spec.id, self.records.end_ready(vm.id()));
        tracing::info!(desktop = %spec.id, machine = %vm.id(), "a machine that stood ready was taken");
        Ok(vm)
    }

    /// Makes a clone that stands ready for whoever comes.
    pub(crate) fn make_ready(&self, kind: &Kind, template: &Arc<Template>) -> Result<Ready, Failure> {
        let image = self.store.image(kind.image)?;
        let base = self.store.guest_base(&image)?;
        let mut undo = Undo::default();
        let uid_slot = self.ranges.take()?;
        undo.step(move || self.ranges.free(uid_slot));
        let id = DesktopId::new(READY.saturating_sub(uid_slot))?;
        let dir = self.records.begin_ready(id)?;
        undo.step(move || note(id, self.records.end_ready(id)));
        let ids = UidRange::of_slot(uid_slot)?;
        let (qemu, machine) = self.planned(kind, &image, &base, (id, ids), dir)?;
        let vm = qemu.start_clone(machine, template, &kind.tenant.to_string()).inspect_err(|error| {
            if matches!(error, qvd_virt::Error::Invalid { .. }) {
                self.machines.born.forget(kind, template);
            }
        })?;
        undo.keep();
        Ok(Ready { vm, uid_slot })
    }

    /// Ends a clone that stood ready.
    pub(crate) fn discard(&self, ready: Ready) -> Result<(), HostError> {
        let Ready { mut vm, uid_slot } = ready;
        let id = vm.id();
        let what = format!("cannot end machine {id}, which stood ready");
        // Whose processes may run has its range of ids still.
        vm.close().map_err(virt(&what))?;
        self.ranges.free(uid_slot);
        self.records.end_ready(id).map_err(failed(HostErrorKind::Failed, what))
    }

    pub(crate) fn discard_or_log(&self, ready: Ready) {
        if let Err(error) = self.discard(ready) {
            tracing::warn!(error = &error as &dyn std::error::Error, "a machine is left");
        }
    }

    /// What starts a machine of a kind, under this number and range, and what it is.
    /// Its sockets are to be in `dir`.
    fn planned(
        &self,
        kind: &Kind,
        image: &Image,
        base: &GuestBase,
        (id, ids): (DesktopId, UidRange),
        dir: PathBuf,
    ) -> Result<(Arc<Qemu>, VmSpec), Failure> {
        let (qemu, mut machine) = self.machines.plan(id, ids, image, base, dir)?;
        machine.limits = kind.limits();
        machine.limits.memory = Bytes::new(machine.limits.memory.get().next_multiple_of(MACHINE_STEP));
        Ok((qemu, machine))
    }

    /// A clone that stands still. A template that does not fit any more, as after an
    /// update of QEMU, is made again once.
    fn clone_of(&self, start: &Start<'_>, base: &GuestBase) -> Result<Vm, HostError> {
        let Start { spec, image, what, .. } = start;
        let config = image.config();
        let pool = self.machines.pool(config.defaults.machine);
        let tenant = spec.tenant.to_string();
        let kind = Kind::of(spec);
        let started = || -> Result<_, HostError> {
            let made = self.machines.born.of(&kind, &config.flavour, pool, || self.template(start, base));
            let template = made.map_err(refused(what))?;
            let planned = self.planned(&kind, image, base, (spec.id, start.ids), self.records.dir(spec.id));
            let (qemu, machine) = planned.map_err(refused(what))?;
            Ok((qemu.start_clone(machine, &template, &tenant), template))
        };
        let clone = match started()? {
            (Err(error @ qvd_virt::Error::Invalid { .. }), template) => {
                tracing::info!(desktop = %spec.id, %error, "the template is made again");
                self.machines.born.forget(&kind, &template);
                started()?.0
            }
            (clone, _) => clone,
        };
        clone.map_err(virt(what))
    }

    /// Boots a machine of this kind until its session is up, ends the session's
    /// programs, and saves it.
    fn template(&self, start: &Start<'_>, base: &GuestBase) -> Result<Template, Failure> {
        let Start { spec, image, .. } = start;
        let id = DesktopId::new(TEMPLATE)?;
        let mut undo = Undo::default();
        let slot = self.ranges.take()?;
        undo.step(move || self.ranges.free(slot));
        self.begin(id, &mut undo, "cannot make a template")?;
        let guest = Guest::at(self.records.socket(id));
        let listener = guest.listen()?;
        let ids = UidRange::of_slot(slot)?;
        let (qemu, machine) = self.planned(&Kind::of(spec), image, base, (id, ids), self.records.dir(id))?;
        let memory = machine.limits.memory;
        let (vm, mold) = qemu.start_template(machine, &spec.tenant.to_string())?;
        let writable = Writable::Memory { bytes: memory.get() / 2 };
        let config =
            boot_config(Identity::fresh("template", None)?, writable, None, init_config(image, self.head_limit(spec)));
        let vm = InVm::boot(vm, Vec::new(), Boot { config: &config, listener })?;
        guest.wait_session(self.session_limit(spec))?;
        let template = mold.save(vm.into_template(&guest)?)?;
        tracing::info!(tenant = %spec.tenant, image = %spec.image, "a template was made");
        Ok(template)
    }

    /// What a machine writes to its system, unless that is its memory, and its home.
    pub(crate) fn guest_disks(
        &self,
        spec: &DesktopSpec,
        image: &Image,
        born: bool,
    ) -> Result<Vec<Box<dyn Disk>>, qvd_storage::Error> {
        let size = self.machines.disk();
        let mut disks = Vec::new();
        if !born {
            disks.push(self.store.guest_root(image, spec.id, spec.root, size)?);
        }
        disks.push(self.store.guest_home(spec.id, size)?);
        Ok(disks)
    }
}

/// A port's place in the network, as a guest is told.
fn place_of(port: PortPlace) -> qvd_guest::Network {
    let PortPlace { address, prefix, gateway, ipv6, name_servers: (four, six), .. } = port;
    let name_servers = six.map(IpAddr::V6).into_iter().chain(four.map(IpAddr::V4)).collect();
    let way_out = gateway.is_some();
    let ipv6 = ipv6.map(|(address, router)| qvd_guest::Network6 { address, router, way_out });
    qvd_guest::Network { address, prefix, gateway, ipv6, name_servers }
}

/// A clone that stands still gets its home and its interface.
fn plugged(mut clone: Vm, disks: &[Box<dyn Disk>], nic: Option<NicSpec>, what: &str) -> Result<Vm, HostError> {
    for disk in disks {
        let disk = InVm::disk(HOME_SERIAL, &**disk).map_err(failed(HostErrorKind::Failed, what))?;
        clone.plug_disk(Slot::First, &disk).map_err(virt(what))?;
    }
    if let Some(nic) = nic {
        clone.plug_nic(Slot::Second, &nic).map_err(virt(what))?;
    }
    Ok(clone)
}

fn boot_config(identity: Identity, writable: Writable, home: Option<String>, init: InitConfig) -> BootConfig {
    BootConfig { identity, base: qvd_guest::Base::Memory, writable, home, init }
}
