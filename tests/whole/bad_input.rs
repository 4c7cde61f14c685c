//! What is wrong is refused in one clear line, with the status that
//! docs/commands.md gives, and nothing is left behind.

use std::{
    ffi::OsString,
    fs, io,
    net::TcpListener,
    os::unix::{fs::PermissionsExt as _, net::UnixDatagram},
    path::{Path, PathBuf},
    process::{Command, Output},
    time::Duration,
};

use qvd::storage::{Image, Recipe, Store};
use qvd_core::Instance;
use qvd_demo::{Browser, Native, Server, Setup};
use qvd_testkit::{Census, Need, Scope, privileged};
use serde_json::Value;
use tempfile::TempDir;

use crate::harness::{Desktop, Host, NEEDS, PASSWORD, expect_ok, on_a_host, remove_user, run, user_with_desktop};

/// A recipe without a package of its own, which nothing is ever built from.
const RECIPE: &str = r#"name = "tiny"
packages = []
base = { distribution = "debian", suite = "bookworm" }
user = { name = "user", uid = 1000, gid = 1000 }
"#;

/// A user without rights: nobody, in most distributions.
const NOBODY: &str = "65534";

/// Room for a store without an image, and for no desktop.
const SMALL_DISK_BYTES: u64 = 8 << 20;

/// What was wrong, and how the command says so.
struct Case<'a> {
    args: &'a [&'a str],
    status: i32,
    /// What the line must name.
    says: &'a [&'a str],
}

