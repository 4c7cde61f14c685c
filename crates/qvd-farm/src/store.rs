//! One set of statements for two databases: SQLite in a file, and PostgreSQL.

use std::{
    fs::OpenOptions,
    io,
    os::unix::fs::OpenOptionsExt,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use sqlx::{
    Decode, Encode, Error, PgPool, Postgres, Row as _, Sqlite, SqlitePool, Transaction, Type,
    postgres::{PgPoolOptions, PgRow},
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteRow, SqliteSynchronous},
};
use tokio::sync::{Mutex, OwnedMutexGuard};

use crate::{Database, ErrorKind, FarmError, database::PostgresUrl};

/// How long a statement waits for another process that writes, `sqlite3` on
/// the command line for instance. Our own writers queue before it.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a server has to answer.
const SERVER_TIMEOUT: Duration = Duration::from_secs(10);

/// Connections to the database for readers, who do not wait for each other.
const MAX_CONNECTIONS: u32 = 8;

/// What a farm holds of a PostgreSQL database while it is open: an advisory lock of this
/// number, the octets of `qvd-farm`.
const FARM_LOCK: i64 = i64::from_be_bytes(*b"qvd-farm");

/// A database that is open.
#[derive(Debug)]
pub(crate) enum Store {
    Sqlite {
        pool: SqlitePool,
        /// SQLite has one writer at a time; waiting here is fair, waiting there is polling.
        writer: Arc<Mutex<()>>,
    },
    Postgres {
        readers: PgPool,
        /// One connection, which holds the lock: who cannot have it does not write. Whoever waits
        /// for the connection waits in turn.
        writer: PgPool,
        /// Whether the last attempt found the lock with somebody else.
        taken: Arc<AtomicBool>,
    },
}

