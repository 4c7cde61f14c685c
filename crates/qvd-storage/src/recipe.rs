//! Recipes: what an image is made of, written by a person in TOML.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

use qvd_core::{Device, FlavourName, Geometry, Limits, NetPolicy, RestPolicy, RootPolicy};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use toml::Spanned;

use crate::{HomeOptions, error::RecipeError, glob::Glob};

/// Changes whenever the same recipe would give another tree or another
/// `image.json`, so that images made by an older version are not reused.
const FORMAT: &str = "qvd-recipe 1";

/// Largest recipe read, in bytes. Anything longer is not written by a person.
pub(crate) const RECIPE_MAX_BYTES: usize = 1 << 20;

/// What an image is made of.
#[derive(Debug, Clone)]
pub struct Recipe {
    pub(crate) name: FlavourName,
    pub(crate) config: ImageConfig,
    pub(crate) base: Base,
    pub(crate) packages: Vec<String>,
    pub(crate) exclude: Vec<String>,
    pub(crate) remove: Vec<Glob>,
    pub(crate) files: Vec<FileSpec>,
    /// Programs run inside the finished tree, each an argument list.
    pub(crate) run: Vec<Vec<String>>,
    text: String,
    key: [u8; 32],
}

/// What a recipe says about running its image, kept with the image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageConfig {
    /// Flavour that the image belongs to.
    pub flavour: FlavourName,
    /// One line for a person who chooses.
    pub description: String,
    /// The account that sessions run as.
    pub user: UserConfig,
    /// The graphical session; none means that only services run.
    pub session: Option<SessionSpec>,
    /// Programs to keep running as root inside, each an argument list.
    pub services: Vec<Vec<String>>,
    /// What a desktop of this flavour gets unless told otherwise.
    pub defaults: Defaults,
}

impl ImageConfig {
    /// What an image runs with about which nothing is known but its flavour: no
    /// session, and a user of the first id that distributions give to people.
    #[must_use]
    pub fn plain(flavour: FlavourName) -> Self {
        Self {
            flavour,
            description: String::new(),
            user: UserConfig { name: "user".to_owned(), uid: 1000, gid: 1000 },
            session: None,
            services: Vec::new(),
            defaults: Defaults::default(),
        }
    }
}

/// The account that sessions run as.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UserConfig {
    /// Its name in the image's `/etc/passwd`.
    pub name: String,
    /// Its id inside.
    pub uid: u32,
    /// Its group inside.
    pub gid: u32,
}

impl UserConfig {
    /// Its home directory inside.
    #[must_use]
    pub fn home(&self) -> String {
        format!("/home/{}", self.name)
    }
}

/// The graphical session of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SessionSpec {
    /// Window manager or desktop environment, an argument list.
    pub command: Vec<String>,
    /// Programs started once the window manager is up, each an argument list.
    #[serde(default)]
    pub autostart: Vec<Vec<String>>,
    /// Size of the screen until a client asks for another.
    #[serde(default)]
    pub geometry: Geometry,
    /// Added to the environment of everything inside.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// How long a browser's head stays after the last client left, in seconds.
    #[serde(default = "head_linger_default_s")]
    pub head_linger_s: u32,
}

/// Long enough for a reload of the page, short enough to give the memory of
/// heads that nobody looks at back.
const fn head_linger_default_s() -> u32 {
    30
}

/// What a desktop gets unless told otherwise.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Defaults {
    /// What it may use.
    pub limits: Limits,
    /// What becomes of its root at stop.
    pub root: RootPolicy,
    /// What makes its root, instead of the node's default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backend: Option<String>,
    /// How its home is kept where this library keeps it, and what it may hold.
    #[serde(skip_serializing_if = "HomeOptions::is_plain")]
    pub home: HomeOptions,
    /// What it may reach.
    pub net: NetPolicy,
    /// What it does while nobody looks.
    pub rest: RestPolicy,
    /// Which of the host's devices its programs may use.
    #[serde(skip_serializing_if = "BTreeSet::is_empty")]
    pub devices: BTreeSet<Device>,
}

/// The distribution that packages are taken from.
#[derive(Debug, Clone)]
pub(crate) struct Base {
    pub(crate) suite: String,
    pub(crate) components: Vec<String>,
}

/// A file that the recipe brings itself.
#[derive(Debug, Clone)]
pub(crate) struct FileSpec {
    /// Absolute, without `.` or `..`.
    pub(crate) path: String,
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) content: String,
}

