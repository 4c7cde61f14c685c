//! Images, writable roots and homes for desktops.
#![forbid(unsafe_code)]
