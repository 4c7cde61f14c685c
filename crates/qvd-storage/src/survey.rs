//! Which back end to take on a host: each asked, and one recommended.

use std::path::Path;

use qvd_core::Support;
use serde::Serialize;

use crate::{Backends, Capabilities, Capability, Deviation, Error, Place, probe};

/// What the back ends can do on one host and directory.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Survey {
    /// Every back end that there is, in the order of the alphabet.
    pub back_ends: Vec<Surveyed>,
    /// Which one to take; none when no root can be made at all.
    pub recommended: Option<Recommendation>,
    /// Those of old that no kernel offers any more.
    pub historic: &'static [Historic],
}

/// One back end's answers.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Surveyed {
    /// Its name, as commands and recipes use it.
    pub name: &'static str,
    /// What it can do here, and why not.
    pub capabilities: Capabilities,
    /// With which options it mounts here, where it has a choice.
    pub options: Option<String>,
    /// In what its roots differ from a plain directory.
    pub deviations: &'static [Deviation],
}

/// A back end to take, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Recommendation {
    /// Its name.
    pub back_end: &'static str,
    /// What speaks for it, each a sentence's part.
    pub because: Vec<String>,
    /// What to know before.
    pub but: Vec<String>,
}

/// A union file system that was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Historic {
    /// Its name.
    pub name: &'static str,
    /// What it was, and why it is gone.
    pub was: &'static str,
    /// What to use in its place.
    pub instead: &'static str,
}

/// Source: Linux Weekly News, articles 325369, 327738 and 396020, and the Linux
/// changelog of 3.18, the version with overlayfs.
const HISTORIC: [Historic; 2] = [
    Historic {
        name: "unionfs",
        was: "a stackable file system outside of the kernel, from 2003 on; rewritten once, never merged, \
              and without releases since 2014",
        instead: "overlayfs",
    },
    Historic {
        name: "union mounts",
        was: "a union inside the kernel's path lookup, proposed from 2007 to 2013 and never merged: every file system \
              would have had to learn about whiteouts",
        instead: "overlayfs, which took its place in Linux 3.18",
    },
];

/// Best first, among those that work.
const PREFERENCE: [&str; 10] =
    ["overlayfs", "aufs", "btrfs", "lvm", "loop", "reflink", "bind", "fuse", "copy", "unionfs-fuse"];

impl Backends {
    /// Asks every back end what it can do in the directory `dir`, and
    /// recommends one. Nothing is left of the trials.
    ///
    /// # Errors
    /// `dir` cannot be written to, or is full: that says nothing about the host.
    pub fn survey(&self, dir: &Path) -> Result<Survey, Error> {
        let io = Error::io("try back ends below", dir);
        let scratch = tempfile::Builder::new().prefix(".survey-").tempdir_in(dir).map_err(io)?;
        let mut back_ends = Vec::new();
        for name in self.names() {
            let back_end = self.make(name, Place::open(&scratch.path().join(name))?)?;
            let capabilities = back_end.capabilities()?;
            // Those of one that does not work are nobody's concern.
            let (deviations, options) = if capabilities.works() {
                (back_end.deviations(), back_end.chosen_options()?)
            } else {
                (&[][..], None)
            };
            back_ends.push(Surveyed { name, capabilities, options, deviations });
        }
        let reflink = probe::reflink(dir).map_err(Error::io("probe reflink below", dir))?;
        let recommended = recommend(&back_ends, &reflink);
        Ok(Survey { back_ends, recommended, historic: &HISTORIC })
    }
}

