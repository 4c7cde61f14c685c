//! Commands of QVD.
#![forbid(unsafe_code)]
fn main() {}
