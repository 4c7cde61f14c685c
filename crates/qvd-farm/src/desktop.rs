//! Desktops as they are kept: to list and look them up, to block and remove them.

mod create;
mod live;

use std::error::Error as _;

use qvd_core::{DesktopId, UserName};

pub(crate) use self::create::check_limits;
use crate::{Desktop, DesktopInfo, ErrorKind, Farm, FarmError, row, store::query};

/// Longest name, in bytes: a label of a host name. Source: RFC 1123, 2.1.
const NAME_MAX: usize = 63;

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

impl Farm {
    /// The desktops of one user or of all, by number.
    ///
    /// # Errors
    /// The database cannot be read.
    pub async fn desktops(&self, user: Option<&UserName>) -> Result<Vec<Desktop>, FarmError> {
        query(select!("WHERE $1 IS NULL OR user_name = $1 ORDER BY id"))
            .bind(user.map(UserName::as_str))
            .fetch_all(self.store())
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
        query(select!("WHERE user_name = $1 AND name = $2"))
            .bind(user.as_str())
            .bind(name)
            .fetch_optional(self.store())
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
        let changed = query("UPDATE desktops SET blocked = $1 WHERE id = $2")
            .bind(blocked)
            .bind(i64::from(id.number()))
            .execute(&mut write)
            .await
            .map_err(|e| FarmError::store("block a desktop", e))?;
        write.commit().await?;
        if changed == 0 {
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
        let marked = query("UPDATE desktops SET removing = TRUE WHERE id = $1")
            .bind(i64::from(id.number()))
            .execute(&mut write)
            .await
            .map_err(|e| FarmError::store("mark a desktop for removal", e))?;
        write.commit().await?;
        if marked == 0 {
            return Err(unknown(id));
        }
        self.on_host(move |host| (host.remove(id), turn)).await.and_then(|(removed, turn)| {
            removed.map(|()| turn).map_err(|e| FarmError::host(format!("cannot remove desktop {id}"), e))
        })?;
        let mut write = self.write().await?;
        query("DELETE FROM desktops WHERE id = $1")
            .bind(i64::from(id.number()))
            .execute(&mut write)
            .await
            .map_err(|e| FarmError::store("remove a desktop", e))?;
        write.commit().await?;
        tracing::info!(desktop = %id, "desktop removed");
        Ok(())
    }

    /// Finishes the removals that a dead process began. One that fails again
    /// stays for the next time; it must not keep the farm from opening.
    pub(crate) async fn finish_removals(&self) -> Result<(), FarmError> {
        let marked: Vec<DesktopId> = query("SELECT id FROM desktops WHERE removing ORDER BY id")
            .fetch_all(self.store())
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
        query(select!("WHERE id = $1"))
            .bind(i64::from(id.number()))
            .fetch_optional(self.store())
            .await
            .and_then(|found| found.map(|r| Ok((row::desktop(&r)?, r.try_get("removing")?))).transpose())
            .map_err(|e| FarmError::store("look up a desktop", e))?
            .ok_or_else(|| unknown(id))
    }
}
