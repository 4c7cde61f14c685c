//! System calls the ecosystem lacks: the only crate of QVD with `unsafe` code.