mod text {
    //! The text's own shape, before its values are checked.
    use super::{Defaults, Deserialize, SessionSpec, Spanned, UserConfig};

    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    pub(super) struct Recipe {
        pub(super) name: Spanned<String>,
        pub(super) description: Option<Spanned<String>>,
        pub(super) base: Base,
        pub(super) packages: Vec<Spanned<String>>,
        #[serde(default)]
        pub(super) exclude: Vec<Spanned<String>>,
        #[serde(default)]
        pub(super) remove: Vec<Spanned<String>>,
        #[serde(default)]
        pub(super) files: Vec<File>,
        pub(super) user: Spanned<UserConfig>,
        pub(super) session: Option<Spanned<SessionSpec>>,
        #[serde(default)]
        pub(super) services: Vec<Spanned<Vec<String>>>,
        #[serde(default)]
        pub(super) run: Vec<Spanned<Vec<String>>>,
        #[serde(default)]
        pub(super) defaults: Defaults,
    }

    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    pub(super) struct Base {
        pub(super) distribution: Spanned<String>,
        pub(super) suite: Spanned<String>,
        #[serde(default)]
        pub(super) components: Vec<Spanned<String>>,
    }

    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    pub(super) struct File {
        pub(super) path: Spanned<String>,
        /// Octal digits in a text: TOML's own numbers would be read as decimal.
        pub(super) mode: Option<Spanned<String>>,
        /// `uid:gid`, by number.
        pub(super) owner: Option<Spanned<String>>,
        pub(super) content: String,
    }
}

impl Recipe {
    /// Reads a recipe.
    ///
    /// # Errors
    /// It is not TOML, names something unknown, or a value cannot be; the
    /// error says at which line and column.
    ///
    /// ```
    /// let recipe = qvd_storage::Recipe::parse(r#"
    ///     name = "tiny"
    ///     packages = ["busybox"]
    ///     base = { distribution = "debian", suite = "bookworm" }
    ///     user = { name = "user", uid = 1000, gid = 1000 }
    /// "#)?;
    /// assert_eq!(recipe.flavour().as_str(), "tiny");
    /// # Ok::<(), qvd_storage::RecipeError>(())
    /// ```
    pub fn parse(text: &str) -> Result<Self, RecipeError> {
        if text.len() > RECIPE_MAX_BYTES {
            return Err(wrong(text, 0..0, format!("it is longer than {RECIPE_MAX_BYTES} bytes")));
        }
        let raw: text::Recipe = toml::from_str(text)
            .map_err(|error| wrong(text, error.span().unwrap_or(0..0), first_line(error.message())))?;
        let name = checked(text, &raw.name, |name| name.parse::<FlavourName>().map_err(|e| e.to_string()))?;
        checked(text, &raw.base.distribution, |distribution| match distribution.as_str() {
            "debian" | "ubuntu" => Ok(()),
            other => Err(format!("distribution `{other}` is unknown; `debian` and `ubuntu` are known")),
        })?;
        if let Some(description) = &raw.description {
            checked(text, description, |line| match line.lines().count() {
                0 | 1 => Ok(()),
                _ => Err("a description is one line".to_owned()),
            })?;
        }
        checked(text, &raw.base.suite, |suite| word(suite, "suite"))?;
        for component in &raw.base.components {
            checked(text, component, |component| word(component, "component"))?;
        }
        for package in &raw.packages {
            checked(text, package, |package| package_name(package))?;
        }
        for pattern in &raw.exclude {
            checked(text, pattern, |pattern| Glob::parse(pattern).map(drop))?;
        }
        checked(text, &raw.user, check_user)?;
        if let Some(session) = &raw.session {
            checked(text, session, check_session)?;
        }
        for service in &raw.services {
            checked(text, service, |argv| check_argv(argv, "service"))?;
        }
        for argv in &raw.run {
            checked(text, argv, |argv| check_argv(argv, "program to run"))?;
        }
        let remove = raw.remove.iter().map(|pattern| checked(text, pattern, |p| Glob::parse(p)));
        let files = raw.files.iter().map(|file| FileSpec::check(text, file));
        Ok(Self {
            config: ImageConfig {
                flavour: name.clone(),
                description: raw.description.map(Spanned::into_inner).unwrap_or_default(),
                user: raw.user.into_inner(),
                session: raw.session.map(Spanned::into_inner),
                services: raw.services.into_iter().map(Spanned::into_inner).collect(),
                defaults: raw.defaults,
            },
            remove: remove.collect::<Result<_, _>>()?,
            files: files.collect::<Result<_, _>>()?,
            name,
            base: Base {
                suite: raw.base.suite.into_inner(),
                components: match raw.base.components {
                    none if none.is_empty() => vec!["main".to_owned()],
                    some => some.into_iter().map(Spanned::into_inner).collect(),
                },
            },
            packages: raw.packages.into_iter().map(Spanned::into_inner).collect(),
            run: raw.run.into_iter().map(Spanned::into_inner).collect(),
            exclude: raw.exclude.into_iter().map(Spanned::into_inner).collect(),
            text: text.to_owned(),
            key: Sha256::new().chain_update(FORMAT).chain_update([0]).chain_update(text).finalize().into(),
        })
    }

    /// Flavour that this recipe makes.
    #[must_use]
    pub const fn flavour(&self) -> &FlavourName {
        &self.name
    }

    /// What it says about running its image.
    #[must_use]
    pub const fn config(&self) -> &ImageConfig {
        &self.config
    }

    /// As it was written.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The same for the same text, and only for it: images are reused by it.
    #[must_use]
    pub fn key(&self) -> qvd_core::Digest {
        qvd_core::Digest::new(self.key)
    }
}

