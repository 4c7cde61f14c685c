//! The host's own apt configuration: where packages come from.
//!
//! Nothing is fetched from anywhere else than from what the administrator
//! configured, and nothing of it stays in an image.

use std::{fs, io, path::Path};

use crate::Error;

/// One line of sources.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Source {
    options: String,
    pub(crate) uri: String,
    suite: String,
    components: Vec<String>,
}

impl Source {
    /// The line as `sources.list(5)` has it.
    pub(crate) fn line(&self) -> String {
        let options = if self.options.is_empty() { String::new() } else { format!("[{}] ", self.options) };
        format!("deb {options}{} {} {}", self.uri, self.suite, self.components.join(" "))
    }
}

/// The sources for a suite, its updates and its security fixes: those that the
/// host's apt uses, or the suite alone from `mirror`.
pub(crate) fn sources(
    etc_apt: &Path,
    suite: &str,
    components: &[String],
    mirror: Option<&str>,
) -> Result<Vec<Source>, Error> {
    if let Some(mirror) = mirror {
        return Ok(vec![Source {
            options: String::new(),
            uri: mirror.to_owned(),
            suite: suite.to_owned(),
            components: components.to_vec(),
        }]);
    }
    let wanted =
        [suite.to_owned(), format!("{suite}-updates"), format!("{suite}-security"), format!("{suite}/updates")];
    let mut found = host_sources(etc_apt).map_err(Error::io("read apt sources in", etc_apt))?;
    found.retain(|source| wanted.contains(&source.suite));
    for source in &mut found {
        source.components.retain(|component| components.contains(component));
    }
    found.retain(|source| !source.components.is_empty());
    Ok(found)
}

