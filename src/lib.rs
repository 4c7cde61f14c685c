//! Virtual desktops for Linux.
#![forbid(unsafe_code)]
