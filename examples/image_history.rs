//! Images with history, from end to end on a small tree: commits, tags, diff,
//! mounts that share memory, transfer, damage and repair, hostile archives.
//!
//! `cargo run --release --example image_history`; as root it also mounts.
#![allow(clippy::print_stdout)]

use std::{
    fs,
    io::Read,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, Result, ensure};
use qvd_core::{FlavourName, Tag};
use qvd_storage::{
    Error, Repository,
    repository::{
        CommitId, Directory, Expect, Keep, NewCommit, Reference, Wanted,
        archive::{Format, IMPORT_MAX_BYTES},
    },
};
use qvd_sys::map::SharedMap;

/// Scripts that write an archive which was made to do harm.
const HOSTILE: [(&str, &str); 6] = [
    (
        "mkdir a b b/x; ln -s /etc a/x; touch b/x/passwd; tar -cf t -C a x; tar -rf t -C b x/passwd; cat t",
        "a file through a link",
    ),
    ("touch x; tar -cPf - --transform 's,x,../../x,' x", "a name that leads out"),
    ("touch x; tar -cPf - --transform 's,x,/etc/x,' x", "an absolute name"),
    ("touch x; ln x y; tar -cPf - --transform 'flags=h;s,x,/etc/shadow,' x y", "a hard link to a file of the host"),
    ("truncate -s 1G x; tar -cf - x | gzip -1", "a bomb"),
    ("head -c 3000 /dev/urandom", "noise"),
];
const HOSTILE_MAX_BYTES: u64 = 512 << 20;

fn main() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let source = dir.path().join("source");
    make_tree(&source)?;
    let repository = Repository::open(&dir.path().join("repository"))?;
    let flavour: FlavourName = "tiny".parse()?;

    step("import: two versions of a tree");
    let one = commit(&repository, &flavour, &source, "a tool and a greeting")?;
    fs::write(source.join("etc/motd"), "good morning\n")?;
    fs::write(source.join("etc/new"), "new\n")?;
    fs::remove_file(source.join("etc/old"))?;
    dpkg(&source, &[("bash", "5.2"), ("more", "3.0")])?;
    let two = commit(&repository, &flavour, &source, "another greeting, newer packages")?;

    step("log: newest first");
    for entry in repository.log(two)? {
        let tags: Vec<&str> = entry.tags.iter().map(Tag::as_str).collect();
        println!("  {} [{}] {}: {}", short(entry.id), tags.join(", "), entry.author, entry.message);
    }

    step("diff: files by kind of change, packages by version");
    let diff = repository.diff(&repository.commit(one)?, &repository.commit(two)?)?;
    for file in &diff.files {
        println!("  {:?} {}", file.changes, file.path.display());
    }
    for package in &diff.packages {
        println!("  {} {:?} -> {:?}", package.name, package.from, package.to);
    }
    ensure!(diff.packages.len() == 3);

    step("tags: compare-and-set, with a reflog");
    let default = Tag::default_tag();
    repository.move_tag(&flavour, &default, Expect::At(Some(one)), Some(two), ("ana", "tested"))?;
    let late = repository.move_tag(&flavour, &default, Expect::At(Some(one)), Some(one), ("ben", "too late"));
    println!("  a second who expects it at the old place: {}", late.err().context("it was moved twice")?);
    for one in repository.reflog(&flavour, &default)? {
        println!("  {:?} -> {:?}: {}, {}", one.from.map(short), one.to.map(short), one.who, one.why);
    }
    let back = repository.revert(one, "ana", "the greeting was better before")?;
    println!("  reverted as {}: the same content, a new version", short(back));

    if rustix::process::geteuid().is_root() {
        mounts(&repository, one, two, &source, dir.path())?;
    } else {
        println!("\nmounts need root; they are left out");
    }

    step("export: what other tools read, and the same tree when it comes back");
    for name in ["tiny.tar.zst", "tiny.oci"] {
        let to = dir.path().join(name);
        repository.export(two, &to, Format::of(&to))?;
        let staging = repository.stage()?;
        let same = staging.import(&to, IMPORT_MAX_BYTES)?.encode().0
            == repository.tree_of(&repository.commit(two)?)?.encode().0;
        println!("  {name}: {} bytes; the same tree again: {same}", fs::metadata(&to)?.len());
        ensure!(same);
    }

    step("hostile archives: refused with what and why");
    for (script, name) in HOSTILE {
        let archive = archive(dir.path(), script)?;
        match repository.stage()?.import(&archive, HOSTILE_MAX_BYTES) {
            Err(Error::Import { reason, .. }) => println!("  {name}: {reason}"),
            other => anyhow::bail!("{name}: it was not refused: {other:?}"),
        }
    }

    step("push to another repository: only what is missing travels");
    let there = Repository::open(&dir.path().join("there"))?;
    let wanted = Wanted { flavour: flavour.clone(), tag: None, force: false };
    let here = Directory::new(Repository::open(repository.dir())?);
    let first = there.pull(&here, &wanted, "ana", &mut |_| {})?;
    println!("  at first: {} commits, {} objects, {} bytes", first.commits, first.objects, first.wire_bytes);
    fs::write(source.join("etc/motd"), "good evening\n")?;
    commit(&repository, &flavour, &source, "one file changed")?;
    let second = there.pull(&here, &wanted, "ana", &mut |_| {})?;
    println!("  after a change: {} commits, {} objects, {} bytes", second.commits, second.objects, second.wire_bytes);
    ensure!(second.objects == 1);

    step("fsck: a flipped bit is found, and repaired from the other");
    let object = first_file(&there.dir().join("objects"))?;
    let mut bytes = fs::read(&object)?;
    bytes.first_mut().context("an empty object")?.clone_from(&b'!');
    fs::remove_file(&object)?;
    fs::write(&object, bytes)?;
    for problem in there.fsck(None)?.problems {
        println!("  {}: {}", problem.what, problem.reason);
    }
    let repaired = there.fsck(Some(&repository))?;
    println!("  repaired: {}; sound now: {}", repaired.is_sound(), there.fsck(None)?.problems.is_empty());
    ensure!(repaired.is_sound());

    step("gc: what no tag leads to goes, once the reflog forgets it");
    for tag in there.tags(&flavour)?.into_keys() {
        there.move_tag(&flavour, &tag, Expect::Anything, Some(one), ("ana", "back to the first"))?;
    }
    let recent = there.gc(&Keep::default(), true)?;
    println!("  within a month of the move: {} commits would go", recent.commits);
    let used = there.gc(&Keep { reflog: Duration::ZERO, commits: vec![two] }, false)?;
    println!("  with a desktop on the second, nothing remembered: {} go, {} stay", used.commits, used.kept_commits);
    ensure!((recent.commits, used.kept_commits) == (0, 2) && used.commits > 0);
    let last = there.gc(&Keep { reflog: Duration::ZERO, commits: Vec::new() }, false)?;
    println!("  once the desktop has ended: {} goes, with {} objects of its own", last.commits, last.objects);
    ensure!(there.fsck(None)?.is_sound() && there.commits()? == [one]);
    println!("\ndone");
    Ok(())
}

