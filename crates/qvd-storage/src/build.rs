//! From a recipe to a tree: packages by `mmdebstrap`, then what the recipe
//! adds and takes away.

use std::{
    collections::VecDeque,
    fs, io,
    io::{BufRead, BufReader, Write},
    os::{fd::AsFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant, SystemTime},
};

use qvd_core::{Missing, Support};
use rustix::event::{PollFd, PollFlags, poll};

use crate::{
    Error, Recipe, apt,
    image::Scratch,
    trash::Trash,
    treeedit::{self, SOURCE_DATE_EPOCH_S},
};

/// How an image is built.
#[derive(Debug, Clone)]
pub struct BuildOptions {
    /// Where packages come from, as `sources.list(5)` has it: an address, with
    /// options in brackets before it if it needs any. `None` means the host's
    /// own apt configuration, updates and security fixes included.
    pub mirror: Option<String>,
    /// Builds even if an image of the same recipe is there.
    pub rebuild: bool,
    /// After this the build is given up.
    pub timeout: Duration,
    /// Who builds it, for its history.
    pub author: String,
    /// And why.
    pub message: String,
}

impl Default for BuildOptions {
    /// Half an hour: a large desktop over a slow line.
    fn default() -> Self {
        Self {
            mirror: None,
            rebuild: false,
            timeout: Duration::from_secs(30 * 60),
            author: "qvd".to_owned(),
            message: "built from its recipe".to_owned(),
        }
    }
}

/// The only directories that programs are taken from, whoever calls us.
const PATH: [&str; 4] = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"];

/// Lines of a program's output that an error carries.
const OUTPUT_LINES: usize = 12;

/// Fills `scratch` with the tree that `recipe` describes.
pub(crate) fn build(
    recipe: &Recipe,
    options: &BuildOptions,
    scratch: &Scratch,
    trash: &Trash,
    progress: &mut dyn FnMut(&str),
) -> Result<(), Error> {
    let deadline = Instant::now() + options.timeout;
    let started = SystemTime::now();
    let mut job = Job { recipe, below: scratch.dir(), deadline, progress };
    let sources = job.sources(options)?;
    let sources_file = scratch.dir().join("sources.list");
    let settings_file = scratch.dir().join("apt.conf");
    write_private(&sources_file, &sources)?;
    write_private(&settings_file, &job.apt_settings()?)?;
    job.bootstrap(scratch, &sources_file, &settings_file)?;
    for file in [sources_file, settings_file] {
        fs::remove_file(&file).map_err(Error::io("remove", &file))?;
    }
    let tree = scratch.tree();
    treeedit::clean(&tree, trash)?;
    treeedit::add_user(&tree, &recipe.config.user)?;
    treeedit::add_files(&tree, &recipe.files)?;
    for pattern in &recipe.remove {
        if treeedit::remove(&tree, pattern, trash)? == 0 {
            (job.progress)(&format!("nothing matches /{}", pattern.parts().join("/")));
        }
    }
    treeedit::settle_times(&tree, started)?;
    for argv in &recipe.run {
        job.run_inside(&tree, argv)?;
    }
    treeedit::settle_times(&tree, started)
}

struct Job<'a> {
    recipe: &'a Recipe,
    /// Directory that everything is written below.
    below: &'a Path,
    deadline: Instant,
    progress: &'a mut dyn FnMut(&str),
}

