//! Images on their way between repositories.

use std::{
    io::{self, IsTerminal},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context;
use qvd_gateway::api::{Direction, RepositoryDoor, trusting};
use qvd_storage::{
    Error, Repository,
    repository::{
        Directory, Reference, Revision, Source, Transferred, Wanted,
        wire::{self, Streams},
    },
};

use crate::{
    cli::{Access, Transfer},
    failure::{Exit, Refusal},
    history::{author, existing, mib},
    output::{Output, Progress},
    password, s3,
};

/// Where a gateway listens unless told otherwise.
const GATEWAY_PORT: u16 = 8443;

/// Another repository.
#[derive(Debug)]
pub(crate) enum Remote {
    /// In a directory of this host.
    Directory(PathBuf),
    /// Of a daemon, over HTTPS.
    Daemon(Arc<RepositoryDoor>),
    /// A store that speaks the protocol of S3.
    S3(Box<qvd_s3::Store>),
}

impl Remote {
    /// The one that a person names: by a directory, its own or an
    /// installation's, or by an address.
    pub(crate) fn of(text: &Path, access: &Access) -> anyhow::Result<Self> {
        if let Some(address) = text.to_str().filter(|text| text.starts_with("s3://")) {
            return Ok(Self::S3(Box::new(s3::open(address, access)?)));
        }
        let Some(address) = text.to_str().and_then(|text| text.strip_prefix("https://")) else {
            let images = text.join("images");
            return Ok(Self::Directory(if images.join("format").exists() { images } else { text.to_path_buf() }));
        };
        let usage = |what: &str| Refusal::new(Exit::Usage, format!("`{}` {what}", text.display()));
        let address = address.trim_end_matches('/');
        let (user, at) = address.rsplit_once('@').ok_or_else(|| usage("names no user: https://USER@HOST[:PORT]"))?;
        if user.is_empty() || user.contains(':') {
            return Err(usage("holds no plain user name; passwords are asked for").into());
        }
        let (host, port) = match at.rsplit_once(':') {
            Some((host, port)) if !port.ends_with(']') => {
                (host, port.parse().map_err(|_| usage("has no number for its port"))?)
            }
            _ => (at, GATEWAY_PORT),
        };
        let tls = trusting(access.ca.as_deref()).context("cannot tell whom to trust")?;
        let password = password::known(access.password_stdin || !io::stdin().is_terminal())?;
        let door = RepositoryDoor::https(host, port, user, &password, tls);
        Ok(Self::Daemon(Arc::new(door.map_err(|_| usage("names neither a host nor an address"))?)))
    }

    /// To get things from it.
    pub(crate) fn source(self) -> anyhow::Result<Box<dyn Source>> {
        match self {
            Self::S3(store) => Ok(store),
            Self::Directory(path) => Ok(Box::new(Directory::new(existing(&path)?))),
            Self::Daemon(door) => {
                let name = door.name();
                let streams = Streams::new(move || door.open(Direction::Pull));
                Ok(Box::new(wire::Remote::new(name, streams)))
            }
        }
    }

    /// Gives it what is wanted.
    fn push(
        &self,
        from: Repository,
        wanted: &Wanted,
        progress: &mut (dyn FnMut(&Transferred) + Send),
    ) -> anyhow::Result<Transferred> {
        match self {
            Self::Directory(path) => {
                let there = Repository::open(path)?;
                Ok(there.pull(&Directory::new(from), wanted, &author(), progress)?)
            }
            Self::S3(store) => Ok(from.push(&**store, wanted, &author(), progress)?),
            Self::Daemon(door) => {
                let cannot = || format!("cannot connect to `{}`", door.name());
                let stream = door.open(Direction::Push).with_context(cannot)?;
                Ok(wire::give(&from, stream, wanted, progress)?)
            }
        }
    }
}

/// Brings a flavour to another repository.
pub(crate) fn push(repository: Repository, transfer: &Transfer, output: &Output) -> anyhow::Result<()> {
    let push = || {
        let wanted = wanted(&transfer.image, transfer.force)?;
        let remote = Remote::of(&transfer.remote, &transfer.access)?;
        let bar = Bar::new(output);
        let done = remote.push(repository, &wanted, &mut |so_far| bar.tell(so_far));
        drop(bar);
        show(&transfer.image, &done?, output)
    };
    push().with_context(|| format!("cannot push {} to `{}`", transfer.image, transfer.remote.display()))
}

/// Gets a flavour from another repository.
pub(crate) fn pull(repository: &Repository, transfer: &Transfer, output: &Output) -> anyhow::Result<()> {
    let pull = || {
        let source = Remote::of(&transfer.remote, &transfer.access)?.source()?;
        get(repository, &*source, &transfer.image, transfer.force, output)
    };
    pull().with_context(|| format!("cannot pull {} from `{}`", transfer.image, transfer.remote.display()))
}

/// Gets every flavour of another repository.
pub(crate) fn clone(repository: &Repository, remote: &Path, access: &Access, output: &Output) -> anyhow::Result<()> {
    let clone = || {
        let source = Remote::of(remote, access)?.source()?;
        for flavour in source.flavours()? {
            get(repository, &*source, &Reference { flavour, revision: None }, false, output)?;
        }
        anyhow::Ok(())
    };
    clone().with_context(|| format!("cannot clone `{}`", remote.display()))
}

fn get(
    repository: &Repository,
    source: &dyn Source,
    image: &Reference,
    force: bool,
    output: &Output,
) -> anyhow::Result<()> {
    let wanted = wanted(image, force)?;
    let bar = Bar::new(output);
    let done: Result<_, Error> = repository.pull(source, &wanted, &author(), &mut |so_far| bar.tell(so_far));
    drop(bar);
    show(image, &done?, output)
}

fn wanted(image: &Reference, force: bool) -> anyhow::Result<Wanted> {
    let tag = match &image.revision {
        None => None,
        Some(Revision::Tag(tag)) => Some(tag.clone()),
        Some(_) => {
            let what = "commits travel by their tags: give FLAVOUR or FLAVOUR:TAG";
            return Err(Refusal::new(Exit::Usage, what).into());
        }
    };
    Ok(Wanted { flavour: image.flavour.clone(), tag, force })
}

fn show(image: &Reference, done: &Transferred, output: &Output) -> anyhow::Result<()> {
    output.result(done, |done| {
        let Transferred { commits, objects, bytes, wire_bytes, .. } = done;
        format!("{image}: {commits} commits, {objects} objects ({}) in {} of traffic", mib(*bytes), mib(*wire_bytes))
    })
}

/// Shows how far a transfer is.
struct Bar {
    progress: Progress,
    began: Instant,
    told: std::sync::Mutex<Duration>,
}

impl Bar {
    fn new(output: &Output) -> Self {
        Self { progress: output.progress(), began: Instant::now(), told: std::sync::Mutex::default() }
    }

    fn tell(&self, so_far: &Transferred) {
        let took = self.began.elapsed();
        let Ok(mut told) = self.told.lock() else { return };
        if took >= *told {
            *told = took + self.progress.pause();
            self.progress.amount(so_far.bytes, so_far.bytes_total, &how_far(so_far, took));
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
    format!("{objects} of {objects_total} objects, {} of {}{left}", mib(*bytes), mib(*bytes_total))
}

/// Seconds that the rest takes, if it goes on as before.
fn left_s(took: Duration, bytes: u64, rest: u64) -> u64 {
    let ms = took.as_millis() * u128::from(rest) / u128::from(bytes.max(1));
    u64::try_from(ms.div_ceil(1000)).unwrap_or(u64::MAX)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
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

    #[test]
    fn an_address_that_cannot_be_is_refused_before_anything_is_asked() {
        let access = Access { ca: None, password_stdin: true };
        for bad in ["https://host", "https://a:b@host", "https://@host", "https://a@host:port"] {
            assert!(Remote::of(Path::new(bad), &access).unwrap_err().downcast_ref::<Refusal>().is_some(), "{bad}");
        }
    }
}
