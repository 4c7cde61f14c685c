//! How machines come to be.

use serde::{Deserialize, Serialize};

/// How desktops of an image come to be when they are virtual machines. What is not
/// said is left to the node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BirthPolicy {
    /// Whether those whose system is forgotten at their stop are born from a template,
    /// which the first of its kind makes, or boot each for itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub template: Option<bool>,
    /// How many clones of a template stand ready, so that a start need not wait for one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ready: Option<u8>,
}

impl BirthPolicy {
    /// Whether it leaves everything to the node.
    #[must_use]
    pub fn is_usual(&self) -> bool {
        *self == Self::default()
    }
}