impl Job<'_> {
    fn sources(&self, options: &BuildOptions) -> Result<String, Error> {
        let base = &self.recipe.base;
        let found = apt::sources(Path::new("/etc/apt"), &base.suite, &base.components, options.mirror.as_deref())?;
        if found.is_empty() {
            let reason = format!(
                "this host's apt has no source for suite `{}`; add one below /etc/apt, or name another suite",
                base.suite
            );
            return Err(self.failed(reason, []));
        }
        Ok(found.iter().map(|source| source.line() + "\n").collect())
    }

    /// How the host's apt reaches its mirrors. Without `apt-config` there is
    /// nothing to take over.
    fn apt_settings(&mut self) -> Result<String, Error> {
        let Ok(program) = find("apt-config", "apt") else { return Ok(String::new()) };
        let output = command(&program).arg("dump").stderr(Stdio::null()).output();
        let output = output.map_err(Error::io("run", &program))?;
        let dump = String::from_utf8_lossy(&output.stdout);
        let kept = apt::access_settings(&dump);
        Ok(kept.iter().map(|line| format!("{line}\n")).collect::<String>() + "Apt::Install-Recommends \"false\";\n")
    }

    fn bootstrap(&mut self, scratch: &Scratch, sources: &Path, settings: &Path) -> Result<(), Error> {
        let recipe = self.recipe;
        let mmdebstrap = find("mmdebstrap", "mmdebstrap")?;
        let mut command = contained(&[])?;
        command
            .arg(mmdebstrap)
            .args(["--mode=root", "--format=directory", "--variant=minbase"])
            .arg(format!("--components={}", recipe.base.components.join(",")))
            .arg({
                let mut option = std::ffi::OsString::from("--aptopt=");
                option.push(settings);
                option
            })
            .args(recipe.exclude.iter().map(|pattern| format!("--dpkgopt=path-exclude={pattern}")));
        if !recipe.packages.is_empty() {
            command.arg(format!("--include={}", recipe.packages.join(",")));
        }
        command.arg(&recipe.base.suite).arg(scratch.tree()).arg(sources).env("TMPDIR", scratch.dir());
        self.run(command, "mmdebstrap")
    }

    /// Runs a program of the tree in it, without a network and without what
    /// leads out of it.
    fn run_inside(&mut self, tree: &Path, argv: &[String]) -> Result<(), Error> {
        let mut command = contained(&["--net"])?;
        // One program enters the tree and gives up the rights for that, before
        // anything of the tree runs.
        let mut root = std::ffi::OsString::from("--chroot=");
        root.push(tree);
        command.arg(find("capsh", "libcap2-bin")?).arg(root);
        command.args(["--no-new-privs", &format!("--drop={}", NOT_IN_A_TREE.join(",")), "--shell=/usr/bin/env", "--"]);
        command.args(argv).env_remove("SOURCE_DATE_EPOCH");
        let name = argv.first().map_or("", String::as_str);
        self.run(command, name)
    }

    fn run(&mut self, mut command: Command, name: &str) -> Result<(), Error> {
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn();
        let mut child = Running(child.map_err(Error::io("run", command.get_program()))?);
        let (send, lines) = mpsc::channel();
        if let Some(stderr) = child.0.stderr.take() {
            let read = move || {
                for line in BufReader::new(stderr).split(b'\n').map_while(Result::ok) {
                    if send.send(String::from_utf8_lossy(&line).trim_end().to_owned()).is_err() {
                        break;
                    }
                }
            };
            thread::Builder::new().name("build-output".to_owned()).spawn(read).map_err(Error::io("watch", name))?;
        }
        let mut output = VecDeque::new();
        let mut told = Told::default();
        loop {
            match lines.recv_timeout(self.deadline.saturating_duration_since(Instant::now())) {
                Ok(line) if line.is_empty() => {}
                Ok(line) => {
                    let line = without_credentials(&line);
                    told.hear(&line);
                    (self.progress)(&line);
                    if output.len() == OUTPUT_LINES {
                        output.pop_front();
                    }
                    output.push_back(line);
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    return Err(self.failed(format!("{name} did not end in time"), output));
                }
            }
        }
        match child.wait(self.deadline).map_err(Error::io("wait for", name))? {
            Some(status) if status.success() => Ok(()),
            Some(_) if told.no_space => Err(Error::NoSpace { op: "build below", path: self.below.to_path_buf() }),
            Some(status) => Err(match told.no_package {
                Some(package) => Error::NoSuchPackage {
                    flavour: self.recipe.name.clone(),
                    package,
                    suite: self.recipe.base.suite.clone(),
                },
                None => {
                    let said = told.error.or_else(|| output.back().cloned()).unwrap_or_else(|| status.to_string());
                    self.failed(format!("{name} failed: {said}"), output)
                }
            }),
            None => Err(self.failed(format!("{name} did not end in time"), output)),
        }
    }

    fn failed(&self, reason: String, output: impl IntoIterator<Item = String>) -> Error {
        Error::Build { flavour: self.recipe.name.clone(), reason, output: output.into_iter().collect() }
    }
}

/// What a program's output says about why it failed.
#[derive(Debug, Default)]
struct Told {
    no_package: Option<String>,
    no_space: bool,
    error: Option<String>,
}

impl Told {
    fn hear(&mut self, line: &str) {
        let package = line.split_once("Unable to locate package ").map(|(_, rest)| rest).or_else(|| {
            line.split_once("E: Package '").and_then(|(_, rest)| rest.split_once("' has no ")).map(|(p, _)| p)
        });
        if let Some(package) = package
            && self.no_package.is_none()
        {
            self.no_package = Some(package.trim().to_owned());
        }
        // Texts of strerror(3) for ENOSPC and of apt before it starts.
        self.no_space |= line.contains("No space left on device") || line.contains("enough free space");
        if let Some(error) = line.trim_start().strip_prefix("E: ")
            && self.error.is_none()
        {
            self.error = Some(error.to_owned());
        }
    }
}

