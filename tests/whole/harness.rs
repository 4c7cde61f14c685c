//! A host for a test: namespace, store, server, census.

use std::{
    future::Future,
    os::fd::AsFd as _,
    path::PathBuf,
    process::Output,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use qvd_core::Instance;
use qvd_demo::{Browser, Server, Setup};
use qvd_testkit::{Census, Need, Scope, privileged};
use serde::Deserialize;

pub(crate) const NEEDS: &[Need] = &[Need::Root, Need::Env("QVD"), Need::Env("QVD_TEST_STORE"), Need::Env("QVD_INIT")];

/// Bounds a failure; nothing that works takes as long.
pub(crate) const SOON: Duration = Duration::from_secs(30);

/// A password that nothing else has.
pub(crate) const PASSWORD: &str = "correct horse battery";

/// Where a test runs.
#[derive(Debug)]
pub(crate) struct Host {
    pub(crate) setup: Setup,
    pub(crate) instance: Instance,
}

/// What `qvd desktop create` prints.
#[derive(Debug, Deserialize)]
pub(crate) struct Desktop {
    pub(crate) id: u32,
}

/// Prints what the server logged if the test fails.
struct LogOfFailure(PathBuf);

impl Drop for LogOfFailure {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", std::fs::read_to_string(&self.0).unwrap_or_else(|error| format!("no log: {error}")));
        }
    }
}

/// Runs `test` on a host of its own, and demands that it leaves nothing.
pub(crate) fn on_a_host(test: impl FnOnce(&Host) + Send) {
    privileged(NEEDS, || {
        let path = |name| PathBuf::from(std::env::var_os(name).unwrap()).canonicalize().unwrap();
        let root = path("QVD_TEST_STORE");
        let instance = Instance::of_root(root.as_os_str().as_encoded_bytes());
        let setup = Setup {
            qvd: path("QVD"),
            init: path("QVD_INIT"),
            root: root.clone(),
            listen: "127.0.0.1:0".to_owned(),
            ephemeral: true,
            arguments: Vec::new(),
            manager: None,
            log: Some(std::env::temp_dir().join(format!("qvd-{instance}.log"))),
        };
        let marks = [instance.bridge_name(), instance.cgroup_name()];
        let kept = ["roots/overlayfs", "disks/qcow2", "home-disks"].map(|dir| root.join(dir));
        let scope = Scope::marked(marks).files_under(format!("/run/qvd-{instance}"));
        let scope = kept.iter().fold(scope, Scope::files_under);
        let _told = LogOfFailure(setup.log.clone().unwrap());
        let netns = qvd_sys::netns::create().unwrap();
        qvd_sys::netns::in_netns(netns.as_fd(), || {
            qvd_net::loopback_up(netns.as_fd()).unwrap();
            let before = Census::take(&scope);
            test(&Host { setup, instance });
            before.assert_unchanged();
        })
        .unwrap();
    });
}

/// Runs async code on this thread, which is in the test's namespace; a
/// runtime's own threads would be in it too, but only if born here.
pub(crate) fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

/// A user of this test alone, with one desktop.
pub(crate) fn user_with_desktop(server: &Server) -> (String, u32) {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let user = format!("test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    server.add_user(&user, PASSWORD).unwrap();
    let desktop = create_desktop(server, &user, &[]);
    (user, desktop)
}

/// One more desktop for a user; its number.
pub(crate) fn create_desktop(server: &Server, user: &str, options: &[&str]) -> u32 {
    let desktop: Desktop = server.json(&[&["desktop", "create", user, "icewm"], options].concat()).unwrap();
    desktop.id
}

/// Removes a user with everything that is theirs.
pub(crate) fn remove_user(server: &Server, user: &str) {
    expect_ok(&server.run(["user", "rm", user, "--with-desktops"]).unwrap());
}

/// A browser of this user, signed in.
pub(crate) async fn browser(server: &Server, user: &str) -> Browser {
    let mut browser = Browser::new(server.url(), &server.setup().root.join("tls/cert.pem")).unwrap();
    browser.sign_in(user, PASSWORD).await.unwrap();
    browser
}

/// What a program inside prints.
pub(crate) fn inside(server: &Server, desktop: u32, script: &str) -> String {
    let id = desktop.to_string();
    let output = server.run(["desktop", "exec", "-T", &id, "--", "sh", "-c", script]).unwrap();
    expect_ok(&output);
    String::from_utf8(output.stdout).unwrap()
}

pub(crate) fn expect_ok(output: &Output) {
    assert!(output.status.success(), "{}: {}", output.status, String::from_utf8_lossy(&output.stderr));
}
