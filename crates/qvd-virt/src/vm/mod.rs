//! Virtual machines by QEMU, driven over its control socket.
//!
//! [`Qemu::start`] gives a [`Vm`] whose processors stand still. QEMU runs in a
//! container of its own: other ids than the host's, no capability, no program
//! but itself to be seen, no network. What it works with are descriptors that
//! it inherits; nothing is opened by a path that means something outside.
//!
//! A guest of ours boots a kernel that is handed over ([`GuestKernel`]), with
//! `qvd-init` as its first process, and reads its system from a base that all
//! guests of the image share. Any other system boots from a disk.

mod arguments;
pub mod command;
mod cpio;
mod hypervisor;
mod kernel;
mod kvm;
mod machine;
mod memory;
mod plug;
mod qmp;
mod room;
mod sockets;
mod spec;
mod template;

pub use hypervisor::Qemu;
pub use kernel::GuestKernel;
pub use kvm::{AccelChoice, Kvm, KvmMemory};
pub use machine::{Down, HostMemory, StopLimits, StoppedBy, Vm, VmRecord, VmState};
pub use memory::GuestUse;
pub use plug::{Picture, Slot};
pub use qmp::{Command, Event, QemuVersion, Qmp, QmpError, lines_of};
pub use spec::{
    Accel, BackingSpec, BaseDevice, BaseSpec, Boot, Devices, DiskFormat, DiskSpec, Memory, NicSpec, VmSpec,
};
pub use template::{Mold, Pool, Template};
