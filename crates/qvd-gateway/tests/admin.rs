//! Administration as a browser meets it.
#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use std::{sync::Arc, time::Duration};

use qvd_core::{Bytes, DesktopState, NetPolicy, RootPolicy};
use qvd_farm::{Secret, SessionKind};
use qvd_gateway::images::{ImageCall as _, Import};
use qvd_node::{HostError, HostErrorKind, fake::Op};
use qvd_storage::Repository;
use serde_json::json;
use support::{
    Answer, Log, PASSWORD, PATIENCE, Site, cookie_header, forbids_inline_code, get, post, qvd, token, try_sign_in,
};

async fn try_enter(site: &Site, user: &str, password: &str, cookies: &str) -> Answer {
    let page = site.ask(&get("/admin/sign-in", cookies)).await;
    assert_eq!(page.status, 200, "{page:?}");
    let form = format!("user={user}&password={}&csrf={}", password.replace(' ', "+"), token(&page.body));
    let form_cookie = cookie_header(&page);
    let cookies = match cookies.trim_end() {
        "" => form_cookie,
        before => format!("{before}; {}", form_cookie.trim_start_matches("Cookie: ")),
    };
    site.ask(&post("/admin/sign-in", &cookies, &form)).await
}

/// An administrator's session.
struct Admin<'s> {
    site: &'s Site,
    cookie: String,
    csrf: String,
}

impl<'s> Admin<'s> {
    /// Signs bob in.
    async fn of(site: &'s Site) -> Self {
        let answer = try_enter(site, "bob", PASSWORD, "").await;
        assert_eq!((answer.status, answer.header("location")), (303, "/admin"), "{answer:?}");
        let cookie = cookie_header(&answer);
        let page = site.ask(&get("/admin", &cookie)).await;
        assert_eq!(page.status, 200, "{page:?}");
        let csrf = token(&page.body).to_owned();
        Self { site, cookie, csrf }
    }

    async fn get(&self, path: &str) -> Answer {
        self.site.ask(&get(path, &self.cookie)).await
    }

    async fn post(&self, path: &str, fields: &str) -> Answer {
        self.site.ask(&post(path, &self.cookie, &format!("csrf={}&{fields}", self.csrf))).await
    }

    /// Sends a form that does what it says.
    async fn does(&self, path: &str, fields: &str) -> String {
        let answer = self.post(path, fields).await;
        assert_eq!(answer.status, 303, "{path} {fields}: {answer:?}");
        answer.header("location").to_owned()
    }

    /// Sends a form that is refused with these words in the page.
    async fn is_refused(&self, path: &str, fields: &str, status: u16, words: &str) -> String {
        let answer = self.post(path, fields).await;
        assert_eq!(answer.status, status, "{path} {fields}: {answer:?}");
        let alert = answer.body.split("role=\"alert\"").nth(1).unwrap_or_else(|| panic!("no alert: {answer:?}"));
        let alert = alert.split('>').nth(1).unwrap().split('<').next().unwrap().to_owned();
        assert!(alert.contains(words), "{path} {fields}: `{alert}` does not say `{words}`");
        forbids_inline_code(path, &answer);
        answer.body
    }

    /// A page once it says `words`.
    async fn says(&self, path: &str, words: &str) -> Answer {
        let read = async {
            loop {
                let page = self.get(path).await;
                if page.body.contains(words) {
                    return page;
                }
                tokio::task::yield_now().await;
            }
        };
        let patient = tokio::time::timeout(PATIENCE, read).await;
        patient.unwrap_or_else(|_| panic!("{path} never says `{words}`"))
    }
}

/// Every page that is there without anything more, of the user ada and her desktop 1.
const PAGES: [&str; 14] = [
    "/admin",
    "/admin/desktops",
    "/admin/desktops?user=ada&state=stopped",
    "/admin/desktops/new",
    "/admin/desktops/1",
    "/admin/desktops/1/remove",
    "/admin/users",
    "/admin/users/ada",
    "/admin/users/bob",
    "/admin/users/ada/remove",
    "/admin/sessions",
    "/admin/flavours",
    "/admin/flavours/icewm",
    "/admin/images",
];

/// Every form, with fields that would do something.
const FORMS: [(&str, &str); 14] = [
    ("/admin/sign-out", ""),
    ("/admin/desktops", "user=ada&flavour=icewm"),
    ("/admin/desktops/1/start", ""),
    ("/admin/desktops/1/stop", ""),
    ("/admin/desktops/1/maintenance", "blocked=yes"),
    ("/admin/desktops/1/explain", "frames=00"),
    ("/admin/desktops/1/remove", ""),
    ("/admin/users", "name=eve&password=correct+horse&again=correct+horse&admin=yes"),
    ("/admin/users/ada/password", "password=another+horse&again=another+horse"),
    ("/admin/users/ada/administrator", "admin=yes"),
    ("/admin/users/ada/remove", "desktops=remove"),
    ("/admin/sessions/1/end", ""),
    ("/admin/flavours/icewm", "memory=512M"),
    ("/admin/flavours/icewm/reset", ""),
];

