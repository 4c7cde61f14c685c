//! Files and directories inside the desktop that the session needs.
//!
//! Root's own files lie in a directory that only root may write to; what the
//! user's programs make lies in one of the user's, and is only ever looked at
//! or connected to, as the user.

use std::{
    fs, io,
    net::IpAddr,
    os::{
        fd::OwnedFd,
        unix::{
            fs::{DirBuilderExt, OpenOptionsExt},
            net::UnixStream,
        },
    },
    path::{Path, PathBuf},
};

use nix::unistd::{Gid, Uid};
use qvd_core::DisplayKind;
use qvd_guest::SessionConfig;
use rustix::{
    fs::{AtFlags, CWD, Mode, OFlags, inotify},
    process::{Gid as RawGid, Uid as RawUid},
};

use crate::{
    options::{self, HEAD_DISPLAY, Occasion, Places, SESSION_DISPLAY},
    session::{AgentState, Seen},
    spawn::Identity,
};

/// Root's own directory.
pub(crate) const ROOT_DIR: &str = "/run/qvd-init";

/// An agent key binding could end the session (Ctrl+Alt+T does by default) or
/// steal keys from programs; an empty list binds none.
const NO_KEYSTROKES: &str = "<!DOCTYPE NXAGENT_KEYSTROKES>\n<keystrokes></keystrokes>\n";

/// Longest word in the state file, in bytes.
const MAX_STATE: usize = 32;

/// What failed, with the object.
#[derive(Debug)]
pub(crate) struct Failure {
    pub what: String,
    pub source: io::Error,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "cannot {}: {}", self.what, self.source)
    }
}

fn failed<E: Into<io::Error>>(what: &str, path: &Path) -> impl FnOnce(E) -> Failure {
    let what = format!("{what} `{}`", path.display());
    move |source| Failure { what, source: source.into() }
}

/// Makes `path` a directory with this owner and mode. Its parent is root's, so
/// nobody can put something else in its place.
fn directory(path: &Path, uid: u32, gid: u32, mode: u32) -> Result<(), Failure> {
    match rustix::fs::mkdir(path, Mode::from_raw_mode(0o700)) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => {}
        Err(e) => return Err(failed("make directory", path)(e)),
    }
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let dir = rustix::fs::open(path, flags, Mode::empty()).map_err(failed("open directory", path))?;
    // In this order, a root without the right to other's files can do it too.
    rustix::fs::fchmod(&dir, Mode::from_raw_mode(mode)).map_err(failed("set the mode of", path))?;
    rustix::fs::fchown(&dir, Some(RawUid::from_raw(uid)), Some(RawGid::from_raw(gid)))
        .map_err(failed("give away directory", path))
}

/// Writes a file of root's, whose directory only root may write to.
fn write(path: &Path, content: &str, mode: u32) -> Result<(), Failure> {
    let write = || {
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(mode)
            .custom_flags(i32::try_from(OFlags::NOFOLLOW.bits()).unwrap_or(0))
            .open(path)?;
        io::Write::write_all(&mut file, content.as_bytes())
    };
    write().map_err(failed("write", path))
}

/// Makes root's own directory.
pub(crate) fn prepare_root() -> Result<(), Failure> {
    directory(Path::new(ROOT_DIR), 0, 0, 0o755)
}

/// Gives the desktop an identity of its own. An image has none, so every
/// volatile root gets a fresh one and a persistent one keeps its first.
pub(crate) fn machine_id() -> Result<(), Failure> {
    let path = Path::new("/etc/machine-id");
    let is_set = |text: String| text.trim().len() == 32;
    if fs::read_to_string(path).is_ok_and(is_set) {
        return Ok(());
    }
    // A random UUID from the kernel, whose version and variant bits are as
    // machine-id(5) wants them.
    let uuid = Path::new("/proc/sys/kernel/random/uuid");
    let id = fs::read_to_string(uuid).map_err(failed("read", uuid))?.replace('-', "");
    write(path, &id, 0o644)
}

/// Where programs read whom they ask for names (resolv.conf(5)).
const NAMES: &str = "/etc/resolv.conf";

/// How a file of ours begins: what somebody else wrote is left alone.
const NAMES_ARE_OURS: &str = "# by qvd-init";

/// Tells programs whom to ask for names. What an image or its administrator says instead,
/// also by a link to what a resolver of the image's writes, stays.
pub(crate) fn name_servers(servers: &[IpAddr]) -> Result<(), Failure> {
    let path = Path::new(NAMES);
    if fs::symlink_metadata(path).is_ok_and(|there| !there.is_file()) {
        return Ok(());
    }
    let before = fs::read_to_string(path).unwrap_or_default();
    let Some(text) = names_text(&before, servers) else { return Ok(()) };
    write(path, &text, 0o644)
}

