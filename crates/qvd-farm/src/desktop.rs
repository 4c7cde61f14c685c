use std::{collections::BTreeMap, error::Error as _, net::Ipv4Addr, time::Duration};

use qvd_core::{Bytes, Calls, DesktopId, DesktopSpec, DisplayKind, FlavourName, Limits, Tag, UserName};
use qvd_guest::{ExecRequest, Stats};
use qvd_node::{Attachment, ExecSession, MemoryReport, NewVersion, PortView, Timings, Version};
use qvd_storage::repository::{CommitId, Due};
use sqlx::{Row, Sqlite, Transaction};
use tokio::sync::mpsc;

use crate::{Desktop, DesktopInfo, ErrorKind, Farm, FarmError, NewDesktop, Progress, row};

/// How long a desktop's programs have to end by themselves when it stops.
const STOP_GRACE: Duration = Duration::from_secs(5);

/// A session reads some ten megabytes of programs before it is up.
const LEAST_IO: Bytes = Bytes::mib(1);

/// Longest name, in bytes: a label of a host name. Source: RFC 1123, 2.1.
const NAME_MAX: usize = 63;

/// Longest line of news from inside a desktop that is passed on, in characters.
const NEWS_MAX: usize = 120;

/// Begins every query that reads desktops; a macro, for `concat!` takes only literals.
macro_rules! select {
    ($rest:literal) => {
        concat!(
            "SELECT id, user_name, name, flavour, tag, virtualizer, memory_bytes, cpu_milli, pids, root_policy, ",
            "io_bytes_per_s, net_port, net_internet, net_policy, devices, calls, address, blocked, removing, created_unix_s FROM desktops ",
            $rest
        )
    };
}

fn unknown(id: DesktopId) -> FarmError {
    FarmError::with_code(ErrorKind::NotFound, "unknown_desktop", format!("there is no desktop {id}"))
}

pub(crate) fn check_limits(limits: &Limits) -> Result<(), FarmError> {
    let refuse = |what: String| Err(FarmError::with_code(ErrorKind::Invalid, "invalid_limits", what));
    let least = Limits::LEAST;
    match limits {
        Limits { memory, .. } if *memory < least.memory => refuse(format!(
            "a memory limit of {memory} is too little: no desktop starts with less than {}",
            least.memory
        )),
        Limits { cpu, .. } if cpu.0 < least.cpu.0 => refuse(format!(
            "a processor limit of {} is too little: give at least {} thousandths of a core",
            cpu.0, least.cpu.0
        )),
        Limits { pids, .. } if *pids < least.pids => {
            refuse(format!("a limit of {pids} processes is too little: give at least {}", least.pids))
        }
        Limits { io: Some(io), .. } if *io < LEAST_IO => {
            refuse(format!("a limit of {io} a second is too little: no desktop starts with less than {LEAST_IO}"))
        }
        _ => Ok(()),
    }
}

fn check_name(name: &str) -> Result<(), FarmError> {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let good = name.len() <= NAME_MAX
        && name.bytes().all(|b| inner(b) || b == b'-')
        && name.bytes().next().is_some_and(inner)
        && name.bytes().last().is_some_and(inner);
    if good {
        return Ok(());
    }
    let shown: String = name.chars().take(NAME_MAX).flat_map(char::escape_default).collect();
    Err(FarmError::with_code(
        ErrorKind::Invalid,
        "invalid_name",
        format!("`{shown}` is not a desktop name: use up to {NAME_MAX} of a-z 0-9 - and neither start nor end with -"),
    ))
}

/// A name to start from: the flavour's, as a host name.
fn name_of(flavour: &FlavourName) -> String {
    let name = flavour.as_str().replace(['.', '_'], "-");
    name.get(..NAME_MAX).unwrap_or(&name).trim_matches('-').to_owned()
}