/// All that forms could have changed.
async fn everything(site: &Site) -> String {
    let (farm, mut sessions) = (&site.farm, site.farm.sessions(None).await.unwrap());
    sessions.iter_mut().for_each(|session| session.last_used_unix_s = 0);
    let users = farm.users().await.unwrap();
    let (desktops, flavours) = (farm.desktop_infos(None).await.unwrap(), farm.flavours().await.unwrap());
    let password = farm.authenticate("ada", &Secret::from(PASSWORD), None).await.is_ok();
    format!("{users:?} {desktops:?} {flavours:?} {sessions:?} {password}")
}

#[tokio::test]
async fn a_portal_session_is_asked_for_the_password_again() {
    let site = Site::new().await;
    let portal = cookie_header(&try_sign_in(&site, "bob", PASSWORD).await);
    assert!(site.ask(&get("/desktops", &portal)).await.body.contains("href=\"/admin\""));
    for path in PAGES {
        let answer = site.ask(&get(path, &portal)).await;
        assert_eq!((answer.status, answer.header("location")), (303, "/admin/sign-in"), "{path}");
        assert!(answer.body.is_empty(), "{answer:?}");
    }
    let page = site.ask(&get("/admin/sign-in", &portal)).await;
    assert!(page.body.contains("value=\"bob\""), "the name is known: {}", page.body);
    // Nor does the portal's own token do for a form.
    let csrf = token(&site.ask(&get("/desktops", &portal)).await.body).to_owned();
    let before = everything(&site).await;
    for (path, fields) in FORMS {
        let answer = site.ask(&post(path, &portal, &format!("csrf={csrf}&{fields}"))).await;
        assert_eq!((answer.status, answer.header("location")), (303, "/admin/sign-in"), "{path}");
    }
    assert_eq!(everything(&site).await, before);

    let entered = try_enter(&site, "bob", PASSWORD, &portal).await;
    assert_eq!(entered.header("location"), "/admin");
    let cookies = entered.cookies();
    let cookie = cookies.iter().find(|c| c.starts_with("__Host-qvd-admin=")).unwrap();
    for flag in ["; Path=/", "; Secure", "; HttpOnly", "; SameSite=Strict"] {
        assert!(cookie.contains(flag), "{flag} is not in {cookie}");
    }
    assert!(!cookie.contains("Domain"), "{cookie}");
}

#[tokio::test]
async fn to_others_there_is_nothing() {
    let site = Site::new().await;
    let ada = cookie_header(&try_sign_in(&site, "ada", PASSWORD).await);
    let nothing = site.ask(&get("/nothing", &ada)).await;
    let csrf = token(&site.ask(&get("/desktops", &ada)).await.body).to_owned();
    assert!(!site.ask(&get("/desktops", &ada)).await.body.contains("/admin"));
    let forged = format!("{}; __Host-qvd-admin={}\r\n", ada.trim_end(), "0".repeat(64));
    let before = everything(&site).await;
    for path in PAGES.into_iter().chain(["/admin/nothing", "/admin/sign-out"]) {
        for cookies in [&ada, &forged] {
            let answer = site.ask(&get(path, cookies)).await;
            assert_eq!((answer.status, &answer.body), (404, &nothing.body), "{path}");
        }
        if path != "/admin" {
            assert_eq!(site.ask(&get(path, "")).await.status, 404, "{path} for nobody");
        }
    }
    for (path, fields) in FORMS {
        for cookies in [&*ada, &forged, ""] {
            let answer = site.ask(&post(path, cookies, &format!("csrf={csrf}&{fields}"))).await;
            assert_eq!(answer.status, 404, "{path}: {answer:?}");
        }
    }
    assert_eq!(everything(&site).await, before);
}

#[tokio::test]
async fn who_may_not_enter_learns_nothing_and_guessing_is_slowed() {
    let site = Site::new().await;
    let wrong = try_enter(&site, "bob", "wrong horse", "").await;
    let (plain, nobody) = (try_enter(&site, "ada", PASSWORD, "").await, try_enter(&site, "nobody", PASSWORD, "").await);
    for answer in [&wrong, &plain, &nobody] {
        assert_eq!(answer.status, 401);
        assert!(answer.body.contains("is wrong, or this user is no administrator"), "{answer:?}");
        assert!(!cookie_header(answer).contains("__Host-qvd-admin="), "{answer:?}");
    }
    assert!(site.farm.sessions(None).await.unwrap().is_empty());
    for _ in 0..5 {
        try_enter(&site, "bob", "wrong horse", "").await;
    }
    let late = try_enter(&site, "bob", PASSWORD, "").await;
    assert_eq!(late.status, 429);
    assert!(late.body.contains("Try again in") && !late.header("retry-after").is_empty(), "{late:?}");
    let portal = try_sign_in(&site, "bob", PASSWORD).await;
    assert_eq!(portal.status, 429, "both doors count together");
    // Signing somebody in is for our own page.
    let page = site.ask(&get("/admin/sign-in", "")).await;
    let form = format!("user=bob&password=correct+horse&csrf={}", token(&page.body));
    assert_eq!(site.ask(&post("/admin/sign-in", "", &form)).await.status, 403);
    let foreign = post("/admin/sign-in", &cookie_header(&page), &form);
    let foreign = foreign.replace("Origin: https://localhost", "Origin: https://evil.example");
    assert_eq!(site.ask(&foreign).await.status, 403);
}

