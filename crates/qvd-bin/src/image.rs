//! How images are shown.

use qvd_node::ImageSummary;

use crate::output::{Output, age, one_line};

/// Shows what a build came to.
pub(crate) fn built(image: &ImageSummary, output: &Output) -> anyhow::Result<()> {
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