/// What the file says then, if that is another than `before` and ours to say.
fn names_text(before: &str, servers: &[IpAddr]) -> Option<String> {
    if !before.trim().is_empty() && !before.starts_with(NAMES_ARE_OURS) {
        return None;
    }
    let lines: String = servers.iter().map(|server| format!("nameserver {server}\n")).collect();
    let text = if lines.is_empty() { lines } else { format!("{NAMES_ARE_OURS}\n{lines}") };
    (text != before).then_some(text)
}

/// The session's places.
#[derive(Debug)]
pub(crate) struct Desktop {
    user: Identity,
    runtime: PathBuf,
    private: PathBuf,
    nx_socket: PathBuf,
    rfb_socket: PathBuf,
    watch: OwnedFd,
}

impl Desktop {
    /// Makes the session's directories and watches them.
    pub(crate) fn prepare(session: &SessionConfig, user: Identity) -> Result<Self, Failure> {
        let runtime = PathBuf::from(format!("/run/user/{}", session.uid));
        let private = runtime.join("qvd");
        directory(Path::new("/run/user"), 0, 0, 0o755)?;
        directory(&runtime, user.uid, user.gid, 0o700)?;
        directory(Path::new(options::X_SOCKETS), 0, 0, 0o1777)?;
        home(&session.home, &user)?;

        write(&keystrokes(), NO_KEYSTROKES, 0o644)?;
        let watch = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)
            .map_err(failed("watch", &private))?;
        let desktop = Self {
            nx_socket: private.join("nx.sock"),
            rfb_socket: private.join("rfb.sock"),
            user,
            runtime,
            private,
            watch,
        };
        desktop.clear()?;
        Ok(desktop)
    }

    /// Removes what a former agent or head left, so that what appears is new,
    /// mends the user's directory and watches it.
    pub(crate) fn clear(&self) -> Result<(), Failure> {
        for display in [SESSION_DISPLAY, HEAD_DISPLAY] {
            remove(&options::x_socket(display))?;
            remove(&PathBuf::from(format!("/tmp/.X{display}-lock")))?;
        }
        self.as_user(|| {
            private_directory(&self.private)?;
            private_directory(&self.agent_root())?;
            private_directory(&self.proxy_root())?;
            remove(&self.nx_socket)?;
            remove(&self.rfb_socket)
        })?;
        let names = inotify::WatchFlags::CREATE
            | inotify::WatchFlags::DELETE
            | inotify::WatchFlags::ONLYDIR
            | inotify::WatchFlags::DONT_FOLLOW;
        let watch = |dir: &Path| inotify::add_watch(&self.watch, dir, names).map(drop).map_err(failed("watch", dir));
        self.as_user(|| watch(&self.private))?;
        watch(Path::new(options::X_SOCKETS))?;
        let state = state_file();
        remove(&state)?;
        write(&state, "", 0o644)?;
        let (uid, gid) = (RawUid::from_raw(self.user.uid), RawGid::from_raw(self.user.gid));
        rustix::fs::chownat(CWD, &state, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(failed("give away", &state))?;
        inotify::add_watch(&self.watch, &state, inotify::WatchFlags::MODIFY | inotify::WatchFlags::CLOSE_WRITE)
            .map(drop)
            .map_err(failed("watch", &state))
    }

    /// Removes what a former head left.
    pub(crate) fn clear_head(&self) -> Result<(), Failure> {
        remove(&options::x_socket(HEAD_DISPLAY))?;
        remove(&PathBuf::from(format!("/tmp/.X{HEAD_DISPLAY}-lock")))?;
        self.as_user(|| remove(&self.rfb_socket))
    }

    /// Writes the agent's options for its next start or resume.
    pub(crate) fn write_options(&self, occasion: Occasion, kind: DisplayKind) -> Result<(), Failure> {
        let (root, state) = (self.agent_root(), state_file());
        let places = Places { socket: &self.nx_socket, root: &root, state: &state };
        write(&options_file(), &options::render(occasion, kind, places), 0o644)
    }

    /// Forgets the notifications that came, and looks.
    pub(crate) fn look(&self) -> Seen {
        // Only that something happened matters; a full buffer is not drained at
        // once, the next round of the loop comes back for the rest.
        let _read = rustix::io::read(&self.watch, &mut [0_u8; 4096]);
        let mut unsettled = false;
        let mut listens = |socket: &Path| {
            let there = self.as_user(|| exists(socket));
            let listens = there && crate::stats::listens(&socket.to_string_lossy());
            unsettled |= there && !listens;
            listens
        };
        Seen {
            agent: read_state(&state_file()),
            listens: listens(&self.nx_socket),
            session_socket: listens(&options::x_socket(SESSION_DISPLAY)),
            head_socket: listens(&options::x_socket(HEAD_DISPLAY)),
            unsettled,
        }
    }

    /// Descriptor that is readable when [`Desktop::look`] may see more.
    pub(crate) const fn watch(&self) -> &OwnedFd {
        &self.watch
    }

    /// Connects to the session's display, as the user: the socket's directory
    /// is the user's, who could have put a link to anything in its place.
    pub(crate) fn connect(&self, kind: DisplayKind) -> io::Result<UnixStream> {
        let socket = match kind {
            DisplayKind::Nx { .. } => &self.nx_socket,
            _ => &self.rfb_socket,
        };
        self.as_user(|| connect_now(socket))
    }

    /// Runs `f` with the user's effective ids. Nobody can signal or trace this
    /// process meanwhile: its real and saved ids stay root's.
    fn as_user<T>(&self, f: impl FnOnce() -> T) -> T {
        as_user(&self.user, f)
    }

    /// Proportional set size of a process, in bytes, of whoever's it is.
    pub(crate) fn pss(&self, pid: u32) -> Option<u64> {
        crate::stats::pss(pid).or_else(|| self.as_user(|| crate::stats::pss(pid)))
    }

    /// `XDG_RUNTIME_DIR` of the session.
    pub(crate) fn runtime(&self) -> &Path {
        &self.runtime
    }
    /// Socket on which the head listens for RFB clients.
    pub(crate) fn rfb_socket(&self) -> &Path {
        &self.rfb_socket
    }
    /// Socket on which the agent listens for a proxy.
    pub(crate) fn nx_socket(&self) -> &Path {
        &self.nx_socket
    }
    fn agent_root(&self) -> PathBuf {
        self.private.join("agent")
    }
    /// The head's proxy keeps its files here; it aborts without the directory.
    pub(crate) fn proxy_root(&self) -> PathBuf {
        self.private.join("proxy")
    }
    /// Who the session belongs to.
    pub(crate) const fn user(&self) -> &Identity {
        &self.user
    }
}

