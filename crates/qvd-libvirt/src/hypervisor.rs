//! A connection, and the domains of one installation on it.

use std::sync::Arc;

use qvd_core::{DesktopId, Instance};
use qvd_virt::vm::VmSpec;
use virt::{connect::Connect, domain::Domain, error::ErrorNumber};
use virt_sys::{VIR_DOMAIN_DEFINE_VALIDATE, VIR_DOMAIN_START_PAUSED};

use crate::{
    DomainRecord, Error, Files, Kind, LibvirtVm, domain_xml,
    events::{self, Changes},
    machine,
};

/// A libvirt, local or far away, and the domains of one installation there.
#[derive(Debug)]
pub struct Libvirt {
    uri: String,
    connect: Connect,
    changes: Arc<Changes>,
    kind: Kind,
    instance: Instance,
}

impl Libvirt {
    /// Connects to what `uri` names: `qemu:///system`, `test:///default`,
    /// `xen:///system`, or any other that this libvirt knows. Starts a thread that
    /// hears libvirt's events, once in a process.
    ///
    /// # Errors
    /// libvirt does not, in its own words.
    pub fn connect(uri: &str, instance: Instance) -> Result<Self, Error> {
        if uri.contains('\0') {
            return Err(Error::Invalid { what: format!("connection {uri:?}"), reason: "it contains a NUL" });
        }
        let op = || format!("connect to `{uri}`");
        events::run().map_err(|why| Error::Libvirt { op: op(), source: why.into() })?;
        let connect = Connect::open(Some(uri)).map_err(failed(op()))?;
        let changes = Arc::default();
        events::subscribe(&connect, &changes).map_err(failed(op()))?;
        let kind = match connect.get_type().map_err(failed(op()))?.as_str() {
            "QEMU" => Kind::Qemu,
            other => Kind::Other(other.to_ascii_lowercase()),
        };
        Ok(Self { uri: uri.to_owned(), connect, changes, kind, instance })
    }

    /// What runs the domains there.
    #[must_use]
    pub const fn kind(&self) -> &Kind {
        &self.kind
    }

    /// Name of a desktop's domain; the same for ever.
    #[must_use]
    pub fn name(&self, id: DesktopId) -> String {
        self.instance.link_name(id)
    }

    /// Defines and starts a domain. Its processors stand still until
    /// [`LibvirtVm::resume`].
    ///
    /// The descriptors of `spec` are closed once libvirt has opened the same files by their
    /// names; a tap has to stay by itself for that (`qvd_sys::tap::keep`).
    ///
    /// # Errors
    /// The specification is wrong, libvirt has nothing like it, or refuses; nothing is left.
    pub fn start(&self, mut spec: VmSpec) -> Result<LibvirtVm, Error> {
        let (id, name) = (spec.id, self.name(spec.id));
        self.clear(id, &name)?;
        let files = Files::make(&spec)?;
        let undo = |error| {
            if let Err(left) = Files::remove(&spec.dir) {
                tracing::warn!(desktop = %id, error = %left, "files left behind");
            }
            error
        };
        let xml = domain_xml(&name, &self.kind, &spec, &files).map_err(undo)?;
        // Only one can hold a tap.
        spec.nics.clear();
        let define = || {
            Domain::define_xml_flags(&self.connect, &xml, VIR_DOMAIN_DEFINE_VALIDATE)
                .map_err(failed(format!("define domain `{name}`")))
        };
        let domain = define().map_err(undo)?;
        let mut vm = LibvirtVm::new(id, name.clone(), domain, Arc::clone(&self.changes), spec.dir.clone(), true);
        match self.begin(vm.domain()) {
            Ok(()) => Ok(vm),
            Err(source) => {
                let error = failed(format!("start domain `{name}`"))(source);
                vm.close()?;
                Err(error)
            }
        }
    }

    /// Starts a domain that stands still. Drivers other than QEMU's may not have
    /// that in one step.
    fn begin(&self, domain: &Domain) -> Result<(), virt::error::Error> {
        match domain.create_with_flags(VIR_DOMAIN_START_PAUSED) {
            Err(_) if self.kind != Kind::Qemu => {
                domain.create()?;
                domain.suspend().map(drop)
            }
            started => started.map(drop),
        }
    }

    /// Removes the definition of a domain that does not run any more.
    fn clear(&self, id: DesktopId, name: &str) -> Result<(), Error> {
        let Some(domain) = self.find(name)? else { return Ok(()) };
        if domain.is_active().map_err(failed(format!("look at domain `{name}`")))? {
            return Err(Error::Busy(id));
        }
        machine::undefine(&domain, name)
    }

    fn find(&self, name: &str) -> Result<Option<Domain>, Error> {
        match Domain::lookup_by_name(&self.connect, name) {
            Ok(domain) => Ok(Some(domain)),
            Err(error) if error.code() == ErrorNumber::NoDomain => Ok(None),
            Err(error) => Err(failed(format!("look for domain `{name}`"))(error)),
        }
    }

    /// Takes over a domain that an earlier life of this process started. `None`:
    /// it does not run any more; what was left of it is removed.
    ///
    /// # Errors
    /// libvirt does not answer.
    pub fn adopt(&self, record: &DomainRecord) -> Result<Option<LibvirtVm>, Error> {
        let name = self.name(record.id());
        let Some(domain) = self.find(&name)? else { return Ok(None) };
        let runs = domain.is_active().map_err(failed(format!("look at domain `{name}`")))?;
        let same = domain.get_uuid_string().is_ok_and(|uuid| uuid == record.uuid());
        let changes = Arc::clone(&self.changes);
        let mut vm = LibvirtVm::new(record.id(), name, domain, changes, record.dir().to_owned(), false);
        if !same {
            // Another's by now.
            vm.leave();
            return Ok(None);
        }
        if !runs {
            vm.close()?;
            return Ok(None);
        }
        vm.look()?;
        Ok(Some(vm))
    }

    /// Removes every domain of this installation but those of `keep`, whether
    /// they run or not; says how many.
    ///
    /// # Errors
    /// The first that cannot be removed; the others have been.
    pub fn sweep(&self, keep: &[DesktopId]) -> Result<usize, Error> {
        let kept: Vec<_> = keep.iter().map(|&id| self.name(id)).collect();
        let prefix = format!("{}-", self.instance.bridge_name());
        let domains =
            self.connect.list_all_domains(0).map_err(failed(format!("list the domains of `{}`", self.uri)))?;
        let (mut swept, mut outcome) = (0, Ok(()));
        for domain in domains {
            let name = domain.get_name().map_err(failed("read the name of a domain"))?;
            let ours = name.strip_prefix(&prefix).is_some_and(|id| id.parse::<DesktopId>().is_ok());
            if !ours || kept.contains(&name) {
                continue;
            }
            match machine::destroy(&domain, &name).and_then(|()| machine::undefine(&domain, &name)) {
                Ok(()) => swept += 1,
                Err(error) if outcome.is_ok() => outcome = Err(error),
                Err(_) => {}
            }
        }
        outcome.map(|()| swept)
    }
}

impl Drop for Libvirt {
    fn drop(&mut self) {
        if let Err(error) = self.connect.close() {
            tracing::warn!(uri = self.uri, %error, "connection left open");
        }
    }
}

/// Says what was tried; libvirt's words are the cause.
pub(crate) fn failed(op: impl Into<String>) -> impl FnOnce(virt::error::Error) -> Error {
    let op = op.into();
    move |error| Error::Libvirt { op, source: error.message().to_owned().into() }
}
