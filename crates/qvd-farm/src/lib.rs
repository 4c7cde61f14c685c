//! Control plane: store, users, flavours, desktops, sessions.
#![forbid(unsafe_code)]