impl FileSpec {
    fn check(text: &str, file: &text::File) -> Result<Self, RecipeError> {
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

fn check_user(user: &UserConfig) -> Result<(), String> {
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

fn check_session(session: &SessionSpec) -> Result<(), String> {
    check_argv(&session.command, "session command")?;
    for argv in &session.autostart {
        check_argv(argv, "autostart entry")?;
    }
    match session.env.iter().find(|(k, v)| k.is_empty() || k.contains(['=', '\0']) || v.contains('\0')) {
        Some((key, _)) => Err(format!("`{}` cannot be an environment variable", key.escape_default())),
        None => Ok(()),
    }
}

fn check_argv(argv: &[String], what: &str) -> Result<(), String> {
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
fn package_name(name: &str) -> Result<(), String> {
    let mut bytes = name.bytes();
    let first = bytes.next().is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    if first && bytes.all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"+-.".contains(&b)) {
        Ok(())
    } else {
        Err(format!("`{}` is not a package name", name.escape_default()))
    }
}

fn word(text: &str, what: &str) -> Result<(), String> {
    let mut bytes = text.bytes();
    if bytes.next().is_some_and(|b| b.is_ascii_alphanumeric())
        && bytes.all(|b| b.is_ascii_alphanumeric() || b"-_./".contains(&b))
    {
        Ok(())
    } else {
        Err(format!("`{}` is not a {what}", text.escape_default()))
    }
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

fn checked<T, U>(
    text: &str,
    value: &Spanned<T>,
    check: impl FnOnce(&T) -> Result<U, String>,
) -> Result<U, RecipeError> {
    check(value.get_ref()).map_err(|reason| wrong(text, value.span(), reason))
}

fn first_line(message: &str) -> String {
    message.lines().map(str::trim).collect::<Vec<_>>().join(", ")
}

fn wrong(text: &str, span: Range<usize>, reason: String) -> RecipeError {
    let before = text.get(..span.start).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
    RecipeError { line, column, reason }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const TINY: &str = r#"name = "tiny"
description = "nothing much"
packages = ["busybox"]

[base]
distribution = "debian"
suite = "bookworm"

[user]
name = "user"
uid = 1000
gid = 1000
"#;

    fn error(from: &str, to: &str) -> (usize, usize, String) {
        assert!(TINY.contains(from));
        let error = Recipe::parse(&TINY.replace(from, to)).unwrap_err();
        assert!(!error.to_string().contains('\n'), "{error}");
        (error.line, error.column, error.reason)
    }

    #[test]
    fn a_small_recipe_has_defaults() {
        let recipe = Recipe::parse(TINY).unwrap();
        assert_eq!(recipe.config().user.home(), "/home/user");
        assert_eq!(recipe.config().defaults, Defaults::default());
        assert_eq!(recipe.base.components, ["main"]);
        assert!(recipe.config().session.is_none());
    }

    #[test]
    fn errors_say_where() {
        let (line, column, reason) = error("suite =", "siute =");
        assert_eq!((line, column), (7, 1), "{reason}");
        assert!(reason.contains("siute"), "{reason}");
        let (line, column, reason) = error("[\"busybox\"]", "[\"busybox\", \"--help\"]");
        assert_eq!((line, column), (3, 24), "{reason}");
        assert!(reason.contains("--help"), "{reason}");
        assert_eq!(error("\"tiny\"", "\"../tiny\"").0, 1);
        assert_eq!(error("uid = 1000", "uid = 0").0, 9);
        assert_eq!(error("gid = 1000", "gid = \"x\"").0, 12);
        assert_eq!(error("\"debian\"", "\"beos\"").0, 6);
        assert_eq!(error("[user]", "[[user").0, 9);
    }

    #[test]
    fn files_stay_inside() {
        for bad in ["etc/x", "/", "/etc/../x", "/etc//x", "/etc/./x", "/etc/"] {
            let text = format!("{TINY}[[files]]\npath = \"{bad}\"\ncontent = \"\"\n");
            assert!(Recipe::parse(&text).is_err(), "{bad}");
        }
        for (mode, owner) in [("0888", "0:0"), ("-1", "0:0"), ("10000", "0:0"), ("644", "root"), ("644", "65536:0")] {
            let text =
                format!("{TINY}[[files]]\npath = \"/x\"\ncontent = \"\"\nmode = \"{mode}\"\nowner = \"{owner}\"\n");
            assert!(Recipe::parse(&text).is_err(), "{mode} {owner}");
        }
        let text = format!("{TINY}[[files]]\npath = \"/x\"\ncontent = \"a\"\nmode = \"4755\"\nowner = \"1:2\"\n");
        let file = Recipe::parse(&text).unwrap().files.remove(0);
        assert_eq!((file.mode, file.uid, file.gid, file.content.as_str()), (0o4755, 1, 2, "a"));
    }

    #[test]
    fn the_key_is_that_of_the_text() {
        let key = Recipe::parse(TINY).unwrap().key();
        assert_eq!(key, Recipe::parse(TINY).unwrap().key());
        assert_ne!(key, Recipe::parse(&format!("{TINY}\n")).unwrap().key());
    }
}
