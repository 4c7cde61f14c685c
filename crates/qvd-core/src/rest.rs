//! What a desktop does while nobody looks at it.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// What becomes of a running desktop that no client is attached to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RestPolicy {
    /// How deep it rests.
    pub mode: RestMode,
    /// How long nobody has to be attached first, in seconds; `None` leaves that
    /// to the node.
    pub after_s: Option<u32>,
    /// It does not rest while its programs use more than this of one processor,
    /// in hundredths.
    pub busy_percent: u32,
    /// Whether it rests although its programs have connections to other hosts.
    pub with_streams: bool,
    /// Whether it rests although a program plays or records sound.
    pub with_sound: bool,
}

/// How deep a desktop rests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum RestMode {
    /// Its programs stand still and its memory is given back; a client wakes it.
    #[default]
    Freeze,
    /// Its programs go on; memory that they do not touch is given back.
    PageOut,
    /// It does not.
    Never,
}

impl RestPolicy {
    /// How long nobody has to be attached first, when a node says so much and
    /// the display of a browser stays for `linger` after it has left.
    #[must_use]
    pub fn after(&self, usual: Duration, linger: Duration) -> Duration {
        // The head's memory is to be gone before the rest is given back.
        let gone = linger + Duration::from_secs(2);
        self.after_s.map_or(usual, |s| Duration::from_secs(s.into())).max(gone)
    }
}

impl Default for RestPolicy {
    /// Frozen, unless its programs work, talk with others or use sound. An idle desktop
    /// with a task bar takes a third of a hundredth of a processor.
    fn default() -> Self {
        Self { mode: RestMode::default(), after_s: None, busy_percent: 3, with_streams: false, with_sound: false }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_rests_before_the_browsers_head_is_gone() {
        let usual = Duration::from_secs(8);
        let policy = RestPolicy::default();
        assert_eq!(policy.after(usual, Duration::from_secs(5)), usual);
        assert_eq!(policy.after(usual, Duration::from_secs(30)), Duration::from_secs(32));
        let patient = RestPolicy { after_s: Some(600), ..policy };
        assert_eq!(patient.after(usual, Duration::from_secs(30)), Duration::from_secs(600));
    }
}