#[tokio::test]
async fn the_session_is_for_these_pages_alone() {
    let site = Site::new().await;
    let admin = Admin::of(&site).await;
    assert_eq!(admin.get("/desktops").await.header("location"), "/sign-in");
    let token = admin.cookie.trim().split_once('=').unwrap().1;
    let api = |headers: &str| get("/api/v1/users", headers);
    let as_bearer = format!("Authorization: Bearer {token}\r\n");
    let as_portal = format!("Cookie: __Host-qvd-session={token}\r\n");
    for headers in [&admin.cookie, &as_bearer, &as_portal] {
        assert_eq!(site.ask(&api(headers)).await.status, 401, "{headers}");
    }
    // Nor are those of others for these.
    for kind in [SessionKind::Web, SessionKind::Bearer] {
        let other = site.farm.create_session(&"bob".parse().unwrap(), kind).await.unwrap().token;
        let answer = site.ask(&get("/admin", &format!("Cookie: __Host-qvd-admin={}\r\n", other.expose()))).await;
        assert_eq!(answer.header("location"), "/admin/sign-in?ended=1", "{kind:?}");
    }
}

#[tokio::test]
async fn a_session_ends() {
    let site = Site::new().await;
    let admin = Admin::of(&site).await;
    for _ in 0..4 {
        site.clock.advance(Duration::from_secs(20 * 60));
        assert_eq!(admin.get("/admin").await.status, 200, "it is in use");
    }
    site.clock.advance(Duration::from_secs(31 * 60));
    let before = everything(&site).await;
    let answer = admin.post("/admin/desktops/1/remove", "").await;
    assert_eq!((answer.status, answer.header("location")), (303, "/admin/sign-in?ended=1"), "unused for half an hour");
    assert_eq!(everything(&site).await, before);
    assert!(site.ask(&get("/admin/sign-in?ended=1", "")).await.body.contains("has ended"));

    let admin = Admin::of(&site).await;
    for _ in 0..24 {
        site.clock.advance(Duration::from_secs(20 * 60));
        admin.get("/admin").await;
    }
    assert_eq!(admin.get("/admin").await.status, 303, "eight hours are the most");

    let admin = Admin::of(&site).await;
    assert_eq!(admin.does("/admin/sign-out", "").await, "/desktops");
    assert_eq!(admin.get("/admin").await.status, 303, "it was left");

    let admin = Admin::of(&site).await;
    let portal = cookie_header(&try_sign_in(&site, "bob", PASSWORD).await);
    let both = format!("{}; {}", portal.trim_end(), admin.cookie.trim_start_matches("Cookie: "));
    let csrf = token(&site.ask(&get("/desktops", &portal)).await.body).to_owned();
    site.ask(&post("/sign-out", &both, &format!("csrf={csrf}"))).await;
    assert_eq!(admin.get("/admin").await.status, 303, "leaving the portal leaves administration");

    let admin = Admin::of(&site).await;
    site.farm.set_admin(&"bob".parse().unwrap(), false).await.unwrap();
    assert_eq!(admin.get("/admin").await.status, 303, "bob administers no more");
    site.farm.set_admin(&"bob".parse().unwrap(), true).await.unwrap();
    assert_eq!(admin.get("/admin").await.status, 303, "what ended does not come back");
}

#[tokio::test]
async fn what_another_site_sends_changes_nothing() {
    let site = Site::new().await;
    let admin = Admin::of(&site).await;
    let before = everything(&site).await;
    for (path, fields) in FORMS {
        for form in [fields.to_owned(), format!("csrf=&{fields}"), format!("csrf={}&{fields}", "0".repeat(64))] {
            let answer = site.ask(&post(path, &admin.cookie, &form)).await;
            assert_eq!(answer.status, 403, "{path} {form}");
        }
        let foreign = post(path, &admin.cookie, &format!("csrf={}&{fields}", admin.csrf));
        let foreign = foreign.replace("Origin: https://localhost", "Origin: https://evil.example");
        assert_eq!(site.ask(&foreign).await.status, 403, "{path} from elsewhere");
    }
    let long = format!("csrf={}&frames={}", admin.csrf, "0".repeat(20_000));
    assert_eq!(site.ask(&post("/admin/desktops/1/explain", &admin.cookie, &long)).await.status, 413);
    assert_eq!(everything(&site).await, before);
}

