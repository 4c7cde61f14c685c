//! Rest: a desktop that nobody looks at stands still and gives back memory.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use qvd_core::{RestMode, RestPolicy};
use qvd_virt::Freezer;

/// Whether a desktop may rest, and whether it does.
#[derive(Debug, Default)]
pub(crate) struct Rest {
    policy: RestPolicy,
    after: Duration,
    freezer: Option<Freezer>,
    alone: Alone,
    /// One reference more for each that needs the desktop awake.
    users: Arc<()>,
}

/// Keeps a desktop awake for as long as it lives.
#[derive(Debug, Clone)]
pub(crate) struct Awake(#[expect(dead_code, reason = "only counted")] Arc<()>);

/// Whether anybody needs a running desktop.
#[derive(Debug, Default, Clone, Copy)]
enum Alone {
    /// Somebody does, or did when this was last looked at.
    #[default]
    No,
    Since {
        when: Instant,
        /// Processor time that its programs had used by then.
        used: Duration,
    },
    Resting,
}

/// What has to be done about a desktop now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Due {
    Nothing,
    /// It has been alone for long enough: ask what its programs do.
    Look,
}

impl Rest {
    pub(crate) fn new(policy: RestPolicy, after: Duration, freezer: Option<Freezer>) -> Self {
        Self { policy, after, freezer, ..Self::default() }
    }

    pub(crate) const fn is_resting(&self) -> bool {
        matches!(self.alone, Alone::Resting)
    }

    /// Looks whether anybody needs it; `used` is asked when it becomes alone.
    pub(crate) fn tick(&mut self, attached: bool, used: impl FnOnce() -> Duration) -> Due {
        let needed = attached || Arc::strong_count(&self.users) > 1 || self.policy.mode == RestMode::Never;
        match self.alone {
            Alone::Resting if !needed => {}
            _ if needed => self.alone = Alone::No,
            Alone::Since { when, .. } if when.elapsed() >= self.after => return Due::Look,
            Alone::Since { .. } => {}
            _ => self.alone = Alone::Since { when: Instant::now(), used: used() },
        }
        Due::Nothing
    }

    /// Lets it stand still, unless its programs work (`used`: processor time so
    /// far), talk with others (`talks`) or use sound (`sounds`). True when it rests
    /// now and its memory can be given back.
    pub(crate) fn settle(
        &mut self,
        used: Duration,
        talks: impl FnOnce() -> bool,
        sounds: impl FnOnce() -> bool,
    ) -> bool {
        let Alone::Since { when, used: before } = self.alone else { return false };
        let busy = used.saturating_sub(before).as_secs_f64() * 100.0
            > when.elapsed().as_secs_f64() * f64::from(self.policy.busy_percent);
        if busy || (!self.policy.with_streams && talks()) || (!self.policy.with_sound && sounds()) {
            // Looked at again after as long.
            self.alone = Alone::Since { when: Instant::now(), used };
            return false;
        }
        if self.policy.mode == RestMode::Freeze
            && let Some(freezer) = &self.freezer
            && let Err(error) = freezer.freeze()
        {
            tracing::info!(error = &error as &dyn std::error::Error, "desktop runs on at rest");
        }
        self.alone = Alone::Resting;
        true
    }

    /// Lets it go on, and keeps it awake until the result is dropped.
    pub(crate) fn wake(&mut self) -> Result<Awake, qvd_virt::Error> {
        if self.is_resting()
            && let Some(freezer) = &self.freezer
        {
            freezer.thaw()?;
        }
        self.alone = Alone::No;
        Ok(Awake(Arc::clone(&self.users)))
    }

    /// Lets it stand still while something is done about it, as far as this host
    /// can stop its processes.
    pub(crate) fn still<T>(&mut self, work: impl FnOnce() -> T) -> Result<T, qvd_virt::Error> {
        let frozen = self.is_resting() && self.policy.mode == RestMode::Freeze;
        let Some(freezer) = self.freezer.as_ref().filter(|_| !frozen) else { return Ok(work()) };
        freezer.freeze()?;
        let done = work();
        freezer.thaw()?;
        Ok(done)
    }

