//! Passwords and tokens pass through every layer and stay out of the log.
#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use support::{Log, PASSWORD, Site, basic, qvd, qvd_upgrade};

#[tokio::test]
async fn the_log_has_neither_passwords_nor_tokens() {
    let log = Log::default();
    tracing_subscriber::fmt().with_env_filter("debug,qvd_gateway=trace,qvd_farm=trace").with_writer(log.clone()).init();
    let site = Site::new().await;
    let token = site.ask(&qvd("create_auth_token")).await.json()["auth_token"].as_str().unwrap().to_owned();
    let bearer = |head: String| head.replace(&basic("ada", PASSWORD), &format!("Authorization: Bearer {token}\r\n"));
    assert_eq!(site.ask(&bearer(qvd("list_of_vm"))).await.status, 200);
    assert_eq!(
        site.ask(&qvd("list_of_vm").replace(&basic("ada", PASSWORD), &basic("ada", "wrong horse"))).await.status,
        401
    );
    let extra = qvd_upgrade("connect_to_vm?id=1").replace("Connection", "Auth-6f7470: c2VjcmV0LW90cA==\r\nConnection");
    let mut wire = site.connect().await;
    wire.send(extra.as_bytes()).await;
    let key = loop {
        let answer = wire.answer().await;
        if answer.status == 101 {
            break answer.header("x-qvd-slave-key").to_owned();
        }
        assert_eq!(answer.status, 102, "{answer:?}");
    };
    let api =
        format!("GET /api/v1/whoami HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {token}\r\n\r\n");
    assert_eq!(site.ask(&api).await.status, 200);
    site.stopped().await;
    let text = log.text();
    assert!(text.contains("/qvd/list_of_vm") && text.contains("sign-in failed"), "the log works: {text}");
    let encoded = basic("ada", PASSWORD);
    let encoded = encoded.trim().rsplit(' ').next().unwrap();
    for secret in [PASSWORD, "wrong horse", encoded, &token, &key, "c2VjcmV0LW90cA", "secret-otp"] {
        assert!(!text.contains(secret), "`{secret}` is in the log");
    }
}
