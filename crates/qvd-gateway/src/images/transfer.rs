//! Images on their way between repositories, and what is taken from one to
//! repair another.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use axum::http::Method;
use qvd_core::{FlavourName, UserName};
use qvd_farm::{ErrorKind, FarmError};
use qvd_storage::{
    Error, Repository,
    repository::{Checked, Reference, Revision, Source, Transferred, Wanted},
};
use serde::{Deserialize, Serialize};

use super::{Amount, ImageCall, News, Remote, RemoteAccess, storage};

/// How often somebody is told how far it is.
const PAUSE: Duration = Duration::from_millis(100);

/// A flavour on its way to another repository, or from there.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Transfer {
    /// The other repository.
    pub remote: RemoteAccess,
    /// A flavour with all its tags, or one of them.
    pub image: Reference,
    /// Lets `head` leave commits that the other side does not have.
    #[serde(default)]
    pub force: bool,
    /// Who does it.
    pub author: String,
}

/// Brings a flavour to another repository.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Push(pub Transfer);

impl ImageCall for Push {
    type Answer = Transferred;
    const METHOD: Method = Method::POST;
    const PATH: &'static str = "push";
    const LONG: bool = true;

    fn cannot(&self) -> String {
        format!("cannot push {} to `{}`", self.0.image, self.0.remote.address)
    }

    fn carry_out(self, here: &Repository, news: &mut (dyn FnMut(News) + Send)) -> Result<Transferred, FarmError> {
        let cannot = self.cannot();
        let Transfer { remote, image, force, author } = self.0;
        let wanted = wanted(&cannot, &image, force)?;
        // The other repository is made if need be, so not for what is not here.
        let there = match image.revision {
            Some(_) => here.resolve(&image).map(drop),
            None if here.tags(&image.flavour).is_ok_and(|tags| tags.is_empty()) => {
                Err(Error::NoSuchFlavour(image.flavour.clone()))
            }
            None => Ok(()),
        };
        there.map_err(storage(&cannot))?;
        let remote = Remote::open(&remote).map_err(|error| behind(&cannot, error))?;
        let mut teller = Teller::new(news);
        remote.push(here, &wanted, &author, &mut |so_far| teller.tell(so_far)).map_err(storage(&cannot))
    }

    fn asked_by(&mut self, user: &UserName) {
        self.0.author = user.to_string();
    }

    fn host_path(&self) -> Option<&Path> {
        self.0.remote.directory()
    }
}

/// Gets a flavour from another repository.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Pull(pub Transfer);

impl ImageCall for Pull {
    type Answer = Transferred;
    const METHOD: Method = Method::POST;
    const PATH: &'static str = "pull";
    const LONG: bool = true;

    fn cannot(&self) -> String {
        format!("cannot pull {} from `{}`", self.0.image, self.0.remote.address)
    }

    fn carry_out(self, here: &Repository, news: &mut (dyn FnMut(News) + Send)) -> Result<Transferred, FarmError> {
        let cannot = self.cannot();
        let Transfer { remote, image, force, author } = self.0;
        let wanted = wanted(&cannot, &image, force)?;
        let source = source(&cannot, &remote)?;
        let mut teller = Teller::new(news);
        here.pull(&*source, &wanted, &author, &mut |so_far| teller.tell(so_far)).map_err(storage(&cannot))
    }

    fn asked_by(&mut self, user: &UserName) {
        self.0.author = user.to_string();
    }

    fn host_path(&self) -> Option<&Path> {
        self.0.remote.directory()
    }
}

/// Gets every flavour of another repository.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Clone {
    /// The other repository.
    pub remote: RemoteAccess,
    /// Who does it.
    pub author: String,
}

/// A flavour that was got.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cloned {
    /// Which.
    pub flavour: FlavourName,
    /// What came.
    #[serde(flatten)]
    pub transferred: Transferred,
}

impl ImageCall for Clone {
    type Answer = Vec<Cloned>;
    const METHOD: Method = Method::POST;
    const PATH: &'static str = "clone";
    const LONG: bool = true;

    fn cannot(&self) -> String {
        format!("cannot clone `{}`", self.remote.address)
    }

    fn carry_out(self, here: &Repository, news: &mut (dyn FnMut(News) + Send)) -> Result<Vec<Cloned>, FarmError> {
        let cannot = self.cannot();
        let source = source(&cannot, &self.remote)?;
        let mut teller = Teller::new(news);
        let mut get = |flavour: FlavourName| {
            let wanted = Wanted { flavour: flavour.clone(), tag: None, force: false };
            let transferred = here.pull(&*source, &wanted, &self.author, &mut |so_far| teller.tell(so_far))?;
            Ok(Cloned { flavour, transferred })
        };
        source.flavours().and_then(|all| all.into_iter().map(&mut get).collect()).map_err(storage(&cannot))
    }

