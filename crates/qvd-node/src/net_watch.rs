//! Watches over a node's network: that its rules stay what they are, and what
//! desktops try in vain.

use std::{error::Error as StdError, time::Duration};

use qvd_net::{DropWatch, Dropped, Error, Guard, Mended, Network};

/// Pause between two looks at the rules that nobody is known to have changed.
const RULES_CHECKED_EVERY: Duration = Duration::from_secs(60);

/// Pause between two lines about the same desktop and reason.
const DROPS_TOLD_EVERY: Duration = Duration::from_secs(10);

/// Both watches. Dropping it ends them as well.
#[derive(Debug)]
pub(crate) struct NetWatch {
    guard: Guard,
    /// None where the kernel has no log.
    drops: Option<DropWatch>,
}

impl NetWatch {
    /// # Errors
    /// Changes of the rules cannot be heard of.
    pub(crate) fn open(network: &Network) -> Result<Self, Error> {
        let guard = network.guard(RULES_CHECKED_EVERY, Box::new(report_rules))?;
        let report = |dropped: &Dropped| tracing::warn!("{dropped}");
        let drops = network.watch_drops(DROPS_TOLD_EVERY, Box::new(report)).inspect_err(|error| {
            tracing::warn!(error = error as &dyn StdError, "what desktops try in vain is counted and not told");
        });
        Ok(Self { guard, drops: drops.ok() })
    }

    /// Ends both and waits for that. Done already is done.
    ///
    /// # Errors
    /// One could not be told; closing may be tried again.
    pub(crate) fn close(&mut self) -> Result<(), Error> {
        self.guard.close()?;
        self.drops.as_mut().map_or(Ok(()), DropWatch::close)
    }
}

/// Somebody else's change of our rules is for the log, mended or not.
fn report_rules(mended: &Result<Mended, Error>) {
    match mended {
        Ok(Mended { differed, cut, .. }) => {
            tracing::warn!(differed, cut, "network rules had been changed by others and were put back");
        }
        Err(error) => {
            tracing::error!(
                error = error as &dyn StdError,
                "network rules could not be put back: desktops are cut off"
            );
        }
    }
}
