//! Bridges, ports, addresses and confinement.
#![forbid(unsafe_code)]
