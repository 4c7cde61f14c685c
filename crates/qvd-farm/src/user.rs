use std::net::IpAddr;

use qvd_core::{TenantName, UserName};

use crate::{ErrorKind, Farm, FarmError, OwnedDesktops, Secret, User, row, store::query};

fn unknown(name: &UserName) -> FarmError {
    FarmError::with_code(ErrorKind::NotFound, "unknown_user", format!("there is no user `{name}`"))
}

impl Farm {
    /// Adds a user of the tenant that everything belongs to unless somebody else is named.
    ///
    /// # Errors
    /// As [`Farm::add_user_of`].
    pub async fn add_user(&self, name: &UserName, password: &Secret, admin: bool) -> Result<User, FarmError> {
        self.add_user_of(&TenantName::default(), name, password, admin).await
    }

    /// Adds a user of a tenant.
    ///
    /// # Errors
    /// The name is taken, by whichever tenant's user, or the password is too short or too long.
    pub async fn add_user_of(
        &self,
        tenant: &TenantName,
        name: &UserName,
        password: &Secret,
        admin: bool,
    ) -> Result<User, FarmError> {
        let hash = self.passwords().hash(password).await?;
        let created = self.now_unix_s();
        let mut write = self.write().await?;
        let added = query(
            "INSERT INTO users (name, password_hash, admin, created_unix_s, tenant) VALUES ($1, $2, $3, $4, $5)
             ON CONFLICT (name) DO NOTHING RETURNING name, admin, tenant, created_unix_s",
        )
        .bind(name.as_str())
        .bind(hash)
        .bind(admin)
        .bind(created)
        .bind(tenant.as_str())
        .fetch_optional(&mut write)
        .await
        .and_then(|found| found.as_ref().map(row::user).transpose())
        .map_err(|e| FarmError::store("add a user", e))?;
        write.commit().await?;
        let user = added.ok_or_else(|| {
            FarmError::with_code(ErrorKind::Conflict, "user_exists", format!("there is a user `{name}` already"))
        })?;
        tracing::info!(user = %name, %tenant, admin, "user added");
        Ok(user)
    }

    /// All users, by name.
    ///
    /// # Errors
    /// The database cannot be read.
    pub async fn users(&self) -> Result<Vec<User>, FarmError> {
        query("SELECT name, admin, tenant, created_unix_s FROM users ORDER BY name")
            .fetch_all(self.store())
            .await
            .and_then(|rows| rows.iter().map(row::user).collect())
            .map_err(|e| FarmError::store("list the users", e))
    }

    /// One user.
    ///
    /// # Errors
    /// There is no such user.
    pub async fn user(&self, name: &UserName) -> Result<User, FarmError> {
        query("SELECT name, admin, tenant, created_unix_s FROM users WHERE name = $1")
            .bind(name.as_str())
            .fetch_optional(self.store())
            .await
            .and_then(|found| found.as_ref().map(row::user).transpose())
            .map_err(|e| FarmError::store("look up a user", e))?
            .ok_or_else(|| unknown(name))
    }

    /// Removes a user and ends the user's sessions.
    ///
    /// # Errors
    /// There is no such user; the user owns desktops and `desktops` says
    /// [`OwnedDesktops::Refuse`]; or one of them could not be removed, then
    /// the user stays.
    pub async fn remove_user(&self, name: &UserName, desktops: OwnedDesktops) -> Result<(), FarmError> {
        self.user(name).await?;
        if desktops == OwnedDesktops::Remove {
            for desktop in self.desktops(Some(name)).await? {
                self.remove_desktop(desktop.id).await?;
            }
        }
        let mut write = self.write().await?;
        let owned: i64 = query("SELECT COUNT(*) AS owned FROM desktops WHERE user_name = $1")
            .bind(name.as_str())
            .fetch_one(&mut write)
            .await
            .and_then(|found| found.try_get("owned"))
            .map_err(|e| FarmError::store("count a user's desktops", e))?;
        if owned > 0 {
            let desktops = if owned == 1 { "a desktop".to_owned() } else { format!("{owned} desktops") };
            return Err(FarmError::with_code(
                ErrorKind::Conflict,
                "user_has_desktops",
                format!("user `{name}` owns {desktops}: remove them first, or with the user (--with-desktops)"),
            ));
        }
        let gone = query("DELETE FROM users WHERE name = $1")
            .bind(name.as_str())
            .execute(&mut write)
            .await
            .map_err(|e| FarmError::store("remove a user", e))?;
        write.commit().await?;
        if gone == 0 {
            return Err(unknown(name));
        }
        tracing::info!(user = %name, "user removed");
        Ok(())
    }

