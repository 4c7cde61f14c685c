//! Whose desktops share pages with one another: one tenant's at a time.
//!
//! The kernel merges the pages of all that let it, whosever they are, and what is
//! shared can be told by the time of a write. A desktop that was let share goes on as
//! long as it runs, also after its node was killed: so whose they are is written
//! down first, and stays until none of them is left.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use qvd_core::TenantName;
use qvd_virt::{Error, memory::Tenant};

#[derive(Debug)]
pub(super) struct Sharing {
    note: PathBuf,
    /// Every tenant that was seen; the place is its number.
    tenants: Vec<TenantName>,
    now: Option<TenantName>,
}

impl Sharing {
    /// As an earlier life of this node left it. What its note says cannot be
    /// understood means that nobody knows whose desktops share.
    pub(super) fn open(note: &Path) -> Result<Self, Error> {
        let failed = |source| Error::Io { op: format!("read `{}`", note.display()), source };
        let now = match fs::read_to_string(note) {
            Ok(text) => Some(text.parse().map_err(|error| failed(io::Error::other(error)))?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(failed(error)),
        };
        Ok(Self { note: note.to_owned(), tenants: now.iter().cloned().collect(), now })
    }

    /// Nobody's, where pages are not merged.
    pub(super) fn none(note: &Path) -> Self {
        Self { note: note.to_owned(), tenants: Vec::new(), now: None }
    }

    /// What the decision knows a tenant by.
    pub(super) fn number(&mut self, tenant: &TenantName) -> Tenant {
        let place = self.tenants.iter().position(|seen| seen == tenant).unwrap_or_else(|| {
            self.tenants.push(tenant.clone());
            self.tenants.len() - 1
        });
        // One for each tenant of a node: as many names do not fit in its memory.
        Tenant(u32::try_from(place).unwrap_or(u32::MAX))
    }

    /// Whose desktops share, if any were let.
    pub(super) fn now(&mut self) -> Option<Tenant> {
        let now = self.now.clone()?;
        Some(self.number(&now))
    }

    pub(super) fn is_with(&self, tenant: &TenantName) -> bool {
        self.now.as_ref() == Some(tenant)
    }

    /// From now on those of `tenant`, of whom the decision says that no others are
    /// left.
    pub(super) fn choose(&mut self, tenant: Option<Tenant>) -> Result<(), Error> {
        let chosen = tenant.and_then(|Tenant(number)| self.tenants.get(usize::try_from(number).ok()?));
        if let Some(chosen) = chosen.filter(|chosen| !self.is_with(chosen)).cloned() {
            fs::write(&self.note, chosen.to_string())
                .map_err(|source| Error::Io { op: format!("write `{}`", self.note.display()), source })?;
            self.now = Some(chosen);
        }
        Ok(())
    }

    /// Forgets it, once no desktop is left.
    pub(super) fn close(&mut self) -> Result<(), Error> {
        self.now = None;
        match fs::remove_file(&self.note) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Error::Io { op: format!("remove `{}`", self.note.display()), source: error })
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn it_stays_with_one_tenant_also_in_the_next_life() {
        let dir = tempfile::tempdir().unwrap();
        let note = dir.path().join("note");
        let [school, office]: [TenantName; 2] = ["school", "office"].map(|name| name.parse().unwrap());
        let mut first = Sharing::open(&note).unwrap();
        let (one, other) = (first.number(&school), first.number(&office));
        assert_ne!(one, other);
        assert_eq!((first.now(), first.number(&school)), (None, one));
        first.choose(Some(other)).unwrap();
        assert!(first.is_with(&office) && !first.is_with(&school));
        // Its process is killed.
        drop(first);
        let mut second = Sharing::open(&note).unwrap();
        assert!(second.is_with(&office));
        assert_ne!(second.now(), Some(second.number(&school)));
        second.close().unwrap();
        assert!(!second.is_with(&office) && !note.exists());
        fs::write(&note, "Not a name!").unwrap();
        assert!(Sharing::open(&note).is_err());
    }
}
