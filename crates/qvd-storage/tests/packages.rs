//! Packages that were made to do harm: what their programs can do while they
//! install themselves. A system of one package is made on the spot, without a network.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::{
    fs,
    net::TcpListener,
    os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixListener},
    },
    path::Path,
    process::Command,
};

use qvd_storage::{BuildOptions, Error, Recipe, Store};
use qvd_testkit::{Need, copy_program, copy_program_as, privileged};
use sha2::{Digest, Sha256};

const NEEDS: &[Need] = &[Need::Root, Need::Program("mmdebstrap"), Need::Program("dpkg-deb"), Need::Program("capsh")];

/// What `dpkg` runs and expects, and what the scripts of the test need.
const PROGRAMS: [&str; 12] = [
    "/usr/bin/dpkg",
    "/usr/bin/dpkg-deb",
    "/usr/bin/dpkg-split",
    "/usr/bin/env",
    "/usr/bin/perl",
    "/usr/sbin/start-stop-daemon",
    "/bin/rm",
    "/bin/tar",
    "/usr/bin/diff",
    "/sbin/ldconfig",
    "/bin/true",
    "/bin/cat",
];

/// Each line tries a way out, and says which one it was when that worked.
const WAYS_OUT: &str = r#"#!/usr/bin/env perl
    my ($out, $jail, $disk, $none, $kind, $time, $no, $name) =
        ('', '/jail', '/disk', 'none', 'tmpfs', pack('qq', 1, 0), 'x', 'stolen');
    # mknod, mount, reboot, clock_settime, init_module, sethostname, setns, unshare: by
    # their numbers on x86_64.
    $out .= 'device ' if syscall(133, $disk, 060000 | 0600, 0x800) == 0;
    mkdir $jail;
    $out .= 'mount ' if syscall(165, $none, $jail, $kind, 0, 0) == 0;
    $out .= 'reboot ' if syscall(169, 0xfee1dead, 672274793, 0, 0) == 0;
    $out .= 'clock ' if syscall(227, 0, $time) == 0;
    $out .= 'module ' if syscall(175, $no, 1, $no) == 0;
    $out .= 'name ' if syscall(170, $name, 6) == 0;
    $out .= 'namespace ' if syscall(272, 0x20000) == 0;
    open(my $mounts, '<', '/proc/1/ns/mnt') and syscall(308, fileno($mounts), 0) == 0 and $out .= 'setns ';
    open(my $status, '<', '/proc/self/status') or die "no processes are shown\n";
    # dac_read_search, net_admin, net_raw, module, rawio, ptrace, admin, boot, time, mknod.
    my $rights = 1 << 2 | 1 << 12 | 1 << 13 | 1 << 16 | 1 << 17 | 1 << 19 | 1 << 21 | 1 << 22 | 1 << 25 | 1 << 27;
    while (<$status>) { $out .= "right:$1 " if /^Cap(?:Bnd|Eff|Prm):\s*([0-9a-f]+)/ and hex($1) & $rights; }
    $out .= 'signal ' if kill(0, HOST_PID);
    # AF_INET is 2, AF_UNIX is 1, SOCK_STREAM is 1.
    socket(my $tcp, 2, 1, 0) or die "no sockets\n";
    $out .= 'network ' if connect($tcp, pack('S n C4 x8', 2, HOST_PORT, 127, 0, 0, 1));
    socket(my $unix, 1, 1, 0) or die "no sockets\n";
    $out .= 'abstract socket ' if connect($unix, pack('S', 1) . "\0HOST_SOCKET");
    $out .= 'settings ' if -e '/proc/sys' or -e '/sys/kernel' or -e '/proc/sysrq-trigger';
    $out .= 'memory ' if -e '/proc/kcore' or -e '/dev/mem';
    $out .= 'terminal ' if open(my $tty, '+<', '/dev/tty');
    opendir(my $processes, '/proc') or die "no processes are shown\n";
    for my $process (grep { /^[0-9]+$/ } readdir $processes) { $out .= "root of $process " if -e "/proc/$process/rootHOST_SECRET"; }
    # Out of the tree, which is allowed; then it is out of nothing.
    chroot($jail); chdir('..') for 1 .. 64; chroot('.');
    for my $top ('', '/proc/1/root') {
        $out .= "secret $top " if -e "${top}HOST_SECRET";
        $out .= "passwords $top " if -e "$top/etc/shadow" or -d "$top/home";
        $out .= "programs $top " if open(my $program, '>', "$top/usr/bin/of-the-host");
        $out .= "device $top " if -e "$top/dev/vda" or -e "$top/dev/sda" or -e "$top/dev/loop0";
    }
    die "ways out: $out\n" if $out;
    open(my $null, '>', '/dev/null') or die "there is no /dev/null\n";
    print {$null} 'x';
"#;

/// A package in `pool`, with its paragraph in a list.
fn package(pool: &Path, name: &str, more: &str, fill: impl FnOnce(&Path)) -> String {
    let architecture = Command::new("dpkg").arg("--print-architecture").output().unwrap().stdout;
    let architecture = String::from_utf8(architecture).unwrap();
    let stage = pool.join(format!("{name}.d"));
    fs::create_dir_all(stage.join("DEBIAN")).unwrap();
    fill(&stage);
    let control = format!(
        "Package: {name}\nVersion: 1\nArchitecture: {}\nMaintainer: nobody <nobody@example.org>\n{more}Description: {name}\n",
        architecture.trim()
    );
    fs::write(stage.join("DEBIAN/control"), &control).unwrap();
    let file = pool.join(format!("{name}.deb"));
    let mut build = Command::new("dpkg-deb");
    let built = build.args(["--root-owner-group", "-Znone", "--build"]).args([&stage, &file]).output().unwrap();
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    let bytes = fs::read(&file).unwrap();
    format!("{control}Filename: {name}.deb\nSize: {}\nSHA256: {}\n\n", bytes.len(), sum(&bytes))
}