/// The options file of the agent.
pub(crate) fn options_file() -> PathBuf {
    Path::new(ROOT_DIR).join("nx.options")
}
/// The empty list of key bindings.
pub(crate) fn keystrokes() -> PathBuf {
    Path::new(ROOT_DIR).join("keystrokes.cfg")
}
fn state_file() -> PathBuf {
    Path::new(ROOT_DIR).join("nx.state")
}
/// Runs `f` with the effective ids of `user`.
fn as_user<T>(user: &Identity, f: impl FnOnce() -> T) -> T {
    let (root_uid, root_gid) = (Uid::from_raw(0), Gid::from_raw(0));
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    if nix::unistd::setegid(gid).is_err() || nix::unistd::seteuid(uid).is_err() {
        // Without the right to change it was never root, or it cannot go on.
        std::process::abort();
    }
    let value = f();
    if nix::unistd::seteuid(root_uid).is_err() || nix::unistd::setegid(root_gid).is_err() {
        std::process::abort();
    }
    value
}

/// Makes the home if the image and the storage have none.
fn home(path: &str, user: &Identity) -> Result<(), Failure> {
    let path = Path::new(path);
    match rustix::fs::statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW) {
        // A fresh home still is root's.
        Ok(stat) if stat.st_uid != 0 => Ok(()),
        _ => directory(path, user.uid, user.gid, 0o700),
    }
}

/// Makes a directory of the user's, as the user, whatever took its place.
fn private_directory(path: &Path) -> Result<(), Failure> {
    if fs::symlink_metadata(path).is_ok_and(|metadata| !metadata.is_dir()) {
        remove(path)?;
    }
    match fs::DirBuilder::new().mode(0o700).create(path) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(failed("make directory", path)(e)),
        _ => Ok(()),
    }
}

fn remove(path: &Path) -> Result<(), Failure> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed("remove", path)(e)),
        _ => Ok(()),
    }
}

fn exists(path: &Path) -> bool {
    // The real directory is the user's or the world's: never followed.
    rustix::fs::statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW).is_ok()
}

fn read_state(path: &Path) -> AgentState {
    let mut word = [0; MAX_STATE];
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let read = rustix::fs::open(path, flags, Mode::empty()).and_then(|file| rustix::io::read(file, &mut word));
    let length = read.unwrap_or(0);
    AgentState::parse(std::str::from_utf8(word.get(..length).unwrap_or_default()).unwrap_or_default())
}

/// Connects without waiting for a full backlog to empty: the listener is the
/// user's and may never accept.
fn connect_now(path: &Path) -> io::Result<UnixStream> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn whom_to_ask_is_told_where_nobody_else_said_it() {
        let servers = ["fd00::1".parse().unwrap(), "10.66.0.1".parse().unwrap()];
        let told = names_text("", &servers).unwrap();
        assert_eq!(told, "# by qvd-init\nnameserver fd00::1\nnameserver 10.66.0.1\n");
        assert_eq!(names_text(&told, &servers), None);
        assert_eq!(names_text(&told, &servers[1..]).unwrap(), "# by qvd-init\nnameserver 10.66.0.1\n");
        // Nobody is asked any more; and what somebody else wrote stays.
        assert_eq!(names_text(&told, &[]).unwrap(), "");
        assert_eq!(names_text("", &[]), None);
        assert_eq!(names_text("nameserver 192.0.2.1\n", &servers), None);
    }
}
