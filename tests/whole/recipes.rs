//! The larger recipes are built for real, and their sessions seen. The smallest is
//! what every other test runs on.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use qvd_demo::Server;
use qvd_storage::{BuildOptions, Recipe, Store};
use tokio::time::timeout;

use crate::{
    bad_input::elsewhere,
    harness::{Desktop, PASSWORD, browser, expect_ok, inside, on_a_host, remove_user, run},
};

/// A recipe, and programs that its session has when it is up.
const RECIPES: [(&str, &[&str]); 4] = [
    ("gnome", &["gnome-session-binary", "metacity", "gnome-panel", "gnome-flashback"]),
    ("kde", &["plasma_session", "kwin_x11", "ksmserver", "plasmashell"]),
    ("lxde", &["lxsession", "openbox", "lxpanel", "pcmanfm"]),
    ("xfce", &["xfce4-session", "xfwm4", "xfce4-panel", "xfdesktop"]),
];

/// Longest that a session may take to put itself together and to draw itself.
const SESSION: Duration = Duration::from_secs(180);

/// The command lines of all processes.
const PROGRAMS: &str = r"for p in /proc/[0-9]*/cmdline; do tr '\0' ' ' <$p 2>/dev/null && echo; done; true";

/// Where images are kept from one run to the next: each takes minutes to build.
fn store() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("recipes")
}

fn build(root: &Path) {
    let store = Store::open(root).unwrap();
    for (name, _) in RECIPES {
        let recipe = std::fs::read_to_string(format!("recipes/{name}.toml")).unwrap();
        let built = store.build(&Recipe::parse(&recipe).unwrap(), &BuildOptions::default(), &mut |_| ()).unwrap();
        eprintln!("{name}: {} entries, {} MiB", built.image.entries(), built.image.size_bytes() >> 20);
    }
}

/// Opens a desktop as a browser does, and waits until its session is there.
async fn expect_session(server: &Server, user: &str, desktop: u32, programs: &[&str], picture: &Path) {
    let mut display = browser(server, user).await.open(desktop, 1280, 800).await.unwrap();
    display.rfb.update(false).await.unwrap();
    let until = Instant::now() + SESSION;
    loop {
        let running = inside(server, desktop, PROGRAMS);
        let missing: Vec<_> = programs.iter().filter(|program| !running.contains(**program)).collect();
        if missing.is_empty() && display.rfb.colours() >= 64 {
            break;
        }
        let colours = display.rfb.colours();
        assert!(Instant::now() < until, "{missing:?} do not run, {colours} colours are seen: {running}");
        // A screen that does not change is looked at again all the same.
        if let Ok(update) = timeout(Duration::from_secs(1), display.rfb.update(true)).await {
            update.unwrap();
        }
    }
    display.rfb.save_png(picture).unwrap();
    display.leave();
}

#[test]
#[ignore = "it fetches and installs some hundred packages, which takes a quarter of an hour"]
fn each_recipe_is_built_and_its_session_starts() {
    on_a_host(|host| {
        let root = store();
        build(&root);
        elsewhere(host, &root, |setup| {
            let server = setup.start().unwrap();
            server.add_user("ana", PASSWORD).unwrap();
            for (name, programs) in RECIPES {
                let desktop: Desktop = server.json(&["desktop", "create", "ana", name]).unwrap();
                let id = desktop.id.to_string();
                expect_ok(&server.run(["desktop", "start", &id]).unwrap());
                let picture = root.join(format!("{name}.png"));
                run(expect_session(&server, "ana", desktop.id, programs, &picture));
                expect_ok(&server.run(["desktop", "rm", &id]).unwrap());
            }
            remove_user(&server, "ana");
            server.stop().unwrap();
        });
    });
}
