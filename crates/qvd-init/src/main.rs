//! Init of a desktop.
#![forbid(unsafe_code)]
fn main() {}
