//! The history of images: through the daemon when one runs on them, else on the
//! repository itself.

use std::{
    fs, io,
    os::unix::net::UnixStream,
    path::Path,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::Context;
use qvd_core::FlavourName;
use qvd_gateway::{
    api::Client,
    images::{
        Compare, Export, Exported, Fsck, Gc, ImageCall, Log, News, PutTag, Reflog, Remove, RemoveTag, Revert, Show,
        Shown, Tags,
    },
};
use qvd_storage::{
    Repository,
    repository::{Change, Checked, CommitId, Content, Diff, Logged, Reference, Rollout},
};

use crate::{
    cli::{Image, Import},
    failure::{Exit, Refusal},
    graph,
    image::read_recipe,
    output::{Output, Progress, age, count, one_line},
    paths::Paths,
    remote, signing, transfer,
};

/// Where images are.
pub(crate) enum Images {
    /// In a repository that nobody serves.
    Here(Repository),
    /// With a daemon.
    There(Client),
}

impl Images {
    /// Those of the daemon that was named or runs on this installation, or the
    /// installation's own; made if need be.
    fn of(paths: &Paths, server: Option<&Path>, make: bool) -> anyhow::Result<Self> {
        if server.is_some() || UnixStream::connect(paths.socket()).is_ok() {
            return Ok(Self::There(remote::connect(paths, server)?));
        }
        let at = paths.root.join("images");
        // What only looks must not make a repository where there is none.
        let repository = if make { Repository::open(&at).map_err(Into::into) } else { existing(&at) };
        let repository = repository.with_context(|| format!("cannot open the images of `{}`", paths.root.display()));
        Ok(Self::Here(repository?))
    }

    /// Does something with them.
    pub(crate) fn call<C: ImageCall + Sync>(&self, call: C, output: &Output) -> anyhow::Result<C::Answer> {
        let bar = C::LONG.then(|| Bar::new(output));
        let mut tell = |news: News| bar.iter().for_each(|bar| bar.tell(&news));
        match self {
            Self::Here(repository) => Ok(call.carry_out(repository, &mut tell)?),
            Self::There(client) => Ok(remote::wait(client.image(&call, &mut tell))??),
        }
    }
}

/// Carries out a command about the history of images.
pub(crate) fn run(paths: &Paths, server: Option<&Path>, command: Image, output: &Output) -> anyhow::Result<()> {
    match &command {
        Image::Key { file } => return signing::key(file, output),
        // Secret keys stay with whoever has them.
        Image::Sign { .. } | Image::Policy { .. } => {
            if let Some(server) = server {
                let what = format!("cannot do this through `{}`: it works on the images of --root", server.display());
                return Err(Refusal::new(Exit::Usage, what).into());
            }
        }
        _ => {}
    }
    let makes = matches!(command, Image::Import(_) | Image::Pull(_) | Image::Clone { .. });
    let at = || Images::of(paths, server, makes);
    match command {
        // Done elsewhere.
        Image::Build { .. } | Image::Ls | Image::Key { .. } | Image::Bisect(_) | Image::Commit { .. } => Ok(()),
        Image::Import(import) => show_made(&at()?.call(imported(import)?, output)?, output),
        Image::Log { image } => output.result(&at()?.call(Log { image }, output)?, |log| graph::draw(log)),
        Image::Show { image } => show(&at()?.call(Show { image }, output)?, output),
        Image::Diff { from, to } => output.result(&at()?.call(Compare { from, to }, output)?, show_diff),
        Image::Tag { flavour, name: None, .. } => {
            let tags = at()?.call(Tags { flavour }, output)?;
            output.table(&tags, ["TAG", "COMMIT", "STEPS"], |tagged| {
                [tagged.tag.to_string(), short(tagged.commit), tagged.rollout.map_or_else(String::new, steps)]
            })
        }
        Image::Tag { flavour, name: Some(tag), id, message, steps } => {
            let cannot = format!("cannot put `{tag}` of {flavour}");
            let to = id.map(|id| target(&flavour, &id)).transpose().context(cannot)?;
            let put = PutTag { flavour, tag, to, author: author(), message, rollout: steps.rollout() };
            let tagged = at()?.call(put, output)?;
            output.result(&tagged, |tagged| format!("{}:{} is on {}", tagged.flavour, tagged.tag, short(tagged.commit)))
        }
        Image::Untag { flavour, name } => {
            let image = at()?.call(RemoveTag { flavour, tag: name, author: author() }, output)?;
            output.result(&image, |image| format!("{image} is no tag any more"))
        }
        Image::Reflog { image } => {
            let moves = at()?.call(Reflog { image }, output)?;
            output.table(&moves, ["AGE", "COMMIT", "WHO", "WHY"], |one| {
                let to = one.to.map_or_else(|| "removed".to_owned(), short);
                [age(one.time_unix_s), to, one.who.clone(), one.why.clone()]
            })
        }
        Image::Revert { image, message } => {
            let message = message.unwrap_or_else(|| format!("back to {image}"));
            show_made(&at()?.call(Revert { image, author: author(), message }, output)?, output)
        }
        Image::Rm { flavour } => {
            let flavour = at()?.call(Remove { flavour, author: author() }, output)?;
            output.result(&flavour, |flavour| format!("{flavour} is removed; `qvd image gc` deletes what it held"))
        }
        Image::Checkout { image, to } => {
            export(&at()?, image, &to, Some(qvd_gateway::images::ExportFormat::Dir), output)
        }
        Image::Export { image, to, format } => export(&at()?, image, &to, format.map(Into::into), output),
        Image::Sign { image, key, password_stdin } => {
            signing::sign(&local(paths)?, &image, &key, password_stdin, output)
        }
        Image::Policy { require, none } => signing::policy(&local(paths)?, &require, none, output),
        Image::Fsck { repair, access } => {
            let repair =
                repair.map(|remote| transfer::access(&remote, &access)).transpose().context("cannot repair")?;
            let repairs = repair.is_some();
            show_checked(&at()?.call(Fsck { repair }, output)?, repairs, output)
        }
        Image::Gc { dry_run, keep_days } => {
            let collected = at()?.call(Gc { dry_run, keep_days }, output)?;
            let verb = if dry_run { "would delete" } else { "deleted" };
            output.result(&collected, |c| {
                let (commits, trees) = (count(c.commits, "commit"), count(c.trees, "tree"));
                format!("{verb} {commits}, {trees}, {}: {}", count(c.objects, "object"), mib(c.bytes))
            })
        }
        Image::Push(transfer) => transfer::push(at, &transfer, output),
        Image::Pull(transfer) => transfer::pull(at, &transfer, output),
        Image::Clone { remote, access } => transfer::clone(at, &remote, &access, output),
    }
}

fn local(paths: &Paths) -> anyhow::Result<Repository> {
    existing(&paths.root.join("images"))
        .with_context(|| format!("cannot open the images of `{}`", paths.root.display()))
}

/// A repository that has to be there.
pub(crate) fn existing(at: &Path) -> anyhow::Result<Repository> {
    let none = || Refusal::new(Exit::NotFound, format!("there is no repository in `{}`", at.display()));
    find(at)?.ok_or_else(|| none().into())
}

/// The repository in a directory, if there is one.
pub(crate) fn find(at: &Path) -> anyhow::Result<Option<Repository>> {
    match fs::metadata(at.join("format")) {
        Ok(_) => Ok(Some(Repository::open(at)?)),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            let what = format!("cannot open the images in `{}`: this takes root", at.display());
            Err(Refusal::new(Exit::Unsupported, what).into())
        }
        Err(_) => Ok(None),
    }
}

