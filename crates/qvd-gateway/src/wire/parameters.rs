//! What a client asks of the display it connects to.
//!
//! Everything here comes from an untrusted client: known keys only, each
//! value checked; what is not needed is checked and dropped.

use qvd_core::{DesktopId, DisplayKind, Geometry, LinkSpeed};

/// Keys that existing clients send whose values have no use here. The value
/// of `nxagent.extra_args` in particular never reaches a command line.
const IGNORED: &[&str] = &[
    "keyboard",
    "os",
    "os.name",
    "os.version",
    "hostname",
    "nxagent.extra_args",
    "printing.enabled",
    "printing.flavor",
    "usb.enabled",
    "usb.implementation",
    "audio.compression.enable",
    "audio.redirect.enable",
    "audio.redirect.server",
    "audio.redirect.port",
];
/// Longest value in bytes.
const VALUE_MAX: usize = 1024;

/// Why a connection request cannot be carried out as asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ParameterError {
    #[error("the parameter `id` is missing: give the number of a desktop")]
    NoId,
    #[error("the parameter `id` is not the number of a desktop")]
    BadId,
    #[error("the parameter `{0}` is not allowed: names start with `qvd.client.` or `custom.`")]
    Forbidden(String),
    #[error("the parameter `{0}` is unknown")]
    Unknown(String),
    #[error("the value of the parameter `{key}` is wrong: {expected}")]
    Value { key: &'static str, expected: &'static str },
}

/// The number of the desktop that a request is about.
pub(crate) fn desktop_id(query: &[(String, String)]) -> Result<DesktopId, ParameterError> {
    let mut ids = query.iter().filter(|(key, _)| key == "id");
    match (ids.next(), ids.next()) {
        (Some((_, id)), None) => id.parse().map_err(|_| ParameterError::BadId),
        (None, _) => Err(ParameterError::NoId),
        _ => Err(ParameterError::BadId),
    }
}

/// Refuses keys outside the protocol's name spaces.
pub(crate) fn check_keys(query: &[(String, String)]) -> Result<(), ParameterError> {
    let allowed = |key: &str| key == "id" || key.starts_with("qvd.client.") || key.starts_with("custom.");
    match query.iter().find(|(key, _)| !allowed(key)) {
        Some((key, _)) => Err(ParameterError::Forbidden(shown(key))),
        None => Ok(()),
    }
}

/// The display that the parameters describe.
pub(crate) fn display(query: &[(String, String)]) -> Result<DisplayKind, ParameterError> {
    let (mut geometry, mut fullscreen, mut link) = (Geometry::default(), false, LinkSpeed::default());
    for (key, value) in query {
        if value.len() > VALUE_MAX || key.len() > VALUE_MAX {
            return Err(ParameterError::Value { key: "qvd.client", expected: "at most 1024 bytes" });
        }
        // `custom.` belongs to the site; nothing of ours reads it.
        let Some(name) = key.strip_prefix("qvd.client.") else { continue };
        match name {
            "geometry" => geometry = parse_geometry(value)?,
            "fullscreen" => fullscreen = parse_flag(value)?,
            "link" => link = parse_link(value)?,
            name if IGNORED.contains(&name) => {}
            _ => return Err(ParameterError::Unknown(shown(key))),
        }
    }
    Ok(DisplayKind::Nx { geometry, fullscreen, link })
}

/// `WxH` or `WxH+X+Y`; a screen too small or too large becomes the nearest
/// that a session can have, because a client cannot know our limits.
fn parse_geometry(value: &str) -> Result<Geometry, ParameterError> {
    let wrong = ParameterError::Value { key: "qvd.client.geometry", expected: "use WIDTHxHEIGHT or WIDTHxHEIGHT+X+Y" };
    let number = |text: &str| {
        let digits = !text.is_empty() && text.len() <= 5 && text.bytes().all(|b| b.is_ascii_digit());
        text.parse::<u32>().ok().filter(|_| digits)
    };
    let parse = || {
        let mut parts = value.split('+');
        let (width, height) = parts.next()?.split_once('x')?;
        let offsets: Vec<_> = parts.map(number).collect::<Option<_>>()?;
        (offsets.is_empty() || offsets.len() == 2).then_some((number(width)?, number(height)?))
    };
    let (width, height) = parse().ok_or_else(|| wrong.clone())?;
    let clamp = |value: u32, min: u16, max: u16| u16::try_from(value).unwrap_or(max).clamp(min, max);
    Geometry::new(
        clamp(width, Geometry::MIN.width(), Geometry::MAX.width()),
        clamp(height, Geometry::MIN.height(), Geometry::MAX.height()),
    )
    .map_err(|_| wrong)
}

