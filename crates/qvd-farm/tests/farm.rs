//! The control plane on a file of SQLite.
#![allow(clippy::unwrap_used)]

mod suite;

use std::{os::unix::fs::PermissionsExt, sync::Arc};

use qvd_farm::{Database, Farm, NewDesktop, SessionKind};
use qvd_node::{Host, fake::FakeHost};

use self::suite::{PASSWORD, World, every, icewm, user};

macro_rules! on_sqlite {
    ($($name:ident)*) => {
        $(#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
        async fn $name() {
            suite::$name().await;
        })*
    };
}

every!(on_sqlite);

#[tokio::test]
async fn the_database_is_for_its_owner_alone_and_holds_no_password() {
    let world = World::with_user().await;
    let session = world.farm.create_session(&user("ada"), SessionKind::Web).await.unwrap();
    let mut seen = 0;
    for entry in std::fs::read_dir(world.dir.path()).unwrap() {
        let path = entry.unwrap().path();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o077, 0, "{}", path.display());
        let bytes = std::fs::read(&path).unwrap();
        for secret in [PASSWORD, session.token.expose()] {
            assert!(!bytes.windows(secret.len()).any(|w| w == secret.as_bytes()), "{}", path.display());
        }
        seen += 1;
    }
    assert!(seen >= 2, "the database and its journal");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn two_farms_on_one_database_write_together() {
    let world = World::with_user().await;
    let other = World::open(&world.dir, &world.host, &world.clock).await;
    let writers: Vec<_> = [world.farm.clone(), other.clone(), world.farm.clone(), other]
        .into_iter()
        .map(|farm| {
            tokio::spawn(async move {
                for _ in 0..20 {
                    farm.create_desktop(NewDesktop::new(user("ada"), icewm())).await.unwrap();
                }
            })
        })
        .collect();
    for writer in writers {
        writer.await.unwrap();
    }
    assert_eq!(world.farm.desktops(None).await.unwrap().len(), 80);
}

#[tokio::test]
async fn a_file_that_is_no_database_is_refused_and_left_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qvd.sqlite");
    std::fs::write(&path, "this is a letter, not a database, and longer than a header is").unwrap();
    let before = std::fs::read(&path).unwrap();
    let host: Arc<dyn Host> = Arc::new(FakeHost::new());
    let error = Farm::open(&Database::File(path.clone()), host).await.unwrap_err();
    assert!(error.to_string().contains("qvd.sqlite"), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), before);
}
