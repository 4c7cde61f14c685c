//! Telling a fork bomb from programs that need more processes than they may have.
//!
//! A limit on processes keeps a bomb from filling the host, and not from going on
//! against the limit. Every process maps the same C library, whose list of mappings
//! has one lock in the kernel for all desktops of an image: with a thousand
//! processes waiting for that lock to fork again, whatever a neighbour starts or ends waits
//! behind them, for seconds (Linux 6.18 `mm/vma.c`, `i_mmap_lock_write`). Nothing
//! that can be weighed or limited changes that. So a bomb is ended.

use std::time::{Duration, Instant};

/// Refusals a second that no program reaches which does anything but ask again.
/// A shell waits a second and more before it asks again, a browser gives up; a bomb asks
/// some ten thousand times.
const BOMB_PER_SECOND: f64 = 500.0;

/// So many looks in a row have to agree.
const LOOKS: u8 = 2;

/// Looks that follow each other sooner say little.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// What was seen of a desktop's refused processes.
#[derive(Debug, Default)]
pub(crate) struct ForkWatch {
    last: Option<(Instant, u64)>,
    storms: u8,
}

impl ForkWatch {
    /// Takes note of how often processes were refused so far; true if a bomb goes on.
    pub(crate) fn is_bomb(&mut self, refused: u64, now: Instant) -> bool {
        let Some((then, before)) = self.last else {
            self.last = Some((now, refused));
            return false;
        };
        let passed = now.saturating_duration_since(then);
        if passed < LOOK_EVERY {
            return false;
        }
        self.last = Some((now, refused));
        let rate = refused.saturating_sub(before) as f64 / passed.as_secs_f64();
        self.storms = if rate >= BOMB_PER_SECOND { self.storms.saturating_add(1) } else { 0 };
        self.storms >= LOOKS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether a bomb is seen at the end of these counts, one each second.
    fn bomb(counts: &[u64]) -> bool {
        let (mut watch, began) = (ForkWatch::default(), Instant::now());
        (0..).zip(counts).fold(false, |_, (second, &count)| watch.is_bomb(count, began + Duration::from_secs(second)))
    }

    #[test]
    fn only_what_goes_on_is_a_bomb() {
        assert!(bomb(&[0, 10_000, 20_000]));
        assert!(!bomb(&[0, 10_000]), "it may be over");
        assert!(!bomb(&[0, 10_000, 10_000, 20_000]), "a pause begins it anew");
        assert!(!bomb(&[0, 100, 200, 300, 400]), "a program that asks again now and then");
        assert!(!bomb(&[1 << 40, 1 << 40, 1 << 40]), "what another node saw");
    }

    #[test]
    fn looks_in_quick_succession_count_as_one() {
        let (mut watch, now) = (ForkWatch::default(), Instant::now());
        assert!(!(0..100).any(|count| watch.is_bomb(count * 10_000, now)));
    }
}
