use std::time::Duration;

use qvd_core::{Digest, UserName};
use rand::{TryRngCore, rngs::OsRng};
use sha2::{Digest as _, Sha256};

use crate::{ErrorKind, Farm, FarmError, Secret, SessionInfo, SessionKind, User, row, store::query};

/// A web session ends when nothing came from it for this long.
const WEB_IDLE: Duration = Duration::from_secs(8 * 3600);

/// The same of one that administers: what is left open on a desk is soon of no use.
const ADMIN_IDLE: Duration = Duration::from_secs(30 * 60);

/// No session lives longer than this: the QVD wire protocol says a day.
const LIFETIME: Duration = Duration::from_secs(24 * 3600);

/// The same of one that administers: a page that asks again by itself keeps it in use.
const ADMIN_LIFETIME: Duration = Duration::from_secs(8 * 3600);

/// How exact the time of last use is. Each request would be a write otherwise.
const TOUCH_EVERY: Duration = Duration::from_secs(60);

/// A token has 256 random bits in hexadecimal digits.
const TOKEN_BYTES: usize = 32;

fn seconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_secs()).unwrap_or(i64::MAX)
}

fn sha256_hex(parts: &[&str]) -> String {
    let hash = parts.iter().fold(Sha256::new(), |hash, part| hash.chain_update(part));
    Digest::new(hash.finalize().into()).hex()
}

/// What the database keeps of a token. No salt: a token is random already.
fn token_hash(token: &str) -> String {
    sha256_hex(&[token])
}

/// What the forms of a session carry. It follows from the token, which a
/// foreign site cannot read, and the token does not follow from it.
fn csrf_of(token: &str) -> String {
    sha256_hex(&["qvd csrf ", token])
}

/// A session just made: the only time its token is seen.
#[derive(Debug)]
pub struct NewSession {
    /// For the cookie or the `Authorization` header: 64 hexadecimal digits.
    pub token: Secret,
    /// The session itself.
    pub session: Session,
}

/// Somebody who is signed in.
#[derive(Debug, Clone)]
pub struct Session {
    /// Who, as of now.
    pub user: User,
    /// What the record says.
    pub info: SessionInfo,
    csrf: String,
}

impl Session {
    /// What every form of a web session must carry, to show that this site
    /// made it: 64 hexadecimal digits.
    #[must_use]
    pub fn csrf_token(&self) -> &str {
        &self.csrf
    }

    /// Whether `given` is [`Session::csrf_token`], in a time that does not
    /// tell how much of it is right.
    #[must_use]
    pub fn csrf_matches(&self, given: &str) -> bool {
        let differences = self.csrf.bytes().zip(given.bytes()).fold(0, |all, (a, b)| all | (a ^ b));
        self.csrf.len() == given.len() && differences == 0
    }
}

impl Farm {
    /// Signs a user in whose password was checked.
    ///
    /// # Errors
    /// There is no such user, or the host has no randomness; [`ErrorKind::Forbidden`]:
    /// [`SessionKind::Admin`] of a user who does not administer the farm.
    pub async fn create_session(&self, user: &UserName, kind: SessionKind) -> Result<NewSession, FarmError> {
        let user = self.user(user).await?;
        if kind == SessionKind::Admin && !user.admin {
            let what = format!("user `{}` does not administer the farm", user.name);
            return Err(FarmError::with_code(ErrorKind::Forbidden, "no_administrator", what));
        }
        let mut bytes = [0; TOKEN_BYTES];
        OsRng
            .try_fill_bytes(&mut bytes)
            .map_err(|e| FarmError::with_code(ErrorKind::Failed, "internal", "cannot make a token").because(e))?;
        let token = Secret::new(Digest::new(bytes).hex());
        let now = self.now_unix_s();
        let mut write = self.write().await?;
        let info = query(
            "INSERT INTO sessions (token_hash, user_name, kind, created_unix_s, last_used_unix_s, expires_unix_s)
             VALUES ($1, $2, $3, $4, $4, $5)
             RETURNING id, user_name, kind, created_unix_s, last_used_unix_s, expires_unix_s",
        )
        .bind(token_hash(token.expose()))
        .bind(user.name.as_str())
        .bind(kind.as_str())
        .bind(now)
        .bind(now.saturating_add(seconds(lifetime(kind))))
        .fetch_one(&mut write)
        .await
        .and_then(|found| row::session(&found))
        .map_err(|e| FarmError::store("create a session", e))?;
        write.commit().await?;
        tracing::info!(user = %user.name, session = info.id, kind = kind.as_str(), "session created");
        let csrf = csrf_of(token.expose());
        Ok(NewSession { token, session: Session { user, info, csrf } })
    }

