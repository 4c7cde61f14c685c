//! Images: through the daemon when one runs, else on the repository itself.

use std::{os::unix::net::UnixStream, path::Path};

use anyhow::Context;
use qvd_node::ImageSummary;
use qvd_storage::{BuildOptions, Recipe, Store};

use crate::{
    cli::Image,
    failure::{Exit, Refusal},
    history,
    output::{Output, age, one_line},
    paths::{Paths, read_text},
    remote,
};

/// Carries out a command about images.
pub(crate) fn run(paths: &Paths, server: Option<&Path>, command: Image, output: &Output) -> anyhow::Result<()> {
    if !matches!(command, Image::Build { .. } | Image::Ls) {
        return history::run(paths, server, command, output);
    }
    // A daemon holds the repository, so it has to do the work. One that was
    // named has to be there.
    if server.is_some() || UnixStream::connect(paths.socket()).is_ok() {
        let client = remote::connect(paths, server)?;
        return remote::wait(remote::image(&client, command, output))?;
    }
    match command {
        Image::Build { recipe, message } => {
            let text = read_recipe(&recipe)?;
            let cannot = || format!("cannot build the image of `{}`", recipe.display());
            let recipe = Recipe::parse(&text).with_context(cannot)?;
            let store = open(paths)?;
            let progress = output.progress();
            let mut options = BuildOptions { author: history::author(), ..BuildOptions::default() };
            if let Some(message) = message {
                options.message = message;
            }
            let built = store.build(&recipe, &options, &mut |line| progress.say(line));
            drop(progress);
            // Nobody else does it once this command has ended.
            if let Err(error) = store.empty_trash() {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "the next command on these images tries again"
                );
            }
            let built = built.with_context(cannot)?;
            show_built(&ImageSummary::of(&built.image, built.reused), output)
        }
        Image::Ls => {
            // Listing must not make a repository where there is none.
            let cannot = "cannot list the images";
            let Some(repository) = history::find(&paths.root.join("images"))? else { return list(&[], output) };
            list(&ImageSummary::all(&repository).context(cannot)?, output)
        }
        other => history::run(paths, server, other, output),
    }
}

fn open(paths: &Paths) -> anyhow::Result<Store> {
    if !rustix::process::geteuid().is_root() {
        let what = format!("cannot open the images of `{}`: this takes root", paths.root.display());
        return Err(Refusal::new(Exit::Unsupported, what).into());
    }
    Store::open(&paths.root).with_context(|| format!("cannot open the images of `{}`", paths.root.display()))
}

pub(crate) fn read_recipe(recipe: &Path) -> anyhow::Result<String> {
    Ok(read_text("recipe", recipe)?)
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
        // Enough to tell images apart; JSON has all of it.
        let digest = image.digest.hex().chars().take(12).collect();
        let (age, size, entries) = match &image.damaged {
            None => (age(image.created_unix_s), format!("{} MiB", image.size_bytes >> 20), image.entries.to_string()),
            Some(_) => ("-".to_owned(), "damaged".to_owned(), "-".to_owned()),
        };
        [image.flavour.to_string(), age, size, entries, digest]
    })
}
