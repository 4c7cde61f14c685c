//! What clients connect to: TLS, QVD wire protocol, browser display, REST API, portal.
#![forbid(unsafe_code)]
