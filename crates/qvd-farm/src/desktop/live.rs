//! Desktops that run: to start and stop them, and what is asked of them meanwhile.

use std::{collections::BTreeMap, time::Duration};

use qvd_core::{DesktopId, DesktopSpec, DisplayKind};
use qvd_guest::{ExecRequest, Stats};
use qvd_node::{Attachment, ExecSession, MemoryReport, NewVersion, PortView, Timings, Version};
use qvd_storage::repository::{CommitId, Due};
use tokio::sync::mpsc;

use crate::{Desktop, ErrorKind, Farm, FarmError, Progress};

/// How long a desktop's programs have to end by themselves when it stops.
const STOP_GRACE: Duration = Duration::from_secs(5);

/// Longest line of news from inside a desktop that is passed on, in characters.
const NEWS_MAX: usize = 120;

/// What comes from inside a desktop ends up in a header and on a terminal.
fn news(text: &str) -> Progress {
    Progress::Text(text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(NEWS_MAX).collect())
}

fn tell(progress: &mpsc::Sender<Progress>, news: Progress) {
    if let Err(error) = progress.try_send(news) {
        tracing::trace!(%error, "a progress report was left out");
    }
}

impl Farm {
    /// Makes a desktop run, or finds it running; returns when its session is
    /// ready. News that finds `progress` full is left out. When the caller
    /// stops waiting the start goes on.
    ///
    /// # Errors
    /// There is no such desktop, it is blocked, its tag names no image, or it
    /// could not be started: nothing of it is left running then.
    pub async fn start(&self, id: DesktopId, progress: mpsc::Sender<Progress>) -> Result<Timings, FarmError> {
        let turn = self.change(id).await;
        let (desktop, removing) = self.lookup(id).await?;
        if removing {
            let what = format!("desktop {id} is being removed");
            return Err(FarmError::with_code(ErrorKind::Forbidden, "desktop_removing", what));
        }
        if desktop.blocked {
            let what = format!("desktop {id} is under maintenance");
            return Err(FarmError::with_code(ErrorKind::Forbidden, "desktop_blocked", what));
        }
        let image = self.resolve(&desktop.flavour, &desktop.tag, Some(id)).await?;
        let tenant = self.user(&desktop.user).await?.tenant;
        let spec = DesktopSpec {
            id,
            tenant,
            user: desktop.user,
            hostname: desktop.name,
            image,
            virtualizer: desktop.virtualizer,
            root: desktop.root,
            limits: desktop.limits,
            net: desktop.net,
            devices: desktop.devices,
            calls: desktop.calls,
            address: desktop.address,
            home: None,
        };
        self.on_host(move |host| {
            let started = host.ensure_running(&spec, &mut |step| tell(&progress, Progress::Step(step)));
            drop(turn);
            started
        })
        .await?
        .map_err(|e| FarmError::host(format!("cannot start desktop {id}"), e))
    }

    /// Stops a desktop; `Ok` when it does not run.
    ///
    /// # Errors
    /// There is no such desktop, or something of it could not be removed: the
    /// node keeps trying.
    pub async fn stop(&self, id: DesktopId) -> Result<(), FarmError> {
        self.desktop(id).await?;
        self.on_host(move |host| host.stop(id, STOP_GRACE))
            .await?
            .map_err(|e| FarmError::host(format!("cannot stop desktop {id}"), e))?;
        tracing::info!(desktop = %id, "desktop stopped");
        Ok(())
    }

    /// Stops each desktop that runs a commit which was to be left by now: that of its
    /// tag was published with a hard expiry, which has passed. What its user has not
    /// stored is lost; those were asked to leave before.
    ///
    /// # Errors
    /// The database cannot be read. A desktop that cannot be stopped is logged, and
    /// stopped the next time.
    pub async fn expire(&self) -> Result<(), FarmError> {
        let Some(repository) = self.repository() else { return Ok(()) };
        let (desktops, now) = (self.desktops(None).await?, self.clock().now());
        let expired = self.on_host(move |host| {
            let mut followed = BTreeMap::new();
            let mut expired = Vec::new();
            for Desktop { id, flavour, tag, .. } in &desktops {
                let Some(running) = host.status(*id).image else { continue };
                // Its flavour or its tag may be gone; then nothing urges it.
                let read = || repository.followed(flavour, tag).ok();
                let followed = followed.entry((flavour, tag)).or_insert_with(read);
                if followed.is_some_and(|it| it.due(&id.to_string(), CommitId::new(running), now) == Due::Hard) {
                    expired.push(*id);
                }
            }
            expired
        });
        for id in expired.await? {
            match self.stop(id).await {
                Ok(()) => tracing::info!(desktop = %id, "stopped: what it ran has expired"),
                Err(error) => tracing::warn!(desktop = %id, %error, "cannot stop what runs an expired commit"),
            }
        }
        Ok(())
    }