    /// Does something if it stands still.
    pub(crate) fn if_still(&mut self, work: impl FnOnce()) {
        let frozen = self.freezer.as_ref().is_some_and(|freezer| freezer.is_frozen().unwrap_or(false));
        if self.is_resting() && frozen {
            work();
        }
    }

    /// Lets it go on for one question, if it rests.
    pub(crate) fn briefly<T>(&mut self, question: impl FnOnce() -> T) -> Result<T, qvd_virt::Error> {
        let freezer = self.freezer.as_ref().filter(|_| self.is_resting() && self.policy.mode == RestMode::Freeze);
        let Some(freezer) = freezer else { return Ok(question()) };
        freezer.thaw()?;
        let answer = question();
        freezer.freeze()?;
        Ok(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rest(after: Duration) -> Rest {
        Rest::new(RestPolicy { with_streams: true, ..RestPolicy::default() }, after, None)
    }

    const NONE: Duration = Duration::ZERO;

    #[test]
    fn it_rests_once_it_was_alone_for_long_enough() {
        let mut rest = rest(Duration::ZERO);
        assert_eq!(rest.tick(true, || NONE), Due::Nothing);
        assert_eq!(rest.tick(false, || NONE), Due::Nothing, "alone from now on");
        assert_eq!(rest.tick(false, || NONE), Due::Look);
        assert!(rest.settle(NONE, || false, || false));
        assert!(rest.is_resting());
        assert_eq!(rest.tick(false, || NONE), Due::Nothing);
        drop(rest.wake());
        assert!(!rest.is_resting());
    }

    #[test]
    fn it_stays_awake_for_whoever_needs_it() {
        let mut rest = rest(Duration::ZERO);
        let program = rest.wake();
        for _ in 0..3 {
            assert_eq!(rest.tick(false, || NONE), Due::Nothing);
        }
        drop(program);
        assert_eq!(rest.tick(false, || NONE), Due::Nothing);
        assert_eq!(rest.tick(false, || NONE), Due::Look);
        // Somebody came between the look and the rest.
        drop(rest.wake());
        assert!(!rest.settle(NONE, || false, || false));
    }

    #[test]
    fn it_does_not_rest_while_its_programs_work() {
        let mut rest = rest(Duration::ZERO);
        assert_eq!(rest.tick(false, || NONE), Due::Nothing);
        assert_eq!(rest.tick(false, || NONE), Due::Look);
        assert!(!rest.settle(Duration::from_secs(3600), || false, || false), "an hour's work in no time");
        assert!(rest.settle(Duration::from_secs(3600), || false, || false), "and none since");
    }

    #[test]
    fn it_does_not_rest_while_somebody_may_be_listening() {
        let mut heard = rest(Duration::ZERO);
        assert_eq!(heard.tick(false, || NONE), Due::Nothing);
        assert!(!heard.settle(NONE, || false, || true));
        assert_eq!(heard.tick(false, || NONE), Due::Look, "looked at again");
        assert!(heard.settle(NONE, || false, || false));

        let policy = RestPolicy { with_streams: true, with_sound: true, ..RestPolicy::default() };
        let mut unheard = Rest::new(policy, Duration::ZERO, None);
        assert_eq!(unheard.tick(false, || NONE), Due::Nothing);
        assert!(unheard.settle(NONE, || false, || true), "the policy says so");
    }

    #[test]
    fn a_policy_can_forbid_it() {
        let policy = RestPolicy { mode: RestMode::Never, ..RestPolicy::default() };
        let mut rest = Rest::new(policy, Duration::ZERO, None);
        for _ in 0..3 {
            assert_eq!(rest.tick(false, || NONE), Due::Nothing);
        }
    }
}