/// A child that does not outlive us.
struct Running(Child);

impl Running {
    /// Waits until it has ended; `None` when it has not by then.
    fn wait(&mut self, deadline: Instant) -> io::Result<Option<ExitStatus>> {
        let pid = i32::try_from(self.0.id()).ok().and_then(rustix::process::Pid::from_raw);
        let pidfd =
            rustix::process::pidfd_open(pid.ok_or(io::ErrorKind::InvalidInput)?, rustix::process::PidfdFlags::empty())?;
        loop {
            if let Some(status) = self.0.try_wait()? {
                return Ok(Some(status));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            let timeout = rustix::time::Timespec::try_from(left).map_err(|_| io::ErrorKind::InvalidInput)?;
            let mut fds = [PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN)];
            match poll(&mut fds, Some(&timeout)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if matches!(self.0.try_wait(), Ok(Some(_))) {
            return;
        }
        if let Err(error) = self.0.kill().and_then(|()| self.0.wait()) {
            tracing::warn!(%error, "a build may still be running");
        }
    }
}

/// What no part of a build needs: to change the kernel, its clock and its log, to
/// reach devices past their drivers, to look into others.
const NOT_IN_A_BUILD: &[&str] = &[
    "-sys_module",
    "-sys_rawio",
    "-sys_boot",
    "-sys_time",
    "-sys_ptrace",
    "-sys_pacct",
    "-syslog",
    "-mac_admin",
    "-mac_override",
    "-audit_control",
    "-wake_alarm",
    "-block_suspend",
];

/// What a program of a tree does not need besides, and would get out with: other
/// roots and mounts, devices, files by their number.
const NOT_IN_A_TREE: &[&str] = &[
    "cap_sys_admin",
    "cap_sys_chroot",
    "cap_mknod",
    "cap_dac_read_search",
    "cap_net_admin",
    "cap_net_raw",
    "cap_sys_resource",
    "cap_linux_immutable",
    "cap_setpcap",
];

/// A command in namespaces of its own, which dies with all its children when it
/// is killed or when we are: what it mounts is in no other mount table, what it
/// names is not the host's, and nothing goes on writing after a crash.
fn contained(options: &[&str]) -> Result<Command, Error> {
    let mut command = command(&find("setpriv", "util-linux")?);
    command.args(["--pdeathsig", "KILL", "--bounding-set", &NOT_IN_A_BUILD.join(",")]);
    command.arg("--").arg(find("unshare", "util-linux")?);
    command.args(["--mount", "--propagation=private", "--pid", "--fork", "--kill-child=SIGKILL"]);
    command.args(["--ipc", "--uts", "--cgroup"]);
    // A tree's own /proc stays what it is: an empty directory.
    if options.is_empty() {
        command.arg("--mount-proc");
    }
    command.args(options).arg("--");
    Ok(command)
}

fn command(program: &Path) -> Command {
    let mut command = Command::new(program);
    command
        .env_clear()
        .env("PATH", PATH.join(":"))
        .env("LC_ALL", "C.UTF-8")
        .env("HOME", "/nonexistent")
        .env("DEBIAN_FRONTEND", "noninteractive")
        .env("SOURCE_DATE_EPOCH", SOURCE_DATE_EPOCH_S.to_string());
    command
}

fn find(program: &str, package: &str) -> Result<PathBuf, Error> {
    let found = PATH.iter().map(|dir| Path::new(dir).join(program)).find(|path| path.is_file());
    found.ok_or_else(|| Error::Unsupported {
        op: "build images",
        missing: Missing::Program(format!("{program} (package {package})")),
    })
}

/// Whether the programs that build images are there.
pub(crate) fn support() -> Support {
    let programs =
        [("mmdebstrap", "mmdebstrap"), ("setpriv", "util-linux"), ("unshare", "util-linux"), ("capsh", "libcap2-bin")];
    match programs.iter().find_map(|(program, package)| find(program, package).err()) {
        Some(Error::Unsupported { missing, .. }) => Support::No(missing),
        _ => Support::Yes,
    }
}

/// Sources and proxies may hold a password: neither arguments nor others see it.
fn write_private(path: &Path, text: &str) -> Result<(), Error> {
    let file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    file.and_then(|mut file| file.write_all(text.as_bytes())).map_err(Error::io("write", path))
}

/// A line without what stands between `//` and `@` in an address.
fn without_credentials(line: &str) -> String {
    let mut clean = String::with_capacity(line.len());
    let mut rest = line;
    while let Some((before, after)) = rest.split_once("//") {
        clean.push_str(before);
        clean.push_str("//");
        let host = after.find(['/', ' ', '"', '\'']).unwrap_or(after.len());
        rest = match after.get(..host).and_then(|authority| authority.rfind('@')) {
            Some(at) => after.get(at + 1..).unwrap_or_default(),
            None => after,
        };
    }
    clean + rest
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use qvd_testkit::{Need, copy_program, privileged};

    use super::*;

    /// Each line tries a way out, and says which one it was when that worked.
    const WAYS_OUT: &str = r#"
        my ($out, $jail, $disk, $none, $kind, $time, $no) = ('', '/jail', '/disk', 'none', 'tmpfs', pack('qq', 1, 0), 'x');
        mkdir $jail; opendir(my $top, '/');
        $out .= 'chroot ' if chroot($jail);
        # mknod, mount, reboot, clock_settime, init_module: by their numbers on x86_64.
        $out .= 'device ' if syscall(133, $disk, 060000 | 0600, 0x800) == 0;
        $out .= 'mount ' if syscall(165, $none, $jail, $kind, 0, 0) == 0;
        $out .= 'reboot ' if syscall(169, 0xfee1dead, 672274793, 0, 0) == 0;
        $out .= 'clock ' if syscall(227, 0, $time) == 0;
        $out .= 'module ' if syscall(175, $no, 1, $no) == 0;
        $out .= 'network ' if -e '/sys/class/net/eth0';
        $out .= 'signal ' if kill(0, 2) && getppid() > 1;
        die "ways out: $out\n" if $out;
        open(my $mark, '>', '/worked') or die "the tree itself cannot be written\n";
        chown(1000, 1000, '/worked') or die "files cannot be given away\n";
    "#;

    #[test]
    fn a_program_of_a_tree_works_in_it_and_does_not_get_out() {
        privileged(&[Need::Root, Need::Program("capsh"), Need::Program("unshare")], || {
            let dir = tempfile::tempdir().unwrap();
            let tree = dir.path().join("tree");
            for program in ["/usr/bin/env", "/usr/bin/perl"] {
                copy_program(program, &tree);
            }
            let recipe = r#"
                name = "hostile"
                packages = []
                base = { distribution = "debian", suite = "bookworm" }
                user = { name = "user", uid = 1000, gid = 1000 }
            "#;
            let recipe = Recipe::parse(recipe).unwrap();
            let deadline = Instant::now() + Duration::from_secs(60);
            let mut job = Job { recipe: &recipe, below: dir.path(), deadline, progress: &mut |_| () };
            let run = |argv: &[&str]| argv.iter().map(|&word| word.to_owned()).collect::<Vec<_>>();
            fs::write(tree.join("ways-out"), WAYS_OUT).unwrap();
            job.run_inside(&tree, &run(&["perl", "/ways-out"])).unwrap();
            assert!(tree.join("worked").exists() && !tree.join("disk").exists());
            let error = job.run_inside(&tree, &run(&["no-such-program"])).unwrap_err().to_string();
            assert!(error.contains("no-such-program"), "{error}");
        });
    }

    #[test]
    fn credentials_do_not_reach_logs() {
        for (line, clean) in [
            ("Err http://u:p@h/x 404", "Err http://h/x 404"),
            ("a http://h/x@y b", "a http://h/x@y b"),
            ("http://u@h and https://v:w@i/", "http://h and https://i/"),
            ("// @", "// @"),
        ] {
            assert_eq!(without_credentials(line), clean);
        }
    }

    #[test]
    fn the_cause_is_found_in_what_a_program_says() {
        let mut told = Told::default();
        told.hear("I: running apt-get update...");
        told.hear("E: Unable to locate package no-such-thing");
        told.hear("E: apt-get failed");
        assert_eq!(told.no_package.as_deref(), Some("no-such-thing"));
        assert!(!told.no_space);
        let mut told = Told::default();
        told.hear("E: Package 'gone' has no installation candidate");
        told.hear("dpkg: error: write: No space left on device");
        assert_eq!(told.no_package.as_deref(), Some("gone"));
        assert!(told.no_space);
    }
}
