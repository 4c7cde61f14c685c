//! The portal and the display as a browser meets them.
#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use std::time::Duration;

use futures_util::{SinkExt as _, StreamExt as _};
use qvd_core::DesktopState;
use qvd_gateway::{ConnectionLimits, Gateway, GatewayConfig, GatewayError, TlsSource};
use qvd_node::fake::GREETING;
use support::{
    PASSWORD, PATIENCE, Site, basic, cookie_header, forbids_inline_code, get, post, qvd, token, try_sign_in,
};
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::{
    WebSocketStream, client_async,
    tungstenite::{self, Message, client::IntoClientRequest as _},
};

/// Signs ada in: the `Cookie` header, and the token that forms carry.
async fn sign_in(site: &Site) -> (String, String) {
    let answer = try_sign_in(site, "ada", PASSWORD).await;
    assert_eq!((answer.status, answer.header("location")), (303, "/desktops"), "{answer:?}");
    let cookie = cookie_header(&answer);
    let page = site.ask(&get("/desktops", &cookie)).await;
    assert_eq!(page.status, 200);
    (cookie, token(&page.body).to_owned())
}

#[tokio::test]
async fn a_session_s_cookie_is_for_this_host_and_not_for_scripts() {
    let site = Site::new().await;
    let answer = try_sign_in(&site, "ada", PASSWORD).await;
    let cookies = answer.cookies();
    let session = cookies.iter().find(|c| c.starts_with("__Host-qvd-session=")).unwrap();
    for flag in ["; Path=/", "; Secure", "; HttpOnly", "; SameSite=Lax"] {
        assert!(session.contains(flag), "{flag} is not in {session}");
    }
    assert!(!session.contains("Domain"), "{session}");
    assert_eq!(try_sign_in(&site, "ada@default", PASSWORD).await.status, 303);
}

#[tokio::test]
async fn a_wrong_password_is_told_in_words_and_guessing_is_slowed() {
    let site = Site::new().await;
    for user in ["ada", "nobody"] {
        let answer = try_sign_in(&site, user, "wrong horse").await;
        assert_eq!(answer.status, 401);
        assert!(
            answer.body.contains("user name or the password is wrong") && answer.cookies().len() == 1,
            "{answer:?}"
        );
    }
    for _ in 0..4 {
        try_sign_in(&site, "ada", "wrong horse").await;
    }
    let answer = try_sign_in(&site, "ada", PASSWORD).await;
    assert_eq!(answer.status, 429);
    assert!(answer.body.contains("Try again in") && !answer.header("retry-after").is_empty(), "{answer:?}");
}

#[tokio::test]
async fn every_page_forbids_inline_code_and_has_none() {
    let site = Site::new().await;
    let (cookie, _) = sign_in(&site).await;
    let desktop = format!("/desktops/{}", site.desktop);
    for path in ["/sign-in?bye=1", "/desktops", &desktop, "/licences", "/desktops/4711", "/nothing"] {
        let cookies = if path.starts_with("/sign-in") { "" } else { &cookie };
        let page = site.ask(&get(path, cookies)).await;
        forbids_inline_code(path, &page);
        for asset in page.body.split('"').filter(|part| part.starts_with("/assets/")) {
            let file = site.ask(&get(asset, "")).await;
            assert_eq!(file.status, 200, "{path} wants {asset}");
            assert!(file.header("cache-control").contains("immutable"), "{asset}");
        }
    }
}

