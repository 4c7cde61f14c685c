//! A host with memory for one desktop: the second is refused, with what would
//! have to change, and that is enough. And one where memory is short: what desktops
//! of a tenant have in common is there once.

use std::{
    thread,
    time::{Duration, Instant},
};

use qvd_demo::Setup;
use serde_json::Value;

use crate::harness::{SOON, create_desktop, expect_ok, inside, on_a_host, remove_user, user_with_desktop};

/// Enough for one container and the host's reserve, also under pressure, and
/// never for two.
const ROOM_FOR_ONE: &str = "48M";

#[test]
fn a_desktop_that_does_not_fit_is_refused_with_what_would_do() {
    on_a_host(|host| {
        let arguments = ["--memory", ROOM_FOR_ONE].map(str::to_owned).to_vec();
        let server = Setup { arguments, ..host.setup.clone() }.start().unwrap();
        let (user, first) = user_with_desktop(&server);
        let second = create_desktop(&server, &user, &[]);
        let (one, other) = (first.to_string(), second.to_string());
        expect_ok(&server.run(["desktop", "start", &one]).unwrap());

        let refused = server.run(["desktop", "start", &other]).unwrap();
        let said = String::from_utf8(refused.stderr).unwrap();
        assert_eq!(refused.status.code(), Some(5), "{said}");
        let line = said.lines().last().unwrap();
        assert!(line.starts_with(&format!("qvd: cannot start desktop {other}: needs 24 MiB, ")), "{said}");
        assert!(line.contains(&format!("; smallest change: stop desktop {one}, or free ")), "{said}");

        let memory: Value = server.json(&["memory"]).unwrap();
        assert_eq!(memory["total"], 48 << 20);
        let desktops = memory["desktops"].as_array().unwrap();
        assert_eq!(desktops.len(), 1, "nothing of the other is left: {memory}");
        assert_eq!(desktops[0]["id"], first);
        assert!(desktops[0]["resident"].as_u64().unwrap() > 1 << 20, "{memory}");
        expect_ok(&server.run(["memory"]).unwrap());

        // What it named is enough.
        expect_ok(&server.run(["desktop", "stop", &one]).unwrap());
        expect_ok(&server.run(["desktop", "start", &other]).unwrap());
        remove_user(&server, &user);
        server.stop().unwrap();
    });
}

/// What two desktops and what their programs take leaves a tenth of.
const SHORT: &str = "210M";

/// Has a program hold 66 MB of which each page is one of three.
const HOLD: &str = "setsid perl -e '$x = q(abc) x 22_000_000; sleep 600' </dev/null >/dev/null 2>&1 &";

#[test]
fn what_desktops_have_in_common_is_there_once_when_memory_is_short() {
    let steered = || std::fs::read_to_string("/sys/kernel/mm/ksm/run").unwrap().trim().to_owned();
    on_a_host(|host| {
        let arguments = ["--memory", SHORT].map(str::to_owned).to_vec();
        let server = Setup { arguments, ..host.setup.clone() }.start().unwrap();
        let (user, first) = user_with_desktop(&server);
        let desktops = [first, create_desktop(&server, &user, &[])];
        for desktop in desktops {
            expect_ok(&server.run(["desktop", "start", &desktop.to_string()]).unwrap());
            inside(&server, desktop, HOLD);
        }
        let end = Instant::now() + 3 * SOON;
        let profits = loop {
            let memory: Value = server.json(&["memory"]).unwrap();
            let desktops = memory["desktops"].as_array().unwrap();
            let profits: Vec<_> = desktops.iter().filter_map(|one| one["merge_profit_bytes"].as_i64()).collect();
            if profits.len() == 2 && profits.iter().all(|&profit| profit > 50 << 20) {
                assert_eq!(memory["merging"]["running"], true, "{memory}");
                break profits;
            }
            assert!(Instant::now() < end, "{memory}");
            thread::sleep(Duration::from_millis(500));
        };
        eprintln!("merging wins {profits:?} bytes; {}", steered());
        remove_user(&server, &user);
        server.stop().unwrap();
        assert_eq!(steered(), "0", "it is as it was");
    });
}
