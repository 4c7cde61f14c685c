//! The conformance suite on every back end that this host can run.
#![allow(clippy::unwrap_used)]

mod scratch;

use std::path::Path;

use qvd_storage::{
    Backends, Btrfs,
    conformance::{BaseForm, Effort, Report, Suite},
};
use qvd_testkit::{Need, privileged};
use scratch::on;

const NEEDS: &[Need] =
    &[Need::Root, Need::LoopDevices, Need::UserNamespaces, Need::Filesystem("overlay"), Need::Program("mkfs.ext4")];

/// All of it, or what is done in seconds.
fn effort() -> Effort {
    if std::env::var_os("QVD_CONFORMANCE").is_some_and(|value| value == "all") {
        Effort::Thorough
    } else {
        Effort::Quick
    }
}

fn only(suite: Suite) -> Suite {
    match std::env::var("QVD_CONFORMANCE_ONLY") {
        Ok(prefix) => suite.only(prefix),
        Err(_) => suite,
    }
}

fn demand(report: &Report) {
    assert!(report.passed(), "{report}");
}

fn check(name: &str, form: BaseForm, at: &Path) {
    demand(&only(Suite::of(&Backends::built_in(), name).on(form).effort(effort())).run(at).unwrap());
}

#[test]
fn overlayfs_on_a_directory() {
    privileged(NEEDS, || on("ext4", &[], |at| check("overlayfs", BaseForm::Directory, at)));
}

#[test]
fn overlayfs_on_layers() {
    privileged(NEEDS, || on("ext4", &[], |at| check("overlayfs", BaseForm::Layers, at)));
}

#[test]
fn overlayfs_on_an_image() {
    let needs = [NEEDS, &[Need::Filesystem("erofs"), Need::Program("mkfs.erofs")]].concat();
    privileged(&needs, || on("ext4", &[], |at| check("overlayfs", BaseForm::Image, at)));
}

#[test]
fn copy() {
    privileged(NEEDS, || on("ext4", &[], |at| check("copy", BaseForm::Directory, at)));
}

#[test]
fn bind() {
    privileged(NEEDS, || on("ext4", &[], |at| check("bind", BaseForm::Directory, at)));
}

#[test]
fn looped() {
    privileged(NEEDS, || on("ext4", &[], |at| check("loop", BaseForm::Directory, at)));
}

#[test]
fn fuse_overlayfs() {
    let needs = [NEEDS, &[Need::Filesystem("fuse"), Need::Program("fuse-overlayfs")]].concat();
    privileged(&needs, || on("ext4", &[], |at| check("fuse", BaseForm::Directory, at)));
}

#[test]
fn unionfs_fuse() {
    let needs = [NEEDS, &[Need::Filesystem("fuse"), Need::Program("unionfs")]].concat();
    privileged(&needs, || on("ext4", &[], |at| check("unionfs-fuse", BaseForm::Directory, at)));
}

#[test]
fn reflink_on_xfs() {
    let needs = [NEEDS, &[Need::Filesystem("xfs"), Need::Program("mkfs.xfs")]].concat();
    privileged(&needs, || on("xfs", &[], |at| check("reflink", BaseForm::Directory, at)));
}

#[test]
fn reflink_on_btrfs() {
    let needs = [NEEDS, &[Need::Filesystem("btrfs"), Need::Program("mkfs.btrfs")]].concat();
    privileged(&needs, || on("btrfs", &[], |at| check("reflink", BaseForm::Directory, at)));
}

#[test]
fn btrfs() {
    let needs = [NEEDS, &[Need::Filesystem("btrfs"), Need::Program("mkfs.btrfs")]].concat();
    privileged(&needs, || {
        on("btrfs", &[], |at| {
            let make = |place| {
                let backend = Btrfs::new(place);
                backend.enable_simple_quota()?;
                Ok(Box::new(backend) as _)
            };
            demand(&only(Suite::new("btrfs", make).effort(effort())).run(at).unwrap());
        });
    });
}
