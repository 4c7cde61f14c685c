//! Whose desktops share pages with one another: one tenant's at a time.
//!
//! The kernel merges the pages of all that let it, whosever they are, and what is
//! shared can be told by the time of a write. A desktop that was let share goes on as
//! long as it runs, also after its node was killed: so whose they are is written
//! down first, and stays until none of them is left.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard},
};

use qvd_core::{DesktopId, TenantName};
use qvd_virt::{Error, memory::Tenant};

use super::lock;

#[derive(Debug)]
pub(super) struct Sharing {
    note: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Every tenant that was seen; the place is its number.
    tenants: Vec<TenantName>,
    now: Option<TenantName>,
    /// Desktops that were let share, and run.
    let_share: BTreeMap<DesktopId, TenantName>,
    /// Whether nobody else is let.
    closed: bool,
}

impl Sharing {
    /// As an earlier life of this node left it. What its note says cannot be
    /// understood means that nobody knows whose desktops share.
    pub(super) fn open(note: &Path) -> Result<Self, Error> {
        let failed = |source| Error::Io { op: format!("read `{}`", note.display()), source };
        let now: Option<TenantName> = match fs::read_to_string(note) {
            Ok(text) => Some(text.parse().map_err(|error| failed(io::Error::other(error)))?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(failed(error)),
        };
        let state = State { tenants: now.iter().cloned().collect(), now, ..State::default() };
        Ok(Self { note: note.to_owned(), state: Mutex::new(state) })
    }

    /// Nobody's, where pages are not merged.
    pub(super) fn none(note: &Path) -> Self {
        Self { note: note.to_owned(), state: Mutex::new(State { closed: true, ..State::default() }) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// What the decision knows a tenant by.
    pub(super) fn number(&self, tenant: &TenantName) -> Tenant {
        self.state().number(tenant)
    }

    /// Whose desktops share, if any were let.
    pub(super) fn now(&self) -> Option<Tenant> {
        let mut state = self.state();
        let now = state.now.clone()?;
        Some(state.number(&now))
    }

    /// From now on those of `tenant`, unless others are left that were let share.
    pub(super) fn choose(&self, tenant: Option<Tenant>) -> Result<(), Error> {
        let mut state = self.state();
        let chosen = tenant.and_then(|Tenant(number)| state.tenants.get(usize::try_from(number).ok()?)).cloned();
        chosen.map_or(Ok(()), |chosen| self.become_of(&mut state, chosen).map(drop))
    }

    /// Lets a desktop share its pages, if none of another tenant does. With `first`, its
    /// tenant is chosen if nobody's desktops are left that share.
    pub(super) fn let_share(&self, id: DesktopId, tenant: &TenantName, first: bool) -> Result<bool, Error> {
        let mut state = self.state();
        let free = first || state.now.as_ref() == Some(tenant);
        if state.closed || !free || !self.become_of(&mut state, tenant.clone())? {
            return Ok(false);
        }
        state.let_share.insert(id, tenant.clone());
        Ok(true)
    }

    /// Takes note of a desktop of an earlier life that shares its pages, or may.
    pub(super) fn found(&self, id: DesktopId, tenant: &TenantName, shares: bool) {
        let mut state = self.state();
        if shares || state.now.as_ref() == Some(tenant) {
            state.let_share.insert(id, tenant.clone());
        }
    }

    /// Forgets a desktop that does not run any more.
    pub(super) fn forget(&self, id: DesktopId) {
        self.state().let_share.remove(&id);
    }

    /// Whether it is `tenant`'s now.
    fn become_of(&self, state: &mut State, tenant: TenantName) -> Result<bool, Error> {
        if state.let_share.values().any(|other| *other != tenant) {
            return Ok(false);
        }
        if state.now.as_ref() != Some(&tenant) {
            fs::write(&self.note, tenant.to_string())
                .map_err(|source| Error::Io { op: format!("write `{}`", self.note.display()), source })?;
            state.now = Some(tenant);
        }
        Ok(true)
    }

    /// Forgets it, once no desktop is left.
    pub(super) fn close(&self) -> Result<(), Error> {
        let mut state = self.state();
        (state.now, state.closed) = (None, true);
        match fs::remove_file(&self.note) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Error::Io { op: format!("remove `{}`", self.note.display()), source: error })
            }
            _ => Ok(()),
        }
    }
}

impl State {
    fn number(&mut self, tenant: &TenantName) -> Tenant {
        let place = self.tenants.iter().position(|seen| seen == tenant).unwrap_or_else(|| {
            self.tenants.push(tenant.clone());
            self.tenants.len() - 1
        });
        // One for each tenant of a node: as many names do not fit in its memory.
        Tenant(u32::try_from(place).unwrap_or(u32::MAX))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn tenants() -> [TenantName; 2] {
        ["school", "office"].map(|name| name.parse().unwrap())
    }

    fn id(number: u32) -> DesktopId {
        DesktopId::new(number).unwrap()
    }

    #[test]
    fn it_stays_with_one_tenant_also_in_the_next_life() {
        let dir = tempfile::tempdir().unwrap();
        let note = dir.path().join("note");
        let [school, office] = tenants();
        let first = Sharing::open(&note).unwrap();
        let (one, other) = (first.number(&school), first.number(&office));
        assert_ne!(one, other);
        assert_eq!((first.now(), first.number(&school)), (None, one));
        first.choose(Some(other)).unwrap();
        assert!(first.let_share(id(1), &office, false).unwrap() && !first.let_share(id(2), &school, false).unwrap());
        // Its process is killed.
        drop(first);
        let second = Sharing::open(&note).unwrap();
        second.found(id(1), &office, true);
        assert!(!second.let_share(id(2), &school, true).unwrap());
        assert_ne!(second.now(), Some(second.number(&school)));
        second.close().unwrap();
        assert!(!second.let_share(id(3), &office, true).unwrap() && !note.exists());
        fs::write(&note, "Not a name!").unwrap();
        assert!(Sharing::open(&note).is_err());
    }

    #[test]
    fn another_tenant_follows_when_none_is_left_that_shares() {
        let dir = tempfile::tempdir().unwrap();
        let [school, office] = tenants();
        let sharing = Sharing::open(&dir.path().join("note")).unwrap();
        assert!(!sharing.let_share(id(1), &school, false).unwrap(), "nobody was chosen");
        assert!(sharing.let_share(id(1), &school, true).unwrap());
        assert!(!sharing.let_share(id(2), &office, true).unwrap());
        // Nor does a decision that has not seen that one yet let others.
        sharing.choose(Some(sharing.number(&office))).unwrap();
        assert_eq!(sharing.now(), Some(sharing.number(&school)));
        sharing.forget(id(1));
        assert!(sharing.let_share(id(2), &office, true).unwrap());
        assert!(!sharing.let_share(id(1), &school, true).unwrap());
        let none = Sharing::none(&dir.path().join("none"));
        assert!(!none.let_share(id(1), &school, true).unwrap());
    }
}