    fn asked_by(&mut self, user: &UserName) {
        self.author = user.to_string();
    }

    fn host_path(&self) -> Option<&Path> {
        self.remote.directory()
    }
}

/// Reads everything and compares it with its digest.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fsck {
    /// Repository to take from what is damaged or missing here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repair: Option<RemoteAccess>,
}

impl ImageCall for Fsck {
    type Answer = Checked;
    const METHOD: Method = Method::POST;
    const PATH: &'static str = "fsck";
    const LONG: bool = true;

    fn cannot(&self) -> String {
        "cannot check the images".to_owned()
    }

    fn carry_out(self, here: &Repository, _: &mut (dyn FnMut(News) + Send)) -> Result<Checked, FarmError> {
        let source = self.repair.as_ref().map(|remote| source("cannot repair", remote)).transpose()?;
        here.fsck(source.as_deref()).map_err(storage(&self.cannot()))
    }

    fn host_path(&self) -> Option<&Path> {
        self.repair.as_ref().and_then(RemoteAccess::directory)
    }
}

fn source(cannot: &str, remote: &RemoteAccess) -> Result<Box<dyn Source>, FarmError> {
    let opened = Remote::open(remote).map_err(|error| behind(cannot, error))?;
    if let Remote::Directory(path) = &opened
        && !path.join("format").exists()
    {
        let none = format!("{cannot}: there is no repository in `{}`", path.display());
        return Err(FarmError::new(ErrorKind::NotFound, none));
    }
    opened.source().map_err(storage(cannot))
}

/// The same kind of error, behind what was tried.
fn behind(cannot: &str, error: FarmError) -> FarmError {
    FarmError::new(error.kind(), cannot).because(error)
}

fn wanted(cannot: &str, image: &Reference, force: bool) -> Result<Wanted, FarmError> {
    let tag = match &image.revision {
        None => None,
        Some(Revision::Tag(tag)) => Some(tag.clone()),
        Some(_) => {
            let what = format!("{cannot}: commits travel by their tags: give FLAVOUR or FLAVOUR:TAG");
            return Err(FarmError::new(ErrorKind::Invalid, what));
        }
    };
    Ok(Wanted { flavour: image.flavour.clone(), tag, force })
}

/// Tells how far a transfer is, not too often.
struct Teller<'a> {
    news: &'a mut (dyn FnMut(News) + Send),
    began: Instant,
    next: Duration,
}

impl<'a> Teller<'a> {
    fn new(news: &'a mut (dyn FnMut(News) + Send)) -> Self {
        Self { news, began: Instant::now(), next: Duration::ZERO }
    }

    fn tell(&mut self, so_far: &Transferred) {
        let took = self.began.elapsed();
        if took >= self.next {
            self.next = took + PAUSE;
            let amount = Some(Amount { done: so_far.bytes, total: so_far.bytes_total });
            (self.news)(News { text: how_far(so_far, took), amount });
        }
    }
}

fn how_far(so_far: &Transferred, took: Duration) -> String {
    let left = match so_far.bytes {
        0 => String::new(),
        bytes => {
            let rest = so_far.bytes_total.saturating_sub(bytes);
            format!(", {} s left", left_s(took, bytes, rest))
        }
    };
    let Transferred { objects, objects_total, bytes, bytes_total, .. } = so_far;
    format!("{objects} of {objects_total} objects, {} of {}{left}", size(*bytes), size(*bytes_total))
}

/// A number of bytes for a person.
fn size(bytes: u64) -> String {
    match bytes {
        0..1_048_576 => format!("{} KiB", bytes.div_ceil(1024)),
        _ => format!("{} MiB", bytes >> 20),
    }
}

/// Seconds that the rest takes, if it goes on as before.
fn left_s(took: Duration, bytes: u64, rest: u64) -> u64 {
    let ms = took.as_millis() * u128::from(rest) / u128::from(bytes.max(1));
    u64::try_from(ms.div_ceil(1000)).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rest_takes_as_long_as_what_was_done() {
        let so_far = Transferred {
            objects: 1,
            objects_total: 3,
            bytes: 10 << 20,
            bytes_total: 30 << 20,
            ..Transferred::default()
        };
        let text = how_far(&so_far, Duration::from_secs(5));
        assert_eq!(text, "1 of 3 objects, 10 MiB of 30 MiB, 10 s left");
        assert!(!how_far(&Transferred::default(), Duration::from_secs(5)).contains("left"));
    }
}
