//! Images between repositories over HTTPS.
#![allow(clippy::unwrap_used)]

mod support;

use std::{fs, path::Path, sync::Arc, time::SystemTime};

use qvd_core::{FlavourName, Tag};
use qvd_farm::Secret;
use qvd_gateway::api::{Direction, RepositoryDoor, trusting};
use qvd_storage::{
    Error, Repository,
    repository::{
        CommitId, NewCommit, Transferred, Wanted,
        wire::{self, Remote, Streams},
    },
};
use support::{PASSWORD, Site};

fn wanted() -> Wanted {
    Wanted { flavour: "tiny".parse().unwrap(), tag: None, force: false }
}

/// Commits a tree of three files, one of them with `text`.
fn commit(repository: &Repository, text: &str) -> CommitId {
    let source = tempfile::tempdir().unwrap();
    fs::create_dir(source.path().join("etc")).unwrap();
    fs::write(source.path().join("etc/motd"), text).unwrap();
    fs::write(source.path().join("etc/same"), "the same").unwrap();
    fs::write(source.path().join("large"), vec![7; 3 << 20]).unwrap();
    let staging = repository.stage().unwrap();
    let tree = staging.import(source.path(), 1 << 30).unwrap();
    let flavour: FlavourName = "tiny".parse().unwrap();
    let config = repository.config_for(&flavour, &tree).unwrap();
    let new = NewCommit {
        config,
        author: "ada".to_owned(),
        message: text.to_owned(),
        time: SystemTime::now(),
        recipe: None,
        publish: false,
    };
    repository.commit_tree(&staging, &tree, new).unwrap()
}

fn head(repository: &Repository) -> Option<CommitId> {
    repository.tagged(&"tiny".parse().unwrap(), &Tag::head()).unwrap()
}

/// A site with a repository, and ways to it for its two users.
struct Place {
    site: Site,
    there: Arc<Repository>,
    here: Repository,
}

impl Place {
    async fn new() -> Self {
        let site = Site::new().await;
        let there = Arc::new(Repository::open(&site.dir.path().join("there")).unwrap());
        site.host.keep_images_in(Arc::clone(&there));
        let here = Repository::open(&site.dir.path().join("here")).unwrap();
        Self { site, there, here }
    }

    fn door(&self, user: &str, password: &str) -> Arc<RepositoryDoor> {
        let tls = trusting(Some(&self.site.dir.path().join("tls/cert.pem"))).unwrap();
        let port = self.site.address.port();
        Arc::new(RepositoryDoor::https("localhost", port, user, &Secret::from(password), tls).unwrap())
    }

    async fn pull(&self, user: &str, password: &str) -> Result<Transferred, String> {
        let door = self.door(user, password);
        let at = self.here.dir().to_owned();
        blocking(move || {
            let source = Remote::new(door.name(), Streams::new(move || door.open(Direction::Pull)));
            open(&at).pull(&source, &wanted(), "ada", &mut |_| {})
        })
        .await
    }

    async fn push(&self, user: &str) -> Result<(Transferred, u64), String> {
        let door = self.door(user, PASSWORD);
        let at = self.here.dir().to_owned();
        blocking(move || {
            let stream = door.open(Direction::Push).map_err(|error| Error::Refused(error.to_string()))?;
            let mut told = 0;
            let done = wire::give(&open(&at), stream, &wanted(), &mut |so_far| told = told.max(so_far.bytes_total))?;
            Ok((done, told))
        })
        .await
    }
}

fn open(at: &Path) -> Repository {
    Repository::open_existing(at).unwrap()
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, Error> + Send + 'static) -> Result<T, String> {
    let done = tokio::task::spawn_blocking(work).await.unwrap();
    done.map_err(|error| qvd_core::causes(&error).join(": "))
}

#[tokio::test(flavor = "multi_thread")]
async fn an_administrator_pulls_what_is_missing_and_nobody_else_anything() {
    let place = Place::new().await;
    let one = commit(&place.there, "one");
    let refused = place.pull("ada", PASSWORD).await.unwrap_err();
    assert!(refused.contains("takes an administrator"), "{refused}");
    let refused = place.pull("bob", "wrong").await.unwrap_err();
    assert!(refused.contains("password is wrong") || refused.contains("wrong"), "{refused}");
    assert_eq!(head(&place.here), None);

    let first = place.pull("bob", PASSWORD).await.unwrap();
    assert_eq!((first.commits, first.objects), (1, 3));
    assert_eq!(head(&place.here), Some(one));
    let two = commit(&place.there, "two");
    let second = place.pull("bob", PASSWORD).await.unwrap();
    assert_eq!((second.commits, second.objects), (1, 1), "{second:?}");
    assert!(second.wire_bytes < 4096, "{second:?}");
    assert_eq!(head(&place.here), Some(two));
    assert!(place.here.fsck(None).unwrap().problems.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_administrator_pushes_and_hears_how_far_it_is() {
    let place = Place::new().await;
    let one = commit(&place.here, "one");
    let refused = place.push("ada").await.unwrap_err();
    assert!(refused.contains("takes an administrator"), "{refused}");
    let (first, told) = place.push("bob").await.unwrap();
    assert_eq!((first.commits, first.objects), (1, 3));
    assert!(told > 3 << 20, "{told}");
    assert_eq!(head(&place.there), Some(one));
    let moves = place.there.reflog(&"tiny".parse().unwrap(), &Tag::head()).unwrap();
    assert_eq!(moves.last().unwrap().who, "bob", "who pushed is who signed in, whatever they say");

    // Somebody else committed there meanwhile: nothing of theirs is lost.
    let theirs = commit(&place.there, "theirs");
    commit(&place.here, "ours");
    let refused = place.push("bob").await.unwrap_err();
    assert!(refused.contains("was not made from"), "{refused}");
    assert_eq!(head(&place.there), Some(theirs));
    assert!(place.there.fsck(None).unwrap().problems.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_not_trusted_hears_no_password() {
    let place = Place::new().await;
    commit(&place.there, "one");
    let other = Site::new().await;
    let tls = trusting(Some(&other.dir.path().join("tls/cert.pem"))).unwrap();
    let port = place.site.address.port();
    let door = RepositoryDoor::https("localhost", port, "bob", &Secret::from(PASSWORD), tls).unwrap();
    assert!(!format!("{door:?}").contains(PASSWORD));
    let refused = blocking(move || Ok(door.open(Direction::Pull).map(drop).unwrap_err().to_string())).await.unwrap();
    assert!(refused.to_lowercase().contains("certificate"), "{refused}");
}