#[tokio::test]
async fn every_page_forbids_inline_code_and_has_no_secret() {
    let site = Site::new().await;
    let admin = Admin::of(&site).await;
    admin.does("/admin/desktops/1/start", "").await;
    admin.says("/admin/desktops/1", "<dt>Processes</dt><dd>9</dd>").await;
    let bearer = site.ask(&qvd("create_auth_token")).await.json()["auth_token"].as_str().unwrap().to_owned();
    let admins = admin.cookie.trim().split_once('=').unwrap().1;
    for path in PAGES.into_iter().chain(["/admin/images/icewm", "/admin/desktops/4711", "/admin/desktops/x"]) {
        let page = admin.get(path).await;
        forbids_inline_code(path, &page);
        assert!(page.body.contains("<nav class=\"places\""), "{path}: {page:?}");
        for secret in [PASSWORD, &bearer, admins, "$argon2"] {
            assert!(!page.body.contains(secret), "{path} shows `{secret}`");
        }
    }
    forbids_inline_code("/admin/sign-in", &site.ask(&get("/admin/sign-in", "")).await);
}

#[tokio::test]
async fn the_overview_counts() {
    let site = Site::new().await;
    let admin = Admin::of(&site).await;
    site.farm.start(site.desktop, tokio::sync::mpsc::channel(1).0).await.unwrap();
    let page = admin.get("/admin").await.body;
    for part in [
        "<strong>2</strong> desktops",
        "data-state=\"running\"><strong>1</strong>",
        "data-state=\"stopped\"><strong>1</strong>",
        "<strong>1</strong> sessions",
        "<strong>2</strong> users",
        "8192 MiB of 16384 MiB",
        "no: a host in memory has none",
        "<td class=\"figure\">20 MiB</td>",
        "/admin/images/icewm",
    ] {
        assert!(page.contains(part), "{part} is not in {page}");
    }
    site.host.fail_next(Op::Images, HostError::new(HostErrorKind::Failed, "the <disk> is gone"));
    let page = admin.get("/admin").await;
    assert_eq!(page.status, 200, "what is known is shown");
    assert!(page.body.contains("Cannot list the images: the &#60;disk&#62; is gone"), "{}", page.body);
}

#[tokio::test]
async fn desktops_are_listed_and_picked() {
    let site = Site::new().await;
    let admin = Admin::of(&site).await;
    site.farm.start(site.desktop, tokio::sync::mpsc::channel(1).0).await.unwrap();
    let list = async |query: &str| admin.get(&format!("/admin/desktops{query}")).await;
    let has = |page: &Answer, number: u32| page.body.contains(&format!("href=\"/admin/desktops/{number}\""));
    for (query, first, second) in [
        ("", true, true),
        ("?user=ada", true, false),
        ("?user=bob&state=", false, true),
        ("?state=running", true, false),
        ("?state=stopped", false, true),
        ("?user=ada&state=stopped", false, false),
        ("?page=7", false, false),
    ] {
        let page = list(query).await;
        assert_eq!((page.status, has(&page, 1), has(&page, 2)), (200, first, second), "{query}: {}", page.body);
    }
    for (query, status, words) in [
        ("?user=nobody", 404, "There is no user `nobody`"),
        ("?user=%3Cb%3E", 422, "User: `&#60;b&#62;` is not a user name"),
        ("?state=%22%3E", 422, "there is no `\\&#34;&#62;`"),
    ] {
        let page = list(query).await;
        assert!(page.status == status && page.body.contains(words), "{query}: {page:?}");
    }
    for _ in 0..50 {
        let new = qvd_farm::NewDesktop::new("ada".parse().unwrap(), "icewm".parse().unwrap());
        site.farm.create_desktop(new).await.unwrap();
    }
    let (first, second) = (list("").await, list("?page=1").await);
    assert!(has(&first, 50) && !has(&first, 51) && first.body.contains("page=1\">Later"), "{}", first.body);
    assert!(!has(&second, 50) && has(&second, 52) && second.body.contains("page=0\">Earlier"), "{}", second.body);
}

#[tokio::test]
async fn a_desktop_is_started_and_stopped() {
    let site = Site::new().await;
    let admin = Admin::of(&site).await;
    let state = async || site.farm.desktop_info(site.desktop).await.unwrap().status.state;
    assert_eq!(admin.does("/admin/desktops/1/start", "").await, "/admin/desktops/1");
    let page = admin.says("/admin/desktops/1", "<dt>Processes</dt><dd>9</dd>").await;
    assert_eq!(state().await, DesktopState::Running);
    assert!(page.body.contains("<dt>Port</dt><dd>none</dd>") && page.header("refresh").is_empty(), "{page:?}");
    assert_eq!(admin.does("/admin/desktops/1/stop", "").await, "/admin/desktops/1");
    admin.says("/admin/desktops/1", "/admin/desktops/1/start").await;
    assert_eq!(state().await, DesktopState::Stopped);

    admin.does("/admin/desktops/1/maintenance", "blocked=yes").await;
    assert!(site.farm.desktop(site.desktop).await.unwrap().blocked);
    admin.does("/admin/desktops/1/start", "").await;
    admin.says("/admin/desktops/1", "desktop 1 is under maintenance").await;
    admin.does("/admin/desktops/1/maintenance", "blocked=no").await;
    assert!(!site.farm.desktop(site.desktop).await.unwrap().blocked);

    let cause = HostError::new(HostErrorKind::Timeout, "no <session> within 30 s");
    site.host.fail_next(Op::EnsureRunning, cause);
    admin.does("/admin/desktops/1/start", "").await;
    let words = "cannot start desktop 1: no &#60;session&#62; within 30 s";
    admin.says("/admin/desktops/1", words).await;
    admin.says("/admin/desktops", words).await;
    admin.does("/admin/desktops/1/start", "").await;
    let page = admin.says("/admin/desktops/1", "<dt>Processes</dt>").await;
    assert!(!page.body.contains(words), "what failed before is of no interest any more");
    admin.is_refused("/admin/desktops/77/start", "", 404, "There is no desktop 77").await;
}