fn parse_flag(value: &str) -> Result<bool, ParameterError> {
    match value {
        "1" => Ok(true),
        "0" | "" => Ok(false),
        _ => Err(ParameterError::Value { key: "qvd.client.fullscreen", expected: "use 0 or 1" }),
    }
}

/// A word, or a number of bits per second as NX counts (`64000`, `512k`, `10m`).
fn parse_link(value: &str) -> Result<LinkSpeed, ParameterError> {
    let word = match value {
        "modem" => Some(LinkSpeed::Modem),
        "isdn" => Some(LinkSpeed::Isdn),
        "adsl" => Some(LinkSpeed::Adsl),
        "wan" => Some(LinkSpeed::Wan),
        "lan" => Some(LinkSpeed::Lan),
        "local" => Some(LinkSpeed::Local),
        _ => None,
    };
    let number = || {
        let (digits, unit) = match value.as_bytes().last()? {
            b'k' | b'K' => (&value[..value.len() - 1], 1_000),
            b'm' | b'M' => (&value[..value.len() - 1], 1_000_000),
            b'g' | b'G' => (&value[..value.len() - 1], 1_000_000_000),
            _ => (value, 1),
        };
        let plain = !digits.is_empty() && digits.len() <= 10 && digits.bytes().all(|b| b.is_ascii_digit());
        let bits_per_s = digits.parse::<u64>().ok().filter(|_| plain)? * unit;
        Some(match bits_per_s {
            0..56_000 => LinkSpeed::Modem,
            56_000..256_000 => LinkSpeed::Isdn,
            256_000..8_000_000 => LinkSpeed::Adsl,
            8_000_000..50_000_000 => LinkSpeed::Wan,
            _ => LinkSpeed::Lan,
        })
    };
    word.or_else(number).ok_or(ParameterError::Value {
        key: "qvd.client.link",
        expected: "use modem, isdn, adsl, wan, lan, local or bits per second",
    })
}

/// A key from a stranger, fit to be shown.
fn shown(key: &str) -> String {
    key.chars().take(64).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn query(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|&(k, v)| (k.to_owned(), v.to_owned())).collect()
    }

    #[test]
    fn what_the_clients_send_is_understood() {
        let display = display(&query(&[
            ("id", "7"),
            ("qvd.client.keyboard", "pc105/es"),
            ("qvd.client.os", "windows"),
            ("qvd.client.os.version", "10.0"),
            ("qvd.client.link", "lan"),
            ("qvd.client.nxagent.extra_args", "-rm -rf"),
            ("qvd.client.geometry", "1024x768+10+20"),
            ("qvd.client.fullscreen", "1"),
            ("qvd.client.printing.flavor", "x"),
            ("qvd.client.audio.redirect.port", "4713"),
            ("custom.anything", "goes"),
        ]));
        let geometry = Geometry::new(1024, 768).unwrap();
        assert_eq!(display, Ok(DisplayKind::Nx { geometry, fullscreen: true, link: LinkSpeed::Lan }));
    }

    #[test]
    fn everything_else_is_refused() {
        assert_eq!(desktop_id(&query(&[])), Err(ParameterError::NoId));
        for bad in ["", "0", "-1", "x", "99999999999", "7 "] {
            assert_eq!(desktop_id(&query(&[("id", bad)])), Err(ParameterError::BadId), "{bad}");
        }
        assert_eq!(desktop_id(&query(&[("id", "1"), ("id", "2")])), Err(ParameterError::BadId));
        assert!(check_keys(&query(&[("id", "1"), ("nxagent", "x")])).is_err());
        for (key, bad) in [
            ("qvd.client.geometry", "1024"),
            ("qvd.client.geometry", "1024x768+1"),
            ("qvd.client.geometry", "1024x768-1-1"),
            ("qvd.client.geometry", "+1x+1"),
            ("qvd.client.fullscreen", "yes"),
            ("qvd.client.link", "fast"),
            ("qvd.client.link", ""),
            ("qvd.client.link", "-5"),
            ("qvd.client.link", "é"),
            ("qvd.client.root_password", "x"),
        ] {
            assert!(display(&query(&[(key, bad)])).is_err(), "{key}={bad}");
        }
    }

    #[test]
    fn a_screen_is_brought_within_the_limits() {
        assert_eq!(parse_geometry("1x1").unwrap(), Geometry::MIN);
        assert_eq!(parse_geometry("99999x99999").unwrap(), Geometry::MAX);
    }

    proptest! {
        #[test]
        fn no_value_panics(key in "(geometry|link|fullscreen|os|.{0,8})", value in ".{0,24}") {
            drop(display(&query(&[(&format!("qvd.client.{key}"), &value)])));
        }
    }
}
