//! What a recipe's values have to be.

use std::ops::Range;

use qvd_core::{BirthPolicy, Calls};
use toml::Spanned;

use super::{DEFAULT_LOCALE, FileSpec, SessionSpec, UserConfig, text};
use crate::error::RecipeError;

impl FileSpec {
    pub(super) fn check(text: &str, file: &text::File) -> Result<Self, RecipeError> {
        let path = checked(text, &file.path, |path| absolute(path).map(|()| path.clone()))?;
        let mode = match &file.mode {
            None => 0o644,
            Some(mode) => checked(text, mode, |mode| match u32::from_str_radix(mode, 8) {
                Ok(mode @ 0..=0o7777) => Ok(mode),
                _ => Err(format!("mode `{mode}` is not four octal digits such as \"0644\"")),
            })?,
        };
        let (uid, gid) = match &file.owner {
            None => (0, 0),
            Some(owner) => checked(text, owner, |owner| {
                let ids = owner.split_once(':').and_then(|(uid, gid)| Some((id(uid)?, id(gid)?)));
                ids.ok_or_else(|| format!("owner `{owner}` is not `uid:gid` with numbers below {ID_LIMIT}"))
            })?,
        };
        Ok(Self { path, mode, uid, gid, content: file.content.clone() })
    }
}

/// Ids that a desktop's range has. Source: [`qvd_core::UidRange::LEN`].
const ID_LIMIT: u32 = qvd_core::UidRange::LEN;

fn id(text: &str) -> Option<u32> {
    text.parse().ok().filter(|id| *id < ID_LIMIT)
}

pub(super) fn check_user(user: &UserConfig) -> Result<(), String> {
    // The form that `useradd` of every distribution takes.
    let mut bytes = user.name.bytes();
    let first = bytes.next().is_some_and(|b| b.is_ascii_lowercase() || b == b'_');
    if !first
        || user.name.len() > 32
        || !bytes.all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"_-".contains(&b))
    {
        return Err(format!("user name `{}` is not up to 32 of a-z 0-9 _ - that start with a letter or _", user.name));
    }
    if user.uid == 0 || user.gid == 0 || user.uid >= ID_LIMIT || user.gid >= ID_LIMIT {
        return Err(format!("uid and gid of user `{}` must be between 1 and {}", user.name, ID_LIMIT - 1));
    }
    Ok(())
}

pub(super) fn check_session(session: &SessionSpec) -> Result<(), String> {
    check_argv(&session.command, "session command")?;
    for argv in &session.autostart {
        check_argv(argv, "autostart entry")?;
    }
    match session.env.iter().find(|(k, v)| k.is_empty() || k.contains(['=', '\0']) || v.contains('\0')) {
        Some((key, _)) => Err(format!("`{}` cannot be an environment variable", key.escape_default())),
        None => Ok(()),
    }
}

pub(super) fn check_argv(argv: &[String], what: &str) -> Result<(), String> {
    if argv.first().is_none_or(String::is_empty) {
        return Err(format!("a {what} needs a program"));
    }
    if argv.iter().any(|argument| argument.contains('\0')) {
        return Err(format!("an argument of a {what} holds a NUL"));
    }
    Ok(())
}

/// A package's name goes to apt as an argument: it must not look like an option.
/// The form is that of Debian policy 5.6.1.
pub(super) fn package_name(name: &str) -> Result<(), String> {
    let mut bytes = name.bytes();
    let first = bytes.next().is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    if first && bytes.all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"+-.".contains(&b)) {
        Ok(())
    } else {
        Err(format!("`{}` is not a package name", name.escape_default()))
    }
}

pub(super) fn word(text: &str, what: &str) -> Result<(), String> {
    let mut bytes = text.bytes();
    if bytes.next().is_some_and(|b| b.is_ascii_alphanumeric())
        && bytes.all(|b| b.is_ascii_alphanumeric() || b"-_./".contains(&b))
    {
        Ok(())
    } else {
        Err(format!("`{}` is not a {what}", text.escape_default()))
    }
}

/// An image's own init is never what runs in a desktop.
pub(super) fn calls(calls: Calls) -> Result<(), String> {
    match calls {
        Calls::System => Err("calls `system` are for an image's own init: use `desktop` or `application`".to_owned()),
        _ => Ok(()),
    }
}

/// Clones are of templates.
pub(super) fn machine(machine: BirthPolicy) -> Result<(), String> {
    match (machine.template, machine.ready) {
        (Some(false), Some(1..)) => {
            Err("machines that stand ready are clones of a template: leave out `ready`, or `template = false`"
                .to_owned())
        }
        _ => Ok(()),
    }
}

/// The form of setlocale(3), `language_TERRITORY.UTF-8@modifier`, of which none
/// but UTF-8 is asked for by anything that is alive.
pub(super) fn locale(name: &str) -> Result<(), String> {
    let wrong = || {
        let name = name.escape_default();
        Err(format!("`{name}` is no locale: use `C.UTF-8`, or one such as `de_DE.UTF-8`"))
    };
    if name == DEFAULT_LOCALE {
        return Ok(());
    }
    let (name, modifier) = name.split_once('@').map_or((name, None), |(name, modifier)| (name, Some(modifier)));
    let Some((language, territory)) = name.strip_suffix(".UTF-8").and_then(|name| name.split_once('_')) else {
        return wrong();
    };
    let is = |text: &str, len: std::ops::RangeInclusive<usize>, of: fn(&u8) -> bool| {
        len.contains(&text.len()) && text.as_bytes().iter().all(of)
    };
    let sound = is(language, 2..=3, u8::is_ascii_lowercase)
        && is(territory, 2..=2, u8::is_ascii_uppercase)
        && modifier.is_none_or(|modifier| is(modifier, 1..=16, u8::is_ascii_alphanumeric));
    if sound { Ok(()) } else { wrong() }
}

/// A limit that lets nothing be is a mistake.
pub(super) fn some<T: PartialEq + Default + Copy>(limit: &T, what: &str) -> Result<T, String> {
    if *limit == T::default() { Err(format!("with a limit of zero {what} no image can be made")) } else { Ok(*limit) }
}

/// A path inside an image: absolute, and never out of it.
pub(crate) fn absolute(path: &str) -> Result<(), String> {
    let Some(rest) = path.strip_prefix('/') else {
        return Err(format!("path `{}` does not start with `/`", path.escape_default()));
    };
    if rest.is_empty() || rest.contains('\0') || rest.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return Err(format!("path `{}` has an empty, `.` or `..` part", path.escape_default()));
    }
    Ok(())
}

pub(super) fn checked<T, U>(
    text: &str,
    value: &Spanned<T>,
    check: impl FnOnce(&T) -> Result<U, String>,
) -> Result<U, RecipeError> {
    check(value.get_ref()).map_err(|reason| wrong(text, value.span(), reason))
}

pub(super) fn first_line(message: &str) -> String {
    message.lines().map(str::trim).collect::<Vec<_>>().join(", ")
}

pub(super) fn wrong(text: &str, span: Range<usize>, reason: String) -> RecipeError {
    let before = text.get(..span.start).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
    RecipeError { line, column, reason }
}