#[tokio::test]
async fn what_is_under_way_is_shown_until_it_ends() {
    let site = Site::new().await;
    let admin = Admin::of(&site).await;
    let held = site.host.hold_next(Op::EnsureRunning);
    let started = admin.does("/admin/desktops/1/start", "").await;
    for path in [&*started, "/admin/desktops"] {
        let page = admin.get(path).await;
        assert!(page.body.contains("being started"), "{}", page.body);
        assert!(page.header("refresh").starts_with("2; url=/admin/desktops"), "{page:?}");
    }
    admin.is_refused("/admin/desktops/1/start", "", 503, "Desktop 1 is being started already").await;
    drop(held);
    let page = admin.says("/admin/desktops/1", "<dt>Processes</dt>").await;
    assert_eq!(page.header("refresh"), "");
}

#[tokio::test]
async fn a_port_is_shown_with_what_it_dropped_and_explains_frames() {
    let site = Site::new().await;
    let admin = Admin::of(&site).await;
    let port = json!({
        "link": "qvd1a2b-1", "mac": "52:c0:0a:5f:00:07", "ipv4": "10.95.0.7", "ipv6": "fd00::7",
        "policy": NetPolicy::host_only(),
        "counters": {
            "sent_packets": 11, "sent_bytes": 1234, "received_packets": 22, "received_bytes": 5678, "received_dropped": 3,
        },
        "drops": { "source_mac": 41, "fragment": 1 },
        "explained": [
            { "passes": false, "rule": "the <source> MAC", "arrives": false, "beyond": "" },
            { "passes": true, "rule": "own MAC", "arrives": true, "beyond": "the host itself" },
        ],
    });
    site.host.add_port(site.desktop, serde_json::from_value(port).unwrap());
    admin.is_refused("/admin/desktops/1/explain", "frames=00", 409, "desktop 1 does not run").await;
    site.farm.start(site.desktop, tokio::sync::mpsc::channel(1).0).await.unwrap();
    let page = admin.get("/admin/desktops/1").await.body;
    for part in [
        "10.95.0.7, fd00::7",
        "1234 bytes in 11 packets",
        "5678 bytes in 22 packets",
        "42 frames of it",
        "<td>the source MAC is not the port&#39;s</td><td class=\"figure\">41</td>",
        "<td>fragments</td><td class=\"figure\">1</td>",
        "<dd>isolated</dd>",
    ] {
        assert!(page.contains(part), "{part} is not in {page}");
    }
    assert!(admin.get("/admin/desktops").await.body.contains("10.95.0.7, fd00::7"));
    let explained = admin.post("/admin/desktops/1/explain", "frames=52:c0%0D%0A00").await;
    assert_eq!(explained.status, 200);
    for part in ["dropped at the port: the &#60;source&#62; MAC", "passes the port: own MAC; arrives: the host itself"]
    {
        assert!(explained.body.contains(part), "{part} is not in {}", explained.body);
    }
    admin
        .is_refused("/admin/desktops/1/explain", "frames=%3Cb%3E", 422, "Frame 1: write it as digits of base 16")
        .await;
    admin.is_refused("/admin/desktops/1/explain", "frames=", 422, "Write a frame in base 16").await;
}

