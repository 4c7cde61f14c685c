//! Who sends a request of the QVD wire protocol.

use base64::{Engine as _, prelude::BASE64_STANDARD};
use qvd_farm::Secret;

use super::{answer::Refusal, head::Head};

/// The one tenant there is; `user@default` is `user`.
pub(crate) const TENANT: &str = "default";
/// Most extra values in one request.
const EXTRA_MAX: usize = 16;

/// What a request shows of itself.
#[derive(Debug)]
pub(crate) enum Credentials {
    /// Name, without its tenant, and password.
    Password { user: String, password: Secret },
    /// A token from `create_auth_token`.
    Token(Secret),
}

impl Credentials {
    /// Reads the `Authorization` header and checks the extra values.
    pub(crate) fn of(head: &Head) -> Result<Self, Refusal> {
        check_extra(head)?;
        let missing = || Refusal::new(401, "no_credentials", "sign in: the request names no user");
        let (scheme, value) = head.header("authorization").and_then(|v| v.split_once(' ')).ok_or_else(missing)?;
        let value = value.trim();
        if scheme.eq_ignore_ascii_case("basic") {
            basic(value)
        } else if scheme.eq_ignore_ascii_case("bearer") {
            token(value).map(Self::Token).ok_or_else(|| {
                Refusal::new(401, "bad_credentials", "sign in: what was sent is not a token of this server")
            })
        } else {
            Err(Refusal::new(401, "bad_credentials", "sign in with Basic or Bearer"))
        }
    }
}

/// Reads what stands behind `Basic`.
pub(crate) fn basic(value: &str) -> Result<Credentials, Refusal> {
    let bad = || Refusal::new(401, "bad_credentials", "sign in: user and password are not readable");
    let text = BASE64_STANDARD.decode(value).ok().and_then(|bytes| String::from_utf8(bytes).ok()).ok_or_else(bad)?;
    let (login, password) = text.split_once(':').ok_or_else(bad)?;
    let (user, tenant) = split_tenant(login);
    if tenant.is_some_and(|tenant| tenant != TENANT) {
        // As for a wrong password: who guesses learns nothing.
        return Err(Refusal::new(401, "wrong_credentials", "the user name or the password is wrong"));
    }
    Ok(Credentials::Password { user: user.to_owned(), password: Secret::from(password) })
}

/// Splits `user@tenant` or `user#tenant`.
pub(crate) fn split_tenant(login: &str) -> (&str, Option<&str>) {
    login.rsplit_once(['@', '#']).map_or((login, None), |(user, tenant)| (user, Some(tenant)))
}

/// Finds the token in a `Bearer` value. Clients store what they were given,
/// which is base64, and some encode it once more before they send it.
pub(crate) fn token(value: &str) -> Option<Secret> {
    let is_token = |text: &str| text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    let mut text = value.to_owned();
    for _ in 0..2 {
        if is_token(&text) {
            break;
        }
        text = String::from_utf8(BASE64_STANDARD.decode(&text).ok()?).ok()?;
    }
    is_token(&text).then(|| Secret::new(text))
}

/// Extra values (`Auth-<hex of the name>: base64(value)`) are for the second
/// factors of a site; there are none here, but what is no such value is refused.
fn check_extra(head: &Head) -> Result<(), Refusal> {
    let is_extra = |name: &str| name.get(..5).is_some_and(|prefix| prefix.eq_ignore_ascii_case("auth-"));
    let mut count = 0_usize;
    for (name, value) in head.headers().filter(|(name, _)| is_extra(name)) {
        count += 1;
        let hex = name.get(5..).unwrap_or_default();
        let hex_good = !hex.is_empty() && hex.len() % 2 == 0 && hex.bytes().all(|b| b.is_ascii_hexdigit());
        if !hex_good || count > EXTRA_MAX || BASE64_STANDARD.decode(value.trim_ascii()).is_err() {
            return Err(Refusal::new(400, "bad_auth_header", "an `Auth-` header is not as the protocol says"));
        }
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use super::*;

    fn parse(lines: &str) -> Result<Credentials, Refusal> {
        Credentials::of(&Head::parse(format!("GET / HTTP/1.1\r\n{lines}\r\n").as_bytes()).unwrap().unwrap())
    }

    fn user(login: &str) -> Result<(String, String), u16> {
        let line = format!("Authorization: Basic {}\r\n", BASE64_STANDARD.encode(login));
        match parse(&line).map_err(|refusal| refusal.status)? {
            Credentials::Password { user, password } => Ok((user, password.expose().to_owned())),
            Credentials::Token(_) => panic!("a password is no token"),
        }
    }

    #[test]
    fn names_lose_their_tenant_and_passwords_keep_their_colons() {
        let good = |user: &str, password: &str| Ok((user.to_owned(), password.to_owned()));
        assert_eq!(user("ada:a:b"), good("ada", "a:b"));
        assert_eq!(user("ada@default:x"), good("ada", "x"));
        assert_eq!(user("ada#default:x"), good("ada", "x"));
        assert_eq!(user("ada@other:x"), Err(401));
        assert_eq!(user("no colon"), Err(401));
    }

    #[test]
    fn a_token_is_found_however_often_it_was_encoded() {
        let token = "0123456789abcdef".repeat(4);
        let once = BASE64_STANDARD.encode(&token);
        for sent in [&token, &once, &BASE64_STANDARD.encode(&once)] {
            let Ok(Credentials::Token(found)) = parse(&format!("Authorization: bearer {sent}\r\n")) else {
                panic!("no token in {sent}");
            };
            assert_eq!(found.expose(), token);
        }
        assert!(parse("Authorization: Bearer YWJj\r\n").is_err());
    }

    #[test]
    fn extra_values_must_be_what_they_say() {
        let base = "Authorization: Basic YTpi\r\n";
        assert!(parse(&format!("{base}Auth-6f7470: MTIzNDU2\r\n")).is_ok());
        for bad in ["Auth-xx: YQ==", "Auth-6f7: YQ==", "Auth-6f: ???", "Auth-: YQ=="] {
            assert_eq!(parse(&format!("{base}{bad}\r\n")).unwrap_err().status, 400, "{bad}");
        }
    }

    #[test]
    fn passwords_are_not_in_debug_output() {
        let credentials =
            parse(&format!("Authorization: Basic {}\r\n", BASE64_STANDARD.encode("ada:hunter2"))).unwrap();
        assert!(!format!("{credentials:?}").contains("hunter2"));
    }
}
