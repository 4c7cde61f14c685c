//! Files for the browser, embedded in the program.

use std::{
    borrow::Cow,
    collections::{BTreeSet, VecDeque},
    sync::LazyLock,
};

use axum::{
    extract::Path,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use rust_embed::{EmbeddedFile, RustEmbed};
use sha2::{Digest as _, Sha256};

#[derive(RustEmbed)]
#[folder = "assets/"]
struct Own;

/// The display, unchanged, as its makers publish it.
#[derive(RustEmbed)]
#[folder = "web/node_modules/@novnc/novnc/"]
struct NoVnc;

/// Licence texts of [`NoVnc`], by name.
pub(super) const LICENCES: &[(&str, &str)] = &[
    ("noVNC: what is under which licence", "LICENSE.txt"),
    ("noVNC: authors", "AUTHORS"),
    ("Mozilla Public License 2.0", "docs/LICENSE.MPL-2.0"),
    ("BSD 2-clause licence", "docs/LICENSE.BSD-2-Clause"),
    ("BSD 3-clause licence", "docs/LICENSE.BSD-3-Clause"),
    ("pako (MIT licence)", "vendor/pako/LICENSE"),
];
/// The version that `web/package.json` asks for.
pub(super) const NOVNC_VERSION: &str = "1.7.0";
/// Where the display's page starts.
const ENTRY: &str = "desktop.js";

/// First part of every file's address. It changes when any file does, so a
/// browser may keep what it has for ever.
pub(super) static BASE: LazyLock<String> = LazyLock::new(|| {
    let mut hash = Sha256::new();
    for path in Own::iter().chain(NoVnc::iter()) {
        if let Some(file) = Own::get(&path).or_else(|| NoVnc::get(&path)) {
            hash.update(file.metadata.sha256_hash());
        }
    }
    let short: String = hash.finalize().iter().take(6).map(|byte| format!("{byte:02x}")).collect();
    format!("/assets/{short}")
});

/// Modules that the display imports, directly or not, so that a browser can
/// ask for all of them at once instead of level by level.
pub(super) static MODULES: LazyLock<Vec<String>> = LazyLock::new(|| {
    let (mut found, mut queue) = (BTreeSet::new(), VecDeque::from([ENTRY.to_owned()]));
    while let Some(path) = queue.pop_front() {
        let Some(file) = find(&path) else { continue };
        if found.insert(path.clone()) {
            queue.extend(imports(&String::from_utf8_lossy(&file.data)).filter_map(|to| resolve(&path, to)));
        }
    }
    found.remove(ENTRY);
    found.into_iter().collect()
});

/// What a module's `import` and `export … from` lines name.
fn imports(source: &str) -> impl Iterator<Item = &str> {
    source.split([';', '\n']).filter_map(|line| {
        let line = line.trim();
        let (before, after) = match line.strip_prefix("import ") {
            Some(rest) => rest.rsplit_once("from ").unwrap_or(("", rest)),
            None => line.rsplit_once(" from ")?,
        };
        let quote = after.chars().next().filter(|c| matches!(c, '"' | '\''))?;
        let code = before.starts_with(['{', '*', '}']) || before.is_empty() || !before.contains(['"', '\'']);
        after.get(1..)?.split_once(quote).map(|(path, _)| path).filter(|path| code && path.starts_with('.'))
    })
}

/// `to` as seen from the file `from`.
fn resolve(from: &str, to: &str) -> Option<String> {
    let mut parts: Vec<&str> = from.split('/').collect();
    parts.pop();
    for part in to.split('/') {
        match part {
            "." => {}
            ".." => {
                parts.pop()?;
            }
            part => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

/// A file by its path below [`BASE`].
fn find(path: &str) -> Option<EmbeddedFile> {
    // Development builds read from the disk.
    if path.split('/').any(|part| part == "..") {
        return None;
    }
    match path.strip_prefix("novnc/") {
        Some(inner) => {
            let wanted = inner.starts_with("core/") || inner.starts_with("vendor/");
            (wanted || LICENCES.iter().any(|(_, licence)| *licence == inner)).then(|| NoVnc::get(inner)).flatten()
        }
        None => Own::get(path),
    }
}

/// `GET /assets/{version}/{*path}`
pub(super) async fn serve(Path((version, path)): Path<(String, String)>) -> Response {
    let current = BASE.strip_prefix("/assets/").is_some_and(|current| current == version);
    let Some(file) = find(&path).filter(|_| current) else {
        return (StatusCode::NOT_FOUND, "there is no such file\n").into_response();
    };
    let content_type = match path.rsplit_once('.').map(|(_, extension)| extension) {
        Some("js") => "text/javascript; charset=utf-8",
        Some("css") => "text/css; charset=utf-8",
        Some("svg") => "image/svg+xml",
        _ => "text/plain; charset=utf-8",
    };
    let body = match file.data {
        Cow::Borrowed(bytes) => axum::body::Bytes::from_static(bytes),
        Cow::Owned(bytes) => bytes.into(),
    };
    let headers =
        [(header::CONTENT_TYPE, content_type), (header::CACHE_CONTROL, "public, max-age=31536000, immutable")];
    (headers, body).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_modules_of_the_display_are_found() {
        for module in ["novnc/core/rfb.js", "novnc/core/websock.js", "novnc/vendor/pako/lib/zlib/inflate.js"] {
            assert!(MODULES.iter().any(|found| found == module), "{module} is not in {:?}", *MODULES);
        }
        for path in MODULES.iter() {
            let file = find(path);
            let source = file.map(|file| String::from_utf8_lossy(&file.data).into_owned()).unwrap_or_default();
            for to in imports(&source) {
                let target = resolve(path, to);
                assert!(target.as_deref().and_then(find).is_some(), "{path} imports {to}, which is not there");
            }
        }
    }

    #[test]
    fn the_version_shown_is_the_version_embedded() {
        let package = NoVnc::get("package.json").map(|file| String::from_utf8_lossy(&file.data).into_owned());
        assert!(package.is_some_and(|text| text.contains(&format!("\"version\": \"{NOVNC_VERSION}\""))));
        assert!(LICENCES.iter().all(|(_, path)| NoVnc::get(path).is_some()));
    }

    #[test]
    fn nothing_else_is_given_away() {
        for path in ["novnc/package.json", "novnc/../package.json", "../Cargo.toml", "novnc/core/../package.json"] {
            assert!(find(path).is_none(), "{path}");
        }
    }
}