    /// Gives a user another password and ends the user's sessions: whoever
    /// learned the old one is out.
    ///
    /// # Errors
    /// There is no such user, or the password is too short or too long.
    pub async fn set_password(&self, name: &UserName, password: &Secret) -> Result<(), FarmError> {
        let hash = self.passwords().hash(password).await?;
        let mut write = self.write().await?;
        let changed = query("UPDATE users SET password_hash = $1 WHERE name = $2")
            .bind(hash)
            .bind(name.as_str())
            .execute(&mut write)
            .await
            .map_err(|e| FarmError::store("change a password", e))?;
        if changed == 0 {
            return Err(unknown(name));
        }
        query("DELETE FROM sessions WHERE user_name = $1")
            .bind(name.as_str())
            .execute(&mut write)
            .await
            .map_err(|e| FarmError::store("end a user's sessions", e))?;
        write.commit().await?;
        tracing::info!(user = %name, "password changed");
        Ok(())
    }

    /// Lets a user administer the farm, or no more; then what the user administers in a
    /// browser ends at once.
    ///
    /// # Errors
    /// There is no such user.
    pub async fn set_admin(&self, name: &UserName, admin: bool) -> Result<(), FarmError> {
        let mut write = self.write().await?;
        let changed = query("UPDATE users SET admin = $1 WHERE name = $2")
            .bind(admin)
            .bind(name.as_str())
            .execute(&mut write)
            .await
            .map_err(|e| FarmError::store("change a user's role", e))?;
        if changed == 0 {
            return Err(unknown(name));
        }
        if !admin {
            query("DELETE FROM sessions WHERE user_name = $1 AND kind = 'admin'")
                .bind(name.as_str())
                .execute(&mut write)
                .await
                .map_err(|e| FarmError::store("end a user's sessions", e))?;
        }
        write.commit().await?;
        tracing::info!(user = %name, admin, "user's role changed");
        Ok(())
    }

    /// Checks a name and a password that came from `source`, an untrusted
    /// text. Takes as long for a name that nobody has.
    ///
    /// # Errors
    /// [`ErrorKind::Unauthenticated`], the same for a wrong name and a wrong
    /// password; [`ErrorKind::TooMany`] after too many of those.
    pub async fn authenticate(&self, name: &str, password: &Secret, source: Option<IpAddr>) -> Result<User, FarmError> {
        // What is no user name has no failures of its own to count; its text
        // is kept short, for it goes into the log and into memory.
        let shown: String = name.chars().take(UserName::MAX_LEN).flat_map(char::escape_default).collect();
        if let Err(retry_after) = self.limiter(|limiter| limiter.charge(self.clock().monotonic(), &shown, source)) {
            tracing::warn!(user = shown, ?source, "sign-in refused: too many attempts");
            return Err(FarmError::new(
                ErrorKind::TooMany { retry_after },
                format!("too many failed sign-ins; try again in {} s", retry_after.as_secs() + 1),
            ));
        }
        let found = query("SELECT name, admin, tenant, created_unix_s, password_hash FROM users WHERE name = $1")
            .bind(name)
            .fetch_optional(self.store())
            .await
            .map_err(|e| FarmError::store("look up a user", e))?;
        let (user, hash) = match &found {
            Some(found) => (Some(row::user(found)), Some(found.try_get("password_hash"))),
            None => (None, None),
        };
        let store = |e| FarmError::store("look up a user", e);
        let (user, hash) = (user.transpose().map_err(store)?, hash.transpose().map_err(store)?);
        match (self.passwords().verify(password, hash).await?, user) {
            (true, Some(user)) => {
                self.limiter(|limiter| limiter.forgive(&shown, source));
                tracing::info!(user = %user.name, ?source, "signed in");
                Ok(user)
            }
            _ => {
                tracing::warn!(user = shown, ?source, "sign-in failed");
                Err(FarmError::with_code(
                    ErrorKind::Unauthenticated,
                    "wrong_credentials",
                    "the user name or the password is wrong",
                ))
            }
        }
    }
}
