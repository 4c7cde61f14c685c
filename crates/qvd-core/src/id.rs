//! Names of things. Each is checked where it is made, so that whoever holds
//! one may use it in a path, a cgroup name or a link name without a thought.

use std::{fmt, num::NonZeroU32, str::FromStr};

use serde::{Deserialize, Serialize, de};

/// Why a text is not an id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a {what}: {reason}")]
pub struct IdError {
    what: &'static str,
    text: String,
    reason: &'static str,
}

impl IdError {
    fn new(what: &'static str, text: &str, reason: &'static str) -> Self {
        // An id in an error message ends up in a log: bounded, one line.
        let text = text.chars().take(64).flat_map(char::escape_default).collect();
        Self { what, text, reason }
    }
}

/// Number of a desktop, unique in a farm and never used again.
///
/// A positive 32-bit integer, because existing QVD clients print and select
/// desktops by an integer `id`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DesktopId(NonZeroU32);

impl DesktopId {
    /// Largest number, so that link names stay within the kernel's limit:
    /// `qvd` + four hexadecimal digits + `-` + seven digits are 15 bytes.
    pub const MAX: u32 = 9_999_999;

    /// Makes an id of `number`.
    ///
    /// # Errors
    /// Zero, or above [`DesktopId::MAX`].
    pub fn new(number: u32) -> Result<Self, IdError> {
        NonZeroU32::new(number)
            .filter(|n| n.get() <= Self::MAX)
            .map(Self)
            .ok_or_else(|| IdError::new("desktop id", &number.to_string(), "it must be between 1 and 9999999"))
    }

    /// The number.
    #[must_use]
    pub const fn number(self) -> u32 {
        self.0.get()
    }
}

impl fmt::Display for DesktopId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for DesktopId {
    type Err = IdError;
    fn from_str(text: &str) -> Result<Self, IdError> {
        let number = text.parse().map_err(|_| IdError::new("desktop id", text, "it must be a positive integer"))?;
        Self::new(number)
    }
}

/// Tells the objects of one installation from those of another on the same
/// host: four hexadecimal digits that stand in every kernel object's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Instance(u16);

impl Instance {
    /// Makes one of a number.
    #[must_use]
    pub const fn new(number: u16) -> Self {
        Self(number)
    }

    /// The instance of the installation that keeps its state in the directory
    /// of this absolute path: the same in every version of this library.
    ///
    /// FNV-1a of 64 bits, folded to 16. The standard library does not promise
    /// that its hashes stay the same. Source:
    /// datatracker.ietf.org/doc/html/draft-eastlake-fnv.
    #[must_use]
    pub fn of_root(path: &[u8]) -> Self {
        let full = path.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, &byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
        let [a, b, c, d, e, f, g, h] = full.to_be_bytes();
        Self(u16::from_be_bytes([a ^ c ^ e ^ g, b ^ d ^ f ^ h]))
    }

    /// One of the further numbers of an installation, for what it has several
    /// of: 0 is its own, and up to 65535 no two are alike.
    #[must_use]
    pub const fn sibling(self, number: u16) -> Self {
        // Odd, so that each number has another product. Source of the spread:
        // the golden ratio of 16 bits, as in Linux `include/linux/hash.h`.
        Self(self.0.wrapping_add(number.wrapping_mul(0x9e37)))
    }

    /// Name of the bridge: `qvd1a2b`.
    #[must_use]
    pub fn bridge_name(self) -> String {
        format!("qvd{self}")
    }

    /// Name of the host end of a desktop's link: `qvd1a2b-7`, at most 15 bytes.
    #[must_use]
    pub fn link_name(self, desktop: DesktopId) -> String {
        format!("qvd{self}-{desktop}")
    }

    /// Name of the cgroup below which every desktop of this installation lives.
    #[must_use]
    pub fn cgroup_name(self) -> String {
        format!("qvd-{self}")
    }
}

impl fmt::Display for Instance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}", self.0)
    }
}

/// SHA-256 of an image's canonical content. Displayed as `sha256:` and 64
/// hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; 32]);

impl Digest {
    /// Wraps the 32 bytes of a SHA-256.
    #[must_use]
    pub const fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes.
    #[must_use]
    pub const fn bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The 64 hexadecimal digits without the algorithm: fit for a file name.
    #[must_use]
    pub fn hex(&self) -> String {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let digit = |nibble: u8| char::from(DIGITS[usize::from(nibble & 15)]);
        self.0.iter().flat_map(|&byte| [digit(byte >> 4), digit(byte)]).collect()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = IdError;
    fn from_str(text: &str) -> Result<Self, IdError> {
        let err = |reason| IdError::new("digest", text, reason);
        let hex = text.strip_prefix("sha256:").ok_or_else(|| err("it must start with `sha256:`"))?;
        if hex.len() != 64 || !hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(err("64 lower-case hexadecimal digits must follow `sha256:`"));
        }
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(hex.as_bytes().chunks_exact(2)) {
            let digit = |d: u8| if d.is_ascii_digit() { d - b'0' } else { d - b'a' + 10 };
            *byte = pair.iter().fold(0, |value, &d| value << 4 | digit(d));
        }
        Ok(Self(bytes))
    }
}

