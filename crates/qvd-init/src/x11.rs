//! What the init does as a client of X servers, each in a process of the
//! user's: the servers and all they say belong to the user.

use std::{
    error::Error,
    os::unix::net::UnixStream,
    process::ExitCode,
    time::{Duration, Instant},
};

use qvd_core::Geometry;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use x11rb::{
    connection::Connection,
    protocol::{
        Event,
        randr::{self, ConnectionExt as _},
        xproto::{
            AtomEnum, ChangeWindowAttributesAux, ConfigureWindowAux, ConnectionExt as _, CreateWindowAux, EventMask,
            InputFocus, MapState, Window, WindowClass,
        },
    },
    rust_connection::{DefaultStream, RustConnection},
};

use crate::{
    keymap,
    options::{self, SESSION_DISPLAY},
};

/// First argument for [`watch`].
pub(crate) const WATCH: &str = "watch";
/// First argument for [`fit`].
pub(crate) const FIT: &str = "fit";
/// First argument for [`resize`].
pub(crate) const RESIZE: &str = "resize";

/// First argument for [`redraw`].
pub(crate) const REDRAW: &str = "redraw";

type Outcome = Result<(), Box<dyn Error>>;

/// Ends a process that did one of these.
pub(crate) fn finish(outcome: Outcome) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _written = std::io::Write::write_all(
                &mut std::io::stderr(),
                format!("cannot work on the X server: {error}\n").as_bytes(),
            );
            ExitCode::FAILURE
        }
    }
}

/// Connects by the server's socket alone: a display's name could lead to the
/// network, and looking names up is a good part of a static C library.
fn connect() -> Result<(RustConnection, Window), Box<dyn Error>> {
    let display = std::env::var("DISPLAY")?;
    connect_to(display.strip_prefix(':').ok_or("the display is not a local one")?.parse()?)
}

fn connect_to(number: u8) -> Result<(RustConnection, Window), Box<dyn Error>> {
    let (stream, _peer) = DefaultStream::from_unix_stream(UnixStream::connect(options::x_socket(number))?)?;
    let connection = RustConnection::connect_to_stream(stream, 0)?;
    let root = connection.setup().roots.first().ok_or("there is no screen")?.root;
    Ok((connection, root))
}

/// Returns once a window manager manages `$DISPLAY`.
///
/// Source: Extended Window Manager Hints, `_NET_SUPPORTING_WM_CHECK`.
pub(crate) fn watch() -> Outcome {
    let (connection, root) = connect()?;
    let atom = connection.intern_atom(false, b"_NET_SUPPORTING_WM_CHECK")?.reply()?.atom;
    let events = ChangeWindowAttributesAux::new().event_mask(EventMask::PROPERTY_CHANGE);
    connection.change_window_attributes(root, &events)?.check()?;
    loop {
        let property = connection.get_property(false, root, atom, AtomEnum::WINDOW, 0, 1)?.reply()?;
        if property.value32().and_then(|mut values| values.next()).is_some_and(|window| window != 0) {
            return Ok(());
        }
        while !matches!(connection.wait_for_event()?, Event::PropertyNotify(event) if event.atom == atom) {}
    }
}

/// Fits `$DISPLAY`, a head, and the session to each other until the server
/// ends: every top-level window, which is the agent's alone, is kept as large as
/// the screen, and the session has the head's keys.
pub(crate) fn fit() -> Outcome {
    let (connection, root) = connect()?;
    // Redirecting is what makes a window manager. Without one the agent would
    // take itself for full-screen, and keep to that on a native client.
    let mask = EventMask::SUBSTRUCTURE_NOTIFY | EventMask::SUBSTRUCTURE_REDIRECT;
    let events = ChangeWindowAttributesAux::new().event_mask(mask);
    connection.change_window_attributes(root, &events)?.check()?;
    keymap::extend(&connection)?;
    let mut session = None;
    connection.randr_select_input(root, randr::NotifyMask::SCREEN_CHANGE)?.check()?;
    let mut size = connection.get_geometry(root)?.reply().map(|reply| (reply.width, reply.height))?;
    for window in connection.query_tree(root)?.reply()?.children {
        fill(&connection, window, size)?;
    }
    connection.flush()?;
    loop {
        match connection.wait_for_event()? {
            Event::MapRequest(event) => drop(connection.map_window(event.window)?),
            Event::ConfigureRequest(event) => fill(&connection, event.window, size)?,
            Event::MapNotify(event) => {
                fill(&connection, event.window, size)?;
                connection.flush()?;
                hand_keys_on(&connection, &mut session);
            }
            Event::MappingNotify(event) if keymap::concerns(&event) => hand_keys_on(&connection, &mut session),
            Event::RandrScreenChangeNotify(event) => {
                // A burst of changes ends in one; the last size is asked for.
                size = (event.width, event.height);
                for window in connection.query_tree(root)?.reply()?.children {
                    fill(&connection, window, size)?;
                }
            }
            _ => continue,
        }
        connection.flush()?;
    }
}

