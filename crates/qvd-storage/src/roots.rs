//! The roots of a store: several back ends side by side, each in a directory
//! of its name.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use qvd_core::{Digest, RootPolicy};

use crate::{Backends, BaseTree, Error, Place, Root, RootBackend, RootId, RootOptions, fsio, trash::Trash};

#[derive(Debug)]
pub(crate) struct Roots {
    dir: PathBuf,
    known: Backends,
    default: String,
    open: Mutex<BTreeMap<String, Arc<dyn RootBackend>>>,
    trash: Arc<Trash>,
}

impl Roots {
    /// Opens the directory and throws away what was being made in it when a
    /// process was killed.
    pub(crate) fn open(dir: &Path, known: Backends, trash: Arc<Trash>) -> Result<Self, Error> {
        fsio::ensure_private_dir(dir).map_err(Error::io("use", dir))?;
        let default = Backends::DEFAULT.to_owned();
        let roots = Self { dir: dir.to_path_buf(), known, default, open: Mutex::default(), trash };
        for name in roots.in_use()? {
            roots.trash.take_temporary(&roots.dir.join(name))?;
        }
        Ok(roots)
    }

    pub(crate) fn set_default(&mut self, name: &str) -> Result<(), Error> {
        self.known.factory(name)?;
        name.clone_into(&mut self.default);
        Ok(())
    }

    pub(crate) fn default_name(&self) -> &str {
        &self.default
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &'static str> + '_ {
        self.known.names()
    }

    /// The back end of this name, opened at its first use.
    pub(crate) fn backend(&self, name: &str) -> Result<Arc<dyn RootBackend>, Error> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(backend) = open.get(name) {
            return Ok(Arc::clone(backend));
        }
        let factory = self.known.factory(name)?;
        let backend = Arc::from(factory(Place::below(&self.dir.join(name), Arc::clone(&self.trash))?)?);
        open.insert(name.to_owned(), Arc::clone(&backend));
        Ok(backend)
    }

    /// Makes a root or finds it: by the back end that has it already, or else
    /// the one that is asked for, or else the default.
    pub(crate) fn create(
        &self,
        by: Option<&str>,
        base: &BaseTree,
        id: &RootId,
        options: &RootOptions,
    ) -> Result<Box<dyn Root>, Error> {
        let wanted = by.unwrap_or(&self.default);
        for name in self.in_use()? {
            let backend = self.backend(&name)?;
            match backend.find(id)? {
                None => {}
                Some(policy) if policy == options.policy => return backend.create(base, id, options),
                // The wanted one knows best what to make of its own.
                Some(_) if name == wanted => {}
                Some(_) => backend.remove(id)?,
            }
        }
        self.backend(wanted)?.create(base, id, options)
    }

    /// What is to become of a root at its desktop's stop, if it is there.
    pub(crate) fn find(&self, id: &RootId) -> Result<Option<RootPolicy>, Error> {
        for name in self.in_use()? {
            if let Some(policy) = self.backend(&name)?.find(id)? {
                return Ok(Some(policy));
            }
        }
        Ok(None)
    }

    pub(crate) fn remove(&self, id: &RootId) -> Result<(), Error> {
        self.in_use()?.iter().try_for_each(|name| self.backend(name)?.remove(id))
    }

    pub(crate) fn all(&self) -> Result<Vec<(RootId, RootPolicy)>, Error> {
        let mut found = Vec::new();
        for name in self.in_use()? {
            found.append(&mut self.backend(&name)?.roots()?);
        }
        found.sort_by(|(one, _), (other, _)| one.cmp(other));
        Ok(found)
    }

    /// Lets every back end forget bases that are of no more use. What goes wrong is
    /// tried again at the next open.
    pub(crate) fn forget_bases(&self, gone: &dyn Fn(Digest) -> bool) -> Result<(), Error> {
        for name in self.in_use()? {
            if let Err(error) = self.backend(&name).and_then(|backend| backend.forget_bases(gone)) {
                tracing::warn!(back_end = %name, %error, "bases of no more use left behind");
            }
        }
        Ok(())
    }

    /// The back ends that were ever used here.
    fn in_use(&self) -> Result<Vec<String>, Error> {
        let io = Error::io("read", &self.dir);
        let entries = fs::read_dir(&self.dir).and_then(Iterator::collect::<io::Result<Vec<_>>>).map_err(io)?;
        let mut found = Vec::new();
        for entry in entries {
            match entry.file_name().into_string() {
                Ok(name) if self.known.factory(&name).is_ok() => found.push(name),
                name => tracing::warn!(?name, "no back end of this name is known; its roots are left alone"),
            }
        }
        Ok(found)
    }
}
