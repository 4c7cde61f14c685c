//! The programs of the host that build, and what they may do.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::Command,
};

use qvd_core::{Missing, Support};

use crate::{Error, treeedit::SOURCE_DATE_EPOCH_S};

/// The only directories that programs are taken from, whoever calls us.
const PATH: [&str; 4] = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"];

/// What no part of a build needs: device nodes, to change the kernel, its clock and its
/// log, to reach devices past their drivers, to look into others.
const NOT_IN_A_BUILD: &[&str] = &[
    "-mknod",
    "-sys_module",
    "-sys_rawio",
    "-sys_boot",
    "-sys_time",
    "-sys_ptrace",
    "-sys_pacct",
    "-syslog",
    "-mac_admin",
    "-mac_override",
    "-audit_control",
    "-wake_alarm",
    "-block_suspend",
];

/// What is left to packages that install themselves: to deal with files of
/// others, to become others, and to enter the tree.
const INSTALLING: &str = "-all,+chown,+dac_override,+fowner,+fsetid,+kill,+setgid,+setuid,+setfcap,+sys_chroot";
/// The same for who gives up more before it runs a program of the tree.
const ENTERING: &str = "-all,+chown,+dac_override,+fowner,+fsetid,+kill,+setgid,+setuid,+setfcap,+sys_chroot,+setpcap";
/// What that gives up once it is in the tree.
const ENTERED: &str = "--drop=cap_sys_chroot,cap_setpcap";

/// What has to be mounted from within the namespaces: processes, those of the
/// build alone, and nothing of the kernel's settings. The first argument is the tree.
const MOUNT_PROC: &str = r#"
options=subset=pid,nosuid,nodev,noexec
mount -t proc -o $options proc /proc
mount -t proc -o $options proc "$1/proc"
shift
exec "$@"
"#;

/// A command in namespaces of its own, which dies with all its children when it
/// is killed or when we are: what it mounts is in no other mount table, what it
/// names is not the host's, and nothing goes on writing after a crash.
fn contained() -> Result<Command, Error> {
    let mut command = command(&find("setpriv", "util-linux")?);
    command.args(["--pdeathsig", "KILL", "--bounding-set", &NOT_IN_A_BUILD.join(",")]);
    command.arg("--").arg(find("unshare", "util-linux")?);
    command.args(["--mount", "--propagation=private", "--pid", "--fork", "--kill-child=SIGKILL"]);
    command.args(["--ipc", "--uts", "--cgroup"]);
    Ok(command)
}

/// A command that has the network, to fetch packages. Nothing of them runs.
pub(super) fn fetching() -> Result<Command, Error> {
    let mut command = contained()?;
    command.args(["--mount-proc", "--"]);
    Ok(command)
}

/// A command to run in a [`Sandbox`](super::sandbox::Sandbox): without a network
/// and a terminal, and with no right that leads out.
fn confined(tree: &Path, rights: &str) -> Result<Command, Error> {
    let mut command = contained()?;
    command.args(["--net", "--"]).arg(find("sh", "dash")?).args(["-euc", MOUNT_PROC, "sh"]).arg(tree);
    command.arg(find("setsid", "util-linux")?).arg("--wait");
    command.arg(find("setpriv", "util-linux")?).args(["--bounding-set", rights, "--no-new-privs", "--"]);
    Ok(command)
}

/// A command that lets packages install themselves in `tree`.
pub(super) fn installing(tree: &Path) -> Result<Command, Error> {
    confined(tree, INSTALLING)
}

/// A command that runs a program of `tree` in it.
pub(super) fn inside(tree: &Path) -> Result<Command, Error> {
    let mut command = confined(tree, ENTERING)?;
    // One program enters the tree and gives up the rights for that, before
    // anything of the tree runs.
    let mut root = OsString::from("--chroot=");
    root.push(tree);
    command.arg(find("capsh", "libcap2-bin")?).arg(root).args([ENTERED, "--shell=/usr/bin/env", "--"]);
    command.env_remove("SOURCE_DATE_EPOCH");
    Ok(command)
}

pub(super) fn command(program: &Path) -> Command {
    let mut command = Command::new(program);
    command
        .env_clear()
        .env("PATH", PATH.join(":"))
        .env("LC_ALL", "C.UTF-8")
        .env("HOME", "/nonexistent")
        .env("DEBIAN_FRONTEND", "noninteractive")
        .env("SOURCE_DATE_EPOCH", SOURCE_DATE_EPOCH_S.to_string());
    command
}

pub(super) fn find(program: &str, package: &str) -> Result<PathBuf, Error> {
    let found = PATH.iter().map(|dir| Path::new(dir).join(program)).find(|path| path.is_file());
    found.ok_or_else(|| Error::Unsupported {
        op: "build images",
        missing: Missing::Program(format!("{program} (package {package})")),
    })
}

/// Whether the programs that build images are there.
pub(crate) fn support() -> Support {
    let programs = [
        ("mmdebstrap", "mmdebstrap"),
        ("setpriv", "util-linux"),
        ("setsid", "util-linux"),
        ("unshare", "util-linux"),
        ("capsh", "libcap2-bin"),
    ];
    match programs.iter().find_map(|(program, package)| find(program, package).err()) {
        Some(Error::Unsupported { missing, .. }) => Support::No(missing),
        _ => Support::Yes,
    }
}