/// A change, all or nothing. What is not committed is taken back.
#[derive(Debug)]
pub(crate) enum Change {
    Sqlite { tx: Transaction<'static, Sqlite>, _turn: OwnedMutexGuard<()> },
    Postgres(Transaction<'static, Postgres>),
}

impl Store {
    /// Opens a database, and makes it or brings it up to date.
    pub(crate) async fn open(database: &Database) -> Result<Self, FarmError> {
        let failed = |what: &str| FarmError::new(ErrorKind::Failed, format!("cannot {what} `{database}`"));
        match database {
            Database::File(file) => {
                private_file(file).map_err(|e| failed("create the database").because(e))?;
                let pool = sqlite(file).await.map_err(|e| failed("open the database").because(e))?;
                let migrated = sqlx::migrate!("migrations/sqlite").run(&pool).await;
                migrated.map_err(|e| failed("bring up to date the database").because(e))?;
                Ok(Self::Sqlite { pool, writer: Arc::default() })
            }
            Database::Postgres(url) => {
                let taken = Arc::<AtomicBool>::default();
                let writer = postgres_writer(url, &taken).await.map_err(|e| {
                    if taken.load(Ordering::Relaxed) {
                        let what = format!("another server of QVD uses the database `{url}`");
                        FarmError::with_code(ErrorKind::Busy, "database_in_use", what)
                    } else {
                        failed("open the database").because(e)
                    }
                })?;
                let migrated = sqlx::migrate!("migrations/postgres").run(&writer).await;
                migrated.map_err(|e| failed("bring up to date the database").because(e))?;
                let readers = postgres_options().max_connections(MAX_CONNECTIONS);
                let readers = readers.connect_lazy_with(settled(url));
                Ok(Self::Postgres { readers, writer, taken })
            }
        }
    }

    /// Finishes what is under way.
    pub(crate) async fn close(&self) {
        match self {
            Self::Sqlite { pool, .. } => pool.close().await,
            Self::Postgres { readers, writer, .. } => {
                readers.close().await;
                // The lock goes last.
                writer.close().await;
            }
        }
    }

    /// Begins to write. In SQLite `BEGIN IMMEDIATE`, because a transaction that reads
    /// first and then writes fails at once when another wrote in between; the
    /// busy timeout does not apply to that (sqlite.org/lang_transaction.html).
    pub(crate) async fn change(&self) -> Result<Change, FarmError> {
        match self {
            Self::Sqlite { pool, writer } => {
                let turn = Arc::clone(writer).lock_owned().await;
                let tx = pool.begin_with("BEGIN IMMEDIATE").await;
                tx.map(|tx| Change::Sqlite { tx, _turn: turn }).map_err(|e| FarmError::store("begin a change", e))
            }
            Self::Postgres { writer, taken, .. } => writer.begin().await.map(Change::Postgres).map_err(|e| {
                if taken.load(Ordering::Relaxed) {
                    let what = "another server of QVD has taken over the farm's database";
                    return FarmError::with_code(ErrorKind::Busy, "database_in_use", what);
                }
                FarmError::store("begin a change", e)
            }),
        }
    }
}

impl Change {
    pub(crate) async fn commit(self) -> Result<(), FarmError> {
        let committed = match self {
            Self::Sqlite { tx, .. } => tx.commit().await,
            Self::Postgres(tx) => tx.commit().await,
        };
        committed.map_err(|e| FarmError::store("commit a change", e))
    }
}

/// Makes the file if it is not there, for its owner alone. SQLite gives its
/// side files (`-wal`, `-shm`) the mode of the database.
fn private_file(path: &Path) -> io::Result<()> {
    OpenOptions::new().create(true).append(true).mode(0o600).open(path).map(drop)
}

async fn sqlite(file: &Path) -> Result<SqlitePool, Error> {
    let options = SqliteConnectOptions::new()
        .filename(file)
        .journal_mode(SqliteJournalMode::Wal)
        // A user or desktop that was reported as made must be there after a power cut.
        .synchronous(SqliteSynchronous::Full)
        .foreign_keys(true)
        .busy_timeout(BUSY_TIMEOUT);
    SqlitePoolOptions::new().max_connections(MAX_CONNECTIONS).connect_with(options).await
}

fn postgres_options() -> PgPoolOptions {
    PgPoolOptions::new().acquire_timeout(SERVER_TIMEOUT)
}

/// How a server is asked.
fn settled(url: &PostgresUrl) -> sqlx::postgres::PgConnectOptions {
    let milliseconds = |duration: Duration| duration.as_millis().to_string();
    let limits = [("lock_timeout", milliseconds(BUSY_TIMEOUT)), ("statement_timeout", milliseconds(SERVER_TIMEOUT))];
    url.options().application_name("qvd").options(limits)
}

async fn postgres_writer(url: &PostgresUrl, taken: &Arc<AtomicBool>) -> Result<PgPool, Error> {
    let taken = Arc::clone(taken);
    let pool = postgres_options().max_connections(1).idle_timeout(None).max_lifetime(None).after_connect(
        move |connection, _| {
            let taken = Arc::clone(&taken);
            Box::pin(async move {
                let lock = sqlx::query_scalar("SELECT pg_try_advisory_lock($1)").bind(FARM_LOCK);
                let is_ours: bool = lock.fetch_one(connection).await?;
                taken.store(!is_ours, Ordering::Relaxed);
                if is_ours { Ok(()) } else { Err(Error::Protocol("the farm's lock is held".to_owned())) }
            })
        },
    );
    pool.connect_with(settled(url)).await
}

/// What is bound to a statement.
#[derive(Debug, Clone)]
pub(crate) enum Value {
    Text(Option<String>),
    Number(Option<i64>),
    Flag(bool),
}

macro_rules! values {
    ($($from:ty => $value:ident, $as:expr;)*) => {
        $(impl From<$from> for Value {
            fn from(value: $from) -> Self {
                Self::$value($as(value))
            }
        })*
    };
}

values! {
    &str => Text, |text: &str| Some(text.to_owned());
    String => Text, Some;
    Option<&str> => Text, |text: Option<&str>| text.map(str::to_owned);
    Option<String> => Text, |text| text;
    i64 => Number, Some;
    Option<i64> => Number, |number| number;
    bool => Flag, |flag| flag;
}

/// Where a statement is carried out: at rest, or as a part of a change.
#[derive(Debug)]
pub(crate) enum On<'a> {
    Store(&'a Store),
    Change(&'a mut Change),
}

impl<'a> From<&'a Store> for On<'a> {
    fn from(store: &'a Store) -> Self {
        Self::Store(store)
    }
}

impl<'a> From<&'a mut Change> for On<'a> {
    fn from(change: &'a mut Change) -> Self {
        Self::Change(change)
    }
}

/// A statement in words that both databases know, with what is bound to `$1`, `$2`, ….
#[derive(Debug)]
#[must_use = "it is carried out when it is fetched or executed"]
pub(crate) struct Query {
    text: &'static str,
    values: Vec<Value>,
}

pub(crate) const fn query(text: &'static str) -> Query {
    Query { text, values: Vec::new() }
}

impl Query {
    pub(crate) fn bind(mut self, value: impl Into<Value>) -> Self {
        self.values.push(value.into());
        self
    }

