//! What a browser does, done by a program.
#![forbid(unsafe_code)]

pub mod rfb;
