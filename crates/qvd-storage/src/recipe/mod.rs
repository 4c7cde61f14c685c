//! Recipes: what an image is made of, written by a person in TOML.

mod check;
mod text;

use std::collections::{BTreeMap, BTreeSet};

use qvd_core::{BirthPolicy, Bytes, Calls, Device, FlavourName, Geometry, Limits, NetPolicy, RestPolicy, RootPolicy};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use toml::Spanned;

pub(crate) use check::absolute;
use check::{check_argv, check_session, check_user, checked, first_line, package_name, word, wrong};

use crate::{HomeOptions, error::RecipeError, glob::Glob};

/// Changes whenever the same recipe would give another tree or another
/// configuration, so that images made by an older version are not reused.
const FORMAT: &str = "qvd-recipe 2";

/// The locale that every system has, without a package.
const DEFAULT_LOCALE: &str = "C.UTF-8";
/// What makes other locales, and the file that names the one of a system.
const LOCALES: &str = "locales";
const LOCALE_FILE: &str = "/etc/default/locale";

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
    /// Language, territory and characters of its programs.
    pub(crate) locale: Option<String>,
    pub(crate) limits: ImageLimits,
    text: String,
    key: [u8; 32],
}

/// What an image may hold. A build that makes more fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct ImageLimits {
    /// Contents of files.
    pub(crate) size: Option<Bytes>,
    /// Files, directories, links and nodes.
    pub(crate) entries: Option<u64>,
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
    /// What it may reach; what an installation gives to all if nothing is said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub net: Option<NetPolicy>,
    /// What it does while nobody looks.
    pub rest: RestPolicy,
    /// Which of the host's devices its programs may use.
    #[serde(skip_serializing_if = "BTreeSet::is_empty")]
    pub devices: BTreeSet<Device>,
    /// Which system calls its programs may make.
    #[serde(skip_serializing_if = "Calls::is_usual")]
    pub calls: Calls,
    /// How it comes to be when it is a virtual machine.
    #[serde(skip_serializing_if = "BirthPolicy::is_usual")]
    pub machine: BirthPolicy,
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
        if let Some(defaults) = &raw.defaults {
            checked(text, defaults, |defaults| {
                check::calls(defaults.calls)?;
                check::machine(defaults.machine)
            })?;
        }
        for service in &raw.services {
            checked(text, service, |argv| check_argv(argv, "service"))?;
        }
        for argv in &raw.run {
            checked(text, argv, |argv| check_argv(argv, "program to run"))?;
        }
        if let Some(name) = &raw.locale {
            checked(text, name, |name| check::locale(name))?;
        }
        let size = raw.limits.size.as_ref().map(|size| checked(text, size, |size| check::some(size, "bytes")));
        let entries = raw.limits.entries.as_ref().map(|many| checked(text, many, |many| check::some(many, "entries")));
        let limits = ImageLimits { size: size.transpose()?, entries: entries.transpose()? };
        let remove = raw.remove.iter().map(|pattern| checked(text, pattern, |p| Glob::parse(p)));
        let files = raw.files.iter().map(|file| FileSpec::check(text, file));
        let mut recipe = Self {
            config: ImageConfig {
                flavour: name.clone(),
                description: raw.description.map(Spanned::into_inner).unwrap_or_default(),
                user: raw.user.into_inner(),
                session: raw.session.map(Spanned::into_inner),
                services: raw.services.into_iter().map(Spanned::into_inner).collect(),
                defaults: raw.defaults.map(Spanned::into_inner).unwrap_or_default(),
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
            locale: None,
            limits,
            text: text.to_owned(),
            key: Sha256::new().chain_update(FORMAT).chain_update([0]).chain_update(text).finalize().into(),
        };
        if let Some(locale) = raw.locale {
            recipe.speak(locale.into_inner());
        }
        Ok(recipe)
    }

    /// Makes everything inside use a locale, unless the recipe says otherwise
    /// of its session.
    fn speak(&mut self, locale: String) {
        if locale != DEFAULT_LOCALE && !self.packages.iter().any(|package| package == LOCALES) {
            self.packages.push(LOCALES.to_owned());
        }
        if let Some(session) = &mut self.config.session {
            session.env.entry("LANG".to_owned()).or_insert_with(|| locale.clone());
        }
        if self.files.iter().all(|file| file.path != LOCALE_FILE) {
            let content = format!("LANG={locale}\n");
            self.files.push(FileSpec { path: LOCALE_FILE.to_owned(), mode: 0o644, uid: 0, gid: 0, content });
        }
        self.locale = Some(locale);
    }

    /// The program that makes its locale, where one has to be made.
    pub(crate) fn locale_maker(&self) -> Option<Vec<String>> {
        let locale = self.locale.as_deref().filter(|locale| *locale != DEFAULT_LOCALE)?;
        let (name, modifier) = locale.split_once('@').map_or((locale, None), |(name, of)| (name, Some(of)));
        let definition = name.trim_end_matches(".UTF-8");
        let definition = modifier.map_or(definition.to_owned(), |of| format!("{definition}@{of}"));
        // One directory for it instead of an archive of all: it is the same each time.
        Some(["localedef", "--no-archive", "-i", &definition, "-f", "UTF-8", locale].map(str::to_owned).to_vec())
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

#[cfg(test)]
mod tests;
