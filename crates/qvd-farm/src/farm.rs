use std::{
    collections::HashMap,
    fs::OpenOptions,
    io,
    os::unix::fs::OpenOptionsExt,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use qvd_core::DesktopId;
use qvd_node::{Host, ImageSummary};
use qvd_storage::{BuildOptions, Repository};
use sqlx::{
    Sqlite, SqlitePool, Transaction,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous},
};
use tokio::sync::{Mutex as AsyncMutex, MutexGuard, OwnedMutexGuard, mpsc};

use crate::{Clock, ErrorKind, FarmError, SystemClock, clock::unix_s, limiter::Limiter, password::Passwords};

/// How long a statement waits for another process that writes, `sqlite3` on
/// the command line for instance. Our own writers queue before it.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// Connections to the database: readers do not wait for each other in WAL mode.
const MAX_CONNECTIONS: u32 = 8;

/// The control plane. Cloning is cheap and gives the same farm.
#[derive(Debug, Clone)]
pub struct Farm {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    pool: SqlitePool,
    /// SQLite has one writer at a time; waiting here is fair, waiting there is polling.
    writer: AsyncMutex<()>,
    host: Arc<dyn Host>,
    clock: Arc<dyn Clock>,
    passwords: Passwords,
    limiter: Mutex<Limiter>,
    /// Held while a desktop starts or is removed, so that neither sees the other half done.
    changing: Mutex<HashMap<DesktopId, Arc<AsyncMutex<()>>>>,
}

/// A write transaction. The writers' queue moves on when it is dropped.
pub(crate) struct Write<'a> {
    pub(crate) tx: Transaction<'static, Sqlite>,
    _turn: MutexGuard<'a, ()>,
}

impl Write<'_> {
    pub(crate) async fn commit(self) -> Result<(), FarmError> {
        self.tx.commit().await.map_err(|e| FarmError::store("commit a change", e))
    }
}

impl Farm {
    /// Opens the farm's database, or makes it, readable by its owner alone.
    /// Removals that a dead process left half done are finished first.
    ///
    /// # Errors
    /// The file cannot be opened, is no database, or is of a newer version.
    pub async fn open(db: &Path, host: Arc<dyn Host>) -> Result<Self, FarmError> {
        Self::open_with_clock(db, host, Arc::new(SystemClock)).await
    }

    /// [`Farm::open`] with another source of time.
    ///
    /// # Errors
    /// As [`Farm::open`].
    pub async fn open_with_clock(db: &Path, host: Arc<dyn Host>, clock: Arc<dyn Clock>) -> Result<Self, FarmError> {
        let failed = |what: &str| FarmError::new(ErrorKind::Failed, format!("cannot {what} `{}`", db.display()));
        private_file(db).map_err(|e| failed("create the database").because(e))?;
        let options = SqliteConnectOptions::new()
            .filename(db)
            .journal_mode(SqliteJournalMode::Wal)
            // A user or desktop that was reported as made must be there after a power cut.
            .synchronous(SqliteSynchronous::Full)
            .foreign_keys(true)
            .busy_timeout(BUSY_TIMEOUT);
        let pool = SqlitePoolOptions::new()
            .max_connections(MAX_CONNECTIONS)
            .connect_with(options)
            .await
            .map_err(|e| failed("open the database").because(e))?;
        sqlx::migrate!().run(&pool).await.map_err(|e| failed("bring up to date the database").because(e))?;
        let inner = Inner {
            pool,
            writer: AsyncMutex::new(()),
            host,
            clock,
            passwords: Passwords::new()?,
            limiter: Mutex::new(Limiter::new()),
            changing: Mutex::default(),
        };
        let farm = Self { inner: Arc::new(inner) };
        farm.finish_removals().await?;
        farm.sweep_sessions().await?;
        Ok(farm)
    }

    /// Closes the database; what is under way is finished first.
    pub async fn close(&self) {
        self.inner.pool.close().await;
    }

