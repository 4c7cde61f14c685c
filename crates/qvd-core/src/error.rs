//! What can be made of an error, in every layer alike.

/// What somebody who has to choose a next step needs to know of an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// What was asked for is wrong; asking again will not help.
    Invalid,
    /// There is no such thing.
    NotFound,
    /// Somebody holds it, or all are in use; later it may work.
    Busy,
    /// This host lacks something.
    Unsupported,
    /// It was tried and failed.
    Failed,
}