impl Serialize for Digest {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// A checked name: what may stand in it, and how long it may be.
macro_rules! name {
    ($(#[$doc:meta])* $type:ident, $what:literal, $max:literal, $first:expr, $rest:expr, $reason:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
        #[serde(transparent)]
        pub struct $type(String);

        impl $type {
            /// Longest name, in bytes.
            pub const MAX_LEN: usize = $max;

            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $type {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, IdError> {
                let (first, rest): (fn(u8) -> bool, fn(u8) -> bool) = ($first, $rest);
                let mut bytes = text.bytes();
                if text.len() <= Self::MAX_LEN && bytes.next().is_some_and(first) && bytes.all(rest) {
                    Ok(Self(text.to_owned()))
                } else {
                    Err(IdError::new($what, text, $reason))
                }
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
            }
        }
    };
}

name!(
    /// Name a person signs in with.
    UserName, "user name", 64,
    |b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_',
    |b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'_' | b'.' | b'-'),
    "use up to 64 of a-z 0-9 _ . - and start with a letter, a digit or _"
);
name!(
    /// Name of a flavour: a line of images with its defaults.
    FlavourName, "flavour name", 64,
    |b| b.is_ascii_lowercase() || b.is_ascii_digit(),
    |b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'_' | b'.' | b'-'),
    "use up to 64 of a-z 0-9 _ . - and start with a letter or a digit"
);
name!(
    /// Name on a commit, unique in its flavour: `head`, `default`, or any other.
    Tag, "tag", 64,
    |b| b.is_ascii_lowercase() || b.is_ascii_digit(),
    |b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'_' | b'.' | b'-'),
    "use up to 64 of a-z 0-9 _ . - and start with a letter or a digit"
);

name!(
    /// Name of a tenant: an organisation whose desktops reach no other's.
    TenantName, "tenant name", 32,
    |b| b.is_ascii_lowercase() || b.is_ascii_digit(),
    |b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-',
    "use up to 32 of a-z 0-9 - and start with a letter or a digit"
);

impl Default for TenantName {
    /// Whom everything belongs to unless somebody else is named.
    fn default() -> Self {
        Self("default".to_owned())
    }
}

impl Tag {
    /// The newest commit of a flavour.
    #[must_use]
    pub fn head() -> Self {
        Self("head".to_owned())
    }

    /// The commit that desktops follow unless told otherwise.
    #[must_use]
    pub fn default_tag() -> Self {
        Self("default".to_owned())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn link_names_fit_the_kernel() {
        let longest = Instance::new(0xffff).link_name(DesktopId::new(DesktopId::MAX).unwrap());
        // Source: Linux `include/uapi/linux/if.h`, IFNAMSIZ 16 with the NUL.
        assert!(longest.len() <= 15, "{longest}");
    }

    #[test]
    fn an_installation_keeps_its_name() {
        // An upgraded program has to find what the older one left.
        assert_eq!(Instance::of_root(b"/srv/qvd").to_string(), "18a0");
    }

    #[test]
    fn no_two_siblings_are_alike() {
        let all: std::collections::HashSet<_> = (0..=u16::MAX).map(|number| Instance::new(7).sibling(number)).collect();
        assert_eq!(all.len(), 1 << 16);
        assert_eq!(Instance::new(7).sibling(0), Instance::new(7));
    }

    #[test]
    fn names_that_could_leave_a_directory_are_refused() {
        for bad in ["", ".", "..", "../x", "a/b", "-x", "A", "a b", "a\n", "ä", &"a".repeat(65)] {
            assert!(bad.parse::<FlavourName>().is_err(), "{bad:?}");
            assert!(bad.parse::<Tag>().is_err(), "{bad:?}");
            assert!(bad.parse::<UserName>().is_err(), "{bad:?}");
            assert!(bad.parse::<TenantName>().is_err(), "{bad:?}");
        }
        assert_eq!("lxde-12.1".parse::<FlavourName>().unwrap().as_str(), "lxde-12.1");
    }

    #[test]
    fn a_digest_is_what_it_prints() {
        let digest = Digest::new([0xa5; 32]);
        assert_eq!(digest.to_string().parse::<Digest>().unwrap(), digest);
        assert!("sha256:../../etc/passwd".parse::<Digest>().is_err());
        assert!(digest.to_string().to_uppercase().parse::<Digest>().is_err());
    }

    #[test]
    fn errors_are_one_line() {
        let error = "a\nb".parse::<UserName>().unwrap_err().to_string();
        assert!(!error.contains('\n'), "{error}");
    }
}
