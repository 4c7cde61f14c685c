//! Flavours with what their new desktops get, and images with their versions. Nothing is built here.

use std::sync::Arc;

use axum::{
    Extension, Form,
    extract::{Path, State},
    response::{IntoResponse as _, Redirect, Response},
};
use qvd_core::{Bytes, FlavourName};
use qvd_farm::{ErrorKind, Farm, FarmError, Flavour, FlavourDefaults};
use qvd_node::ImageSummary;
use qvd_storage::repository::{Content, Logged, Reference};
use serde::Deserialize;

use super::{
    AdminState, Who,
    pages::{
        FlavourRow, Flavours, Frame, ImageRow, Images, LimitsForm, OneFlavour, OneImage, VersionRow, ago, answer,
        failure, given, mib, network, root, short,
    },
};
use crate::{
    images::{ImageCall, Log, Tagged, Tags},
    portal::assets,
};

const FLAVOURS: &str = "flavours";
const IMAGES: &str = "images";
/// Versions on a page: the newest.
const VERSIONS: usize = 100;

/// What new desktops get, as the form has it.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct DefaultsForm {
    #[serde(flatten)]
    pub(super) limits: LimitsForm,
    pub(super) root: String,
    /// Empty leaves the policy as it is: it may be one that no choice here stands for.
    pub(super) network: String,
}

fn named(name: &str) -> Result<FlavourName, FarmError> {
    name.parse().map_err(|error| FarmError::new(ErrorKind::NotFound, "there is no such flavour").because(error))
}

pub(super) fn image_row(image: &ImageSummary) -> ImageRow {
    ImageRow {
        flavour: image.flavour.to_string(),
        digest: short(&image.digest.hex()),
        made: ago(image.created_unix_s),
        size: mib(image.size_bytes),
        damaged: image.damaged.clone(),
    }
}

pub(super) async fn flavours(State(state): State<Arc<AdminState>>, Extension(who): Extension<Who>) -> Response {
    let row = |flavour: Flavour| {
        let FlavourDefaults { limits, root, net } = flavour.defaults;
        FlavourRow {
            name: flavour.name.to_string(),
            memory: limits.memory.to_string(),
            cpu: limits.cpu.0,
            pids: limits.pids,
            io: limits.io.map_or_else(String::new, |io| format!("{io}/s")),
            root: root.as_str(),
            network: net.summary(),
            image: ago(flavour.created_unix_s),
        }
    };
    match state.farm().flavours().await {
        Ok(flavours) => {
            let flavours = flavours.into_iter().map(row).collect();
            answer(None, &Flavours { assets: &assets::BASE, frame: Frame::new(&who, FLAVOURS), flavours })
        }
        Err(error) => failure(&who, FLAVOURS, &error),
    }
}

pub(super) async fn flavour(
    State(state): State<Arc<AdminState>>,
    Extension(who): Extension<Who>,
    Path(name): Path<String>,
) -> Response {
    match named(&name) {
        Ok(name) => flavour_page(&state, &who, &name, None, None).await,
        Err(error) => failure(&who, FLAVOURS, &error),
    }
}

/// What new desktops get; `form` is what was sent, if that was refused.
async fn flavour_page(
    state: &AdminState,
    who: &Who,
    name: &FlavourName,
    problem: Option<&FarmError>,
    form: Option<DefaultsForm>,
) -> Response {
    match state.farm().flavour(name).await {
        Ok(Flavour { defaults, .. }) => {
            let set = || DefaultsForm {
                limits: LimitsForm::of(&defaults.limits),
                root: defaults.root.as_str().to_owned(),
                network: String::new(),
            };
            let page = OneFlavour {
                assets: &assets::BASE,
                frame: Frame::new(who, FLAVOURS).with(problem),
                name: name.as_str(),
                network: defaults.net.summary(),
                form: form.unwrap_or_else(set),
            };
            answer(problem, &page)
        }
        Err(error) => failure(who, FLAVOURS, problem.unwrap_or(&error)),
    }
}

/// The defaults that a form asks for, where `now` is what there is.
fn changed(now: FlavourDefaults, form: &DefaultsForm) -> Result<FlavourDefaults, FarmError> {
    let mut limits = form.limits.over(now.limits)?.unwrap_or(now.limits);
    // The form shows what is set: without it there is no limit.
    limits.io = given::<Bytes>("disks", &form.limits.io)?;
    let root = root(&form.root)?.unwrap_or(now.root);
    Ok(FlavourDefaults { limits, root, net: network(&form.network)?.unwrap_or(now.net) })
}

