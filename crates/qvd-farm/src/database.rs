use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
};

use sqlx::postgres::{PgConnectOptions, PgSslMode};

use crate::{ErrorKind, FarmError};

/// Where a farm keeps its records.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Database {
    /// SQLite in a file, which is made if it is not there, for its owner alone.
    File(PathBuf),
    /// A database of PostgreSQL 10 or later. Its tables are made if they are not there.
    Postgres(PostgresUrl),
}

impl From<&Path> for Database {
    fn from(file: &Path) -> Self {
        Self::File(file.to_owned())
    }
}

/// `postgres://USER@HOST[:PORT]/DATABASE[?sslmode=…&sslrootcert=FILE&host=DIRECTORY]`.
///
/// It holds no password: whoever lists processes would see it. That stands in the file that
/// `PGPASSFILE` names, or in `~/.pgpass`, as for PostgreSQL's own programs; a socket of the
/// same host needs none. A server that is reached over the network has to show a certificate
/// of its name unless `sslmode` says otherwise.
#[derive(Clone)]
pub struct PostgresUrl(Box<PgConnectOptions>);

impl PostgresUrl {
    pub(crate) fn options(&self) -> PgConnectOptions {
        (*self.0).clone()
    }
}

impl FromStr for PostgresUrl {
    type Err = FarmError;

    fn from_str(text: &str) -> Result<Self, FarmError> {
        // The text is not shown: what is wrong with it may be that it holds a password.
        let refuse = |what: &str| FarmError::with_code(ErrorKind::Invalid, "invalid_database", what);
        let rest = ["postgres://", "postgresql://"].iter().find_map(|scheme| text.strip_prefix(scheme));
        let rest = rest.ok_or_else(|| refuse("a database is named as postgres://USER@HOST/DATABASE"))?;
        let (authority, query) = rest.split_once('?').unwrap_or((rest, ""));
        let user = authority.rsplit_once('@').map_or("", |(user, _)| user);
        let settings = || query.split('&').filter_map(|setting| setting.split_once('='));
        if user.contains(':') || settings().any(|(name, _)| name == "password") {
            let text = "the address of a database holds no password: put it into the file that PGPASSFILE names";
            return Err(refuse(text));
        }
        let options: PgConnectOptions =
            text.parse().map_err(|e: sqlx::Error| refuse("this is no address of a PostgreSQL database").because(e))?;
        if options.get_database().is_none_or(str::is_empty) {
            return Err(refuse("the address of a database ends with its name: postgres://USER@HOST/DATABASE"));
        }
        let is_here = options.get_socket().is_some()
            || options.get_host().starts_with('/')
            || ["localhost", "127.0.0.1", "[::1]", "::1"].contains(&options.get_host());
        let is_said = settings().any(|(name, _)| matches!(name, "sslmode" | "ssl-mode"));
        let options = if is_here || is_said { options } else { options.ssl_mode(PgSslMode::VerifyFull) };
        Ok(Self(Box::new(options)))
    }
}

/// Without what it may have been told in secret.
impl fmt::Display for PostgresUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (user, database) = (self.0.get_username(), self.0.get_database().unwrap_or_default());
        match self.0.get_socket() {
            Some(socket) => write!(f, "postgres://{user}@{}/{database}", socket.display()),
            None => write!(f, "postgres://{user}@{}:{}/{database}", self.0.get_host(), self.0.get_port()),
        }
    }
}

impl fmt::Debug for PostgresUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(file) => file.display().fmt(f),
            Self::Postgres(url) => url.fmt(f),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn an_address_with_a_password_is_refused_and_not_repeated() {
        for text in ["postgres://qvd:geheim@db.example/qvd", "postgres://qvd@db.example/qvd?password=geheim"] {
            let error = text.parse::<PostgresUrl>().unwrap_err();
            assert!(error.to_string().contains("PGPASSFILE"), "{error}");
            assert!(!format!("{error:?}").contains("geheim"), "{error:?}");
        }
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for text in ["", "qvd.sqlite", "mysql://a@b/c", "postgres://qvd@db.example", "postgres://qvd@db.example:x/qvd"]
        {
            assert!(text.parse::<PostgresUrl>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_server_elsewhere_shows_a_certificate_unless_told_otherwise() {
        let mode = |text: &str| text.parse::<PostgresUrl>().unwrap().options().get_ssl_mode();
        assert!(matches!(mode("postgres://qvd@db.example/qvd"), PgSslMode::VerifyFull));
        assert!(matches!(mode("postgres://qvd@db.example/qvd?sslmode=require"), PgSslMode::Require));
        for near in ["postgres://qvd@localhost/qvd", "postgres://qvd@localhost/qvd?host=/run/postgresql"] {
            assert!(matches!(mode(near), PgSslMode::Prefer), "{near}");
        }
    }
}