#[tokio::test]
async fn a_desktop_is_made_as_the_form_says() {
    let site = Site::new().await;
    let admin = Admin::of(&site).await;
    let page = admin.get("/admin/desktops/new?user=bob").await.body;
    assert!(page.contains("<option selected>bob</option>") && page.contains("<option>icewm</option>"), "{page}");
    let fields = "user=ada&flavour=icewm&name=work&tag=head&virtualizer=qemu&memory=512M&cpu=&pids=99&io=50M\
                  &root=persistent&network=isolated&devices=fuse+dri&calls=application&address=10.95.0.77";
    assert_eq!(admin.does("/admin/desktops", fields).await, "/admin/desktops/3");
    let made = site.farm.desktop("3".parse().unwrap()).await.unwrap();
    let defaults = site.farm.flavour(&made.flavour).await.unwrap().defaults;
    assert_eq!((made.user.as_str(), &*made.name, made.tag.as_str()), ("ada", "work", "head"));
    assert_eq!((made.limits.memory, made.limits.pids, made.limits.io), (Bytes::mib(512), 99, Some(Bytes::mib(50))));
    assert_eq!(made.limits.cpu, defaults.limits.cpu, "what is left empty is the flavour's");
    assert_eq!((made.root, made.net), (RootPolicy::Persistent, NetPolicy::host_only()));
    assert_eq!((made.devices.len(), made.calls.unwrap().as_str()), (2, "application"));
    let page = admin.get("/admin/desktops/3").await.body;
    for part in ["10.95.0.77", "512MiB", "QEMU", "persistent", "dri", "application", "isolated"] {
        assert!(page.contains(part), "{part} is not in {page}");
    }
    assert_eq!(admin.does("/admin/desktops", "user=bob&flavour=icewm").await, "/admin/desktops/4");
    let plain = site.farm.desktop("4".parse().unwrap()).await.unwrap();
    assert_eq!((plain.limits, plain.net), (defaults.limits, defaults.net));

    for (fields, status, words) in [
        ("user=ada&flavour=nothing", 404, "Unknown flavour `nothing`; there is `icewm`"),
        ("user=nobody&flavour=icewm", 404, "There is no user `nobody`"),
        ("user=ada&flavour=icewm&name=work", 409, "has a desktop `work` already: desktop 3"),
        ("user=ada&flavour=icewm&address=10.95.0.77", 409, "taken by desktop 3"),
        ("user=ada&flavour=icewm&address=here", 422, "Address: invalid IPv4"),
        ("user=ada&flavour=icewm&memory=lots", 422, "Memory: `lots` is not a size"),
        ("user=ada&flavour=icewm&memory=1M", 422, "is too little"),
        ("user=ada&flavour=icewm&devices=printer", 422, "Devices: a device is one of"),
        ("user=ada&flavour=icewm&tag=none", 404, "no tag `none`"),
        ("user=ada&flavour=icewm&network=all", 422, "Network: there is no `all`"),
    ] {
        admin.is_refused("/admin/desktops", fields, status, words).await;
    }
    let hostile = "user=ada&flavour=icewm&name=%22%3E%3Cscript%3Ealert(1)%3C/script%3E&memory=%22%3E%3Cb%3E";
    let page = admin.is_refused("/admin/desktops", hostile, 422, "Memory: ").await;
    assert!(page.contains("value=\"&#34;&#62;&#60;script&#62;alert(1)"), "what was typed stays: {page}");
    assert_eq!(site.farm.desktops(None).await.unwrap().len(), 4);
}

#[tokio::test]
async fn a_desktop_is_removed_after_it_was_said_what_is_lost() {
    let site = Site::new().await;
    let admin = Admin::of(&site).await;
    let fields = "user=ada&flavour=icewm&root=persistent&address=10.95.0.77";
    assert_eq!(admin.does("/admin/desktops", fields).await, "/admin/desktops/3");
    let id = "3".parse().unwrap();
    site.farm.start(id, tokio::sync::mpsc::channel(1).0).await.unwrap();
    let page = admin.get("/admin/desktops/3/remove").await.body;
    for part in ["The home of user ada", "Its root", "It runs", "10.95.0.77"] {
        assert!(page.contains(part), "{part} is not in {page}");
    }
    assert!(site.farm.desktop(id).await.is_ok(), "asking removes nothing");
    site.host.fail_next(Op::Remove, HostError::new(HostErrorKind::Busy, "the root is in use"));
    assert_eq!(admin.does("/admin/desktops/3/remove", "").await, "/admin/desktops");
    admin.says("/admin/desktops", "cannot remove desktop 3: the root is in use").await;
    admin.does("/admin/desktops/3/remove", "").await;
    admin.says("/admin/desktops", "<p class=\"quiet\">2 in all").await;
    assert_eq!(site.host.removed(), [id]);
    admin.is_refused("/admin/desktops/3/remove", "", 404, "There is no desktop 3").await;
}

