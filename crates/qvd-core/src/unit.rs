//! Quantities with their unit in the type.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize, de};

/// Why a text is not a quantity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a {what}: {reason}")]
pub struct UnitError {
    what: &'static str,
    text: String,
    reason: &'static str,
}

/// An amount of memory or storage. Written `512M`, `2GiB`, `4096`; powers of 1024.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Bytes(u64);

impl Bytes {
    /// So many bytes.
    #[must_use]
    pub const fn new(bytes: u64) -> Self {
        Self(bytes)
    }
    /// So many times 1024 KiB.
    #[must_use]
    pub const fn mib(mib: u64) -> Self {
        Self(mib << 20)
    }
    /// So many times 1024 MiB.
    #[must_use]
    pub const fn gib(gib: u64) -> Self {
        Self(gib << 30)
    }
    /// The number of bytes.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, suffix) in [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")] {
            if self.0 != 0 && self.0.trailing_zeros() >= shift {
                return write!(f, "{}{suffix}", self.0 >> shift);
            }
        }
        write!(f, "{}", self.0)
    }
}

impl FromStr for Bytes {
    type Err = UnitError;
    fn from_str(text: &str) -> Result<Self, UnitError> {
        let err = |reason| UnitError { what: "size", text: text.chars().take(32).collect(), reason };
        let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, suffix) = text.split_at(digits);
        let shift = match suffix.trim_start() {
            "" | "B" => 0,
            "K" | "KiB" => 10,
            "M" | "MiB" => 20,
            "G" | "GiB" => 30,
            "T" | "TiB" => 40,
            _ => return Err(err("use a whole number with K, M, G or T (powers of 1024)")),
        };
        let number: u64 = number.parse().map_err(|_| err("use a whole number with K, M, G or T (powers of 1024)"))?;
        number.checked_mul(1 << shift).map(Self).ok_or_else(|| err("it does not fit in 64 bits"))
    }
}

impl Serialize for Bytes {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.0)
    }
}

impl<'de> Deserialize<'de> for Bytes {
    /// Takes a number of bytes, or text such as `512M`.
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Bytes;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of bytes or text such as \"512M\"")
            }
            fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<Bytes, E> {
                Ok(Bytes(bytes))
            }
            fn visit_i64<E: de::Error>(self, bytes: i64) -> Result<Bytes, E> {
                u64::try_from(bytes).map(Bytes).map_err(|_| E::custom("a size cannot be negative"))
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Bytes, E> {
                text.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// Processor time in thousandths of one core: 1000 is one core, always.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct MilliCpu(pub u32);

/// The host uids (and gids) that one desktop's 0 to 65535 are mapped to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct UidRange {
    base: u32,
}

impl UidRange {
    /// Ids in a range. 65536, so that `nobody` (65534) exists inside.
    pub const LEN: u32 = 1 << 16;
    /// First host uid handed out. Above what distributions give to people and
    /// services (below 65536) and to subordinate ids of people (from 100000,
    /// see subuid(5); 0x1000_0000 leaves room for four thousand of those).
    pub const FIRST: u32 = 0x1000_0000;
    /// How many ranges there are: up to, not including, the last range, which
    /// holds the invalid uid `u32::MAX`.
    pub const COUNT: u32 = (u32::MAX - Self::FIRST) / Self::LEN;

    /// The range of a slot.
    ///
    /// # Errors
    /// No such slot: it is not below [`UidRange::COUNT`].
    pub fn of_slot(slot: u32) -> Result<Self, UnitError> {
        if slot < Self::COUNT {
            Ok(Self { base: Self::FIRST + slot * Self::LEN })
        } else {
            let reason = "the host's uid ranges are exhausted";
            Err(UnitError { what: "uid slot", text: slot.to_string(), reason })
        }
    }

    /// Host uid that root inside is mapped to.
    #[must_use]
    pub const fn base(self) -> u32 {
        self.base
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_and_print() {
        for (text, bytes) in [("0", 0), ("4096", 4096), ("512M", 512 << 20), ("2GiB", 2 << 30), ("1 K", 1024)] {
            assert_eq!(text.parse::<Bytes>().unwrap().get(), bytes, "{text}");
        }
        for bad in ["", "M", "-1", "1.5G", "1g", "99999999999T", "1MB"] {
            assert!(bad.parse::<Bytes>().is_err(), "{bad}");
        }
        assert_eq!(Bytes::mib(512).to_string().parse::<Bytes>().unwrap(), Bytes::mib(512));
    }

    #[test]
    fn uid_ranges_never_touch_and_never_hold_the_invalid_uid() {
        let last = UidRange::of_slot(UidRange::COUNT - 1).unwrap();
        assert!(u64::from(last.base()) + u64::from(UidRange::LEN) <= u64::from(u32::MAX));
        assert_eq!(UidRange::of_slot(1).unwrap().base() - UidRange::of_slot(0).unwrap().base(), UidRange::LEN);
        assert!(UidRange::of_slot(UidRange::COUNT).is_err());
    }
}
