use std::{collections::HashMap, error::Error as _};

use qvd_core::{DesktopId, Digest, FlavourName, Tag};
use qvd_node::HostErrorKind;

use crate::{ErrorKind, Farm, FarmError, Flavour, FlavourDefaults, row, store::query};

impl Farm {
    /// The flavours that have an image, by name.
    ///
    /// # Errors
    /// The host cannot read its repository, or the database cannot be read.
    pub async fn flavours(&self) -> Result<Vec<Flavour>, FarmError> {
        let images = self.images().await?;
        let mut set = self.all_defaults().await?;
        let flavours = images.into_iter().map(|image| Flavour {
            defaults: set.remove(image.flavour.as_str()).unwrap_or_else(|| FlavourDefaults::of(&image.defaults)),
            name: image.flavour,
            digest: image.digest,
            created_unix_s: image.created_unix_s,
        });
        Ok(flavours.collect())
    }

    /// One flavour.
    ///
    /// # Errors
    /// There is no such flavour; the message names those there are.
    pub async fn flavour(&self, name: &FlavourName) -> Result<Flavour, FarmError> {
        let flavours = self.flavours().await?;
        flavours.iter().find(|flavour| flavour.name == *name).cloned().ok_or_else(|| {
            let known: Vec<_> = flavours.iter().map(|flavour| format!("`{}`", flavour.name)).collect();
            let known = if known.is_empty() {
                "there is none yet: build an image".to_owned()
            } else {
                format!("there is {}", known.join(", "))
            };
            FarmError::with_code(ErrorKind::NotFound, "unknown_flavour", format!("unknown flavour `{name}`; {known}"))
        })
    }

    /// Sets what new desktops of a flavour get; existing ones keep theirs.
    ///
    /// # Errors
    /// There is no such flavour, or a limit is zero.
    pub async fn set_flavour_defaults(&self, name: &FlavourName, defaults: FlavourDefaults) -> Result<(), FarmError> {
        self.flavour(name).await?;
        crate::desktop::check_limits(&defaults.limits)?;
        let mut write = self.write().await?;
        query(
            "INSERT INTO flavour_defaults
                 (name, memory_bytes, cpu_milli, pids, root_policy, net_port, net_internet, net_policy, io_bytes_per_s)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)
             ON CONFLICT (name) DO UPDATE SET
                 memory_bytes = excluded.memory_bytes, cpu_milli = excluded.cpu_milli, pids = excluded.pids,
                 root_policy = excluded.root_policy, net_port = excluded.net_port, net_internet = excluded.net_internet,
                 net_policy = excluded.net_policy, io_bytes_per_s = excluded.io_bytes_per_s",
        )
        .bind(name.as_str())
        .bind(row::bytes_column(defaults.limits.memory))
        .bind(i64::from(defaults.limits.cpu.0))
        .bind(i64::from(defaults.limits.pids))
        .bind(defaults.root.as_str())
        .bind(defaults.net.port)
        .bind(defaults.net.internet)
        .bind(row::net_column(&defaults.net)?)
        .bind(defaults.limits.io.map(row::bytes_column))
        .execute(&mut write)
        .await
        .map_err(|e| FarmError::store("set a flavour's defaults", e))?;
        write.commit().await?;
        tracing::info!(flavour = %name, "flavour defaults set");
        Ok(())
    }

    /// Has new desktops of a flavour get again what the recipe of its image says.
    ///
    /// # Errors
    /// There is no such flavour.
    pub async fn forget_flavour_defaults(&self, name: &FlavourName) -> Result<(), FarmError> {
        self.flavour(name).await?;
        let mut write = self.write().await?;
        query("DELETE FROM flavour_defaults WHERE name = $1")
            .bind(name.as_str())
            .execute(&mut write)
            .await
            .map_err(|e| FarmError::store("forget a flavour's defaults", e))?;
        write.commit().await?;
        tracing::info!(flavour = %name, "flavour has its recipe's defaults");
        Ok(())
    }

    /// The image that a desktop which follows a tag gets at its next start.
    pub(crate) async fn resolve(
        &self,
        flavour: &FlavourName,
        tag: &Tag,
        desktop: Option<DesktopId>,
    ) -> Result<Digest, FarmError> {
        let flavour = self.flavour(flavour).await?.name;
        let (name, follows) = (flavour.clone(), tag.clone());
        let followed = self.on_host(move |host| host.follow(&name, &follows, desktop)).await?;
        followed.map_err(|error| match error.kind() {
            HostErrorKind::NotFound => {
                let cause = error.source().map_or_else(|| error.to_string(), ToString::to_string);
                FarmError::with_code(ErrorKind::NotFound, "unknown_tag", cause)
            }
            _ => FarmError::host(format!("cannot find what follows `{tag}` of {flavour}"), error),
        })
    }

    async fn all_defaults(&self) -> Result<HashMap<String, FlavourDefaults>, FarmError> {
        query(
            "SELECT name, memory_bytes, cpu_milli, pids, root_policy, io_bytes_per_s, net_port, net_internet, net_policy
             FROM flavour_defaults",
        )
        .fetch_all(self.store())
        .await
        .and_then(|rows| rows.iter().map(|r| Ok((r.try_get("name")?, row::flavour_defaults(r)?))).collect())
        .map_err(|e| FarmError::store("read the flavours' defaults", e))
    }
}
