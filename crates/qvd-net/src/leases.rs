//! Which address a desktop had, so that it has the same again.

use std::{
    collections::BTreeMap,
    net::Ipv4Addr,
    path::{Path, PathBuf},
};

use qvd_core::DesktopId;

use crate::{Error, Subnet, kept};

/// The addresses of a network's desktops, also of those that do not run. Without
/// a file none is kept.
#[derive(Debug, Default)]
pub(crate) struct Leases {
    file: Option<PathBuf>,
    by_desktop: BTreeMap<DesktopId, Ipv4Addr>,
    by_address: BTreeMap<Ipv4Addr, DesktopId>,
}

impl Leases {
    /// Reads those of `subnet`. Addresses of another are nobody's any more.
    ///
    /// # Errors
    /// The file cannot be read, or something else wrote it.
    pub(crate) fn open(file: &Path, subnet: Subnet) -> Result<Self, Error> {
        Self::read(file, |address| subnet.contains(address))
    }

    fn read(file: &Path, is_known: impl Fn(Ipv4Addr) -> bool) -> Result<Self, Error> {
        let mut leases = Self { file: Some(file.to_owned()), ..Self::default() };
        for line in kept::read(file)?.lines() {
            let parsed = line.split_once(' ').and_then(|(id, address)| Some((id.parse().ok()?, address.parse().ok()?)));
            let name = file.display().to_string();
            let (desktop, address) = parsed.ok_or_else(|| kept::unknown(line, &name, "no address of a desktop"))?;
            if is_known(address) {
                leases.insert(desktop, address);
            }
        }
        Ok(leases)
    }

    fn insert(&mut self, desktop: DesktopId, address: Ipv4Addr) {
        self.remove(desktop);
        if let Some(other) = self.by_address.insert(address, desktop) {
            self.by_desktop.remove(&other);
        }
        self.by_desktop.insert(desktop, address);
    }

    fn remove(&mut self, desktop: DesktopId) -> bool {
        let removed = self.by_desktop.remove(&desktop);
        removed.is_some_and(|address| self.by_address.remove(&address).is_some())
    }

    /// The address that a desktop had last.
    pub(crate) fn address_of(&self, desktop: DesktopId) -> Option<Ipv4Addr> {
        self.by_desktop.get(&desktop).copied()
    }

    /// Whether an address is kept for another desktop.
    pub(crate) fn is_anothers(&self, address: Ipv4Addr, desktop: DesktopId) -> bool {
        self.by_address.get(&address).is_some_and(|&by| by != desktop)
    }

    /// Keeps an address for a desktop, and for nobody else.
    ///
    /// # Errors
    /// It could not be written.
    pub(crate) fn keep(&mut self, desktop: DesktopId, address: Ipv4Addr) -> Result<(), Error> {
        let Some(file) = self.file.clone().filter(|_| self.address_of(desktop) != Some(address)) else { return Ok(()) };
        self.insert(desktop, address);
        self.write(&file)
    }

    /// Keeps none for a desktop any more.
    ///
    /// # Errors
    /// It could not be written; the next process keeps it.
    pub(crate) fn forget(&mut self, desktop: DesktopId) -> Result<(), Error> {
        let Some(file) = self.file.clone().filter(|_| self.remove(desktop)) else { return Ok(()) };
        self.write(&file)
    }

    fn write(&self, file: &Path) -> Result<(), Error> {
        let text: String = self.by_desktop.iter().map(|(desktop, address)| format!("{desktop} {address}\n")).collect();
        // A start need not wait for the disk: what the host's power takes with it is
        // who got which address in the last seconds.
        kept::write(file, &text)
    }
}

/// Keeps no address for a desktop any more in a file of a network that is not open.
///
/// # Errors
/// The file cannot be read or written, or something else wrote it.
pub fn forget_address(file: &Path, desktop: DesktopId) -> Result<(), Error> {
    Leases::read(file, |_| true)?.forget(desktop)
}
