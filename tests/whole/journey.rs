//! A person's way through the product.

use std::time::{Duration, Instant};

use qvd_demo::{Server, rfb::Rfb};
use tokio::{io::DuplexStream, time::timeout};

use crate::harness::{SOON, browser, inside, on_a_host, remove_user, run, user_with_desktop};

/// Draws what comes until the screen satisfies.
async fn until(rfb: &mut Rfb<DuplexStream>, what: &str, satisfied: impl Fn(&Rfb<DuplexStream>) -> bool) {
    timeout(SOON, async {
        while !satisfied(rfb) {
            rfb.update(true).await.unwrap();
        }
    })
    .await
    .unwrap_or_else(|_| panic!("{what} was not seen in time"));
}

/// Asks inside until the answer satisfies. What was typed shows on the screen
/// when it was taken, so each change of the screen is a reason to ask again.
async fn until_inside(server: &Server, desktop: u32, rfb: &mut Rfb<DuplexStream>, script: &str, expected: &str) {
    let end = Instant::now() + SOON;
    loop {
        let said = inside(server, desktop, script);
        if said.contains(expected) {
            return;
        }
        assert!(Instant::now() < end, "`{script}` said {said:?}, not {expected:?}");
        // The last change may have been drawn before the program that makes the
        // answer has ended.
        if let Ok(update) = timeout(Duration::from_millis(200), rfb.update(true)).await {
            update.unwrap();
        }
    }
}

#[test]
fn sign_in_open_type_resize_leave_and_come_back() {
    on_a_host(|host| {
        let server = host.setup.start().unwrap();
        let (user, desktop) = user_with_desktop(&server);
        run(async {
            let browser = browser(&server, &user).await;
            let mut display = browser.open(desktop, 1280, 800).await.unwrap();
            display.rfb.update(false).await.unwrap();
            assert_eq!(display.rfb.size(), (1280, 800));
            until(&mut display.rfb, "a desktop with a terminal", |rfb| rfb.colours() >= 16).await;

            display.rfb.type_text("echo $((6*7)) > ~/answer; echo $$ > ~/shell\n").await.unwrap();
            until_inside(&server, desktop, &mut display.rfb, "cat ~/answer 2>/dev/null; true", "42\n").await;

            display.rfb.set_size(1000, 700).await.unwrap();
            until(&mut display.rfb, "the new size", |rfb| rfb.size() == (1000, 700)).await;
            until_inside(&server, desktop, &mut display.rfb, "xrandr --current", "current 1000 x 700").await;

            let shell = inside(&server, desktop, "cat ~/shell");
            display.leave();
            let mut again = browser.open(desktop, 1000, 700).await.unwrap();
            again.rfb.update(false).await.unwrap();
            again.rfb.type_text("echo $$ > ~/again\n").await.unwrap();
            until_inside(&server, desktop, &mut again.rfb, "cat ~/again 2>/dev/null; true", &shell).await;
            again.leave();
        });
        remove_user(&server, &user);
        server.stop().unwrap();
    });
}

#[test]
fn a_second_sign_in_takes_over_and_the_first_is_told() {
    on_a_host(|host| {
        let server = host.setup.start().unwrap();
        let (user, desktop) = user_with_desktop(&server);
        run(async {
            let first = browser(&server, &user).await.open(desktop, 1280, 800).await.unwrap();
            let mut second = browser(&server, &user).await.open(desktop, 1280, 800).await.unwrap();
            let close = timeout(SOON, first.closed()).await.unwrap().unwrap().expect("a close frame");
            assert_eq!(u16::from(close.code), 4001, "{close}");
            second.rfb.update(false).await.unwrap();
            until(&mut second.rfb, "the desktop", |rfb| rfb.colours() >= 16).await;
            second.leave();
        });
        remove_user(&server, &user);
        server.stop().unwrap();
    });
}