#[tokio::test]
async fn users_come_change_and_go() {
    let site = Site::new().await;
    let admin = Admin::of(&site).await;
    let eve = "eve".parse().unwrap();
    let fields = "name=eve&tenant=lab&password=first+horse&again=first+horse";
    assert_eq!(admin.does("/admin/users", fields).await, "/admin/users/eve");
    let user = site.farm.user(&eve).await.unwrap();
    assert_eq!((user.admin, user.tenant.as_str()), (false, "lab"));
    assert!(site.farm.authenticate("eve", &Secret::from("first horse"), None).await.is_ok());

    let session = site.farm.create_session(&eve, SessionKind::Web).await.unwrap();
    let set = admin.does("/admin/users/eve/password", "password=second+horse&again=second+horse").await;
    assert!(admin.get(&set).await.body.contains("The password is set"));
    assert!(site.farm.authenticate("eve", &Secret::from("second horse"), None).await.is_ok());
    assert!(site.farm.find_session(&session.token, SessionKind::Web).await.is_err());

    admin.does("/admin/users/eve/administrator", "admin=yes").await;
    assert!(site.farm.user(&eve).await.unwrap().admin);
    assert_eq!(try_enter(&site, "eve", "second horse", "").await.status, 303);
    admin.does("/admin/users/eve/administrator", "admin=no").await;
    assert!(!site.farm.user(&eve).await.unwrap().admin);

    for (path, fields, status, words) in [
        ("/admin/users", "name=ada&password=some+horse&again=some+horse", 409, "There is a user `ada` already"),
        ("/admin/users", "name=max&password=short&again=short", 422, "at least 8 characters"),
        ("/admin/users", "name=max&password=some+horse&again=some+mule", 422, "Password: the two differ"),
        ("/admin/users", "name=max", 422, "Password: the two differ"),
        ("/admin/users", "name=max&tenant=%2F&password=some+horse&again=some+horse", 422, "Tenant: `/` is not"),
        ("/admin/users/eve/password", "password=short&again=short", 422, "at least 8 characters"),
        ("/admin/users/max/password", "password=some+horse&again=some+horse", 404, "There is no user `max`"),
        ("/admin/users/max/administrator", "admin=yes", 404, "There is no user `max`"),
        ("/admin/users/bob/administrator", "admin=no", 409, "that is you"),
        ("/admin/users/bob/remove", "desktops=remove", 409, "that is you"),
    ] {
        let page = admin.is_refused(path, fields, status, words).await;
        assert!(!page.contains("some horse") && !page.contains("short&"), "no password comes back: {page}");
    }
    let hostile = "name=%3Cscript%3Ealert(1)%3C/script%3E&password=some+horse&again=some+horse";
    let page = admin.is_refused("/admin/users", hostile, 422, "&#60;script&#62;").await;
    assert!(page.contains("value=\"&#60;script&#62;alert(1)"), "what was typed stays: {page}");
    let names: Vec<_> = site.farm.users().await.unwrap().into_iter().map(|user| user.name.to_string()).collect();
    assert_eq!(names, ["ada", "bob", "eve"]);
    assert!(site.farm.user(&"bob".parse().unwrap()).await.unwrap().admin);

    let page = admin.get("/admin/users/ada/remove").await.body;
    assert!(page.contains("Desktop 1 (icewm). The home of user ada") && page.contains("name=\"desktops\""), "{page}");
    admin.does("/admin/users/ada/remove", "").await;
    admin.says("/admin/users", "user `ada` owns a desktop").await;
    admin.does("/admin/users/ada/remove", "desktops=remove").await;
    while site.farm.user(&"ada".parse().unwrap()).await.is_ok() {
        tokio::task::yield_now().await;
    }
    let page = admin.get("/admin/users").await.body;
    assert!(!page.contains("/admin/users/ada\""), "{page}");
    assert_eq!(site.host.removed(), [site.desktop]);
    let page = admin.get("/admin/users/eve/remove").await.body;
    assert!(!page.contains("name=\"desktops\""), "desktops that come later stay: {page}");
}

#[tokio::test]
async fn sessions_are_seen_and_ended() {
    let site = Site::new().await;
    let admin = Admin::of(&site).await;
    let portal = cookie_header(&try_sign_in(&site, "ada", PASSWORD).await);
    site.ask(&qvd("create_auth_token")).await;
    let page = admin.get("/admin/sessions").await.body;
    for part in ["administration", "browser", "client or program", "this one"] {
        assert!(page.contains(part), "{part} is not in {page}");
    }
    let web = site.farm.sessions(None).await.unwrap().into_iter().find(|s| s.kind == SessionKind::Web).unwrap();
    assert_eq!(admin.does(&format!("/admin/sessions/{}/end", web.id), "").await, "/admin/sessions");
    assert_eq!(site.ask(&get("/desktops", &portal)).await.header("location"), "/sign-in");
    let again = format!("/admin/sessions/{}/end", web.id);
    admin.is_refused(&again, "", 404, &format!("There is no session {}", web.id)).await;
    admin.is_refused("/admin/sessions/x/end", "", 404, "There is no such session").await;
}