pub(super) async fn set_defaults(
    State(state): State<Arc<AdminState>>,
    Extension(who): Extension<Who>,
    Path(name): Path<String>,
    Form(form): Form<DefaultsForm>,
) -> Response {
    let name = match named(&name) {
        Ok(name) => name,
        Err(error) => return failure(&who, FLAVOURS, &error),
    };
    let set = async {
        let defaults = changed(state.farm().flavour(&name).await?.defaults, &form)?;
        let (farm, flavour) = (state.farm().clone(), name.clone());
        let work = async move { farm.set_flavour_defaults(&flavour, defaults).await };
        state.carry_out(&who, "set the defaults of", format!("flavour {name}"), work).await
    };
    match set.await {
        Ok(()) => Redirect::to(&format!("/admin/flavours/{name}")).into_response(),
        Err(error) => flavour_page(&state, &who, &name, Some(&error), Some(form)).await,
    }
}

pub(super) async fn reset_defaults(
    State(state): State<Arc<AdminState>>,
    Extension(who): Extension<Who>,
    Path(name): Path<String>,
) -> Response {
    let name = match named(&name) {
        Ok(name) => name,
        Err(error) => return failure(&who, FLAVOURS, &error),
    };
    let (farm, flavour) = (state.farm().clone(), name.clone());
    let work = async move { farm.forget_flavour_defaults(&flavour).await };
    match state.carry_out(&who, "reset the defaults of", format!("flavour {name}"), work).await {
        Ok(()) => Redirect::to(&format!("/admin/flavours/{name}")).into_response(),
        Err(error) => flavour_page(&state, &who, &name, Some(&error), None).await,
    }
}

pub(super) async fn images(State(state): State<Arc<AdminState>>, Extension(who): Extension<Who>) -> Response {
    match state.farm().images().await {
        Ok(images) => {
            let images = images.iter().map(image_row).collect();
            answer(None, &Images { assets: &assets::BASE, frame: Frame::new(&who, IMAGES), images })
        }
        Err(error) => failure(&who, IMAGES, &error),
    }
}

/// A flavour's tags and versions.
pub(super) async fn image(
    State(state): State<Arc<AdminState>>,
    Extension(who): Extension<Who>,
    Path(flavour): Path<String>,
) -> Response {
    let known = async {
        let flavour = named(&flavour)?;
        let tags = looked(state.farm(), Tags { flavour: flavour.clone() }).await?;
        let image = Reference { flavour: flavour.clone(), revision: None };
        let log = looked(state.farm(), Log { image }).await?;
        Ok((flavour, tags, log))
    };
    let (flavour, tags, log) = match known.await {
        Ok(known) => known,
        Err(error) => return failure(&who, IMAGES, &error),
    };
    let tag = |Tagged { tag, commit, rollout, .. }: Tagged| {
        let rollout = rollout.map_or("", |_| "being rolled out");
        (tag.to_string(), short(&commit.hex()), rollout.to_owned())
    };
    let page = OneImage {
        assets: &assets::BASE,
        frame: Frame::new(&who, IMAGES),
        flavour: flavour.as_str(),
        tags: tags.into_iter().map(tag).collect(),
        all: log.len(),
        versions: log.into_iter().take(VERSIONS).map(version).collect(),
    };
    answer(None, &page)
}

/// Asks the repository of the host's images, off the async threads.
async fn looked<C: ImageCall>(farm: &Farm, call: C) -> Result<C::Answer, FarmError> {
    let cannot = call.cannot();
    let repository = farm.repository().ok_or_else(|| {
        FarmError::new(ErrorKind::Unsupported, format!("{cannot}: the images of this host are not on this machine"))
    })?;
    let looked = tokio::task::spawn_blocking(move || call.carry_out(&repository, &mut |_| {}));
    looked.await.unwrap_or_else(|error| Err(FarmError::with_code(ErrorKind::Failed, "internal", cannot).because(error)))
}

fn version(logged: Logged) -> VersionRow {
    let size = match logged.content {
        Content::Tree { size_bytes, .. } | Content::Disk { size_bytes, .. } => mib(size_bytes),
        _ => String::new(),
    };
    VersionRow {
        id: short(&logged.id.hex()),
        tags: logged.tags.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
        made: ago(logged.time_unix_s),
        author: logged.author,
        message: logged.message,
        size,
    }
}
