use std::{collections::BTreeMap, sync::MutexGuard};

use qvd_core::DesktopId;
use rustix::io::Errno;

use crate::{
    Error, Network, Port,
    access::Access,
    filter::Confined,
    identity::Identity,
    links,
    network::{Inner, lock},
};

/// A port that is open, as much of it as is needed to confine it anew.
#[derive(Debug, Clone)]
pub(crate) struct Record {
    pub(crate) identity: Identity,
    pub(crate) access: Access,
    pub(crate) index: u32,
    pub(crate) is_tap: bool,
}

/// How a machine's port differs that nothing keeps giants from.
pub(crate) const GIANTS_PASS: &str = "frames longer than the link pass";

impl Record {
    const fn confined(&self) -> Confined<'_> {
        Confined { identity: &self.identity, index: self.index, access: &self.access }
    }
}

/// What [`Network::mend`] found and did.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Mended {
    /// What differed from what had been loaded; none, and all is as it was.
    pub differed: Option<String>,
    /// How many ports were cut until their rules were back.
    pub cut: usize,
}

impl Network {
    /// Compares all rules, and the entries of every port that is open, with what
    /// this process has loaded. Where anything differs, as after
    /// `nft flush ruleset`, every port is cut first, then all is loaded anew in
    /// one transaction and read back, and only then are the ports raised again.
    ///
    /// # Errors
    /// It could not be compared or not be put back; the ports are cut then, and
    /// stay so until a later call succeeds.
    pub fn mend(&self) -> Result<Mended, Error> {
        self.inner().mend()
    }

    /// Takes the rules of some of its ports away, in one transaction: nothing of
    /// them passes until [`Network::unblock`]. Their links and addresses stay.
    ///
    /// # Errors
    /// The rules could not be removed; all are still in force.
    pub fn block(&self, ports: &[&Port]) -> Result<(), Error> {
        let mut open = self.inner().ports();
        let confined: Vec<_> = ports.iter().map(|port| port.confined()).collect();
        self.inner().filter.remove(&confined)?;
        for port in ports {
            open.remove(&port.desktop());
        }
        Ok(())
    }

    /// Gives blocked ports their rules again, in one transaction, and reads them
    /// back.
    ///
    /// # Errors
    /// They could not be added, or the kernel does not show them; the ports stay
    /// as they are.
    pub fn unblock(&self, ports: &[&Port]) -> Result<(), Error> {
        let confined: Vec<_> = ports.iter().map(|port| port.confined()).collect();
        if let Some((place, differs)) = self.inner().filter.confine(&confined)? {
            let object = ports.get(place).map_or_else(|| self.bridge_name(), |port| port.link().to_owned());
            return Err(Error::NotConfined { object, differs });
        }
        ports.iter().for_each(|port| port.register());
        Ok(())
    }
}

impl Inner {
    fn ports(&self) -> MutexGuard<'_, BTreeMap<DesktopId, Record>> {
        lock(&self.open)
    }

    pub(crate) fn mend(&self) -> Result<Mended, Error> {
        // Whoever opens or closes a port meanwhile waits.
        let ports = self.ports();
        let records: Vec<_> = ports.values().collect();
        let confined: Vec<_> = records.iter().map(|record| record.confined()).collect();
        let mut was_cut = lock(&self.cut);
        let differed = match self.what_differs(&records, &confined) {
            Ok(None) if !*was_cut => return Ok(Mended::default()),
            Ok(None) => "the ports were cut".to_owned(),
            Ok(Some(differed)) => differed,
            Err(error) => {
                *was_cut = true;
                self.set_links(&records, links::lower)?;
                return Err(error);
            }
        };
        *was_cut = true;
        self.set_links(&records, links::lower)?;
        self.regroup_bridges()?;
        self.load()?;
        self.filter.add(&confined)?;
        for record in records.iter().filter(|record| record.is_tap) {
            self.stop_giants(record.index, &record.identity.link)?;
        }
        if let Some(differs) = self.what_differs(&records, &confined)? {
            return Err(Error::NotConfined { object: self.config.instance.bridge_name(), differs });
        }
        self.set_links(&records, links::raise)?;
        *was_cut = false;
        Ok(Mended { differed: Some(differed), cut: records.len() })
    }

    /// What differs of what does not depend on ports.
    pub(crate) fn fixed_differs(&self) -> Result<Option<String>, Error> {
        self.bridges_differ()?.map_or_else(|| self.filter.differs(), |differs| Ok(Some(differs)))
    }

    fn what_differs(&self, records: &[&Record], ports: &[Confined<'_>]) -> Result<Option<String>, Error> {
        if let Some(differs) = self.fixed_differs()? {
            return Ok(Some(differs));
        }
        for Record { index, identity, .. } in records.iter().filter(|record| record.is_tap) {
            if !self.giants_are_stopped(*index, &identity.link)? {
                return Ok(Some(format!("{}: {GIANTS_PASS}", identity.link)));
            }
        }
        let missing = self.filter.missing(ports)?;
        Ok(missing.map(|(place, lacks)| {
            let link = ports.get(place).map_or("a port", |port| &*port.identity.link);
            format!("{link}: {lacks}")
        }))
    }

    fn set_links(&self, records: &[&Record], request: impl Fn(u32) -> links::Request) -> Result<(), Error> {
        let mut route = self.route();
        for record in records {
            match route.batch(vec![request(record.index)]) {
                // Its machine or its namespace has ended.
                Err(error) if error.is(Errno::NODEV) => {}
                other => drop(other.map_err(Error::netlink("cut or raise", &*record.identity.link))?),
            }
        }
        Ok(())
    }
}
