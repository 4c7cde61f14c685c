//! The story that an error and its causes tell.

use std::{error::Error, iter};

/// What an error says and what each of its causes says, outermost first.
///
/// Each layer names its verb and its object, as its own callers need it. A cause
/// that adds nothing to the words before it is left out; libraries that put
/// their cause into their own text are told once, too.
///
/// ```
/// use std::{error::Error, io};
/// let error: Box<dyn Error> = io::Error::other(io::Error::other("disk full")).into();
/// assert_eq!(qvd_core::causes(&*error), ["disk full"]);
/// ```
#[must_use]
pub fn causes(error: &(dyn Error + 'static)) -> Vec<String> {
    let mut said: Vec<String> =
        iter::successors(Some(error), |error| (*error).source()).map(ToString::to_string).collect();
    said.dedup_by(|cause, effect| effect.ends_with(cause.as_str()));
    said
}