    /// Opens a desktop's display, starting the desktop if it does not run and
    /// taking the display from the client that has it. `who` names the client
    /// in the log.
    ///
    /// # Errors
    /// As [`Farm::start`], or the session gave no display in time.
    pub async fn attach(
        &self,
        id: DesktopId,
        kind: DisplayKind,
        who: &str,
        progress: mpsc::Sender<Progress>,
    ) -> Result<Attachment, FarmError> {
        self.start(id, progress.clone()).await?;
        let attachment = self
            .on_host(move |host| host.attach(id, kind, &mut |text| tell(&progress, news(&text))))
            .await?
            .map_err(|e| FarmError::host(format!("cannot open the display of desktop {id}"), e))?;
        tracing::info!(desktop = %id, who, ?kind, "display opened");
        Ok(attachment)
    }

    /// Runs a program inside a running desktop.
    ///
    /// # Errors
    /// There is no such desktop, it does not run, or the program could not be started.
    pub async fn exec(&self, id: DesktopId, request: ExecRequest) -> Result<ExecSession, FarmError> {
        self.desktop(id).await?;
        if request.argv.is_empty() {
            return Err(FarmError::with_code(ErrorKind::Invalid, "invalid_command", "name a program to run"));
        }
        let as_root = request.root;
        let session = self
            .on_host(move |host| host.exec(id, request))
            .await?
            .map_err(|e| FarmError::host(format!("cannot run a program in desktop {id}"), e))?;
        // Not its arguments: people pass passwords in them.
        tracing::info!(desktop = %id, as_root, "program started");
        Ok(session)
    }

    /// Makes the next version of a flavour from what a running desktop's root holds.
    ///
    /// # Errors
    /// There is no such desktop, it does not run, or its host cannot make one.
    pub async fn commit(&self, id: DesktopId, new: NewVersion) -> Result<Version, FarmError> {
        self.desktop(id).await?;
        let made = self.on_host(move |host| host.commit(id, &new)).await?;
        let made = made.map_err(|e| FarmError::host(format!("cannot make a version of desktop {id}"), e))?;
        tracing::info!(desktop = %id, flavour = %made.flavour, commit = %made.id, "version made");
        Ok(made)
    }

    /// What a running desktop uses.
    ///
    /// # Errors
    /// There is no such desktop, it does not run, or did not answer in time.
    pub async fn stats(&self, id: DesktopId) -> Result<Stats, FarmError> {
        self.desktop(id).await?;
        self.on_host(move |host| host.stats(id))
            .await?
            .map_err(|e| FarmError::host(format!("cannot measure desktop {id}"), e))
    }

    /// What the host has of memory, who has it, and what was decided about it.
    ///
    /// # Errors
    /// The host does not say.
    pub async fn memory(&self) -> Result<MemoryReport, FarmError> {
        self.on_host(|host| host.memory()).await?.map_err(|e| FarmError::host("cannot tell of the host's memory", e))
    }

    /// The port of a running desktop, if it has one, and what would become of
    /// `frames` that it sent.
    ///
    /// # Errors
    /// There is no such desktop, it does not run, or its host did not say.
    pub async fn network(&self, id: DesktopId, frames: Vec<Vec<u8>>) -> Result<Option<PortView>, FarmError> {
        self.desktop(id).await?;
        self.on_host(move |host| host.network(id, &frames))
            .await?
            .map_err(|e| FarmError::host(format!("cannot look at the network of desktop {id}"), e))
    }
}
