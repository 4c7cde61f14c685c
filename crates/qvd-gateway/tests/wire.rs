//! The QVD wire protocol as its clients speak it, over real TLS connections.
#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use std::time::Duration;

use base64::{Engine as _, prelude::BASE64_STANDARD};
use qvd_core::DesktopState;
use qvd_farm::Progress;
use qvd_gateway::ConnectionLimits;
use qvd_node::{
    HostError, HostErrorKind,
    fake::{GREETING, Op},
};
use support::{Answer, PASSWORD, Site, Wire, basic, qvd, qvd_upgrade};

/// Connects to the display; gives back what was said before the 101.
async fn open_display(wire: &mut Wire, target: &str) -> (Vec<Answer>, Answer) {
    wire.send(qvd_upgrade(target).as_bytes()).await;
    let mut news = Vec::new();
    loop {
        let answer = wire.answer().await;
        if answer.status != 102 {
            return (news, answer);
        }
        news.push(answer);
    }
}

#[tokio::test]
async fn a_client_lists_and_connects_on_one_connection() {
    let site = Site::new().await;
    let mut wire = site.connect().await;
    wire.send(qvd("list_of_vm?file_name=x").as_bytes()).await;
    let list = wire.answer().await;
    assert_eq!(list.status, 200, "{list:?}");
    let row = &list.json()[0];
    assert_eq!(row["id"], site.desktop.number());
    assert_eq!((&row["state"], &row["blocked"], &row["is_application"]), (&"stopped".into(), &0.into(), &0.into()));
    assert_eq!(list.json().as_array().unwrap().len(), 1, "bob's desktop is not ada's");

    let target = format!("connect_to_vm?id={}&qvd.client.geometry=1024x768&qvd.client.link=lan", site.desktop);
    let (news, answer) = open_display(&mut wire, &target).await;
    assert_eq!(answer.status, 101, "{answer:?}");
    let steps: Vec<_> = news.iter().map(|answer| answer.header("x-qvd-vm-info")).collect();
    assert!(steps.contains(&"Preparing the file system") && steps.contains(&"Starting the session"), "{steps:?}");
    let key = answer.header("x-qvd-slave-key");
    assert!(key.len() == 64 && key.bytes().all(|b| b.is_ascii_alphanumeric()), "{key}");

    assert_eq!(wire.bytes(GREETING.len()).await, GREETING);
    let noise: Vec<u8> = (0..200_000_u32).map(|n| n.to_le_bytes()[0] ^ n.to_le_bytes()[1]).collect();
    wire.send(&noise).await;
    assert_eq!(wire.bytes(noise.len()).await, noise, "raw bytes come back as they went");
}

#[tokio::test]
async fn bytes_sent_behind_the_request_reach_the_display() {
    let site = Site::new().await;
    let mut wire = site.connect().await;
    let target = format!("connect_to_vm?id={}", site.desktop);
    wire.send(format!("{}NXPROXY-3.5", qvd_upgrade(&target)).as_bytes()).await;
    while wire.answer().await.status == 102 {}
    assert_eq!(wire.bytes(GREETING.len() + 11).await, [GREETING, b"NXPROXY-3.5"].concat());
}

