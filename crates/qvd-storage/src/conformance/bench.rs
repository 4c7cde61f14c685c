//! What the cases of a run share.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use qvd_core::RootPolicy;

use super::{
    Effort, Suite,
    base::Base,
    report::{Checked, Failure, Seen, Step},
    tree::Tree,
};
use crate::{
    Capabilities, Capability, Deviation, Error, Factory, Place, Quota, Root, RootBackend, RootId, RootOptions,
};

pub(super) struct Bench {
    /// Shared with children that are killed on the way, by reference count: what
    /// is on another thread's stack is gone in a child.
    pub(super) site: Arc<Site>,
    pub(super) effort: Effort,
    pub(super) backend: Box<dyn RootBackend>,
    place: Place,
    pub(super) capabilities: Capabilities,
}

/// Where a run takes place.
pub(super) struct Site {
    factory: Arc<Factory>,
    dir: PathBuf,
    pub(super) base: Base,
    pub(super) small: Base,
    /// How long the background may take for its work.
    patience: Duration,
}

impl Site {
    /// A directory that is there for one case alone.
    pub(super) fn dir(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Waits until the kernel, or a thread that works in the background, has come
    /// to what `look` wants to see: there is no event for all that this asks. Says
    /// what was seen last otherwise.
    pub(super) fn settle<T>(&self, mut look: impl FnMut() -> Result<T, Failure>) -> Result<T, Failure> {
        let start = Instant::now();
        loop {
            match look() {
                Err(_) if start.elapsed() < self.patience => std::thread::park_timeout(Duration::from_millis(10)),
                done => return done,
            }
        }
    }

    /// The back end in a place of its own, as a process opens it at its start.
    pub(super) fn open(&self, name: &str) -> Result<Opened, Failure> {
        Opened::new(&*self.factory, &self.dir(name)).step("the back end can be opened")
    }
}

/// One opening of a place by the back end: what a process has of it.
pub(super) struct Opened {
    pub(super) place: Place,
    pub(super) backend: Box<dyn RootBackend>,
}

impl Opened {
    pub(super) fn new(factory: &Factory, dir: &Path) -> Result<Self, Error> {
        let place = Place::open(dir)?;
        Ok(Self { backend: factory(place.clone())?, place })
    }
}

impl Bench {
    pub(super) fn set_up(suite: &Suite, dir: &Path) -> Result<Self, Failure> {
        let base = Base::build(&dir.join("base"), suite.form)?;
        let small = Base::small(&dir.join("small"))?;
        let Opened { backend, place } =
            Opened::new(&*suite.factory, &dir.join("store")).step("the back end can be opened")?;
        let capabilities = backend.capabilities().step("the back end says what it can do")?;
        let site =
            Site { factory: Arc::clone(&suite.factory), dir: dir.to_path_buf(), base, small, patience: suite.patience };
        Ok(Self { site: Arc::new(site), effort: suite.effort, backend, place, capabilities })
    }

    /// Returns when nothing is done in the background any more: a child that is made while
    /// that holds a lock of this process would wait for it for ever.
    pub(super) fn rest(&self) -> Result<(), Failure> {
        self.place.trash().empty().step("the trash can be emptied")
    }

    pub(super) fn declared(&self) -> &'static [Deviation] {
        self.backend.deviations()
    }

    pub(super) fn deviates(&self, deviation: Deviation) -> bool {
        self.declared().contains(&deviation)
    }

    /// Why the back end does not offer something; nothing if it does.
    pub(super) fn lacks(&self, capability: Capability) -> Option<Checked> {
        match self.capabilities.get(capability) {
            qvd_core::Support::No(missing) => Some(Ok(Seen::NotOffered(missing.to_string()))),
            _ => None,
        }
    }

    pub(super) fn create(&self, id: &RootId, options: impl Into<RootOptions>) -> Result<Box<dyn Root>, Failure> {
        create(&*self.backend, &self.site.base, id, options)
    }

    /// Gives `check` a new root on the base, and takes the root away again.
    pub(super) fn with_tree(&self, check: impl FnOnce(&Tree) -> Checked) -> Checked {
        let mut root = self.create(&id("case"), RootPolicy::Volatile)?;
        let tree = mount(&*root)?;
        let checked = check(&tree);
        drop(tree);
        let closed = root.close().step("an unmounted root can be closed");
        // What went wrong first explains the rest.
        let seen = checked?;
        closed.map(|()| seen)
    }

    /// Takes away what a case that failed has left, so that the next one begins
    /// as it should.
    pub(super) fn tidy(&mut self) {
        for (id, _) in self.backend.roots().unwrap_or_default() {
            if let Err(error) = self.backend.remove(&id) {
                tracing::debug!(root = %id, %error, "left behind by a case");
            }
        }
    }
}

pub(super) fn id(name: &str) -> RootId {
    // The names in the suite are all valid; another one would show at once.
    name.parse().unwrap_or_else(|_| RootId::from(qvd_core::DesktopId::new(1).unwrap_or_else(|_| unreachable!())))
}

pub(super) fn create(
    backend: &dyn RootBackend,
    base: &Base,
    id: &RootId,
    options: impl Into<RootOptions>,
) -> Result<Box<dyn Root>, Failure> {
    backend.create(&base.tree, id, &options.into()).step(format!("root {id} can be made"))
}

pub(super) fn mount(root: &dyn Root) -> Result<Tree, Failure> {
    Ok(Tree::new(root.mount(None).step(format!("root {} can be mounted", root.id()))?))
}

/// Options with a limit.
pub(super) fn limited(policy: RootPolicy, quota: Quota) -> RootOptions {
    RootOptions { policy, quota }
}