fn sum(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A mirror of a system of one package, and of one whose script is `script`.
fn mirror(dir: &Path, script: &str) -> String {
    let system = package(dir, "system", "Essential: yes\nPriority: required\n", |stage| {
        for program in PROGRAMS {
            copy_program(program, stage);
        }
        copy_program_as("/bin/sh", "/bin/sh", stage);
        for name in ["etc", "proc", "sys", "dev", "tmp", "usr/bin"] {
            fs::create_dir_all(stage.join(name)).unwrap();
        }
        fs::write(stage.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n").unwrap();
        fs::write(stage.join("etc/group"), "root:x:0:\n").unwrap();
    });
    let hostile = package(dir, "hostile", "", |stage| {
        let file = stage.join("DEBIAN/postinst");
        fs::write(&file, script).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(file, mode).unwrap();
    });
    let packages = system + &hostile;
    let architecture = packages.lines().find_map(|line| line.strip_prefix("Architecture: ")).unwrap();
    let index = format!("main/binary-{architecture}/Packages");
    let suite = dir.join("dists/bookworm");
    fs::create_dir_all(suite.join(&index).parent().unwrap()).unwrap();
    fs::write(suite.join(&index), &packages).unwrap();
    let release = format!(
        "Suite: bookworm\nCodename: bookworm\nComponents: main\nArchitectures: {architecture}\nSHA256:\n {} {} {index}\n",
        sum(packages.as_bytes()),
        packages.len(),
    );
    fs::write(suite.join("Release"), release).unwrap();
    format!("[trusted=yes] copy://{}", dir.display())
}

const RECIPE: &str = r#"
name = "tiny"
packages = ["hostile"]
base = { distribution = "debian", suite = "bookworm" }
user = { name = "user", uid = 1000, gid = 1000 }
"#;

/// Builds the recipe from a mirror where `script` is the package's.
fn build(dir: &Path, recipe: &str, script: &str) -> Result<Vec<String>, Error> {
    let packages = dir.join("mirror");
    fs::create_dir_all(&packages).unwrap();
    let options = BuildOptions { mirror: Some(mirror(&packages, script)), ..BuildOptions::default() };
    let store = Store::open(&dir.join("store")).unwrap();
    let image = store.build(&Recipe::parse(recipe).unwrap(), &options, &mut |_| ())?.image;
    assert_eq!(fs::read_dir(dir.join("store/making")).unwrap().count(), 0);
    let tree = store.repository().tree_of(image.commit()).unwrap();
    Ok(tree.entries().iter().map(|entry| entry.path.to_str().unwrap().to_owned()).collect())
}

#[test]
fn a_package_that_installs_itself_does_not_get_out() {
    privileged(NEEDS, || {
        let dir = tempfile::tempdir().unwrap();
        let secret = dir.path().join("secret");
        fs::write(&secret, "of the host").unwrap();
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let name = format!("qvd-test-{}", std::process::id());
        let _unix = UnixListener::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        let script = WAYS_OUT
            .replace("HOST_PID", &std::process::id().to_string())
            .replace("HOST_PORT", &tcp.local_addr().unwrap().port().to_string())
            .replace("HOST_SOCKET", &name)
            .replace("HOST_SECRET", secret.to_str().unwrap());
        let paths = build(dir.path(), RECIPE, &script).unwrap();
        assert!(paths.iter().any(|path| path == "jail"), "the script has run");
        assert!(!paths.iter().any(|path| path == "disk" || path.starts_with("proc/") || path.starts_with("dev/")));
        assert_eq!(fs::read_to_string(secret).unwrap(), "of the host");
        assert!(!Path::new("/usr/bin/of-the-host").exists());
    });
}

#[test]
fn what_a_package_leaves_is_looked_at_before_it_is_opened() {
    privileged(NEEDS, || {
        let dir = tempfile::tempdir().unwrap();
        // A pipe, by mknod, whose other end nobody opens.
        let script = "#!/usr/bin/env perl\n\
            unlink('/etc/passwd'); syscall(133, my $passwd = '/etc/passwd', 010644, 0) == 0 or die 'no pipe';\n";
        let error = build(dir.path(), RECIPE, script).unwrap_err();
        let reason = qvd_core::causes(&error).join(": ");
        assert!(reason.contains("`/etc/passwd` of the tree is no file"), "{reason}");
        assert_eq!(fs::read_dir(dir.path().join("store/making")).unwrap().count(), 0);
    });
}

#[test]
fn a_tree_beyond_the_limits_of_its_recipe_is_refused() {
    privileged(NEEDS, || {
        let dir = tempfile::tempdir().unwrap();
        let script = "#!/usr/bin/env perl\nopen(my $big, '>', '/big'); truncate($big, 1 << 40);\n";
        let error = build(dir.path(), &format!("{RECIPE}limits = {{ size = \"1GiB\" }}\n"), script).unwrap_err();
        assert!(error.to_string().contains("more than the 1073741824 that its recipe allows"), "{error}");
        let store = Store::open(&dir.path().join("store")).unwrap();
        assert!(store.flavours().unwrap().is_empty());
    });
}
