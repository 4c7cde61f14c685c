//! What administrators do, and have done for them after the page was answered.

use std::{
    collections::BTreeMap,
    fmt,
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use qvd_core::{DesktopId, UserName};
use qvd_farm::{ErrorKind, FarmError};
use tokio::time::timeout;

use super::{AdminState, Who};
use crate::wire;

/// How long a page waits for what may take long: most of it is done by then.
const BRIEFLY: Duration = Duration::from_millis(400);
/// How long a failure stays on the pages, unless the same thing is tried again.
const FAILURE_SHOWN: Duration = Duration::from_secs(15 * 60);

/// What may take long is done to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Object {
    Desktop(DesktopId),
    User(UserName),
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Desktop(id) => write!(f, "desktop {id}"),
            Self::User(name) => write!(f, "user {name}"),
        }
    }
}

/// What may take long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    Start,
    Stop,
    Remove,
}

impl Action {
    const fn verb(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Stop => "stop",
            Self::Remove => "remove",
        }
    }

    const fn under_way(self) -> &'static str {
        match self {
            Self::Start => "being started",
            Self::Stop => "being stopped",
            Self::Remove => "being removed",
        }
    }
}

#[derive(Debug)]
struct Work {
    number: u64,
    action: Action,
    /// Why it failed, and when; `None` while it is under way.
    failed: Option<(String, Instant)>,
}

/// The latest work at each object that is under way or has failed.
#[derive(Debug, Default)]
pub(super) struct Works(Mutex<(u64, BTreeMap<Object, Work>)>);

/// What a page shows of the work at an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Seen {
    UnderWay(&'static str),
    Failed(String),
}

impl Works {
    fn lock(&self, now: Instant) -> MutexGuard<'_, (u64, BTreeMap<Object, Work>)> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_of_interest = |when: &Instant| now.saturating_duration_since(*when) < FAILURE_SHOWN;
        all.1.retain(|_, work| work.failed.as_ref().is_none_or(|(_, when)| is_of_interest(when)));
        all
    }

    /// What is under way at `object`, or has failed of late.
    pub(super) fn at(&self, object: &Object) -> Option<Seen> {
        self.lock(Instant::now()).1.get(object).map(|work| match &work.failed {
            None => Seen::UnderWay(work.action.under_way()),
            Some((why, _)) => Seen::Failed(why.clone()),
        })
    }

    /// Notes that work begins; its number. Another action takes the place of what is under way: a
    /// desktop that does not come up can be stopped.
    fn begin(&self, object: &Object, action: Action) -> Result<u64, FarmError> {
        let mut all = self.lock(Instant::now());
        let (last, works) = &mut *all;
        if let Some(work) = works.get(object).filter(|work| work.failed.is_none() && work.action == action) {
            return Err(FarmError::new(ErrorKind::Busy, format!("{object} is {} already", work.action.under_way())));
        }
        *last += 1;
        works.insert(object.clone(), Work { number: *last, action, failed: None });
        Ok(*last)
    }

    fn end(&self, object: &Object, number: u64, why: Option<String>) {
        let mut all = self.lock(Instant::now());
        let Some(work) = all.1.get_mut(object).filter(|work| work.number == number) else { return };
        match why {
            Some(why) => work.failed = Some((why, Instant::now())),
            None => drop(all.1.remove(object)),
        }
    }
}

/// An error with its causes, in a line: administrators see all of it.
pub(super) fn told(error: &FarmError) -> String {
    qvd_core::causes(error).join(": ")
}

impl AdminState {
    pub(super) fn works(&self) -> &Works {
        &self.works
    }

    /// Does something to its end, also when the browser leaves meanwhile, and notes in the log who did what
    /// to which object and what came of it.
    pub(super) async fn carry_out<T: Send + 'static>(
        &self,
        who: &Who,
        action: &'static str,
        object: impl fmt::Display,
        work: impl Future<Output = Result<T, FarmError>> + Send + 'static,
    ) -> Result<T, FarmError> {
        let (administrator, object) = (who.session.user.name.clone(), object.to_string());
        let carried = tokio::spawn(async move {
            let result = tokio::spawn(work).await.unwrap_or_else(|error| {
                let what = format!("the attempt to {action} {object} did not end");
                Err(FarmError::with_code(ErrorKind::Failed, "internal", what).because(error))
            });
            match &result {
                Ok(_) => tracing::info!(%administrator, action, object, result = "done", "administration"),
                Err(error) => {
                    let cause = wire::causes(error);
                    tracing::warn!(%administrator, action, object, result = %error, cause, "administration");
                }
            }
            result
        });
        carried.await.unwrap_or_else(|error| {
            Err(FarmError::with_code(ErrorKind::Failed, "internal", format!("cannot {action}")).because(error))
        })
    }

    /// Has something done that may take long, and returns soon; how it goes on is in [`Works::at`].
    pub(super) async fn begin(
        self: &Arc<Self>,
        who: &Who,
        object: Object,
        action: Action,
        work: impl Future<Output = Result<(), FarmError>> + Send + 'static,
    ) -> Result<(), FarmError> {
        let number = self.works.begin(&object, action)?;
        let (state, who) = (Arc::clone(self), who.clone());
        let done = tokio::spawn(async move {
            let result = state.carry_out(&who, action.verb(), &object, work).await;
            state.works.end(&object, number, result.as_ref().err().map(told));
        });
        // Whoever does not see the end yet sees that it is under way.
        drop(timeout(BRIEFLY, done).await);
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn desktop() -> Object {
        Object::Desktop(DesktopId::new(7).unwrap())
    }

    #[test]
    fn the_same_is_not_begun_twice_and_something_else_takes_over() {
        let works = Works::default();
        let start = works.begin(&desktop(), Action::Start).unwrap();
        let again = works.begin(&desktop(), Action::Start).unwrap_err();
        assert_eq!(again.to_string(), "desktop 7 is being started already");
        let stop = works.begin(&desktop(), Action::Stop).unwrap();
        works.end(&desktop(), start, Some("it was stopped".to_owned()));
        assert_eq!(works.at(&desktop()), Some(Seen::UnderWay("being stopped")), "the start is of no interest any more");
        works.end(&desktop(), stop, None);
        assert_eq!(works.at(&desktop()), None);
    }

    #[test]
    fn a_failure_is_shown_for_a_while_and_does_not_stand_in_the_way() {
        let works = Works::default();
        for _ in 0..2 {
            let number = works.begin(&desktop(), Action::Start).unwrap();
            works.end(&desktop(), number, Some("no memory".to_owned()));
            assert_eq!(works.at(&desktop()), Some(Seen::Failed("no memory".to_owned())));
        }
        drop(works.lock(Instant::now() + FAILURE_SHOWN));
        assert_eq!(works.at(&desktop()), None);
    }
}
