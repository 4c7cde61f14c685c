use std::{
    fmt,
    time::{Instant, SystemTime, UNIX_EPOCH},
};

/// Where the time comes from; a test moves its own.
pub trait Clock: fmt::Debug + Send + Sync {
    /// The wall clock: for what is written down.
    fn now(&self) -> SystemTime;
    /// The clock that nobody sets: for how often somebody may try.
    fn monotonic(&self) -> Instant;
}

/// The host's clocks.
#[derive(Debug, Clone, Copy, Default)]
#[non_exhaustive]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> SystemTime {
        SystemTime::now()
    }

    fn monotonic(&self) -> Instant {
        Instant::now()
    }
}

/// Seconds since 1970 as the database keeps them. A clock before 1970 counts as 1970.
pub(crate) fn unix_s(time: SystemTime) -> i64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| i64::try_from(since.as_secs()).unwrap_or(i64::MAX))
}