/// Gives the session the head's keys. One that is not there, or another than
/// before, gets them when the agent shows its window.
fn hand_keys_on(head: &RustConnection, session: &mut Option<RustConnection>) {
    let connection = session.take().or_else(|| connect_to(SESSION_DISPLAY).ok().map(|(connection, _root)| connection));
    *session = connection.filter(|connection| keymap::hand_on(head, connection).is_ok());
}

fn fill(connection: &RustConnection, window: Window, (width, height): (u16, u16)) -> Outcome {
    // The window may be gone again; then there is nothing to do.
    let Ok(attributes) = connection.get_window_attributes(window)?.reply() else { return Ok(()) };
    if attributes.override_redirect
        || attributes.map_state == MapState::UNMAPPED
        || attributes.class != WindowClass::INPUT_OUTPUT
    {
        return Ok(());
    }
    let place = ConfigureWindowAux::new().x(0).y(0).width(u32::from(width)).height(u32::from(height)).border_width(0);
    connection.configure_window(window, &place)?;
    // Nobody else gives it the keyboard.
    connection.set_input_focus(InputFocus::POINTER_ROOT, window, x11rb::CURRENT_TIME)?;
    Ok(())
}

/// How long a session that was just given to another front may go on changing
/// its size. On a busy machine the agent is still at it when it says that it
/// runs, and what programs draw meanwhile is lost.
const SETTLES: Duration = Duration::from_millis(1500);

/// Has every program on `$DISPLAY` draw its windows again: now, whenever the
/// screen changes its size, and once things have settled.
pub(crate) fn redraw() -> Outcome {
    let (connection, root) = connect()?;
    let events = ChangeWindowAttributesAux::new().event_mask(EventMask::STRUCTURE_NOTIFY);
    connection.change_window_attributes(root, &events)?.check()?;
    let end = Instant::now() + SETTLES;
    expose(&connection, root)?;
    loop {
        match connection.poll_for_event()? {
            Some(Event::ConfigureNotify(_)) => expose(&connection, root)?,
            Some(_) => {}
            None => {
                let left = Timespec::try_from(end.saturating_duration_since(Instant::now()))?;
                if poll(&mut [PollFd::new(connection.stream(), PollFlags::IN)], Some(&left))? == 0 {
                    return expose(&connection, root);
                }
            }
        }
    }
}

/// One window over all of the screen comes and goes, without being drawn.
fn expose(connection: &RustConnection, root: Window) -> Outcome {
    let screen = connection.get_geometry(root)?.reply()?;
    let window = connection.generate_id()?;
    let over = CreateWindowAux::new().override_redirect(1).background_pixmap(x11rb::NONE);
    let (width, height) = (screen.width, screen.height);
    connection.create_window(0, window, root, 0, 0, width, height, 0, WindowClass::INPUT_OUTPUT, 0, &over)?;
    connection.map_window(window)?;
    connection.destroy_window(window)?.check()?;
    Ok(())
}

/// Gives the screen of `$DISPLAY` the size in `geometry`.
pub(crate) fn resize(geometry: Option<&str>) -> Outcome {
    let geometry: Geometry = geometry.ok_or("no size was given")?.parse()?;
    let (width, height) = (geometry.width(), geometry.height());
    let (connection, root) = connect()?;
    let now = connection.get_geometry(root)?.reply()?;
    if (now.width, now.height) == (width, height) {
        return Ok(());
    }
    let resources = connection.randr_get_screen_resources_current(root)?.reply()?;
    let crtc = *resources.crtcs.first().ok_or("there is no controller")?;
    let output = *resources.outputs.first().ok_or("there is no output")?;
    let known = resources.modes.iter().find(|mode| (mode.width, mode.height) == (width, height));
    let mode = match known {
        Some(mode) => mode.id,
        None => {
            let name = format!("qvd-{geometry}");
            // There is no tube behind it: any timing that adds up will do.
            let info = randr::ModeInfo {
                width,
                height,
                dot_clock: u32::from(width) * u32::from(height) * 60,
                htotal: width,
                vtotal: height,
                name_len: u16::try_from(name.len())?,
                ..Default::default()
            };
            let mode = connection.randr_create_mode(root, info, name.as_bytes())?.reply()?.mode;
            connection.randr_add_output_mode(output, mode)?.check()?;
            mode
        }
    };
    // The screen has to hold the old mode and the new one while it changes.
    let (wide, high) = (width.max(now.width), height.max(now.height));
    let millimetres = |pixels: u16| u32::from(pixels) * 254 / 960;
    if (wide, high) != (now.width, now.height) {
        connection.randr_set_screen_size(root, wide, high, millimetres(wide), millimetres(high))?.check()?;
    }
    let status = connection
        .randr_set_crtc_config(
            crtc,
            x11rb::CURRENT_TIME,
            resources.config_timestamp,
            0,
            0,
            mode,
            randr::Rotation::ROTATE0,
            &[output],
        )?
        .reply()?
        .status;
    if status != randr::SetConfig::SUCCESS {
        return Err(format!("the screen refused {geometry}").into());
    }
    if (wide, high) != (width, height) {
        connection.randr_set_screen_size(root, width, height, millimetres(width), millimetres(height))?.check()?;
    }
    Ok(())
}