    /// The newest image of every flavour, by name.
    ///
    /// # Errors
    /// The host cannot read its repository.
    pub async fn images(&self) -> Result<Vec<ImageSummary>, FarmError> {
        self.on_host(|host| host.images()).await?.map_err(|e| FarmError::host("cannot list the images", e))
    }

    /// Builds the image that a recipe file on the host describes. `progress`
    /// gets lines for a person; lines that find it full are left out.
    ///
    /// # Errors
    /// The recipe is wrong or could not be carried out; nothing is left.
    pub async fn build_image(
        &self,
        recipe: &Path,
        options: BuildOptions,
        progress: mpsc::Sender<String>,
    ) -> Result<ImageSummary, FarmError> {
        let path = recipe.to_owned();
        let built = self
            .on_host(move |host| {
                host.build_image(&path, &options, &mut |line| {
                    if let Err(error) = progress.try_send(line.to_owned()) {
                        tracing::trace!(%error, "a progress line was left out");
                    }
                })
            })
            .await?
            .map_err(|e| FarmError::host(format!("cannot build the image of `{}`", recipe.display()), e))?;
        tracing::info!(flavour = %built.flavour, digest = %built.digest, reused = built.reused, "image built");
        Ok(built)
    }

    /// The repository of the host's images, if it is on this machine.
    #[must_use]
    pub fn repository(&self) -> Option<Arc<Repository>> {
        self.inner.host.repository()
    }

    pub(crate) fn pool(&self) -> &SqlitePool {
        &self.inner.pool
    }

    pub(crate) fn passwords(&self) -> &Passwords {
        &self.inner.passwords
    }

    pub(crate) fn clock(&self) -> &dyn Clock {
        &*self.inner.clock
    }

    pub(crate) fn now_unix_s(&self) -> i64 {
        unix_s(self.inner.clock.now())
    }

    pub(crate) fn limiter<T>(&self, f: impl FnOnce(&mut Limiter) -> T) -> T {
        f(&mut self.inner.limiter.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Begins to write. `BEGIN IMMEDIATE`, because a transaction that reads
    /// first and then writes fails at once when another wrote in between; the
    /// busy timeout does not apply to that (sqlite.org/lang_transaction.html).
    pub(crate) async fn write(&self) -> Result<Write<'_>, FarmError> {
        let turn = self.inner.writer.lock().await;
        let tx =
            self.inner.pool.begin_with("BEGIN IMMEDIATE").await.map_err(|e| FarmError::store("begin a change", e))?;
        Ok(Write { tx, _turn: turn })
    }

    /// Runs a blocking call of the host. It goes on to its end even when the
    /// caller stops waiting: a start is never abandoned half-way.
    pub(crate) async fn on_host<T: Send + 'static>(
        &self,
        call: impl FnOnce(&dyn Host) -> T + Send + 'static,
    ) -> Result<T, FarmError> {
        let host = Arc::clone(&self.inner.host);
        tokio::task::spawn_blocking(move || call(&*host)).await.map_err(|e| {
            FarmError::with_code(ErrorKind::Failed, "internal", "a call of the host did not end").because(e)
        })
    }

    /// Waits until nobody else starts or removes this desktop.
    pub(crate) async fn change(&self, id: DesktopId) -> OwnedMutexGuard<()> {
        let lock = {
            let mut changing = self.inner.changing.lock().unwrap_or_else(PoisonError::into_inner);
            changing.retain(|_, lock| Arc::strong_count(lock) > 1);
            Arc::clone(changing.entry(id).or_default())
        };
        lock.lock_owned().await
    }
}

/// Makes the file if it is not there, for its owner alone. SQLite gives its
/// side files (`-wal`, `-shm`) the mode of the database.
fn private_file(path: &Path) -> io::Result<()> {
    OpenOptions::new().create(true).append(true).mode(0o600).open(path).map(drop)
}