/// What only root can see: mounting costs the same whatever is in it, and two
/// versions share the memory of what is equal in both.
fn mounts(repository: &Repository, one: CommitId, two: CommitId, source: &Path, dir: &Path) -> Result<()> {
    step("mount: constant time, shared page cache");
    let open = |id| -> Result<OwnedFd> {
        let started = Instant::now();
        let mount = repository.base(id)?.open()?;
        println!("  {} mounted in {:.2} ms", short(id), started.elapsed().as_secs_f64() * 1e3);
        Ok(mount)
    };
    let (first, second) = (open(one)?, open(two)?);
    println!("  motd: {:?} and {:?}", read(&below(&first, "etc/motd"))?, read(&below(&second, "etc/motd"))?);
    let copies = [dir.join("copy-1"), dir.join("copy-2")];
    for copy in &copies {
        ensure!(Command::new("cp").arg("-a").arg("--reflink=never").arg(source).arg(copy).status()?.success());
    }
    let shared = [below(&first, "usr/bin/tool"), below(&second, "usr/bin/tool")];
    let apart = copies.map(|copy| copy.join("usr/bin/tool"));
    for (name, [read_first, look_at]) in [("two versions", &shared), ("two plain copies", &apart)] {
        for path in [read_first, look_at] {
            forget(path)?;
        }
        let before = resident(look_at)?;
        fs::read(read_first)?;
        println!(
            "  {name}: the second has {before} bytes in memory, and {} once the first was read",
            resident(look_at)?
        );
        let (rss, pss) = text_memory(read_first, look_at)?;
        println!("  {name}: running both, the program's code is {rss} KiB resident, {pss} KiB proportional");
    }
    Ok(())
}

