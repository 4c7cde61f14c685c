//! The conformance suite notices what is wrong: back ends with one fault each.
#![allow(clippy::unwrap_used)]

mod scratch;

use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Mutex,
};

use qvd_core::{RootPolicy, Support};
use qvd_storage::{
    BaseTree, Capabilities, Capability, Deviation, Error, Place, PlainCopy, Quota, Root, RootBackend, RootId,
    RootOptions,
    conformance::{Outcome, Suite},
};
use qvd_sys::mount;
use qvd_testkit::{Need, privileged};
use scratch::on;

/// What is wrong with a back end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    OneTreeForAll,
    WritesToBase,
    AgesBase,
    TouchesRoot,
    ForgetsKept,
    KeepsVolatile,
    ListsNothing,
    CallsAllKept,
    RemovesNothing,
    TakesAnyBase,
    LeaksDescriptor,
    LeavesAfterCrash,
    BoastsOfBytes,
    BoastsOfInodes,
    TakesLimits,
    SaysNothing,
    BoastsOfSnapshots,
    BoastsOfSharing,
    ShowsMounts,
    IgnoresIdMap,
    DeclaresTooMuch,
    DeclaresTooLittle,
}

/// Each with the case that has to fail for it.
const FAULTS: &[(Fault, &str)] = &[
    (Fault::OneTreeForAll, "roots-are-apart"),
    (Fault::WritesToBase, "base-unchanged"),
    (Fault::AgesBase, "base-unchanged"),
    (Fault::TouchesRoot, "base-is-shown-whole"),
    (Fault::ForgetsKept, "kept-roots-survive"),
    (Fault::KeepsVolatile, "volatile-roots-begin-anew"),
    (Fault::ListsNothing, "roots-are-listed"),
    (Fault::CallsAllKept, "volatile-roots-are-swept"),
    (Fault::RemovesNothing, "removed-roots-are-gone"),
    (Fault::TakesAnyBase, "kept-roots-stay-with-their-base"),
    (Fault::LeaksDescriptor, "leaks"),
    (Fault::LeavesAfterCrash, "crash-in-create-kept"),
    (Fault::BoastsOfBytes, "limit-in-bytes"),
    (Fault::BoastsOfInodes, "limit-in-inodes"),
    (Fault::TakesLimits, "limits-not-offered-are-refused"),
    (Fault::SaysNothing, "capabilities-are-answered"),
    (Fault::BoastsOfSnapshots, "capabilities-are-answered"),
    (Fault::BoastsOfSharing, "memory-is-shared-as-offered"),
    (Fault::ShowsMounts, "mounts-stay-private"),
    (Fault::IgnoresIdMap, "owners-id-mapped"),
    (Fault::DeclaresTooMuch, "files-without-a-name"),
    (Fault::DeclaresTooLittle, "use-is-noticed"),
];

/// Copies of the base, but for the fault.
#[derive(Debug)]
struct Faulty {
    copies: PlainCopy,
    place: Place,
    fault: Option<Fault>,
    /// The tree that all share.
    first: Mutex<Option<RootId>>,
}

#[derive(Debug)]
struct FaultyRoot {
    id: RootId,
    inner: Box<dyn Root>,
    base: PathBuf,
    fault: Option<Fault>,
}

impl Faulty {
    fn new(place: Place, fault: Option<Fault>) -> Self {
        Self { copies: PlainCopy::new(place.clone()), place, fault, first: Mutex::default() }
    }

    fn is(&self, fault: Fault) -> bool {
        self.fault == Some(fault)
    }
}