/// What a command line asks to be imported.
fn imported(import: Import) -> anyhow::Result<qvd_gateway::images::Import> {
    let cannot = || format!("cannot import `{}`", import.source.display());
    Ok(qvd_gateway::images::Import {
        source: std::path::absolute(&import.source).with_context(cannot)?,
        recipe: import.recipe.as_deref().map(read_recipe).transpose().with_context(cannot)?,
        flavour: import.flavour,
        message: import.message,
        author: import.author.unwrap_or_else(author),
        disk: import.disk,
        max_bytes: import.max_size.get(),
        publish: import.publish,
    })
}

/// A commit as a person gives it after a flavour: an id, or a tag.
pub(crate) fn target(flavour: &FlavourName, text: &str) -> anyhow::Result<Reference> {
    let digits = text.strip_prefix('@').unwrap_or(text);
    let by_id = format!("{flavour}@{digits}").parse();
    match by_id {
        Ok(reference) => Ok(reference),
        Err(_) => Ok(format!("{flavour}:{text}").parse()?),
    }
}

fn show(shown: &Shown, output: &Output) -> anyhow::Result<()> {
    output.result(shown, |shown| {
        let Shown { commit, .. } = shown;
        let content = match commit.content {
            Content::Tree { id, entries, size_bytes } => format!("tree {id}, {entries} entries, {}", mib(size_bytes)),
            Content::Disk { size_bytes, .. } => format!("disk, {}", mib(size_bytes)),
            _ => "unknown".to_owned(),
        };
        let list = |items: Vec<String>| if items.is_empty() { "none".to_owned() } else { items.join(", ") };
        let lines = [
            ("commit", shown.id.to_string()),
            ("flavour", shown.flavour.to_string()),
            ("tags", list(shown.tags.iter().map(ToString::to_string).collect())),
            ("parents", list(commit.parents.iter().map(ToString::to_string).collect())),
            ("author", one_line(&commit.author)),
            ("made", format!("{} ago", age(commit.time_unix_s))),
            ("content", content),
            ("packages", shown.package_count.to_string()),
            ("recipe", commit.recipe.as_ref().map_or("none", |_| "kept with it; --json shows it").to_owned()),
            ("signed by", list(shown.signers.clone())),
            ("message", one_line(&commit.message)),
        ];
        lines.iter().map(|(name, value)| format!("{name:<10} {value}")).collect::<Vec<_>>().join("\n")
    })
}