/// Code of a program in memory when two processes run it: resident, and
/// divided by who shares it.
fn text_memory(one: &Path, other: &Path) -> Result<(u64, u64)> {
    struct Running(Child);
    impl Drop for Running {
        fn drop(&mut self) {
            drop(self.0.kill().and_then(|()| self.0.wait()));
        }
    }
    let run = |path: &Path| -> Result<Running> {
        let child =
            Command::new(path).arg("-c").arg("echo; read x").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut running = Running(child.with_context(|| format!("cannot run {}", path.display()))?);
        // It runs once it has said something.
        running.0.stdout.as_mut().context("no output")?.read_exact(&mut [0])?;
        Ok(running)
    };
    let (first, _second) = (run(one)?, run(other)?);
    let maps = fs::read_to_string(format!("/proc/{}/smaps", first.0.id()))?;
    let mut in_text = false;
    let (mut rss, mut pss) = (0, 0);
    for line in maps.lines() {
        if let Some((_, rest)) = line.split_once(' ').filter(|(range, _)| range.contains('-')) {
            in_text = rest.starts_with("r-xp") && rest.ends_with("/tool");
        }
        let kib = || line.split_whitespace().nth(1).and_then(|number| number.parse::<u64>().ok()).unwrap_or(0);
        match line.split(':').next() {
            Some("Rss") if in_text => rss += kib(),
            Some("Pss") if in_text => pss += kib(),
            _ => {}
        }
    }
    Ok((rss, pss))
}

/// Lets the kernel drop a file from its page cache.
fn forget(path: &Path) -> Result<()> {
    let file = fs::File::open(path)?;
    file.sync_all()?;
    rustix::fs::fadvise(file.as_fd(), 0, None, rustix::fs::Advice::DontNeed)?;
    Ok(())
}

/// Bytes of a file in the page cache, by `mincore`.
fn resident(path: &Path) -> Result<usize> {
    let file = fs::File::open(path)?;
    let bytes = usize::try_from(file.metadata()?.len())?;
    Ok(SharedMap::new(file.as_fd(), bytes, false)?.resident_bytes()?)
}

fn make_tree(at: &Path) -> Result<()> {
    for dir in ["etc", "usr/bin", "var/lib/dpkg"] {
        fs::create_dir_all(at.join(dir))?;
    }
    fs::write(at.join("etc/motd"), "hello\n")?;
    fs::write(at.join("etc/old"), "old\n")?;
    fs::copy("/bin/sh", at.join("usr/bin/tool"))?;
    dpkg(at, &[("bash", "5.1"), ("tool", "1.0")])
}

fn dpkg(at: &Path, packages: &[(&str, &str)]) -> Result<()> {
    let paragraph = |(name, version): &(&str, &str)| {
        format!("Package: {name}\nStatus: install ok installed\nArchitecture: amd64\nVersion: {version}\n\n")
    };
    Ok(fs::write(at.join("var/lib/dpkg/status"), packages.iter().map(paragraph).collect::<String>())?)
}

fn commit(repository: &Repository, flavour: &FlavourName, source: &Path, message: &str) -> Result<CommitId> {
    let staging = repository.stage()?;
    let tree = staging.import(source, IMPORT_MAX_BYTES)?;
    staging.settle()?;
    let new = NewCommit {
        config: repository.config_for(flavour, &tree)?,
        author: "ana".to_owned(),
        message: message.to_owned(),
        time: SystemTime::now(),
        recipe: None,
        publish: false,
    };
    let id = repository.commit_tree(&staging, &tree, new)?;
    println!("  {} {message}: {} entries, {} bytes", short(id), tree.entries().len(), tree.size_bytes());
    ensure!(repository.resolve(&Reference { flavour: flavour.clone(), revision: None })? == id);
    Ok(id)
}

/// What a script writes to its standard output, run in a directory of its own.
fn archive(dir: &Path, script: &str) -> Result<PathBuf> {
    let scratch = tempfile::tempdir_in(dir)?;
    let output = Command::new("sh").args(["-c", script]).current_dir(scratch.path()).output()?;
    let path = dir.join("hostile");
    fs::write(&path, output.stdout)?;
    Ok(path)
}

fn first_file(dir: &Path) -> Result<PathBuf> {
    let mut at = dir.to_path_buf();
    while at.is_dir() {
        at = fs::read_dir(&at)?.next().context("an empty directory")??.path();
    }
    Ok(at)
}

fn below(mount: &OwnedFd, name: &str) -> PathBuf {
    // Programs that are told of it have another self.
    format!("/proc/{}/fd/{}/{name}", std::process::id(), mount.as_raw_fd()).into()
}

fn read(path: &Path) -> Result<String> {
    Ok(fs::read_to_string(path)?.trim().to_owned())
}

fn short(id: CommitId) -> String {
    id.hex().chars().take(12).collect()
}

fn step(what: &str) {
    println!("\n{what}");
}
