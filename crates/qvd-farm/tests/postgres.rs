//! The control plane on a PostgreSQL server.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod suite;

use std::sync::Arc;

use qvd_farm::{Database, ErrorKind, Farm, Secret, SessionKind};
use qvd_node::fake::FakeHost;
use qvd_testkit::{Need, Postgres, privileged};
use tokio::runtime::Runtime;

use self::suite::{PASSWORD, SERVER, World, every, user};

/// Runs `test` with a server that this thread's worlds have their databases on.
fn on_a_server(test: impl FnOnce(&Runtime)) {
    privileged(&[Need::Root, Need::Postgres], || {
        SERVER.set(Some(Postgres::start()));
        test(&Runtime::new().unwrap());
        SERVER.set(None);
    });
}

#[test]
fn a_farm_on_postgresql_does_what_one_on_sqlite_does() {
    macro_rules! each {
        ($($name:ident)*) => {
            on_a_server(|runtime| {
                $(eprintln!("{}", stringify!($name));
                runtime.block_on(suite::$name());)*
            });
        };
    }
    every!(each);
}

/// The statement that ends the connection which holds a farm's lock, as a network that
/// breaks would.
const BREAK: &str = "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'";

fn ask(world: &World, statement: &str) -> String {
    let name = world.dir.path().file_name().unwrap().to_str().unwrap().to_owned();
    SERVER.with_borrow(|server| server.as_ref().unwrap().asks(&name, statement))
}

#[test]
fn one_farm_at_a_time_has_a_database() {
    on_a_server(|runtime| {
        runtime.block_on(async {
            let first = World::with_user().await;
            let refused = World::try_open(&first.dir, &first.host, &first.clock).await.unwrap_err();
            assert_eq!((refused.kind(), refused.code()), (ErrorKind::Busy, "database_in_use"));
            assert!(refused.to_string().contains("another server of QVD"), "{refused}");
            first.farm.close().await;
            let second = World::open(&first.dir, &first.host, &first.clock).await;
            assert_eq!(second.users().await.unwrap().len(), 1);
        });
    });
}

/// Whoever lost its connection while another farm began writes no more, and again when
/// that one has gone.
#[test]
fn who_was_taken_over_does_not_write() {
    on_a_server(|runtime| {
        runtime.block_on(async {
            let first = World::with_user().await;
            ask(&first, BREAK);
            let second = World::open(&first.dir, &first.host, &first.clock).await;
            let refused = first.farm.add_user(&user("bob"), &Secret::from(PASSWORD), false).await.unwrap_err();
            assert_eq!((refused.kind(), refused.code()), (ErrorKind::Busy, "database_in_use"));
            second.add_user(&user("eve"), &Secret::from(PASSWORD), false).await.unwrap();
            second.close().await;
            first.farm.add_user(&user("bob"), &Secret::from(PASSWORD), false).await.unwrap();
            assert_eq!(first.farm.users().await.unwrap().len(), 3);
        });
    });
}

#[test]
fn a_server_that_was_away_is_used_again_and_has_all() {
    on_a_server(|runtime| {
        let world = runtime.block_on(World::with_user());
        let desktop = runtime.block_on(world.desktop());
        SERVER.with_borrow_mut(|server| server.as_mut().unwrap().crash());
        runtime.block_on(async {
            world.farm.add_user(&user("bob"), &Secret::from(PASSWORD), false).await.unwrap();
            assert_eq!(world.farm.users().await.unwrap().len(), 2);
            assert_eq!(world.farm.desktop(desktop.id).await.unwrap(), desktop);
        });
    });
}

/// The tables hold no password and no token.
#[test]
fn the_tables_hold_no_secret() {
    on_a_server(|runtime| {
        let world = runtime.block_on(World::with_user());
        let session = runtime.block_on(world.farm.create_session(&user("ada"), SessionKind::Web)).unwrap();
        let all = ["users", "sessions"].map(|table| ask(&world, &format!("SELECT * FROM {table}"))).concat();
        assert!(all.contains("ada") && all.contains("$argon2id$"), "{all}");
        assert!(!all.contains(PASSWORD) && !all.contains(session.token.expose()), "{all}");
    });
}

#[tokio::test]
async fn a_server_that_does_not_answer_is_named() {
    let database = Database::Postgres("postgres://qvd@127.0.0.1:1/qvd".parse().unwrap());
    let error = Farm::open(&database, Arc::new(FakeHost::new())).await.unwrap_err();
    assert!(error.to_string().contains("postgres://qvd@127.0.0.1:1/qvd"), "{error}");
}
