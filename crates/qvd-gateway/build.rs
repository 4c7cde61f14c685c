//! Says what to do when the browser code to embed is not there.

use std::path::Path;

fn main() {
    let entry = "web/node_modules/@novnc/novnc/core/rfb.js";
    println!("cargo::rerun-if-changed={entry}");
    println!("cargo::rerun-if-changed=web/package-lock.json");
    println!("cargo::rerun-if-changed=assets");
    if !Path::new(entry).is_file() {
        println!("cargo::error=the browser display (noVNC) is missing: run `npm ci --prefix crates/qvd-gateway/web`");
    }
}
