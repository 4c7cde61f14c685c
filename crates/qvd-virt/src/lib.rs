//! Virtualizers: containers on Linux namespaces.
#![forbid(unsafe_code)]
