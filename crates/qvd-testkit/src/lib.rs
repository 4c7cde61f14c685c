//! Privileged gate, leak census and strict fakes of QVD's tests.
#![forbid(unsafe_code)]
