//! The options file of the NX agent, read by it at its start and at each resume.

use std::path::{Path, PathBuf};

use qvd_core::{DisplayKind, LinkSpeed};

/// Number of the session's display inside.
pub(crate) const SESSION_DISPLAY: u8 = 1;
/// Number of the head's display inside.
pub(crate) const HEAD_DISPLAY: u8 = 2;

/// Where X servers have their sockets.
pub(crate) const X_SOCKETS: &str = "/tmp/.X11-unix";

/// The socket of a display's X server.
pub(crate) fn x_socket(display: u8) -> PathBuf {
    PathBuf::from(format!("{X_SOCKETS}/X{display}"))
}

/// What the agent is told the options for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Occasion {
    /// Its start, with nobody there yet.
    Start,
    /// Being shown.
    Resume,
}

impl Occasion {
    /// Milliseconds that the agent sleeps before each round of work while nobody sees
    /// it. At a start the session's programs would wait for each, and one that was
    /// never shown does little: a task bar's clock would wake it four times a second instead
    /// of twice. Whoever left may have left a film running, which this slows down.
    const fn sleep_ms(self) -> u32 {
        match self {
            Self::Start => 0,
            Self::Resume => 50,
        }
    }
}

/// Where the agent finds and leaves its files.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Places<'a> {
    /// Socket on which it listens for a proxy.
    pub socket: &'a Path,
    /// Directory for what it caches.
    pub root: &'a Path,
    /// File in which it says how it is.
    pub state: &'a Path,
}

/// How images are packed on a line of this speed: as they are where bytes cost
/// nothing, without loss where they cost little, as photographs elsewhere.
const fn pack(link: LinkSpeed) -> &'static str {
    match link {
        LinkSpeed::Local => "nopack",
        LinkSpeed::Lan | LinkSpeed::Wan => "16m-png-9",
        _ => "16m-jpeg-7",
    }
}

/// The content of the options file at `occasion`, for a session shown as `kind`.
pub(crate) fn render(occasion: Occasion, kind: DisplayKind, places: Places<'_>) -> String {
    let (geometry, fullscreen, link) = match kind {
        DisplayKind::Nx { geometry, fullscreen, link } => (geometry, fullscreen, link),
        // The head's window manager is `x11::fit`: a window, so that the
        // session follows the screen's size.
        DisplayKind::Rfb { geometry } => (geometry, false, LinkSpeed::Local),
        _ => (qvd_core::Geometry::default(), false, LinkSpeed::Local),
    };
    // The caches are in the agent's own memory: the head is on the same
    // machine and needs none, a native client brings its own.
    let caches = if link == LinkSpeed::Local { "cache=1M,images=0" } else { "cache=4M,images=16M" };
    // Its keys are those of the display that shows it, so their codes are too.
    format!(
        "nx/nx,listen=unix:{socket},root={root},session=qvd,id=qvd,link={link},pack={pack},type=unix-kde,{caches},\
         clipboard=both,resize=1,tolerancechecks=risky,composite=1,shmem=0,keyconv=off,sleep={sleep},\
         geometry={geometry},fullscreen={fullscreen},state={state}:{SESSION_DISPLAY}",
        sleep = occasion.sleep_ms(),
        socket = places.socket.display(),
        root = places.root.display(),
        link = link.as_str(),
        pack = pack(link),
        fullscreen = u8::from(fullscreen),
        state = places.state.display(),
    )
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use qvd_core::Geometry;

    use super::*;

    fn rendered(kind: DisplayKind) -> String {
        rendered_at(Occasion::Resume, kind)
    }

    fn rendered_at(occasion: Occasion, kind: DisplayKind) -> String {
        let places =
            Places { socket: Path::new("/s/nx.sock"), root: Path::new("/s/agent"), state: Path::new("/i/state") };
        render(occasion, kind, places)
    }

    #[test]
    fn the_agent_listens_on_a_socket_and_asks_for_no_cookie() {
        let text = rendered(DisplayKind::Rfb { geometry: Geometry::default() });
        assert!(text.starts_with("nx/nx,listen=unix:/s/nx.sock,"), "{text}");
        assert!(text.ends_with(":1"), "{text}");
        assert!(!text.contains("cookie"), "{text}");
        assert!(!text.contains('\n'), "{text}");
    }

    #[test]
    fn the_agent_sleeps_only_once_somebody_has_seen_it() {
        let kind = DisplayKind::Rfb { geometry: Geometry::default() };
        assert!(rendered_at(Occasion::Start, kind).contains(",sleep=0,"));
        assert!(rendered_at(Occasion::Resume, kind).contains(",sleep=50,"));
    }

    #[test]
    fn a_native_client_gets_its_size_and_compression() {
        let geometry = Geometry::new(1000, 700).unwrap();
        let text = rendered(DisplayKind::Nx { geometry, fullscreen: true, link: LinkSpeed::Adsl });
        for part in ["link=adsl", "pack=16m-jpeg-7", "geometry=1000x700", "fullscreen=1", "clipboard=both"] {
            assert!(text.split([',', ':']).any(|option| option == part), "{part} in {text}");
        }
    }

    #[test]
    fn the_head_is_a_window_and_nothing_is_compressed() {
        let text = rendered(DisplayKind::Rfb { geometry: Geometry::default() });
        for part in ["link=local", "pack=nopack", "fullscreen=0", "resize=1", "tolerancechecks=risky"] {
            assert!(text.split([',', ':']).any(|option| option == part), "{part} in {text}");
        }
    }
}