pub(crate) fn show_diff(diff: &Diff) -> String {
    let mark = |change: &Change| match change {
        Change::Added => "added",
        Change::Removed => "removed",
        Change::Changed => "changed",
        Change::Mode => "mode",
        Change::Owner => "owner",
        Change::Xattr => "xattr",
        _ => "differs",
    };
    let blocks = diff.blocks.iter().map(|blocks| {
        let bytes = mib(blocks.changed * u64::from(blocks.block_bytes));
        format!("{} of {} blocks differ, {bytes} at most", blocks.changed, blocks.total)
    });
    let files = diff.files.iter().map(|file| {
        let how: Vec<&str> = file.changes.iter().map(mark).collect();
        format!("{:<16} {}", how.join(","), one_line(&file.path.to_string_lossy()))
    });
    let packages = diff.packages.iter().map(|package| match (&package.from, &package.to) {
        (Some(from), Some(to)) => format!("{:<16} {} {from} -> {to}", "upgraded", package.name),
        (None, Some(to)) => format!("{:<16} {} {to}", "installed", package.name),
        (from, None) => format!("{:<16} {} {}", "uninstalled", package.name, from.as_deref().unwrap_or_default()),
    });
    blocks.chain(files).chain(packages.map(|line| one_line(&line))).collect::<Vec<_>>().join("\n")
}

/// In which steps desktops get a commit.
fn steps(rollout: Rollout) -> String {
    let after = |what, after: Option<u64>| after.map(|after| format!("{what} after {after} s"));
    let first = (rollout.canary_percent < 100).then(|| format!("{} % first", rollout.canary_percent));
    [first, after("asked to leave", rollout.soft_after_s), after("stopped", rollout.hard_after_s)]
        .into_iter()
        .flatten()
        .collect::<Vec<_>>()
        .join(", ")
}

fn show_made(logged: &Logged, output: &Output) -> anyhow::Result<()> {
    output.result(logged, |logged| {
        let what = match logged.content {
            Content::Tree { entries, size_bytes, .. } => format!("{entries} entries, {}", mib(size_bytes)),
            Content::Disk { size_bytes, .. } => format!("a disk of {}", mib(size_bytes)),
            _ => "committed".to_owned(),
        };
        format!("{} {}: {what}", logged.flavour, short(logged.id))
    })
}

fn export(
    images: &Images,
    image: Reference,
    to: &Path,
    format: Option<qvd_gateway::images::ExportFormat>,
    output: &Output,
) -> anyhow::Result<()> {
    let to = std::path::absolute(to).with_context(|| format!("cannot write {image} to `{}`", to.display()))?;
    let done: Exported = images.call(Export { image, to, format }, output)?;
    output.result(&done, |done| format!("{} written to `{}`", done.image, done.to.display()))
}

fn show_checked(checked: &Checked, repairs: bool, output: &Output) -> anyhow::Result<()> {
    output.result(checked, |checked: &Checked| {
        let problems = checked.problems.iter().map(|problem| {
            let end = if problem.repaired { "; repaired" } else { "" };
            one_line(&format!("{}: {}{end}", problem.what, problem.reason))
        });
        let Checked { objects, trees, commits, tags, bytes, .. } = checked;
        let objects = format!("{} ({})", count(*objects, "object"), mib(*bytes));
        let others = [count(*trees, "tree"), count(*commits, "commit"), count(*tags, "tag")].join(", ");
        let all = format!("{objects}, {others} checked");
        problems.chain([all]).collect::<Vec<_>>().join("\n")
    })?;
    if checked.is_sound() {
        return Ok(());
    }
    let count = checked.problems.iter().filter(|problem| !problem.repaired).count();
    let remedy = if repairs { "the remote has no sound one" } else { "`--repair REMOTE` takes sound ones from there" };
    Err(Refusal::new(Exit::Failed, format!("{count} damaged or missing; {remedy}")).into())
}

/// Shows how something long goes on.
struct Bar {
    progress: Progress,
    began: Instant,
    next: Mutex<Duration>,
}

impl Bar {
    fn new(output: &Output) -> Self {
        Self { progress: output.progress(), began: Instant::now(), next: Mutex::default() }
    }

    fn tell(&self, news: &News) {
        let Some(amount) = news.amount else { return self.progress.say(&news.text) };
        let took = self.began.elapsed();
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        if took >= *next {
            *next = took + self.progress.pause();
            self.progress.amount(amount.done, amount.total, &news.text);
        }
    }
}

/// Enough of an id to tell commits apart.
pub(crate) fn short(id: CommitId) -> String {
    id.hex().chars().take(12).collect()
}

pub(crate) fn mib(bytes: u64) -> String {
    match bytes {
        0..1_048_576 => format!("{} KiB", bytes.div_ceil(1024)),
        _ => format!("{} MiB", bytes >> 20),
    }
}

/// Who runs this command, also behind `sudo`.
pub(crate) fn author() -> String {
    let of = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
    let user = of("SUDO_USER").or_else(|| of("USER")).or_else(|| of("LOGNAME"));
    let user = user.unwrap_or_else(|| match rustix::process::geteuid() {
        rustix::process::Uid::ROOT => "root".to_owned(),
        other => format!("uid {}", other.as_raw()),
    });
    format!("{user}@{}", rustix::system::uname().nodename().to_string_lossy())
}