impl RootBackend for Faulty {
    fn name(&self) -> &'static str {
        "copy"
    }

    fn capabilities(&self) -> Result<Capabilities, Error> {
        let mut found = self.copies.capabilities()?;
        match self.fault {
            Some(Fault::BoastsOfBytes) => found.set(Capability::QuotaBytes, Support::Yes),
            Some(Fault::BoastsOfInodes) => found.set(Capability::QuotaInodes, Support::Yes),
            Some(Fault::BoastsOfSnapshots) => found.set(Capability::Snapshots, Support::Yes),
            Some(Fault::BoastsOfSharing) => found.set(Capability::SharedCache, Support::Yes),
            Some(Fault::SaysNothing) => {
                found = Capabilities::new();
                found.set(Capability::Roots, Support::Yes)
            }
            _ => &mut found,
        };
        Ok(found)
    }

    fn deviations(&self) -> &'static [Deviation] {
        match self.fault {
            Some(Fault::DeclaresTooMuch) => &[Deviation::UnnoticedUse, Deviation::NoTmpfile],
            Some(Fault::DeclaresTooLittle) => &[],
            _ => self.copies.deviations(),
        }
    }

    fn create(&self, base: &BaseTree, id: &RootId, options: &RootOptions) -> Result<Box<dyn Root>, Error> {
        let mut options = *options;
        let mut tree = id.clone();
        let note = self.place.dir().join(format!("NOTE-{}", std::process::id()));
        match self.fault {
            Some(Fault::OneTreeForAll) => tree = self.first.lock().unwrap().get_or_insert(tree).clone(),
            Some(Fault::BoastsOfBytes | Fault::BoastsOfInodes | Fault::TakesLimits) => options.quota = Quota::default(),
            Some(Fault::ForgetsKept) if self.find(id)?.is_some() => self.copies.remove(id)?,
            Some(Fault::KeepsVolatile) => options.policy = RootPolicy::Persistent,
            Some(Fault::LeaksDescriptor) => std::mem::forget(File::open(self.place.dir()).unwrap()),
            Some(Fault::LeavesAfterCrash) => fs::write(&note, id.as_str()).unwrap(),
            _ => {}
        }
        let inner = match self.copies.create(base, &tree, &options) {
            Err(Error::OtherBase { .. }) if self.is(Fault::TakesAnyBase) => {
                self.copies.remove(&tree)?;
                self.copies.create(base, &tree, &options)?
            }
            done => done?,
        };
        if self.is(Fault::LeavesAfterCrash) {
            fs::remove_file(&note).unwrap();
        }
        Ok(Box::new(FaultyRoot { id: id.clone(), inner, base: top(base), fault: self.fault }))
    }

    fn remove(&self, id: &RootId) -> Result<(), Error> {
        if self.is(Fault::RemovesNothing) { Ok(()) } else { self.copies.remove(id) }
    }

    fn roots(&self) -> Result<Vec<(RootId, RootPolicy)>, Error> {
        let mut roots = self.copies.roots()?;
        match self.fault {
            Some(Fault::ListsNothing) => roots.clear(),
            Some(Fault::CallsAllKept) => roots.iter_mut().for_each(|(_, policy)| *policy = RootPolicy::Persistent),
            _ => {}
        }
        Ok(roots)
    }
}

impl Root for FaultyRoot {
    fn id(&self) -> &RootId {
        &self.id
    }

    fn mount(&self, idmap: Option<BorrowedFd<'_>>) -> Result<OwnedFd, Error> {
        let idmap = if self.fault == Some(Fault::IgnoresIdMap) { None } else { idmap };
        let mount = self.inner.mount(idmap)?;
        match self.fault {
            Some(Fault::WritesToBase) => fs::write(self.base.join("var/file"), "the base's\n").unwrap(),
            Some(Fault::AgesBase) => {
                File::open(self.base.join("var/file")).unwrap().set_modified(std::time::SystemTime::now()).unwrap();
            }
            Some(Fault::TouchesRoot) => {
                let file = File::open(scratch::path(&mount, "var/file")).unwrap();
                file.set_modified(std::time::SystemTime::now()).unwrap();
            }
            Some(Fault::ShowsMounts) => attach(&mount, &self.base).unwrap(),
            _ => {}
        }
        Ok(mount)
    }

    fn close(&mut self) -> Result<(), Error> {
        self.inner.close()
    }
}

fn top(base: &BaseTree) -> PathBuf {
    base.layers()[0].path().to_path_buf()
}

fn attach(mount: &OwnedFd, at: &Path) -> io::Result<()> {
    mount::attach(mount::clone_dir(mount.as_fd())?.as_fd(), mount::open_dir_path(at)?.as_fd())
}

#[test]
fn every_fault_fails_the_case_that_is_for_it() {
    let needs = &[Need::Root, Need::LoopDevices, Need::UserNamespaces, Need::Program("mkfs.ext4")];
    privileged(needs, || {
        on("ext4", &[], |at| {
            for (number, (fault, case)) in FAULTS.iter().enumerate() {
                let outcome = |fault: Option<Fault>, name: &str| {
                    let dir = at.join(format!("{number}-{name}"));
                    fs::create_dir(&dir).unwrap();
                    let suite = Suite::new("faulty", move |place| Ok(Box::new(Faulty::new(place, fault))));
                    // What is looked at last is spoilt by what comes before.
                    let prefix = if *case == "base-unchanged" { "base-" } else { case };
                    let report = suite.only(prefix).run(&dir).unwrap();
                    let outcome = report.outcome(case).unwrap().clone();
                    fs::remove_dir_all(dir).unwrap_or_default();
                    outcome
                };
                assert!(!matches!(outcome(None, "sound"), Outcome::Failed { .. }), "{case} without a fault");
                let seen = outcome(Some(*fault), "faulty");
                assert!(matches!(seen, Outcome::Failed { .. }), "{fault:?} in {case}: {seen:?}");
            }
        });
    });
}