    /// Finds who is behind a token, and notes that the session is in use.
    ///
    /// # Errors
    /// [`ErrorKind::Unauthenticated`]: no such token, or its session ended.
    pub async fn find_session(&self, token: &Secret, kind: SessionKind) -> Result<Session, FarmError> {
        let store = |e| FarmError::store("look up a session", e);
        let now = self.now_unix_s();
        let found = query(
            "SELECT id, user_name, kind, sessions.created_unix_s, last_used_unix_s, expires_unix_s
             FROM sessions WHERE token_hash = $1 AND kind = $2",
        )
        .bind(token_hash(token.expose()))
        .bind(kind.as_str())
        .fetch_optional(self.store())
        .await
        .and_then(|found| found.as_ref().map(row::session).transpose())
        .map_err(store)?;
        let ended =
            || FarmError::with_code(ErrorKind::Unauthenticated, "session_ended", "sign in: the session has ended");
        let mut info = found.filter(|info| is_live(info, now)).ok_or_else(ended)?;
        let user = self.user(&info.user).await?;
        if kind == SessionKind::Admin && !user.admin {
            return Err(ended());
        }
        if now.saturating_sub(info.last_used_unix_s.cast_signed()) >= seconds(TOUCH_EVERY) {
            let mut write = self.write().await?;
            query("UPDATE sessions SET last_used_unix_s = $1 WHERE id = $2 AND last_used_unix_s < $1")
                .bind(now)
                .bind(info.id)
                .execute(&mut write)
                .await
                .map_err(|e| FarmError::store("note that a session is in use", e))?;
            write.commit().await?;
            info.last_used_unix_s = now.cast_unsigned();
        }
        Ok(Session { user, info, csrf: csrf_of(token.expose()) })
    }

    /// Signs out: ends the session behind a token. One that is not there has ended.
    ///
    /// # Errors
    /// The database cannot be written.
    pub async fn end_session(&self, token: &Secret) -> Result<(), FarmError> {
        let mut write = self.write().await?;
        query("DELETE FROM sessions WHERE token_hash = $1")
            .bind(token_hash(token.expose()))
            .execute(&mut write)
            .await
            .map_err(|e| FarmError::store("end a session", e))?;
        write.commit().await
    }

    /// Ends a session by its number, for an administrator.
    ///
    /// # Errors
    /// There is no such session.
    pub async fn end_session_by_id(&self, id: i64) -> Result<(), FarmError> {
        let mut write = self.write().await?;
        let gone = query("DELETE FROM sessions WHERE id = $1")
            .bind(id)
            .execute(&mut write)
            .await
            .map_err(|e| FarmError::store("end a session", e))?;
        write.commit().await?;
        if gone == 0 {
            let what = format!("there is no session {id}");
            return Err(FarmError::with_code(ErrorKind::NotFound, "unknown_session", what));
        }
        tracing::info!(session = id, "session ended by an administrator");
        Ok(())
    }

    /// Who is signed in, oldest first; of one user or of all.
    ///
    /// # Errors
    /// The database cannot be read.
    pub async fn sessions(&self, user: Option<&UserName>) -> Result<Vec<SessionInfo>, FarmError> {
        let now = self.now_unix_s();
        let all: Vec<SessionInfo> = query(
            "SELECT id, user_name, kind, created_unix_s, last_used_unix_s, expires_unix_s
             FROM sessions WHERE $1 IS NULL OR user_name = $1 ORDER BY id",
        )
        .bind(user.map(UserName::as_str))
        .fetch_all(self.store())
        .await
        .and_then(|rows| rows.iter().map(row::session).collect())
        .map_err(|e| FarmError::store("list the sessions", e))?;
        Ok(all.into_iter().filter(|info| is_live(info, now)).collect())
    }

    /// Deletes the records of sessions that have ended; returns how many. An
    /// ended session is of no use before that either.
    ///
    /// # Errors
    /// The database cannot be written.
    pub async fn sweep_sessions(&self) -> Result<u64, FarmError> {
        let now = self.now_unix_s();
        let mut write = self.write().await?;
        let gone = query(
            "DELETE FROM sessions WHERE expires_unix_s <= $1 OR (kind = 'web' AND last_used_unix_s <= $2)
                 OR (kind = 'admin' AND last_used_unix_s <= $3)",
        )
        .bind(now)
        .bind(now.saturating_sub(seconds(WEB_IDLE)))
        .bind(now.saturating_sub(seconds(ADMIN_IDLE)))
        .execute(&mut write)
        .await
        .map_err(|e| FarmError::store("delete ended sessions", e))?;
        write.commit().await?;
        Ok(gone)
    }
}

const fn lifetime(kind: SessionKind) -> Duration {
    match kind {
        SessionKind::Admin => ADMIN_LIFETIME,
        SessionKind::Web | SessionKind::Bearer => LIFETIME,
    }
}

fn is_live(info: &SessionInfo, now: i64) -> bool {
    let idle = match info.kind {
        SessionKind::Web => Some(WEB_IDLE),
        SessionKind::Admin => Some(ADMIN_IDLE),
        SessionKind::Bearer => None,
    };
    let used = info.last_used_unix_s.cast_signed();
    info.expires_unix_s.cast_signed() > now && idle.is_none_or(|idle| used > now.saturating_sub(seconds(idle)))
}