#[tokio::test]
async fn each_failure_has_its_code() {
    let site = Site::new().await;
    let id = site.desktop;
    let other = id.number() + 1;
    let cases = [
        (qvd("connect_to_vm?id=1").replace("Authorization", "X-Nothing"), 401, "no_credentials"),
        (qvd("list_of_vm").replace(&basic("ada", PASSWORD), &basic("ada", "wrong horse")), 401, "wrong_credentials"),
        (
            qvd("list_of_vm").replace(&basic("ada", PASSWORD), &basic("ada@elsewhere", PASSWORD)),
            401,
            "wrong_credentials",
        ),
        (qvd("list_of_vm").replace("Basic ", "Bearer "), 401, "bad_credentials"),
        (qvd(&format!("connect_to_vm?id={id}")), 426, "no_upgrade"),
        (qvd_upgrade("connect_to_vm"), 422, "bad_id"),
        (qvd_upgrade("connect_to_vm?id=x&evil=1"), 422, "bad_id"),
        (qvd_upgrade(&format!("connect_to_vm?id={id}&evil=1")), 403, "forbidden_parameter"),
        (qvd_upgrade("connect_to_vm?id=4711"), 404, "unknown_desktop"),
        (qvd_upgrade(&format!("connect_to_vm?id={other}")), 403, "not_yours"),
        (qvd_upgrade(&format!("connect_to_vm?id={id}&qvd.client.link=warp")), 422, "bad_parameter"),
        (qvd("stop_vm"), 422, "bad_id"),
        (qvd("stop_vm?id=4711"), 404, "unknown_desktop"),
        (qvd(&format!("stop_vm?id={other}")), 403, "not_yours"),
        (qvd("no_such_thing"), 404, "unknown_request"),
        (qvd("ping").replace("GET", "POST"), 405, "method"),
        (qvd("ping").replace("HTTP/1.1", "HTTP/1.0"), 505, "http_version"),
        (qvd("ping").replace("HTTP/1.1", "HTTP/2.0"), 505, "http_version"),
        (qvd("ping").replace("Host", "Content-Length: 5\r\nHost"), 400, "body"),
        (qvd("ping?a=%zz"), 400, "bad_query"),
        (qvd("ping").replace("Host: ", &format!("Host: {}", "a".repeat(20_000))), 431, "head_too_large"),
        ("\x16\x03\x01 not http\r\n\r\n".to_owned(), 400, "bad_request"),
    ];
    for (head, status, code) in cases {
        let answer = site.ask(&head).await;
        assert_eq!((answer.status, answer.header("x-qvd-error")), (status, code), "{head}\n{answer:?}");
        let reference = answer.header("x-request-id");
        assert!(answer.body.contains(code) && answer.body.contains(reference) && reference.len() == 16, "{answer:?}");
    }
    assert!(site.ask(&qvd("list_of_vm").replace("Auth", "X-Auth")).await.header("www-authenticate").contains("QVD"));
    site.farm.set_blocked(id, true).await.unwrap();
    let answer = site.ask(&qvd_upgrade(&format!("connect_to_vm?id={id}"))).await;
    assert_eq!((answer.status, answer.header("x-qvd-error")), (403, "desktop_blocked"));
}

#[tokio::test]
async fn a_desktop_that_does_not_start_is_explained_without_its_causes() {
    let site = Site::new().await;
    let error =
        HostError::because(HostErrorKind::Failed, "cannot mount the root", std::io::Error::other("/secret/path"));
    site.host.fail_next(Op::EnsureRunning, error);
    let (_, answer) = open_display(&mut site.connect().await, &format!("connect_to_vm?id={}", site.desktop)).await;
    assert_eq!(answer.status, 503);
    assert!(answer.body.contains("cannot start desktop") && !answer.body.contains("/secret"), "{answer:?}");
}

#[tokio::test]
async fn a_second_client_takes_over_and_the_first_is_disconnected() {
    let site = Site::new().await;
    let target = format!("connect_to_vm?id={}", site.desktop);
    let (mut first, mut second) = (site.connect().await, site.connect().await);
    assert_eq!(open_display(&mut first, &target).await.1.status, 101);
    assert_eq!(first.bytes(GREETING.len()).await, GREETING);
    assert_eq!(open_display(&mut second, &target).await.1.status, 101);
    assert_eq!(first.rest().await, b"", "the first connection ends");
    second.send(b"mine").await;
    assert_eq!(second.bytes(GREETING.len() + 4).await, [GREETING, b"mine"].concat());
}

#[tokio::test]
async fn stopping_says_so_and_stops() {
    let site = Site::new().await;
    let (progress, _unheard) = tokio::sync::mpsc::channel::<Progress>(1);
    site.farm.start(site.desktop, progress).await.unwrap();
    let mut wire = site.connect().await;
    let stop = qvd(&format!("stop_vm?id={}", site.desktop));
    wire.send(stop.as_bytes()).await;
    assert_eq!(wire.answer().await.status, 102);
    assert_eq!(wire.answer().await.status, 200);
    assert_eq!(site.farm.desktop_info(site.desktop).await.unwrap().status.state, DesktopState::Stopped);
    site.host.fail_next(Op::Stop, HostError::new(HostErrorKind::Timeout, "it does not end"));
    wire.send(stop.as_bytes()).await;
    assert_eq!(wire.answer().await.status, 102);
    assert_eq!(wire.answer().await.status, 408);
}

