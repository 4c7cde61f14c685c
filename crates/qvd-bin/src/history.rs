//! The history of images: on the repository itself, also while a daemon runs.

use std::{
    fs, io,
    path::Path,
    time::{Duration, SystemTime},
};

use anyhow::Context;
use qvd_core::{FlavourName, Tag};
use qvd_storage::{
    Error, Recipe, Repository,
    repository::{
        Change, Checked, Commit, CommitId, Content, Diff, Expect, Keep, Logged, NewCommit, Reference, Revision,
        Rollout, Tree,
        archive::{Format, is_disk},
    },
};
use serde::Serialize;

use crate::{
    cli::{ExportFormat, Image, Import},
    failure::{Exit, Refusal},
    graph,
    image::read_recipe,
    output::{Output, age, one_line},
    paths::Paths,
    signing,
    transfer::{self, Remote},
};

/// Carries out a command about the history of images.
pub(crate) fn run(paths: &Paths, command: Image, output: &Output) -> anyhow::Result<()> {
    let at = paths.root.join("images");
    // What only looks must not make a repository where there is none.
    if let Image::Key { file } = &command {
        return signing::key(file, output);
    }
    let makes = matches!(command, Image::Import(_) | Image::Pull(_) | Image::Clone { .. });
    let repository = if makes { Repository::open(&at).map_err(Into::into) } else { existing(&at) };
    let repository = repository.with_context(|| format!("cannot open the images of `{}`", paths.root.display()))?;
    match command {
        // Done before.
        Image::Build { .. } | Image::Ls | Image::Key { .. } | Image::Bisect(_) | Image::Commit { .. } => Ok(()),
        Image::Import(import) => {
            let what = format!("cannot import `{}`", import.source.display());
            let id = self::import(&repository, import).context(what)?;
            show_made(&repository, id, output)
        }
        Image::Log { image } => {
            let log = || repository.log(repository.resolve(&image)?);
            let log = log().with_context(|| format!("cannot show the history of {image}"))?;
            output.result(&log, |log| graph::draw(log))
        }
        Image::Show { image } => show(&repository, &image, output),
        Image::Diff { from, to } => {
            let commit = |image| repository.commit(repository.resolve(image)?);
            let diff = || repository.diff(&commit(&from)?, &commit(&to)?);
            let diff = diff().with_context(|| format!("cannot compare {from} with {to}"))?;
            output.result(&diff, show_diff)
        }
        Image::Tag { flavour, name: None, .. } => tags(&repository, &flavour, output),
        Image::Tag { flavour, name: Some(name), id, message, steps } => {
            let tag = || {
                let id = id.map_or(Ok(None), |id| target(&flavour, &id).map(Some))?;
                let to = repository.resolve(&id.unwrap_or(Reference { flavour: flavour.clone(), revision: None }))?;
                let who = author();
                // Without steps, those under way end: all get it.
                let under_way = repository.rollout(&flavour, &name)?.map(|_| Rollout::default());
                match steps.rollout().or(under_way) {
                    Some(rollout) => repository.publish(&flavour, &name, to, rollout, (&who, &message))?,
                    None => repository.move_tag(&flavour, &name, Expect::Anything, Some(to), (&who, &message))?,
                };
                anyhow::Ok(to)
            };
            let to = tag().with_context(|| format!("cannot put `{name}` of {flavour}"))?;
            let tagged = Tagged { flavour, tag: name, commit: to };
            output.result(&tagged, |tagged| format!("{}:{} is on {}", tagged.flavour, tagged.tag, short(tagged.commit)))
        }
        Image::Untag { flavour, name } => {
            let image = Reference { flavour: flavour.clone(), revision: Some(Revision::Tag(name.clone())) };
            let untag = || {
                repository.resolve(&image)?;
                repository.move_tag(&flavour, &name, Expect::Anything, None, (&author(), "removed"))
            };
            untag().with_context(|| format!("cannot remove the tag {image}"))?;
            output.result(&image, |image| format!("{image} is no tag any more"))
        }
        Image::Reflog { image } => {
            let tag = match &image.revision {
                Some(Revision::Tag(tag)) => tag.clone(),
                _ => Tag::head(),
            };
            let moves = repository.reflog(&image.flavour, &tag);
            let mut moves = moves.with_context(|| format!("cannot show where {image} has been"))?;
            moves.reverse();
            output.table(&moves, ["AGE", "COMMIT", "WHO", "WHY"], |one| {
                let to = one.to.map_or_else(|| "removed".to_owned(), short);
                [age(one.time_unix_s), to, one.who.clone(), one.why.clone()]
            })
        }
        Image::Revert { image, message } => {
            let message = message.unwrap_or_else(|| format!("back to {image}"));
            let id = repository.resolve(&image).and_then(|to| repository.revert(to, &author(), &message));
            show_made(&repository, id.with_context(|| format!("cannot go back to {image}"))?, output)
        }
        Image::Rm { flavour } => {
            let rm = || {
                let tags = repository.tags(&flavour)?;
                if tags.is_empty() {
                    return Err(Error::NoSuchFlavour(flavour.clone()));
                }
                tags.keys().try_for_each(|tag| {
                    repository.move_tag(&flavour, tag, Expect::Anything, None, (&author(), "flavour removed")).map(drop)
                })
            };
            rm().with_context(|| format!("cannot remove flavour {flavour}"))?;
            output.result(&flavour, |flavour| format!("{flavour} is removed; `qvd image gc` deletes what it held"))
        }
        Image::Checkout { image, to } => export(&repository, &image, &to, Format::Directory, output),
        Image::Export { image, to, format } => {
            let format = match format {
                None => Format::of(&to),
                Some(ExportFormat::Dir) => Format::Directory,
                Some(ExportFormat::Tar) => Format::Tar,
                Some(ExportFormat::TarGz) => Format::TarGz,
                Some(ExportFormat::TarZst) => Format::TarZst,
                Some(ExportFormat::Oci) => Format::Oci,
            };
            export(&repository, &image, &to, format, output)
        }
        Image::Sign { image, key, password_stdin } => signing::sign(&repository, &image, &key, password_stdin, output),
        Image::Policy { require, none } => signing::policy(&repository, &require, none, output),
        Image::Fsck { repair, access } => {
            let remote = repair.map(|remote| Remote::of(&remote, &access)).transpose().context("cannot repair")?;
            fsck(&repository, remote, output)
        }
        Image::Gc { dry_run, keep_days } => {
            let cannot = "cannot collect what is not needed";
            let commits = repository.in_use(&paths.root).context(cannot)?;
            let keep = Keep { reflog: Duration::from_secs(u64::from(keep_days) * 86_400), commits };
            let collected = repository.gc(&keep, dry_run).context(cannot)?;
            let verb = if dry_run { "would delete" } else { "deleted" };
            output.result(&collected, |c| {
                let (commits, trees, objects) = (c.commits, c.trees, c.objects);
                format!("{verb} {commits} commits, {trees} trees, {objects} objects: {}", mib(c.bytes))
            })
        }
        Image::Push(transfer) => transfer::push(repository, &transfer, output),
        Image::Pull(transfer) => transfer::pull(&repository, &transfer, output),
        Image::Clone { remote, access } => transfer::clone(&repository, &remote, &access, output),
    }
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

fn import(repository: &Repository, import: Import) -> anyhow::Result<CommitId> {
    let recipe = import.recipe.as_ref().map(|path| anyhow::Ok(Recipe::parse(&read_recipe(path)?)?)).transpose()?;
    let staging = repository.stage()?;
    let max_bytes = import.max_size.get();
    let disk = import.disk || is_disk(&import.source).map_err(|error| not_read(&import.source, error))?;
    let made = match disk {
        true => Made::Disk(staging.import_disk(&import.source, max_bytes)?),
        false => Made::Tree(staging.import(&import.source, max_bytes)?),
    };
    staging.settle()?;
    let config = match (recipe, &made) {
        (Some(recipe), _) if *recipe.flavour() != import.flavour => {
            let what = format!("the recipe is of flavour {}, not of {}", recipe.flavour(), import.flavour);
            return Err(Refusal::new(Exit::Usage, what).into());
        }
        (Some(recipe), _) => recipe.config().clone(),
        (None, Made::Tree(tree)) => repository.config_for(&import.flavour, tree)?,
        (None, Made::Disk(_)) => repository.config_of_head(&import.flavour)?,
    };
    let new = NewCommit {
        config,
        author: import.author.unwrap_or_else(author),
        message: import.message,
        time: SystemTime::now(),
        recipe: None,
        publish: import.publish,
    };
    Ok(match made {
        Made::Tree(tree) => repository.commit_tree(&staging, &tree, new)?,
        Made::Disk(disk) => repository.commit_disk(&staging, disk, new)?,
    })
}

/// What was imported, before it is committed.
enum Made {
    Tree(Tree),
    Disk(Content),
}

fn not_read(source: &Path, error: io::Error) -> anyhow::Error {
    match error.kind() {
        io::ErrorKind::NotFound => Refusal::new(Exit::NotFound, format!("there is no `{}`", source.display())).into(),
        _ => error.into(),
    }
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

#[derive(Serialize)]
struct Tagged {
    flavour: FlavourName,
    tag: Tag,
    commit: CommitId,
}

fn tags(repository: &Repository, flavour: &FlavourName, output: &Output) -> anyhow::Result<()> {
    let tags = repository.tags(flavour).with_context(|| format!("cannot list the tags of {flavour}"))?;
    if tags.is_empty() {
        return Err(Error::NoSuchFlavour(flavour.clone()).into());
    }
    let row = |(tag, commit)| Tagged { flavour: flavour.clone(), tag, commit };
    let tags: Vec<Tagged> = tags.into_iter().map(row).collect();
    output.table(&tags, ["TAG", "COMMIT"], |tagged| [tagged.tag.to_string(), short(tagged.commit)])
}

/// A commit with everything that it says.
#[derive(Serialize)]
struct Shown {
    id: CommitId,
    tags: Vec<Tag>,
    #[serde(flatten)]
    commit: Commit,
    flavour: FlavourName,
    package_count: usize,
    /// Ids of the keys that it is signed by.
    signers: Vec<String>,
}

fn show(repository: &Repository, image: &Reference, output: &Output) -> anyhow::Result<()> {
    let show = || {
        let id = repository.resolve(image)?;
        let commit = repository.commit(id)?;
        let flavour = commit.flavour().clone();
        let tags = repository.tags_by_commit(&flavour)?.remove(&id).unwrap_or_default();
        let package_count = repository.packages(&commit)?.map_or(0, |packages| packages.versions.len());
        let signers = repository.signers(id)?;
        Ok::<_, Error>(Shown { id, tags, commit, flavour, package_count, signers })
    };
    let shown = show().with_context(|| format!("cannot show {image}"))?;
    output.result(&shown, |shown| {
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

fn show_made(repository: &Repository, id: CommitId, output: &Output) -> anyhow::Result<()> {
    let logged: Logged = repository.logged(id)?;
    output.result(&logged, |logged| {
        let what = match logged.content {
            Content::Tree { entries, size_bytes, .. } => format!("{entries} entries, {}", mib(size_bytes)),
            Content::Disk { size_bytes, .. } => format!("a disk of {}", mib(size_bytes)),
            _ => "committed".to_owned(),
        };
        format!("{} {}: {what}", logged.flavour, short(logged.id))
    })
}

#[derive(Serialize)]
struct Exported<'a> {
    image: &'a Reference,
    to: &'a Path,
}

fn export(
    repository: &Repository,
    image: &Reference,
    to: &Path,
    format: Format,
    output: &Output,
) -> anyhow::Result<()> {
    let export = || repository.export(repository.resolve(image)?, to, format);
    export().with_context(|| format!("cannot write {image} to `{}`", to.display()))?;
    output.result(&Exported { image, to }, |done| format!("{} written to `{}`", done.image, done.to.display()))
}

fn fsck(repository: &Repository, remote: Option<Remote>, output: &Output) -> anyhow::Result<()> {
    let source = remote.map(Remote::source).transpose().context("cannot repair")?;
    let checked = repository.fsck(source.as_deref()).context("cannot check the images")?;
    output.result(&checked, |checked: &Checked| {
        let problems = checked.problems.iter().map(|problem| {
            let end = if problem.repaired { "; repaired" } else { "" };
            one_line(&format!("{}: {}{end}", problem.what, problem.reason))
        });
        let Checked { objects, trees, commits, tags, bytes, .. } = checked;
        let all = format!("{objects} objects ({}), {trees} trees, {commits} commits, {tags} tags checked", mib(*bytes));
        problems.chain([all]).collect::<Vec<_>>().join("\n")
    })?;
    if checked.is_sound() {
        return Ok(());
    }
    let count = checked.problems.iter().filter(|problem| !problem.repaired).count();
    let remedy =
        if source.is_some() { "the remote has no sound one" } else { "`--repair REMOTE` takes sound ones from there" };
    Err(Refusal::new(Exit::Failed, format!("{count} damaged or missing; {remedy}")).into())
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