#[tokio::test]
async fn defaults_of_a_flavour_are_set_and_reset() {
    let site = Site::new().await;
    let admin = Admin::of(&site).await;
    let icewm = "icewm".parse().unwrap();
    let defaults = async || site.farm.flavour(&icewm).await.unwrap().defaults;
    let before = defaults().await;
    let page = admin.get("/admin/flavours/icewm").await.body;
    assert!(page.contains(&format!("name=\"memory\" type=\"text\" value=\"{}\"", before.limits.memory)), "{page}");
    let fields = "memory=768M&cpu=1500&pids=300&io=20M&root=persistent&network=none";
    assert_eq!(admin.does("/admin/flavours/icewm", fields).await, "/admin/flavours/icewm");
    let set = defaults().await;
    assert_eq!((set.limits.memory, set.limits.cpu.0, set.limits.pids), (Bytes::mib(768), 1500, 300));
    assert_eq!((set.limits.io, set.root, set.net), (Some(Bytes::mib(20)), RootPolicy::Persistent, NetPolicy::none()));
    let page = admin.get("/admin/flavours").await.body;
    assert!(page.contains("768MiB") && page.contains("persistent") && page.contains("20MiB/s"), "{page}");
    // What is left empty stays, but a limit of the disks is taken away.
    admin.does("/admin/flavours/icewm", "memory=&cpu=1000&io=&root=&network=").await;
    let set = defaults().await;
    assert_eq!((set.limits.memory, set.limits.cpu.0, set.limits.io), (Bytes::mib(768), 1000, None));
    assert_eq!((set.root, set.net), (RootPolicy::Persistent, NetPolicy::none()));
    for (path, fields, status, words) in [
        ("/admin/flavours/icewm", "memory=1M", 422, "is too little"),
        ("/admin/flavours/icewm", "cpu=%3Cb%3E", 422, "Processor: `&#60;b&#62;` is no whole number"),
        ("/admin/flavours/nothing", "memory=1G", 404, "Unknown flavour `nothing`"),
        ("/admin/flavours/nothing/reset", "", 404, "Unknown flavour `nothing`"),
    ] {
        admin.is_refused(path, fields, status, words).await;
    }
    assert_eq!(admin.does("/admin/flavours/icewm/reset", "").await, "/admin/flavours/icewm");
    assert_eq!(defaults().await, before);
}

#[tokio::test]
async fn images_are_shown_with_their_versions_and_tags() {
    let site = Site::new().await;
    let admin = Admin::of(&site).await;
    let page = admin.get("/admin/images").await.body;
    assert!(page.contains("href=\"/admin/images/icewm\""), "{page}");
    let none = admin.get("/admin/images/icewm").await;
    assert!(none.body.contains("the images of this host are not on this machine"), "{none:?}");

    let repository = Arc::new(Repository::open(&site.dir.path().join("images")).unwrap());
    let tree = site.dir.path().join("tree");
    std::fs::create_dir(&tree).unwrap();
    for message in ["first", "<script>second</script>"] {
        std::fs::write(tree.join("motd"), message).unwrap();
        let import = Import {
            source: tree.clone(),
            flavour: "icewm".parse().unwrap(),
            message: message.to_owned(),
            author: "ada <ada@example>".to_owned(),
            recipe: None,
            disk: false,
            max_bytes: 1 << 20,
            publish: false,
        };
        import.carry_out(&repository, &mut |_| {}).unwrap();
    }
    site.host.keep_images_in(repository);
    let page = admin.get("/admin/images/icewm").await;
    assert_eq!(page.status, 200);
    for part in ["<td>first</td>", "&#60;script&#62;second", "ada &#60;ada@example&#62;", "head", "default", "2 in all"]
    {
        assert!(page.body.contains(part), "{part} is not in {}", page.body);
    }
    forbids_inline_code("/admin/images/icewm", &page);
    let unknown = admin.get("/admin/images/nothing").await;
    assert!(unknown.status == 404 && unknown.body.contains("nothing"), "{unknown:?}");
    site.host.fail_next(Op::Images, HostError::new(HostErrorKind::Failed, "the disk is gone"));
    assert!(admin.get("/admin/images").await.body.contains("Cannot list the images: the disk is gone"));
}

#[tokio::test]
async fn the_log_says_who_did_what_and_no_secret() {
    let log = Log::default();
    let subscriber = tracing_subscriber::fmt().with_env_filter("debug").with_ansi(false).with_writer(log.clone());
    let _guard = tracing::subscriber::set_default(subscriber.finish());
    let site = Site::new().await;
    let admin = Admin::of(&site).await;
    admin.does("/admin/users/ada/password", "password=another+horse&again=another+horse").await;
    admin.does("/admin/desktops/1/start", "").await;
    admin.says("/admin/desktops/1", "<dt>Processes</dt>").await;
    admin.is_refused("/admin/desktops", "user=ada&flavour=icewm&name=icewm", 409, "already").await;
    try_enter(&site, "ada", "another horse", "").await;
    let token = admin.cookie.trim().split_once('=').unwrap().1.to_owned();
    let text = log.text();
    let lines: Vec<_> = text.lines().filter(|line| line.contains("administration ")).collect();
    let all = lines.join("\n");
    for (action, object, result) in [
        ("set the password of", "user ada", "\"done\""),
        ("start", "desktop 1", "\"done\""),
        ("create", "a desktop of user ada with flavour icewm", "has a desktop `icewm` already"),
    ] {
        let is_it = |line: &&&str| line.contains(&format!("action=\"{action}\""));
        let line = lines.iter().find(is_it).unwrap_or_else(|| panic!("{action} is not in {all}"));
        for part in ["administrator=bob", object, result] {
            assert!(line.contains(part), "{part} is not in {line}");
        }
    }
    assert!(text.contains("administration refused"), "{text}");
    for secret in [PASSWORD, "another horse", "another+horse", &token, &admin.csrf] {
        assert!(!text.contains(secret), "`{secret}` is in the log");
    }
}
