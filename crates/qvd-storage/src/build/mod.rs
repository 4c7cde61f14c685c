//! From a recipe to a tree: packages by `mmdebstrap`, then what the recipe
//! adds and takes away.

mod command;
mod running;
mod sandbox;

use std::{
    collections::VecDeque,
    ffi::OsString,
    fs,
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::mpsc,
    time::{Duration, Instant, SystemTime},
};

pub(crate) use command::support;
use command::{command, find};
use running::{Running, Told, is_of_the_sandbox, without_credentials};
use sandbox::Sandbox;

use crate::{Error, Recipe, apt, image::Scratch, trash::Trash, treeedit};

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

/// Lines of a program's output that an error carries.
const OUTPUT_LINES: usize = 12;

/// What fetches packages: those that every system needs first, then, as if these
/// were installed, all others. They are the sets that mmdebstrap installs of `minbase`.
const FETCH: &str = r#"
set -eu
export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG"
base="?or(?archive(^$SUITE\$),?codename(^$SUITE\$)),?architecture($(dpkg --print-architecture))"
apt-get --yes --download-only install "?narrow($base,?essential)" >&2
for deb in "$1"/var/cache/apt/archives/*.deb; do
    [ -e "$deb" ] || continue
    dpkg-deb --field "$deb"
    printf 'Status: install ok installed\n\n'
done >"$1/tmp/essential"
apt-get --yes --download-only -o Dir::State::Status="$1/tmp/essential" install \
    "?narrow($base,?and(?priority(required),?not(?essential)))" $PACKAGES >&2
"#;

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
    let place = Place::new(scratch.dir(), scratch.tree())?;
    write_private(&place.sources, &job.sources(options)?)?;
    write_private(&place.settings, &job.apt_settings()?)?;
    job.fetch(&place)?;
    job.install(&place)?;
    for file in [&place.sources, &place.settings] {
        fs::remove_file(file).map_err(Error::io("remove", file))?;
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
    for argv in recipe.locale_maker().iter().chain(&recipe.run) {
        job.run_inside(&place, argv)?;
    }
    treeedit::settle_times(&tree, started)?;
    job.expect_within_limits(treeedit::measure(&tree)?)
}

/// Where a tree is built, and what it is built from.
struct Place<'a> {
    below: &'a Path,
    tree: PathBuf,
    sources: PathBuf,
    settings: PathBuf,
    /// Where the root of what is confined is put together.
    top: PathBuf,
}

impl<'a> Place<'a> {
    fn new(below: &'a Path, tree: PathBuf) -> Result<Self, Error> {
        let top = below.join("sandbox");
        fs::create_dir(&top).map_err(Error::io("make", &top))?;
        Ok(Self { below, tree, sources: below.join("sources.list"), settings: below.join("apt.conf"), top })
    }

    fn sandbox(&self, files: Vec<PathBuf>) -> Sandbox {
        Sandbox { at: self.top.clone(), tree: self.tree.clone(), files }
    }

    /// What mmdebstrap has to know each time.
    fn describe(&self, recipe: &Recipe, command: &mut Command) {
        let mut settings = OsString::from("--aptopt=");
        settings.push(&self.settings);
        command
            .args(["--mode=root", "--format=directory"])
            .arg(format!("--components={}", recipe.base.components.join(",")))
            .arg(settings)
            .args(recipe.exclude.iter().map(|pattern| format!("--dpkgopt=path-exclude={pattern}")))
            .arg(&recipe.base.suite)
            .args([&self.tree, &self.sources])
            .env("TMPDIR", self.below);
    }
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

    /// Fetches the packages. Nothing of them runs yet.
    fn fetch(&mut self, place: &Place<'_>) -> Result<(), Error> {
        let mut command = command::fetching()?;
        command.arg(find("mmdebstrap", "mmdebstrap")?).arg("--variant=custom");
        command.args(["--skip=check/empty,chroot/mount,cleanup", &format!("--extract-hook={FETCH}")]);
        command.env("SUITE", &self.recipe.base.suite).env("PACKAGES", self.packages().join(" "));
        place.describe(self.recipe, &mut command);
        self.run(Running::spawn(&mut command)?, "mmdebstrap")
    }

    /// Lets the packages install themselves: their programs run with the rights
    /// of root over the tree, and over nothing else.
    fn install(&mut self, place: &Place<'_>) -> Result<(), Error> {
        let mut command = command::installing(&place.tree)?;
        command.arg(find("mmdebstrap", "mmdebstrap")?).arg("--variant=minbase");
        command.arg("--skip=check/empty,check/signed-by,chroot/mount");
        let packages = self.packages();
        if !packages.is_empty() {
            command.arg(format!("--include={}", packages.join(",")));
        }
        place.describe(self.recipe, &mut command);
        let files = vec![place.sources.clone(), place.settings.clone()];
        self.run(Running::spawn_in(&place.sandbox(files), command)?, "mmdebstrap")
    }

    fn packages(&self) -> Vec<&str> {
        self.recipe.packages.iter().map(String::as_str).collect()
    }

    /// Runs a program of the tree in it.
    fn run_inside(&mut self, place: &Place<'_>, argv: &[String]) -> Result<(), Error> {
        let mut command = command::inside(&place.tree)?;
        command.args(argv);
        let name = argv.first().map_or("", String::as_str);
        self.run(Running::spawn_in(&place.sandbox(Vec::new()), command)?, name)
    }

    /// Waits for a program and passes on what it says.
    fn run(&mut self, mut child: Running, name: &str) -> Result<(), Error> {
        let lines = child.lines().map_err(Error::io("watch", name))?;
        let mut output = VecDeque::new();
        let mut told = Told::default();
        loop {
            match lines.recv_timeout(self.deadline.saturating_duration_since(Instant::now())) {
                Ok(line) if line.is_empty() || is_of_the_sandbox(&line) => {}
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

    fn expect_within_limits(&self, (entries, size_bytes): (u64, u64)) -> Result<(), Error> {
        let limits = self.recipe.limits;
        let found = match (limits.entries, limits.size) {
            (Some(most), _) if entries > most => format!("{entries} entries, more than the {most}"),
            (_, Some(most)) if size_bytes > most.get() => format!("{size_bytes} bytes, more than the {}", most.get()),
            _ => return Ok(()),
        };
        Err(self.failed(format!("the tree has {found} that its recipe allows"), []))
    }

    fn failed(&self, reason: String, output: impl IntoIterator<Item = String>) -> Error {
        Error::Build { flavour: self.recipe.name.clone(), reason, output: output.into_iter().collect() }
    }
}

/// Sources and proxies may hold a password: neither arguments nor others see it.
fn write_private(path: &Path, text: &str) -> Result<(), Error> {
    let file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    file.and_then(|mut file| file.write_all(text.as_bytes())).map_err(Error::io("write", path))
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
            let place = Place::new(dir.path(), tree.clone()).unwrap();
            fs::write(tree.join("ways-out"), WAYS_OUT).unwrap();
            job.run_inside(&place, &run(&["perl", "/ways-out"])).unwrap();
            assert!(tree.join("worked").exists() && !tree.join("disk").exists());
            let error = job.run_inside(&place, &run(&["no-such-program"])).unwrap_err().to_string();
            assert!(error.contains("no-such-program"), "{error}");
        });
    }
}