#[tokio::test]
async fn a_token_signs_in_until_it_is_ended() {
    let site = Site::new().await;
    let token = site.ask(&qvd("create_auth_token")).await.json()["auth_token"].as_str().unwrap().to_owned();
    let stored = site.ask(&qvd("authenticate_user?store_auth=1")).await.json();
    assert_eq!(stored["user"], "ada");
    for sent in [&token, &BASE64_STANDARD.encode(&token), stored["auth_token"].as_str().unwrap()] {
        let head = format!("GET /qvd/list_of_vm HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {sent}\r\n\r\n");
        assert_eq!(site.ask(&head).await.status, 200, "{sent}");
    }
    for session in site.farm.sessions(None).await.unwrap() {
        site.farm.end_session_by_id(session.id).await.unwrap();
    }
    let head = format!("GET /qvd/list_of_vm HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n\r\n");
    assert_eq!(site.ask(&head).await.status, 401);
}

#[tokio::test]
async fn who_guesses_is_told_to_wait() {
    let site = Site::new().await;
    let guess = qvd("authenticate_user").replace(&basic("ada", PASSWORD), &basic("ada", "wrong horse"));
    let mut wire = site.connect().await;
    for _ in 0..5 {
        wire.send(guess.as_bytes()).await;
        assert_eq!(wire.answer().await.status, 401);
    }
    wire.send(guess.as_bytes()).await;
    let answer = wire.answer().await;
    assert_eq!((answer.status, answer.header("x-qvd-error")), (429, "too_many_attempts"));
    assert!(answer.header("retry-after").parse::<u64>().unwrap() > 0);
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_order() {
    let site = Site::new().await;
    let mut wire = site.connect().await;
    wire.send([qvd("ping"), qvd("list_of_applications"), qvd("nothing"), qvd("ping")].concat().as_bytes()).await;
    for status in [200, 200, 404, 200] {
        assert_eq!(wire.answer().await.status, status);
    }
    assert!(site.ask(&qvd("ping")).await.body.contains("alive"));
}

#[tokio::test]
async fn a_request_cut_anywhere_harms_nobody() {
    let site = Site::new().await;
    let whole = qvd_upgrade(&format!("connect_to_vm?id={}", site.desktop));
    for cut in 0..whole.len() {
        let mut wire = site.connect().await;
        wire.send(&whole.as_bytes()[..cut]).await;
        tokio::io::AsyncWriteExt::shutdown(&mut wire.stream).await.unwrap();
        assert_eq!(wire.rest().await, b"", "cut at {cut}: nothing was asked");
    }
    let state = site.farm.desktop_info(site.desktop).await.unwrap().status.state;
    assert_eq!(state, DesktopState::Stopped, "half a request starts nothing");
    assert_eq!(site.ask(&qvd("ping")).await.status, 200);
}

#[tokio::test]
async fn a_head_that_never_ends_is_cut_off() {
    let limits = ConnectionLimits { head: Duration::from_millis(200), ..ConnectionLimits::default() };
    let site = Site::with(limits, Vec::new()).await;
    let answer = site.ask("GET /qvd/ping HTTP/1.1\r\nSlow: ").await;
    assert_eq!((answer.status, answer.header("x-qvd-error")), (408, "head_timeout"));
    let mut silent = site.connect().await;
    assert_eq!(silent.rest().await, b"", "who says nothing hears nothing");
}

#[tokio::test]
async fn one_address_has_only_so_many_connections() {
    let limits = ConnectionLimits { connections_per_address: 2, ..ConnectionLimits::default() };
    let site = Site::with(limits, Vec::new()).await;
    let (mut first, _second) = (site.connect().await, site.connect().await);
    assert!(site.try_connect().await.is_err(), "the third is refused");
    first.send(qvd("ping").replace("Host", "Connection: close\r\nHost").as_bytes()).await;
    assert_eq!(first.answer().await.status, 200);
    assert_eq!(first.rest().await, b"");
}

#[tokio::test]
async fn a_stop_of_the_gateway_ends_connections_and_not_desktops() {
    let mut site = Site::new().await;
    let mut wire = site.connect().await;
    assert_eq!(open_display(&mut wire, &format!("connect_to_vm?id={}", site.desktop)).await.1.status, 101);
    assert_eq!(wire.bytes(GREETING.len()).await, GREETING);
    let mut idle = site.connect().await;
    idle.send(qvd("ping").as_bytes()).await;
    assert_eq!(idle.answer().await.status, 200);
    site.tell_to_stop();
    assert_eq!(idle.rest().await, b"");
    assert_eq!(wire.rest().await, b"");
    let (farm, desktop) = (site.farm.clone(), site.desktop);
    site.stopped().await;
    assert_eq!(farm.desktop_info(desktop).await.unwrap().status.state, DesktopState::Running);
}