/// Chooses among back ends by what they can do; `reflink` says whether files of
/// the directory can share extents.
#[must_use]
pub fn recommend(back_ends: &[Surveyed], reflink: &Support) -> Option<Recommendation> {
    let works = |name: &&str| back_ends.iter().find(|b| b.name == *name && b.capabilities.works());
    let ranked: Vec<&Surveyed> = PREFERENCE.iter().filter_map(works).collect();
    let own = back_ends.iter().filter(|b| !PREFERENCE.contains(&b.name) && b.capabilities.works());
    let all: Vec<&Surveyed> = ranked.into_iter().chain(own).collect();
    let can = |b: &Surveyed, capability| b.capabilities.get(capability).is_yes();
    // One image for all ranges of ids comes before everything else.
    let chosen = *all.iter().find(|b| can(b, Capability::IdMapped)).or_else(|| all.first())?;

    let reasons = [
        (Capability::SharedMmaps, "desktops of an image share its page cache and what they map of it"),
        (Capability::ConstantCreate, "a root takes the same short time whatever the image's size"),
        (Capability::ConstantDelete, "a removal returns at once"),
        (Capability::QuotaBytes, "roots can be limited in bytes"),
        (Capability::QuotaInodes, "roots can be limited in files"),
        (Capability::Snapshots, "a root can be copied in constant time"),
    ];
    let mut because: Vec<String> =
        reasons.iter().filter(|(c, _)| can(chosen, *c)).map(|(_, text)| (*text).to_owned()).collect();
    if let Some(better) = PREFERENCE.first().filter(|best| **best != chosen.name) {
        let why = back_ends.iter().find(|b| b.name == *better).map(|b| b.capabilities.get(Capability::Roots));
        if let Some(Support::No(missing)) = why {
            because.push(format!("{better} does not work here: {missing}"));
        }
    }
    let mut but = Vec::new();
    if !can(chosen, Capability::IdMapped) {
        but.push("desktops cannot each have user ids of their own on one image".to_owned());
    }
    if can(chosen, Capability::SharedMmaps) && !reflink.is_yes() {
        but.push(
            "no reflink here: the first write to a large file of an image copies it; XFS and btrfs below spare that"
                .to_owned(),
        );
    }
    if !can(chosen, Capability::QuotaBytes)
        && let Some(limited) = all.iter().find(|b| can(b, Capability::QuotaBytes) && can(b, Capability::QuotaInodes))
    {
        but.push(format!("its roots cannot be limited here; use `{}` for those that have to be", limited.name));
    }
    if !can(chosen, Capability::ConstantCreate) {
        but.push("making a root takes longer the larger the image is".to_owned());
    }
    Some(Recommendation { back_end: chosen.name, because, but })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use qvd_core::Missing;

    use super::*;

    fn surveyed(name: &'static str, can: &[Capability]) -> Surveyed {
        let mut capabilities = Capabilities::new();
        for capability in can {
            capabilities.set(*capability, Support::Yes);
        }
        Surveyed { name, capabilities, options: None, deviations: &[] }
    }

    const OVERLAY: &[Capability] =
        &[Capability::Roots, Capability::IdMapped, Capability::SharedMmaps, Capability::ConstantCreate];
    const LOOP: &[Capability] = &[
        Capability::Roots,
        Capability::IdMapped,
        Capability::SharedMmaps,
        Capability::ConstantCreate,
        Capability::QuotaBytes,
        Capability::QuotaInodes,
    ];

    fn no_reflink() -> Support {
        Support::No(Missing::Filesystem("reflink".to_owned()))
    }

    #[test]
    fn overlayfs_is_taken_where_it_works_and_its_price_is_named() {
        let all = [
            surveyed("copy", &[Capability::Roots, Capability::IdMapped]),
            surveyed("loop", LOOP),
            surveyed("overlayfs", OVERLAY),
        ];
        let on_ext4 = recommend(&all, &no_reflink()).unwrap();
        assert_eq!(on_ext4.back_end, "overlayfs");
        assert!(on_ext4.but.iter().any(|text| text.contains("no reflink here")), "{on_ext4:?}");
        assert!(on_ext4.but.iter().any(|text| text.contains("`loop`")), "{on_ext4:?}");
        let on_xfs = recommend(&all, &Support::Yes).unwrap();
        assert!(!on_xfs.but.iter().any(|text| text.contains("reflink")), "{on_xfs:?}");
    }

    #[test]
    fn what_comes_next_says_why_the_best_is_not_it() {
        let mut overlay = surveyed("overlayfs", &[]);
        overlay.capabilities.set(Capability::Roots, Support::No(Missing::Kernel("overlayfs".to_owned())));
        let all = [surveyed("copy", &[Capability::Roots, Capability::IdMapped]), overlay];
        let chosen = recommend(&all, &no_reflink()).unwrap();
        assert_eq!(chosen.back_end, "copy");
        assert!(chosen.because.iter().any(|text| text.contains("overlayfs does not work here: the kernel lacks")));
        assert!(chosen.but.iter().any(|text| text.contains("the larger the image")));
        assert_eq!(recommend(&[surveyed("overlayfs", &[])], &Support::Yes), None);
    }

    #[test]
    fn one_image_for_all_comes_first() {
        let all =
            [surveyed("overlayfs", &[Capability::Roots]), surveyed("copy", &[Capability::Roots, Capability::IdMapped])];
        assert_eq!(recommend(&all, &Support::Yes).unwrap().back_end, "copy");
        let own = [surveyed("mine", &[Capability::Roots])];
        let chosen = recommend(&own, &Support::Yes).unwrap();
        assert_eq!(chosen.back_end, "mine", "an integrator's own is better than nothing");
        assert!(chosen.but.iter().any(|text| text.contains("user ids of their own")));
    }
}