    pub(crate) async fn fetch_all(self, on: impl Into<On<'_>>) -> Result<Vec<Row>, Error> {
        let sqlite = |rows: Vec<SqliteRow>| rows.into_iter().map(Row::Sqlite).collect();
        let postgres = |rows: Vec<PgRow>| rows.into_iter().map(Row::Postgres).collect();
        match on.into() {
            On::Store(Store::Sqlite { pool, .. }) => self.bound().fetch_all(pool).await.map(sqlite),
            On::Change(Change::Sqlite { tx, .. }) => self.bound().fetch_all(&mut **tx).await.map(sqlite),
            On::Store(Store::Postgres { readers, .. }) => self.bound().fetch_all(readers).await.map(postgres),
            On::Change(Change::Postgres(tx)) => self.bound().fetch_all(&mut **tx).await.map(postgres),
        }
    }

    pub(crate) async fn fetch_optional(self, on: impl Into<On<'_>>) -> Result<Option<Row>, Error> {
        self.fetch_all(on).await.map(|rows| rows.into_iter().next())
    }

    pub(crate) async fn fetch_one(self, on: impl Into<On<'_>>) -> Result<Row, Error> {
        self.fetch_optional(on).await?.ok_or(Error::RowNotFound)
    }

    /// Returns how many rows it changed.
    pub(crate) async fn execute(self, change: &mut Change) -> Result<u64, Error> {
        match change {
            Change::Sqlite { tx, .. } => self.bound().execute(&mut **tx).await.map(|done| done.rows_affected()),
            Change::Postgres(tx) => self.bound().execute(&mut **tx).await.map(|done| done.rows_affected()),
        }
    }

    fn bound<DB: sqlx::Database>(self) -> sqlx::query::Query<'static, DB, DB::Arguments>
    where
        Option<String>: Encode<'static, DB> + Type<DB>,
        Option<i64>: Encode<'static, DB> + Type<DB>,
        bool: Encode<'static, DB> + Type<DB>,
    {
        self.values.into_iter().fold(sqlx::query(self.text), |query, value| match value {
            Value::Text(text) => query.bind(text),
            Value::Number(number) => query.bind(number),
            Value::Flag(flag) => query.bind(flag),
        })
    }
}

/// What either database found.
pub(crate) enum Row {
    Sqlite(SqliteRow),
    Postgres(PgRow),
}

impl Row {
    pub(crate) fn try_get<'r, T>(&'r self, column: &str) -> Result<T, Error>
    where
        T: Decode<'r, Sqlite> + Type<Sqlite> + Decode<'r, Postgres> + Type<Postgres>,
    {
        match self {
            Self::Sqlite(row) => row.try_get(column),
            Self::Postgres(row) => row.try_get(column),
        }
    }
}