#[tokio::test]
async fn what_another_site_sends_changes_nothing() {
    let site = Site::new().await;
    let (cookie, csrf) = sign_in(&site).await;
    let json = format!("{cookie}Accept: application/json\r\n");
    let foreign = |request: String| request.replace("Origin: https://localhost", "Origin: https://evil.example");
    for path in ["stop", "open"].map(|action| format!("/desktops/{}/{action}", site.desktop)) {
        let form = format!("csrf={csrf}");
        let token = format!("{json}X-CSRF-Token: {csrf}\r\n");
        assert_eq!(site.ask(&post(&path, &json, "")).await.status, 403, "{path} without a token");
        assert_eq!(site.ask(&post(&path, &json, &format!("csrf={}", "0".repeat(64)))).await.status, 403, "{path}");
        assert_eq!(site.ask(&foreign(post(&path, &token, &form))).await.status, 403, "{path} from elsewhere");
        assert!(site.ask(&post(&path, &token, &form)).await.status < 300, "{path} from our page");
    }
    assert_eq!(site.ask(&post("/sign-out", &cookie, "csrf=")).await.status, 403);
    // Signing somebody in as somebody else is an attack as well.
    let page = site.ask(&get("/sign-in", "")).await;
    let form = format!("user=ada&password=correct+horse&csrf={}", token(&page.body));
    assert_eq!(site.ask(&post("/sign-in", "", &form)).await.status, 403, "without its cookie");
    assert_eq!(site.ask(&foreign(post("/sign-in", &cookie_header(&page), &form))).await.status, 403);
}

#[tokio::test]
async fn a_session_ends_when_its_user_signs_out() {
    let site = Site::new().await;
    let (cookie, csrf) = sign_in(&site).await;
    let answer = site.ask(&post("/sign-out", &cookie, &format!("csrf={csrf}"))).await;
    assert_eq!((answer.status, answer.header("location")), (303, "/sign-in?bye=1"));
    assert!(answer.cookies()[0].contains("Max-Age=0"));
    let answer = site.ask(&get("/desktops", &cookie)).await;
    assert_eq!((answer.status, answer.header("location")), (303, "/sign-in"));
    let deep = site.ask(&get(&format!("/desktops/{}", site.desktop), "")).await;
    assert_eq!(deep.header("location"), format!("/sign-in?next=/desktops/{}", site.desktop));
    let script = site.ask(&get("/desktops/state", "Accept: application/json\r\n")).await;
    assert_eq!(script.status, 401);
}

#[tokio::test]
async fn opening_tells_the_steps_and_the_list_follows() {
    let site = Site::new().await;
    let (cookie, csrf) = sign_in(&site).await;
    let headers = format!("{cookie}Accept: application/json\r\nX-CSRF-Token: {csrf}\r\n");
    let state = async || site.ask(&get("/desktops/state", &cookie)).await.json();
    assert_eq!(state().await[0]["state"], "stopped");
    let answer = site.ask(&post(&format!("/desktops/{}/open", site.desktop), &headers, "")).await;
    for part in [r#""step":"root""#, r#""step":"session""#, "Starting the session", r#"{"ready":true}"#] {
        assert!(answer.body.contains(part), "{part} is not in {}", answer.body);
    }
    assert_eq!(state().await[0]["state"], "running");
    let not_mine = site.ask(&post(&format!("/desktops/{}/open", site.desktop.number() + 1), &headers, "")).await;
    assert_eq!((not_mine.status, &not_mine.json()["error"]["code"]), (403, &"not_yours".into()));
    let stop = site.ask(&post(&format!("/desktops/{}/stop", site.desktop), &cookie, &format!("csrf={csrf}"))).await;
    assert_eq!((stop.status, stop.header("location")), (303, "/desktops"), "works without scripts");
    assert_eq!(state().await[0]["state"], "stopped");
}

type Socket = WebSocketStream<TlsStream<TcpStream>>;

async fn display(site: &Site, cookie: &str, origin: &str) -> Result<Socket, tungstenite::Error> {
    let url = format!("wss://localhost/desktops/{}/display?width=1024&height=700", site.desktop);
    let mut request = url.into_client_request().unwrap();
    let headers = request.headers_mut();
    if let Some(cookie) = cookie.strip_prefix("Cookie: ") {
        headers.insert("cookie", cookie.trim().parse().unwrap());
    }
    headers.insert("origin", origin.parse().unwrap());
    headers.insert("sec-websocket-protocol", "binary".parse().unwrap());
    let stream = site.connect().await.stream;
    client_async(request, stream).await.map(|(socket, answer)| {
        assert_eq!(answer.headers()["sec-websocket-protocol"], "binary");
        socket
    })
}

async fn next(socket: &mut Socket) -> Message {
    loop {
        match timeout(PATIENCE, socket.next()).await.unwrap().unwrap().unwrap() {
            Message::Ping(_) | Message::Pong(_) => {}
            message => return message,
        }
    }
}

