//! Starting programs: one way for services, the session and `exec`.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    io::{self, Read, Write},
    os::unix::process::CommandExt,
    process::{Command, ExitCode, Stdio},
};

use nix::{
    sys::signal::SigSet,
    unistd::{Gid, Uid},
};
use qvd_guest::SessionConfig;

/// First argument of this program when it becomes another one.
pub(crate) const ENTER: &str = "enter";

/// Status of a program that could not be run, as a shell gives it.
const NOT_RUN: u8 = 127;

/// Longest `/etc/group` that is looked at, in bytes.
const MAX_GROUPS_FILE: u64 = 1024 * 1024;

/// Most supplementary groups that are taken over.
///
/// Source: Linux `include/uapi/linux/limits.h`, `NGROUPS_MAX` is 65536; nobody
/// is in more than a few.
const MAX_GROUPS: usize = 64;

/// Who a program runs as.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    /// User id inside.
    pub uid: u32,
    /// Group id inside.
    pub gid: u32,
    /// Supplementary groups.
    groups: Vec<u32>,
    /// Directory it starts in.
    home: String,
}

impl Identity {
    /// Root of the desktop.
    pub(crate) fn root() -> Self {
        Self { uid: 0, gid: 0, groups: Vec::new(), home: "/root".to_owned() }
    }

    /// The session's user, with the groups that the image gives it.
    pub(crate) fn of(session: &SessionConfig) -> Self {
        let mut text = String::new();
        let groups = std::fs::File::open("/etc/group")
            .and_then(|file| file.take(MAX_GROUPS_FILE).read_to_string(&mut text))
            .map(|_| groups_of(&session.user, &text))
            .unwrap_or_default();
        Self { uid: session.uid, gid: session.gid, groups, home: session.home.clone() }
    }
}

/// Ids of the groups that `user` is a member of, from the text of `/etc/group`.
fn groups_of(user: &str, text: &str) -> Vec<u32> {
    let group = |line: &str| {
        let mut fields = line.splitn(4, ':');
        let gid = fields.nth(2)?.parse().ok()?;
        fields.next()?.split(',').any(|member| member == user).then_some(gid)
    };
    text.lines().filter_map(group).take(MAX_GROUPS).collect()
}

/// A program to start.
#[derive(Debug)]
pub(crate) struct Program<'a> {
    /// Program and arguments.
    pub argv: &'a [String],
    /// Its whole environment.
    pub env: &'a BTreeMap<String, String>,
    /// Who it runs as.
    pub identity: &'a Identity,
    /// Whether its standard input becomes its controlling terminal.
    pub terminal: bool,
}

/// Starts `program` in a session of its own; returns its process id, which is
/// also that of its group. That a program does not exist shows as its status.
///
/// A running program is kept by number, not by [`std::process::Child`]: only
/// the reaper waits.
pub(crate) fn spawn(program: &Program<'_>, stdin: Stdio, stdout: Stdio, stderr: Stdio) -> io::Result<u32> {
    let identity = program.identity;
    let groups: Vec<_> = identity.groups.iter().map(ToString::to_string).collect();
    let child = Command::new("/proc/self/exe")
        .arg0("qvd-init")
        .args([ENTER, &identity.uid.to_string(), &identity.gid.to_string(), &groups.join(","), &identity.home])
        .arg(if program.terminal { "terminal" } else { "" })
        .args(program.argv)
        .env_clear()
        .envs(program.env)
        .stdin(stdin)
        .stdout(stdout)
        .stderr(stderr)
        .spawn()?;
    Ok(child.id())
}

/// Becomes the program that [`spawn`] described.
pub(crate) fn enter(args: impl Iterator<Item = OsString>) -> ExitCode {
    let args: Vec<_> = args.collect();
    let failure = match become_program(&args) {
        Ok(never) => match never {},
        Err(failure) => failure,
    };
    let name = args.get(5).map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    // The reader may be gone; the status says enough then.
    let _written = writeln!(io::stderr(), "cannot run `{name}`: {failure}");
    ExitCode::from(NOT_RUN)
}

fn become_program(args: &[OsString]) -> io::Result<std::convert::Infallible> {
    let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
    let [uid, gid, groups, home, terminal, name, rest @ ..] = args else { return Err(invalid()) };
    // The largest is no id: to the kernel it means "as it is", which is root.
    let id = |text: &str| text.parse::<u32>().ok().filter(|id| *id != u32::MAX);
    let number = |text: &OsString| text.to_str().and_then(id).ok_or_else(invalid);
    let (uid, gid) = (Uid::from_raw(number(uid)?), Gid::from_raw(number(gid)?));
    let groups: Vec<_> = groups
        .to_str()
        .ok_or_else(invalid)?
        .split(',')
        .filter(|group| !group.is_empty())
        .map(|group| id(group).map(Gid::from_raw).ok_or_else(invalid))
        .collect::<Result<_, _>>()?;

    SigSet::all().thread_unblock()?;
    rustix::process::setsid()?;
    if terminal == "terminal" {
        rustix::process::ioctl_tiocsctty(io::stdin())?;
    }
    nix::unistd::setgroups(&groups)?;
    nix::unistd::setresgid(gid, gid, gid)?;
    nix::unistd::setresuid(uid, uid, uid)?;
    if rustix::process::chdir(home).is_err() {
        rustix::process::chdir("/")?;
    }
    Err(Command::new(name).args(rest).exec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_those_that_list_the_user() {
        let text = "root:x:0:\naudio:x:29:pulse,user\nuser:x:1000:\nvideo:x:44:user2\nbad:x:zz:user\nsudo:x:27:user\n";
        assert_eq!(groups_of("user", text), [29, 27]);
    }
}
