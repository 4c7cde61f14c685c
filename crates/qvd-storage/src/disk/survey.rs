//! Which back end to take for disks on a host: each asked, and one recommended.

use std::path::Path;

use qvd_core::Support;
use serde::Serialize;

use super::{DiskBackends, DiskCapabilities, DiskCapability, DiskDeviation};
use crate::{Error, Place, survey::Recommendation};

/// What the back ends for disks can do on one host and directory.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct DiskSurvey {
    /// Every back end that there is, in the order of the alphabet.
    pub back_ends: Vec<SurveyedDisks>,
    /// Which one to take; none when no disk can be made at all.
    pub recommended: Option<Recommendation>,
}

/// One back end's answers.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct SurveyedDisks {
    /// Its name, as commands use it.
    pub name: &'static str,
    /// What it can do here, and why not.
    pub capabilities: DiskCapabilities,
    /// In what its disks differ from others.
    pub deviations: &'static [DiskDeviation],
}

/// Best first, among those that work.
const PREFERENCE: [&str; 4] = ["qcow2", "reflink", "lvm", "copy"];

impl DiskBackends {
    /// Asks every back end what it can do in the directory `dir`, and
    /// recommends one. Nothing is left of the trials.
    ///
    /// # Errors
    /// `dir` cannot be written to, or is full: that says nothing about the host.
    pub fn survey(&self, dir: &Path) -> Result<DiskSurvey, Error> {
        let io = Error::io("try back ends below", dir);
        let scratch = tempfile::Builder::new().prefix(".survey-").tempdir_in(dir).map_err(io)?;
        let mut back_ends = Vec::new();
        for name in self.names() {
            let back_end = self.make(name, Place::for_disks(&scratch.path().join(name))?)?;
            let capabilities = back_end.capabilities()?;
            let deviations = if capabilities.works() { back_end.deviations() } else { &[] };
            back_ends.push(SurveyedDisks { name, capabilities, deviations });
        }
        let recommended = recommend(&back_ends);
        Ok(DiskSurvey { back_ends, recommended })
    }
}

fn recommend(back_ends: &[SurveyedDisks]) -> Option<Recommendation> {
    let works = |name: &&str| back_ends.iter().find(|b| b.name == *name && b.capabilities.works());
    let own = back_ends.iter().find(|b| !PREFERENCE.contains(&b.name) && b.capabilities.works());
    let chosen = PREFERENCE.iter().find_map(works).or(own)?;
    let can = |capability| chosen.capabilities.get(capability).is_yes();
    let texts = |of: &[(DiskCapability, &str)], yes: bool| -> Vec<String> {
        of.iter().filter(|(capability, _)| can(*capability) == yes).map(|(_, text)| (*text).to_owned()).collect()
    };
    let mut because = texts(
        &[
            (DiskCapability::Thin, "a disk takes space for what is written to it alone"),
            (
                DiskCapability::SharedCache,
                "disks of an image share the host's page cache of what they have not changed",
            ),
            (DiskCapability::ConstantCreate, "a disk takes the same short time whatever the image's size"),
            (DiskCapability::Commit, "a disk can be written to its image, or be put on another"),
        ],
        true,
    );
    if let Some(Support::No(missing)) = PREFERENCE
        .first()
        .filter(|best| **best != chosen.name)
        .and_then(|best| back_ends.iter().find(|b| b.name == *best))
        .map(|best| best.capabilities.get(DiskCapability::Disks))
    {
        because.push(format!("{} does not work here: {missing}", PREFERENCE.first().unwrap_or(&"")));
    }
    let but = texts(
        &[
            (DiskCapability::Discard, "space that a machine gives back is not had again here: files cannot have holes"),
            (DiskCapability::Durable, "kept disks are lost when the host stops: the directory is in memory"),
            (DiskCapability::NoticedUse, "a disk in use is not noticed: files have no locks here"),
            (DiskCapability::Thin, "each disk takes all of its image's space"),
        ],
        false,
    );
    Some(Recommendation { back_end: chosen.name, because, but })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use qvd_core::Missing;

    use super::*;

    fn surveyed(name: &'static str, works: &Support) -> SurveyedDisks {
        SurveyedDisks { name, capabilities: DiskCapabilities::all(works), deviations: &[] }
    }

    #[test]
    fn the_best_that_works_is_taken_and_its_lacks_are_named() {
        let no = Support::No(Missing::Filesystem("locks".to_owned()));
        let mut best = surveyed("qcow2", &Support::Yes);
        best.capabilities.set(DiskCapability::Discard, no.clone());
        let chosen = recommend(&[surveyed("copy", &Support::Yes), best]).unwrap();
        assert_eq!(chosen.back_end, "qcow2");
        assert!(chosen.but.iter().any(|text| text.contains("cannot have holes")), "{chosen:?}");
        let chosen = recommend(&[surveyed("copy", &Support::Yes), surveyed("qcow2", &no)]).unwrap();
        assert_eq!(chosen.back_end, "copy");
        assert!(chosen.because.iter().any(|text| text.contains("qcow2 does not work here")), "{chosen:?}");
        assert_eq!(recommend(&[surveyed("qcow2", &no)]), None);
        assert_eq!(recommend(&[surveyed("mine", &Support::Yes)]).unwrap().back_end, "mine");
    }

    #[test]
    fn trials_leave_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let survey = DiskBackends::built_in().survey(dir.path()).unwrap();
        assert!(survey.recommended.is_some());
        assert_eq!(survey.back_ends.len(), DiskBackends::built_in().names().count());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