async fn close_code(socket: &mut Socket) -> (u16, String) {
    match next(socket).await {
        Message::Close(Some(frame)) => (frame.code.into(), frame.reason.to_string()),
        other => panic!("{other:?} instead of a close"),
    }
}

#[tokio::test]
async fn a_display_carries_rfb_and_says_why_it_ends() {
    let mut site = Site::new().await;
    let (cookie, _) = sign_in(&site).await;
    let mut first = display(&site, &cookie, "https://localhost").await.unwrap();
    assert_eq!(next(&mut first).await, Message::Binary(GREETING.into()));
    let noise: Vec<u8> = (0..300_000_u32).map(|n| n.to_le_bytes()[1]).collect();
    first.send(Message::Binary(noise.clone().into())).await.unwrap();
    let mut back = Vec::new();
    while back.len() < noise.len() {
        match next(&mut first).await {
            Message::Binary(bytes) => back.extend_from_slice(&bytes),
            other => panic!("{other:?} instead of bytes"),
        }
    }
    assert_eq!(back, noise);

    let mut second = display(&site, &cookie, "https://localhost").await.unwrap();
    assert_eq!(next(&mut second).await, Message::Binary(GREETING.into()));
    let (code, reason) = close_code(&mut first).await;
    assert_eq!(code, 4001);
    assert!(reason.contains("another screen"), "{reason}");

    site.farm.stop(site.desktop).await.unwrap();
    assert_eq!(close_code(&mut second).await.0, 4002);

    let mut third = display(&site, &cookie, "https://localhost").await.unwrap();
    assert_eq!(next(&mut third).await, Message::Binary(GREETING.into()));
    site.tell_to_stop();
    assert_eq!(close_code(&mut third).await.0, 1001);
    let (farm, desktop) = (site.farm.clone(), site.desktop);
    site.stopped().await;
    assert_eq!(farm.desktop_info(desktop).await.unwrap().status.state, DesktopState::Running);
}

#[tokio::test]
async fn signing_out_closes_the_display() {
    let limits = ConnectionLimits { ping: Duration::from_millis(50), ..ConnectionLimits::default() };
    let site = Site::with(limits, Vec::new()).await;
    let (cookie, csrf) = sign_in(&site).await;
    let mut socket = display(&site, &cookie, "https://localhost").await.unwrap();
    assert_eq!(next(&mut socket).await, Message::Binary(GREETING.into()));
    assert_eq!(site.ask(&post("/sign-out", &cookie, &format!("csrf={csrf}"))).await.status, 303);
    assert_eq!(close_code(&mut socket).await.0, 4003);
}

#[tokio::test]
async fn a_display_is_for_our_own_page_of_a_signed_in_user() {
    let site = Site::new().await;
    let (cookie, _) = sign_in(&site).await;
    for (cookie, origin, status) in [
        (&*cookie, "https://evil.example", 403),
        (&cookie, "http://localhost", 403),
        (&cookie, "null", 403),
        ("", "https://localhost", 401),
    ] {
        match display(&site, cookie, origin).await {
            Err(tungstenite::Error::Http(answer)) => assert_eq!(answer.status().as_u16(), status, "{origin}"),
            other => panic!("{origin}: {other:?}"),
        }
    }
    let state = site.farm.desktop_info(site.desktop).await.unwrap().status.state;
    assert_eq!(state, DesktopState::Stopped, "nothing was started");
}

#[tokio::test]
async fn only_configured_names_are_answered_to() {
    let site = Site::with(ConnectionLimits::default(), vec!["qvd.example".to_owned()]).await;
    assert_eq!(site.ask(&get("/sign-in", "")).await.status, 421);
    let ours = get("/sign-in", "").replace("Host: localhost", "Host: QVD.example:8443");
    assert_eq!(site.ask(&ours).await.status, 200);
    for bad in ["Host: a b", "Host: qvd.example\r\nHost: evil.example", "X-Host: none"] {
        let status = site.ask(&get("/sign-in", "").replace("Host: localhost", bad)).await.status;
        assert!(matches!(status, 400 | 421), "{bad}: {status}");
    }
}