fn host_sources(etc_apt: &Path) -> io::Result<Vec<Source>> {
    let mut files = vec![etc_apt.join("sources.list")];
    match fs::read_dir(etc_apt.join("sources.list.d")) {
        Ok(entries) => {
            for entry in entries {
                files.push(entry?.path());
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    files.sort();
    let mut sources = Vec::new();
    for file in files {
        let parse: fn(&str) -> Vec<Source> = match file.extension().and_then(|e| e.to_str()) {
            Some("list") => one_line,
            Some("sources") => deb822,
            _ => continue,
        };
        match fs::read_to_string(&file) {
            Ok(text) => sources.extend(parse(&text)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(sources)
}

/// The one-line format of `sources.list(5)`. What is not a `deb` line is not ours.
fn one_line(text: &str) -> Vec<Source> {
    let parse = |line: &str| {
        let line = line.split('#').next()?.trim();
        let rest = line.strip_prefix("deb")?.strip_prefix([' ', '\t'])?.trim_start();
        let (options, rest) = match rest.strip_prefix('[') {
            Some(rest) => rest.split_once(']')?,
            None => ("", rest),
        };
        let mut words = rest.split_whitespace().map(str::to_owned);
        let (uri, suite) = (words.next()?, words.next()?);
        let options = keep_options(options.split_whitespace().filter_map(|option| option.split_once('=')));
        Some(Source { options, uri, suite, components: words.collect() })
    };
    text.lines().filter_map(parse).collect()
}

/// The deb822 format of `sources.list(5)`: stanzas of fields, a line that
/// begins with a space continues the one before.
fn deb822(text: &str) -> Vec<Source> {
    let mut sources = Vec::new();
    let without_comments: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    for stanza in without_comments.split(|line| line.trim().is_empty()) {
        let mut fields: Vec<(String, String)> = Vec::new();
        for line in stanza {
            if line.starts_with([' ', '\t']) {
                if let Some((_, value)) = fields.last_mut() {
                    // A key block begins on its own line; a bare `.` is an empty line of it.
                    value.push('\n');
                    value.push_str(line.trim());
                }
            } else if let Some((key, value)) = line.split_once(':') {
                fields.push((key.trim().to_ascii_lowercase(), value.trim().to_owned()));
            }
        }
        let field = |name: &str| fields.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str());
        let words = |name: &str| -> Vec<String> {
            field(name).unwrap_or_default().split_whitespace().map(str::to_owned).collect()
        };
        let disabled = field("enabled").is_some_and(|value| matches!(value, "no" | "false" | "0" | "off"));
        if disabled || !words("types").iter().any(|kind| kind == "deb") {
            continue;
        }
        let options = keep_options(fields.iter().map(|(key, value)| (key.as_str(), value.as_str())));
        for uri in words("uris") {
            for suite in words("suites") {
                let (options, uri) = (options.clone(), uri.clone());
                sources.push(Source { options, uri, suite, components: words("components") });
            }
        }
    }
    sources
}

/// Options that matter for what is trusted and whether it is still valid. A
/// key written into the stanza itself cannot stand in a one-line source; the
/// distribution's own keyring is used then.
fn keep_options<'a>(options: impl Iterator<Item = (&'a str, &'a str)>) -> String {
    const KEPT: [&str; 4] = ["signed-by", "trusted", "check-valid-until", "check-date"];
    let kept = options.filter(|(key, value)| {
        KEPT.contains(&key.to_ascii_lowercase().as_str()) && !value.is_empty() && !value.contains(char::is_whitespace)
    });
    kept.map(|(key, value)| format!("{}={value}", key.to_ascii_lowercase())).collect::<Vec<_>>().join(" ")
}

/// Of what `apt-config dump` prints, the settings that decide how the mirror
/// is reached and whether its index is still valid.
pub(crate) fn access_settings(dump: &str) -> Vec<&str> {
    const KEPT: [&str; 9] = [
        "Acquire::http::",
        "Acquire::https::",
        "Acquire::Check-Valid-Until ",
        "Acquire::Check-Date ",
        "Acquire::Max-ValidTime ",
        "Acquire::Retries ",
        "Acquire::ForceIPv4 ",
        "Acquire::ForceIPv6 ",
        "APT::Authentication::TrustCDROM ",
    ];
    dump.lines().filter(|line| KEPT.iter().any(|kept| line.starts_with(kept)) && line.ends_with("\";")).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn lines(list: &str, deb822: &str, suite: &str) -> Vec<String> {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("sources.list"), list).unwrap();
        fs::create_dir(dir.path().join("sources.list.d")).unwrap();
        fs::write(dir.path().join("sources.list.d/debian.sources"), deb822).unwrap();
        fs::write(dir.path().join("sources.list.d/old.list.save"), "deb http://old.example/ bookworm main").unwrap();
        let found = sources(dir.path(), suite, &["main".to_owned()], None).unwrap();
        found.iter().map(Source::line).collect()
    }

    #[test]
    fn both_formats_are_read() {
        let list = "# deb http://no.example/ bookworm main\n\
             deb-src http://src.example/ bookworm main\n\
             deb [arch=amd64 signed-by=/k.gpg] http://a.example/debian bookworm main contrib # why\n\
             deb http://third.example/apt sid main\n";
        let deb822 = "Types: deb deb-src\n# comment\nURIs: http://b.example/debian\nSuites: bookworm bookworm-updates\n\
             Components: contrib\n main\nSigned-By: /usr/share/keyrings/x.gpg\n\n\
             Types: deb\nURIs: http://off.example/\nSuites: bookworm\nComponents: main\nEnabled: no\n";
        assert_eq!(
            lines(list, deb822, "bookworm"),
            [
                "deb [signed-by=/k.gpg] http://a.example/debian bookworm main",
                "deb [signed-by=/usr/share/keyrings/x.gpg] http://b.example/debian bookworm main",
                "deb [signed-by=/usr/share/keyrings/x.gpg] http://b.example/debian bookworm-updates main",
            ]
        );
        assert!(lines(list, deb822, "trixie").is_empty());
    }

    #[test]
    fn an_embedded_key_does_not_become_an_option() {
        let deb822 = "Types: deb\nURIs: http://b.example/\nSuites: bookworm\nComponents: main\nSigned-By:\n -----BEGIN PGP\n .\n abc\n";
        assert_eq!(lines("", deb822, "bookworm"), ["deb http://b.example/ bookworm main"]);
    }

    #[test]
    fn the_mirror_asked_for_comes_first() {
        let found =
            sources(Path::new("/nonexistent"), "bookworm", &["main".to_owned()], Some("http://m.example/d")).unwrap();
        assert_eq!(found.first().unwrap().line(), "deb http://m.example/d bookworm main");
    }

    #[test]
    fn only_settings_about_access_are_taken() {
        let dump = "Acquire::http::Proxy \"http://p.example:3128\";\nAcquire::Check-Date \"false\";\nDir::Etc \"etc\";\n\
                    Acquire::IndexTargets \"\";\n";
        assert_eq!(
            access_settings(dump),
            ["Acquire::http::Proxy \"http://p.example:3128\";", "Acquire::Check-Date \"false\";"]
        );
    }
}
