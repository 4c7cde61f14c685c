//! The text's own shape, before its values are checked.

use qvd_core::Bytes;
use serde::Deserialize;
use toml::Spanned;

use super::{Defaults, SessionSpec, UserConfig};

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
    pub(super) defaults: Option<Spanned<Defaults>>,
    pub(super) locale: Option<Spanned<String>>,
    #[serde(default)]
    pub(super) limits: Limits,
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

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Limits {
    pub(super) size: Option<Spanned<Bytes>>,
    pub(super) entries: Option<Spanned<u64>>,
}
