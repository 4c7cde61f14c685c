use std::{
    collections::HashMap,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use qvd_core::DesktopId;
use qvd_node::{Host, ImageSummary};
use qvd_storage::{BuildOptions, Repository};
use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard, mpsc};

use crate::{
    Clock, Database, ErrorKind, FarmError, SystemClock,
    clock::unix_s,
    limiter::Limiter,
    password::Passwords,
    store::{Change, Store},
};

/// The control plane. Cloning is cheap and gives the same farm.
#[derive(Debug, Clone)]
pub struct Farm {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    store: Store,
    host: Arc<dyn Host>,
    clock: Arc<dyn Clock>,
    passwords: Passwords,
    limiter: Mutex<Limiter>,
    /// Held while a desktop starts or is removed, so that neither sees the other half done.
    changing: Mutex<HashMap<DesktopId, Arc<AsyncMutex<()>>>>,
}

impl Farm {
    /// Opens the farm's database, or makes its tables. Removals that a dead process left
    /// half done are finished first.
    ///
    /// # Errors
    /// The database cannot be opened, is none, is of a newer version, or, on PostgreSQL,
    /// another farm has it open ([`ErrorKind::Busy`]).
    pub async fn open(database: &Database, host: Arc<dyn Host>) -> Result<Self, FarmError> {
        Self::open_with_clock(database, host, Arc::new(SystemClock)).await
    }

    /// [`Farm::open`] with another source of time.
    ///
    /// # Errors
    /// As [`Farm::open`].
    pub async fn open_with_clock(
        database: &Database,
        host: Arc<dyn Host>,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, FarmError> {
        let inner = Inner {
            store: Store::open(database).await?,
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
        self.inner.store.close().await;
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

    pub(crate) fn store(&self) -> &Store {
        &self.inner.store
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

    /// Begins to write.
    pub(crate) async fn write(&self) -> Result<Change, FarmError> {
        self.inner.store.change().await
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
