//! Images: through the daemon when one runs, else on the repository itself.

use std::{
    fs,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::SystemTime,
};

use anyhow::Context;
use qvd_node::ImageSummary;
use qvd_storage::{BuildOptions, Recipe, Store};

use crate::{
    cli::Image,
    failure::{Exit, Refusal},
    output::{Output, age, one_line},
    paths::Paths,
    remote,
};

/// Carries out a command about images.
pub(crate) fn run(paths: &Paths, server: Option<&Path>, command: Image, output: &Output) -> anyhow::Result<()> {
    // A daemon holds the repository, so it has to do the work. One that was
    // named has to be there.
    if server.is_some() || UnixStream::connect(paths.socket()).is_ok() {
        let client = remote::connect(paths, server)?;
        return remote::wait(remote::image(&client, command, output))?;
    }
    match command {
        Image::Build { recipe } => {
            let text = read_recipe(&recipe)?;
            let cannot = || format!("cannot build the image of `{}`", recipe.display());
            let recipe = Recipe::parse(&text).with_context(cannot)?;
            let store = open(paths)?;
            let progress = output.progress();
            let built = store.build(&recipe, &BuildOptions::default(), &mut |line| progress.say(line));
            drop(progress);
            let built = built.with_context(cannot)?;
            show_built(&summary(&built.image, built.reused), output)
        }
        Image::Ls => {
            // Listing must not make a state directory where there is none.
            if !paths.root.is_dir() {
                return list(&[], output);
            }
            let store = open(paths)?;
            let flavours = store.flavours().context("cannot list the images")?;
            let images = flavours.iter().map(|flavour| store.flavour(flavour).map(|image| summary(&image, false)));
            list(&images.collect::<Result<Vec<_>, _>>().context("cannot list the images")?, output)
        }
    }
}

fn open(paths: &Paths) -> anyhow::Result<Store> {
    Store::open(&paths.root).with_context(|| format!("cannot open the images of `{}`", paths.root.display()))
}

fn read_recipe(recipe: &PathBuf) -> anyhow::Result<String> {
    fs::read_to_string(recipe).map_err(|error| {
        let exit = if error.kind() == std::io::ErrorKind::NotFound { Exit::NotFound } else { Exit::Failed };
        Refusal::new(exit, format!("cannot read the recipe `{}`: {error}", recipe.display())).into()
    })
}

fn summary(image: &qvd_storage::Image, reused: bool) -> ImageSummary {
    let created = image.created().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    ImageSummary {
        flavour: image.config().flavour.clone(),
        digest: image.digest(),
        created_unix_s: created.as_secs(),
        entries: image.entries(),
        size_bytes: image.size_bytes(),
        reused,
    }
}

/// Shows what a build came to.
pub(crate) fn show_built(image: &ImageSummary, output: &Output) -> anyhow::Result<()> {
    output.result(image, |image| {
        let how = if image.reused { "is there already" } else { "built" };
        one_line(&format!("image {} {how}: {}, {} MiB", image.flavour, image.digest, image.size_bytes >> 20))
    })
}

/// Shows the newest image of every flavour.
pub(crate) fn list(images: &[ImageSummary], output: &Output) -> anyhow::Result<()> {
    output.table(images, ["FLAVOUR", "AGE", "SIZE", "ENTRIES", "DIGEST"], |image| {
        [
            image.flavour.to_string(),
            age(image.created_unix_s),
            format!("{} MiB", image.size_bytes >> 20),
            image.entries.to_string(),
            // Enough to tell images apart; JSON has all of it.
            image.digest.hex().chars().take(12).collect(),
        ]
    })
}
