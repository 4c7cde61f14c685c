//! System calls the ecosystem lacks: the only crate of QVD with `unsafe` code.
//!
//! Everything here is a thin, safe wrapper: descriptors are owned, flags are
//! typed, and each `unsafe` block says why it is sound.

pub mod blk;
pub mod bpf;
pub mod btrfs;
pub mod dm;
pub mod guest;
pub mod init;
pub mod loopdev;
pub mod map;
pub mod mount;
pub mod multicast;
pub mod netns;
pub mod ofd;
pub mod packet;
pub mod process;
pub mod quota;
mod signals;
pub mod tap;
pub mod thread;
pub mod userns;
pub mod zram;