/// Fixed addresses must be of a host: the node checks that its bridge has them.
fn check_address(address: Ipv4Addr) -> Result<(), FarmError> {
    if address.is_unspecified() || address.is_loopback() || address.is_multicast() || address.is_broadcast() {
        let what = format!("{address} cannot be the address of a desktop");
        return Err(FarmError::with_code(ErrorKind::Invalid, "invalid_address", what));
    }
    Ok(())
}

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
    /// Makes a desktop; nothing of it runs yet.
    ///
    /// # Errors
    /// The user or the flavour does not exist, the name or the address is
    /// taken (the message says by which desktop), or a value makes no sense.
    pub async fn create_desktop(&self, new: NewDesktop) -> Result<Desktop, FarmError> {
        let defaults = self.flavour(&new.flavour).await?.defaults;
        let tag = new.tag.unwrap_or_else(Tag::default_tag);
        self.resolve(&new.flavour, &tag, None).await?;
        let limits = new.limits.unwrap_or(defaults.limits);
        let net = new.net.unwrap_or(defaults.net);
        check_limits(&limits)?;
        if new.calls == Some(Calls::System) {
            let what = "system calls `system` are for an image's own init: use `desktop` or `application`";
            return Err(FarmError::with_code(ErrorKind::Invalid, "invalid_calls", what));
        }
        if let Some(name) = &new.name {
            check_name(name)?;
        }
        if let Some(address) = new.address {
            check_address(address)?;
            if !net.port {
                let what = format!("a desktop without a port cannot have the address {address}");
                return Err(FarmError::with_code(ErrorKind::Invalid, "invalid_address", what));
            }
        }
        self.user(&new.user).await?;
        let created = self.now_unix_s();

        let mut write = self.write().await?;
        let store = |e| FarmError::store("create a desktop", e);
        let name = match new.name {
            Some(name) => {
                if let Some(other) = holder_of_name(&mut write.tx, &new.user, &name).await.map_err(store)? {
                    return Err(FarmError::with_code(
                        ErrorKind::Conflict,
                        "name_taken",
                        format!("user `{}` has a desktop `{name}` already: desktop {other}", new.user),
                    ));
                }
                name
            }
            None => free_name(&mut write.tx, &new.user, &name_of(&new.flavour)).await.map_err(store)?,
        };
        if let Some(address) = new.address
            && let Some(other) = holder_of_address(&mut write.tx, address).await.map_err(store)?
        {
            return Err(FarmError::with_code(
                ErrorKind::Conflict,
                "address_taken",
                format!("address {address} is taken by desktop {other}"),
            ));
        }
        let inserted = sqlx::query(
            "INSERT INTO desktops (user_name, name, flavour, tag, virtualizer, memory_bytes, cpu_milli, pids,
                 root_policy, net_port, net_internet, net_policy, address, created_unix_s, io_bytes_per_s, devices, calls)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17)
             RETURNING id, user_name, name, flavour, tag, virtualizer, memory_bytes, cpu_milli, pids, root_policy,
                 io_bytes_per_s, net_port, net_internet, net_policy, devices, calls, address, blocked, created_unix_s",
        )
        .bind(new.user.as_str())
        .bind(name)
        .bind(new.flavour.as_str())
        .bind(tag.as_str())
        .bind(row::virtualizer_word(new.virtualizer.unwrap_or_default()))
        .bind(row::bytes_column(limits.memory))
        .bind(i64::from(limits.cpu.0))
        .bind(i64::from(limits.pids))
        .bind(row::root_policy_word(new.root.unwrap_or(defaults.root)))
        .bind(net.port)
        .bind(net.internet)
        .bind(row::net_column(&net)?)
        .bind(new.address.map(|a| a.to_string()))
        .bind(created)
        .bind(limits.io.map(row::bytes_column))
        .bind(row::devices_column(&new.devices))
        .bind(new.calls.map(|calls| calls.as_str()))
        .fetch_one(&mut *write.tx)
        .await
        .and_then(|found| row::desktop(&found));
        let desktop = match inserted {
            // The user was there a moment ago; the foreign key says so no more.
            Err(sqlx::Error::Database(e)) if e.is_foreign_key_violation() => {
                let what = format!("there is no user `{}`", new.user);
                return Err(FarmError::with_code(ErrorKind::NotFound, "unknown_user", what));
            }
            other => other.map_err(store)?,
        };
        write.commit().await?;
        tracing::info!(desktop = %desktop.id, user = %desktop.user, flavour = %desktop.flavour, "desktop created");
        Ok(desktop)
    }

    /// The desktops of one user or of all, by number.
    ///
    /// # Errors
    /// The database cannot be read.
    pub async fn desktops(&self, user: Option<&UserName>) -> Result<Vec<Desktop>, FarmError> {
        sqlx::query(select!("WHERE $1 IS NULL OR user_name = $1 ORDER BY id"))
            .bind(user.map(UserName::as_str))
            .fetch_all(self.pool())
            .await
            .and_then(|rows| rows.iter().map(row::desktop).collect())
            .map_err(|e| FarmError::store("list the desktops", e))
    }

    /// The desktops of one user or of all, by number, and what each is doing.
    ///
    /// # Errors
    /// The database cannot be read.
    pub async fn desktop_infos(&self, user: Option<&UserName>) -> Result<Vec<DesktopInfo>, FarmError> {
        let desktops = self.desktops(user).await?;
        self.on_host(move |host| {
            let info = |desktop: Desktop| DesktopInfo { status: host.status(desktop.id), desktop };
            desktops.into_iter().map(info).collect()
        })
        .await
    }

    /// One desktop.
    ///
    /// # Errors
    /// There is no such desktop.
    pub async fn desktop(&self, id: DesktopId) -> Result<Desktop, FarmError> {
        self.lookup(id).await.map(|(desktop, _)| desktop)
    }

    /// One desktop and what it is doing.
    ///
    /// # Errors
    /// There is no such desktop.
    pub async fn desktop_info(&self, id: DesktopId) -> Result<DesktopInfo, FarmError> {
        let desktop = self.desktop(id).await?;
        let status = self.on_host(move |host| host.status(id)).await?;
        Ok(DesktopInfo { desktop, status })
    }

    /// A desktop that this user may open.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]: there is no such desktop;
    /// [`ErrorKind::Forbidden`]: it is somebody else's. Existing clients tell
    /// the two apart, and numbers of desktops are no secret.
    pub async fn desktop_of(&self, user: &UserName, id: DesktopId) -> Result<Desktop, FarmError> {
        let desktop = self.desktop(id).await?;
        if desktop.user != *user {
            let what = format!("desktop {id} is not yours");
            return Err(FarmError::with_code(ErrorKind::Forbidden, "not_yours", what));
        }
        Ok(desktop)
    }

    /// A user's desktop by its name.
    ///
    /// # Errors
    /// The user has no such desktop.
    pub async fn desktop_named(&self, user: &UserName, name: &str) -> Result<Desktop, FarmError> {
        sqlx::query(select!("WHERE user_name = $1 AND name = $2"))
            .bind(user.as_str())
            .bind(name)
            .fetch_optional(self.pool())
            .await
            .and_then(|found| found.as_ref().map(row::desktop).transpose())
            .map_err(|e| FarmError::store("look up a desktop", e))?
            .ok_or_else(|| {
                let shown: String = name.chars().take(NAME_MAX).flat_map(char::escape_default).collect();
                let what = format!("user `{user}` has no desktop `{shown}`");
                FarmError::with_code(ErrorKind::NotFound, "unknown_desktop", what)
            })
    }

    /// Closes a desktop for maintenance, or opens it again. One that runs goes on.
    ///
    /// # Errors
    /// There is no such desktop.
    pub async fn set_blocked(&self, id: DesktopId, blocked: bool) -> Result<(), FarmError> {
        let mut write = self.write().await?;
        let changed = sqlx::query("UPDATE desktops SET blocked = $1 WHERE id = $2")
            .bind(blocked)
            .bind(i64::from(id.number()))
            .execute(&mut *write.tx)
            .await
            .map_err(|e| FarmError::store("block a desktop", e))?;
        write.commit().await?;
        if changed.rows_affected() == 0 {
            return Err(unknown(id));
        }
        tracing::info!(desktop = %id, blocked, "desktop's maintenance changed");
        Ok(())
    }

    /// Stops a desktop and deletes it with its root and home. It is marked
    /// first, so that after a crash half-way it is not started on half its
    /// files but removed when the farm is opened again.
    ///
    /// # Errors
    /// There is no such desktop, or something of it could not be removed: it
    /// stays listed, and removing it again goes on.
    pub async fn remove_desktop(&self, id: DesktopId) -> Result<(), FarmError> {
        let turn = self.change(id).await;
        let mut write = self.write().await?;
        let marked = sqlx::query("UPDATE desktops SET removing = TRUE WHERE id = $1")
            .bind(i64::from(id.number()))
            .execute(&mut *write.tx)
            .await
            .map_err(|e| FarmError::store("mark a desktop for removal", e))?;
        write.commit().await?;
        if marked.rows_affected() == 0 {
            return Err(unknown(id));
        }
        self.on_host(move |host| (host.remove(id), turn)).await.and_then(|(removed, turn)| {
            removed.map(|()| turn).map_err(|e| FarmError::host(format!("cannot remove desktop {id}"), e))
        })?;
        let mut write = self.write().await?;
        sqlx::query("DELETE FROM desktops WHERE id = $1")
            .bind(i64::from(id.number()))
            .execute(&mut *write.tx)
            .await
            .map_err(|e| FarmError::store("remove a desktop", e))?;
        write.commit().await?;
        tracing::info!(desktop = %id, "desktop removed");
        Ok(())
    }

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

    /// Finishes the removals that a dead process began. One that fails again
    /// stays for the next time; it must not keep the farm from opening.
    pub(crate) async fn finish_removals(&self) -> Result<(), FarmError> {
        let marked: Vec<DesktopId> = sqlx::query("SELECT id FROM desktops WHERE removing ORDER BY id")
            .fetch_all(self.pool())
            .await
            .and_then(|rows| rows.iter().map(row::desktop_id).collect())
            .map_err(|e| FarmError::store("look for unfinished removals", e))?;
        for id in marked {
            if let Err(error) = self.remove_desktop(id).await {
                tracing::warn!(desktop = %id, %error, cause = error.source().map(tracing::field::display), "removal still unfinished");
            }
        }
        Ok(())
    }

    async fn lookup(&self, id: DesktopId) -> Result<(Desktop, bool), FarmError> {
        sqlx::query(select!("WHERE id = $1"))
            .bind(i64::from(id.number()))
            .fetch_optional(self.pool())
            .await
            .and_then(|found| found.map(|r| Ok((row::desktop(&r)?, r.try_get("removing")?))).transpose())
            .map_err(|e| FarmError::store("look up a desktop", e))?
            .ok_or_else(|| unknown(id))
    }
}