fn case<'a>(args: &'a [&'a str], status: i32, says: &'a [&'a str]) -> Case<'a> {
    Case { args, status, says }
}

/// The line that a command which fails ends with.
fn line_of(output: &Output) -> String {
    assert!(output.stdout.is_empty(), "{output:?}");
    let text = String::from_utf8(output.stderr.clone()).unwrap();
    text.lines().last().expect("a line on standard error").to_owned()
}

/// Demands of both forms, for people and for programs, that they tell the case.
fn check(command: impl Fn() -> Command, case: &Case<'_>) {
    let output = command().args(case.args).output().unwrap();
    let line = line_of(&output);
    assert_eq!(output.status.code(), Some(case.status), "{:?}: {line}", case.args);
    let message = line.strip_prefix("qvd: ").unwrap_or_else(|| panic!("{:?} said {line:?}", case.args));
    for word in case.says {
        assert!(message.contains(word), "{:?} said {message:?}, which does not name {word:?}", case.args);
    }
    let parts: Vec<&str> = message.split(": ").collect();
    assert!(parts.windows(2).all(|pair| pair[0] != pair[1]), "{message:?} repeats itself");

    let output = command().arg("--json").args(case.args).output().unwrap();
    assert_eq!(output.status.code(), Some(case.status), "--json {:?}", case.args);
    assert_eq!(String::from_utf8_lossy(&output.stderr).lines().count(), 1, "--json {:?}", case.args);
    let json: Value = serde_json::from_str(&line_of(&output)).unwrap();
    assert_eq!(json["error"]["exit"], case.status, "{json}");
    for word in case.says {
        assert!(json["error"]["message"].as_str().unwrap().contains(word), "{json} does not name {word:?}");
    }
}

/// An installation of its own in the test's namespace, with its own census.
pub(crate) fn elsewhere(host: &Host, root: &Path, test: impl FnOnce(&Setup)) {
    let instance = Instance::of_root(root.as_os_str().as_encoded_bytes());
    let scope = Scope::marked([instance.bridge_name(), instance.cgroup_name()])
        .files_under(format!("/run/qvd-{instance}"))
        .files_under(root.join("roots/overlayfs"));
    let before = Census::take(&scope);
    test(&Setup {
        root: root.to_owned(),
        log: Some(std::env::temp_dir().join(format!("qvd-{instance}.log"))),
        ..host.setup.clone()
    });
    before.assert_unchanged();
}

/// Just what a desktop's mounts need.
pub(crate) fn tiny_tree(tree: &Path) -> io::Result<()> {
    let dirs = ["dev", "etc", "home/user", "proc", "run", "sys", "tmp"];
    dirs.iter().try_for_each(|dir| fs::create_dir_all(tree.join(dir)))
}

/// Imports an image with just what a desktop's mounts need.
fn tiny_image(root: &Path) -> Image {
    let store = Store::open(root).unwrap();
    store.import(Recipe::parse(RECIPE).unwrap().config().clone(), &mut tiny_tree).unwrap()
}

fn file(dir: &TempDir, name: &str, text: &str) -> String {
    let path = dir.path().join(name);
    fs::write(&path, text).unwrap();
    path.into_os_string().into_string().unwrap()
}

#[test]
fn what_is_asked_of_a_server_in_vain() {
    on_a_host(|host| {
        let dir = tempfile::tempdir().unwrap();
        let unknown_key = file(&dir, "key.toml", &RECIPE.replace("packages", "  packges"));
        let syntax = file(&dir, "syntax.toml", &RECIPE.replace("[]", "["));
        let suite = file(&dir, "suite.toml", &RECIPE.replace("bookworm", "hamm"));
        let server = host.setup.start().unwrap();
        let (user, id) = user_with_desktop(&server);
        let fixed: Desktop = server.json(&["desktop", "create", &user, "icewm", "--address", "10.95.0.77"]).unwrap();
        let strange: Desktop = server.json(&["desktop", "create", &user, "icewm", "--address", "192.0.2.1"]).unwrap();
        let (id, fixed, strange) = (id.to_string(), fixed.id.to_string(), strange.id.to_string());
        let user = user.as_str();
        for case in [
            case(&["desktop", "create", user, "nothing"], 4, &["nothing", "there is `icewm`"]),
            case(&["desktop", "create", user, "icewm", "--tag", "old"], 4, &["old", "default"]),
            case(&["desktop", "create", "nobody-here", "icewm"], 4, &["nobody-here"]),
            case(&["desktop", "create", user, "icewm", "--name", "icewm"], 5, &[user, &id]),
            case(&["desktop", "create", user, "icewm", "--address", "10.95.0.77"], 5, &["10.95.0.77", &fixed]),
            case(&["desktop", "create", user, "icewm", "--address", "127.0.0.1"], 2, &["127.0.0.1"]),
            case(&["desktop", "start", &strange], 2, &[&strange, "192.0.2.1", "subnet"]),
            case(&["desktop", "ls", "--user", "nobody-here"], 4, &["nobody-here"]),
            case(&["desktop", "show", "4711"], 4, &["4711"]),
            case(&["desktop", "start", "4711"], 4, &["4711"]),
            case(&["desktop", "stop", "4711"], 4, &["4711"]),
            case(&["desktop", "rm", "4711"], 4, &["4711"]),
            case(&["desktop", "exec", "4711", "true"], 4, &["4711"]),
            case(&["desktop", "exec", &id, "true"], 1, &[&id, "does not run"]),
            case(&["desktop", "stats", &id], 1, &[&id, "does not run"]),
            case(&["user", "add", user, "--generate"], 5, &[user]),
            case(&["user", "rm", "nobody-here"], 4, &["nobody-here"]),
            case(&["user", "rm", user], 5, &[user, "3 desktops", "--with-desktops"]),
            case(&["desktop", "create", user, "icewm", "--net-policy", "/nonexistent"], 4, &["/nonexistent"]),
            case(&["user", "passwd", "nobody-here", "--generate"], 4, &["nobody-here"]),
            case(&["image", "build", "/nonexistent.toml"], 4, &["/nonexistent.toml"]),
            case(&["image", "build", &unknown_key], 2, &[&unknown_key, "line 2, column 3", "packges"]),
            case(&["image", "build", &syntax], 2, &[&syntax, "line 3, column"]),
            case(&["image", "build", &suite], 1, &[&suite, "hamm", "/etc/apt"]),
            case(
                &["up", "--listen", "127.0.0.1:0", "--init", host.setup.init.to_str().unwrap()],
                5,
                &[host.setup.root.to_str().unwrap(), "in use"],
            ),
        ] {
            check(|| host.setup.command(), &case);
        }
        // Stopping what is stopped is what was asked for.
        expect_ok(&server.run(["desktop", "stop", &id]).unwrap());
        remove_user(&server, user);
        server.stop().unwrap();
    });
}

#[test]
fn a_wrong_password_opens_no_door() {
    on_a_host(|host| {
        let server = host.setup.start().unwrap();
        let (user, desktop) = user_with_desktop(&server);
        let certificate = host.setup.root.join("tls/cert.pem");
        run(async {
            let mut browser = Browser::new(server.url(), &certificate).unwrap();
            let refusal = browser.sign_in(&user, "wrong horse").await.unwrap_err().to_string();
            assert!(refusal.contains("password") && !refusal.contains("horse"), "{refusal}");
            let unknown = browser.sign_in("nobody-here", PASSWORD).await.unwrap_err().to_string();
            assert_eq!(unknown, refusal, "a page tells which names exist");
            assert!(browser.open(desktop, 640, 480).await.is_err());

            let mut native = Native::connect(server.url(), &certificate, &user, "wrong horse").await.unwrap();
            let refusal = format!("{:#}", native.list_of_vm().await.unwrap_err());
            assert!(refusal.contains("401") && !refusal.contains("horse"), "{refusal}");
            let (status, page) = browser.page("/api/v1/desktops").await.unwrap();
            assert!(status == 401 && page.contains("\"code\""), "{status} {page}");
        });
        remove_user(&server, &user);
        server.stop().unwrap();
    });
}

#[test]
fn a_server_that_cannot_start_says_why_and_leaves_nothing() {
    on_a_host(|host| {
        let dir = tempfile::tempdir().unwrap();
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().to_string();
        let init = host.setup.init.to_str().unwrap();
        let text = file(&dir, "text", "no program\n");
        let up = |more: &[&str]| -> Vec<String> {
            let listen = if more.contains(&"--listen") { vec![] } else { vec!["--listen", "127.0.0.1:0"] };
            let init = if more.contains(&"--init") { vec![] } else { vec!["--init", init] };
            [&["up"][..], &listen, &init, more].concat().into_iter().map(str::to_owned).collect()
        };
        let root = dir.path().join("store");
        elsewhere(host, &root, |setup| {
            for (args, status, says) in [
                (up(&["--init", "/nonexistent/init"]), 4, &["/nonexistent/init"][..]),
                (up(&["--init", &text]), 2, &[&text, "not a program"]),
                (up(&["--listen", &port]), 5, &[&port, "in use"]),
                (up(&["--listen", "192.0.2.1:8443"]), 1, &["192.0.2.1:8443"]),
                (up(&["--tls-cert", "/nonexistent/cert", "--tls-key", &text]), 4, &["/nonexistent/cert"]),
                (up(&["--tls-cert", &text, "--tls-key", &text]), 1, &[&text, "PEM"]),
                (up(&["--root", &text]), 1, &[&text]),
                (up(&["--tenants", "/nonexistent"]), 4, &["tenants", "/nonexistent"]),
                (up(&["--tenant-policy", "/nonexistent"]), 4, &["policy", "/nonexistent"]),
                (up(&["--vm-kernel", "/nonexistent"]), 4, &["kernel", "/nonexistent"]),
                (up(&["--memory", "1M"]), 2, &["1MiB", "at least"]),
                (up(&["--name-server", "192.0.2.1", "--name-server", "192.0.2.2"]), 2, &["192.0.2.1", "192.0.2.2"]),
            ] {
                // The option's last place is a file here, once.
                let own_root = args.contains(&"--root".to_owned());
                let command = || {
                    let mut command = if own_root { Command::new(&setup.qvd) } else { setup.command() };
                    command.stdin(std::process::Stdio::null());
                    command
                };
                check(command, &case(&args.iter().map(String::as_str).collect::<Vec<_>>(), status, says));
                let instance = Instance::of_root(root.as_os_str().as_encoded_bytes());
                assert!(!Path::new(&format!("/run/qvd-{instance}")).exists(), "{args:?}");
            }
            check(|| setup.command(), &case(&["desktop", "ls"], 1, &["api.sock", "qvd up"]));
        });
    });
}

#[test]
fn a_service_manager_hears_when_the_server_is_there_and_when_it_goes() {
    on_a_host(|host| {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("manager");
        let manager = UnixDatagram::bind(&socket).unwrap();
        manager.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let told = || {
            let mut text = [0; 256];
            let length = manager.recv(&mut text).unwrap();
            String::from_utf8(text[..length].to_vec()).unwrap()
        };
        let server = Setup { manager: Some(socket), ..host.setup.clone() }.start().unwrap();
        let (ready, url) = (told(), server.url().to_owned());
        assert!(ready.starts_with("READY=1\n") && ready.contains(&format!("STATUS=listening on {url}\n")), "{ready}");
        server.stop().unwrap();
        assert_eq!(told(), "STOPPING=1\n");
    });
}

#[test]
fn without_root_each_command_says_so() {
    on_a_host(|host| {
        // Where a user without rights may execute it.
        let dir = tempfile::tempdir_in("/tmp").unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let qvd = dir.path().join("qvd");
        fs::copy(&host.setup.qvd, &qvd).unwrap();
        let recipe = file(&dir, "tiny.toml", RECIPE);
        let as_nobody = || {
            let mut command = Command::new("setpriv");
            command.args(["--reuid", NOBODY, "--regid", NOBODY, "--clear-groups"]).arg(&qvd);
            command.arg("--root").arg(&host.setup.root);
            command
        };
        let server = host.setup.start().unwrap();
        for case in [
            case(&["up", "--listen", "127.0.0.1:0"], 3, &["root"]),
            case(&["desktop", "ls"], 1, &["api.sock", "this takes root"]),
            case(&["image", "ls"], 3, &["this takes root"]),
            case(&["image", "build", &recipe], 3, &["this takes root"]),
        ] {
            check(as_nobody, &case);
        }
        let doctor = as_nobody().arg("doctor").output().unwrap();
        assert_eq!(doctor.status.code(), Some(3), "{doctor:?}");
        let said = String::from_utf8_lossy(&doctor.stdout).into_owned();
        assert!(said.contains("remedy: run this as root"), "{said}");
        // Once for all that take the same and follow one another.
        for lacks in said.split("\nyes ") {
            let remedies: Vec<_> = lacks.lines().filter(|line| line.contains("remedy: ")).collect();
            assert!(remedies.windows(2).all(|pair| pair[0] != pair[1]), "{said}");
        }
        server.stop().unwrap();
    });
}

#[test]
fn a_host_without_user_namespaces_is_told_how_to_get_them() {
    on_a_host(|host| {
        let dir = tempfile::tempdir().unwrap();
        elsewhere(host, &dir.path().join("store"), |setup| {
            // Root of a user namespace that allows none below it.
            let without = || {
                let mut command = Command::new("unshare");
                command.args(["--user", "--map-root-user", "--mount", "--net", "--", "sh", "-c"]);
                command.arg("echo 0 > /proc/sys/user/max_user_namespaces && ip link set lo up && exec \"$@\"");
                command.arg("sh").arg(&setup.qvd).arg("--root").arg(&setup.root);
                command
            };
            let init = setup.init.to_str().unwrap();
            let args = ["up", "--listen", "127.0.0.1:0", "--init", init];
            check(without, &case(&args, 3, &["user.max_user_namespaces", "raise"]));
            let doctor = without().arg("doctor").output().unwrap();
            let said = String::from_utf8_lossy(&doctor.stdout).into_owned();
            assert_eq!(doctor.status.code(), Some(3), "{doctor:?}");
            assert!(said.contains("NO   user namespaces") && said.contains("user.max_user_namespaces"), "{said}");
        });
    });
}

#[test]
fn a_package_that_does_not_exist_is_named() {
    privileged(&[NEEDS, &[Need::Program("mmdebstrap")]].concat(), || {
        let dir = tempfile::tempdir().unwrap();
        let recipe = file(&dir, "missing.toml", &RECIPE.replace("[]", "[\"no-such-package-anywhere\"]"));
        let root = dir.path().join("store");
        let qvd = PathBuf::from(std::env::var_os("QVD").unwrap());
        let output = Command::new(qvd).arg("--root").arg(&root).args(["image", "build", &recipe]).output().unwrap();
        let line = line_of(&output);
        assert_eq!(output.status.code(), Some(2), "{line}");
        assert!(line.starts_with("qvd: cannot ") && line.contains("`no-such-package-anywhere` in bookworm"), "{line}");
        assert!(line.contains(&recipe), "{line}");
        for name in ["images/commits", "images/objects", "images/incoming", "making", "trash"] {
            let left: Vec<OsString> =
                fs::read_dir(root.join(name)).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            assert!(left.is_empty(), "{name}: {left:?}");
        }
    });
}

#[test]
fn a_damaged_image_is_named_and_stops_nobody_else() {
    /// Breaks an image: its repository, and the file of its commit.
    type Damage = fn(&Path, &Path);
    /// Replaces a file that nobody may write.
    fn put(file: &Path, content: &str) {
        fs::remove_file(file).unwrap();
        fs::write(file, content).unwrap();
    }
    let damages: [(Damage, i32, &str); 4] = [
        (|_, commit| put(commit, &fs::read_to_string(commit).unwrap()[..100]), 1, "EOF while parsing"),
        (|_, commit| put(commit, &fs::read_to_string(commit).unwrap().replace("1000", "1001")), 1, "was changed"),
        (
            |images, _| {
                fs::remove_dir_all(images.join("trees")).unwrap();
                fs::create_dir(images.join("trees")).unwrap();
            },
            1,
            "is missing",
        ),
        (|_, commit| fs::remove_file(commit).unwrap(), 4, "there is no image"),
    ];
    on_a_host(|host| {
        for (damage, status, says) in damages {
            let dir = tempfile::tempdir().unwrap();
            let root = dir.path().join("store");
            let image = tiny_image(&root);
            elsewhere(host, &root, |setup| {
                let server = setup.start().unwrap();
                server.add_user("ana", PASSWORD).unwrap();
                let desktop: Desktop = server.json(&["desktop", "create", "ana", "tiny", "--no-network"]).unwrap();
                let images = root.join("images");
                damage(&images, &images.join("commits").join(image.digest().hex()));
                let id = desktop.id.to_string();
                check(
                    || setup.command(),
                    &case(&["desktop", "start", &id], status, &[&id, &image.digest().hex(), says]),
                );
                let images: Value = server.json(&["image", "ls"]).unwrap();
                assert!(images[0]["damaged"].as_str().is_some_and(|why| why.contains(says)), "{images}");
                remove_user(&server, "ana");
                server.stop().unwrap();
            });
        }
    });
}

/// A file system of its own on a loop device, gone when dropped.
struct SmallDisk {
    at: TempDir,
}

impl SmallDisk {
    fn new() -> Self {
        let at = tempfile::tempdir().unwrap();
        let image = at.path().join("disk");
        fs::File::create(&image).unwrap().set_len(SMALL_DISK_BYTES).unwrap();
        fs::create_dir(at.path().join("mnt")).unwrap();
        let run = |program: &str, args: &[&Path]| expect_ok(&Command::new(program).args(args).output().unwrap());
        run("mkfs.ext4", &["-q".as_ref(), &image]);
        // `mount` makes the loop device such that it goes with the mount.
        run("mount", &["-o".as_ref(), "loop".as_ref(), &image, &at.path().join("mnt")]);
        Self { at }
    }

    fn path(&self) -> PathBuf {
        self.at.path().join("mnt")
    }

    /// Takes all that is left.
    fn fill(&self) {
        let _full = Command::new("dd")
            .args(["if=/dev/zero", "bs=4k", "status=none"])
            .arg(format!("of={}", self.path().join("ballast").display()))
            .output()
            .unwrap();
        let _rest = Command::new("sync").arg("-f").arg(self.path()).output().unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let output = Command::new("umount").arg(self.path()).output().unwrap();
        if !output.status.success() && !std::thread::panicking() {
            expect_ok(&output);
        }
    }
}

#[test]
fn a_full_disk_is_named_and_works_again_with_room() {
    privileged(&[Need::LoopDevices, Need::Program("mkfs.ext4"), Need::Program("mmdebstrap")], || {
        on_a_host(|host| {
            let disk = SmallDisk::new();
            let root = disk.path().join("store");
            tiny_image(&root);
            elsewhere(host, &root, |setup| {
                let server = setup.start().unwrap();
                server.add_user("ana", PASSWORD).unwrap();
                let desktop: Desktop = server.json(&["desktop", "create", "ana", "tiny", "--no-network"]).unwrap();
                let (id, full) = (desktop.id.to_string(), root.to_str().unwrap());
                disk.fill();
                check(|| setup.command(), &case(&["desktop", "start", &id], 1, &[&id, "no space is left", full]));
                let recipe = file(&disk.at, "other.toml", &RECIPE.replace("tiny", "other"));
                check(|| setup.command(), &case(&["image", "build", &recipe], 1, &["no space is left", full]));
                assert_eq!(fs::read_dir(root.join("making")).unwrap().count(), 0);
                assert_eq!(fs::read_dir(root.join("roots/overlayfs")).map_or(0, Iterator::count), 0);
                fs::remove_file(disk.path().join("ballast")).unwrap();
                expect_ok(&server.run(["desktop", "start", &id]).unwrap());
                remove_user(&server, "ana");
                server.stop().unwrap();
            });
        });
    });
}

/// Waits for a directory to be gone: the trash takes it at once, by a rename.
fn is_there(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

#[test]
fn a_stopped_desktop_keeps_its_persistent_root_over_a_restart_and_loses_it_when_removed() {
    on_a_host(|host| {
        let start = || -> Server { host.setup.start().unwrap() };
        let inside = |server: &Server, id: &str, script: &str| {
            let output = server.run(["desktop", "exec", "-T", id, "--", "sh", "-c", script]).unwrap();
            expect_ok(&output);
            String::from_utf8(output.stdout).unwrap()
        };
        let server = start();
        let (user, _) = user_with_desktop(&server);
        let desktop: Desktop =
            server.json(&["desktop", "create", &user, "icewm", "--name", "kept", "--persistent"]).unwrap();
        let id = desktop.id.to_string();
        let below = |kind: &str, name: &str| host.setup.root.join(kind).join(name);
        let (root, home) = (below("roots/overlayfs", &id), below("homes", &format!("desktop-{id}")));
        expect_ok(&server.run(["desktop", "start", &id]).unwrap());
        inside(&server, &id, "echo kept > /var/tmp/kept; echo mine > ~/mine");
        expect_ok(&server.run(["desktop", "stop", &id]).unwrap());
        server.stop().unwrap();

        let server = start();
        assert!(is_there(&root), "the persistent root of a stopped desktop was swept");
        expect_ok(&server.run(["desktop", "start", &id]).unwrap());
        assert_eq!(inside(&server, &id, "cat /var/tmp/kept ~/mine"), "kept\nmine\n");
        expect_ok(&server.run(["desktop", "rm", &id]).unwrap());
        assert!(!is_there(&root) && !is_there(&home), "a removed desktop left its files");
        remove_user(&server, &user);
        server.stop().unwrap();
    });
}