#[tokio::test]
async fn the_api_knows_its_caller_by_cookie_or_token() {
    let site = Site::new().await;
    let (cookie, csrf) = sign_in(&site).await;
    let ask = async |headers: &str| site.ask(&get("/api/v1/whoami", headers)).await;
    assert_eq!(ask("").await.status, 401);
    assert_eq!(ask("Authorization: Bearer nonsense\r\n").await.status, 401);
    assert!(ask(&cookie).await.body.contains("ada"));
    let token = site.ask(&qvd("create_auth_token")).await.json()["auth_token"].as_str().unwrap().to_owned();
    assert_eq!(ask(&format!("Authorization: Bearer {token}\r\n")).await.status, 200);
    let stop = |origin: &str, headers: &str| {
        let request = post(&format!("/api/v1/desktops/{}/stop", site.desktop), headers, "");
        request.replace("Origin: https://localhost\r\n", origin)
    };
    assert_eq!(site.ask(&stop("Origin: https://evil.example\r\n", &cookie)).await.status, 403);
    assert_eq!(site.ask(&stop("", &cookie)).await.status, 403, "neither origin nor token");
    assert_eq!(site.ask(&stop("", &format!("{cookie}X-CSRF-Token: {csrf}\r\n"))).await.status, 204);
    assert_eq!(site.ask(&stop("Origin: https://localhost\r\n", &cookie)).await.status, 204);
}

#[tokio::test]
async fn a_cookie_administers_nothing() {
    let site = Site::new().await;
    let ask = |headers: &str, path: &str| get(&format!("/api/v1/{path}"), headers);
    let cookie = cookie_header(&try_sign_in(&site, "bob", PASSWORD).await);
    let own = site.ask(&ask(&cookie, "desktops")).await;
    assert_eq!((own.status, own.json().as_array().unwrap().len()), (200, 1), "bob's own and no more");
    assert_eq!(site.ask(&ask(&cookie, "users")).await.status, 403);
    assert_eq!(site.ask(&ask(&basic("bob", PASSWORD), "users")).await.status, 200);
}

#[tokio::test]
async fn nobody_runs_a_program_in_anothers_desktop_or_makes_an_image_of_it() {
    let site = Site::new().await;
    let (own, bobs) = (site.desktop.number(), site.desktop.number() + 1);
    let exec = |root: bool| format!(r#"{{"argv":["id"],"env":{{}},"root":{root},"tty":null}}"#);
    let commit = r#"{"author":"ada","message":"mine now","publish":true}"#;
    for (desktop, what, body, status, code) in [
        (bobs, "exec", exec(false), 403, "not_yours"),
        (bobs, "exec", exec(true), 403, "not_yours"),
        (bobs, "commit", commit.to_owned(), 403, "forbidden"),
        (own, "exec", exec(true), 403, "forbidden"),
        (own, "commit", commit.to_owned(), 403, "forbidden"),
        // What is hers she may, as far as it goes.
        (own, "exec", exec(false), 409, "not_running"),
        (bobs + 1, "exec", exec(false), 404, "unknown_desktop"),
    ] {
        let (login, length) = (basic("ada", PASSWORD), body.len());
        let request = format!(
            "POST /api/v1/desktops/{desktop}/{what} HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\n\
             Upgrade: qvd-exec/1\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n{login}\r\n{body}"
        );
        let answer = site.ask(&request).await;
        let found = (answer.status, answer.json()["error"]["code"].as_str().unwrap_or_default().to_owned());
        assert_eq!(found, (status, code.to_owned()), "{what} in {desktop}: {answer:?}");
    }
}

#[tokio::test]
async fn a_port_in_use_is_named() {
    let site = Site::new().await;
    let dir = tempfile::tempdir().unwrap();
    let config = GatewayConfig {
        listen: site.address,
        tls: TlsSource::SelfSigned { directory: dir.path().to_owned() },
        hosts: Vec::new(),
        limits: ConnectionLimits::default(),
    };
    let error = Gateway::bind(config, site.farm.clone()).await.unwrap_err();
    assert!(matches!(error, GatewayError::PortInUse { .. }), "{error}");
    assert!(error.to_string().contains(&site.address.to_string()));
}