type Tx = Transaction<'static, Sqlite>;

async fn holder_of_name(tx: &mut Tx, user: &UserName, name: &str) -> Result<Option<DesktopId>, sqlx::Error> {
    let found = sqlx::query("SELECT id FROM desktops WHERE user_name = $1 AND name = $2")
        .bind(user.as_str())
        .bind(name)
        .fetch_optional(&mut **tx)
        .await?;
    found.as_ref().map(row::desktop_id).transpose()
}

async fn holder_of_address(tx: &mut Tx, address: Ipv4Addr) -> Result<Option<DesktopId>, sqlx::Error> {
    let found = sqlx::query("SELECT id FROM desktops WHERE address = $1")
        .bind(address.to_string())
        .fetch_optional(&mut **tx)
        .await?;
    found.as_ref().map(row::desktop_id).transpose()
}

/// The first of `stem`, `stem-2`, `stem-3`, … that this user has not.
async fn free_name(tx: &mut Tx, user: &UserName, stem: &str) -> Result<String, sqlx::Error> {
    let mut name = stem.to_owned();
    let mut number = 2_u32;
    while holder_of_name(tx, user, &name).await?.is_some() {
        let suffix = format!("-{number}");
        let kept = stem.get(..NAME_MAX - suffix.len()).unwrap_or(stem).trim_end_matches('-');
        name = format!("{kept}{suffix}");
        number += 1;
    }
    Ok(name)
}
